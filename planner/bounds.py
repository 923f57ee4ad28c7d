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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.candidate import Candidate
from planner.in_order import slowest
from planner.layer_price import highest
from planner.moments import stage_moments
from planner.places import least_update
from planner.stages import Prices

Array = npt.NDArray[np.float64]
End = tuple[bool, bool]
"""Is it the first stage, is it the last?"""
SHORT_STAGE = 24
"""Rows of one stage up to which its hand-outs to the policies are looked at one by one."""
HAND_OUTS = 100_000
"""Hand-outs of one stage's rows that are looked at, at most."""
HALVINGS = 20
NOTHING = -1e18
"""Bytes besides the layers of a moment that a stage does not have: finite, so that 0 x it is 0."""


def quick_bound(prices: Prices) -> tuple[Array, Array]:
    """Seconds of a step (at least), and whether the states can fit at all, per layout."""
    p, v, several = prices.layout.pipeline_parallel, prices.layout.chunks, len(prices.policies)
    rows = prices.row_seconds[::several]
    lacking = [n * block.seconds for n, block in prices.missing(True, True)]
    work = sum(n * row for n, row in zip(prices.counts, rows, strict=True))
    total = work - sum(lacking) + prices.embedding.seconds + prices.head.seconds + p * prices.send
    # Some stage holds at least the average number of rows, rounded up.
    fullest = -(-prices.rows // p) * reduce(np.minimum, rows) + prices.send - highest(lacking)
    slowest = np.maximum(total / p, fullest)
    pipeline = prices.pipeline
    seconds = pipeline.fill * total + pipeline.repeat * slowest + prices.step_seconds + least_update(prices)
    last = prices.pipeline_at(p - 1)
    there = prices.resident.backward
    states = [prices.state_bytes(price, last, there) for price in (prices.embedding, prices.head)]
    least = sum(states)
    for k, count in enumerate(prices.counts):
        own = prices.columns[k * several : (k + 1) * several]
        lightest = (price.saved + prices.state_bytes(price, last, there) for price in own)
        least = least + count * v * reduce(np.minimum, lightest)
    for n, block in prices.missing(True, True):
        least = least - n * (prices.state_bytes(block, last, there) + block.saved)
    return np.asarray(seconds, float), np.asarray(least <= p * prices.capacity)


@dataclass(frozen=True)
class _Moment:
    """One moment of every stage: a layout's stages in columns, its arrays (layouts, stages).

    ``prices_of_row`` are dual vertices: (per second, per byte) such that no column's row costs less than
    its weight, so that ``time x per second + memory x per byte`` bounds the rows' weight from above.
    """

    fixed: Array
    lightest: Array
    prices_of_row: list[tuple[Array, Array]]


def _duals(seconds: list[Any], per_row: list[Array]) -> list[tuple[Array, Array]]:
    """Feasible duals of ``max sum n_r: sum t_r n_r <= time, sum b_r n_r <= memory``, its vertices.

    Seconds and bytes are of a row of weight one.
    """
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
    name: str,
    at: dict[End, Any],
    spread: Callable[[dict[End, Any]], Array],
    seconds: list[Any],
    weights: list[Any],
) -> _Moment:
    """One moment, from what it is on each sort of stage; on those without it, it asks for nothing."""
    found = {end: own.get(name, (own["backward"][0], NOTHING, own["backward"][2])) for end, own in at.items()}
    per_row = [
        spread({end: own[0][r] for end, own in found.items()}) / weight for r, weight in enumerate(weights)
    ]
    seconds = [own / weight for own, weight in zip(seconds, weights, strict=True)]
    fixed = spread({end: own[1] + reduce(np.minimum, own[2]) for end, own in found.items()})
    lightest = np.maximum(np.minimum.reduce(per_row), 1e-30)
    return _Moment(fixed, lightest, _duals(seconds, per_row))


def _weightings(prices: Prices) -> list[list[Any]]:
    """Weights of the kinds of row, under which stages must together hold the model: any are valid.

    Rows count alike where they are alike; else by what they take at least, in seconds and in bytes.
    """
    if len(prices.counts) == 1:
        return [[1]]
    several = len(prices.policies)
    last = prices.pipeline_at(prices.layout.pipeline_parallel - 1)
    # A row may keep nothing, all of it offloaded; it weighs a byte then.
    held = [
        np.maximum(p.saved + prices.state_bytes(p, last, prices.resident.backward), 1.0)
        for p in prices.columns
    ]
    found = []
    for sizes in (prices.row_seconds, held):
        least = [reduce(np.minimum, sizes[k : k + several]) for k in range(0, len(sizes), several)]
        found.append([size / least[0] for size in least])
    return found


def moment_names(prices: Prices) -> list[str]:
    """The moments that a family's bounds look at."""
    names = ["backward", "loss"]
    if np.min(prices.resident.backward) < 1:
        names.append("gradients complete")
    if any(np.any(sizes["optimizer step"] > 0) for sizes in prices.buffer_bytes.values()):
        names.append("optimizer step")
    return names


def _moments(prices: Prices, weights: list[Any], names: Sequence[str]) -> tuple[list[_Moment], Array, Array]:
    """The moments of all stages, their fixed seconds, and which stages exist."""
    p = prices.layout.pipeline_parallel
    stages = np.arange(int(np.max(p)))[None, :]
    first, last = prices.pipeline_at(stages).ends
    seconds = prices.row_seconds
    ends = [(False, False), (False, True), (True, False), (True, True)]
    at = {end: stage_moments(prices, stages, *end) for end in ends}

    def spread(of: dict[End, Any]) -> Array:
        inner = np.where(last, of[False, True], of[False, False])
        outer = np.where(last, of[True, True], of[True, False])
        return np.asarray(np.where(first, outer, inner), float)

    each = [weight for weight in weights for _ in prices.policies]
    moments = [_moment(name, at, spread, seconds, each) for name in names]
    return moments, spread({end: prices.fixed_seconds(*end) for end in ends}), stages < p


def _over_stages(values: Array) -> Array:
    """Sums over a layout's stages one by one, so that stages it has not (zeros behind) change no digit."""
    return np.asarray(np.cumsum(values, axis=1)[:, -1], float)


def tight_bound(prices: Prices, objective: str = "time", names: Sequence[str] | None = None) -> Array:
    """Cost of each layout, at least; infinite where no split can fit.

    ``prices`` holds arrays of shape (layouts, 1). The cost is seconds of a step, or minus the
    headroom in bytes. A layout's bound is the same whichever layouts are bounded with it, if ``names``
    are the moments of their whole family; and none for less memory is lower.
    """
    weightings = _weightings(prices)
    names = names or moment_names(prices)
    weighed = [_moments(prices, weights, names) for weights in weightings]
    _, fixed_seconds, exists = weighed[0]
    capacity = np.asarray(prices.capacity)
    count = exists.shape[0]
    alike = len(prices.counts) == 1

    def holds(time: Array, spare: Array) -> npt.NDArray[np.bool_]:
        """Do the stages together hold all rows, with that time and that much memory to spare?"""
        fit = [
            weighs(time, spare, moments, weights)
            for (moments, _, _), weights in zip(weighed, weightings, strict=True)
        ]
        return np.asarray(reduce(np.logical_and, fit), dtype=bool)

    def weighs(time: Array, spare: Array, moments: list[_Moment], weights: list[Any]) -> Any:
        """The same of the rows' weight."""
        wanted = sum(n * weight for n, weight in zip(prices.counts, weights, strict=True))
        wanted = np.broadcast_to(np.ravel(wanted), (count,))
        least = reduce(np.minimum, weights)
        rows = np.where(exists, np.inf, 0.0)
        for moment in moments:
            memory = capacity - spare[:, None] - moment.fixed
            most = memory / moment.lightest
            for per_second, per_byte in moment.prices_of_row:
                most = np.minimum(most, (time[:, None] - fixed_seconds) * per_second + memory * per_byte)
            most = np.floor(most + 1e-9) if alike else most * (1 + 1e-9)
            rows = np.minimum(rows, np.where(memory < 0, -np.inf, most))
        rows = np.where(exists, rows, 0.0)
        enough = np.all((rows >= least) | (exists == 0), axis=1)
        held = rows.sum(axis=1) if alike else _over_stages(rows)  # whole numbers add up alike in any order
        return enough & (held >= wanted)

    # A time in which one stage alone could run every row, under the slowest policy.
    slow = np.maximum.reduce(prices.row_seconds)
    longest = np.max(np.where(exists, fixed_seconds, 0.0), axis=1, keepdims=True)
    ample = np.ravel(longest + slow * prices.rows)
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
    rows = prices.row_seconds[:: len(prices.policies)]
    work = sum(n * row for n, row in zip(prices.counts, rows, strict=True))
    total = work + _over_stages(np.where(exists, fixed_seconds, 0.0))[:, None]
    total = np.maximum(total, low[:, None])  # stages together take no less than the slowest
    pipeline = prices.pipeline
    cost = pipeline.fill * total + pipeline.repeat * low[:, None] + prices.step_seconds + least_update(prices)
    quick, _ = quick_bound(prices)
    return np.where(possible, np.maximum(np.ravel(cost), np.ravel(quick)), np.inf)


def fullest_stage(candidate: Candidate) -> float:
    """Seconds of the slowest stage at least: one holds the average of the rows, rounded up."""
    even = -(-candidate.rows // len(candidate.stages))
    fullest = min(even * min(own.seconds) + own.fixed_seconds for own in candidate.stages)
    if len(candidate.order.rows) == 1:
        return fullest
    return max(fullest, _work(candidate) / len(candidate.stages))


def _work(candidate: Candidate) -> float:
    """Seconds of a micro-batch on all stages, each row as quick as it can be."""
    several, seconds = len(candidate.policies), candidate.stages[0].seconds
    quickest = (min(seconds[k : k + several]) for k in range(0, len(seconds), several))
    rows = sum(n * least for n, least in zip(candidate.order.counts, quickest, strict=True))
    return rows + sum(own.fixed_seconds for own in candidate.stages)


def slowest_at_least(candidate: Candidate) -> float:
    """Seconds that the slowest stage of one layout takes at least; infinite where no split fits.

    For short stages every hand-out of n rows to the policies is looked at, so that the quickest time
    of each stage for each n is exact; as many of those times as there are rows must be within the
    slowest stage's. Unlike rows: :func:`planner.in_order.slowest`.
    """
    if len(candidate.order.rows) > 1:
        return max(fullest_stage(candidate), slowest(candidate))
    if (most := _rows_worth_trying(candidate)) > SHORT_STAGE:
        return fullest_stage(candidate)
    if (most + 1) ** len(candidate.policies) > HAND_OUTS:
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
        for place, (per_row, fixed) in stage.elsewhere.items():
            fits &= splits @ np.array(per_row) + fixed <= candidate.rooms[place]
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
    if not all(candidate.fits(j, last) for j in range(depth)) or any(own.updates for own in candidate.stages):
        return ceiling
    slow = max(candidate.stage_seconds(j, last) for j in range(depth))
    return min(ceiling, int(slow / min(min(own.seconds) for own in candidate.stages)) + 1)


def sharp_bound(candidate: Candidate, least: float) -> float:
    """Seconds of a step of one layout, at least: nothing recomputed but on the slowest stage."""
    if least == float("inf"):  # which a single micro-batch does not wait for, but cannot do without
        return least
    work = max(_work(candidate), least)  # stages together take no less than the slowest
    seconds = candidate.fill * work + candidate.repeat * least + candidate.step_seconds
    return seconds + _average_update(candidate)


def _average_update(candidate: Candidate) -> float:
    """Seconds of the slowest stage's update on the host, at least: the average of as little as can be."""
    if not any(own.updates for own in candidate.stages):
        return 0.0
    several, updates = len(candidate.policies), candidate.stages[0].updates
    least = (min(updates[k : k + several]) for k in range(0, len(updates), several))
    rows = sum(n * seconds for n, seconds in zip(candidate.order.counts, least, strict=True))
    return (rows + sum(own.fixed_update for own in candidate.stages)) / len(candidate.stages)
