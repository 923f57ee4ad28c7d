"""Every layout of the GPUs, as families of arrays, and why the others are refused.

A family shares its sharding and its schedule and holds one array per degree: it is a
:class:`~strategies.layout.Layout` whose numbers are arrays. A refusal covers everything below the
point where it was found (a tensor-parallel degree that cannot be is refused once).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from planner.axes import (
    Context,
    context_degrees,
    expert_problems,
    out_of_order,
    unsupported_axes,
)
from planner.defaults import Job
from planner.hybrids import uneven_chunks
from planner.layers import Builder
from planner.network import Network, group
from planner.optimizers import in_backward
from strategies.base import Layer
from strategies.context_parallel import COMMS
from strategies.layout import Layout
from strategies.pipeline_parallel import FOLDED, PipelineParallel
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
    "ulysses_degree",
    "expert_parallel",
    "expert_tensor_parallel",
)
CHOSEN_DEGREES = (
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "context_parallel",
    "ulysses_degree",
    "expert_parallel",
    "expert_tensor_parallel",
    "micro_batch_size",
    "chunks",
)
"""Degrees that a search can be held to."""
OFTEN_ONE = NUMBERS[-4:]
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
    ulysses_degree: tuple[int, ...] | None = None  # of ulysses+ring
    expert_parallel: tuple[int, ...] | None = None
    expert_tensor_parallel: tuple[int, ...] | None = None
    sharding: tuple[str, ...] | None = None
    schedule: tuple[str, ...] | None = None
    recompute: tuple[str, ...] | None = None
    rank_order: tuple[str, ...] | None = None
    offload: tuple[str, ...] = ()  # what may be offloaded, as in ("optimizer", "parameters:nvme")
    sequence_parallel: bool = True
    across_nodes: bool = False  # may a tensor-parallel group leave its node?
    launchable: bool = False  # only splits that the framework can be told as they are

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
        reasons = list(TensorParallel(tensor, repeats_heads=job.stack.repeats_heads).objections(layers))
        if tensor > 1 and choices.sequence_parallel:
            reasons += SequenceParallel(tensor).objections(layers)
        if reasons:
            space.refused[reasons[0]] += 1
            continue
        yield tensor


def _context_degrees(
    job: Job, choices: Choices, tensor: int, layers: list[Layer], space: Space
) -> list[Context]:
    """Context-parallel degrees beside a tensor-parallel one, with the ways of exchange to try."""
    asked = choices.context_parallel is not None
    if not (asked or job.stack.context_comms):
        return [(1, COMMS[0], 1)]
    degrees = [d for d in divisors(job.cluster.num_gpus // tensor) if _allowed(d, choices.context_parallel)]
    comms = choices.context_comm or tuple(job.stack.context_comms)[:1]
    ways = {comm: choices.ulysses_degree or () if comm == "ulysses+ring" else (1,) for comm in comms}
    found = []
    for context, problem in context_degrees(job, layers, tensor, degrees, ways, asked):
        if problem:
            space.refused[problem] += 1
        else:
            found.append(context)
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


def _shardings(job: Job, choices: Choices, place: Layout, space: Space) -> Iterator[tuple[str, int, bool]]:
    """Sharding, shards and reshard_after_forward that such data, context and pipeline degrees can have."""
    data, pipeline = place.data_parallel, place.pipeline_parallel
    for name, with_pipeline in job.stack.shardings.items():
        if not _allowed(name, choices.sharding):
            continue
        if pipeline > 1 and not with_pipeline:
            space.refused[f"{job.stack.name} runs {name} without a pipeline only"] += 1
        elif (
            place.data_ranks == 1
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
    if reason := uneven_chunks(job.model, schedule):
        return reason
    if schedule == "interleaved" and accum % pipeline:
        return "interleaved schedule: grad_accum is no multiple of the stages"
    if accum < PipelineParallel(pipeline, schedule=schedule).least_microbatches:
        return f"{schedule} schedule: too few micro-batches to fill the stages"
    if schedule == "dualpipe" and (pipeline % 2 or accum % 2 or job.model.num_hidden_layers % 2):
        return "dualpipe schedule: stages, micro-batches or layers are odd"
    if not job.stack.policies_with(schedule, choices.policies(job)):
        return f"{schedule} schedule: {job.stack.name} runs it with recompute none only"
    return ""


def _places(job: Job, choices: Choices, layers: list[Layer], space: Space) -> Iterator[Layout]:
    """Tensor, pipeline, context and data degrees that multiply to the GPUs and divide the batch."""
    depth, batch, gpus = job.model.num_hidden_layers, job.global_batch_size, job.cluster.num_gpus
    for tensor in _tensor_degrees(job, choices, layers, space):
        contexts = _context_degrees(job, choices, tensor, layers, space)
        for pipeline in divisors(gpus // tensor):
            left = gpus // tensor // pipeline
            several = [
                (left // context[0], context)
                for context in contexts
                if left % context[0] == 0 and _allowed(left // context[0], choices.data_parallel)
            ]
            if not (several and _allowed(pipeline, choices.pipeline_parallel)):
                continue
            if any(PipelineParallel(pipeline).objections(layers)):
                space.refused[f"pipeline_parallel is more than the {depth} layers"] += 1
                continue
            for data, (context, comm, ulysses) in several:
                if batch % data:
                    space.refused[f"data_parallel does not divide global_batch_size={batch}"] += 1
                    continue
                yield Layout(
                    data_parallel=data,
                    tensor_parallel=tensor,
                    pipeline_parallel=pipeline,
                    sequence_parallel=tensor > 1 and choices.sequence_parallel,
                    context_parallel=context,
                    context_comm=comm,
                    ulysses_degree=ulysses,
                )


def enumerate_layouts(job: Job, choices: Choices = Choices()) -> Space:
    """All layouts of the cluster's GPUs that the stack can run and the batch divides over."""
    space = Space()
    layers = Builder(job.model, job.training, job.stack, job.recipe).layers()
    depth = job.model.num_hidden_layers
    rows: dict[tuple[str, bool, bool, str, str, int], list[tuple[int, ...]]] = defaultdict(list)
    unlike = len(set(job.blocks)) > 1  # then each number of chunks makes rows of its own
    within = in_backward(job.training.optimizer, job.training.options)
    for place in _places(job, choices, layers, space):
        data, tensor, pipeline = place.data_parallel, place.tensor_parallel, place.pipeline_parallel
        context, ulysses = place.context_parallel, place.ulysses_degree
        shardings = [
            (*found, *experts)
            for found in _shardings(job, choices, place, space)
            for experts in _expert_degrees(
                job, choices, replace(place, sharding=found[0], data_shards=found[1]), layers, space
            )
        ]
        per_replica = job.global_batch_size // data
        sizes = _micro_batches(per_replica, choices)
        if not sizes:
            asked = ", ".join(map(str, choices.micro_batch_size or ()))
            reason = f"micro_batch_size={asked} does not divide the {per_replica} sequences of a replica"
            space.refused[reason] += 1
        schedules = list(_schedules(job, choices, pipeline, depth))
        for micro, (schedule, chunks) in product(sizes, schedules):
            accum = per_replica // micro
            if within and (accum > 1 or data * context > 1):
                space.refused["optimizer step within the backward: several micro-batches or replicas"] += 1
                continue
            if refusal := _schedule_refusal(job, choices, schedule, pipeline, accum):
                space.refused[refusal] += 1
                continue
            for sharding, shards, reshard, *experts in shardings:
                alike = sharding, reshard, place.sequence_parallel, schedule, place.context_comm
                row = data, tensor, pipeline, chunks, micro, accum, shards, context, ulysses, *experts
                rows[*alike, unlike * chunks].append(row)
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
            fits = np.broadcast_to(np.logical_not(out_of_order(job, one)), new.shape)
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


def _micro_batches(per_replica: int, choices: Choices) -> list[int]:
    sizes = [d for d in divisors(per_replica) if d <= MAX_MICRO_BATCH]
    if choices.micro_batch_size is None:
        return sizes
    return [size for size in dict.fromkeys(choices.micro_batch_size) if per_replica % size == 0]
