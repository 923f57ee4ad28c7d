"""Measured beside predicted, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.measure import Comparison, Kept
from planner.render import grid
from planner.units import human_bytes

EXACT, NEAR = 1e-4, 0.02
"""Relative differences up to which a figure is not, or only faintly, pointed out."""
TITLES = {"states": "Model states", "layer": "What one layer keeps", "moments": "Most bytes alive"}


def difference(measured: float, predicted: float) -> Text:
    """Predicted against measured in percent, coloured by how much it matters."""
    if not measured:
        return Text("not there", style="yellow") if predicted else Text("")
    error = predicted / measured - 1
    if abs(error) <= EXACT:
        return Text("exact" if measured == predicted else f"{error:+.3%}", style="green")
    return Text(f"{error:+.2%}", style="yellow" if abs(error) <= NEAR else "red")


def show_comparison(console: Console, found: Comparison, verbose: bool = False) -> None:
    """States, the layer and the moments; with ``verbose``, every tensor and every term of the layer."""
    console.print(
        Text(f"{found.model}, {found.layers} layers", style="bold"), Text(f" on {found.run}"), sep=""
    )
    table = grid("", "measured", "predicted", "difference", left=("",), wrap=("",))
    section = ""
    for line in found.lines:
        if line.section != section:
            table.add_row(Text(TITLES[line.section], style="dim"))
            section = line.section
        as_text = human_bytes if line.unit == "bytes" else "{:,.0f}".format
        sizes = as_text(line.measured), as_text(line.predicted)
        table.add_row(f"  {line.name}", *sizes, difference(line.measured, line.predicted))
    console.print(table)
    console.print()
    console.print(Text("One layer's kept tensors and the planner's terms, by size", style="bold"))
    console.print(_kept(found, verbose))
    console.print()
    console.print("At the peak, measured:", _parts(found.measured_peak))
    console.print("At the peak, predicted:", _parts(found.predicted_peak))
    for note in found.notes:
        console.print(Text(note, style="dim"))


def _parts(sizes: Mapping[str, float]) -> str:
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', ' ')} {human_bytes(size)}" for name, size in ordered)


def _kept(found: Comparison, verbose: bool) -> Table:
    left = ("tensors", "planner's terms")
    table = grid("elements", *left, "measured", "predicted", "difference", left=left, wrap=left)
    for one in found.kept:
        if one.measured < 1024 and not one.predicted and not verbose:
            continue  # states of random number generators
        sizes = human_bytes(one.measured), human_bytes(one.predicted)
        terms = ", ".join(dict.fromkeys(name for name, _ in one.terms))
        table.add_row(
            f"{one.elements:,.0f}",
            _tensors(one, verbose),
            terms,
            *sizes,
            difference(one.measured, one.predicted),
        )
    return table


def _tensors(one: Kept, verbose: bool) -> str:
    if verbose:
        lines = [f"{list(shape)} {dtype} {op} in {module}" for shape, dtype, module, op, _ in one.tensors]
        return "\n".join(lines)
    counts: dict[str, int] = {}
    for _, dtype, _, _, _ in one.tensors:
        counts[dtype] = counts.get(dtype, 0) + 1
    return ", ".join(f"{count} {dtype}" for dtype, count in counts.items())
