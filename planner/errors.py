"""What can go wrong, for people and for pipelines.

    PlannerError
    ├── InputError        a value that cannot be: exit status 2
    ├── InfeasibleError   a job that fits nowhere: exit status 1, with the nearest layout
    └── SolverError       the solver gave no usable answer, in time: exit status 3

Every message names the value, the rule and the nearest fix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class PlannerError(Exception):
    """Base of every error that the planner raises on purpose."""


class InputError(PlannerError):
    """The input cannot be used as it is; the message says what can."""


class InfeasibleError(PlannerError):
    """Nothing fits. ``nearest`` is the plan that comes nearest, ``binding`` what it lacks, ``changes`` what
    would fit, ``tried`` what would not either."""

    def __init__(
        self,
        message: str,
        nearest: Any = None,
        changes: Iterable[Any] = (),
        tried: Iterable[Any] = (),
        binding: Any = None,
    ) -> None:
        super().__init__(message)
        self.nearest = nearest
        self.changes = list(changes)
        self.tried = list(tried)
        self.binding = binding


class SolverError(PlannerError):
    """The solver stopped without a usable answer."""


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """``did you mean a, b or c?`` for an unknown name, or all names when nothing is near."""
    from difflib import get_close_matches

    names = sorted(known)
    near = get_close_matches(name.lower()[:100], names, n=count, cutoff=0.4) or names[:8]
    return f"did you mean {', '.join(near[:-1]) + ' or ' if len(near) > 1 else ''}{near[-1]}?"
