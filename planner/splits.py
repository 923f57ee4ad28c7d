"""How the layers of one given layout are split over its stages, and run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner import frozen
from planner.candidate import Candidate
from planner.defaults import Job
from planner.errors import InputError
from planner.given import check_layout
from planner.offload import offloading_of
from planner.offload_choices import activation_problem
from planner.program import Solution, settle, solve
from planner.stages import price
from strategies.layout import Layout
from strategies.pipeline_parallel import PipelineParallel


def solve_layout(
    job: Job, layout: Layout, recompute: str = "auto", layers: Sequence[int] | None = None
) -> Solution:
    """Splits the layers of one layout over its stages, fitting or, if it must be, not.

    As given by ``layers``; else as evenly as they go, as frameworks do, if one policy is asked for;
    else by the integer program. Raises InputError for what cannot be.

    ``full:2`` recomputes the first two layers of every model chunk on every stage, and no others: Megatron's
    ``--recompute-method block --recompute-num-layers 2``.
    """
    check_layout(job, layout)
    recompute, first = _first_of(recompute)
    runs = job.stack.policies_with(layout.schedule)
    if recompute.endswith("+activations"):
        return _as_memory_forces(price(job, layout, _ways(job, layout, recompute)).spread(), layers)
    policies = runs if recompute == "auto" else (recompute,)
    if first is not None:
        policies = ("none", recompute)
    if recompute != "auto" and recompute in job.stack.policies and recompute not in runs:
        raise InputError(
            f"recompute={recompute}: {job.stack.name} would run a block again for each of its products under "
            f"{layout.schedule}, which is not modelled: use {', '.join(runs)}, or another schedule"
        )
    if not set(policies) <= set(job.stack.policies):
        why = frozen.no_recompute(job.training)
        raise InputError(f"recompute={recompute!r}: use auto, {', '.join(job.stack.policies)}{why}")
    candidate = price(job, layout, policies).spread()
    return _as_memory_forces(candidate, layers) if first is None else _partly(candidate, layers, first)


def _first_of(recompute: str) -> tuple[str, int | None]:
    """A policy, and to how many layers of each chunk it is limited; None where it is of all."""
    policy, colon, count = recompute.partition(":")
    if not colon:
        return recompute, None
    if not (count.isascii() and count.isdigit() and len(count) < 6) or policy in ("none", "auto"):
        raise InputError(
            f"recompute={recompute[:40]!r}: write full:2, for the first 2 layers of every stage's chunks"
        )
    return policy, int(count)


def _partly(candidate: Candidate, layers: Sequence[int] | None, first: int) -> Solution:
    """The first rows of every stage under the second policy, the others under the first."""
    given = _evenly(candidate) if layers is None else layers
    plain = [sum(own) for own in _rows_as_given(candidate, given)]
    parts = [n for count in plain for n in (min(first, count), count - min(first, count))]
    kinds = candidate.order.split(parts)
    rows = tuple(
        tuple(n for pair in zip(rest, head, strict=True) for n in pair)
        for head, rest in zip(kinds[::2], kinds[1::2], strict=True)
    )
    return Solution(candidate, rows, candidate.cost(rows), True)


def _ways(job: Job, layout: Layout, recompute: str) -> tuple[str, ...]:
    """The ways of running a layer where activations are offloaded, as many layers' as memory forces."""
    policy = recompute.partition("+")[0]
    if problem := activation_problem(job, layout, policy):
        raise InputError(problem)
    if offloading_of(job.stack, layout).checkpoints:
        return ("full+activations",) if policy == "full" else ("none", "full+activations")
    return ("none", "none+activations")


def _as_memory_forces(candidate: Candidate, layers: Sequence[int] | None) -> Solution:
    """The layers split as given, evenly where there is one way to run them, else by the program."""
    if layers is None and len(candidate.policies) == 1:
        layers = _evenly(candidate)
    if layers is not None:
        return _as_given(candidate, layers)
    solution = solve([candidate])
    if solution is None:  # show by how much: the split that needs least, without a limit
        rest = [0 for _ in candidate.policies[1:]]
        everything = [n for kind in candidate.order.counts for n in (kind, *rest)]
        ample = 2 * max(candidate.peak(j, everything)[0] for j in range(len(candidate.stages)))
        boundless = dict.fromkeys(candidate.rooms, 1e18)
        solution = solve([replace(candidate, capacity=ample, rooms=boundless)], "headroom")
    assert solution is not None
    return settle(solution)


def _evenly(candidate: Candidate) -> list[int]:
    """Layers on each stage, as even as they go."""
    return _with_missing(candidate, [n * candidate.layout.chunks for n in _even_rows(candidate)], -1)


def _even_rows(candidate: Candidate) -> list[int]:
    """Rows on each stage, as even as they go: the same from both ends, if stages are mirrored."""
    depth = len(candidate.stages)
    if not candidate.mirrored:
        return near_even(candidate.rows, depth)
    half = near_even(candidate.rows // 2, depth // 2)
    return [*half, *reversed(half)]


def near_even(rows: int, stages: int) -> list[int]:
    """Rows on each stage, one more on inner stages first: embedding and head take room on the others.

    >>> near_even(126, 16)[:3], near_even(32, 6)
    ([7, 8, 8], [5, 6, 6, 5, 5, 5])
    """
    least, more = divmod(rows, stages)
    longer = [*range(1, stages - 1), 0][:more]
    return [least + (index in longer) for index in range(stages)]


def _with_missing(candidate: Candidate, layers: Sequence[int], sign: int) -> list[int]:
    """Layers on each stage with (1) or without (-1) those that the chunks at the ends lack."""
    depth, schedule = len(candidate.stages), candidate.layout.schedule
    found = list(layers)
    for stage in range(depth):
        first, last = PipelineParallel(depth, stage, schedule=schedule).ends
        found[stage] += sign * ((candidate.short >= 1) * last + (candidate.short == 2) * first)
    return found


def _as_given(candidate: Candidate, layers: Sequence[int]) -> Solution:
    """The solution that has those layers on its stages, all under the candidate's one policy."""
    if len(candidate.policies) > 1:
        raise InputError(
            "layers_per_stage with recompute=auto: name the one policy that all layers run under"
        )
    rows = tuple(_rows_as_given(candidate, layers))
    return Solution(candidate, rows, candidate.cost(rows), True)


def _rows_as_given(candidate: Candidate, layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of every column on each stage, for layers on the stages that somebody gave, under one policy."""
    depth, chunks = len(candidate.stages), candidate.layout.chunks
    total = candidate.rows * chunks - candidate.short
    if len(layers) != depth or sum(layers) != total or min(layers) < 1:
        raise InputError(
            f"layers_per_stage={','.join(map(str, layers))[:60]}: give {depth} numbers, 1 or more, that add "
            f"up to {total}"
        )
    full = _with_missing(candidate, layers, 1)
    if candidate.mirrored and full != full[::-1]:
        even = ",".join(str(rows * chunks) for rows in _even_rows(candidate))
        raise InputError(
            f"layers_per_stage={','.join(map(str, layers))[:60]}: dualpipe has the same layers on stages as "
            f"far from one end as from the other: use {even}"
        )
    if any(count % chunks for count in full):
        raise InputError(f"layers_per_stage={','.join(map(str, layers))[:60]}: not equal in {chunks} chunks")
    return candidate.under_one([count // chunks for count in full])
