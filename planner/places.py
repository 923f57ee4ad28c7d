"""What a stage has outside its GPU, and its update there, in closed form: numbers of the layers it holds."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from planner.candidate import Stage
from planner.offload import surely
from strategies.base import Quantity
from strategies.offload import PLACES

if TYPE_CHECKING:
    from planner.stages import Prices

Linear = tuple[list[Quantity], Quantity]
"""Of a row under each way, and besides the rows."""


def bytes_elsewhere(prices: Prices, first: bool, last: bool) -> dict[str, Linear]:
    """Bytes that such a stage may need in each place outside the GPU."""
    ends = [*([prices.embedding] if first else []), *([prices.head] if last else [])]
    found: dict[str, Linear] = {}
    for place in PLACES:
        most = surely(place)
        rows = [p.elsewhere.get(place, 0.0) * prices.layout.chunks * most for p in prices.columns]
        around = sum(p.elsewhere.get(place, 0.0) for p in ends)
        lacking = sum(n * p.elsewhere.get(place, 0.0) for n, p in prices.missing(first, last))
        besides = prices.host_bytes[first, last] if place == "host" else 0.0
        found[place] = rows, (around + besides - lacking) * most
    return found


def update_seconds(prices: Prices, first: bool, last: bool) -> Linear:
    """Seconds that the host takes for the update of such a stage."""
    ends = [*([prices.embedding] if first else []), *([prices.head] if last else [])]
    lacking = sum(n * price.update_seconds for n, price in prices.missing(first, last))
    rows = [price.update_seconds * prices.layout.chunks for price in prices.columns]
    return rows, sum(price.update_seconds for price in ends) - lacking


def least_update(prices: Prices) -> Quantity:
    """Seconds of the slowest stage's update on the host, at least: those of an average one."""
    if not prices.offloads:
        return 0.0
    several = len(prices.policies)
    rows, around = update_seconds(prices, True, True)
    least = [reduce(np.minimum, rows[k : k + several]) for k in range(0, len(rows), several)]
    work = sum(n * row for n, row in zip(prices.counts, least, strict=True)) + around
    return np.maximum(0.0, work / prices.layout.pipeline_parallel)


def with_places(prices: Prices, stage: Stage, first: bool, last: bool) -> Stage:
    """A stage with what it has outside its GPU."""
    rows, besides = update_seconds(prices, first, last)
    places = bytes_elsewhere(prices, first, last)
    return replace(
        stage,
        elsewhere={name: (tuple(map(float, own)), float(fixed)) for name, (own, fixed) in places.items()},
        updates=tuple(map(float, rows)),
        fixed_update=float(besides),
    )
