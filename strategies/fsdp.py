"""Fully sharded data parallelism, whole (FSDP) or within replicas (HSDP)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

from strategies.base import STATES, Buffer, Collective, Layer, Quantity, Role, Size, Term, by_group, larger
from strategies.zero3 import Zero3, on_the_wire, trained


def tied(layers: Sequence[Layer]) -> list[Layer]:
    """The embedding that a tied head on the same stage uses: a unit of both."""
    tied = any("copies" in t.dims for layer in layers for t in layer.by_role[Role.PARAMETER])
    together = {layer.kind for layer in layers} >= {"embedding", "head"}
    return [layer for layer in layers if layer.kind == "embedding" and tied and together]


@dataclass(frozen=True)
class FullyShardedDataParallel(Zero3):
    """ZeRO-3 over ``shards`` GPUs, all-reduced over the ``degree / shards`` replicas.

    Zhao et al. 2023, arXiv:2304.11277, sections 3.2.1 (full sharding), 3.2.2 (hybrid sharding)
    and 3.3 (overlap). With ``reshard_after_forward`` off every gathered unit stays until its
    backward: one all-gather per micro-batch instead of two, for a whole copy in the wire's dtype.

    Within a pipeline (``pipelined`` 1) PyTorch keeps gathered parameters and whole gradients, in the
    reduce dtype, from the first micro-batch to the last, and gathers and reduces once a step:
    ``torch.distributed.pipelining.stage`` turns resharding and gradient sync off in between.

    FSDP2 gathers into a buffer and copies the parameters out of it, and copies the gradients into the buffer
    that is reduced (``copies``; torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py); FSDP1's flat
    parameters are the buffers.
    """

    label: ClassVar[str] = "FSDP"
    gradient_stream: ClassVar[str] = "reduce"
    shards: Quantity = 1
    copies: bool = True
    separate_root: bool = False
    keeps_last: bool = False
    reshard_after_forward: bool = True
    pipelined: Quantity = 0

    def __post_init__(self) -> None:
        if isinstance(self.expert_degree, int) and not self.expert_degree:
            object.__setattr__(self, "expert_degree", self.shards)

    def ranks(self, term: Term) -> Quantity:
        return self.expert_degree if "experts" in term.dims else self.shards

    def share(self, term: Term) -> Quantity:
        if term.role not in STATES:
            return 1
        cut = 1 / self.ranks(term)
        if term.role is Role.GRADIENT:
            return cut + self.pipelined * (self.reduce_bytes / term.unit - cut)
        return cut

    def gathered(self, parameter: Term, size: Size) -> Quantity:
        kept = self.pipelined if self.reshard_after_forward else 1
        kept = kept * (self.ranks(parameter) > 1)  # a group of one is not wrapped
        return kept * size(parameter) / parameter.unit * min(self.gather_bytes, parameter.unit)

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        # What stays gathered needs no second gathering, and a pipeline reduces once, at the end.
        for buffer in self._units(layers, size):
            kept = buffer.name.startswith("gathered") and buffer.span not in ("logits", "start")
            if self.reshard_after_forward or not kept:
                yield replace(buffer, size=buffer.size * (1 - self.pipelined) * (self.shards > 1))

    def arriving(self, gradient: Term, size: Size) -> Quantity:
        # In the dtype of the products, before the copy into the reduce-scatter's input.
        return size(gradient) / gradient.unit * self.gather_bytes * (self.ranks(gradient) > 1)

    def _units(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        """Units that exist whole: the root, the layers at work, inputs of reduce-scatters.

        The root unit (embedding, final norm and head) stays gathered from the forward to the end
        of the backward, when its gradients are reduced; where embedding and head are units of
        their own, only the head's does, through the loss. At the loss the last block is gathered
        ahead of its backward, or has never been resharded (``keeps_last``); within the backward,
        one block is in use and one gathered ahead, and the input of the previous block's
        reduce-scatter is still there. Seen so in traces of torch 2.13's ``fully_shard``.
        """

        def of(*kinds: str) -> list[Layer]:
            return [layer for layer in layers if layer.kind in kinds]

        def gathered(units: Iterable[Layer]) -> Quantity:
            return sum(on_the_wire(layer, size, self.gather_bytes) for layer in units)

        def gradients(units: Iterable[Layer], width: float) -> Quantity:
            return sum(trained(layer, size) for layer in units) * width

        blocks = [layer for layer in layers if layer.is_block]
        block = reduce(larger, (gathered([one]) for one in blocks))
        reduced = reduce(larger, (gradients([one], self.reduce_bytes) for one in blocks))
        head, root = of("head") + tied(layers), of("embedding", "head")
        yield Buffer("gathered layer, to be copied", block, "logits", "gather")
        if self.separate_root:
            root, largest = of("embedding"), head
            yield Buffer("gathered head unit", gathered(head), "loss")
            yield Buffer("gathered embedding unit", gathered(root), "end")
        else:
            largest = root
            yield Buffer("gathered root unit", gathered(root))
            if self.keeps_last:
                yield Buffer("gathered layer, the last", block, "loss")
            else:
                yield Buffer("gathered layer, prefetched", block, "loss", "gather")
            whole = self.gather_bytes
            yield Buffer("unsharded gradients of the head", gradients(head, whole), "block")
            yield Buffer("unsharded gradients of the head", gradients(of("head"), whole), "end")
        yield Buffer("gathered layer, in use", block, "block")
        yield Buffer("gathered layer, prefetched", block, "not last", "gather")
        yield Buffer("gathered unit, to be copied", gathered(largest), "start", "gather")
        for span in ("not first", "end"):
            yield Buffer("reduce-scatter input, previous layer", reduced, span)
        yield Buffer("unsharded gradients, last unit", gradients(root, self.gather_bytes), "reduction")
        yield Buffer("reduce-scatter input, last unit", gradients(root, self.reduce_bytes), "reduction")

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        for shard, part in by_group(layer, "data_shard"):
            shards = self.shards if shard == "data_shard" else self.expert_degree
            yield from self._sent(shard, shards, part, size)

    def _sent(self, shard: str, shards: Quantity, part: Layer, size: Size) -> Iterable[Collective]:
        """Messages of parameters that ``shards`` GPUs along axis ``shard`` share."""
        gathered = on_the_wire(part, size, self.gather_bytes)
        reduced = trained(part, size) * self.reduce_bytes
        # Out of the gather's buffer, and into the reduction's: a read and a write each.
        copies = self.copies * (shards > 1)
        made = trained(part, size) * self.gather_bytes
        out, into = 2 * gathered * copies, (made + reduced) * copies
        each = 1 - self.pipelined
        again = each * self.reshard_after_forward
        once = self.pipelined
        sent = (
            Collective("all_gather", shard, gathered, each, behind="layer", way="forward", copied=out),
            Collective("all_gather", shard, gathered, again, behind="layer", copied=out),
            Collective("reduce_scatter", shard, reduced, times=each, behind="layer", copied=into),
            Collective("all_gather", shard, gathered, times=once, per="step", behind="forward"),
            Collective("reduce_scatter", shard, reduced, times=once, per="step", behind="backward"),
            Collective("all_reduce", "data_replicate", reduced / shards, per="step", behind="backward"),
        )
        # Of a family of layouts some are pipelined; of a single one only half of these are sent.
        return (one for one in sent if not isinstance(one.times, int) or one.times)
