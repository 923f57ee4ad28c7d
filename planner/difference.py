"""What differs between two documents of plans: inputs, assumptions, layout, memory, time and cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from planner.documents import Document
from planner.plan import Plan, Span

SECTIONS = ("model", "cluster", "training", "assumptions", "layout", "memory", "time", "cost")
TIMES = ("step_time_s", "step_time_least_s", "step_time_most_s", "tokens_per_s", "days")
RATES = ("mfu", "mfu_causal", "hfu", "bubble_fraction")
SIZES = ("peak_bytes", "least_bytes", "most_bytes", "capacity_bytes")


@dataclass(frozen=True)
class Difference:
    """One value that differs; ``before`` or ``after`` is None where only one of the two has it."""

    section: str
    name: str
    before: Any
    after: Any


def differences(before: Document, after: Document) -> list[Difference]:
    """What differs between the first plans of two documents, section by section."""
    return [
        Difference(section, name, one.get(name), other.get(name))
        for section in SECTIONS
        for one, other in [(dict(_values(before, section)), dict(_values(after, section)))]
        for name in dict.fromkeys((*one, *other))
        if one.get(name) != other.get(name)
    ]


def _values(document: Document, section: str) -> Iterator[tuple[str, Any]]:
    """Names and values of one section."""
    plan = document.best
    match section:
        case "model":
            yield "num_parameters", document.model.num_parameters
            yield from _flat(document.model.model_dump(mode="json", exclude={"source"}))
        case "cluster":
            spec = document.cluster.spec.model_dump(mode="json", exclude={"assumptions"})
            gpu = spec.pop("gpu")
            yield "gpu", gpu["name"]
            yield from _flat(spec)
            for name in ("usable_bytes", "peak_flops", "hbm_bytes_per_s"):
                yield from _flat({name: gpu[name]})
        case "training":
            yield from _flat(document.training.model_dump(mode="json"))
        case "assumptions":
            for note in plan.assumptions:
                yield note, "assumed"
        case "layout":
            yield from plan.layout
            yield "layers", tuple(stage.layers for stage in plan.stages)
            yield "recompute", _summed(plan, "recompute")
            yield "offload_layers", _summed(plan, "offload")
        case "memory":
            yield "verdict", plan.verdict
            for name in SIZES:
                yield name, getattr(plan, name)
            fullest = plan.stages[plan.fullest]
            yield "fullest_stage", plan.fullest
            yield "moment", fullest.moment
            yield from fullest.components.items()
        case "time":
            for name in (*TIMES, *RATES):
                yield name, getattr(plan, name)
        case _:
            for name, value in plan.cost or ():
                yield name, value.value if isinstance(value, Span) else value


def _flat(values: dict[str, Any], of: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{of}{name}.")
        elif value not in (None, {}, []):
            yield f"{of}{name}", value


def _summed(plan: Plan, field: str) -> dict[str, int] | None:
    """Layers of the whole plan by what is done with them."""
    totals: dict[str, int] = {}
    for stage in plan.stages:
        for name, count in getattr(stage, field).items():
            totals[name] = totals.get(name, 0) + count
    return totals or None
