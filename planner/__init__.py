"""Will this model fit on these GPUs, on which layout, and how fast?

    from planner import ClusterSpec, ModelSpec, TrainingSpec, search

    plans = search(ModelSpec.from_catalog("llama-65b"), ClusterSpec.parse("64x80G"), TrainingSpec())
    print(plans[0].layout, plans[0].peak_bytes, plans[0].step_time_s)

Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.api import compare, estimate, explain, search, whynot
    from planner.documents import Document, document_of, read_document
    from planner.errors import InfeasibleError, InputError, PlannerError, SolverError
    from planner.layouts import Choices
    from planner.plan import Plan
    from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
    from planner.sweeping import Point, Sweep, grid, sweep
    from strategies.layout import Layout

__version__ = "0.1.0"
_HOME = {
    "search": "planner.api",
    "estimate": "planner.api",
    "explain": "planner.api",
    "compare": "planner.api",
    "whynot": "planner.api",
    "Document": "planner.documents",
    "document_of": "planner.documents",
    "read_document": "planner.documents",
    "Choices": "planner.layouts",
    "ClusterSpec": "planner.specs",
    "ModelSpec": "planner.specs",
    "TrainingSpec": "planner.specs",
    "Plan": "planner.plan",
    "sweep": "planner.sweeping",
    "grid": "planner.sweeping",
    "Point": "planner.sweeping",
    "Sweep": "planner.sweeping",
    "Layout": "strategies.layout",
    "PlannerError": "planner.errors",
    "InputError": "planner.errors",
    "InfeasibleError": "planner.errors",
    "SolverError": "planner.errors",
}
__all__ = [
    "Choices",
    "ClusterSpec",
    "Document",
    "InfeasibleError",
    "InputError",
    "Layout",
    "ModelSpec",
    "Plan",
    "PlannerError",
    "Point",
    "SolverError",
    "Sweep",
    "TrainingSpec",
    "compare",
    "document_of",
    "estimate",
    "explain",
    "grid",
    "read_document",
    "search",
    "sweep",
    "whynot",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'planner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
