"""The front of a sweep, its goals and its limits.

A row dominates another of the same model and sequence length if no measure of it is worse and one is
better. The front are the rows that none dominates; of rows with equal measures, the first. Models and
sequence lengths are what is wanted, not what it takes: rows that differ in them are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.errors import InputError
from planner.sweep_row import Row

Measure = Callable[[Row], float | None]


def _seconds_per_token(row: Row) -> float | None:
    return 1 / row.tokens_per_s if row.tokens_per_s else None


def _gpu_seconds_per_token(row: Row) -> float | None:
    return row.num_gpus / row.tokens_per_s if row.tokens_per_s else None


def _taken(row: Row) -> float | None:
    return None if row.free_bytes is None else -row.free_bytes


MEASURES: dict[str, Measure] = {
    "GPUs": lambda row: row.num_gpus,
    "time per token": _seconds_per_token,
    "memory not free": _taken,
    "cost": lambda row: row.cost,
}
"""What the front weighs, less being better; where not every row has one, it is left out."""

GOALS: dict[str, tuple[str, tuple[Measure, ...]]] = {
    "fewest-gpus": ("fewest GPUs that fit", (MEASURES["GPUs"], _seconds_per_token)),
    "fewest-gpu-hours": ("fewest GPU-hours", (_gpu_seconds_per_token, MEASURES["GPUs"])),
    "fastest": ("fastest", (_seconds_per_token, MEASURES["GPUs"])),
    "longest-sequence": (
        "longest sequence",
        (lambda row: -(row.seq_length or 0), MEASURES["GPUs"], _seconds_per_token),
    ),
    "cheapest": ("cheapest", (MEASURES["cost"], _seconds_per_token)),
}
"""A goal's words, and what is least, in this order."""


@dataclass(frozen=True)
class Limits:
    """What a row must keep to: days for the tokens, GPUs, and what stays free of the GPU."""

    max_days: float | None = None
    max_gpus: int | None = None
    min_free: float = 0.0  # bytes; below 1 a fraction

    def allow(self, row: Row) -> bool:
        """Does a row fit, and keep to all of them?"""
        if not row.fits or row.free_bytes is None:
            return False
        usable = row.free_bytes + (row.most_bytes or 0)
        free = self.min_free * usable if self.min_free < 1 else self.min_free
        quick = self.max_days is None or (row.days is not None and row.days <= self.max_days)
        return quick and row.free_bytes >= free and row.num_gpus <= (self.max_gpus or row.num_gpus)


def best(rows: Sequence[Row], goal: str) -> Row | None:
    """The row that reaches a goal best, the first of several; None of none."""
    if goal not in GOALS:
        raise InputError(f"goal {goal[:40]!r}: use {', '.join(GOALS)}")
    _, measures = GOALS[goal]
    keys = [tuple(measure(row) for measure in measures) for row in rows]
    if any(None in key for key in keys):
        raise InputError(
            f"goal {goal}: not all rows have a price; give the cluster one, and the training its tokens"
        )
    order = sorted(range(len(rows)), key=keys.__getitem__)
    return rows[order[0]] if order else None


def front(rows: Sequence[Row]) -> set[int]:
    """The ids of the rows on the front, of rows that fit."""
    jobs: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        jobs.setdefault((row.model, row.seq_length), []).append(row)
    return {id(own[index]) for own in jobs.values() for index in undominated(measured(own))}


def measured(rows: Sequence[Row]) -> list[tuple[float, ...]]:
    """The measures that all rows have, a row each."""
    columns = [[measure(row) for row in rows] for measure in MEASURES.values()]
    return list(zip(*(column for column in columns if None not in column), strict=True))


def undominated(values: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the rows that no other is at least as good as; of equal ones the first.

    In lexicographic order nothing is dominated by what comes after it, so that each row is held against
    the front found so far.

    >>> undominated([(1, 5), (2, 3), (2, 4), (1, 5)])
    [0, 1]
    """
    found: list[int] = []
    kept = np.empty((0, len(values[0]) if values else 0))
    for index in sorted(range(len(values)), key=lambda i: (values[i], i)):
        own = np.array(values[index])
        if not np.any(np.all(kept <= own, axis=1)):
            found.append(index)
            kept = np.vstack([kept, own])
    return sorted(found)
