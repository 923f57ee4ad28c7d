"""What a framework can be told to recompute, and searches of nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from planner import ClusterSpec, InputError, Layout, ModelSpec, TrainingSpec, estimate, search
from planner.best_first import exhaustive, find
from planner.defaults import resolve
from planner.layouts import Choices
from planner.splits import solve_layout
from planner.stages import price
from planner.told import one_way

MODEL = ModelSpec.from_catalog("llama-2-7b").model_copy(update={"num_hidden_layers": 12})
TRAINING = TrainingSpec(seq_length=4096, global_batch_size=32)


def cluster(budget: float) -> ClusterSpec:
    return ClusterSpec.parse("8x80G").model_copy(update={"budget_bytes": int(budget * 2**30)})


@pytest.mark.parametrize(
    ("stages", "way"),
    [
        ([{"none": (4,)}, {"none": (5,)}], ("none", None)),
        ([{"full": (4,)}, {"full": (5,)}], ("full", None)),
        ([{"none": (2,), "full": (2,)}, {"none": (3,), "full": (2,)}], ("full", 2)),
        ([{"full": (1,)}, {"none": (3,), "full": (2,)}], ("full", 2)),  # all that the first has
        ([{"none": (1,), "full": (1,)}, {"none": (3,), "full": (2,)}], None),
        ([{"none": (4,)}, {"none": (3,), "full": (1,)}], None),
        ([{"selective": (2,), "full": (2,)}] * 2, None),
        ([{"none": (0, 3), "full": (1, 0)}, {"none": (0, 4), "full": (0, 1)}], ("full", 1)),
    ],
)
def test_one_way_is_a_policy_of_the_first_layers_of_every_chunk(stages: list, way: object) -> None:
    assert one_way(stages) == way


@pytest.mark.parametrize("budget", [9, 12, 16, 24])
def test_what_is_launchable_is_found_as_by_looking_at_every_layout(budget: float) -> None:
    job = resolve(MODEL, cluster(budget), TRAINING)
    choices = Choices(launchable=True, micro_batch_size=(1, 2))
    found = find(job, choices, top=3)
    assert found.answers
    assert [round(one.cost, 9) for one in found.answers] == [
        round(one.cost, 9) for one in exhaustive(job, choices, "time", 3)
    ]


@pytest.mark.parametrize("budget", [9, 12, 16])
def test_launchable_plans_carry_no_warning_and_are_no_quicker(budget: float) -> None:
    free = search(MODEL, cluster(budget), TRAINING)
    told = search(MODEL, cluster(budget), TRAINING, choices=Choices(launchable=True))
    assert told[0].step_time_s >= free[0].step_time_s * (1 - 1e-9)
    for plan in told:
        assert one_way([stage.rows for stage in plan.stages])
        assert not any("--launchable" in note for note in plan.warnings)
    mixed = [plan for plan in free if one_way([stage.rows for stage in plan.stages]) is None]
    assert all(any("--launchable" in note for note in plan.warnings) for plan in mixed)


def test_no_split_that_can_be_told_is_better() -> None:
    """Every number of layers on two stages, under every number of recomputed ones."""
    layout = Layout(data_parallel=4, pipeline_parallel=2, grad_accum=8, sharding="zero1")
    job = resolve(MODEL, cluster(17), TRAINING)
    own = replace(Choices(), launchable=True, tensor_parallel=(1,), pipeline_parallel=(2,), chunks=(1,))
    found = find(job, replace(own, micro_batch_size=(1,), sharding=("zero1",), schedule=("1f1b",)), top=1)
    candidate = price(job, layout, job.stack.policies).spread()
    costs = []
    for first, again, policy in product(range(1, 12), range(13), (1, 2)):
        rows = []
        for count in (first, 12 - first):
            part = min(again, count)
            rows.append(tuple({0: count - part, policy: part}.get(r, 0) for r in range(3)))
        if all(candidate.fits(j, one) for j, one in enumerate(rows)):
            costs.append(candidate.cost(rows))
    assert found.answers[0].cost == pytest.approx(min(costs), rel=1e-9)


def test_the_first_layers_of_every_chunk() -> None:
    layout = Layout(data_parallel=2, pipeline_parallel=4, grad_accum=16, sharding="zero1")
    plans = [
        estimate(MODEL, ClusterSpec.parse("8x80G"), TRAINING, layout, recompute=recompute)
        for recompute in ("none", "full:0", "full:1", "full:2", "full:3", "full:9", "full")
    ]
    assert plans[0].peak_bytes == plans[1].peak_bytes
    assert plans[4].peak_bytes == plans[5].peak_bytes == plans[6].peak_bytes
    times = [plan.step_time_s for plan in plans]
    assert times == sorted(times)
    assert plans[3].stages[0].recompute == {"none": 1, "full": 2}
    uneven = estimate(
        MODEL, ClusterSpec.parse("8x80G"), TRAINING, layout, recompute="full:2", layers=(2, 4, 4, 2)
    )
    assert [stage.recompute for stage in uneven.stages[:2]] == [{"full": 2}, {"none": 2, "full": 2}]


@pytest.mark.parametrize("recompute", ["full:", "full:x", "none:2", "auto:1", "full:-1", "full:999999"])
def test_how_many_layers_are_recomputed_is_a_number(recompute: str) -> None:
    job = resolve(MODEL, ClusterSpec.parse("8x80G"), TRAINING)
    with pytest.raises(InputError, match="write full:2"):
        solve_layout(job, Layout(data_parallel=8, grad_accum=4), recompute)
