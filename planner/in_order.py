"""Unlike rows in their order, handed out exactly: stages take stretches of them, one after the other.

A stage's memory does not depend on the others'. So the quickest policies for each stretch of rows that a
stage can hold are all that is needed of it, and with ``t_j(s, e)`` seconds for rows ``s`` to ``e`` on stage
``j`` the rest is dynamic programming over where stages end: the least slowest stage

    f_j(e) = min_s max(f_{j-1}(s), t_j(s, e))

and, no stage above a limit, the least sum (Bellman 1957, Dynamic Programming, chapter 1). The best split has
the least of ``fill x sum + repeat x slowest`` over all limits that are some stretch's seconds. It is what the
integer program finds as well; this is quicker where few rows fall to a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.candidate import Candidate

Array = npt.NDArray[np.float64]
Rows = tuple[tuple[int, ...], ...]
MOST_HANDOUTS = 200_000
"""Hand-outs of rows to policies that are looked at one by one, for all stretches together."""


@lru_cache(maxsize=1024)
def handouts(rows: int, policies: int) -> npt.NDArray[np.int64]:
    """All ways to give ``rows`` rows to the policies, those that keep most first.

    >>> handouts(2, 2).tolist()
    [[2, 0], [1, 1], [0, 2]]
    """
    if policies == 1:
        return np.array([[rows]])
    parts = []
    for first in range(rows, -1, -1):
        rest = handouts(rows - first, policies - 1)
        parts.append(np.hstack([np.full((len(rest), 1), first), rest]))
    return np.vstack(parts)


@dataclass(frozen=True)
class _Stretches:
    """The stretches of up to so many rows: ``number[s, e]`` that of a mix of kinds, -1 where there is none,
    and the hand-outs of every mix, one after the other from its ``start`` on."""

    number: npt.NDArray[np.int64]
    mixes: list[npt.NDArray[np.int64]]
    every: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]


def _stretches(candidate: Candidate, most: int) -> _Stretches | None:
    return _stretches_of(candidate.order.sequence, len(candidate.stages), len(candidate.policies), most)


@lru_cache(maxsize=64)
def _stretches_of(sequence: tuple[int, ...], depth: int, policies: int, most: int) -> _Stretches | None:
    """The stretches of at most so many rows; None if their hand-outs are too many to look at."""
    total, kinds = len(sequence), range(max(sequence) + 1)
    upto = np.array([[0, *np.cumsum([one == kind for one in sequence])] for kind in kinds])
    number = np.full((total + 1, total + 1), -1)
    known: dict[tuple[int, ...], int] = {}
    size, sizes = 0, []
    for s in range(total):
        for e in range(s + 1, min(total, s + most) + 1):
            if depth == 1 and e - s < total:
                continue
            mix = tuple(int(n) for n in upto[:, e] - upto[:, s])
            if mix not in known:
                known[mix] = len(known)
                sizes.append(int(np.prod([_ways(n, policies) for n in mix])))
                size += sizes[-1]
                if size > MOST_HANDOUTS:
                    return None
            number[s, e] = known[mix]
    mixes = [_joined([handouts(n, policies) for n in mix]) for mix in known]
    return _Stretches(number, mixes, np.vstack(mixes), np.cumsum([0, *sizes[:-1]]))


def _ways(rows: int, policies: int) -> int:
    return rows + 1 if policies == 2 else (rows + 1) * (rows + 2) // 2 if policies == 3 else 1


def _joined(parts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Every hand-out of one kind with every one of the others, in order."""
    found = parts[0]
    for more in parts[1:]:
        found = np.hstack([np.repeat(found, len(more), axis=0), np.tile(more, (len(found), 1))])
    return found


def _seconds(candidate: Candidate, stage: int, given: npt.NDArray[np.int64]) -> Array:
    """Seconds of a stage with each of the hand-outs, infinite where they do not fit."""
    own = candidate.stages[stage]
    fits = np.ones(len(given), dtype=bool)
    used = given > 0
    for per_row, fixed, working in own.moments.values():
        extra: Any = np.where(used, np.array(working), 0.0).max(axis=1)
        fits &= given @ np.array(per_row) + fixed + extra <= candidate.capacity
    return np.where(fits, given @ np.array(own.seconds) + own.fixed_seconds, np.inf)


def _quickest(candidate: Candidate, stretches: _Stretches) -> list[Array]:
    """``t_j(s, e)`` of every stage, infinite where it cannot be."""
    depth, total = len(candidate.stages), candidate.rows
    begin, end = np.arange(total + 1)[:, None], np.arange(total + 1)[None, :]
    found = []
    for j in range(depth):
        each = np.minimum.reduceat(_seconds(candidate, j, stretches.every), stretches.start)
        times = np.where(stretches.number >= 0, each[stretches.number], np.inf)
        there = (begin == 0) if j == 0 else (begin >= j)
        there = there & ((end == total) if j == depth - 1 else (end <= total - (depth - 1 - j)))
        found.append(np.where(there, times, np.inf))
    return found


def _least_slowest(times: list[Array]) -> float:
    best = times[0][0]
    for own in times[1:]:
        best = np.maximum(best[:, None], own).min(axis=0)
    return float(best[-1])


def _least_sum(times: list[Array], limit: float) -> tuple[float, list[int]]:
    """The least sum of seconds with no stage above a limit, and where the stages end."""
    came = []
    best = np.where(times[0][0] <= limit, times[0][0], np.inf)
    for own in times[1:]:
        sums = best[:, None] + np.where(own <= limit, own, np.inf)
        came.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    ends = [len(best) - 1]
    for one in reversed(came):
        ends.append(int(one[ends[-1]]))
    return float(best[-1]), ends[::-1]


def _best(candidate: Candidate, times: list[Array]) -> tuple[float, list[int]]:
    """Cost of the best split, without what every split costs, and where its stages end."""
    fill, repeat = candidate.fill, candidate.repeat
    least, least_sum = _least_slowest(times), _least_sum(times, np.inf)[0]
    best, ends = np.inf, []
    if not np.isfinite(least):
        return best, []
    every = np.unique(np.concatenate([own[np.isfinite(own)] for own in times]))
    for limit in every[every >= least]:
        if fill * least_sum + repeat * limit >= best:
            break
        total, places = _least_sum(times, float(limit))
        starts = [0, *places[:-1]]
        slowest = max(own[s, e] for own, s, e in zip(times, starts, places, strict=True))
        cost = fill * total + repeat * float(slowest)
        if cost < best:
            best, ends = cost, places
        if total <= least_sum:
            break
    return best, ends


def _first_length(candidate: Candidate) -> int:
    return 2 * -(-candidate.rows // len(candidate.stages)) + 1


def slowest(candidate: Candidate) -> float:
    """Seconds that the slowest stage takes at least: exact, infinite where no split fits; 0 if not known."""
    if candidate.mirrored:
        return 0.0
    longest = candidate.rows - len(candidate.stages) + 1
    most = min(_first_length(candidate), longest)
    while stretches := _stretches(candidate, most):
        least = _least_slowest(_quickest(candidate, stretches))
        if most == longest or most >= _longest_within(candidate, least):
            return least
        most = min(2 * most, longest)
    return 0.0


def _longest_within(candidate: Candidate, seconds: float) -> float:
    """Rows that a stage can have in so many seconds at most."""
    if not np.isfinite(seconds):
        return float("inf")
    return max((seconds - own.fixed_seconds) / min(own.seconds) for own in candidate.stages)


def best_rows(candidate: Candidate) -> Rows | None:
    """Rows of every column on each stage in the quickest split; empty if none fits, None if not known."""
    if candidate.mirrored:
        return None
    longest = candidate.rows - len(candidate.stages) + 1
    most = min(_first_length(candidate), longest)
    while stretches := _stretches(candidate, most):
        times = _quickest(candidate, stretches)
        best, ends = _best(candidate, times)
        # A slower stage than this would cost more, however quick the others.
        spent = candidate.fill * sum(own.fixed_seconds + min(own.seconds) for own in candidate.stages)
        limit = (best - spent) / candidate.repeat if candidate.repeat else np.inf
        if most == longest or most >= _longest_within(candidate, float(limit)):
            return _rows_of(candidate, stretches, times, ends) if ends else ()
        most = min(2 * most, longest)
    return None


def _rows_of(candidate: Candidate, stretches: _Stretches, times: list[Array], ends: list[int]) -> Rows:
    rows = []
    for j, (s, e) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        mix = stretches.mixes[stretches.number[s, e]]
        seconds = _seconds(candidate, j, mix)
        rows.append(tuple(int(n) for n in mix[int(np.argmin(seconds))]))
    return tuple(rows)
