"""Random plans of a framework, on models of the catalog: the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from planner import api
from planner.errors import PlannerError
from planner.export import NotExpressible, Subject
from planner.export.base import Export
from planner.layouts import divisors
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout

MODELS = ("llama-3.2-1b", "llama-2-7b", "qwen2.5-0.5b", "qwen2-7b", "gpt2-medium", "opt-1.3b", "mistral-7b")
GPUS = ("8xh100", "16xh100", "4x4xa100-80g", "64xh100")


def random_plans(
    count: int,
    seed: int,
    make: Callable[[random.Random, ModelSpec, ClusterSpec], dict[str, Any]],
    models: Sequence[str] = MODELS,
) -> Iterator[Subject]:
    """So many plans that the planner accepts; ``make`` draws the arguments of an estimate."""
    dice = random.Random(seed)
    found = 0
    for _ in range(count * 60):
        if found == count:
            return
        model = ModelSpec.from_catalog(dice.choice(models))
        cluster = ClusterSpec.parse(dice.choice(GPUS)).model_copy(update={"nvme_bytes": 10**13})
        given = make(dice, model, cluster)
        try:
            plan = api.estimate(model, cluster, **given)
        except PlannerError:
            continue
        found += 1
        yield Subject(model, cluster, plan)
    raise AssertionError(f"{found} of {count} plans in {count * 60} attempts")


def degrees(dice: random.Random, cluster: ClusterSpec, names: tuple[str, ...]) -> dict[str, int]:
    """Degrees that multiply to the GPUs, those not named being 1, and the rest data parallel."""
    left, found = cluster.num_gpus, {}
    for name in names:
        found[name] = dice.choice([n for n in divisors(left) if n <= 8])
        left //= found[name]
    return {**found, "data_parallel": left}


def layout_of(dice: random.Random, degrees: dict[str, int], **more: Any) -> Layout:
    """A layout of degrees, with a micro-batch and a number of them."""
    stages = degrees.get("pipeline_parallel", 1)
    return Layout(
        **degrees,
        micro_batch_size=dice.choice((1, 2, 4)),
        grad_accum=dice.choice((1, 2, 4, 8)) * stages,
        **more,
    )


def training_of(layout: Layout, dice: random.Random, framework: str, **more: Any) -> TrainingSpec:
    """A training whose batch is the layout's."""
    return TrainingSpec(
        framework=framework,
        seq_length=dice.choice((512, 1024)),
        global_batch_size=int(layout.global_batch_size),
        **more,
    )


def expressed(
    subjects: list[Subject], export: Callable[[Subject], Export]
) -> tuple[list[tuple[Subject, Export]], list[str]]:
    """Plans with their exports, and the reasons for those that cannot be."""
    able: list[tuple[Subject, Export]] = []
    reasons: list[str] = []
    for subject in subjects:
        try:
            able.append((subject, export(subject)))
        except NotExpressible as error:
            reasons.append(str(error))
    assert all(len(reason) > 20 for reason in reasons)
    return able, reasons
