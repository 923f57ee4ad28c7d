"""The same job on other numbers of GPUs, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from planner.alternatives import Alternative
from planner.documents import Document
from planner.render import grid
from planner.units import about, gib


def show_alternatives(console: Console, document: Document, found: Sequence[Alternative]) -> None:
    """A row for each number of GPUs, and why there is none on others."""
    training = document.best.training
    job = f"{training.global_batch_size:,} sequences of {training.seq_length:,} tokens a step, launchable"
    console.print(Text(f"{document.model.name}, {job}", style="bold"))
    plans = [(one.cluster, one.plan) for one in found if one.plan]
    if plans:
        spent = any(plan.cost and plan.cost.gpu_hours for _, plan in plans)
        priced = any(plan.cost and plan.cost.money for _, plan in plans)
        more = [*(["days", "GPU-hours"] if spent else []), *(["price"] if priced else [])]
        table = grid("GPUs", "layout", "step s", "GPU-s a step", "peak GiB", *more, left=("layout",))
        for cluster, plan in plans:
            cost, cells = plan.cost, list[str]()
            if spent and cost and cost.gpu_hours and cost.wall_s:
                cells += [about(cost.wall_s.value / 86400), about(cost.gpu_hours.value)]
            if priced and cost and cost.money:
                cells.append(f"{about(cost.money.value)} {cost.currency}".strip())
            table.add_row(
                f"{cluster.num_gpus:,}",
                plan.layout.to_layout().describe(),
                f"{plan.step_time_s:.3g}",
                about(plan.step_time_s * cluster.num_gpus),
                gib(plan.peak_bytes),
                *cells,
            )
        console.print(table)
    for one in found:
        if one.plan is None:
            console.print(Text(f"{one.cluster.num_gpus:,} GPUs: {one.reason}"), soft_wrap=True)
