"""nanotron's own loader reads what is exported, as the plan has it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml

from planner.export.nanotron import CONFIG, export, split_of
from planner.specs import ClusterSpec, ModelSpec
from tests.contract import WANTED, judged
from tests.contract.plans import degrees, expressed, layout_of, random_plans, training_of

pytestmark = pytest.mark.contract
VERSION = "2411b022"
MODELS = (
    "llama-3.2-1b",
    "llama-2-7b",
    "qwen2.5-0.5b",
    "qwen2-7b",
    "tinyllama-1.1b",
    "mistral-7b",
    "gpt2-medium",
)


def drawn(dice: random.Random, model: ModelSpec, cluster: ClusterSpec) -> dict[str, Any]:
    """A plan of Megatron's, often split as nanotron splits."""
    own = degrees(
        dice, cluster, ("tensor_parallel", "pipeline_parallel", "context_parallel")[: dice.choice((2, 2, 3))]
    )
    layout = layout_of(
        dice,
        own,
        sharding=dice.choice(("zero1", "zero1", "ddp", "ddp", "zero2")),
        sequence_parallel=own["tensor_parallel"] > 1 and dice.random() < 0.7,
        schedule=dice.choice(("1f1b", "1f1b", "gpipe")),
        context_comm=dice.choice(("ring", "ring", "all-gather", "ulysses")),
    )
    split = split_of(model, own["pipeline_parallel"])
    more: dict[str, Any] = {"optimizer": dice.choice(("adamw", "adamw", "adamw", "sgd", "adam"))}
    return {
        "training": training_of(layout, dice, "megatron", **more),
        "layout": layout,
        "recompute": dice.choice(("none", "full", "none", "full", "selective")),
        "layers": split if min(split) > 0 and dice.random() < 0.9 else None,
    }


def test_what_is_exported_is_read_as_the_plan_has_it() -> None:
    plans = list(random_plans(4 * WANTED, 13, drawn, MODELS))
    settings = {"project": "a'\"$(x)`y`: # \u00e9", "train_steps": "7"}
    able, reasons = expressed(plans, lambda one: export(one, VERSION, settings))
    print(f"nanotron: {len(able)} of {len(plans)} are expressible; {sorted(set(reasons))[:9]}")
    able = able[:WANTED]
    assert len(able) == WANTED
    answers = judged("nanotron", "nanotron.py", [made.files[CONFIG] for _, made in able])
    for (subject, made), answer in zip(able, answers, strict=True):
        assert answer["ok"], (answer, made.files[CONFIG])
        layout, model, training = subject.layout, subject.model, subject.job.training
        assert answer["degrees"] == [
            layout.data_parallel,
            layout.pipeline_parallel,
            layout.tensor_parallel,
            layout.context_parallel,
        ]
        assert answer["engine"].startswith("OneForward" if layout.schedule == "1f1b" else "AllForward")
        assert answer["mode"] == ("REDUCE_SCATTER" if layout.sequence_parallel else "ALL_REDUCE")
        assert answer["recompute"] == (subject.recompute("nanotron")[0] == "full")
        assert (answer["zero"], answer["fp32"]) == (int(layout.sharding == "zero1"), True)
        assert answer["batch"] == [layout.global_batch_size, layout.micro_batch_size, layout.grad_accum]
        assert (answer["seq"], answer["steps"], answer["dtype"]) == (training.seq_length, 7, "torch.bfloat16")
        assert answer["widths"] == [model.hidden_size, model.intermediate_size, model.vocab_size]
        assert answer["heads"] == [model.num_attention_heads, model.num_key_value_heads]
        assert answer["tied"] == model.tie_word_embeddings
        assert tuple(answer["split"]) == subject.layers
        assert answer["project"] == settings["project"]


def mutated(good: dict[str, Any], section: str, **values: Any) -> str:
    return yaml.safe_dump({**good, section: {**good[section], **values}})


def test_what_is_wrong_is_refused_by_the_parser_or_by_the_exporter() -> None:
    able, _ = expressed(list(random_plans(30, 17, drawn, MODELS)), lambda one: export(one, VERSION, {}))
    good = yaml.safe_load(able[0][1].files[CONFIG])
    cases = [
        mutated(good, "parallelism", tensor=2),
        mutated(good, "parallelism", tp="two"),
        mutated(good, "parallelism", pp_engine="interleaved"),
        mutated(good, "parallelism", tp_mode="SOMETIMES"),
        mutated(good, "optimizer", zero_stage=3),
    ]
    answers = judged("nanotron", "nanotron.py", cases)
    # Stage 3 parses and does nothing: the exporter never writes it (its own refusals are tested beside it).
    assert [one["ok"] for one in answers] == [False, False, False, False, True], answers
