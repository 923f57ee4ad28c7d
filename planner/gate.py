"""Limits that a plan is held against in a pipeline: each a rule with the plan's own figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import InputError
from planner.plan import Plan, Span
from planner.units import DAY, gib, human_seconds


@dataclass(frozen=True)
class Rule:
    """One limit, the plan's figure in words, and whether it holds."""

    name: str
    limit: str
    found: str
    holds: bool


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _gib(value: float) -> str:
    return f"{gib(value)} GiB"


def _days(value: float) -> str:
    return f"{value:,.1f} days"


def _whole_days(plan: Plan) -> float | None:
    """Days with failures and checkpoints, where they are counted."""
    wall = plan.cost.wall_s if plan.cost else None
    return wall.value / DAY if wall else plan.days


def _of_cost(name: str) -> Callable[[Plan], float | None]:
    def figure(plan: Plan) -> float | None:
        found = getattr(plan.cost, name, None)
        return found.value if isinstance(found, Span) else found

    return figure


LIMITS: Mapping[str, tuple[Callable[[Plan], float | None], bool, Callable[[Any], str], str]] = {
    "max_gpus": (lambda plan: plan.num_gpus, True, "{:,}".format, ""),
    "max_peak": (lambda plan: plan.peak_bytes, True, _gib, ""),
    "min_headroom": (lambda plan: plan.headroom_bytes / plan.capacity_bytes, False, _percent, ""),
    "min_headroom_bytes": (lambda plan: plan.headroom_bytes, False, _gib, ""),
    "max_step_time": (lambda plan: plan.step_time_s, True, human_seconds, ""),
    "min_mfu": (lambda plan: plan.mfu, False, _percent, ""),
    "max_days": (_whole_days, True, _days, "plan it with --tokens"),
    "max_gpu_hours": (_of_cost("gpu_hours"), True, "{:,.0f}".format, "plan it with --tokens"),
    "max_cost": (_of_cost("money"), True, "{:,.0f}".format, "plan it with --tokens and --price"),
    "min_goodput": (
        _of_cost("goodput"),
        False,
        _percent,
        "plan it with --tokens, --gpu-mtbf and --checkpoint-bandwidth",
    ),
}
"""By name: the plan's figure, is the limit the most that it may be, how it is written, what else it needs."""


def check(plan: Plan, limits: Mapping[str, float]) -> list[Rule]:
    """A rule for the verdict, and one for every limit. Raises InputError where the plan has no such figure.

    Headroom is what is left of the GPU's capacity on the fullest stage, whatever that needs.
    """
    rules = [Rule("verdict", "fits", plan.verdict, plan.fits)]
    for name, limit in limits.items():
        figure, most, words, needs = LIMITS[name]
        found = figure(plan)
        if found is None:
            raise InputError(f"--{name.replace('_', '-')}: the plan says nothing of it: {needs}")
        holds = found <= limit if most else found >= limit
        rules.append(Rule(name.replace("_", " "), words(limit), words(found), holds))
    return rules
