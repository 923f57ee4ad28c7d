"""Fits what lies outside tensors to readings of real runs; what tensors take is counted, never fitted.

Three terms, as :class:`planner.stacks.base.Stack` names them, each with its range:

- ``allocator``: ``reserved / allocated - 1`` of each reading's peaks; their median.
- ``context`` and ``communicator``: what is in use of the GPU beyond PyTorch's own part is
  ``context + communicator x groups``; least squares, neither below zero, where readings with
  different numbers of groups were given; otherwise ``context`` alone.

A range is meant to hold the next run nine times in ten. Of ``n`` runs that are alike, whatever their
distribution, the next lies between the least and the most with probability ``(n - 1) / (n + 1)``, and
between the ``r``-th from either end with ``(n + 1 - 2r) / (n + 1)`` (Wilks 1948, "Order statistics",
Bulletin of the AMS 54). So it takes :data:`ENOUGH` runs; with fewer, the framework's own range counts too.

Sizes are in bytes. A term that no reading speaks of stays the framework's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from planner.errors import InputError
from planner.files import plain
from planner.readings import MAX_READINGS, MOST_GROUPS, MOST_RATIO, Reading, Readings, read_file
from planner.specs import OverheadFigure, Profile
from planner.units import GIB

if TYPE_CHECKING:
    from planner.specs import Gpu
    from planner.stacks.base import Overhead, Stack

Term = Literal["context", "communicator", "allocator"]
TERMS: tuple[Term, ...] = ("allocator", "context", "communicator")
ENOUGH = 19  # runs: 18 / 20 is nine in ten
MAX_NOTES = 20
NOTHING = (
    "nothing to fit. The allocator's part needs allocated and reserved bytes of a peak; context needs "
    "bytes in use of the whole GPU, those reserved, and how many groups there are"
)


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted term: its figure (bytes, or a fraction) and how many readings it rests on."""

    figure: OverheadFigure
    readings: int


@dataclass(frozen=True, slots=True)
class Residual:
    """What a reading says beside what the fit says of it. None where it says nothing."""

    reading: Reading
    slack: float | None = None  # reserved / allocated - 1
    reserved_off: float | None = None  # bytes: reserved, less allocated x (1 + allocator)
    outside_off: float | None = None  # bytes: the GPU's, less reserved, context and groups
    tensors_off: float | None = None  # allocated / predicted - 1; never fitted

    @property
    def used(self) -> bool:
        """Was a term fitted to it?"""
        return self.reserved_off is not None or self.outside_off is not None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The profile, every reading's residual, and which terms stayed the framework's, and why."""

    profile: Profile
    fits: dict[Term, Fit]
    residuals: tuple[Residual, ...]
    defaults: dict[Term, Overhead]
    left: dict[Term, str] = field(default_factory=dict)


def calibrate(
    paths: Sequence[Path],
    framework: str | None = None,
    gpu: str | None = None,
    format: str | None = None,
    groups: int | None = None,
) -> Calibration:
    """Reads files, fits the terms that they speak of, and says what is left of each reading.

    ``groups`` is the number of communicator groups of readings that do not say. Raises InputError
    for a file that cannot be used, and where nothing can be fitted.
    """
    if groups is not None and not 0 <= groups <= MOST_GROUPS:
        raise InputError(f"--groups {groups}: use 0 to {MOST_GROUPS}")
    from planner.stacks import stack_named

    if framework is not None:
        stack_named(framework)
    card = _card(gpu)
    files = _files(paths, format, groups)
    readings = [one for file in files for one in file.readings]
    if len(readings) > MAX_READINGS:
        raise InputError(f"{len(readings):,} readings; at most {MAX_READINGS:,}")
    for one in readings if card else ():
        _fits_card(one, card)
    known = framework or _framework_of(paths, files)
    notes = [note for file in files for note in file.notes]
    if known is None:
        notes.append("no file says of which framework it is: give --framework; megatron's figures are shown")
    elif framework is None:
        unsaid = [path.name for path, file in zip(paths, files, strict=True) if file.framework is None]
        notes += [f"{plain(name)}: taken to be of {known}, as the others are" for name in unsaid]
    return fit(readings, stack_named(known or "megatron"), known, card.name if card else None, notes)


def _card(gpu: str | None) -> Gpu | None:
    if gpu is None:
        return None
    from planner.catalog import load_gpu

    return load_gpu(gpu)


def _fits_card(one: Reading, card: Gpu | None) -> None:
    for name in ("allocated", "reserved", "device"):
        size = getattr(one, name)
        if card is not None and size is not None and size > card.memory_bytes:
            raise InputError(
                f"{one.where}: {name} is {size / GIB:,.6g} GiB, but {card.name} has "
                f"{card.memory_bytes / GIB:.1f}: are the unit and --gpu right?"
            )


def _files(paths: Sequence[Path], format: str | None, groups: int | None) -> list[Readings]:
    if not paths:
        raise InputError("no file given")
    seen: dict[Path, Path] = {}
    for path in paths:
        try:
            real = path.resolve()
        except (OSError, ValueError, RuntimeError):
            raise InputError(f"{plain(str(path))!r}: cannot be read") from None
        if real in seen:
            raise InputError(f"{path} is given twice: its readings would count twice")
        seen[real] = path
    return [read_file(path, format, groups) for path in paths]


def _framework_of(paths: Sequence[Path], files: Sequence[Readings]) -> str | None:
    """The framework of those files that are of one. Raises InputError if they are of several."""
    first: dict[str, Path] = {}
    for path, file in zip(paths, files, strict=True):
        if file.framework is not None:
            first.setdefault(file.framework, path)
    if len(first) > 1:
        each = ", ".join(f"{plain(path.name)} is of {name}" for name, path in first.items())
        raise InputError(
            f"{each}: a profile is of one framework; calibrate each by itself, or name it with --framework"
        )
    return next(iter(first), None)


def fit(
    readings: Sequence[Reading],
    stack: Stack,
    framework: str | None = None,
    gpu: str | None = None,
    notes: Sequence[str] = (),
) -> Calibration:
    """Fits the terms to readings. Raises InputError if they speak of none of them."""
    defaults: dict[Term, Overhead] = {
        "allocator": stack.allocator,
        "context": stack.context,
        "communicator": stack.communicator,
    }
    fits: dict[Term, Fit] = {}
    left: dict[Term, str] = {}
    _fit_allocator(readings, fits, left)
    _fit_outside(readings, stack, fits, left)
    if not fits:
        raise InputError("; ".join([NOTHING, *dict.fromkeys(left.values()), *notes[:4]]))
    figures = {term: one.figure for term, one in fits.items()}
    residuals = tuple(_residual(one, figures, stack) for one in readings)
    used = runs_of([one.reading for one in residuals if one.used])
    said = [*notes, *_tensors_note(residuals), *_few_note(fits, used)]
    said += [f"{term}: {why}" for term, why in left.items()]
    if len(said) > MAX_NOTES:
        said = [*said[: MAX_NOTES - 1], f"and {len(said) - MAX_NOTES + 1} notes more"]
    profile = Profile(framework=framework, gpu=gpu, overheads=figures, runs=used, notes=tuple(said))
    return Calibration(profile, fits, residuals, defaults, left)


def runs_of(readings: Sequence[Reading]) -> int:
    """How many runs readings are of: the ranks of a run spread less than runs do, and count as one."""
    return len({one.run for one in readings} - {None}) + sum(one.run is None for one in readings)


def spread(values: Sequence[float], runs: int) -> tuple[float, float, bool]:
    """The range of values that are of so many runs, and whether these are too few for it.

    All of them if so; else from the 5th to the 95th percentile, counted in ``n + 1`` parts, which
    holds the next one nine times in ten.

    >>> spread([0.05, 0.02, 0.09], 3)
    (0.02, 0.09, True)
    """
    if runs < ENOUGH:
        return min(values), max(values), True
    cuts = statistics.quantiles(values, n=20, method="exclusive")
    return cuts[0], cuts[-1], False


def slack_of(reading: Reading) -> float | None:
    """``reserved / allocated - 1`` at a reading's peak; None if it has no peak of both."""
    if reading.allocated is None or reading.reserved is None or not reading.at_peak:
        return None
    return reading.reserved / reading.allocated - 1


def _fit_allocator(readings: Sequence[Reading], fits: dict[Term, Fit], left: dict[Term, str]) -> None:
    told = [one for one in readings if slack_of(one) is not None]
    slacks = [slack_of(one) or 0.0 for one in told]
    if not told:
        left["allocator"] = "no reading has both allocated and reserved bytes of a peak"
        return
    source = f"planner calibrate: median of {counted(told)}"
    fits["allocator"] = _fitted(statistics.median(slacks), slacks, source, runs_of(told))


def _fit_outside(
    readings: Sequence[Reading], stack: Stack, fits: dict[Term, Fit], left: dict[Term, str]
) -> None:
    """Context, and the communicator's part where the numbers of groups differ."""
    measured = [one for one in readings if one.outside is not None]
    told = [one for one in measured if one.groups is not None]
    points = [(one.groups or 0, one.outside or 0.0) for one in told]
    counts = {groups for groups, _ in points}
    if not points:
        why = "no reading has the bytes in use of the whole GPU and those reserved"
        if measured:
            why = (
                f"{plural(len(measured), 'reading')} of the whole GPU without the number of groups: "
                "give --groups"
            )
        left["context"] = left["communicator"] = why
        return
    runs, less = runs_of(told), 0
    if len(counts) > 1:
        context, share = line(points)
        words = f"planner calibrate: least squares, {counted(told)}, {len(counts)} numbers of groups"
        less = 2
        source = f"{words}; the spread is the context's"
        fits["communicator"] = _fitted(share, [share] * len(points), source, runs, less)
    else:
        context, share, words = _context_alone(told, counts.pop(), stack, fits, left)
    rest = [outside - share * groups for groups, outside in points]
    fits["context"] = _fitted(context, rest, words, runs, less)


def _context_alone(
    told: Sequence[Reading],
    groups: int,
    stack: Stack,
    fits: dict[Term, Fit],
    left: dict[Term, str],
) -> tuple[float, float, str]:
    """Context beside the framework's own communicator, which shrinks if it leaves nothing over."""
    sizes = [one.outside or 0.0 for one in told]
    usual = statistics.median(sizes)
    share = stack.communicator.value
    words = f"planner calibrate: median of {counted(told)} with {plural(groups, 'group')}"
    if share * groups <= usual:
        each = plural(groups, "group")
        left["communicator"] = f"every reading has {each}, so its part cannot be told from context"
        less = f" less {share * groups / GIB:.3g} GiB for the communicators" if groups else ""
        return usual - share * groups, share, words + less
    share = usual / groups
    source = f"{words}, all of it, as it is less than the framework's own"
    fits["communicator"] = _fitted(share, [size / groups for size in sizes], source, runs_of(told))
    return 0.0, share, f"{words}: the communicators take all of it"


def line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope of least squares, neither below zero; two numbers of groups at least.

    >>> line([(1, 0.75), (3, 1.25)])
    (0.5, 0.25)
    """
    groups = [float(g) for g, _ in points]
    sizes = [size for _, size in points]
    slope, intercept = statistics.linear_regression(groups, sizes)
    if slope >= 0 and intercept >= 0:
        return intercept, slope
    flat = statistics.fmean(sizes), 0.0
    through_zero = 0.0, statistics.linear_regression(groups, sizes, proportional=True).slope

    def error(fitted: tuple[float, float]) -> float:
        return sum((size - fitted[0] - fitted[1] * g) ** 2 for g, size in points)

    return min(flat, through_zero, key=error)


def _fitted(value: float, values: Sequence[float], source: str, runs: int, less: int = 0) -> Fit:
    """A term with the range of its values, which holds the figure and nothing below zero.

    Whole bytes, or a millionth. ``less`` is how many runs a line takes up: any two lie on one.
    """
    least, most, few = spread(values, runs - less)
    digits = None if max(value, most) > MOST_RATIO else 6
    low, usual, high = (
        float(round(x, digits)) for x in (max(0.0, min(least, value)), value, max(most, value))
    )
    words = "5th to 95th percentile"
    if few:
        words = f"all of them, and the framework's own until there are {ENOUGH + less} runs"
    figure = OverheadFigure(value=usual, least=low, most=high, few=few, source=f"{source}; range: {words}")
    return Fit(figure, len(values))


def counted(readings: Sequence[Reading]) -> str:
    """``5 readings``, and of how many runs if these are fewer."""
    runs = runs_of(readings)
    words = plural(len(readings), "reading")
    return words if runs == len(readings) else f"{words} of {plural(runs, 'run')}"


def plural(count: int, word: str) -> str:
    """``1 reading``, ``2 readings``."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _residual(one: Reading, figures: dict[Term, OverheadFigure], stack: Stack) -> Residual:
    slack = slack_of(one)
    reserved_off = outside_off = None
    if slack is not None and one.reserved is not None and one.allocated is not None:
        reserved_off = one.reserved - one.allocated * (1 + figures["allocator"].value)
    if one.outside is not None and one.groups is not None:
        figure = figures.get("communicator")
        share = figure.value if figure else stack.communicator.value
        outside_off = one.outside - figures["context"].value - share * one.groups
    off = one.allocated / one.predicted - 1 if one.allocated and one.predicted and one.at_peak else None
    return Residual(one, slack, reserved_off, outside_off, off)


def _few_note(fits: dict[Term, Fit], runs: int) -> list[str]:
    """Which terms rest on too few runs to tell their range."""
    few = " and ".join(
        ", ".join(term for term in TERMS if term in fits and fits[term].figure.few).rsplit(", ", 1)
    )
    if not few:
        return []
    return [f"few runs ({runs}): the range of {few} takes in the framework's own"]


def _tensors_note(residuals: Sequence[Residual]) -> list[str]:
    """How far the counted tensors are from the measured ones, which no term may hide."""
    told = [one for one in residuals if one.tensors_off is not None]
    off = [one.tensors_off or 0.0 for one in told]
    if not off:
        return []
    least, most, _ = spread(off, runs_of([one.reading for one in told]))
    middle = statistics.median(off)
    return [
        f"tensors: allocated over predicted {middle:+.1%} ({least:+.1%} to {most:+.1%}) in "
        f"{plural(len(off), 'reading')}; counted, not fitted"
    ]
