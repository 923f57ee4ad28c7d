"""Pipelines: what is in flight and what is idle, in closed form and on the schedule's own order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from planner.schedule import Kind, Pass, critical_path, even_chunks, order, step_seconds
from strategies.base import Role, Term
from strategies.layout import Layout
from strategies.pipeline_parallel import FOLDED, SCHEDULES, SPLIT, PipelineParallel

ACTIVATION = Term("block input", Role.ACTIVATION, {"residual": 8}, 2.0)
WEIGHT = Term("weight", Role.PARAMETER, {"hidden": 8}, 2.0)
GRADIENT = Term("weight", Role.GRADIENT, {"hidden": 8}, 2.0)

WHOLE = [name for name in SCHEDULES if name not in SPLIT]
PLAIN = [name for name in WHOLE if name != "interleaved"]
SHAPES = [(name, p, m, 1) for name in PLAIN for p in range(1, 9) for m in range(1, 25)]
SHAPES += [
    ("interleaved", p, m, v) for v in range(1, 5) for p in range(1, 9) for m in range(1, 25) if m % p == 0
]
SHAPES += [
    (name, p, m, 1 + (name in FOLDED))
    for name in SPLIT
    for p in range(2, 9, 1 + (name == "dualpipe"))
    for m in range(PipelineParallel(p, schedule=name).least_microbatches, 25, 1 + (name == "dualpipe"))
]
"""Every schedule with p stages, m micro-batches and v chunks; interleaving needs m % p == 0."""


def pipeline(schedule: str, p: int, m: int, v: int = 1, stage: int = 0) -> PipelineParallel:
    return PipelineParallel(p, stage, m, v, schedule)


def walk(passes: list[Pass]) -> int:
    """Most passes of one stage that are forward and not yet backward."""
    waiting: set[tuple[int, int]] = set()
    most = 0
    for one in passes:
        what = (one.chunk, one.microbatch)
        if one.forward:
            assert what not in waiting
            waiting.add(what)
        elif one.kind is Kind.INPUT:  # what the weights' gradients need is still there
            assert what in waiting
        else:
            waiting.remove(what)  # a backward needs its forward
        most = max(most, len(waiting))
    assert not waiting
    return most


def simulate(schedule: str, forward: list[float], backward: list[float], m: int, v: int = 1) -> float:
    """Seconds of a step by running it: each stage takes its next pass as soon as its input is there."""
    p = len(forward)
    last = p * v - 1
    queues = [list(reversed(order(schedule, stage, p, m, v))) for stage in range(p)]
    clocks = [0.0] * p
    done: dict[tuple[int, int, bool], float] = {}  # (position in the model, micro-batch, forward)
    while any(queues):
        moved = False
        for stage, queue in enumerate(queues):
            while queue:
                one = queue[-1]
                here = one.chunk * p + stage
                if one.forward:
                    needs = (here - 1, one.microbatch, True) if here else None
                else:
                    needs = (here + 1, one.microbatch, False) if here < last else (here, one.microbatch, True)
                if needs is not None and needs not in done:
                    break
                start = max(clocks[stage], done[needs] if needs else 0.0)
                clocks[stage] = start + (forward if one.forward else backward)[stage] / v
                done[here, one.microbatch, one.forward] = clocks[stage]
                queue.pop()
                moved = True
        assert moved, "the stages wait for each other"
    return max(clocks)


def closed_form(schedule: str, seconds: list[float], m: int, v: int = 1) -> float:
    """The search's own time of a step, from the strategy's two coefficients."""
    strategy = pipeline(schedule, len(seconds), m, v)
    return float(strategy.fill * sum(seconds) + strategy.repeat * max(seconds))


# --- In flight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_closed_form_of_what_is_in_flight_is_what_the_order_holds(schedule: str) -> None:
    wrong = [
        (p, m, v, stage)
        for name, p, m, v in SHAPES
        if name == schedule
        for stage in range(p)
        if pipeline(name, p, m, v, stage).in_flight != walk(order(name, stage, p, m, v))
    ]
    assert wrong == []


@pytest.mark.parametrize("schedule", WHOLE)
def test_every_stage_passes_every_micro_batch_once_in_each_direction(schedule: str) -> None:
    for name, p, m, v in SHAPES:
        if name == schedule and m <= 12:
            for stage in range(p):
                passes = order(name, stage, p, m, v)
                assert len(passes) == len(set(passes)) == 2 * m * v
                assert {one.microbatch for one in passes} == set(range(m))
                assert {one.chunk for one in passes} == set(range(v))
                assert {one.stage for one in passes} == {stage}


def test_in_flight_of_arrays_is_in_flight_of_their_numbers() -> None:
    for schedule in SCHEDULES:
        rows = [(p, p - 1 - i, m, v) for name, p, m, v in SHAPES for i in (0, p - 1) if name == schedule]
        p, stage, m, v = (np.array(column) for column in zip(*rows, strict=True))
        whole = PipelineParallel(p, stage, m, v, schedule)
        alone = [PipelineParallel(*row, schedule) for row in rows]
        for name in ("in_flight", "bubble", "fill", "repeat"):
            family = np.broadcast_to(getattr(whole, name), (len(rows),)).tolist()
            assert family == [getattr(one, name) for one in alone], (schedule, name)


def test_gpipe_holds_all_micro_batches_on_every_stage() -> None:
    # Huang et al. 2019, arXiv:1811.06965, section 2.3: all forward passes before the first backward.
    assert [pipeline("gpipe", 4, 32, stage=i).in_flight for i in range(4)] == [32] * 4


def test_1f1b_holds_at_most_p_micro_batches_however_many_there_are() -> None:
    # Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1.
    for m in (4, 32, 1000):
        assert [pipeline("1f1b", 4, m, stage=i).in_flight for i in range(4)] == [4, 3, 2, 1]


@pytest.mark.parametrize(("p", "v"), [(2, 2), (4, 2), (8, 3), (16, 8), (35, 3)])
def test_interleaved_stage_0_holds_p_times_1_plus_p_minus_1_over_pv_stages(p: int, v: int) -> None:
    # Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.3.
    first = pipeline("interleaved", p, 8 * p, v)
    assert first.share(ACTIVATION) == pytest.approx(p * (1 + (p - 1) / (p * v)))
    assert first.share(ACTIVATION) > pipeline("1f1b", p, 8 * p).share(ACTIVATION)


def test_interleaving_mt_nlg_in_3_chunks_of_35_stages_keeps_32_percent_more() -> None:
    # Korthikanti et al. 2022, table 3: 530B with p = 35 and m = 3 interleaved chunks; 34/105 more.
    first = pipeline("interleaved", 35, 280, 3)
    assert round(first.share(ACTIVATION) / 35, 3) == 1.324


def test_a_stage_holds_no_more_than_the_whole_batch() -> None:
    for schedule, p, m, v in SHAPES:
        for stage in range(p):
            held = pipeline(schedule, p, m, v, stage)
            assert 0 < held.share(ACTIVATION) <= m / held.copies


def test_one_stage_holds_one_micro_batch_unless_it_sends_the_batch_forward_first() -> None:
    assert pipeline("1f1b", 1, 24).share(ACTIVATION) == 1
    assert pipeline("pipedream", 1, 24).share(ACTIVATION) == 1
    assert pipeline("gpipe", 1, 24).share(ACTIVATION) == 24


# --- Weights --------------------------------------------------------------------------------------


def test_pipedream_stashes_a_version_of_the_weights_per_micro_batch_in_flight() -> None:
    # Narayanan et al. 2019, SOSP, section 3.3: on stage i of 4, the versions of 4 - i micro-batches.
    stages = [pipeline("pipedream", 4, 100, stage=i) for i in range(4)]
    assert [one.share(WEIGHT) for one in stages] == [4, 3, 2, 1]
    assert [one.share(ACTIVATION) for one in stages] == [4, 3, 2, 1]
    assert [one.share(GRADIENT) for one in stages] == [1, 1, 1, 1]


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "pipedream"])
def test_flushed_schedules_keep_one_version_of_the_weights(schedule: str) -> None:
    assert {pipeline(schedule, 4, 16, stage=i).share(WEIGHT) for i in range(4)} == {1}


# --- The bubble -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "p", "m", "v", "bubble"),
    [
        ("1f1b", 4, 8, 1, 3 / 8),  # Narayanan et al. 2021, figure 3 and section 2.2.1: (p - 1)/m
        ("gpipe", 4, 8, 1, 3 / 8),
        ("interleaved", 4, 8, 2, 3 / 16),  # figure 4 and section 2.2.2: (p - 1)/(v m)
        ("1f1b", 8, 64, 1, 7 / 64),
        ("interleaved", 8, 64, 4, 7 / 256),
        ("pipedream", 8, 64, 1, 0.0),  # no flush
        ("1f1b", 1, 8, 1, 0.0),
    ],
)
def test_the_bubble_is_p_minus_1_over_v_m(schedule: str, p: int, m: int, v: int, bubble: float) -> None:
    assert pipeline(schedule, p, m, v).bubble == pytest.approx(bubble)


def test_gpipes_bubble_is_k_minus_1_of_m_plus_k_minus_1_steps() -> None:
    # Huang et al. 2019, section 2.3, as a fraction of the whole step.
    for k, m in ((4, 16), (8, 32), (2, 1)):
        bubble = pipeline("gpipe", k, m).bubble
        assert bubble / (1 + bubble) == pytest.approx((k - 1) / (m + k - 1))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_one_micro_batch_is_naive_model_parallelism(schedule: str) -> None:
    # One stage works at a time: p - 1 times its own work is waited, and one micro-batch is held.
    for p in (1, 2, 8):
        naive = pipeline(schedule, p, 1)
        assert naive.bubble == p - 1
        assert naive.in_flight == 1
    assert closed_form(schedule, [1.0, 2.0, 4.0], 1) == 7.0


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_idle_over_working_time_of_a_step_that_is_run_is_the_bubble(schedule: str) -> None:
    for name, p, m, v in SHAPES:
        if name == schedule and m % 3 == 0 and p <= 6:
            seconds = simulate(name, [1.0] * p, [2.0] * p, m, v)
            assert (seconds - 3.0 * m) / (3.0 * m) == pytest.approx(pipeline(name, p, m, v).bubble)


def test_pipedream_has_no_bubble_so_its_step_is_its_slowest_stages_work() -> None:
    layout = Layout(pipeline_parallel=3, grad_accum=10, schedule="pipedream")
    seconds = even_chunks("pipedream", [1.0, 2.0, 1.0], [2.0, 4.0, 3.0])
    assert step_seconds(layout, seconds) == 60.0
    assert closed_form("pipedream", [3.0, 6.0, 4.0], 10) == 60.0


# --- The critical path ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_the_critical_path_of_equal_stages_is_the_closed_form(schedule: str) -> None:
    for name, p, m, v in SHAPES:
        if name == schedule and (p <= 3 or m in (p, 2 * p, 24)):
            path = critical_path(name, [1.0] * p, [2.5] * p, m, v)
            assert path == pytest.approx(closed_form(name, [3.5] * p, m, v)), (p, m, v)


seconds = st.floats(0.125, 8.0, allow_nan=False, width=16)


@st.composite
def uneven_stages(draw: st.DrawFn, most: int = 5) -> tuple[list[float], list[float]]:
    p = draw(st.integers(1, most))
    return [draw(seconds) for _ in range(p)], [draw(seconds) for _ in range(p)]


@given(
    uneven_stages(),
    st.sampled_from(["1f1b", "gpipe", "interleaved"]),
    st.integers(1, 12),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=100)
def test_the_critical_path_is_how_long_the_step_takes_when_it_is_run(
    stages: tuple[list[float], list[float]], schedule: str, m: int, v: int
) -> None:
    forward, backward = stages
    if schedule == "interleaved":
        m = -(-m // len(forward)) * len(forward)
    else:
        v = 1
    path = critical_path(schedule, forward, backward, m, v)
    assert path == pytest.approx(simulate(schedule, forward, backward, m, v), rel=1e-12)


@given(
    uneven_stages(),
    st.floats(1.0, 4.0),
    st.sampled_from(["1f1b", "gpipe"]),
    st.integers(1, 24),
)
@settings(deadline=None, max_examples=150)
def test_the_closed_form_is_never_lower_where_backward_is_the_same_multiple_of_forward(
    stages: tuple[list[float], list[float]], ratio: float, schedule: str, m: int
) -> None:
    forward, _ = stages
    path = critical_path(schedule, forward, [ratio * f for f in forward], m)
    assert closed_form(schedule, [(1 + ratio) * f for f in forward], m) >= path * (1 - 1e-12)


def test_the_closed_form_of_interleaving_can_be_a_little_low_where_stages_differ_eightfold() -> None:
    """Chunks of unlike stages do not mesh: 109.875 s, where the closed form says 109.375 s."""
    forward = [2.0, 0.5, 0.25, 1.0, 2.0]
    path = critical_path("interleaved", forward, [4 * f for f in forward], 10, 2)
    assert path == pytest.approx(109.875, rel=1e-12)
    assert closed_form("interleaved", [5 * f for f in forward], 10, 2) == pytest.approx(109.375, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "forward", "backward", "m", "path", "closed"),
    [
        # Two stages take as long as each other, but one of them recomputes and so is slower backward.
        ("1f1b", [8.0, 6.0, 0.5], [16.0, 18.0, 1.0], 2, 74.0, 49.5 + 24.0),
        ("1f1b", [1.0, 3.0, 1.0, 1.0], [1.0, 1.0, 3.0, 0.5], 2, 16.0, 11.5 + 4.0),
        # GPipe: all forwards, then all backwards; (2 + 3) + 9 x 3 there and (9 + 6) + 9 x 9 back.
        ("gpipe", [2.0, 3.0], [9.0, 6.0], 10, 5.0 + 27.0 + 15.0 + 81.0, 20.0 + 99.0),
    ],
)
def test_the_closed_form_can_be_low_where_one_stage_is_slow_forward_and_another_backward(
    schedule: str, forward: list[float], backward: list[float], m: int, path: float, closed: float
) -> None:
    assert critical_path(schedule, forward, backward, m) == pytest.approx(path)
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    assert closed_form(schedule, both, m) == pytest.approx(closed)


@given(uneven_stages(), st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_the_closed_form_of_gpipe_is_the_path_where_backward_is_twice_forward(
    stages: tuple[list[float], list[float]], m: int
) -> None:
    forward, _ = stages
    backward = [2 * one for one in forward]
    whole = [3 * one for one in forward]
    assert critical_path("gpipe", forward, backward, m) == pytest.approx(closed_form("gpipe", whole, m))


def told_and_whole(
    schedule: str, forward: list[float], backward: list[float], m: int, v: int
) -> tuple[float, float]:
    layout = Layout(pipeline_parallel=len(forward), grad_accum=m, chunks=v, schedule=schedule)
    whole = critical_path(schedule, forward, backward, m, v)
    return step_seconds(layout, even_chunks(schedule, forward, backward, v)), whole


@given(uneven_stages(4), st.sampled_from(["1f1b", "gpipe", "interleaved"]), st.integers(1, 60))
@settings(deadline=None, max_examples=60)
# The first stage is the slowest by a little, and the last one's path starts ahead of it.
@example(([3.375, 0.125, 0.125, 3.25], [6.625, 0.125, 0.125, 6.625]), "1f1b", 200)
@example(([3.375, 0.125, 0.125, 3.25], [6.625, 0.125, 0.125, 6.625]), "interleaved", 200)
def test_a_step_takes_as_long_as_the_whole_graph(
    stages: tuple[list[float], list[float]], schedule: str, m: int
) -> None:
    forward, backward = stages
    p, v = len(forward), 1
    if schedule == "interleaved":
        assume(p > 1)
        m, v = -(-m // p) * p, 2
    told, whole = told_and_whole(schedule, forward, backward, m, v)
    assert told == pytest.approx(whole, rel=1e-9)


@given(uneven_stages(4), st.sampled_from(["1f1b", "gpipe", "interleaved"]))
@settings(deadline=None, max_examples=12)
@example(([3.375, 0.125, 0.125, 3.375], [6.625, 0.125, 0.125, 6.61]), "1f1b")
def test_a_long_step_told_from_its_beginning_takes_as_long_as_the_whole_graph(
    stages: tuple[list[float], list[float]], schedule: str
) -> None:
    forward, backward = stages
    p = len(forward)
    assume(p > 1)
    v = 2 if schedule == "interleaved" else 1
    m = 9000 // (p * p * v) * p  # 18,000 passes
    told, whole = told_and_whole(schedule, forward, backward, m, v)
    *_, second, slowest = sorted(f + b for f, b in zip(forward, backward, strict=True))
    if slowest > 1.05 * second or schedule == "gpipe":
        assert told == pytest.approx(whole, rel=1e-9)
    else:
        # Two stages about as slow as each other settle late, at a pace between theirs.
        assert whole * (1 - 1e-9) <= told <= whole * 1.01
