"""Lower bounds on what a layout can cost, so that few layouts need an integer program.

Three bounds, each valid for every split of the layers and every mix of recompute policies:

- :func:`quick_bound`, for a whole family in a handful of array operations: equal stages, nothing
  recomputed. With it goes a test that the model states alone fit somewhere.
- :func:`tight_bound`, for a few layouts: how many rows of layers can stage j hold in tau seconds
  per micro-batch within its memory? That is a linear program with two rows, whose optimum is the
  least of its dual vertices; its floor bounds the integer count. The smallest tau for which the
  stages together hold the model bounds the slowest stage.
- :func:`sharp_bound`, for one layout: the same with whole layers and policies, where stages are
  short enough to look at every hand-out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.candidate import Candidate
from planner.stages import Prices

Array = npt.NDArray[np.float64]
End = tuple[bool, bool]
"""Is it the first stage, is it the last?"""
SHORT_STAGE = 24
"""Rows of one stage up to which its hand-outs to the policies are looked at one by one."""
HALVINGS = 20
NOTHING = -1e18
"""Bytes besides the layers of a moment that a stage does not have: finite, so that 0 x it is 0."""


def quick_bound(prices: Prices) -> tuple[Array, Array]:
    """Seconds of a step (at least), and whether the states can fit at all, per layout."""
    layout, block = prices.layout, prices.blocks[0]
    p, v = layout.pipeline_parallel, layout.chunks
    row = prices.row_seconds[0]
    total = (
        prices.rows * row
        - prices.short * block.seconds
        + prices.embedding.seconds
        + prices.head.seconds
        + p * prices.send
    )
    # Some stage holds at least the average number of rows, rounded up.
    fullest = -(-prices.rows // p) * row + prices.send - (prices.short > 0) * block.seconds
    slowest = np.maximum(total / p, fullest)
    pipeline = prices.pipeline
    seconds = pipeline.fill * total + pipeline.repeat * slowest + prices.step_seconds
    last = prices.pipeline_at(p - 1)
    there = prices.resident.backward
    states = [prices.state_bytes(price, last, there) for price in (prices.embedding, prices.head)]
    lightest = np.minimum.reduce([price.saved for price in prices.blocks])
    layers = prices.rows * v - prices.short
    least = sum(states) + layers * (prices.state_bytes(block, last, there) + lightest)
    return np.asarray(seconds, float), np.asarray(least <= p * prices.capacity)


@dataclass(frozen=True)
class _Moment:
    """One moment of every stage: a layout's stages in columns, its arrays (layouts, stages).

    ``prices_of_row`` are dual vertices: (per second, per byte) such that no policy's row costs less
    than one, so that ``time x per second + memory x per byte`` bounds the rows from above.
    """

    fixed: Array
    lightest: Array
    prices_of_row: list[tuple[Array, Array]]


def _duals(seconds: list[Any], per_row: list[Array]) -> list[tuple[Array, Array]]:
    """Feasible duals of ``max sum n_r: sum t_r n_r <= time, sum b_r n_r <= memory``, its vertices."""
    duals = [(1 / np.minimum.reduce(seconds), np.zeros(1))]
    for i, j in combinations(range(len(seconds)), 2):
        determinant = seconds[i] * per_row[j] - seconds[j] * per_row[i]
        safe = np.where(determinant == 0, 1.0, determinant)
        on_time, on_memory = (per_row[j] - per_row[i]) / safe, (seconds[i] - seconds[j]) / safe
        # Scaled up until no policy costs less than one: feasible again, so still a bound.
        worth = np.minimum.reduce(
            [on_time * t + on_memory * b for t, b in zip(seconds, per_row, strict=True)]
        )
        valid = (determinant != 0) & (on_time >= 0) & (on_memory >= 0) & (worth > 0)
        scale = np.where(valid, worth, 1.0)
        duals.append(
            (
                np.where(valid, on_time / scale, duals[0][0]),
                np.where(valid, on_memory / scale, 0.0),
            )
        )
    return duals


def _moment(
    name: str, at: dict[End, Any], spread: Callable[[dict[End, Any]], Array], seconds: list[Any]
) -> _Moment:
    """One moment, from what it is on each sort of stage; on those without it, it asks for nothing."""
    found = {end: own.get(name, (own["backward"][0], NOTHING, own["backward"][2])) for end, own in at.items()}
    per_row = [spread({end: own[0][r] for end, own in found.items()}) for r in range(len(seconds))]
    fixed = spread({end: own[1] + reduce(np.minimum, own[2]) for end, own in found.items()})
    lightest = np.maximum(np.minimum.reduce(per_row), 1e-30)
    return _Moment(fixed, lightest, _duals(seconds, per_row))


def _moments(prices: Prices) -> tuple[list[_Moment], Array, Array]:
    """The moments of all stages, their fixed seconds, and which stages exist."""
    p = prices.layout.pipeline_parallel
    stages = np.arange(int(np.max(p)))[None, :]
    first, last = prices.pipeline_at(stages).ends
    seconds = prices.row_seconds
    ends = [(False, False), (False, True), (True, False), (True, True)]
    at = {end: prices.moments(stages, *end) for end in ends}

    def spread(of: dict[End, Any]) -> Array:
        inner = np.where(last, of[False, True], of[False, False])
        outer = np.where(last, of[True, True], of[True, False])
        return np.asarray(np.where(first, outer, inner), float)

    names = ["backward", "loss"]
    if np.min(prices.resident.backward) < 1:
        names.append("gradients complete")
    if any(np.any(sizes["optimizer step"] > 0) for sizes in prices.buffer_bytes.values()):
        names.append("optimizer step")
    moments = []
    for name in names:
        moments.append(_moment(name, at, spread, seconds))
    return moments, spread({end: prices.fixed_seconds(*end) for end in ends}), stages < p


def tight_bound(prices: Prices, objective: str = "time") -> Array:
    """Cost of each layout, at least; infinite where no split can fit.

    ``prices`` holds arrays of shape (layouts, 1). The cost is seconds of a step, or minus the
    headroom in bytes.
    """
    moments, fixed_seconds, exists = _moments(prices)
    capacity = np.asarray(prices.capacity)
    count = exists.shape[0]
    wanted = np.broadcast_to(np.ravel(prices.rows), (count,))

    def holds(time: Array, spare: Array) -> npt.NDArray[np.bool_]:
        """Do the stages together hold all rows, with that time and that much memory to spare?"""
        rows = np.where(exists, np.inf, 0.0)
        for moment in moments:
            memory = capacity - spare[:, None] - moment.fixed
            most = memory / moment.lightest
            for per_second, per_byte in moment.prices_of_row:
                most = np.minimum(most, (time[:, None] - fixed_seconds) * per_second + memory * per_byte)
            rows = np.minimum(rows, np.where(memory < 0, -np.inf, np.floor(most + 1e-9)))
        rows = np.where(exists, rows, 0.0)
        enough = np.all((rows >= 1) | (exists == 0), axis=1)
        return np.asarray(enough & (rows.sum(axis=1) >= wanted), dtype=bool)

    # A time in which one stage alone could run every row, under the slowest policy.
    slow = np.maximum.reduce(prices.row_seconds)
    ample = np.ravel(np.max(fixed_seconds, axis=1, keepdims=True) + slow * prices.rows)
    none = np.zeros(count)
    possible = holds(ample, none)
    if objective == "headroom":
        low, high = none, np.broadcast_to(np.ravel(capacity), (count,)).astype(float)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            works = holds(ample, middle)
            low, high = np.where(works, middle, low), np.where(works, high, middle)
        return np.where(possible, -high, np.inf)
    low, high = none, ample
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        works = holds(middle, none)
        low, high = np.where(works, low, middle), np.where(works, middle, high)
    row = prices.row_seconds[0]
    total = prices.rows * row + np.where(exists, fixed_seconds, 0.0).sum(axis=1, keepdims=True)
    pipeline = prices.pipeline
    cost = pipeline.fill * total + pipeline.repeat * low[:, None] + prices.step_seconds
    quick, _ = quick_bound(prices)
    return np.where(possible, np.maximum(np.ravel(cost), np.ravel(quick)), np.inf)


def fullest_stage(candidate: Candidate) -> float:
    """Seconds of the slowest stage at least: one holds the average of the rows, rounded up."""
    even = -(-candidate.rows // len(candidate.stages))
    return min(even * min(own.seconds) + own.fixed_seconds for own in candidate.stages)


def slowest_at_least(candidate: Candidate) -> float:
    """Seconds that the slowest stage of one layout takes at least; infinite where no split fits.

    For short stages every hand-out of n rows to the policies is looked at, so that the quickest time
    of each stage for each n is exact; as many of those times as there are rows must be within the
    slowest stage's.
    """
    most = _rows_worth_trying(candidate)
    if most > SHORT_STAGE:
        return fullest_stage(candidate)
    splits = np.array(
        [one for one in product(range(most + 1), repeat=len(candidate.policies)) if 1 <= sum(one) <= most]
    )
    totals = splits.sum(axis=1)
    times = []
    for stage in candidate.stages:
        seconds = splits @ np.array(stage.seconds) + stage.fixed_seconds
        fits = np.ones(len(splits), dtype=bool)
        for per_row, fixed, extra in stage.moments.values():
            working = np.where(splits > 0, np.array(extra), 0.0).max(axis=1)
            fits &= splits @ np.array(per_row) + fixed + working <= candidate.capacity
        quickest = np.full(most + 1, np.inf)
        np.minimum.at(quickest, totals, np.where(fits, seconds, np.inf))
        times.append(quickest[1:])
    every = np.array(times)
    ordered = np.sort(every.ravel())
    least = ordered[candidate.rows - 1] if candidate.rows <= ordered.size else np.inf
    return max(fullest_stage(candidate), float(every[:, 0].max()), float(least))


def _rows_worth_trying(candidate: Candidate) -> int:
    """No stage of a quickest split holds more rows: it would be slower than an even split that fits."""
    depth = len(candidate.stages)
    last = [0] * (len(candidate.policies) - 1) + [-(-candidate.rows // depth)]
    ceiling = candidate.rows - depth + 1
    if any(candidate.peak(j, last)[0] > candidate.capacity for j in range(depth)):
        return ceiling
    slow = max(candidate.stage_seconds(j, last) for j in range(depth))
    return min(ceiling, int(slow / min(min(own.seconds) for own in candidate.stages)) + 1)


def sharp_bound(candidate: Candidate, slowest: float) -> float:
    """Seconds of a step of one layout, at least: nothing recomputed but on the slowest stage."""
    if slowest == float("inf"):  # which a single micro-batch does not wait for, but cannot do without
        return slowest
    rows = candidate.rows * min(candidate.stages[0].seconds)
    total = rows + sum(own.fixed_seconds for own in candidate.stages)
    return candidate.fill * total + candidate.repeat * slowest + candidate.step_seconds
