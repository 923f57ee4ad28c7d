"""What a plan has outside its GPUs, as a table for a terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from planner.plan import Plan
from planner.units import gib, human_seconds


def offload_of(plan: Plan) -> str:
    """What a plan offloads, in few words: of the whole model, and of how many layers."""
    whole = [plan.layout.offload] if plan.layout.offload else []
    totals: dict[str, int] = {}
    for stage in plan.stages:
        for name, count in stage.offload.items():
            if name not in plan.layout.offload:
                totals[name] = totals.get(name, 0) + count
    return " ".join([*whole, *(f"{count} {name}" for name, count in totals.items() if count)]) or "-"


def show_elsewhere(console: Console, plan: Plan) -> None:
    """Every stage's share of the host and of NVMe, where something is offloaded."""
    if not any(stage.elsewhere for stage in plan.stages):
        return
    from planner.render import grid

    names = ("stage", "place", "layers", "held", "most", "of", "by", "update")
    table = grid(*names, left=("place", "layers", "by"), wrap=("by", "layers"), spare=("layers", "by"))

    def figures(index: int) -> Any:
        stage = plan.stages[index]
        return stage.offload, stage.elsewhere, stage.update_seconds

    for _, members in groupby(range(len(plan.stages)), key=figures):
        indexes = list(members)
        label = f"{indexes[0]}" if len(indexes) == 1 else f"{indexes[0]}-{indexes[-1]}"
        stage = plan.stages[indexes[0]]
        layers = ", ".join(f"{name} of {count}" for name, count in stage.offload.items() if count)
        for place, own in stage.elsewhere.items():
            parts = ", ".join(
                f"{name.replace('_', ' ')} {gib(size)}" for name, size in own.components.items()
            )
            style = "red" if own.most_bytes > own.capacity_bytes else ""
            sizes = gib(own.bytes), gib(own.most_bytes), gib(own.capacity_bytes)
            update = human_seconds(stage.update_seconds)
            table.add_row(label, place, layers, *sizes, parts, update, style=style)
    console.print()
    console.print(Text("Outside the GPUs, GiB per GPU of its node's share", style="bold"))
    console.print(table)
