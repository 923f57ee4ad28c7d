"""Why something does not fit, and what would, as text and tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from rich.console import Console
from rich.text import Text

from planner.advice import Advice, Change, Tried, over
from planner.plan import Plan
from planner.render import grid, show_stages
from planner.units import gib, human_seconds

Settings = Mapping[str, tuple[str, ...]]
"""Options of the planner, and what each is in a framework's own words."""
NEAREST = 5
"""Changes that do not do which are shown."""
HEADINGS = {
    "layout": "What would fit, with nothing but the layout changed",
    "gpus": "On other GPUs",
    "training": "With something else computed",
}


def show_infeasible(
    console: Console,
    message: str,
    nearest: Plan | None,
    changes: Sequence[Change],
    tried: Sequence[Tried] = (),
) -> None:
    """Why nothing fits: the nearest layout, and what would."""
    console.print(Text(message, style="bold red"))
    if nearest:
        console.print()
        show_stages(console, nearest, title="The nearest layout, GiB per GPU")
        console.print()
        _show_found(console, changes)
        _show_tried(console, tried)


def _show_found(console: Console, changes: Sequence[Change]) -> None:
    """Changes of a search, each checked by one."""
    if not changes:
        console.print("No single change that was tried makes it fit.")
        return
    left, wrap = ("change", "option", "best layout then"), ("change", "best layout then")
    table = grid(*left, "peak GiB", "step", left=left, wrap=wrap, spare=wrap)
    for change in changes:
        words = (change.what, change.option, change.layout.describe())
        table.add_row(*words, gib(change.peak_bytes), human_seconds(change.step_time_s))
    console.print(
        Text(
            "What would fit, each checked by a search; least changed first, then cheapest in GPU time:",
            style="bold",
        )
    )
    console.print(table)


def of_before(ratio: float) -> str:
    """By how much a step is longer or shorter than before, in whole percent."""
    percent = round(100 * ratio) - 100
    return f"{percent:+}%" if percent else "0%"


def show_settings(console: Console, changes: Mapping[str, str], settings: Settings) -> None:
    """What to write for changes, each with its option, in the framework's own words where it has them."""
    console.print()
    console.print(Text("What to write for them:", style="bold"))
    for what, option in changes.items():
        told = settings.get(option, (f"planner's {option}",))
        if len(told) == 1:
            console.print(Text(f"  {what}: {told[0]}"))
            continue
        console.print(Text(f"  {what}:"))
        for one in told:
            console.print(Text(f"    {one}"))


def show_advice(console: Console, advice: Advice, settings: Settings = MappingProxyType({})) -> None:
    """What binds a given layout, and the changes that would fit, each re-solved.

    ``settings`` are what options are in the words of the framework that is spoken of.
    """
    console.print()
    console.print(Text(f"What binds: {advice.binding.describe()}", style="bold"))
    if not advice.changes and advice.tried:
        console.print("No change that was tried makes it fit.")
    for of, heading in HEADINGS.items():
        own = [change for change in advice.changes if change.of == of]
        if own:
            console.print()
            console.print(Text(f"{heading}; each re-solved, cheapest in GPU time first:", style="bold"))
            _show_changes(console, own, settings)
    _show_tried(console, advice.tried)


def _show_changes(console: Console, changes: Sequence[Change], settings: Settings) -> None:
    spoken = any(change.option in settings for change in changes)
    left = ("change",) if spoken else ("change", "options")
    numbers = ("GPUs", "peak GiB", "step", "of before")
    table = grid(*left, *numbers, left=left, wrap=left, spare=("GPUs", "peak GiB"))
    for change in changes:
        ratio = of_before(change.step_time_ratio or 1)
        step = human_seconds(change.step_time_s)
        words = (change.what,) if spoken else (change.what, change.option)
        table.add_row(*words, str(change.num_gpus), gib(change.peak_bytes), step, ratio)
    console.print(table)
    if spoken:
        show_settings(console, {change.what: change.option for change in changes}, settings)


def _show_tried(console: Console, tried: Sequence[Tried]) -> None:
    """What was tried and does not do: by how much the nearest are over, and the names of the others."""
    still = [(one, one.over_bytes or 0, one.surely_over_bytes) for one in tried]
    nearest = [(one, usual, surely) for one, usual, surely in still if surely is not None]
    if nearest:
        console.print()
        console.print(Text("Tried, and not enough by itself:", style="bold"))
    unlike = {surely: (one, usual) for one, usual, surely in reversed(nearest)}  # of equal ones the first
    for surely in sorted(unlike)[:NEAREST]:
        one, usual = unlike[surely]
        console.print(Text(f"  {one.what} ({one.option}): {over(usual, surely)} on stage {one.stage}"))
    nowhere = list(dict.fromkeys(one.what for one in tried if one.surely_over_bytes is None))
    if nowhere:
        console.print(Text(f"No layout fits with: {'; '.join(nowhere)}", style="dim"))
