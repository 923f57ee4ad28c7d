"""When nothing fits: what comes nearest, and the changes that would fit, each checked by a search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from planner.best_first import find
from planner.catalog import load_gpu
from planner.defaults import Job, resolve
from planner.errors import InputError
from planner.layouts import Choices
from planner.plan import Plan, make_plan
from planner.specs import ClusterSpec, TrainingSpec
from planner.stacks import STACKS
from strategies.layout import Layout

BIGGER = ("h200-sxm-141gb", "b200-sxm-180gb", "mi300x-192gb")
ENOUGH = 6
"""Changes that are looked for; at least three are found wherever more GPUs can help."""


@dataclass(frozen=True)
class Change:
    """One change to a job and what the best layout then is."""

    what: str
    option: str
    layout: Layout
    step_time_s: float
    peak_bytes: int
    num_gpus: int


def nearest_plan(job: Job, choices: Choices) -> Plan:
    """The layout that asks for least memory on its fullest GPU, though more than there is.

    It is looked for in the whole GPU, and more: so it is the same whatever part of that the job may use.
    """
    whole = job.cluster.model_copy(update={"budget_bytes": None, "headroom": 0.0})
    stretch = 2.0
    while True:
        stretched = replace(job, cluster=whole, stretch=stretch)
        found = find(stretched, choices, "headroom", top=1)
        if found.answers:
            return make_plan(job, found.answers[0], {"status": "does not fit", "objective": "headroom"})
        stretch *= 2


def changes_that_fit(
    job: Job, choices: Choices, progress: Callable[[int, int], Any] = lambda done, left: None
) -> list[Change]:
    """Changes under which the job fits, cheapest in GPU-seconds per token first."""
    found: list[Change] = []
    for what, option, changed, wider in _candidates(job, choices):
        if len(found) >= ENOUGH:
            break
        try:
            answer = find(changed, wider, top=1, time_limit=10.0, progress=progress).answers
        except InputError:
            continue
        if answer:
            plan = make_plan(changed, answer[0], {})
            found.append(
                Change(
                    what,
                    option,
                    answer[0].candidate.layout,
                    plan.step_time_s,
                    plan.peak_bytes,
                    changed.cluster.num_gpus,
                )
            )
    tokens = job.tokens_per_step
    return sorted(found, key=lambda change: change.step_time_s * change.num_gpus / tokens)


def _candidates(job: Job, choices: Choices) -> Iterator[tuple[str, str, Job, Choices]]:
    """Changes to try, the mildest of each sort first; each sort stops at its first that fits."""
    training, cluster = job.training, job.cluster
    # Restrictions of the search that the user chose.
    for name in (
        "recompute",
        "sharding",
        "micro_batch_size",
        "tensor_parallel",
        "pipeline_parallel",
        "schedule",
        "context_parallel",
        "expert_parallel",
    ):
        if getattr(choices, name) is not None:
            option = "--" + name.replace("_", "-")
            yield (
                f"leave {name} to the search",
                f"no {option}",
                job,
                replace(choices, **dict[str, Any]({name: None})),
            )
    if cluster.budget_bytes or cluster.headroom:
        free = cluster.model_copy(update={"budget_bytes": None, "headroom": 0.0})
        yield "use the whole GPU", "no --memory-budget, no --headroom", replace(job, cluster=free), choices
    if job.recipe.gradient == 4 and job.recipe.weight == 2:
        lean = training.model_copy(update={"gradient_dtype": "bf16"})
        yield "keep gradients in bf16", "--gradient-dtype bf16", _again(job, cluster, lean), choices
    if job.stack.options.get("gradient_view") and training.options["gradient_view"] == "off":
        views = training.model_copy(update={"options": {**training.options, "gradient_view": "on"}})
        yield (
            "gradients as views of DDP's buckets",
            "--option gradient_view=on",
            _again(job, cluster, views),
            choices,
        )
    for name, stack in STACKS.items():
        # The same modules under another framework, which shares model states out as this one does not.
        others = [one for one in stack.shardings if one not in job.stack.shardings]
        if stack.rows is job.stack.rows and others:
            own = ("attention", "swiglu", "profile")
            fields: dict[str, Any] = {"framework": name, "options": {}, **dict.fromkeys(own)}
            try:
                other = _again(job, cluster, training.model_copy(update=fields))
            except InputError:  # it has not this precision, or not these gradients
                continue
            elsewhere = replace(choices, sharding=None, recompute=None, schedule=None)
            label = f"share model states out ({', '.join(others)})"
            yield label, f"--framework {name}", other, elsewhere
    if "pure-bf16" in job.stack.recipes and training.precision == "bf16":
        pure = training.model_copy(update={"precision": "pure-bf16", "options": training.options})
        yield "keep weights and moments in bf16", "--precision pure-bf16", _again(job, cluster, pure), choices
    if job.recipe.moment == 4 and job.recipe.master:  # else moments are of the weights' dtype
        lean = training.model_copy(update={"optimizer_dtype": "bf16"})
        yield "keep optimizer moments in bf16", "--optimizer-dtype bf16", _again(job, cluster, lean), choices
    if not choices.offload:
        for items in (("optimizer",), ("optimizer", "parameters")):
            if any(",".join(items) in one.whole for one in job.stack.offloading.values()):
                named = ",".join(items)
                wider = replace(choices, offload=items)
                yield f"offload {' and '.join(items)} to the host", f"--offload {named}", job, wider
                break
    if (seq := job.seq_length // 2) >= 512:
        shorter = training.model_copy(
            update={"seq_length": seq, "global_batch_size": job.global_batch_size * 2}
        )
        yield (
            f"halve the sequence to {seq}",
            f"--seq-length {seq} -b {job.global_batch_size * 2}",
            _again(job, cluster, shorter),
            choices,
        )
    wide = replace(choices, pipeline_parallel=None, data_parallel=None, context_parallel=None)
    for gpu in (cluster.gpu.name, *BIGGER):
        kind = load_gpu(gpu)
        if gpu != cluster.gpu.name and kind.usable_bytes <= cluster.gpu.usable_bytes:
            continue
        for factor in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
            if factor == 1 and gpu == cluster.gpu.name:
                continue
            count = cluster.num_gpus * factor
            per_node = (
                kind.gpus_per_node
                if gpu != cluster.gpu.name
                else max(cluster.gpus_per_node, min(kind.gpus_per_node, count))
            )
            bigger = cluster.model_copy(
                update={"gpu": kind, "num_gpus": count, "gpus_per_node": min(per_node, count)}
            )
            batch = job.global_batch_size
            if factor > batch:
                break
            changed = _again(job, bigger, training)
            if find(changed, wide, "headroom", top=1, time_limit=5.0).answers:
                yield f"{count} x {kind.name}", f"--gpus {count}x{kind.name}", changed, wide
                break


def _again(job: Job, cluster: ClusterSpec, training: TrainingSpec) -> Job:
    return resolve(job.model, cluster, training)
