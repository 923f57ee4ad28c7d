"""Schedules that split the backward: their orders, what they hold, and how long their steps take."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.best_first import exhaustive, find
from planner.defaults import Job
from planner.errors import InputError
from planner.given import check_layout
from planner.layouts import Choices, enumerate_layouts
from planner.plan import Plan, make_plan, pass_seconds
from planner.program import solve
from planner.schedule import (
    Kind,
    Pass,
    Seconds,
    critical_path,
    even_chunks,
    order,
    path_seconds,
    timeline,
)
from planner.stages import price
from strategies.layout import Layout
from strategies.pipeline_parallel import FOLDED, SPLIT, PipelineParallel
from tests.helpers import job_of, llama
from tests.planner.test_program import brute_force, candidates_of, small_job

F, B, W, BW = Kind
PAIRED = ("dualpipe",)


@st.composite
def shapes(draw: st.DrawFn, schedules: tuple[str, ...] = SPLIT) -> tuple[str, int, int, int]:
    """A schedule with stages, micro-batches and chunks that it can have."""
    schedule = draw(st.sampled_from(schedules))
    p = draw(st.integers(1, 4)) * 2 if schedule in PAIRED else draw(st.integers(2, 8))
    more = draw(st.integers(0, 9)) * (2 if schedule in PAIRED else 1)
    m = int(PipelineParallel(p, schedule=schedule).least_microbatches) + more
    return schedule, p, m, 2 if schedule in FOLDED else 1


@st.composite
def shares(draw: st.DrawFn) -> tuple[float, float, float]:
    """F, B and W of a stage: W <= F <= B, as in a transformer."""
    w = draw(st.integers(1, 8))
    f = w + draw(st.integers(0, 5))
    return float(f), float(f + draw(st.integers(0, 5))), float(w)


def place(schedule: str, one: Pass, p: int) -> tuple[int, bool]:
    """Where in the model a pass is (of p or 2p parts), and whether it goes down the stages."""
    if schedule == "zb-v":
        return (one.stage, True) if one.chunk == 0 else (2 * p - 1 - one.stage, False)
    if schedule == "dualpipe":
        down = (one.chunk == 0) == (one.stage < p // 2)
        return (one.stage if down else p - 1 - one.stage), down
    return one.stage, True


@given(shapes())
@settings(deadline=None, max_examples=150)
def test_every_micro_batch_goes_once_forward_and_once_backward_through_every_part(
    shape: tuple[str, int, int, int],
) -> None:
    schedule, p, m, v = shape
    done: Counter[tuple[int, int, str]] = Counter()
    for stage in range(p):
        for one in order(schedule, stage, p, m, v):
            where, down = place(schedule, one, p)
            for kind in "BW" if one.kind is BW else one.kind.value:
                done[where, one.microbatch, kind] += 1
            if schedule == "dualpipe":  # half of them enters at each end
                assert down == (one.microbatch < m // 2)
    parts = 2 * p if schedule == "zb-v" else p
    expected = {(where, i, kind): 1 for where in range(parts) for i in range(m) for kind in "FBW"}
    assert done == expected


@given(shapes(), st.data())
@settings(deadline=None, max_examples=100)
def test_no_pass_starts_before_what_it_needs_nor_while_its_stage_works(
    shape: tuple[str, int, int, int], data: st.DataObject
) -> None:
    """The timeline of chunks of any length, held against the dependencies as such."""
    schedule, p, m, v = shape
    duration = st.floats(0.125, 8.0, width=16)
    seconds: Seconds = [
        [tuple.__new__(type(unit), [data.draw(duration) for _ in unit]) for unit in stage]
        for stage in even_chunks(schedule, [1.0] * p, [2.0] * p)
    ]
    times = timeline(schedule, seconds, m)
    last = (2 * p if schedule == "zb-v" else p) - 1
    start: dict[tuple[int, int, str], float] = {}
    end: dict[tuple[int, int, str], float] = {}
    for one in times:
        where, _ = place(schedule, one.work, p)
        for kind in "BW" if one.work.kind is BW else one.work.kind.value:
            start[where, one.work.microbatch, kind] = one.start
            end[where, one.work.microbatch, kind] = one.end
    slack = 1e-9
    for (where, i, kind), at in start.items():
        if kind == "F" and where:
            assert at >= end[where - 1, i, "F"] - slack
        elif kind == "B":
            needs = end[where + 1, i, "B"] if where < last else end[where, i, "F"]
            assert at >= needs - slack
        elif kind == "W":
            assert at >= start[where, i, "B"] - slack
    for stage in range(p):
        lane = [one for one in times if one.work.stage == stage]
        assert [one.work for one in lane] == order(schedule, stage, p, m, v)
        assert all(a.end <= b.start + slack for a, b in pairwise(lane))
    longest = max(one.end for one in times)
    assert longest == pytest.approx(path_seconds(schedule, seconds, m), rel=1e-12)


@given(shapes(), shares())
@settings(deadline=None, max_examples=150)
def test_the_closed_form_is_the_critical_path_of_equal_stages(
    shape: tuple[str, int, int, int], unit: tuple[float, float, float]
) -> None:
    """DualPipe's is the paper's, which its first backward on the middle stages undercuts where F < B."""
    schedule, p, m, v = shape
    f, b, w = unit
    whole = f + b + w
    pipeline = PipelineParallel(p, 0, m, v, schedule, f / whole, w / whole)
    path = critical_path(schedule, [f] * p, [b + w] * p, m, v, [w] * p)
    closed = pipeline.fill * p * whole + pipeline.repeat * whole
    assert closed == pytest.approx(m * whole * (1 + pipeline.bubble))
    if schedule == "dualpipe" and f < b:
        assert path * (1 - 1e-12) <= closed <= path * 1.05
    else:
        assert closed == pytest.approx(path, rel=1e-12)


@given(shapes(), shares(), st.data())
@settings(deadline=None, max_examples=150)
def test_the_closed_form_is_never_lower_where_all_passes_are_the_same_shares_of_a_stages_time(
    shape: tuple[str, int, int, int], unit: tuple[float, float, float], data: st.DataObject
) -> None:
    schedule, p, m, v = shape
    times = [data.draw(st.floats(1.0, 8.0, width=16)) for _ in range(p)]
    if schedule in PAIRED:
        times = [times[min(i, p - 1 - i)] for i in range(p)]
    f, b, w = (one / sum(unit) for one in unit)
    pipeline = PipelineParallel(p, 0, m, v, schedule, f, w)
    path = critical_path(
        schedule, [f * t for t in times], [(b + w) * t for t in times], m, v, [w * t for t in times]
    )
    assert pipeline.fill * sum(times) + pipeline.repeat * max(times) >= path * (1 - 1e-12)


def test_the_closed_form_can_be_low_where_stages_recompute() -> None:
    """W is then a smaller share of a stage's time than the closed form is told."""
    path = critical_path("zb-h1", [1.0] * 4, [2.0, 3.0, 3.0, 3.0], 8, weight=[1.0] * 4)
    pipeline = PipelineParallel(4, 0, 8, 1, "zb-h1")
    assert path == pytest.approx(37.0)
    assert pipeline.fill * 15 + pipeline.repeat * 4 == pytest.approx(35 + 2 / 3)


@given(shapes(), st.floats(1.0, 4.0))
@settings(deadline=None, max_examples=200)
def test_what_is_held_for_the_weights_gradients_is_covered_at_every_time(
    shape: tuple[str, int, int, int], more: float
) -> None:
    """A pass between the halves of its backward may hold more than before: gradients, what was recomputed."""
    schedule, p, m, v = shape
    for stage in range(p):
        pipeline = PipelineParallel(p, stage, m, v, schedule)
        waiting = pending = most = 0.0
        chunks, alive = Counter[int](), Counter[int]()
        for one in order(schedule, stage, p, m, v):
            waiting += {F: 1, B: -1, BW: -1, W: 0}[one.kind]
            pending += {B: 1, W: -1}.get(one.kind, 0)
            chunks[one.chunk] += {F: 1, B: 0}.get(one.kind, -1)
            alive |= chunks
            most = max(most, waiting + more * pending)
        covered = max(a + more * b for a, b in pipeline.held)
        assert most <= covered * (1 + 1e-12)
        if more == 1.0:
            assert most == covered == pipeline.in_flight
        embedding, head = pipeline.ends
        if embedding:
            assert alive[0] == pipeline.first_chunk_in_flight
        if head:
            assert alive[v - 1] == pipeline.last_chunk_in_flight


def test_the_ends_of_the_model_lie_where_the_schedule_puts_them() -> None:
    def ends(schedule: str) -> list[tuple[bool, bool]]:
        return [PipelineParallel(4, stage, schedule=schedule).ends for stage in range(4)]

    neither, both = (False, False), (True, True)
    assert ends("1f1b") == ends("zb-h1") == ends("zb-h2") == [(True, False), neither, neither, (False, True)]
    assert ends("zb-v") == [both, neither, neither, neither]
    assert ends("dualpipe") == [both, neither, neither, both]


@pytest.mark.parametrize(
    ("schedule", "p", "m", "chunks", "says"),
    [
        ("zb-h1", 4, 2, 1, "grad_accum=2 is less than the 4 micro-batches"),
        ("zb-h2", 4, 6, 1, "use 7 or more, or 1f1b"),
        ("zb-v", 4, 6, 2, "use 7 or more, or 1f1b"),
        ("zb-v", 2, 8, 3, "two chunks on every stage: use 2"),
        ("zb-v", 6, 16, 2, "pipeline_parallel=6 x chunks=2 is more than the 8 layers"),
        ("dualpipe", 3, 8, 2, "use 2 or 4, or zb-v"),
        ("dualpipe", 4, 9, 2, "half of it enters at each end: use 8 or 10"),
        ("dualpipe", 4, 6, 2, "use 8 or more, or 1f1b"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused_with_the_nearest_that_it_can(
    schedule: str, p: int, m: int, chunks: int, says: str
) -> None:
    layout = Layout(pipeline_parallel=p, grad_accum=m, chunks=chunks, schedule=schedule)
    job = job_of(llama(8, 64, 4, 4), f"{p}xA100", seq_length=64, global_batch_size=m)
    with pytest.raises(InputError, match=says):
        check_layout(job, layout)


@pytest.mark.parametrize("budget", [0.9, 1.1, 3.0])
@pytest.mark.parametrize("schedule", SPLIT)
def test_the_search_of_a_schedule_equals_brute_force(schedule: str, budget: float) -> None:
    job = small_job(budget, layers=6)
    choices = Choices(pipeline_parallel=(2,), tensor_parallel=(1, 2), schedule=(schedule,))
    candidates = candidates_of(job, choices)
    assert {one.layout.schedule for one in candidates} == {schedule}
    if schedule != "dualpipe":
        expected = brute_force(candidates)
    else:  # of whose splits only those count that are the same from both ends
        fitting = [
            one.cost(rows)
            for one in candidates
            for n in range(4)
            for k in range(4 - n)
            for rows in ([(n, k, 3 - n - k)] * 2,)
            if all(one.peak(j, own)[0] <= one.capacity for j, own in enumerate(rows))
        ]
        expected = min(fitting, default=float("inf"))
    found, every = find(job, choices, top=1), exhaustive(job, choices, "time", top=1)
    costs = [one.cost for one in (*found.answers, *every)]
    assert costs == pytest.approx([expected] * 2 if expected < float("inf") else [], rel=1e-5)


def test_torchtitan_offers_zb_v_without_recompute_and_not_compiled() -> None:
    model = llama(8, 256, 4, 4, vocab_size=1024)
    job = job_of(model, "4xA100", framework="torchtitan", seq_length=64, global_batch_size=32)
    schedules = {one.schedule for one in enumerate_layouts(job).families}
    assert schedules == {"1f1b", "interleaved", "gpipe", "zb-v"}
    layout = Layout(pipeline_parallel=4, grad_accum=32, chunks=2, sharding="fsdp", schedule="zb-v")
    assert price(job, layout).policies == ("none",)
    compiled = job_of(
        model,
        "4xA100",
        framework="torchtitan",
        seq_length=64,
        global_batch_size=32,
        options={"compile": "on"},
    )
    assert "zb-v" not in {one.schedule for one in enumerate_layouts(compiled).families}


@pytest.mark.parametrize(("schedule", "chunks"), [("zb-h1", 1), ("zb-v", 2), ("dualpipe", 2)])
def test_the_seconds_of_the_passes_are_those_of_the_stages(schedule: str, chunks: int) -> None:
    job = job_of(llama(8, 256, 4, 4, vocab_size=1024), "4xA100", seq_length=64, global_batch_size=16)
    layout = Layout(pipeline_parallel=4, grad_accum=16, chunks=chunks, schedule=schedule)
    solution = solve([price(job, layout).spread()])
    assert solution is not None
    prices = price(job, layout)
    copies = prices.pipeline.copies
    for j, stage in enumerate(pass_seconds(prices, solution.rows)):
        whole = sum(sum(chunk) for chunk in stage) / copies
        assert whole == pytest.approx(solution.candidate.stage_seconds(j, solution.rows[j]))
    plan = make_plan(job, solution, {})
    assert sum(stage.layers for stage in plan.stages) == 8 * copies
    assert sum(stage.head for stage in plan.stages) == copies
    assert plan.critical_path_s == pytest.approx(plan.step_time_s, rel=0.02)
    if schedule == "dualpipe":
        ours, plain = (sum(s.components["parameters"] for s in one.stages) for one in (plan, whole_once(job)))
        assert ours == 2 * plain


def whole_once(job: Job) -> Plan:
    """The plan of the same job under 1F1B."""
    solution = solve([price(job, Layout(pipeline_parallel=4, grad_accum=16)).spread()])
    assert solution is not None
    return make_plan(job, solution, {})
