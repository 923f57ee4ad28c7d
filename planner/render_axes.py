"""Columns of the degrees that only some layouts have."""

from __future__ import annotations

from collections.abc import Sequence

from planner.plan import Plan
from planner.render_offload import offload_of
from strategies.layout import RANK_ORDERS

AXES = {"CP": "context_parallel", "EP": "expert_parallel", "ETP": "expert_tensor_parallel"}


def axis_columns(plans: Sequence[Plan]) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and each plan's cells: a degree, with its way of exchange if these differ.

    What is offloaded is one of them, the rank order another.
    """
    names = [name for name, axis in AXES.items() if any(getattr(plan.layout, axis) > 1 for plan in plans)]
    comms = {plan.layout.context_comm for plan in plans if plan.layout.context_parallel > 1}
    named = len(comms) > 1 or "ulysses+ring" in comms
    offloads = any(offload_of(plan) != "-" for plan in plans)
    orders = any(plan.layout.rank_order != RANK_ORDERS[0] for plan in plans)
    rows = []
    for plan in plans:
        cells = [f"{getattr(plan.layout, AXES[name])}" for name in names]
        if named and plan.layout.context_parallel > 1:
            cells[0] += f" {plan.layout.to_layout().context_label}"
        cells += [offload_of(plan)] * offloads
        rows.append(cells + [plan.layout.rank_order] * orders)
    return names + ["offload"] * offloads + ["order"] * orders, rows
