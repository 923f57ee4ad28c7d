"""Where bytes come from, as tables for a terminal: terms and components in rows, strategies in columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from planner.explaining import Explanation
from planner.ledger import COMPONENTS, Entry, Message
from planner.render import grid, opening
from planner.sources import SHARES
from planner.units import human_bytes, human_seconds


def show_explanation(
    console: Console, found: Explanation, unfold: bool = False, term: str | None = None
) -> None:
    """Where every byte of one stage comes from: by component; every term, or those that were asked for."""
    console.print(opening(found.plan))
    console.print()
    place = f"Stage {found.stage} of {found.plan.layout.to_layout().describe()}, at {found.moment}"
    console.print(Text(place, style="bold"))
    if term is not None:
        _show_terms(console, found, term)
        return
    console.print((unfolded if unfold else folded)(found.entries))
    if not unfold:
        note = "--term NAME takes terms apart, with formula and source; -v shows them all"
        console.print(Text(note, style="dim"))
    if found.messages:
        console.print()
        console.print(Text("Messages of this stage", style="bold"))
        console.print(message_table(found.messages))
    if unfold:
        console.print()
        _show_formulas(console, found.entries)


def _labels(entries: Sequence[Entry]) -> list[str]:
    """The strategies that leave or add a part of something."""
    labels = dict.fromkeys(label for entry in entries for label in entry.shares)
    return [label for label in labels if any(entry.shares.get(label, 1) != 1 for entry in entries)]


def effect(entries: Sequence[Entry], label: str) -> float:
    """What part a strategy leaves of entries, over what they would be without it."""
    held = sum(entry.held for entry in entries)
    without = sum(entry.held / entry.shares.get(label, 1) for entry in entries)
    return held / without if without else 1.0


def folded(entries: Sequence[Entry]) -> Table:
    """One row for each component: what there would be without strategies, what each leaves, what is held."""
    labels = _labels(entries)
    table = grid(
        "component", "terms", "whole", *labels, "held", "of all", left=("component",), spare=("terms",)
    )
    total = sum(entry.held for entry in entries)
    for component in COMPONENTS:
        own = [entry for entry in entries if entry.component == component]
        held, whole = (sum(sizes) for sizes in ([e.held for e in own], [e.whole * e.count for e in own]))
        shares = [share_text(effect(own, label), 3) for label in labels]
        part = f"{held / total:.1%}" if total else ""
        cells = [str(len(own)), human_bytes(whole), *shares, human_bytes(held), part]
        table.add_row(component.replace("_", " "), *cells)
    whole = sum(entry.whole * entry.count for entry in entries)
    shares = [share_text(effect(entries, label), 3) for label in labels]
    cells = [str(len(entries)), human_bytes(whole), *shares, human_bytes(total), "100.0%"]
    table.add_row("total", *cells, style="bold")
    return table


def unfolded(entries: Sequence[Entry]) -> Table:
    """One row for each term, under its component."""
    labels = _labels(entries)
    names = ("term", "in", "whole", *labels, "held")
    table = grid(*names, left=("term", "in"), wrap=("term",), spare=("in", "whole", *labels))

    def line(name: str, held: float, *cells: str, style: str = "") -> None:
        empty = [""] * (len(labels) + 2 - len(cells))
        table.add_row(Text(name, style=style), *cells, *empty, Text(human_bytes(held), style=style))

    for component in COMPONENTS:
        own = [entry for entry in entries if entry.component == component]
        line(component.replace("_", " "), sum(entry.held for entry in own), style="bold")
        for entry in sorted(own, key=lambda e: -e.held):
            shares = [share_text(entry.shares.get(label)) for label in labels]
            name = f"  {entry.name}" + (f" ({entry.tag})" if entry.tag != "exact" else "")
            place = entry.layer + (f" x{entry.count:g}" if entry.count != 1 else "")
            line(name, entry.held, place, human_bytes(entry.whole), *shares)
    line("total", sum(entry.held for entry in entries), style="bold")
    return table


def _show_terms(console: Console, found: Explanation, term: str) -> None:
    """Terms one by one: formula, numbers, shares, source."""
    for entry in sorted(found.only(term).entries, key=lambda one: -one.held):
        of = ", ".join(filter(None, (entry.component.replace("_", " "), entry.layer)))
        console.print(Text.assemble((entry.name, "bold"), f" ({of}): {human_bytes(entry.held)}, {entry.tag}"))
        for line in term_lines(entry):
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    several = found.only(term).entries
    if len(several) > 1:
        held, total = (sum(e.held for e in items) for items in (several, found.entries))
        console.print(
            Text(f"{len(several)} terms: {human_bytes(held)} of {human_bytes(total)}", style="bold")
        )


def term_lines(entry: Entry) -> list[str]:
    """A term's formula in names, the same in numbers, and where it and its shares come from."""
    lines = []
    shares = {label: share for label, share in entry.shares.items() if share != 1}
    if entry.dims:
        names = ["bytes", *entry.dims, *(["layers"] if entry.count != 1 else []), *shares]
        numbers = [f"{entry.unit:g}", *(f"{size:,}" for size in entry.dims.values())]
        numbers += [f"{entry.count:g}"] if entry.count != 1 else []
        numbers += [share_text(share).removeprefix("x ") for share in shares.values()]
        lines = [" x ".join(names), f"= {' x '.join(numbers)} = {entry.held:,.0f} bytes"]
    elif entry.count != 1:
        lines = [f"{human_bytes(entry.whole)} x {entry.count:g}"]
    lines.append(f"source: {entry.source}")
    return lines + [
        f"{label} {share_text(share)}: {SHARES.get(label, 'docs/strategies')}"
        for label, share in shares.items()
    ]


def formula(entry: Entry) -> str:
    """A term with its numbers: ``2 x batch 1 x seq 2048 x residual 8192``; its bytes if it has none."""
    if not entry.dims:
        return human_bytes(entry.whole)
    return " x ".join([f"{entry.unit:g}", *(f"{name} {size:,}" for name, size in entry.dims.items())])


def _show_formulas(console: Console, entries: Sequence[Entry]) -> None:
    """Every term before any share, and the sources of all."""
    console.print(Text("Whole, before any share: bytes per element x lengths", style="bold"))
    for component in COMPONENTS:
        own = [entry for entry in entries if entry.component == component]
        if own:
            console.print(Text(component.replace("_", " ")))
        for source in dict.fromkeys(entry.source for entry in own):
            of = [entry for entry in own if entry.source == source]
            lines = [f"{f'{e.layer}: ' * bool(e.layer)}{e.name} = {formula(e)}" for e in of]
            for line in dict.fromkeys(lines):
                console.print(Text(f"  {line}"))
            console.print(Padding(Text(f"source: {source}", style="dim"), (0, 0, 0, 4)))


def message_table(messages: Sequence[Message]) -> Table:
    """What a GPU sends, per micro-batch and per step."""
    left = ("message", "of", "per", "behind")
    names = ("message", "of", "GPUs", "per", "count", "size", "time", "behind")
    table = grid(*names, left=left, spare=("GPUs", "size", "count"))
    for one in messages:
        cells = [one.kind.replace("_", "-"), one.layer, str(one.gpus), one.per, f"{one.count:g}"]
        behind = {"": "exposed", "layer": "its layer"}.get(one.behind, one.behind)
        table.add_row(*cells, human_bytes(one.size), human_seconds(one.seconds), behind)
    return table


def share_text(share: float | None, digits: int = 0) -> str:
    """A share as a fraction people recognise: ``1/8``, ``0``, ``x 2``; of several terms, to so many digits.

    >>> share_text(0.125), share_text(0.1251), share_text(0.1251, 3), share_text(2)
    ('1/8', '0.1251', '1/7.99', 'x 2')
    """
    if share is None or share == 1 or (digits and abs(share - 1) < 5e-4):
        return ""
    if 0 < share < 1 and (digits or abs(1 / share - round(1 / share)) < 1e-9):
        return f"1/{1 / share:.{digits}g}" if digits else f"1/{round(1 / share)}"
    return f"x {share:.{digits or 6}g}" if share > 1 else f"{share:g}"
