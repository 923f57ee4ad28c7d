"""Can a layout that is given by hand be, and does its framework run it? Problems with their nearest fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.axes import context_problems, expert_problems, unsupported_axes
from planner.defaults import Job
from planner.errors import InputError
from planner.layers import Builder
from planner.layouts import NUMBERS, divisors, short_chunks
from planner.network import Network, group
from planner.offload_choices import offload_problems
from planner.optimizers import in_backward
from planner.stacks import STACKS
from planner.stacks.base import Stack
from strategies.layout import RANK_ORDERS, SHARDINGS, Layout
from strategies.pipeline_parallel import FOLDED, SCHEDULES, PipelineParallel
from strategies.sequence_parallel import SequenceParallel
from strategies.tensor_parallel import TensorParallel


def check_layout(job: Job, layout: Layout) -> None:
    """Raises InputError if a layout given by hand cannot be, with the first reason and a fix."""
    for problem in _layout_problems(job, layout):
        raise InputError(problem)


def _layout_problems(job: Job, layout: Layout) -> Iterator[str]:
    gpus, batch, depth = job.cluster.num_gpus, job.global_batch_size, job.model.num_hidden_layers
    for name in NUMBERS:
        value = getattr(layout, name)
        if not isinstance(value, int) or value < 1:
            yield f"{name}={value!r}: use a whole number, 1 or more"
    if layout.sharding not in SHARDINGS:
        yield f"sharding={layout.sharding!r}: use one of {', '.join(SHARDINGS)}"
    if layout.schedule not in SCHEDULES:
        yield f"schedule={layout.schedule!r}: use one of {', '.join(SCHEDULES)}"
    if layout.rank_order not in RANK_ORDERS:
        yield f"rank_order={layout.rank_order!r}: use one of {', '.join(RANK_ORDERS)}"
    tensor, pipeline, data = layout.tensor_parallel, layout.pipeline_parallel, layout.data_parallel
    others, context = tensor * pipeline * layout.context_parallel, layout.context_parallel
    named = f"tensor_parallel={tensor} x pipeline_parallel={pipeline}"
    named += f" x context_parallel={context}" if context > 1 else ""
    if gpus % others:
        yield (
            f"{named} does not divide the {gpus} GPUs: "
            f"their product must be one of {', '.join(map(str, divisors(gpus)[:12]))}"
        )
    if layout.world_size != gpus:
        yield (
            f"data_parallel={data} x {named} is "
            f"{layout.world_size}, not the {gpus} GPUs: use data_parallel {gpus // others}"
        )
    once = data * layout.micro_batch_size
    if batch % once:
        yield (
            f"data_parallel={data} x micro_batch_size={layout.micro_batch_size} does not divide "
            f"global_batch_size={batch}: use a multiple of {once}"
        )
    elif layout.global_batch_size != batch:
        yield (
            f"data_parallel={data} x micro_batch_size={layout.micro_batch_size} x grad_accum="
            f"{layout.grad_accum} is not global_batch_size={batch}: use grad_accum {batch // once}"
        )
    if layout.grad_accum * data > 1 and in_backward(job.training.optimizer, job.training.options):
        yield (
            f"grad_accum={layout.grad_accum}, data_parallel={data}: an optimizer step within the backward "
            f"takes one micro-batch of one replica: use 1 GPU and micro_batch_size {batch}, or "
            "optimizer_step=fused"
        )
    if layout.sharding == "fsdp" and data % layout.data_shards:
        fits = ", ".join(map(str, divisors(data)))
        yield f"data_shards={layout.data_shards} does not divide data_parallel={data}: use one of {fits}"
    if layout.sharding != "fsdp" and not (layout.reshard_after_forward and layout.data_shards == data):
        yield f"data_shards and reshard_after_forward belong to fsdp, not to {layout.sharding}"
    layers = Builder(job.model, job.training, job.stack, job.recipe).layers()
    yield from TensorParallel(tensor, repeats_heads=job.stack.repeats_heads).objections(layers)
    if layout.sequence_parallel:
        yield from SequenceParallel(tensor).objections(layers)
    yield from offload_problems(job, layout)
    yield from context_problems(job, layout, layers)
    yield from expert_problems(job, layout, layers)
    yield from PipelineParallel(
        pipeline, microbatches=layout.grad_accum, chunks=layout.chunks, schedule=layout.schedule
    ).objections(layers)
    if layout.chunks > 1 and layout.schedule not in ("interleaved", *FOLDED):
        yield f"chunks={layout.chunks} need the interleaved schedule, not {layout.schedule}"
    if short_chunks(depth, layout.chunks) > 2:
        yield f"{depth} layers do not fill {layout.chunks} equal chunks, even two layers short"


def check_supported(job: Job, layout: Layout) -> None:
    """Raises InputError if the job's framework is not known to run a layout, with what does."""
    if lacking := unsupported(job.stack, layout):
        able = [(label, stack) for label, stack in _variants(job) if not unsupported(stack, layout)]
        # The same framework with another option, or the same modules, come nearest.
        able.sort(key=lambda one: (one[1].name != job.stack.name, one[1].rows is not job.stack.rows))
        raise InputError("; ".join(lacking) + (f", or {able[0][0]}" if able else ""))


def unsupported(stack: Stack, layout: Layout) -> list[str]:
    """What of a layout a framework is not known to run, and the nearest that it runs.

    On one GPU per replica nothing is shared out: DDP is then every framework's.
    """
    notes: list[str] = []
    shardings, sharding = stack.shardings, layout.sharding
    alone = sharding == "ddp" and layout.data_ranks == 1 and stack.replicates
    if sharding not in shardings and not alone:
        notes.append(f"{stack.name} does not run {sharding}: use {', '.join(shardings)}")
    elif layout.pipeline_parallel > 1 and not shardings.get(sharding, any(shardings.values())):
        able = "".join(f", {name}" for name, pipelined in shardings.items() if pipelined)
        notes.append(f"{stack.name} runs {sharding} without a pipeline only: use pipeline_parallel 1{able}")
    if layout.tensor_parallel > 1 and not stack.tensor_parallel:
        notes.append(f"{stack.name} is planned without tensor parallelism: use tensor_parallel 1")
    return [*notes, *unsupported_axes(stack, layout)]


def _variants(job: Job) -> Iterator[tuple[str, Stack]]:
    """The frameworks that the model can be planned in, and how they are asked for."""
    for name, stack in STACKS.items():
        recipe = job.recipe if name == job.stack.name else stack.recipes.get(str(job.training.precision))
        if recipe is None or (stack.families and job.model.model_type not in stack.families):
            continue
        told = [f"{o}={v}" for o, v in job.training.options.items() if f"{o}:{v}" in stack.variants]
        own = name == job.stack.name and told
        named = {f"leave out option {' and '.join(told)}" if own else f"framework {name}": stack}
        for variant in stack.variants:
            option, _, value = variant.partition(":")
            named[f"framework {name} with option {option}={value}"] = stack.under({option: value})
        for label, one in named.items():
            yield label, replace(one, shardings=one.takes(one.shardings, recipe))


def beyond_node(job: Job, layout: Layout) -> str:
    """A note where a tensor-parallel group leaves its node, which the search does not let it; else empty."""
    if Network.of(job.cluster).place(*group("tensor", layout)).crossed[1]:
        size, domain = layout.tensor_parallel, job.cluster.domain
        return f"a tensor-parallel group of {size} leaves its node of {domain} GPUs"
    return ""
