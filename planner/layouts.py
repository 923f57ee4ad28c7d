"""Every layout of the GPUs, as families of arrays, and why the others are refused.

A family shares its sharding and its schedule and holds one array per degree: it is a
:class:`~strategies.layout.Layout` whose numbers are arrays. A refusal covers everything below the
point where it was found (a tensor-parallel degree that cannot be is refused once).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from planner.axes import (
    context_degrees,
    context_problems,
    expert_problems,
    out_of_order,
    unsupported_axes,
)
from planner.defaults import Job
from planner.errors import InputError
from planner.layers import Builder
from planner.network import Network, group
from planner.offload_choices import offload_problems
from planner.stacks import STACKS
from planner.stacks.base import Stack
from strategies.base import Layer
from strategies.context_parallel import COMMS
from strategies.layout import RANK_ORDERS, SHARDINGS, Layout
from strategies.pipeline_parallel import FOLDED, SCHEDULES, PipelineParallel
from strategies.sequence_parallel import SequenceParallel
from strategies.tensor_parallel import TensorParallel

MAX_MICRO_BATCH = 64
NUMBERS = (
    "data_parallel",
    "tensor_parallel",
    "pipeline_parallel",
    "chunks",
    "micro_batch_size",
    "grad_accum",
    "data_shards",
    "context_parallel",
    "expert_parallel",
    "expert_tensor_parallel",
)
CHOSEN_DEGREES = (
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "context_parallel",
    "expert_parallel",
    "expert_tensor_parallel",
    "micro_batch_size",
    "chunks",
)
"""Degrees that a search can be held to."""
OFTEN_ONE = NUMBERS[-3:]
"""Degrees that stay plain numbers where they are 1 in a whole family: nothing is then computed for them."""


@dataclass(frozen=True)
class Choices:
    """What the search may choose from. None means everything the stack and cluster offer."""

    tensor_parallel: tuple[int, ...] | None = None
    pipeline_parallel: tuple[int, ...] | None = None
    data_parallel: tuple[int, ...] | None = None
    micro_batch_size: tuple[int, ...] | None = None
    chunks: tuple[int, ...] | None = None
    context_parallel: tuple[int, ...] | None = None
    context_comm: tuple[str, ...] | None = None  # the framework's default way, where None
    expert_parallel: tuple[int, ...] | None = None
    expert_tensor_parallel: tuple[int, ...] | None = None
    sharding: tuple[str, ...] | None = None
    schedule: tuple[str, ...] | None = None
    recompute: tuple[str, ...] | None = None
    rank_order: tuple[str, ...] | None = None
    offload: tuple[str, ...] = ()  # what may be offloaded, as in ("optimizer", "parameters:nvme")
    sequence_parallel: bool = True
    across_nodes: bool = False  # may a tensor-parallel group leave its node?

    def policies(self, job: Job) -> tuple[str, ...]:
        """The recompute policies to choose from, from the one that keeps most."""
        wanted = self.recompute or job.stack.policies
        return tuple(policy for policy in job.stack.policies if policy in wanted)


@dataclass
class Space:
    """The layouts to price, by family, and the refused ones by reason."""

    families: list[Layout] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def size(self) -> int:
        """Layouts that were not refused."""
        return sum(len(family.data_parallel) for family in self.families)


def divisors(number: int) -> list[int]:
    """All divisors, in order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _allowed(value: Any, allowed: tuple[Any, ...] | None) -> bool:
    return allowed is None or value in allowed


def short_chunks(layers: int, chunks: int) -> int:
    """Layers that the first and last chunk lack, so that all others are equal: 0, 1 or 2.

    Megatron's ``--account-for-embedding-in-pipeline-split`` and its twin for the loss; Llama 3
    405B's 126 layers in 16 x 8 chunks (Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2).
    """
    return -layers % chunks


def _tensor_degrees(job: Job, choices: Choices, layers: list[Layer], space: Space) -> Iterator[int]:
    domain, gpus = job.cluster.domain, job.cluster.num_gpus
    for tensor in divisors(gpus):
        if not _allowed(tensor, choices.tensor_parallel):
            continue
        if tensor > 1 and not job.stack.tensor_parallel:
            space.refused[f"{job.stack.name} is planned without tensor parallelism"] += 1
            continue
        if not choices.across_nodes and (tensor > domain or (gpus > domain and domain % tensor)):
            space.refused[f"a tensor-parallel group would leave its node of {domain} GPUs"] += 1
            continue
        reasons = list(TensorParallel(tensor).objections(layers))
        if tensor > 1 and choices.sequence_parallel:
            reasons += SequenceParallel(tensor).objections(layers)
        if reasons:
            space.refused[reasons[0]] += 1
            continue
        yield tensor


def _context_degrees(
    job: Job, choices: Choices, tensor: int, layers: list[Layer], space: Space
) -> list[tuple[int, str]]:
    """Context-parallel degrees beside a tensor-parallel one, with the ways of exchange to try."""
    asked = choices.context_parallel is not None
    if not (asked or job.stack.context_comms):
        return [(1, COMMS[0])]
    degrees = [d for d in divisors(job.cluster.num_gpus // tensor) if _allowed(d, choices.context_parallel)]
    comms = choices.context_comm or tuple(job.stack.context_comms)[:1]
    found = []
    for degree, comm, problem in context_degrees(job, layers, tensor, degrees, comms, asked):
        if problem:
            space.refused[problem] += 1
        else:
            found.append((degree, comm))
    return found


def _expert_degrees(
    job: Job, choices: Choices, layout: Layout, layers: list[Layer], space: Space
) -> Iterator[tuple[int, int]]:
    """Expert-parallel degrees, and tensor-parallel ones of experts, that a layout can have."""
    stack, experts = job.stack, job.model.experts
    asked = choices.expert_parallel or choices.expert_tensor_parallel
    if experts is None and not asked:
        yield 1, 1
        return
    several = divisors(experts.num_experts) if experts and stack.expert_parallel else [1]
    wide = dict.fromkeys((1, layout.tensor_parallel)) if experts and stack.expert_tensor_parallel else (1,)
    found = False
    for tensor in choices.expert_tensor_parallel or wide:
        for degree in choices.expert_parallel or several:
            one = replace(layout, expert_parallel=degree, expert_tensor_parallel=tensor)
            problems = [*unsupported_axes(stack, one), *expert_problems(job, one, layers)]
            if not problems:
                found = True
                yield degree, tensor
    if not found:
        space.refused[problems[0]] += 1


def _shardings(
    job: Job, choices: Choices, ranks: int, data: int, pipeline: int, space: Space
) -> Iterator[tuple[str, int, bool]]:
    """Sharding, shards and reshard_after_forward of replicas that have so many data and context ranks."""
    for name, with_pipeline in job.stack.shardings.items():
        if not _allowed(name, choices.sharding):
            continue
        if pipeline > 1 and not with_pipeline:
            space.refused[f"{job.stack.name} runs {name} without a pipeline only"] += 1
        elif (
            ranks == 1
            and name != next(iter(job.stack.shardings))
            and choices.sharding is None
            and not (choices.offload and name in job.stack.offloading)
        ):
            continue  # one replica shares nothing out: the same layout under another name
        elif name == "fsdp":
            for shards in divisors(data)[1:] or [1]:
                if pipeline == 1:  # within a pipeline PyTorch keeps units gathered in any case
                    yield name, shards, True
                yield name, shards, False
        else:
            yield name, data, True


def _schedules(job: Job, choices: Choices, pipeline: int, layers: int) -> Iterator[tuple[str, int]]:
    names = dict.fromkeys(choices.schedule or job.stack.schedules)
    if pipeline == 1:  # without a pipeline every schedule but plain accumulation is out of place
        if "1f1b" in (choices.schedule or ("1f1b",)) and _allowed(1, choices.chunks):
            yield "1f1b", 1
        return
    for name in names:
        if name != "interleaved":
            chunks = 2 if name in FOLDED else 1
            enough = name != "zb-v" or layers + short_chunks(layers, chunks) >= pipeline * chunks
            if _allowed(chunks, choices.chunks) and enough:
                yield name, chunks
            continue
        for chunks in range(2, (layers + 2) // pipeline + 1):
            short = short_chunks(layers, chunks)
            if _allowed(chunks, choices.chunks) and short <= 2 and layers + short >= pipeline * chunks:
                yield name, chunks


def _schedule_refusal(job: Job, choices: Choices, schedule: str, pipeline: int, accum: int) -> str:
    """Why a schedule cannot run so many micro-batches on so many stages; empty if it can."""
    if schedule == "interleaved" and accum % pipeline:
        return "interleaved schedule: grad_accum is no multiple of the stages"
    if accum < PipelineParallel(pipeline, schedule=schedule).least_microbatches:
        return f"{schedule} schedule: too few micro-batches to fill the stages"
    if schedule == "dualpipe" and (pipeline % 2 or accum % 2 or job.model.num_hidden_layers % 2):
        return "dualpipe schedule: stages, micro-batches or layers are odd"
    if not job.stack.policies_with(schedule, choices.policies(job)):
        return f"{schedule} schedule: {job.stack.name} runs it with recompute none only"
    return ""


def enumerate_layouts(job: Job, choices: Choices = Choices()) -> Space:
    """All layouts of the cluster's GPUs that the stack can run and the batch divides over."""
    space = Space()
    layers = Builder(job.model, job.training, job.stack, job.recipe).layers()
    depth, batch = job.model.num_hidden_layers, job.global_batch_size
    gpus = job.cluster.num_gpus
    rows: dict[tuple[str, bool, bool, str, str, int], list[tuple[int, ...]]] = defaultdict(list)
    unlike = len(job.model.block_kinds) > 1  # then each number of chunks makes rows of its own
    for tensor in _tensor_degrees(job, choices, layers, space):
        sequence_parallel = tensor > 1 and choices.sequence_parallel
        contexts = _context_degrees(job, choices, tensor, layers, space)
        for pipeline in divisors(gpus // tensor):
            if not _allowed(pipeline, choices.pipeline_parallel):
                continue
            left = gpus // tensor // pipeline
            places = [
                (left // context, context, comm)
                for context, comm in contexts
                if left % context == 0 and _allowed(left // context, choices.data_parallel)
            ]
            if places and any(PipelineParallel(pipeline).objections(layers)):
                space.refused[f"pipeline_parallel is more than the {depth} layers"] += 1
                continue
            schedules = list(_schedules(job, choices, pipeline, depth))
            for data, context, comm in places:
                if batch % data:
                    space.refused[f"data_parallel does not divide global_batch_size={batch}"] += 1
                    continue
                one = Layout(
                    data_parallel=data,
                    tensor_parallel=tensor,
                    pipeline_parallel=pipeline,
                    context_parallel=context,
                    sequence_parallel=sequence_parallel,
                )
                shardings = [
                    (*found, *experts)
                    for found in _shardings(job, choices, data * context, data, pipeline, space)
                    for experts in _expert_degrees(
                        job, choices, replace(one, sharding=found[0], data_shards=found[1]), layers, space
                    )
                ]
                sizes = _micro_batches(batch // data, choices)
                if not sizes:
                    asked = ", ".join(map(str, choices.micro_batch_size or ()))
                    reason = f"micro_batch_size={asked} does not divide the {batch // data} sequences"
                    space.refused[f"{reason} of a replica"] += 1
                for micro in sizes:
                    accum = batch // data // micro
                    for schedule, chunks in schedules:
                        if refusal := _schedule_refusal(job, choices, schedule, pipeline, accum):
                            space.refused[refusal] += 1
                            continue
                        for sharding, shards, reshard, *experts in shardings:
                            row = (data, tensor, pipeline, chunks, micro, accum, shards, context, *experts)
                            alike = (sharding, reshard, sequence_parallel, schedule, comm, unlike * chunks)
                            rows[alike].append(row)
    for (sharding, reshard, sequence_parallel, schedule, comm, _), numbers in rows.items():
        columns: dict[str, Any] = dict(zip(NUMBERS, np.array(numbers, dtype=np.int64).T, strict=True))
        columns |= {name: 1 for name in OFTEN_ONE if (columns[name] == 1).all()}
        family = Layout(
            **columns,
            context_comm=comm,
            sequence_parallel=sequence_parallel,
            sharding=sharding,
            reshard_after_forward=reshard,
            schedule=schedule,
        )
        space.families += _in_orders(job, choices, family, space)
    return space


def _in_orders(job: Job, choices: Choices, family: Layout, space: Space) -> Iterator[Layout]:
    """A family under every rank order, without those layouts whose groups all lie as under an earlier one."""
    network = Network.of(job.cluster)
    ordered: list[Layout] = []
    kept: list[Any] = []
    for order in dict.fromkeys(choices.rank_order or job.stack.rank_orders):
        one = replace(family, rank_order=order)
        new = np.ones(len(family.data_parallel), dtype=bool)
        for other in ordered:
            new &= ~network.same(one, other)
        if not choices.across_nodes:
            leaving = network.place(*group("tensor", one)).crossed[1]
            if left := int(np.count_nonzero(new & leaving)):
                reason = f"rank order {order}: a tensor-parallel group would leave its node"
                space.refused[f"{reason} of {job.cluster.domain} GPUs"] += left
            new &= ~leaving
        if job.model.experts:
            fits = np.array([not out_of_order(job, _taken(one, index)) for index in range(len(new))])
            if left := int(np.count_nonzero(new & ~fits)):
                space.refused[f"rank order {order}: experts would need other replicas than the rest"] += left
            new &= fits
        ordered.append(one)
        kept.append(np.nonzero(new)[0])
    if rows := sum(map(len, kept)):
        chosen = np.concatenate(kept)
        plain = [name for name in OFTEN_ONE if isinstance(getattr(family, name), int)]
        numbers = {name: getattr(family, name)[chosen] for name in NUMBERS if name not in plain}
        orders = np.repeat([one.rank_order for one in ordered], list(map(len, kept)))
        yield replace(family, **numbers, rank_order=orders if len(kept[0]) < rows else str(orders[0]))


def _taken(family: Layout, index: int) -> Layout:
    """One layout of a family, its degrees at least."""
    values: dict[str, Any] = {name: getattr(family, name) for name in NUMBERS}
    single: dict[str, Any] = {k: v if isinstance(v, int) else int(v[index]) for k, v in values.items()}
    return replace(family, **single)


def _micro_batches(per_replica: int, choices: Choices) -> list[int]:
    sizes = [d for d in divisors(per_replica) if d <= MAX_MICRO_BATCH]
    if choices.micro_batch_size is None:
        return sizes
    return [size for size in dict.fromkeys(choices.micro_batch_size) if per_replica % size == 0]


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
    if layout.sharding == "fsdp" and data % layout.data_shards:
        fits = ", ".join(map(str, divisors(data)))
        yield f"data_shards={layout.data_shards} does not divide data_parallel={data}: use one of {fits}"
    if layout.sharding != "fsdp" and not (layout.reshard_after_forward and layout.data_shards == data):
        yield f"data_shards and reshard_after_forward belong to fsdp, not to {layout.sharding}"
    layers = Builder(job.model, job.training, job.stack, job.recipe).layers()
    yield from TensorParallel(tensor).objections(layers)
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
    alone = sharding == "ddp" and layout.data_ranks == 1
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
        named = {f"framework {name}": stack}
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
