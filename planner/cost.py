"""What a whole training takes: steps, checkpoints, failures, wall time, GPU-hours, energy and money.

Imported where tokens or one of the cluster's figures for it are given; what is not given is not counted, and
the plan says so. A job fails as often as all its GPUs together: after ``M`` seconds on average, as a Poisson
process. It writes a checkpoint, which takes ``delta`` seconds, after every ``tau`` seconds of work; a failure
costs ``R`` seconds and the work since the last checkpoint. Young 1974, doi:10.1145/361147.361115; Daly 2006,
doi:10.1016/j.future.2004.11.016.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, exp, expm1, sqrt

from planner.defaults import Job
from planner.errors import InputError
from planner.layers import Builder
from planner.plan import CostPlan, Span
from planner.units import HOUR, human_seconds
from strategies.base import Layer, Role
from strategies.layout import Layout


def checkpoint_bytes(job: Job, layout: Layout) -> int:
    """Bytes of a checkpoint to go on from: every trained weight and optimizer state of the model, once.

    The terms of the layers before any share, as the framework saves them, weights kept in 8 bits alone in
    half precision (core/dist_checkpointing/utils.py, ``force_all_tensors_to_non_fp8``; ``Saving`` of
    planner/stacks/base.py); frozen weights too, but of a model with adapters these alone. Headers, counters,
    the states of random numbers, schedule and data loader are left out: kilobytes of a rank.
    """
    saving, recipe = job.stack.saving, replace(job.recipe, cast_alone=False)
    if layout.sharding in saving.in_fp32:
        recipe = replace(recipe, master=4.0, moment=4.0)
    shards = layout.data_shards if layout.sharding == "fsdp" else 1
    degrees = {"tensor_parallel": layout.tensor_parallel, "data_shards": shards}
    builder = Builder(job.model, job.training, job.stack, recipe, **degrees)
    builder.optimizer = replace(builder.optimizer, paged=0.0)  # what may be evicted is saved too
    weights = layout.sharding not in saving.without_weights or not recipe.master
    frozen = job.training.adapters is None
    layers = builder.layers()
    return round(sum(layer.count * _saved(layer, weights, frozen) for layer in layers))


def _saved(layer: Layer, weights: bool, frozen: bool) -> float:
    """Bytes of one layer: its optimizer states, its trained ``weights``, those that are ``frozen``."""
    states = layer.by_role[Role.OPTIMIZER]
    trained = {term.name for term in states}
    parameters = layer.by_role[Role.PARAMETER]
    kept = [term for term in parameters if (weights if term.name in trained else frozen)]
    return sum(float(term.amount) for term in (*states, *kept))


def young_interval(write: float, mtbf: float) -> float:
    """Seconds of work between checkpoints, to first order: ``sqrt(2 delta M)`` (Young 1974).

    >>> young_interval(5 * 60, 24 * 3600) / 60
    120.0
    """
    return sqrt(2 * write * mtbf)


def daly_interval(write: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that take the least time in all (Daly 2006, equation 37).

    ``sqrt(2 delta M) [1 + 1/3 sqrt(delta / 2M) + 1/9 (delta / 2M)] - delta``; ``M`` from ``delta = 2M`` on.
    His figures 3 and 4: checkpoints of 5 minutes, 24 and 6 hours between failures.

    >>> [round(daly_interval(5 * 60, hours * 3600) / 60) for hours in (24, 6)]
    [117, 57]
    """
    if write >= 2 * mtbf:
        return mtbf
    part = write / (2 * mtbf)
    return young_interval(write, mtbf) * (1 + sqrt(part) / 3 + part / 9) - write


def daly_goodput(interval: float, write: float, restart: float, mtbf: float) -> float:
    """Seconds of work over those that pass: ``tau / (M e^(R/M) (e^((tau + delta)/M) - 1))``.

    Daly 2006's complete wall time, for work much longer than a checkpoint: failures may strike while a
    checkpoint is written and while the job restarts. All in seconds.
    """
    return interval / (mtbf * exp(restart / mtbf) * expm1((interval + write) / mtbf))


def cost_plan(job: Job, layout: Layout, step: Span) -> CostPlan:
    """What a whole training under a layout takes, whose ``step`` takes seconds, at least and at most.

    Raises InputError where the job would fail before it gets anywhere.
    """
    cluster, tokens = job.cluster, job.training.tokens
    steps = ceil(tokens / job.tokens_per_step) if tokens else None
    size = checkpoint_bytes(job, layout)
    write = size / cluster.checkpoint_bytes_per_s if cluster.checkpoint_bytes_per_s else None
    cost = CostPlan(
        tokens=tokens,
        steps=steps,
        checkpoint_bytes=size,
        checkpoint_s=write,
        power_w=cluster.gpu.power_w,
        pue=cluster.pue,
        price=cluster.price,
        currency=cluster.currency,
    )
    failing: dict[str, object] = {}
    if (mtbf := cluster.mtbf_s) and write:
        restart = cluster.restart_s or 0.0
        _check_progress(mtbf, restart, step.value, write)
        best = daly_interval(write, mtbf)
        every = min(max(1, round(best / step.value)), steps or 10**18)
        goodput = daly_goodput(every * step.value, write, restart, mtbf)
        failing = {
            "mtbf_s": mtbf,
            "restart_s": cluster.restart_s,
            "young_interval_s": young_interval(write, mtbf),
            "interval_s": best,
            "interval_steps": every,
            "goodput": goodput,
        }
    cost = cost.model_copy(update=failing)
    return cost.model_copy(update=_spent(job, step, cost)) if tokens else cost


def _spent(job: Job, step: Span, cost: CostPlan) -> dict[str, Span]:
    """Time, GPU-hours, energy and money of a number of tokens, each with its range."""
    steps = float(cost.tokens or 0) / job.tokens_per_step
    compute = step.times(steps)
    wall = compute.times(1 / cost.goodput if cost.goodput else 1.0)
    hours = wall.times(job.cluster.num_gpus / HOUR)
    spent = {
        "compute_s": compute,
        "wall_s": wall,
        "gpu_hours": hours,
        "energy_kwh": hours.times(cost.power_w / 1000 * (cost.pue or 1.0)),
    }
    return spent | ({"money": hours.times(cost.price)} if cost.price else {})


def _check_progress(mtbf: float, restart: float, step: float, write: float) -> None:
    """Raises InputError where restart, one step and a checkpoint take longer than failures are apart."""
    if mtbf >= restart + step + write:
        return
    parts = {"a restart": restart, "a step": step, "a checkpoint": write}
    listed = " and ".join(f"{name} of {human_seconds(size)}" for name, size in parts.items() if size)
    fix = {
        "a restart": "restart sooner",
        "a step": "use smaller steps",
        "a checkpoint": "raise --checkpoint-bandwidth",
    }[max(parts, key=lambda name: parts[name])]
    raise InputError(
        f"the job fails every {human_seconds(mtbf)} on average, but {listed} take "
        f"{human_seconds(restart + step + write)}: it would hardly get on; {fix}, or use fewer GPUs"
    )


def notes_on(job: Job, cost: CostPlan) -> Iterator[str]:
    """What the figures count, and what they do not."""
    saving = job.stack.saving
    yield f"checkpoint: as {saving.source} saves it, each weight and state once"
    if cost.goodput:
        yield (
            "failures: Poisson, each stops the whole job and loses the work since the last checkpoint, which "
            "all GPUs wait for (Daly 2006); time for evaluation and data is not counted"
        )
        if cost.restart_s is None:
            yield "restarts after failures take no time: none is given (--restart-time)"
    elif cost.tokens:
        lacking = "--gpu-mtbf" if cost.checkpoint_s else "--gpu-mtbf and --checkpoint-bandwidth"
        yield f"failures and checkpoints are not counted in days, GPU-hours and all that follows ({lacking})"
    if cost.tokens:
        whole = f"times a PUE of {cost.pue:g}" if cost.pue else "without the data centre's (--pue)"
        yield (
            f"energy: every GPU at its board's limit of {cost.power_w:g} W all the time, {whole}; hosts, "
            "network and storage are not counted"
        )
        if not cost.price:
            yield "money: no price of a GPU-hour is given (--price)"
