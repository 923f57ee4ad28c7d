"""A preflight as text and a table for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from planner.preflight import Preflight
from planner.render import grid


def show_preflight(console: Console, found: Preflight) -> None:
    """What the framework makes of the export, beside the plan."""
    if found.problem:
        console.print(Text(f"{found.version} refuses the export: {found.problem}", style="bold red"))
        return
    wrong = [check.what for check in found.checks if not check.holds]
    if wrong:
        line = Text(f"{found.version} reads something else: {', '.join(wrong)}", style="bold red")
    else:
        line = Text(f"{found.version} takes the export and reads the plan", style="bold green")
    console.print(line)
    table = grid("what", "planned", "read", "", left=("what", ""))
    for check in found.checks:
        cells = [
            f"{n:,}" if isinstance(n, int) and n > 9999 else str(n) for n in (check.planned, check.found)
        ]
        table.add_row(check.what.replace("_", " "), *cells, "" if check.holds else "differs")
    console.print(table)
