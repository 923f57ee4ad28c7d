"""Differences between plans, and limits that they are held against, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from planner.difference import Difference
from planner.gate import Rule
from planner.ledger import COMPONENTS
from planner.render import grid
from planner.units import human_bytes, human_seconds

FRACTIONS = ("mfu", "mfu_causal", "hfu", "bubble_fraction", "headroom", "goodput")
LONGEST = 60


def show_differences(console: Console, found: Sequence[Difference]) -> None:
    """Section by section: what it was, what it is, and by how much."""
    if not found:
        console.print("No difference.")
        return
    for section, run in groupby(found, key=lambda one: one.section):
        console.print(Text(section, style="bold"))
        rows = list(run)
        if section == "assumptions":
            for one in rows:
                sign, style = ("+", "green") if one.before is None else ("-", "red")
                console.print(Text(f"  {sign} {one.name}", style=style))
            continue
        table = grid("  what", "before", "after", "change", left=("  what",), wrap=("before", "after"))
        for one in rows:
            before, after = (value_text(one.name, value) for value in (one.before, one.after))
            table.add_row(Text(f"  {one.name}"), Text(before), Text(after), change_text(one))
        console.print(table)


def value_text(name: str, value: Any) -> str:
    """A value with its unit."""
    if value is None:
        return "-"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if name.endswith("_bytes") or name in COMPONENTS:
            return human_bytes(value)
        if name.endswith("_s") and not name.endswith("_per_s"):
            return human_seconds(value)
        if name in FRACTIONS:
            return f"{value:.1%}"
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    if isinstance(value, dict):
        value = ", ".join(f"{key} {one}" for key, one in value.items())
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def change_text(one: Difference) -> str:
    """By how much a number changed; in points where it is a fraction."""
    numbers = [v for v in (one.before, one.after) if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < 2:
        return ""
    before, after = numbers
    if one.name in FRACTIONS:
        return f"{100 * (after - before):+.1f} points"
    return f"{after / before - 1:+.1%}" if before else ""


def show_rules(console: Console, rules: Sequence[Rule]) -> None:
    """Each limit, the plan's figure, and whether it holds."""
    table = grid("rule", "limit", "plan", "", left=("rule", ""))
    for rule in rules:
        word = Text("holds", style="green") if rule.holds else Text("does not hold", style="bold red")
        table.add_row(rule.name, rule.limit, rule.found, word)
    console.print(table)
