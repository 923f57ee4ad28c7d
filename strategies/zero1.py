"""ZeRO stage 1 (P_os): optimizer states are cut over the data-parallel group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import (
    Buffer,
    Collective,
    DataStrategy,
    Kept,
    Layer,
    Quantity,
    Role,
    Size,
    Term,
    by_group,
    smaller,
)


@dataclass(frozen=True)
class Zero1(DataStrategy):
    """Each GPU updates 1/d of the parameters, then all gather the result.

    Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.1 and 7.2.1: a reduce-scatter of the
    gradients and an all-gather of the parameters, 2 Psi in all, as an all-reduce. Megatron's
    distributed optimizer is this strategy, its gradients in contiguous buffers.

    DeepSpeed's engine collects gradients in a bucket of ``bucket_bytes`` (``reduce_bucket_size``) when
    the last micro-batch's backward is done, copies its own part out and frees all others before the
    optimizer step; the bucket stays from the first micro-batch to the last (``accumulates`` is 1 if
    there are several), but in a pipeline (``pipelined`` is 1) is only there at the end. Where ``lasting``,
    a part of the gradients' bytes, are accumulated in fp32, these are always there, and all are cast to
    half precision at once to be reduced. Traced so in DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py,
    runtime/bf16_optimizer.py).

    Parameters are gathered as they are kept, or with ``gather_bytes`` an element where that is more.
    """

    label: ClassVar[str] = "ZeRO-1"
    bucket_bytes: float = 0.0
    accumulates: Quantity = 0
    lasting: float = 0.0
    pipelined: Quantity = 0
    gather_bytes: float = 0.0

    def share(self, term: Term) -> Quantity:
        return 1 / self.ranks(term) if term.role is Role.OPTIMIZER else 1

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        for axis, part in by_group(layer, self.axis):
            gradients = sum(size(term) for term in part.by_role[Role.GRADIENT])
            parameters = sum(size(t) * (max(t.unit, self.gather_bytes) / t.unit) for t in part.trained)
            yield Collective("reduce_scatter", axis, gradients, per="step", behind="backward")
            yield Collective("all_gather", axis, parameters, per="step", behind="forward")

    def kept_gradients(self) -> Kept | None:
        if not self.bucket_bytes:
            return None
        kept = self.lasting + (1 - self.lasting) * self.accumulates
        # One part for all: the larger, where experts are shared by fewer.
        return Kept(kept, kept, 1 if self.lasting else 1 / smaller(self.degree, self.expert_degree))

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        bucket, always, before = self.bucket_bytes, self.accumulates, 1 - self.pipelined
        if not bucket:
            return
        weights = [(layer.count, t) for layer in layers for t in layer.trained]
        if self.lasting:
            whole = sum(count * size(t) for count, t in weights)
            yield Buffer("gradients in half precision, to be reduced", whole, "reduction")
            return
        yield Buffer("reduce bucket", bucket * always * before, "passes")
        for span in ("block", "end"):
            yield Buffer("reduce bucket", bucket * (1 - always) * before, span)
        # The first gradients move into the bucket before the own part is copied out of it.
        own = sum(count * size(t) / self.ranks(t) for count, t in weights)
        yield Buffer("reduce bucket or own part", bucket + own - smaller(bucket, own), "reduction")
