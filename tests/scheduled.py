"""Plans and exports of them for the tests of schedulers, whatever framework they are for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

from planner import ClusterSpec, TrainingSpec, api
from planner.errors import InputError
from planner.export.base import Export, Subject
from planner.specs import Gpu
from strategies.layout import Layout
from tests.helpers import llama

NASTY = (
    "a \"b\" 'c' $(HOME) $$(X) ${Y} `id` \\ {{ z }} ${{ run.args }} !!python/object:os é\u2028\n- x: 1 # end"
)
"""What nobody's text may do: be expanded, end a string or a line, begin a tag or a comment."""


@cache
def gpu(name: str) -> Gpu:
    """A kind of GPU."""
    return ClusterSpec.parse(f"8x{name}").gpu


def subject(
    gpus: str = "4x8xH100", name: str = "llama-test", framework: str = "megatron", **layout: Any
) -> Subject:
    """A plan of a small LLaMA."""
    cluster = ClusterSpec.parse(gpus)
    degrees = {"tensor_parallel": 2, "pipeline_parallel": 2, **layout}
    others = cluster.num_gpus // (degrees["tensor_parallel"] * degrees["pipeline_parallel"])
    whole = Layout(**{"data_parallel": others, "micro_batch_size": 1, "grad_accum": 4, **degrees})
    model = llama(8, name=name)
    training = TrainingSpec(seq_length=512, global_batch_size=4 * others, framework=framework)
    return Subject(model, cluster, api.estimate(model, cluster, training, whole))


def made(**more: Any) -> Export:
    """An export as a framework's exporter makes it, with a word of every dangerous kind."""
    given: dict[str, Any] = {
        "target": "megatron",
        "version": "0.19",
        "files": {"plan.args": f"--lr 1e-4\n{NASTY}\n", "train.py": "print('go')\n"},
        "env": {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NOTE": NASTY, "LR": "1e-4"},
        "program": ("train.py", "--note", NASTY, "--lr", "1e-4", "-x", "on", "0x1F", "1_000", "~", ""),
        "notes": ("a note of the framework",),
    }
    return Export(**{**given, **more})


def random_subjects(count: int, seed: int = 7) -> Iterator[Subject]:
    """Plans of many clusters and layouts, the same ones every time."""
    draw = random.Random(seed)
    kinds = (
        "H100",
        "H200",
        "A100-PCIe-80GB",
        "A100-40",
        "B200",
        "MI300X",
        "L40S",
        "GB200",
        "RTX-4090",
        "V100-32",
    )
    while count:
        nodes, per_node = draw.choice((1, 2, 3, 4, 8, 16, 64)), draw.choice((1, 4, 8))
        cluster = f"{nodes}x{per_node}x{draw.choice(kinds)}"
        tensor, pipeline = draw.choice((1, 2, 4)), draw.choice((1, 2, 4, 8))
        if (nodes * per_node) % (tensor * pipeline):
            continue
        name = draw.choice(("llama-65b", "Llama 3.1/70B", NASTY, "7b", "日本語", "x" * 90))
        try:
            yield subject(cluster, name, tensor_parallel=tensor, pipeline_parallel=pipeline)
        except InputError:
            continue
        count -= 1


@cache
def many_subjects() -> list[Subject]:
    """Two hundred of them."""
    return list(random_subjects(200))


def expanded(text: str, env: dict[str, str]) -> str:
    """What Kubernetes makes of a word: ``$(NAME)`` is its value where there is one, ``$$`` a ``$``."""
    out, at = "", 0
    while at < len(text):
        if text[at] != "$" or at + 1 == len(text):
            out, at = out + text[at], at + 1
        elif text[at + 1] == "$":
            out, at = out + "$", at + 2
        elif text[at + 1] == "(" and (end := text.find(")", at)) > 0:
            name = text[at + 2 : end]
            out, at = out + env.get(name, f"$({name})"), end + 1
        else:
            out, at = out + "$", at + 1
    return out
