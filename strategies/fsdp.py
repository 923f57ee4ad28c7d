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
    """

    label: ClassVar[str] = "FSDP"
    shards: Quantity = 1
    reshard_after_forward: bool = True

    def share(self, term: Term) -> Quantity:
        if term.role not in STATES:
            return 1
        cut = 1 / self.shards
        if term.role is Role.PARAMETER and not self.reshard_after_forward:
            return cut + self.gather_bytes / term.unit
        return cut

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        # What is never resharded is in the share already; only gradients come on top.
        for buffer in super().workspace(layers, size):
            if self.reshard_after_forward or buffer.name == "unsharded gradients":
                yield buffer

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        elements = unit_elements([layer], size, layer.kind)
        gathered, reduced = elements * self.gather_bytes, elements * self.reduce_bytes
        gathers = 2 if self.reshard_after_forward else 1
        yield Collective("all_gather", "data_shard", gathered, times=gathers, behind="layer")
        yield Collective("reduce_scatter", "data_shard", reduced, behind="layer")
        replicated = reduced / self.shards
        yield Collective("all_reduce", "data_replicate", replicated, per="step", behind="backward")
