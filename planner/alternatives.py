"""The same job on the numbers of GPUs that may be free: what a scheduler that resizes gangs chooses from.

Model, batch, sequence length, framework and all else stay as they are, layout and recompute are searched
anew for each number. Where a number of GPUs cannot train such a batch, or nothing fits, the reason is said.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from planner import __version__
from planner.advice import nearest_plan, shortfall
from planner.api import check_choices, check_proved, proof_of, settled
from planner.best_first import find
from planner.defaults import resolve
from planner.documents import Document, document_of
from planner.errors import InputError, SolverError
from planner.export.base import Subject
from planner.files import plain
from planner.layouts import Choices
from planner.placement import stage_nodes
from planner.plan import Plan, make_plan
from planner.specs import ClusterSpec, ModelSpec
from strategies.offload import places_of

SCHEMA = "planner.alternatives/1"
MOST = 200
"""Numbers of GPUs at most."""
USUAL = 16
"""Numbers of GPUs where none are given."""


@dataclass(frozen=True)
class Alternative:
    """A number of GPUs with the best plan on them, or the ``reason`` for none."""

    model: ModelSpec
    cluster: ClusterSpec
    plan: Plan | None = None
    reason: str = ""

    def row(self) -> dict[str, Any]:
        """As JSON values: what a choice is made by, and the plan."""
        gpus, plan = self.cluster.num_gpus, self.plan
        nodes, lone = divmod(gpus, self.cluster.gpus_per_node)
        row: dict[str, Any] = {
            "gpus": gpus,
            "nodes": nodes + bool(lone),
            "fits": plan is not None and plan.fits,
            "reason": self.reason,
        }
        if plan is None:
            return row
        cost = plan.cost
        return row | {
            "stage_nodes": stage_nodes(Subject(self.model, self.cluster, plan)),
            "layout": plan.layout.to_layout().describe(),
            "step_time_s": plan.step_time_s,
            "step_time_least_s": plan.step_time_least_s,
            "step_time_most_s": plan.step_time_most_s,
            "tokens_per_s": plan.tokens_per_s,
            "gpu_seconds_per_step": plan.step_time_s * gpus,
            "peak_bytes": plan.peak_bytes,
            "capacity_bytes": plan.capacity_bytes,
            "days": cost.wall_s.value / 86400 if cost and cost.wall_s else plan.days,
            "gpu_hours": cost.gpu_hours.value if cost and cost.gpu_hours else None,
            "money": cost.money.value if cost and cost.money else None,
            "currency": cost.currency if cost else "",
            "plan": plan.model_dump(mode="json"),
        }


def counts_of(document: Document, counts: Sequence[int] = (), available: int | None = None) -> list[int]:
    """Numbers of GPUs to plan for, most first, without repeats.

    Those given; else whole nodes up to ``available`` GPUs (the plan's own number, where not given), all of
    them or as many as :data:`USUAL`, evenly spread. Raises InputError.
    """
    spec = document.cluster.spec
    if counts:
        for count in counts:
            if not 1 <= count <= 10_000_000:
                raise InputError(f"--counts {count}: use 1 to 10,000,000 GPUs")
        if len(counts) > MOST:
            raise InputError(f"{len(counts)} --counts are given: use {MOST} at most")
        return sorted(set(counts), reverse=True)
    most = spec.num_gpus if available is None else available
    if most < 1:
        raise InputError(f"--available {most}: use 1 or more GPUs")
    nodes = most // spec.gpus_per_node
    if not nodes:
        return [most]
    return [n * spec.gpus_per_node for n in range(nodes, 0, -ceil(nodes / USUAL))]


def alternatives(
    document: Document,
    counts: Sequence[int] = (),
    available: int | None = None,
    time_limit: float = 60.0,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[Alternative]:
    """The best plan on each number of GPUs, most first.

    What the framework can be told is looked for (``--launchable``), and offloads as the document's best plan
    has. Where numbers are not given the list ends with the first that nothing fits on, as fewer GPUs hold
    less. ``progress`` is told each number. Raises InputError for numbers that cannot be.
    """
    offload = [
        name if place == "host" else f"{name}:{place}"
        for name, place in places_of(document.best.layout.offload).items()
    ]
    if any("+activations" in way for stage in document.best.stages for way in stage.rows):
        offload.append("activations")
    choices = Choices(offload=tuple(offload), launchable=True)
    found: list[Alternative] = []
    for count in counts_of(document, counts, available):
        progress(count)
        found.append(_best(document, count, choices, time_limit))
        if not counts and found[-1].plan is None and "fits" in found[-1].reason:
            break
    return found


def _best(document: Document, count: int, choices: Choices, time_limit: float) -> Alternative:
    """The best plan on so many GPUs, or why there is none."""
    spec = document.cluster.spec
    each = min(spec.gpus_per_node, count)
    notes = [one for one in spec.assumptions if not one.startswith("the last node holds")]
    if count % each:
        notes.append(f"the last node holds {count % each} GPUs only")
    cluster = spec.model_copy(update={"num_gpus": count, "gpus_per_node": each, "assumptions": tuple(notes)})
    try:
        job = resolve(document.model, cluster, document.best.training)
        check_choices(job, choices, "time", 1, time_limit)
        found = find(job, choices, "time", 1, time_limit)
        if not found.answers:
            check_proved(job, choices, found)
            return Alternative(
                document.model, cluster, reason=shortfall(job, found.enumerated, nearest_plan(job, choices))
            )
        (solution,) = settled(found, "time")
        return Alternative(document.model, cluster, make_plan(job, solution, proof_of(found, "time")))
    except (InputError, SolverError) as error:
        return Alternative(document.model, cluster, reason=plain(str(error), 300))


def document_for(document: Document, found: Sequence[Alternative]) -> dict[str, Any]:
    """``planner.alternatives/1``: the job in a few words, and a row for each number of GPUs."""
    best = document.best
    return {
        "schema": SCHEMA,
        "planner": __version__,
        "model": document.model.name,
        "gpu": best.gpu,
        "gpus_per_node": document.cluster.gpus_per_node,
        "planned_gpus": best.num_gpus,
        "seq_length": best.training.seq_length,
        "global_batch_size": best.training.global_batch_size,
        "alternatives": [one.row() for one in found],
    }


def plans_of(
    document: Document, found: Sequence[Alternative], name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """File names and documents of each plan, as ``planner export`` reads them; ``name`` is the document's."""
    for one in found:
        if one.plan:
            count = one.cluster.num_gpus
            command = shlex.join(["planner", "alternatives", name, "--counts", str(count)])
            kept = document_of(document.model, one.cluster, [one.plan], command)
            yield f"gpus-{count}.json", kept.to_json()
