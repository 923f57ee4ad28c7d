"""Step times: predicted beside measured, by source, and the order of layouts within tables.

A table is all runs of one source that share the model, the GPUs and the sequence and differ in layout,
micro-batch or recomputation. The planner ranks; so what counts is the order within a table (Kendall
1945) and what its first choice costs: *regret*, the measured time of
the layout that it would pick over the best measured, less 1. Times are per token, as batches differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, log
from statistics import quantiles
from typing import NamedTuple

from planner.comparison import STEP_TIME, Summary, summarize
from planner.runs import Run, Runs

LEAST = 3
"""Layouts that a table has at least."""
FEW = 20
"""Runs, and pairs of layouts, without which nothing is said of how sure a time is."""
SURE = 0.9
"""Part of the pairs of layouts, at least, that are in the right order beyond a tie."""


class Timing(NamedTuple):
    """Predicted and measured seconds of a step, and the tokens of it."""

    run: str
    group: str
    tier: str
    predicted: float
    measured: float
    tokens: int
    fitted: bool

    @property
    def kind(self) -> str:
        """The kind of reading."""
        return STEP_TIME

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


class Ranking(NamedTuple):
    """One table: how well its order is kept, and what the layout predicted to be fastest costs."""

    name: str
    layouts: int
    tau: float
    regret: float
    picked: str
    best: str
    fitted: bool


@dataclass(frozen=True)
class TimeReport:
    """All of it."""

    timings: tuple[Timing, ...]
    rankings: tuple[Ranking, ...]
    left_out: Mapping[str, str]

    @property
    def sources(self) -> list[Summary]:
        """One for each source, those that a number was fitted to last."""
        found = summarize(self.timings, lambda one: (one.fitted, one.group))
        return sorted(found, key=lambda one: one.fitted)

    @property
    def totals(self) -> list[Summary]:
        """One for those that no number was fitted to, one for the others."""
        return summarize([one._replace(group="all") for one in self.timings], lambda one: one.fitted)


def kendall(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Kendall's tau-b: pairs in the same order less pairs in the other, over pairs that have an order.

    Readings in whole seconds are often equal: such pairs have none (Kendall 1945, Biometrika 33,
    doi:10.1093/biomet/33.3.239). 0 where all are equal.

    >>> kendall([1, 2, 3], [10, 20, 30]), kendall([1, 2, 3], [10, 30, 20]), kendall([1, 2], [5, 5])
    (1.0, 0.3333333333333333, 0.0)
    """
    pairs = list(combinations(zip(predicted, measured, strict=True), 2))
    signs = [(_sign(a[0] - b[0]), _sign(a[1] - b[1])) for a, b in pairs]
    ordered = sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)
    return sum(a * b for a, b in signs) / ordered**0.5 if ordered else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def tables(runs: Runs, timings: Iterable[Timing]) -> list[list[Timing]]:
    """The timed runs of every table, one for each layout: of equal ones the last."""
    by_id = {run.id: run for run in runs.runs}
    found: dict[object, dict[object, Timing]] = {}
    for timing in timings:
        run = by_id[timing.run]
        found.setdefault(_shared(run), {})[_varied(run)] = timing
    return [list(rows.values()) for rows in found.values() if len(rows) >= LEAST]


def rankings(runs: Runs, timings: Iterable[Timing]) -> list[Ranking]:
    """Every table of the timed runs, the one with most layouts first."""
    by_id = {run.id: run for run in runs.runs}
    found = []
    for rows in tables(runs, timings):
        predicted = [one.predicted / one.tokens for one in rows]
        measured = [one.measured / one.tokens for one in rows]
        picked = predicted.index(min(predicted))
        best = measured.index(min(measured))
        run = by_id[rows[0].run]
        model = run.model if isinstance(run.model, str) else run.model.name
        found.append(
            Ranking(
                name=f"{run.group}: {model}, {run.seq} tokens, {run.gpus} x {run.gpu.kind}",
                layouts=len(rows),
                tau=kendall(predicted, measured),
                regret=measured[picked] / measured[best] - 1,
                picked=rows[picked].run,
                best=rows[best].run,
                fitted=any(one.fitted for one in rows),
            )
        )
    return sorted(found, key=lambda one: (-one.layouts, one.name))


class Bands(NamedTuple):
    """How sure a step time is: measured over predicted, of four runs in five; and how near to each other
    two layouts' times may be before their order is right less than nine times in ten."""

    least: float
    most: float
    tie: float


def bands(report: TimeReport, runs: Runs) -> Bands | None:
    """The bands of runs that no number was fitted to, and of all tables' pairs; None where they are few."""
    ratios = [one.measured / one.predicted for one in report.timings if not one.fitted]
    pairs = []
    for rows in tables(runs, report.timings):
        for a, b in combinations(rows, 2):
            gap = log(a.predicted / a.tokens) - log(b.predicted / b.tokens)
            real = log(a.measured / a.tokens) - log(b.measured / b.tokens)
            if real:
                pairs.append((abs(gap), gap * real > 0))
    if len(ratios) < FEW or len(pairs) < FEW:
        return None
    tenths = quantiles(ratios, n=10)
    pairs.sort()
    right = [hit for _, hit in pairs]
    sure = (i for i in range(len(pairs)) if sum(right[i:]) >= SURE * len(right[i:]))
    return Bands(tenths[0], tenths[-1], exp(pairs[next(sure)][0]) - 1)


def _shared(run: Run) -> object:
    """What all runs of a table have in common."""
    model = run.model if isinstance(run.model, str) else run.model.model_dump_json(exclude={"name", "source"})
    software = (run.framework, run.precision, run.optimizer, tuple(sorted(run.options.items())))
    return run.group, run.source, run.when, model, run.seq, run.gpu.kind, run.gpus, software


def _varied(run: Run) -> object:
    """What they differ in."""
    return run.layout.model_copy(update={"grad_accum": None}), run.recompute
