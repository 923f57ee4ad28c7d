"""Fully sharded data parallelism, whole (FSDP) or within replicas (HSDP)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import STATES, Buffer, Collective, Layer, Quantity, Role, Size, Term
from strategies.zero3 import Zero3, unit_elements


@dataclass(frozen=True)
class FullyShardedDataParallel(Zero3):
    """ZeRO-3 over ``shards`` GPUs, all-reduced over the ``degree / shards`` replicas.

    Zhao et al. 2023, arXiv:2304.11277, sections 3.2.1 (full sharding), 3.2.2 (hybrid sharding)
    and 3.3 (overlap). With ``reshard_after_forward`` off every gathered unit stays until its
    backward: one all-gather per micro-batch instead of two, for a whole copy in the wire's dtype.

    Within a pipeline (``pipelined`` 1) PyTorch keeps gathered parameters and whole gradients, in the
    reduce dtype, from the first micro-batch to the last, and gathers and reduces once a step:
    ``torch.distributed.pipelining.stage`` turns resharding and gradient sync off in between.
    """

    label: ClassVar[str] = "FSDP"
    shards: Quantity = 1
    reshard_after_forward: bool = True
    pipelined: Quantity = 0

    def share(self, term: Term) -> Quantity:
        if term.role not in STATES:
            return 1
        cut = 1 / self.shards
        kept = self.pipelined if self.reshard_after_forward else 1
        if term.role is Role.PARAMETER:
            return cut + kept * self.gather_bytes / term.unit
        if term.role is Role.GRADIENT:
            return cut + self.pipelined * (self.reduce_bytes / term.unit - cut)
        return cut

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        # What stays gathered or whole is in the share already.
        for buffer in super().workspace(layers, size):
            if self.reshard_after_forward or buffer.name == "unsharded gradients":
                yield Buffer(buffer.name, buffer.size * (1 - self.pipelined), buffer.moment)

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        elements = unit_elements([layer], size, layer.kind)
        gathered, reduced = elements * self.gather_bytes, elements * self.reduce_bytes
        each = 1 - self.pipelined
        gathers = (2 if self.reshard_after_forward else 1) * each
        shard, replicate = "data_shard", "data_replicate"
        once = self.pipelined
        sent = (
            Collective("all_gather", shard, gathered, times=gathers, behind="layer"),
            Collective("reduce_scatter", shard, reduced, times=each, behind="layer"),
            Collective("all_gather", shard, gathered, times=once, per="step", behind="forward"),
            Collective("reduce_scatter", shard, reduced, times=once, per="step", behind="backward"),
            Collective("all_reduce", replicate, reduced / self.shards, per="step", behind="backward"),
        )
        # Of a family of layouts some are pipelined; of a single one only half of these are sent.
        return (one for one in sent if not isinstance(one.times, int) or one.times)
