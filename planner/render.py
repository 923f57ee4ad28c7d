"""Plans as tables for a terminal.

Tables use the columns that there are and leave out what has no room; colour only marks what does not fit.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from planner.ledger import COMPONENTS
from planner.plan import Plan, StagePlan, proof_words, verdict_of
from planner.render_axes import axis_columns
from planner.render_offload import show_elsewhere
from planner.units import gib, human_seconds

SHORT = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer_states": "optim",
    "activations": "activ",
    "workspace": "work",
    "logits": "logits",
    "communication_buffers": "comm",
    "framework_overhead": "overhd",
}
SPARE = ("work", "comm", "overhd", "logits", "params", "grads", "optim", "activ")
BARS = {
    "parameters": ("█", "blue"),
    "gradients": ("▓", "cyan"),
    "optimizer_states": ("▒", "magenta"),
    "activations": ("█", "green"),
    "workspace": ("▓", "yellow"),
    "logits": ("▒", "yellow"),
    "communication_buffers": ("▓", "red"),
    "framework_overhead": ("░", "white"),
}


STYLES = {"fits": "", "at risk": "yellow", "does not fit": "red"}

WRAPPED = 20
"""A column whose lines wrap is at least this wide, if it has as much to say."""


class Grid(Table):
    """A plain table. Where there is no room it leaves out whole columns, and says which: no cell is cut."""

    def __init__(self, spare: Iterable[str] = ()) -> None:
        super().__init__(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        self.spare = tuple(spare)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = {str(column.header): _room(console, column) for column in self.columns}
        gone = []
        for name in [*self.spare, *reversed(list(room)[1:])]:
            if sum(room.values()) + len(room) - 1 > options.max_width and room.pop(name, None) is not None:
                gone.append(name)
        kept = [column for column in self.columns if str(column.header) in room]
        shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for one in kept:
            shown.add_column(one.header, justify=one.justify, no_wrap=one.no_wrap, overflow=one.overflow)
        for row, *cells in zip(self.rows, *(column.cells for column in kept), strict=True):
            shown.add_row(*cells, style=row.style)
        yield shown
        if gone:
            yield Text(f"no room for {', '.join(gone)}", style="dim")


def _room(console: Console, column: Column) -> int:
    """Columns of the terminal that a column of a table needs."""
    options = console.options.update(max_width=10_000)
    cells = (column.header, *column.cells)
    width = max(Measurement.get(console, options, cell).maximum for cell in cells)
    return width if column.no_wrap else min(width, WRAPPED)


def grid(
    *headings: str, left: Iterable[str] = (), wrap: Iterable[str] = (), spare: Iterable[str] = ()
) -> Table:
    """A table: numbers right, the columns ``left`` left, only the columns ``wrap`` wrapped.

    Where there is no room the columns ``spare`` go first, in their order, then others from the right.
    """
    table = Grid(spare)
    for heading in headings:
        justify: Literal["left", "right"] = "left" if heading in left else "right"
        overflow: Literal["fold", "ellipsis"] = "fold" if heading in wrap else "ellipsis"
        table.add_column(heading, justify=justify, no_wrap=heading not in wrap, overflow=overflow)
    return table


def recompute_of(plan: Plan) -> str:
    """Recompute of a whole plan, in few words."""
    totals: dict[str, int] = {}
    for stage in plan.stages:
        for policy, count in stage.recompute.items():
            totals[policy] = totals.get(policy, 0) + count
    if len(totals) == 1:
        return next(iter(totals))
    return " ".join(f"{count} {policy}" for policy, count in totals.items() if policy != "none")


def layers_of(plan: Plan) -> str:
    """Layers per stage, equal neighbours together: ``8x16`` is 8 layers on each of 16 stages."""
    runs = [(count, len(list(run))) for count, run in groupby(s.layers for s in plan.stages)]
    return " ".join(f"{count}x{times}" if times > 1 else f"{count}" for count, times in runs)


LONG = 0.03
"""Of the peak: where counting attention in full makes so much of the MFU, both are shown."""


def headline(plan: Plan) -> Text:
    """The answer in words."""
    words = {"fits": "fits on", "at risk": "is at risk (usually fits) on", "does not fit": "does not fit on"}
    if plan.verdict == "at risk" and plan.peak_bytes > plan.capacity_bytes:
        words["at risk"] = "is at risk (usually too large) on"
    text = Text(f"{plan.model} {words[plan.verdict]} ", style=f"bold {STYLES[plan.verdict]}".strip())
    text.append(f"{plan.num_gpus} x {plan.gpu} ", style="bold")
    text.append(f"as {plan.layout.to_layout().describe()}: peak {gib(plan.peak_bytes)} GiB ")
    text.append(f"({gib(plan.least_bytes)} to {gib(plan.most_bytes)}) of {gib(plan.capacity_bytes)}; ")
    text.append(
        f"{human_seconds(plan.step_time_s)} a step ({human_seconds(plan.step_time_least_s)} to "
        f"{human_seconds(plan.step_time_most_s)}), {plan.tokens_per_s:,.0f} tokens/s, MFU {plan.mfu:.0%}"
    )
    if plan.mfu - plan.mfu_causal > LONG:
        text.append(f" ({plan.mfu_causal:.0%} with attention counted causal)")
    return text


def opening(plan: Plan) -> Group:
    """The answer in words, what a whole training takes, and what must not be overlooked."""
    lines = [headline(plan)]
    if plan.cost:
        from planner.render_cost import cost_lines

        lines += cost_lines(plan.cost)
    return Group(*lines, *(Text(f"Warning: {note}", style="yellow") for note in plan.warnings))


def ranking(plans: Sequence[Plan], wide: bool) -> Table:
    """The ranked layouts, one a row."""
    axes, degrees = axis_columns(plans)
    names = ["#", "TP", "PP", "DP", *axes, "sharding", "mb"]
    names += ["peak GiB", "most", "bubble", "step", "MFU", "recompute"]
    if wide:
        names = ["#", "TP", "PP", "DP", *axes, "chunks", "sharding", "schedule", "micro-batch", "grad accum"]
        names += ["peak GiB", "most", "bubble", "step", "tokens/s", "MFU", "layers per stage", "recompute"]
    left = ("order", "offload", "sharding", "schedule", "layers per stage", "recompute")
    spare = ("tokens/s", "bubble", "MFU", "grad accum", "most", "recompute", "layers per stage")
    table = grid(*names, left=left, wrap=("recompute",), spare=spare)
    tied = sum(plan.ties_with(plans[0]) for plan in plans)
    for number, plan in enumerate(plans, 1):
        layout = plan.layout
        label = layout.to_layout().sharding_label
        pipeline = f"{layout.pipeline_parallel}" + ("" if wide or layout.chunks == 1 else f"v{layout.chunks}")
        place = f"{number}=" if tied > 1 and plan.ties_with(plans[0]) else str(number)
        cells = [place, str(layout.tensor_parallel), pipeline, str(layout.data_parallel)]
        cells += degrees[number - 1]
        cells += [str(layout.chunks), label, layout.schedule] if wide else [label]
        cells += [str(layout.micro_batch_size), *([str(layout.grad_accum)] if wide else [])]
        cells += [gib(plan.peak_bytes), gib(plan.most_bytes), f"{plan.bubble_fraction:.1%}"]
        cells += [human_seconds(plan.step_time_s), *([f"{plan.tokens_per_s:,.0f}"] if wide else [])]
        cells += [f"{plan.mfu:.0%}", *([layers_of(plan)] if wide else []), recompute_of(plan)]
        table.add_row(*cells, style=STYLES[plan.verdict])
    return table


def stage_groups(plan: Plan) -> list[tuple[str, StagePlan]]:
    """Stages with the same figures together, under a label such as ``1-6``."""

    def figures(index: int) -> Any:
        stage = plan.stages[index]
        return (stage.layers, tuple(stage.recompute.items()), stage.peak_bytes, stage.head)

    groups = []
    for _, members in groupby(range(len(plan.stages)), key=figures):
        indexes = list(members)
        label = str(indexes[0]) if len(indexes) == 1 else f"{indexes[0]}-{indexes[-1]}"
        groups.append((label, plan.stages[indexes[0]]))
    return groups


def ends(groups: list[tuple[str, StagePlan]], most: int) -> list[tuple[str, StagePlan | None]]:
    """The first and the last groups, with ``...`` for those between if there are too many."""
    if len(groups) <= most:
        return [*groups]
    return [*groups[: most // 2], ("...", None), *groups[-most // 2 :]]


def stage_table(plan: Plan, most: int = 12) -> Table:
    """Every stage at its peak, by component; long pipelines show their two ends and the fullest."""
    names = ("stage", "layers", *SHORT.values(), "peak", "at")
    table = grid(*names, left=("at",), spare=("layers", "at", *SPARE))
    for label, stage in ends(stage_groups(plan), most):
        if stage is None:
            table.add_row("...")
            continue
        sizes = [gib(stage.components[name]) for name in COMPONENTS]
        style = STYLES[verdict_of([stage])]
        table.add_row(label, str(stage.layers), *sizes, gib(stage.peak_bytes), stage.moment, style=style)
    return table


def bars(plan: Plan, width: int, most: int = 8) -> Group:
    """A stacked bar per stage against the budget line."""
    groups = ends(stage_groups(plan), most)
    room = max(20, min(width, 120) - 22)
    full = max(plan.capacity_bytes, plan.peak_bytes)
    limit = round(room * plan.capacity_bytes / full)
    lines: list[Text] = []
    for label, stage in groups:
        line = Text(f"{label:>7} ")
        if stage is None:
            lines.append(line)
            continue
        cells: list[tuple[str, str]] = []
        done = 0.0
        for name in COMPONENTS:
            done += stage.components[name]
            symbol, colour = BARS[name]
            cells += [(symbol, colour)] * (round(room * done / full) - len(cells))
        for position in range(room + 1):
            if position == limit:
                line.append("|", style="bold")
            if position < len(cells):
                line.append(cells[position][0], style=cells[position][1])
            elif position < room:
                line.append(" ")
        line.append(f" {gib(stage.peak_bytes)} GiB")
        lines.append(line)
    legends = [Text("        ")]
    for name in COMPONENTS:
        if legends[-1].cell_len > width - 12:
            legends.append(Text("        "))
        symbol, colour = BARS[name]
        legends[-1].append(f"{symbol} ", style=colour)
        legends[-1].append(f"{SHORT[name]}  ")
    return Group(*lines, *legends[:-1], legends[-1].append("| budget"))


def proof_line(plan: Plan) -> Text:
    """What the search did, and how certain its answer is."""
    counts, certainty = proof_words(plan.proof)
    if not certainty:
        return Text(counts)
    return Text(f"{counts}\n{certainty}, in {human_seconds(plan.proof['seconds'])}.")


def assumption_list(plan: Plan, verbose: bool) -> Group:
    """What was assumed; sources only when asked for."""
    lines: list[Text | Padding] = [Text("Assumed:", style="bold")]
    for note in plan.assumptions:
        for tag in ("assumed", "measured"):
            if not verbose and f" ({tag}: " in note:
                note = note.split(f" ({tag}: ")[0] + f" ({tag})"
        lines.append(Padding(Text(note), (0, 0, 0, 2)))
    return Group(*lines)


def refusals(plan: Plan) -> Table:
    """Why layouts were refused, most frequent first."""
    table = grid("refused", "because", left=("because",), wrap=("because",))
    for reason, count in plan.proof.get("refused_because", {}).items():
        table.add_row(str(count), escape(reason))
    return table


def show_search(console: Console, plans: Sequence[Plan], verbose: bool = False, quiet: bool = False) -> None:
    """The answer of a search: words, ranking, the winner's stages, assumptions, proof."""
    best = plans[0]
    console.print(opening(best))
    console.print()
    console.print(ranking(plans, wide=console.width >= 140))
    if any(plan.ties_with(best) for plan in plans[1:]):
        console.print(Text("= ties with the first: too near to it for their order to be sure", style="dim"))
    if quiet:
        return
    console.print()
    show_stages(console, best, title=f"#1 per stage, GiB per GPU: {layout_words(best)}")
    console.print()
    console.print(assumption_list(best, verbose))
    if verbose and best.proof.get("refused_because"):
        console.print()
        console.print(refusals(best))
    console.print()
    console.print(proof_line(best))


def layout_words(plan: Plan) -> str:
    """Layers, recompute and schedule of a plan in words."""
    layout = plan.layout
    words = f"layers {layers_of(plan)}, recompute {recompute_of(plan)}"
    if layout.pipeline_parallel > 1:
        words += f", {layout.schedule}" + (f" with {layout.chunks} chunks" if layout.chunks > 1 else "")
    return words


def show_stages(console: Console, plan: Plan, title: str) -> None:
    """A plan's stages as a table and as bars."""
    console.print(Text(title, style="bold"))
    console.print(stage_table(plan))
    console.print()
    console.print(bars(plan, console.width))
    show_elsewhere(console, plan)


def show_plan(console: Console, plan: Plan, verbose: bool = False) -> None:
    """One given layout."""
    console.print(opening(plan))
    console.print()
    show_stages(console, plan, title=f"Per stage, GiB per GPU: {layout_words(plan)}")
    console.print()
    groups = ends(stage_groups(plan), 8)
    labels = [label for label, _ in groups]
    table = grid("moment", *labels, left=("moment",), spare=labels[1:-1])
    for moment in ("forward end", "loss", "backward", "gradients complete", "optimizer step"):
        sizes = [stage.moments.get(moment) if stage else None for _, stage in groups]
        table.add_row(moment, *("-" if size is None else gib(size) for size in sizes))
    console.print(Text("Tensors at every moment of a step, GiB per GPU, by stage", style="bold"))
    console.print(table)
    console.print()
    console.print(assumption_list(plan, verbose))


class Trimmed:
    """A stream that leaves out the blanks at the ends of a table's lines."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        self.stream.write(re.sub(r" +(?=\n)", "", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Screen(Console):
    """A console whose reader may go away: the exit status stays the answer's."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console_for(stream: Any = None) -> Console:
    """A console as wide as the terminal; plain and, unless COLUMNS says, 100 columns wide when piped."""
    console = Screen(file=stream, highlight=False)
    if console.is_terminal:
        return console
    trimmed: Any = Trimmed(stream or sys.stdout)
    return Screen(file=trimmed, highlight=False, width=None if "COLUMNS" in os.environ else 100)
