"""A bound for unlike rows in their order: how slow the slowest stage is at least, exactly.

A stage's memory does not depend on the others'. So the quickest policies for each stretch of rows that a
stage can hold are all that is needed of it, and with ``t_j(s, e)`` seconds for rows ``s`` to ``e`` on stage
``j`` the least slowest stage is

    f_j(e) = min_s max(f_{j-1}(s), t_j(s, e))

(Bellman 1957, Dynamic Programming, chapter 1). The integer program takes it for its ``least_slowest``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np
import numpy.typing as npt

from planner.candidate import Candidate

Array = npt.NDArray[np.float64]
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
    and the hand-outs of every mix, one after the other from its ``start`` on; ``used`` numbers the columns
    that a hand-out has. Mixes that begin latest come first: ``upto[s]`` of them begin at ``s`` or later.
    """

    number: npt.NDArray[np.int64]
    mixes: list[npt.NDArray[np.int64]]
    every: npt.NDArray[np.int64]
    used: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    upto: npt.NDArray[np.int64]


def _stretches(candidate: Candidate, most: int) -> _Stretches | None:
    return _stretches_of(candidate.order.sequence, len(candidate.stages), len(candidate.policies), most)


@lru_cache(maxsize=64)
def _stretches_of(sequence: tuple[int, ...], depth: int, policies: int, most: int) -> _Stretches | None:
    """The stretches of at most so many rows; None if their hand-outs are too many to look at."""
    total, kinds = len(sequence), range(max(sequence) + 1)
    upto = np.array([[0, *np.cumsum([one == kind for one in sequence])] for kind in kinds])
    latest: dict[tuple[int, ...], int] = {}
    size = 0
    for s in range(total):
        for e in range(s + 1, min(total, s + most) + 1):
            mix = tuple(int(n) for n in upto[:, e] - upto[:, s])
            if mix not in latest:
                size += int(np.prod([_ways(n, policies) for n in mix]))
                if size > MOST_HANDOUTS:
                    return None
            latest[mix] = s
    ordered = sorted(latest, key=lambda mix: -latest[mix])
    place = {mix: number for number, mix in enumerate(ordered)}
    number = np.full((total + 1, total + 1), -1)
    for s in range(total):
        for e in range(s + 1, min(total, s + most) + 1):
            number[s, e] = place[tuple(int(n) for n in upto[:, e] - upto[:, s])]
    mixes = [_joined([handouts(n, policies) for n in mix]) for mix in ordered]
    every = np.vstack(mixes)
    start = np.cumsum([0, *(len(one) for one in mixes)])
    begins = np.array([latest[mix] for mix in ordered])
    upto_begin = np.array([int(np.count_nonzero(begins >= s)) for s in range(total + 1)])
    used = (every > 0) @ (1 << np.arange(every.shape[1]))
    return _Stretches(number, mixes, every, used, start, upto_begin)


def _ways(rows: int, policies: int) -> int:
    return comb(rows + policies - 1, policies - 1)


def _joined(parts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Every hand-out of one kind with every one of the others, in order."""
    found = parts[0]
    for more in parts[1:]:
        found = np.hstack([np.repeat(found, len(more), axis=0), np.tile(more, (len(found), 1))])
    return found


def _seconds(
    candidate: Candidate, stage: int, given: npt.NDArray[np.int64], used: npt.NDArray[np.int64]
) -> Array:
    """Seconds of a stage with each of the hand-outs, infinite where they do not fit."""
    own = candidate.stages[stage]
    fits = np.ones(len(given), dtype=bool)
    for per_row, fixed, working in own.moments.values():
        heaviest = np.zeros(1 << len(working))  # of the columns in use
        for column, size in enumerate(working):
            half = 1 << column
            heaviest[half : 2 * half] = np.maximum(heaviest[:half], size)
        fits &= given @ np.array(per_row) + fixed + heaviest[used] <= candidate.capacity
    return np.where(fits, given @ np.array(own.seconds) + own.fixed_seconds, np.inf)


def _quickest(candidate: Candidate, stretches: _Stretches) -> list[Array]:
    """``t_j(s, e)`` of every stage, infinite where it cannot be."""
    depth, total = len(candidate.stages), candidate.rows
    begin, end = np.arange(total + 1)[:, None], np.arange(total + 1)[None, :]
    found = []
    for j in range(depth):
        mixes = stretches.upto[j]
        part = slice(0, stretches.start[mixes])
        seconds = _seconds(candidate, j, stretches.every[part], stretches.used[part])
        each = np.full(len(stretches.mixes), np.inf)
        each[:mixes] = np.minimum.reduceat(seconds, stretches.start[:mixes])
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


def _first_length(candidate: Candidate) -> int:
    return min(-(-candidate.rows // len(candidate.stages)) + 2, _longest(candidate))


def _longest(candidate: Candidate) -> int:
    return candidate.rows - len(candidate.stages) + 1


def _enough(candidate: Candidate, times: list[Array], most: int, seconds: float) -> bool:
    """Can no stage hold a longer stretch, for its seconds or, as more rows take more room, its memory?"""
    if most == _longest(candidate):
        return True
    begin = np.arange(candidate.rows + 1 - most)
    if not any(np.isfinite(own[begin, begin + most]).any() for own in times):
        return True
    if not np.isfinite(seconds):
        return False
    several = len(candidate.policies)
    for own in candidate.stages:
        least = [min(own.seconds[k : k + several]) for k in range(0, len(own.seconds), several)]
        upto = np.cumsum([0.0, *(least[kind] for kind in candidate.order.sequence)])
        longer = upto[most + 1 :] - upto[: -most - 1]
        if longer.min() + own.fixed_seconds <= seconds:
            return False
    return True


def slowest(candidate: Candidate) -> float:
    """Seconds that the slowest stage takes at least: exact, infinite where no split fits; 0 if not known."""
    if candidate.mirrored:
        return 0.0
    most = _first_length(candidate)
    while stretches := _stretches(candidate, most):
        times = _quickest(candidate, stretches)
        least = _least_slowest(times)
        if _enough(candidate, times, most, least):
            return least
        most = min(2 * most, _longest(candidate))
    return 0.0
