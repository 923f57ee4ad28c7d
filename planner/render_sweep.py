"""A sweep for a terminal: the answer in words, the front, and how many points fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from planner.pareto import GOALS, MEASURES, best
from planner.render import grid
from planner.sweep_row import Row
from planner.sweeping import Sweep
from planner.units import about, gib, human_seconds

FREE = "Free: what stays of all that the fullest GPU has, whatever the job needs. Budgets are in GiB."
MOST_ROWS = 40
"""Rows of the front that are shown."""
SPARE = ("recompute", "MFU", "batch", "step")
"""Columns that go first where there is no room."""
USUAL_GOALS = ("fewest-gpus", "fewest-gpu-hours", "fastest")
"""What is answered where no goal is given."""


@contextmanager
def bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, with the points that are done and the time that is left."""
    columns = (TextColumn("sweeping"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.update(task, completed=done)


def show_sweep(console: Console, sweep: Sweep, goal: str | None, quiet: bool, output: Path | None) -> None:
    """The answer, the front and the counts."""
    for answer in answers(sweep, goal):
        console.print(answer)
    front = sweep.front
    if front and not quiet:
        console.print()
        console.print(table(sweep, front[:MOST_ROWS]))
        if len(front) > MOST_ROWS:
            console.print(Text(f"... and {len(front) - MOST_ROWS:,} more on the front"))
        console.print(Text(FREE, style="dim"))
    console.print()
    console.print(Text(counts(sweep)))
    for line in refusals(sweep):
        console.print(Text(f"  {line}"))
    for note in sweep.notes:
        console.print(Text(note))
    where = f"all rows are in {output}" if output else "all rows: --output sweep.csv, .json or .parquet"
    console.print(Text(where[0].upper() + where[1:]))


def answers(sweep: Sweep, goal: str | None) -> Iterator[Text]:
    """What reaches the goal, in words, for each model; without a goal, what reaches the usual ones."""
    rows = sweep.within
    models = list(dict.fromkeys(row.model for row in rows))
    if not rows:
        fit = any(row.fits for row in sweep.rows)
        why = "No point that fits is within the limits" if fit else "No point fits"
        yield Text(f"{why}{nearest(sweep)}", style="bold red")
    for model in models:
        reached: dict[str, list[str]] = {}
        for name in [goal] if goal else USUAL_GOALS:
            if found := best([row for row in rows if row.model == model], name):
                reached.setdefault(sentence(found), []).append(GOALS[name][0])
        for answer, goals in reached.items():
            words = ", ".join([model, *goals] if len(models) > 1 else goals)
            yield Text(f"{words[0].upper()}{words[1:]}: {answer}", style="bold")


def sentence(row: Row) -> str:
    """A row in words."""
    days = f", {row.days:,.1f} days, {row.gpu_hours:,.0f} GPU-hours" if row.days and row.gpu_hours else ""
    days += f", price {about(row.cost)}" if row.cost else ""
    return (
        f"{row.num_gpus:,} x {row.gpu}, {row.layout}: sequences of {row.seq_length:,}, "
        f"{human_seconds(row.step_time_s or 0)} a step, {row.tokens_per_s:,.0f} tokens/s{days}, "
        f"{gib(row.free_bytes or 0)} GiB free"
    )


def nearest(sweep: Sweep) -> str:
    """Of rows that do not fit, the one that lacks least, in words."""
    near = [row for row in sweep.rows if row.over_bytes and not row.fits]
    if not near or any(row.fits for row in sweep.rows):
        return ""
    row = min(near, key=lambda row: row.over_bytes or 0)
    lacks = gib(row.over_bytes or 0, 2)
    return f"; nearest is {row.layout} on {row.num_gpus:,} x {row.gpu}, which lacks up to {lacks} GiB"


def table(sweep: Sweep, rows: list[Row]) -> object:
    """The front; columns that are the same in every row of the sweep are left out."""

    def vary(name: str) -> bool:
        return len({getattr(row, name) for row in sweep.rows}) > 1

    columns: dict[str, Callable[[Row], str]] = {}
    if vary("model"):
        columns["model"] = lambda row: row.model
    columns["GPUs"] = lambda row: f"{row.num_gpus:,}"
    if vary("gpu"):
        columns["kind"] = lambda row: row.gpu
    if vary("seq_length"):
        columns["seq"] = lambda row: f"{row.seq_length:,}"
    columns["layout"] = lambda row: row.layout
    columns["step"] = lambda row: human_seconds(row.step_time_s or 0)
    columns["tokens/s"] = lambda row: f"{row.tokens_per_s:,.0f}"
    if any(row.days for row in rows):
        columns["days"] = lambda row: f"{row.days:,.1f}"
        columns["GPU-hours"] = lambda row: f"{row.gpu_hours:,.0f}"
    if any(row.cost for row in rows):
        columns["price"] = lambda row: about(row.cost or 0)
    columns["free GiB"] = lambda row: gib(row.free_bytes or 0)
    if vary("capacity_bytes"):
        columns["budget"] = lambda row: gib(row.capacity_bytes)
    if vary("global_batch_size"):
        columns["batch"] = lambda row: f"{row.global_batch_size:,}"
    columns["MFU"] = lambda row: f"{row.mfu or 0:.1%}"
    columns["recompute"] = lambda row: row.recompute
    found = grid(*columns, left=("model", "kind", "layout", "recompute"), spare=SPARE)
    for row in rows:
        found.add_row(*(cell(row) for cell in columns.values()))
    return found


def counts(sweep: Sweep) -> str:
    """How many points there were, and how they fared."""
    done = f"{len(sweep.rows):,} of " if not sweep.complete else ""
    repeated = f" ({sweep.repeated:,} the same as others)" if sweep.repeated else ""
    text = f"{done}{sweep.points:,} points{repeated}: "
    named = [("fits", "fit")] + [(name, name) for name in ("at risk", "does not fit", "refused", "no answer")]
    parts = [f"{count:,} {name}" for verdict, name in named if (count := sweep.count(verdict))]
    measures = ", ".join(name for name in MEASURES if name != "cost" or any(row.cost for row in sweep.rows))
    text += ", ".join(parts).replace("does not fit", "do not fit")
    within = len(sweep.within)
    if within < sweep.count("fits"):
        text += f"; {within:,} within the limits"
    return f"{text}; {len(sweep.front):,} on the front of {measures}"


def refusals(sweep: Sweep) -> Iterator[str]:
    """Why points were refused, the commonest reasons."""
    reasons: dict[str, int] = {}
    for row in sweep.rows:
        if row.verdict in ("refused", "no answer"):
            reasons[row.reason] = reasons.get(row.reason, 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1])[:3]:
        yield f"{count:,} x {reason}"
    if len(reasons) > 3:
        yield f"... and {len(reasons) - 3} other reasons"
