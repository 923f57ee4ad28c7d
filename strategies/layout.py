"""Layout: the degrees that a search is over, and the one list of strategies they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

from strategies.base import AbstractStrategy, Collective, Layer, Quantity, Role, size_seen_by
from strategies.context_parallel import COMMS, ContextParallel, head_ranks
from strategies.ddp import DataParallel
from strategies.expert_parallel import ExpertParallel
from strategies.fsdp import FullyShardedDataParallel
from strategies.offload import NO_STAGING, Offload, Staging, Way, places_of
from strategies.pipeline_parallel import PipelineParallel
from strategies.recompute import Recompute
from strategies.sequence_parallel import SequenceParallel
from strategies.tensor_parallel import TensorParallel
from strategies.zero1 import Zero1
from strategies.zero2 import Zero2
from strategies.zero3 import Zero3

ENGINE_ALL_REDUCE = 5e8
"""Elements that DeepSpeed's engine reduces at a time without ZeRO (``MEMORY_OPT_ALLREDUCE_SIZE``)."""
RANK_ORDERS = ("tp-dp-pp", "tp-pp-dp", "dp-tp-pp", "dp-pp-tp", "pp-tp-dp", "pp-dp-tp")
"""Which groups neighbouring ranks form, innermost first. Context parallelism is right outside ``tp``,
wherever that is: Megatron's tp-cp-ep-dp-pp and tp-cp-ep-pp-dp are the first two."""
SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
"""What the data-parallel group does with model states. HSDP is ``fsdp`` with fewer shards."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What a framework sends for data parallelism: bytes per element, and its buckets."""

    gather_bytes: float = 2.0  # per parameter all-gathered
    reduce_bytes: float = 2.0  # per gradient reduce-scattered, by ZeRO-3 and FSDP
    bucket_bytes: float = 0.0  # that DeepSpeed's engine collects gradients in; 0 where there is none
    lasting: float = 0.0  # the fp32 part of the gradients' bytes where both precisions are kept
    bucket_elements: float = 5e8  # of ZeRO-3's gradient bucket
    sub_group: float = 0.0  # parameters that ZeRO-3 updates at a time; 0 for all
    live_elements: float = 1e9  # parameters that ZeRO-3 keeps gathered at most
    prefetch_elements: float = 5e7  # parameters that ZeRO-3 gathers ahead
    overlaps_regions: bool = False  # an input's gradient is reduced behind the product of the weight's
    repeats_heads: bool = False  # tensor parallelism beyond the key and value heads
    bucket_fraction: float = 0.0  # of DDP's buckets, in copies of the gradients
    bucket_view: bool = False  # DDP's gradients are views of its buckets
    copies: bool = True  # FSDP's messages have buffers of their own (FSDP2), rather than being its tensors
    separate_root: bool = False  # embedding and head are FSDP units of their own
    keeps_last: bool = False  # FSDP does not reshard the last block after its forward
    rotated_bytes: float = (
        0.0  # of an element of the gradients that PyTorch's context parallelism sends round
    )
    takes_gradients: bool = False  # gradients leave the GPU with the optimizer states
    staging: Staging = NO_STAGING  # what an offload's traffic takes on the GPU


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything runs. Numbers and the rank order may be numpy arrays: a family of layouts at once.

    ``data_shards`` is the group that FSDP shards over: 0, the default, stands for all of
    ``data_parallel``, fewer make it hybrid (HSDP). What shares out model states does so over the
    ``context_parallel`` GPUs of each of these replicas as well;
    ``context_comm`` is how keys and values are exchanged where there are several, ``ulysses_degree`` under
    ``ulysses+ring`` the neighbours that hand out heads to each other; ``expert_parallel`` and
    ``expert_tensor_parallel`` are carved out of the tensor, context and data degrees;
    ``chunks`` is Megatron's virtual pipeline size; ``grad_accum`` the micro-batches per step;
    ``rank_order`` lists the axes from that of neighbouring ranks outwards. ``offload`` is what of the whole
    model lies outside the GPUs, as in ``optimizer:nvme,parameters``; single layers may offload more.
    """

    data_parallel: Quantity = 1
    tensor_parallel: Quantity = 1
    pipeline_parallel: Quantity = 1
    chunks: Quantity = 1
    micro_batch_size: Quantity = 1
    grad_accum: Quantity = 1
    data_shards: Quantity = 0
    sequence_parallel: bool = False
    sharding: str = "ddp"
    reshard_after_forward: bool = True
    schedule: str = "1f1b"
    rank_order: Any = RANK_ORDERS[0]
    context_parallel: Quantity = 1
    context_comm: str = COMMS[0]
    ulysses_degree: Quantity = 1
    expert_parallel: Quantity = 1
    expert_tensor_parallel: Quantity = 1
    offload: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.data_shards, int) and not self.data_shards:
            object.__setattr__(self, "data_shards", self.data_parallel)

    @property
    def world_size(self) -> Quantity:
        """GPUs in all."""
        return self.data_parallel * self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def data_ranks(self) -> Quantity:
        """GPUs that reduce gradients with each other: of all replicas, and of all parts of a sequence."""
        return self.data_parallel * self.context_parallel

    @property
    def expert_shards(self) -> Quantity:
        """GPUs of the ``data_shards`` that hold the same part of the same routed experts."""
        carved = self.expert_parallel * self.expert_tensor_parallel
        return self.data_shards * self.context_parallel * self.tensor_parallel // carved

    @property
    def head_ranks(self) -> Quantity:
        """GPUs of a sequence that hand out heads to each other."""
        return head_ranks(self.context_comm, self.context_parallel, self.ulysses_degree)

    @property
    def hands_out_heads(self) -> Quantity:
        """Does context parallelism give attention a longer part of the sequence, of some heads? 0 or 1."""
        return (self.head_ranks > 1) * 1

    @property
    def attention_cut(self) -> Quantity:
        """In how many parts attention's kernels have the sequence: the GPUs that keys and values go round."""
        return self.context_parallel // self.head_ranks

    @property
    def global_batch_size(self) -> Quantity:
        """Sequences per step."""
        return self.data_parallel * self.micro_batch_size * self.grad_accum

    def stride(self, axis: str) -> Quantity:
        """How far the ranks of a group of an axis, ``tp``, ``cp``, ``dp`` or ``pp``, lie apart.

        >>> Layout(data_parallel=4, tensor_parallel=8, pipeline_parallel=2, context_parallel=2).stride("pp")
        64
        """
        if axis == "cp":
            return self.stride("tp") * self.tensor_parallel
        degrees = {
            "tp": self.tensor_parallel * self.context_parallel,
            "dp": self.data_parallel,
            "pp": self.pipeline_parallel,
        }
        inside = {order: order.split("-")[: order.split("-").index(axis)] for order in RANK_ORDERS}
        return sum(
            (self.rank_order == order) * prod(degrees[inner] for inner in inside[order])
            for order in RANK_ORDERS
        )

    def plain(self) -> Layout:
        """The same single layout with Python's own numbers in place of array elements."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        plain: dict[str, Any] = {
            k: str(v) if isinstance(v, str) else v if isinstance(v, bool) else int(v)
            for k, v in values.items()
        }
        return Layout(**plain)

    def describe(self) -> str:
        """The layout in one line, as in ``TP8 PP2 DP4 zero1 mb1``."""
        parts = [f"TP{self.tensor_parallel}", f"PP{self.pipeline_parallel}", f"DP{self.data_parallel}"]
        if self.context_parallel > 1:
            comm = f" {self.context_label}" * (self.context_comm != COMMS[0])
            parts.append(f"CP{self.context_parallel}{comm}")
        if self.expert_parallel > 1:
            parts.append(f"EP{self.expert_parallel}")
        if self.expert_tensor_parallel > 1:
            parts.append(f"ETP{self.expert_tensor_parallel}")
        if self.chunks > 1:
            parts.append(f"v{self.chunks}")
        parts.append(self.sharding_label)
        order = [self.rank_order] if self.rank_order != RANK_ORDERS[0] else []
        moved = [f"offload {self.offload}"] if self.offload else []
        return " ".join([*parts, f"mb{self.micro_batch_size}", *order, *moved])

    @property
    def context_label(self) -> str:
        """``ring``, ``all-gather``, ``ulysses``, or with the degrees of its two levels ``ulysses8+ring2``."""
        two = self.context_comm == "ulysses+ring"
        return f"ulysses{self.head_ranks}+ring{self.attention_cut}" if two else self.context_comm

    @property
    def sharding_label(self) -> str:
        """``ddp``, ``zero1`` ... ``fsdp``, ``hsdp8``, with ``+keep`` where units stay gathered."""
        name = self.sharding
        if name == "fsdp" and self.data_shards != self.data_parallel:
            name = f"hsdp{self.data_shards}"
        return name if self.reshard_after_forward else f"{name}+keep"


def data_strategy(layout: Layout, wire: Wire) -> AbstractStrategy:
    """The strategy of the data-parallel group."""
    degree = layout.data_ranks
    expert: dict[str, Any] = {"expert_degree": layout.expert_shards}
    accumulates = (layout.grad_accum > 1) * 1
    pipelined = (layout.pipeline_parallel > 1) * 1
    engine = wire.bucket_bytes, accumulates, wire.lasting, pipelined
    gathered: dict[str, Any] = {
        "gather_bytes": wire.gather_bytes,
        "reduce_bytes": wire.reduce_bytes,
    }
    match layout.sharding:
        case "ddp":
            flattened = ENGINE_ALL_REDUCE * wire.gather_bytes * (wire.bucket_bytes > 0)
            return DataParallel(degree, wire.bucket_fraction, flattened, **expert)
        case "zero1":
            return Zero1(degree, *engine, gather_bytes=wire.gather_bytes, **expert)
        case "zero2":
            return Zero2(degree, *engine, **expert)
        case "zero3":
            limits = wire.live_elements, wire.prefetch_elements, wire.bucket_elements
            owned = wire.bucket_bytes > 0
            return Zero3(degree, wire.gather_bytes, wire.reduce_bytes, *limits, owned, **expert)
        case "fsdp":
            return FullyShardedDataParallel(
                degree,
                shards=layout.data_shards * layout.context_parallel,
                reshard_after_forward=layout.reshard_after_forward,
                pipelined=pipelined,
                copies=wire.copies,
                separate_root=wire.separate_root,
                keeps_last=wire.keeps_last,
                **gathered,
                **expert,
            )
    raise ValueError(f"sharding={layout.sharding!r}: use one of {', '.join(SHARDINGS)}")


def sequence_and_experts(layout: Layout, wire: Wire) -> Iterator[AbstractStrategy]:
    """Context and expert parallelism, where there is any: most layouts have none."""
    if not _is_one(layout.context_parallel):
        yield ContextParallel(
            layout.context_parallel,
            layout.context_comm,
            layout.tensor_parallel,
            layout.sequence_parallel,
            wire.rotated_bytes,
            layout.ulysses_degree,
        )
    if not (_is_one(layout.expert_parallel) and _is_one(layout.expert_tensor_parallel)):
        yield ExpertParallel(layout.expert_parallel, layout.expert_tensor_parallel)


def offload_strategy(layout: Layout, wire: Wire, way: Way) -> Iterator[AbstractStrategy]:
    """Offload of the whole model and of one layer, where there is any."""
    items = {*places_of(layout.offload), *way.offload}
    roles = {Role.PARAMETER} if "parameters" in items else set()
    if "optimizer" in items:
        roles |= {Role.OPTIMIZER, Role.GRADIENT} if wire.takes_gradients else {Role.OPTIMIZER}
    if "activations" in items:
        roles.add(Role.ACTIVATION)
    if roles:
        yield Offload(roles=frozenset(roles), staging=wire.staging)


def _is_one(degree: Quantity) -> bool:
    return isinstance(degree, int) and degree == 1


def strategies_of(
    layout: Layout, wire: Wire, stage: Quantity = 0, policy: str = "none"
) -> tuple[AbstractStrategy, ...]:
    """The one list of strategies that a layout stands for, seen from one stage and one way of a layer."""
    way = Way.of(policy)
    tensor: tuple[AbstractStrategy, ...] = (
        TensorParallel(
            layout.tensor_parallel, layout.sequence_parallel, wire.overlaps_regions, wire.repeats_heads
        ),
    )
    if layout.sequence_parallel:
        tensor += (SequenceParallel(layout.tensor_parallel),)
    return (
        data_strategy(layout, wire),
        *tensor,
        *sequence_and_experts(layout, wire),
        Recompute(policy=way.recompute),
        *offload_strategy(layout, wire, way),
        PipelineParallel(
            layout.pipeline_parallel,
            stage=stage,
            microbatches=layout.grad_accum,
            chunks=layout.chunks,
            schedule=layout.schedule,
        ),
    )


def collectives_of(layer: Layer, strategies: Sequence[AbstractStrategy]) -> Iterator[Collective]:
    """What the GPUs send each other for a layer; what is recomputed is sent once more, in the backward.

    A layer that no gradient reaches sends nothing in a micro-batch's backward.
    """
    plain = [one for one in strategies if one.axis != "recompute"]
    for strategy in plain:
        for sent in strategy.collectives(layer, size_seen_by(strategy, plain)):
            if not layer.backward and sent.way == "backward" and sent.per == "micro-batch":
                continue
            yield sent
            if sent.of is not None and sent.way == "forward":
                factor = prod(one.share(sent.of) for one in strategies if one.axis == "recompute")
                if factor > 1:  # a message counts forward and backward as one each
                    yield replace(sent, way="backward", times=sent.times * 2 * (factor - 1))
