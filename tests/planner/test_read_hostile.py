"""Configurations with anything anywhere: they are read, or refused as what they are."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest
import yaml

from planner.errors import InputError
from planner.export import read_accelerate, read_deepspeed
from planner.export.structured import keys_of

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 1e308, "", "auto", "8", "\u00b2", "a" * 5000, "$(x)", "\u202e\n"),
    *(
        [],
        [1],
        {},
        {"a": 1},
        {"device": "cpu"},
        {"enabled": "auto"},
        {"stage": []},
        [[[]]],
        {1: 2},
        "none",
        "full",
    ),
)


def anything(dice: random.Random, tool: str) -> dict[str, Any]:
    keys = keys_of(tool)
    found: dict[str, Any] = {}
    for name in dice.sample(sorted(keys[""]), 9):
        inner = keys.get(name)
        if inner and dice.random() < 0.7:
            found[name] = {key: dice.choice(JUNK) for key in dice.sample(sorted(inner), min(len(inner), 6))}
        else:
            found[name] = dice.choice(JUNK)
    return found


@pytest.mark.parametrize("seed", range(150))
def test_anything_is_read_or_an_input_error(seed: int) -> None:
    dice = random.Random(seed)
    words = " ".join(
        f"--{name} {dice.choice(('1', 'x', '-3', ''))}" for name in ("seq-length", "bf16", "zero-stage")
    )
    deepspeed = {"train_batch_size": dice.choice(JUNK), "zero_optimization": dice.choice(JUNK)}
    zero = anything(dice, "deepspeed")
    accelerate = {"distributed_type": dice.choice(("FSDP", "DEEPSPEED", "MEGATRON_LM", "NO", 3))}
    arguments = {"output_dir": "x", **anything(dice, "training_arguments")}
    beside = {
        "args.json": json.dumps(arguments),
        "run.sh": f"deepspeed --num_gpus {dice.choice('08x')} t.py {words}",
    }
    for read, name, text in (
        (read_deepspeed.read, "ds.json", json.dumps({**deepspeed, **zero})),
        (read_accelerate.read, "a.yaml", yaml.safe_dump({**anything(dice, "accelerate"), **accelerate})),
    ):
        for files in ({name: text}, {name: text, **beside}):
            with contextlib.suppress(InputError):
                found = read(files, {})
                assert all(one.text.isprintable() and one.setting.isprintable() for one in found.findings)
                assert all(len(one.text) < 500 for one in found.findings)
