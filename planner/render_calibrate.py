"""A calibration as tables for a terminal of 80 columns or more: terms, then readings beside the fit.

The tables' own type is known to :mod:`planner.render` only, which is where rich lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from planner.calibrate import TERMS, Calibration, Residual, counted
from planner.render import console_for, grid
from planner.units import gib

MOST = 12
"""Readings shown in a table: those that the fit misses most, in the order they were read."""


def unmarked(text: str) -> str:
    """Text of a file as a table's cell: brackets would be taken for colours."""
    return text.replace("[", "(").replace("]", ")")


def shown(term: str, value: float) -> str:
    """A term's figure with its unit."""
    return f"{value:.1%}" if term == "allocator" else f"{gib(value, 2)} GiB"


def signed(size: float | None) -> str:
    """A residual in GiB."""
    if size is None:
        return "-"
    text = f"{size / 2**30:+.2f}"
    return "0.00" if float(text) == 0 else text


def size_of(size: float | None) -> str:
    """A size in GiB, or a dash."""
    return "-" if size is None else gib(size, 2)


def farthest(lines: Sequence[Residual], name: str) -> list[Residual]:
    """At most :data:`MOST` lines, the farthest from the fit, in their order."""
    order = sorted(range(len(lines)), key=lambda i: -abs(getattr(lines[i], name) or 0.0))
    return [lines[i] for i in sorted(order[:MOST])]


def terms(found: Calibration) -> object:
    """The terms: fitted, the range to plan with, how many readings, and what they would be otherwise."""
    table = grid("term", "value", "least", "most", "readings", "framework's", left=("term",))
    for term in TERMS:
        default = shown(term, found.defaults[term].value)
        if term in found.fits:
            fit = found.fits[term]
            figure = fit.figure
            least, most = figure.range_beside(found.defaults[term])
            sizes = [shown(term, size) for size in (figure.value, least, most)]
            table.add_row(term, *sizes, str(fit.readings), default)
        else:
            table.add_row(term, "not fitted", "", "", "0", default)
    return table


def allocator_table(lines: Sequence[Residual]) -> object:
    """Readings that speak of the allocator, and how far each is from the fit."""
    predicted = any(one.tensors_off is not None for one in lines)
    more = ("predicted", "tensors") if predicted else ()
    table = grid(
        "reading", "allocated", "reserved", "slack", "residual", *more, left=("reading",), wrap=("reading",)
    )
    for one in lines:
        reading = one.reading
        cells = [size_of(reading.allocated), size_of(reading.reserved), f"{one.slack or 0:.1%}"]
        cells.append(signed(one.reserved_off))
        if predicted:
            off = "-" if one.tensors_off is None else f"{one.tensors_off:+.1%}"
            cells += [size_of(reading.predicted), off]
        table.add_row(unmarked(reading.name), *cells)
    return table


def outside_table(lines: Sequence[Residual]) -> object:
    """Readings of the whole GPU, and how far each is from the fit."""
    names = ("reading", "GPU", "reserved", "groups", "outside", "residual")
    table = grid(*names, left=("reading",), wrap=("reading",))
    for one in lines:
        reading = one.reading
        then = reading.reserved if reading.reserved_then is None else reading.reserved_then
        cells = [size_of(reading.device), size_of(then), str(reading.groups), size_of(reading.outside)]
        table.add_row(unmarked(reading.name), *cells, signed(one.outside_off))
    return table


def headline(found: Calibration, output: str | None) -> str:
    """What was fitted to how much, and where it is."""
    done = " and ".join(", ".join(term for term in TERMS if term in found.fits).rsplit(", ", 1))
    wrote = f"; wrote {output}" if output else ""
    return f"Fitted {done} to {counted([one.reading for one in found.residuals if one.used])}{wrote}"


def show_calibration(found: Calibration, output: str | None) -> None:
    """The answer in words, the terms, each reading's residual, what was left alone."""
    console = console_for()

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False)

    say(headline(found, output), "bold")
    console.print()
    console.print(terms(found))
    parts = (("reserved_off", "Allocator", allocator_table), ("outside_off", "Outside", outside_table))
    for name, title, table in parts:
        lines = [one for one in found.residuals if getattr(one, name) is not None]
        if lines:
            some = f", the {MOST} of {len(lines)} farthest from the fit" if len(lines) > MOST else ""
            console.print()
            say(f"{title}, GiB per GPU{some}", "bold")
            console.print(table(farthest(lines, name)))
    if found.profile.notes:
        console.print()
        say("Notes:", "bold")
        for note in found.profile.notes:
            for part in wrap(note, max(40, console.width - 2)):
                say(f"  {part}")
    unused = sum(not one.used for one in found.residuals)
    console.print()
    if unused:
        say(f"{unused} of {len(found.residuals)} readings say nothing of any term.")
    after = f"Use it with --profile {output}" if output else "Nothing written: give --output profile.json"
    say(f"{after}; what tensors take is counted, not fitted.")
