"""Strategies side by side, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from planner.ledger import COMPONENTS
from planner.plan import Plan
from planner.render import SHORT, SPARE, STYLES, grid, recompute_of
from planner.units import DAY, about, gib, human_count, human_seconds


def show_compare(console: Console, rows: Sequence[tuple[str, Plan | str]]) -> None:
    """Strategies side by side."""
    wide = console.width >= 110
    names = ["strategy", *(["layout", "recompute"] if wide else []), "fits", *SHORT.values(), "peak", "step"]
    priced = [plan.cost for _, plan in rows if not isinstance(plan, str) and plan.cost and plan.cost.wall_s]
    names += ["days"] * bool(priced) + ["price"] * any(cost.money for cost in priced)
    left = ("strategy", "layout", "recompute", "fits")
    table = grid(*names, left=left, spare=("recompute", "layout", *SPARE))
    refused: dict[str, list[str]] = {}
    for name, plan in rows:
        if isinstance(plan, str):
            refused.setdefault(plan, []).append(name)
            continue
        stage = plan.stages[plan.fullest]
        layout = plan.layout
        where = f"TP{layout.tensor_parallel} PP{layout.pipeline_parallel} DP{layout.data_parallel}"
        starred = name + ("*" if recompute_of(plan) != "none" else "")
        cells = [
            starred,
            *([where, recompute_of(plan)] if wide else []),
            {"fits": "yes", "does not fit": "no"}.get(plan.verdict, "at risk"),
        ]
        cells += [gib(stage.components[part]) for part in COMPONENTS]
        cells += [
            gib(plan.peak_bytes),
            "-" if plan.verdict == "does not fit" else human_seconds(plan.step_time_s),
        ]
        if plan.cost:
            days = plan.cost.wall_s and plan.cost.wall_s.times(1 / DAY)
            shown = [figure for figure in (days, plan.cost.money) if figure]
            cells += ["-" if plan.verdict == "does not fit" else about(figure.value) for figure in shown]
        table.add_row(*cells, style=STYLES[plan.verdict])
    console.print(table)
    caption = "GiB per GPU on the fullest stage at its peak. * with recompute, as memory forces."
    if priced and priced[0].tokens:
        money = f", price in {priced[0].currency}" if priced[0].currency and priced[0].money else ""
        caption += f" Days of {human_count(priced[0].tokens)} tokens{money}."
    console.print(Text(caption))
    for reason, refusals in refused.items():
        console.print(Text(f"{', '.join(refusals)}: {reason}", style="dim"))
    for name, plan in rows:
        if isinstance(plan, str) or plan.layout.schedule != "gpipe" or plan.verdict == "fits":
            continue
        waiting = f"all {plan.layout.grad_accum} micro-batches wait for the backward"
        console.print(Text(f"{name}: {waiting}, the last stage's with their logits.", style="dim"))
