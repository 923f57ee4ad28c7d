"""What was predicted beside what was measured: errors per source, verdicts against outcomes.

A reading is compared with what it counts: allocated and active bytes with the tensors of the plan,
reserved bytes with tensors and the allocator's slack, nvidia-smi with the whole device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import NamedTuple, Protocol, TypeVar

from planner.runs import MEMORY, Memory, Run, Runs
from planner.units import GIB

VERDICTS = ("fits", "at risk", "does not fit")
OUTCOMES = ("ran", "out of memory")
STEP_TIME = "step time"
KINDS: tuple[str, ...] = (*MEMORY, STEP_TIME)


class Sizes(NamedTuple):
    """Bytes of one stage: of tensors, of what the allocator reserves, of the whole device."""

    tensors: float
    reserved: float
    device: float


@dataclass(frozen=True)
class Prediction:
    """What the planner says of a run: sizes per stage, the verdict, and what it could not heed."""

    run: str
    stages: tuple[Sizes, ...]
    capacity: float
    verdict: str
    unheeded: tuple[str, ...] = ()

    @property
    def fill(self) -> float:
        """Tensors of the fullest stage over what a process may use."""
        return max(stage.tensors for stage in self.stages) / self.capacity


class Comparison(NamedTuple):
    """A predicted and a measured size, in GiB. ``rank`` only where ranks are compared one by one."""

    run: str
    group: str
    tier: str
    kind: str
    predicted: float
    measured: float
    fitted: bool
    rank: int | None = None

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


class Compared(Protocol):
    """What a summary reads of a comparison, of memory or of step times."""

    @property
    def run(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def fitted(self) -> bool: ...
    @property
    def error(self) -> float: ...


AnyCompared = TypeVar("AnyCompared", bound=Compared)


class Summary(NamedTuple):
    """Errors of several comparisons: sizes without sign but for ``bias``, the signed median."""

    group: str
    kind: str
    fitted: bool
    runs: int
    median: float
    p90: float
    worst: float
    worst_run: str
    bias: float


class Outcome(NamedTuple):
    """Whether a run went through, and what was predicted."""

    run: str
    group: str
    tier: str
    ran_out: bool
    verdict: str
    fill: float
    assumed: bool

    @property
    def wrong(self) -> bool:
        """Promised and failed, or refused and ran. ``at risk`` is neither."""
        return self.verdict == ("fits" if self.ran_out else "does not fit")


class DifferenceOutcome(NamedTuple):
    """What two runs differ by, in GiB."""

    name: str
    kind: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1; 0 where nothing was measured to differ."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True)
class Report:
    """All of it. ``reasons`` has every run that is not predicted."""

    runs: int
    predictions: dict[str, Prediction]
    reasons: dict[str, tuple[str, ...]]
    comparisons: tuple[Comparison, ...]
    ranks: tuple[Comparison, ...]
    outcomes: tuple[Outcome, ...]
    differences: tuple[DifferenceOutcome, ...]
    fitted: tuple[str, ...]

    @property
    def summaries(self) -> list[Summary]:
        """One for each source and kind of reading."""
        return summarize(self.comparisons, lambda c: (c.group, c.kind, c.fitted))

    @property
    def totals(self) -> list[Summary]:
        """One for each kind of reading, fitted on or not."""
        return summarize([c._replace(group="all") for c in self.comparisons], lambda c: (c.kind, c.fitted))

    @property
    def tiers(self) -> list[Summary]:
        """One for each kind of reading and tier, the tier in place of the source."""
        return summarize([c._replace(group=c.tier) for c in self.comparisons], lambda c: (c.kind, c.tier))

    @property
    def needs(self) -> dict[str, int]:
        """What the runs that are not predicted need, and how many need it, the most frequent first."""
        found = Counter(reason.split(":")[0] for reasons in self.reasons.values() for reason in reasons)
        return dict(found.most_common())

    @property
    def confusion(self) -> dict[tuple[str, str], int]:
        """How often each outcome met each verdict."""
        return Counter((OUTCOMES[o.ran_out], o.verdict) for o in self.outcomes)

    @property
    def unheeded(self) -> dict[str, int]:
        """Settings of runs that their framework's tables do not have, and in how many runs."""
        found = Counter(setting for p in self.predictions.values() for setting in p.unheeded)
        return dict(found.most_common())


def report_of(runs: Runs, found: dict[str, Prediction | str]) -> Report:
    """The report on runs and their predictions, or the reasons for none."""
    predictions = {name: one for name, one in found.items() if isinstance(one, Prediction)}
    reasons = {run.id: run.needs or (str(found[run.id]),) for run in runs.runs if run.id not in predictions}
    comparisons: list[Comparison] = []
    ranks: list[Comparison] = []
    outcomes: list[Outcome] = []
    for run in runs.runs:
        prediction = predictions.get(run.id)
        if prediction is None:
            continue
        fitted = {one.kind for one in runs.fitted if run.id.startswith(one.prefix)}
        comparisons += _compared(run, prediction, fitted)
        ranks += _ranks(run, prediction, fitted)
        out = run.kind == "oom"
        figures = (out, prediction.verdict, prediction.fill, bool(run.assumed))
        outcomes.append(Outcome(run.id, run.group, run.tier, *figures))
    return Report(
        runs=len(runs.runs),
        predictions=predictions,
        reasons=reasons,
        comparisons=tuple(comparisons),
        ranks=tuple(ranks),
        outcomes=tuple(outcomes),
        differences=tuple(_differences(runs, comparisons)),
        fitted=tuple(f"{one.what} ({one.kind} of `{one.prefix}*`)" for one in runs.fitted),
    )


def counted(sizes: Sizes, kind: str) -> float:
    """The size that a kind of reading counts; of an unknown kind, what is reserved."""
    if kind in ("allocated", "active"):
        return sizes.tensors
    return sizes.device if kind == "nvidia-smi" else sizes.reserved


def _compared(run: Run, prediction: Prediction, fitted: set[Memory]) -> Iterator[Comparison]:
    measured = run.measured
    if measured is None or measured.scope == "sum":
        return
    stages = prediction.stages
    if measured.scope == "first and last":
        stages = (stages[0], stages[-1])
    for kind, size in {measured.kind: measured.gib, **measured.others}.items():
        predicted = max(counted(stage, kind) for stage in stages) / GIB
        yield Comparison(run.id, run.group, run.tier, kind, predicted, size, kind in fitted)


def _ranks(run: Run, prediction: Prediction, fitted: set[Memory]) -> Iterator[Comparison]:
    measured = run.measured
    if measured is None:
        return
    for kind, sizes in (("allocated", measured.ranks_gib), ("reserved", measured.reserved_ranks_gib)):
        within = max(1, len(sizes) // len(prediction.stages))  # ranks of a stage are neighbours
        for rank, size in enumerate(sizes):
            stage = prediction.stages[min(rank // within, len(prediction.stages) - 1)]
            predicted = counted(stage, kind) / GIB
            yield Comparison(run.id, run.group, run.tier, kind, predicted, size, kind in fitted, rank)


def _differences(runs: Runs, comparisons: Sequence[Comparison]) -> Iterator[DifferenceOutcome]:
    by_run = {(c.run, c.kind): c for c in comparisons}
    for pair in runs.differences:
        for kind in MEMORY:
            less, more = by_run.get((pair.less, kind)), by_run.get((pair.more, kind))
            if less and more:
                predicted, measured = more.predicted - less.predicted, more.measured - less.measured
                yield DifferenceOutcome(pair.name, kind, predicted, measured)


def summarize(comparisons: Iterable[AnyCompared], by: Callable[[AnyCompared], object]) -> list[Summary]:
    """One summary for each value of ``by``, in the order of the kinds of reading and the groups."""
    groups: dict[object, list[AnyCompared]] = {}
    for comparison in comparisons:
        groups.setdefault(by(comparison), []).append(comparison)
    found = [_summary(members) for members in groups.values()]
    return sorted(found, key=lambda s: (KINDS.index(s.kind), s.group, s.fitted))


def _summary(members: Sequence[Compared]) -> Summary:
    sizes = sorted(abs(c.error) for c in members)
    worst = max(members, key=lambda c: abs(c.error))
    return Summary(
        group=worst.group,
        kind=worst.kind,
        fitted=worst.fitted,
        runs=len(members),
        median=median(sizes),
        p90=percentile(sizes, 0.9),
        worst=worst.error,
        worst_run=worst.run,
        bias=median(c.error for c in members),
    )


def percentile(ordered: Sequence[float], part: float) -> float:
    """The smallest of the ordered values that this part of them does not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.9), percentile([1.0, 2.0], 0.5)
    (4.0, 1.0)
    """
    return ordered[max(0, ceil(part * len(ordered)) - 1)]
