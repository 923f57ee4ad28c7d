"""Changes to try where something does not fit: one list for given layouts and for searches.

A sort of change is tried from its mildest; the first that fits ends it. Whether one fits is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import ValidationError

from planner.asked import Asked
from planner.axes import LEAST_TOKENS
from planner.catalog import load_gpu
from planner.defaults import Job
from planner.errors import InputError
from planner.layouts import divisors
from planner.optimizers import OPTIMIZERS
from planner.specs import ClusterSpec, first_problem
from planner.stacks import STACKS
from strategies.layout import SHARDINGS, Layout
from strategies.pipeline_parallel import FOLDED

BIGGER = ("h200-sxm-141gb", "b200-sxm-180gb", "mi300x-192gb")
"""Kinds of GPU with more memory, those with least of it first."""
FACTORS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Times as many GPUs."""
SHORTEST = 512
"""Tokens below which a sequence is not cut."""
LEAN = ("recomputed", "fused", "chunked", "compiled")
"""Values of a framework's options that keep less."""
LEAN_WHEN_ON = ("gradient_view", "fp8_param_gather")
EIGHT_BITS = ("adamw8bit", "torchao-adamw8bit")
RESTRICTIONS = (
    "recompute",
    "sharding",
    "micro_batch_size",
    "tensor_parallel",
    "pipeline_parallel",
    "schedule",
    "context_parallel",
    "expert_parallel",
)
"""What a search may be held to, and a change leaves out."""
OF_GPUS = ("gpu", "num_gpus", "gpus_per_node", "assumptions")
"""What a cluster on other GPUs does not keep."""


Of = Literal["layout", "gpus", "training"]
"""What a change is of: where the same is computed, or on which GPUs, or what is computed."""


@dataclass(frozen=True)
class Proposal:
    """One change to try, made when its turn comes; ``of`` is what it changes besides the layout."""

    sort: str
    what: str
    make: Callable[[], Asked]
    of: Of = "layout"


def proposals(asked: Asked, job: Job) -> Iterator[Proposal]:
    """What to try, by sorts; what cannot be raises an InputError when it is made."""
    if asked.layout:
        yield from _of_layout(asked, asked.layout, job)
    else:
        yield from _of_choices(asked, job)
    yield from _of_training(asked, job)
    yield from _of_framework(asked, job)
    if asked.layout:
        yield from _same_layout_elsewhere(asked, asked.layout)
    else:
        yield from _other_gpus(asked, job)
        yield from _of_offloading(asked, job)


def _of_layout(asked: Asked, layout: Layout, job: Job) -> Iterator[Proposal]:
    yield from _of_recompute(asked, job)
    yield from _of_data(asked, layout, job)
    yield from _of_groups(asked, layout, job)
    yield from _of_schedule(asked, layout, job)
    yield from _of_offload(asked, layout)
    yield from _of_options(asked, job)


def _of_recompute(asked: Asked, job: Job) -> Iterator[Proposal]:
    policy, plus, moved = asked.recompute.partition("+")
    policies = job.stack.policies
    for name in policies[policies.index(policy) + 1 :] if policy in policies else ():
        way = f"{name}{plus}{moved}"
        yield Proposal("recompute", f"recompute {name}", partial(replace, asked, recompute=way))
    if policy != "auto" and policies[1:]:
        freed = replace(asked, recompute=f"auto{plus}{moved}", layers=None)
        yield Proposal("recompute auto", "recompute as memory forces", partial(replace, freed))


def _of_data(asked: Asked, layout: Layout, job: Job) -> Iterator[Proposal]:
    """Micro-batches, and what the replicas share out."""
    with_layout = asked.with_layout
    for size in reversed(divisors(layout.micro_batch_size)[:-1]):
        yield Proposal("micro-batch", f"micro-batches of {size}", partial(with_layout, micro_batch_size=size))
    for name in SHARDINGS[SHARDINGS.index(layout.sharding) + 1 :]:
        if layout.data_ranks > 1 and name in job.stack.shardings:
            yield Proposal("sharding", f"share states out as {name}", partial(with_layout, sharding=name))
    if layout.sharding == "fsdp":
        if not layout.reshard_after_forward:
            what = "free gathered units after the forward"
            yield Proposal("reshard", what, partial(with_layout, reshard_after_forward=True))
        for shards in divisors(layout.data_parallel):
            if shards > layout.data_shards:
                what = f"share states out over {shards}"
                yield Proposal("shards", what, partial(with_layout, data_shards=shards))


def _of_groups(asked: Asked, layout: Layout, job: Job) -> Iterator[Proposal]:
    """Larger groups in place of replicas."""
    with_layout, data = asked.with_layout, layout.data_parallel
    tensor, pipeline, context = layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel
    if tensor > 1 and not layout.sequence_parallel:
        what = "sequence parallelism"
        yield Proposal(what, what, partial(with_layout, sequence_parallel=True))
    for factor in divisors(data)[1:]:
        fewer = partial(with_layout, data_parallel=data // factor)
        if job.stack.tensor_parallel and (t := tensor * factor) <= job.cluster.domain:
            wider = partial(fewer, tensor_parallel=t, sequence_parallel=_sequence_parallel(layout))
            yield Proposal("tensor parallelism", f"tensor parallelism {t}", wider)
        if (p := pipeline * factor) <= job.model.num_hidden_layers:
            yield Proposal("pipeline", f"{p} pipeline stages", partial(fewer, pipeline_parallel=p))
        if job.stack.context_comms and job.seq_length >= (c := context * factor) * LEAST_TOKENS:
            what = "context parallelism"
            yield Proposal(what, f"{what} {c}", partial(fewer, context_parallel=c))
    if job.model.experts and job.stack.expert_parallel:
        for factor in divisors(job.model.experts.num_experts // layout.expert_parallel)[1:]:
            e, what = layout.expert_parallel * factor, "expert parallelism"
            yield Proposal(what, f"{what} {e}", partial(with_layout, expert_parallel=e))


def _sequence_parallel(layout: Layout) -> bool:
    """Sequence parallelism under more tensor parallelism: as it was, on where there was none."""
    return layout.sequence_parallel or layout.tensor_parallel == 1


def _of_schedule(asked: Asked, layout: Layout, job: Job) -> Iterator[Proposal]:
    """Other schedules, and fewer chunks."""
    for name in job.stack.schedules if layout.pipeline_parallel > 1 else ():
        if name == "interleaved":
            several = [d for d in divisors(layout.chunks) if d > 1]
        else:
            several = [1 + (name in FOLDED)]
        for chunks in several:
            if (name, chunks) != (layout.schedule, layout.chunks):
                label = f"schedule {name}" + f" with {chunks} chunks" * (name == "interleaved")
                other = partial(asked.with_layout, schedule=name, chunks=chunks)
                yield Proposal(f"schedule {name}", label, other)


def _of_offload(asked: Asked, layout: Layout) -> Iterator[Proposal]:
    for items in ("optimizer", "optimizer,parameters"):
        if layout.offload in ("", "optimizer") and items != layout.offload:
            what = f"offload {items.replace(',', ' and ')} to the host"
            yield Proposal("offload states", what, partial(asked.with_layout, offload=items))
    for policy in dict.fromkeys((asked.recompute, "auto")) if "+" not in asked.recompute else ():
        moved = replace(asked, recompute=f"{policy}+activations", layers=None)
        yield Proposal("offload activations", "offload activations to the host", partial(replace, moved))


def _of_options(asked: Asked, job: Job) -> Iterator[Proposal]:
    """The framework's own kernels and buffers that keep less."""
    chosen = job.training.options
    for name, values in job.stack.options.items():
        for value in values if job.stack.concerned(name, job.model, job.recipe) else ():
            lean = value in LEAN or (name in LEAN_WHEN_ON and value == "on")
            if lean and chosen.get(name) not in (value, *LEAN):
                options = {**asked.training.options, name: value}
                # ``swiglu`` has a name of its own too, which must not contradict it.
                own = {"swiglu": None} if name == "swiglu" else {}
                other = partial(_trained, asked, options=options, **own)
                yield Proposal(f"option {name}", f"{name} {value}", other)


def _of_choices(asked: Asked, job: Job) -> Iterator[Proposal]:
    """Restrictions of the search that the user chose, each left out."""
    for name in RESTRICTIONS:
        if getattr(asked.choices, name) is not None:
            wider = replace(asked.choices, **dict[str, Any]({name: None}))
            yield Proposal(name, f"leave {name} to the search", partial(replace, asked, choices=wider))
    if job.training.options.get("gradient_view") == "off":
        views = {**asked.training.options, "gradient_view": "on"}
        what = "gradients as views of DDP's buckets"
        yield Proposal("option gradient_view", what, partial(_trained, asked, options=views))


def _of_offloading(asked: Asked, job: Job) -> Iterator[Proposal]:
    """What a search may offload: last, as it is then over many more layouts."""
    for items in (("optimizer",), ("optimizer", "parameters")) if not asked.choices.offload else ():
        if any(",".join(items) in one.whole for one in job.stack.offloading.values()):
            wider = replace(asked.choices, offload=items)
            what = f"offload {' and '.join(items)} to the host"
            yield Proposal("offload", what, partial(replace, asked, choices=wider))


def _of_training(asked: Asked, job: Job) -> Iterator[Proposal]:
    """What changes the numbers that are trained: types, optimizers, shorter sequences."""
    recipe, training = job.recipe, job.training
    fields: list[tuple[str, str, str]] = []
    if recipe.gradient >= 4 and recipe.weight == 2:
        fields.append(("gradient_dtype", "bf16", "keep gradients in bf16"))
    if "pure-bf16" in job.stack.recipes and training.precision == "bf16":
        fields.append(("precision", "pure-bf16", "keep weights and moments in bf16"))
    if recipe.moment == 4 and recipe.master:  # else moments are of the weights' dtype
        fields.append(("optimizer_dtype", "bf16", "keep optimizer moments in bf16"))
    for name in EIGHT_BITS if training.optimizer == "adamw" else ():
        if job.stack.name in (OPTIMIZERS[name].stacks or {}):
            fields.append(("optimizer", name, "keep optimizer moments in 8 bits"))
    for field, value, what in fields:
        yield Proposal(field, what, partial(_trained, asked, **{field: value}), of="training")
    length, batch = job.seq_length // 2, job.global_batch_size * 2
    while length >= SHORTEST:
        shorter = partial(_shortened, asked, length, batch)
        yield Proposal("sequence", f"shorten the sequence to {length}", shorter, of="training")
        length, batch = length // 2, batch * 2


def _trained(asked: Asked, **fields: Any) -> Asked:
    return replace(asked, training=asked.training.model_copy(update=fields))


def _shortened(asked: Asked, length: int, batch: int) -> Asked:
    """As many tokens in shorter sequences, the micro-batches as they are."""
    shorter = _trained(asked, seq_length=length, global_batch_size=batch)
    if asked.layout is None:
        return shorter
    accum = asked.layout.grad_accum * (batch // asked.layout.global_batch_size)
    return replace(shorter, layout=replace(asked.layout, grad_accum=accum))


def _of_framework(asked: Asked, job: Job) -> Iterator[Proposal]:
    """The same modules under another framework, which shares model states out as this one does not."""
    fields: dict[str, Any] = {"options": {}, **dict.fromkeys(("attention", "swiglu", "profile"))}
    for name, stack in STACKS.items():
        others = [one for one in stack.shardings if one not in job.stack.shardings]
        if stack.rows is not job.stack.rows or not others:
            continue
        other = _trained(asked, framework=name, **fields)
        if asked.layout is None:
            free = replace(asked.choices, sharding=None, recompute=None, schedule=None)
            what = f"share model states out ({', '.join(others)})"
            yield Proposal(f"framework {name}", what, partial(replace, other, choices=free))
        elif asked.layout.data_ranks > 1:
            for one in sorted(others, key=SHARDINGS.index):
                way = partial(other.with_layout, sharding=one)
                yield Proposal(f"framework {name}", f"share states out as {one}", way)


def _on(asked: Asked, count: int, kind: str, **fields: Any) -> Asked:
    """The same on other GPUs, with the budget, the switches and the host that were given."""
    cluster, gpu = asked.cluster, load_gpu(kind)
    own, per_node = gpu.name == cluster.gpu.name, cluster.gpus_per_node
    text = f"{count}x{gpu.name}"
    if own and per_node != min(gpu.gpus_per_node, cluster.num_gpus):
        if count % per_node:
            raise InputError(f"{count} GPUs are no whole nodes of {per_node}")
        text = f"{count // per_node}x{per_node}x{gpu.name}"
    kept = {name: value for name, value in dict(cluster).items() if name not in OF_GPUS}
    values = dict(ClusterSpec.parse(text)) | kept
    try:
        other = ClusterSpec(**values | ({"gpu": cluster.gpu} if own else {}))
    except ValidationError as error:
        raise InputError(f"{text}: {first_problem(error)}") from None
    changed = replace(asked, cluster=other)
    return changed.with_layout(**fields) if fields else changed


def _larger(asked: Asked) -> list[str]:
    """Kinds of GPU with more memory than those there are."""
    kinds = [load_gpu(name) for name in BIGGER]
    return [kind.name for kind in kinds if kind.usable_bytes > asked.cluster.gpu.usable_bytes]


def _whole_gpu(asked: Asked) -> Iterator[Proposal]:
    cluster = asked.cluster
    if cluster.budget_bytes or cluster.headroom:
        free = cluster.model_copy(update={"budget_bytes": None, "headroom": 0.0})
        yield Proposal("budget", "use the whole GPU", partial(replace, asked, cluster=free), "gpus")


def _same_layout_elsewhere(asked: Asked, layout: Layout) -> Iterator[Proposal]:
    """A given layout on more GPUs, as replicas, tensor parallelism or stages, or on larger ones."""
    yield from _whole_gpu(asked)
    data, tensor, pipeline = layout.data_parallel, layout.tensor_parallel, layout.pipeline_parallel
    gpus, kind = asked.cluster.num_gpus, asked.cluster.gpu.name
    for factor in FACTORS[:3]:
        count = gpus * factor
        more = partial(_on, asked, count, kind)
        if layout.sharding != "ddp":
            d = data * factor
            yield Proposal("more GPUs", f"{count} GPUs, {d} replicas", partial(more, data_parallel=d), "gpus")
        if (t := tensor * factor) <= asked.cluster.gpu.gpus_per_node:
            wider = partial(more, tensor_parallel=t, sequence_parallel=_sequence_parallel(layout))
            yield Proposal("more GPUs", f"{count} GPUs, tensor parallelism {t}", wider, "gpus")
        p = pipeline * factor
        yield Proposal("more GPUs", f"{count} GPUs, {p} stages", partial(more, pipeline_parallel=p), "gpus")
    for name in _larger(asked):
        yield Proposal("larger GPUs", f"{gpus} x {name}", partial(_on, asked, gpus, name), "gpus")


def _other_gpus(asked: Asked, job: Job) -> Iterator[Proposal]:
    """A search on more GPUs, or on larger ones, of each kind as few as do."""
    yield from _whole_gpu(asked)
    wide = replace(asked.choices, pipeline_parallel=None, data_parallel=None, context_parallel=None)
    free, own = replace(asked, choices=wide), asked.cluster.gpu.name
    for name in (own, *_larger(asked)):
        for factor in (1, *FACTORS):
            if factor <= job.global_batch_size and (factor > 1 or name != own):
                count = asked.cluster.num_gpus * factor
                yield Proposal(f"GPUs {name}", f"{count} x {name}", partial(_on, free, count, name), "gpus")
