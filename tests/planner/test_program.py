"""The integer program against brute force, against one program per layout, and by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from planner.best_first import exhaustive, find
from planner.bounds import sharp_bound
from planner.candidate import Candidate, Stage
from planner.defaults import Job
from planner.layouts import Choices, enumerate_layouts
from planner.order import Order
from planner.overheads import library_bytes
from planner.program import Solution, cost_of, settle, solve
from planner.stacks.base import Overhead
from planner.stages import price
from strategies.layout import Layout
from tests.helpers import gpt, job_of, llama

GIB = 2**30


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a total as that many parts of zero or more."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def splits(candidate: Candidate) -> Iterator[list[tuple[int, ...]]]:
    """Every hand-out of rows to stages and policies that leaves no stage empty."""
    depth, count = len(candidate.stages), len(candidate.policies)
    for sizes in compositions(candidate.rows, depth):
        if min(sizes) >= 1:
            for rows in itertools.product(*(list(compositions(n, count)) for n in sizes)):
                yield list(rows)


def brute_force(candidates: list[Candidate], objective: str = "time") -> float:
    """Least cost over layout x layers per stage x policy; infinite if nothing fits."""
    best = float("inf")
    for candidate in candidates:
        for rows in splits(candidate):
            if all(candidate.peak(j, own)[0] <= candidate.capacity for j, own in enumerate(rows)):
                best = min(best, cost_of(candidate, rows, objective))
    return best


def candidates_of(job: Job, choices: Choices) -> list[Candidate]:
    found = []
    for family in enumerate_layouts(job, choices).families:
        prices = price(job, family)
        found += [prices.take(i).spread() for i in range(len(family.data_parallel))]
    return found


NOTHING = Overhead("nothing", 0.0, 0.0, 0.0, "assumed", "tensors alone")


def small_job(budget: float, layers: int = 5) -> Job:
    """A job whose tensors may fill so many GiB, as nothing but a workspace lies outside them."""
    model = llama(layers, 1024, 8, 8, vocab_size=32000)
    job = job_of(model, "4xA100", seq_length=4096, global_batch_size=8)
    stack = replace(job.stack, context=NOTHING, communicator=NOTHING, allocator=NOTHING)
    cluster = job.cluster.model_copy(update={"budget_bytes": int(budget * GIB + library_bytes(job))})
    return replace(job, cluster=cluster, stack=stack)


BUDGETS = (0.8, 0.9, 1.0, 1.1, 1.25, 3.0)
CHOICES = Choices(pipeline_parallel=(1, 2, 4), tensor_parallel=(1, 2), micro_batch_size=(1, 2))
PIPELINES = Choices(pipeline_parallel=(2, 4), tensor_parallel=(1, 2), micro_batch_size=(1,))


@pytest.mark.parametrize("objective", ["time", "headroom"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("choices", [CHOICES, PIPELINES], ids=["all", "pipelines"])
def test_search_and_joint_program_equal_brute_force(choices: Choices, budget: float, objective: str) -> None:
    """Budgets from where nothing fits to where nothing is recomputed."""
    job = small_job(budget)
    candidates = candidates_of(job, choices)
    assert len(candidates) >= 10
    expected = brute_force(candidates, objective)
    joint = solve(candidates, objective)
    searched = find(job, choices, objective, top=1)
    if expected == float("inf"):
        assert joint is None
        assert not searched.answers
        return
    assert joint is not None
    assert joint.optimal
    assert joint.cost == pytest.approx(expected, rel=1e-5)
    assert searched.answers[0].cost == pytest.approx(expected, rel=1e-5)


def test_the_budgets_of_the_brute_force_test_bind() -> None:
    """Somewhere nothing fits, somewhere layers are recomputed, somewhere nothing is."""
    recomputed = set()
    for budget in BUDGETS:
        answers = find(small_job(budget), CHOICES, "time", top=1).answers
        recomputed.add(any(sum(rows[1:]) for rows in answers[0].rows) if answers else None)
    assert recomputed == {None, True, False}


@pytest.mark.parametrize("objective", ["time", "headroom"])
def test_best_first_equals_one_program_per_layout_on_a_real_job(objective: str) -> None:
    job = job_of(
        llama(24, 4096, 32, 8, intermediate_size=14336, vocab_size=128256),
        "32xA100-40",
        seq_length=4096,
        global_batch_size=64,
    )
    choices = Choices(micro_batch_size=(1, 2), tensor_parallel=(2, 4), pipeline_parallel=(1, 2, 4))
    ours = find(job, choices, objective, top=4)
    theirs = exhaustive(job, choices, objective, top=4)
    assert ours.optimal
    assert [a.cost for a in ours.answers] == pytest.approx([a.cost for a in theirs], rel=1e-5)
    assert ours.solved < 0.2 * ours.enumerated
    assert ours.enumerated == ours.unfitting + ours.pruned + ours.solved


@pytest.mark.parametrize("gib", [80, 24])
def test_best_first_equals_one_program_per_layout_where_chunks_lack_layers(gib: int) -> None:
    """Ten layers in 3 or 6 chunks on two stages: the first chunk and the last are a layer short."""
    job = job_of(llama(10, 5120, 40, 40), "8x80G", seq_length=4096, global_batch_size=32)
    job = replace(job, cluster=job.cluster.model_copy(update={"budget_bytes": gib * GIB}))
    choices = Choices(micro_batch_size=(1,), tensor_parallel=(1, 2), pipeline_parallel=(2,))
    ours, theirs = find(job, choices, top=6), exhaustive(job, choices, "time", top=6)
    assert any(answer.candidate.short == 2 for answer in ours.answers)
    assert [a.cost for a in ours.answers] == pytest.approx([a.cost for a in theirs], rel=1e-5)


def by_hand(capacity: float, working: float = 0.0) -> Candidate:
    """Eight GPUs as two stages of TP4: six layers, 10 GB and 1 s each, 4 GB and 4/3 s recomputed.

    The first stage holds two micro-batches (activations double), the second one and a head of
    0.5 s and 6 GB. Model states are 2 GB a layer; four micro-batches a step. A layer that is
    recomputed needs ``working`` GB while it runs backward.
    """

    def stage(flight: int, fixed: float, seconds: float) -> Stage:
        per_row = (2 + 8.0 * flight, 2 + 2.0 * flight)
        return Stage({"backward": (per_row, fixed, (0.0, working))}, (1.0, 4 / 3), seconds)

    return Candidate(
        layout=Layout(tensor_parallel=4, pipeline_parallel=2, grad_accum=4),
        policies=("none", "full"),
        order=Order(sequence=(0,) * 6),
        short=0,
        capacity=capacity,
        stages=(stage(2, 0.0, 0.0), stage(1, 6.0, 0.5)),
        fill=1.0,
        repeat=3.0,
        step_seconds=0.25,
    )


def test_a_case_solved_by_hand() -> None:
    """With 54 GB: three plain layers fill the first stage exactly (3 x 18), three fit the second.

    Cost 3 + 3.5 + 3 x 3.5 + 0.25 = 17.25; four layers on the second would make it 19.25. With
    42 GB the first stage holds two plain layers and one recomputed (36 + 6 = 42): 10/3 s, still
    under the second's 3.5 s, so 10/3 + 3.5 + 10.5 + 0.25.
    """
    solution = solve([by_hand(54)])
    assert solution is not None
    assert solution.rows == ((3, 0), (3, 0))
    assert solution.cost == pytest.approx(17.25)
    tighter = solve([by_hand(42)])
    assert tighter is not None
    assert tighter.rows == ((2, 1), (3, 0))
    assert tighter.cost == pytest.approx(10 / 3 + 3.5 + 10.5 + 0.25)
    assert solve([by_hand(10)]) is None


def test_a_working_set_counts_once_where_a_layer_runs_under_its_policy() -> None:
    """As above with 42 GB: 2 x 18 + 6 leaves nothing for a working set of 3 GB.

    One plain layer and two recomputed take 18 + 12 + 3 = 33 on the first stage, 11/3 s; so do two and
    one where there are 45 GB, however many layers are recomputed.
    """
    solution = solve([by_hand(42, working=3.0)])
    assert solution is not None
    assert solution.rows == ((1, 2), (3, 0))
    assert solution.cost == pytest.approx(11 / 3 + 3.5 + 3 * 11 / 3 + 0.25)
    roomier = solve([by_hand(45, working=3.0)])
    assert roomier is not None
    assert roomier.rows == ((2, 1), (3, 0))
    assert roomier.candidate.peak(0, (2, 1))[0] == 2 * 18 + 6 + 3
    assert roomier.candidate.peak(0, (0, 3))[0] == 3 * 6 + 3
    assert roomier.candidate.peak(0, (2, 0))[0] == 2 * 18


def test_at_a_time_limit_the_proof_does_not_say_optimal() -> None:
    job = job_of(llama(24, 4096, 32, 8, vocab_size=32000), "64xA100", seq_length=2048, global_batch_size=256)
    found = find(job, Choices(), "time", top=3, time_limit=0.0)
    assert not found.optimal
    assert not found.answers


def test_a_search_cut_short_names_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps past the limit after the first answer: feasible, with a gap that is right."""
    import planner.best_first as module

    ticks = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: 0.0 if next(ticks) < 2 else 1e6)
    job = job_of(llama(24, 4096, 32, 8, vocab_size=32000), "64xA100", seq_length=2048, global_batch_size=256)
    found = find(job, Choices(), "time", top=3, time_limit=10.0)
    monkeypatch.undo()
    assert not found.optimal
    assert len(found.answers) == 1
    complete = find(job, Choices(), "time", top=1)
    best = complete.answers[0].cost
    assert found.answers[0].cost * (1 - found.gap) <= best * (1 + 1e-6)


def test_a_single_gpu_a_prime_count_and_too_few_layers_behave() -> None:
    model = gpt(2, 256, 4, vocab=1000, seq=128)
    one = find(job_of(model, "1xA100", seq_length=128, global_batch_size=4), Choices(), "time", 3)
    assert one.optimal
    assert one.answers[0].candidate.layout.world_size == 1
    prime = find(job_of(model, "7xA100", seq_length=128, global_batch_size=7), Choices(), "time", 3)
    layout = prime.answers[0].candidate.layout
    assert layout.data_parallel == 7  # 7 divides neither heads nor, as stages, the two layers
    assert any("more than the 2 layers" in reason for reason in prime.space.refused)
    odd = find(job_of(model, "4xA100", seq_length=128, global_batch_size=6), Choices(), "time", 10)
    assert {6 % a.candidate.layout.data_parallel for a in odd.answers} == {0}
    assert any("does not divide global_batch_size=6" in reason for reason in odd.space.refused)


def test_the_order_in_which_policies_are_named_changes_nothing() -> None:
    job = small_job(1.15)
    found = [
        find(job, Choices(recompute=policies), "time", top=3).answers
        for policies in (("none", "full"), ("full", "none"), ("full", "none", "full"))
    ]
    assert [a.cost for a in found[0]] == [a.cost for a in found[1]] == [a.cost for a in found[2]]


def test_of_equally_quick_splits_the_one_with_most_memory_free_is_shown() -> None:
    """A slow head leaves the first stage slack: five layers there would be as quick as three."""
    quick = Candidate(
        layout=Layout(pipeline_parallel=3, grad_accum=4),
        policies=("none",),
        order=Order(sequence=(0,) * 7),
        short=0,
        capacity=100.0,
        stages=tuple(
            Stage({"backward": ((float(per_row),), 0.0, (0.0,))}, (1.0,), fixed)
            for per_row, fixed in ((10, 0.0), (10, 0.0), (10, 4.0))
        ),
        fill=1.0,
        repeat=3.0,
        step_seconds=0.0,
    )
    lopsided = Solution(quick, ((5,), (1,), (1,)), quick.cost(((5,), (1,), (1,))), True)
    settled = settle(lopsided)
    assert settled.cost == lopsided.cost
    assert settled.rows == ((3,), (3,), (1,))


def test_a_job_without_room_for_what_lies_outside_tensors_has_no_split() -> None:
    assert solve([replace(by_hand(54), capacity=0.0)]) is None
    assert solve([replace(by_hand(54), capacity=-5.0)]) is None


def test_a_single_micro_batch_that_does_not_fit_has_no_finite_bound() -> None:
    """No stage is waited for again, yet none can be done without: 0 times infinity is not a number."""
    job = job_of(gpt(2, 1024, 8), "2xA100", seq_length=512, global_batch_size=2)
    candidate = price(job, Layout(data_parallel=2, sharding="zero1")).spread()
    assert candidate.repeat == 0
    assert sharp_bound(candidate, float("inf")) == float("inf")
    assert sharp_bound(candidate, 0.0) < float("inf")
