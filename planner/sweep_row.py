"""One row of a sweep: a point, its best layout or why there is none. Plain values, as tables have them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from planner.defaults import Job
from planner.layouts import Choices
from planner.plan import MODEL, Plan, verdict_of, warnings_for
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from planner.units import DAY

Verdict = Literal["fits", "at risk", "does not fit", "refused", "no answer"]


class Row(BaseModel):
    """A point of a sweep and what was found. None where there is nothing to say.

    ``verdict`` is that of a plan, ``refused`` for what cannot be, ``no answer`` within the time limit. Where
    it does not fit, or only may, the layout is the nearest one, and ``reason`` says what binds. Sizes are
    bytes of the fullest GPU: beside the most that it may need, ``headroom_bytes`` are left of the budget,
    ``free_bytes`` of all that the GPU has; ``over_bytes`` is what lacks.
    """

    model_config = MODEL

    model: str
    gpu: str
    num_gpus: int
    gpus_per_node: int
    seq_length: int | None
    global_batch_size: int | None
    micro_batch_sizes: str  # that were to be chosen from; empty: all
    capacity_bytes: int
    verdict: Verdict
    front: bool = False
    reason: str = ""
    layout: str = ""
    data_parallel: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    context_parallel: int | None = None
    expert_parallel: int | None = None
    expert_tensor_parallel: int | None = None
    chunks: int | None = None
    micro_batch_size: int | None = None
    grad_accum: int | None = None
    sharding: str = ""
    data_shards: int | None = None
    schedule: str = ""
    rank_order: str = ""
    recompute: str = ""  # layers under each policy
    offload: str = ""
    peak_bytes: int | None = None
    least_bytes: int | None = None
    most_bytes: int | None = None
    headroom_bytes: int | None = None
    free_bytes: int | None = None
    over_bytes: int | None = None
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    days: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None  # in money, where a GPU-hour has a price
    proof: str = ""  # optimal, or feasible where time ran out

    @property
    def fits(self) -> bool:
        """Does it fit for sure?"""
        return self.verdict == "fits"

    @staticmethod
    def of_point(
        model: ModelSpec,
        cluster: ClusterSpec,
        training: TrainingSpec,
        choices: Choices,
        verdict: Verdict,
        reason: str,
    ) -> Row:
        """A point without a layout."""
        return Row(
            model=model.name,
            gpu=cluster.gpu.name,
            num_gpus=cluster.num_gpus,
            gpus_per_node=cluster.gpus_per_node,
            seq_length=training.seq_length,
            global_batch_size=training.global_batch_size,
            micro_batch_sizes=_sizes(choices),
            capacity_bytes=cluster.capacity_bytes,
            verdict=verdict,
            reason=reason,
        )

    @staticmethod
    def read(values: Any) -> Row | None:
        """A row of what ``model_dump`` made of it; None of anything else."""
        try:
            return Row.model_validate(values)
        except ValidationError:
            return None


def _sizes(choices: Choices) -> str:
    return ",".join(map(str, choices.micro_batch_size or ()))


def with_memory(plan: Plan, job: Job) -> Plan:
    """The same plan where a GPU has as much memory as this job's, else the same: no other byte changes."""
    capacity = job.cluster.capacity_bytes
    stages = [stage.model_copy(update={"capacity_bytes": capacity}) for stage in plan.stages]
    verdict = verdict_of(stages)
    update = {
        "stages": tuple(stages),
        "capacity_bytes": capacity,
        "verdict": verdict,
        "fits": verdict == "fits",
        "warnings": tuple(warnings_for(job, plan.layout.to_layout(), verdict)),
    }
    return plan.model_copy(update=update)


def row_of(choices: Choices, plan: Plan, job: Job, reason: str = "") -> Row:
    """A plan as a row; one that is only the nearest has a ``reason``, and no time: nobody would run it."""
    layout, cluster = plan.layout, job.cluster
    totals: dict[str, int] = {}
    for stage in plan.stages:
        for policy, count in stage.recompute.items():
            totals[policy] = totals.get(policy, 0) + count
    found = not reason
    cost = plan.cost if found else None
    return Row(
        model=plan.model,
        gpu=plan.gpu,
        num_gpus=plan.num_gpus,
        gpus_per_node=cluster.gpus_per_node,
        seq_length=plan.training.seq_length,
        global_batch_size=plan.training.global_batch_size,
        micro_batch_sizes=_sizes(choices),
        capacity_bytes=plan.capacity_bytes,
        verdict="fits" if found else "does not fit" if plan.verdict == "does not fit" else "at risk",
        reason=reason,
        layout=layout.to_layout().describe(),
        **{name: getattr(layout, name) for name in Row.model_fields if name in type(layout).model_fields},
        recompute=" ".join(f"{policy}={count}" for policy, count in totals.items()),
        peak_bytes=plan.peak_bytes,
        least_bytes=plan.least_bytes,
        most_bytes=plan.most_bytes,
        headroom_bytes=plan.headroom_bytes,
        free_bytes=cluster.gpu.usable_bytes - plan.most_bytes,
        over_bytes=max(0, -plan.headroom_bytes),
        step_time_s=plan.step_time_s if found else None,
        tokens_per_s=plan.tokens_per_s if found else None,
        mfu=plan.mfu if found else None,
        days=cost.wall_s.value / DAY if cost and cost.wall_s else None,
        gpu_hours=cost.gpu_hours.value if cost and cost.gpu_hours else None,
        cost=cost.money.value if cost and cost.money else None,
        proof=str(plan.proof["status"]) if found else "",
    )
