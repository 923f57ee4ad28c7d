"""Unlike rows in their order: the bound and the integer program against all splits."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.best_first import exhaustive, find
from planner.candidate import Candidate, Stage
from planner.defaults import Job
from planner.in_order import handouts, slowest
from planner.layouts import Choices
from planner.model import Experts
from planner.order import Order
from planner.program import solve
from strategies.layout import Layout
from tests.helpers import job_of, llama


@st.composite
def candidates(draw: st.DrawFn) -> Candidate:
    """Plain numbers, whole ones, so that many splits are equally quick or just fit."""
    kinds, policies, depth = draw(st.integers(2, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    columns = kinds * policies
    sequence = tuple(draw(st.lists(st.integers(0, kinds - 1), min_size=max(depth, kinds), max_size=6)))
    sequence = (*range(kinds), *sequence)

    def numbers(least: int, most: int) -> tuple[float, ...]:
        return tuple(float(draw(st.integers(least, most))) for _ in range(columns))

    seconds = numbers(1, 9)  # of a row, wherever it is
    stages = tuple(
        Stage(
            moments={
                name: (numbers(1, 9), float(draw(st.integers(0, 9))), numbers(0, 9))
                for name in ("backward", "loss")
            },
            seconds=seconds,
            fixed_seconds=float(draw(st.integers(0, 3))),
        )
        for _ in range(depth)
    )
    return Candidate(
        layout=Layout(pipeline_parallel=depth),
        policies=("none", "selective", "full")[:policies],
        order=Order(tuple((kind,) for kind in range(kinds)), sequence),
        short=0,
        capacity=float(draw(st.integers(10, 80))),
        stages=stages,
        fill=draw(st.sampled_from([0.0, 1.0])),
        repeat=draw(st.sampled_from([0.0, 1.0, 7.0])),
        step_seconds=1.0,
    )


def splits(candidate: Candidate) -> list[tuple[float, float]]:
    """Cost and slowest stage of every split and hand-out that fits."""
    rows, depth, several = candidate.rows, len(candidate.stages), len(candidate.policies)
    found = []
    for cuts in combinations(range(1, rows), depth - 1):
        ends = [0, *cuts, rows]
        counts = [b - a for a, b in pairwise(ends)]
        per_stage = []
        for j, kinds in enumerate(candidate.order.split(counts)):
            ways = [
                tuple(int(n) for part in one for n in part)
                for one in product(*(handouts(n, several).tolist() for n in kinds))
            ]
            per_stage.append([one for one in ways if candidate.peak(j, one)[0] <= candidate.capacity])
        for one in product(*per_stage):
            times = [candidate.stage_seconds(j, own) for j, own in enumerate(one)]
            found.append((candidate.cost(one), max(times)))
    return found


@given(candidates())
@settings(deadline=None, max_examples=150)
def test_the_program_finds_the_best_of_all_splits_and_the_bound_is_exact(
    candidate: Candidate,
) -> None:
    every = splits(candidate)
    solution = solve([candidate])
    if not every:
        assert solution is None
        assert slowest(candidate) == float("inf")
        return
    assert solution is not None
    rows = solution.rows
    assert solution.cost == pytest.approx(min(cost for cost, _ in every), rel=2e-6)
    assert slowest(candidate) == pytest.approx(min(time for _, time in every))
    assert all(candidate.peak(j, own)[0] <= candidate.capacity * (1 + 1e-6) for j, own in enumerate(rows))
    assert [sum(own) > 0 for own in rows] == [True] * len(rows)


def mixture() -> Job:
    """Six blocks, the first two dense, on GPUs that some of their splits fill."""
    experts = Experts(num_experts=8, num_experts_per_tok=2, intermediate_size=512)
    mlps = ("dense", "dense", *("experts",) * 4)
    model = llama(6, 256, 8, 4, experts=experts, mlps=mlps)
    return job_of(model, "8xH100", seq_length=2048, global_batch_size=32)


def test_the_search_finds_what_solving_every_layout_finds() -> None:
    job = mixture()
    choices = Choices(micro_batch_size=(1, 4), tensor_parallel=(1, 2), expert_tensor_parallel=(1,))
    quick = find(job, choices, top=4)
    assert quick.optimal
    slow = exhaustive(job, choices, "time", 4)
    assert [one.cost for one in quick.answers] == pytest.approx([one.cost for one in slow], rel=1e-4)
