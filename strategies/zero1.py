"""ZeRO stage 1 (P_os): optimizer states are cut over the data-parallel group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import (
    AbstractStrategy,
    Buffer,
    Collective,
    Layer,
    Quantity,
    Role,
    Size,
    Term,
    smaller,
)


@dataclass(frozen=True)
class Zero1(AbstractStrategy):
    """Each GPU updates 1/d of the parameters, then all gather the result.

    Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.1 and 7.2.1: a reduce-scatter of the
    gradients and an all-gather of the parameters, 2 Psi in all, as an all-reduce. Megatron's
    distributed optimizer is this strategy. ``bucket_bytes`` is DeepSpeed's ``reduce_bucket_size``
    and ``allgather_bucket_size`` in bytes, 0 where gradients live in contiguous buffers already.
    """

    axis: ClassVar[str] = "data"
    label: ClassVar[str] = "ZeRO-1"
    bucket_bytes: float = 0.0

    def share(self, term: Term) -> Quantity:
        return 1 / self.degree if term.role is Role.OPTIMIZER else 1

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        gradients = sum(size(term) for term in layer.by_role[Role.GRADIENT])
        parameters = sum(size(term) for term in layer.by_role[Role.PARAMETER])
        yield Collective("reduce_scatter", self.axis, gradients, per="step", behind="backward")
        yield Collective("all_gather", self.axis, parameters, per="step", behind="forward")

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        if self.bucket_bytes:
            whole = sum(layer.count * size(t) for layer in layers for t in layer.by_role[Role.PARAMETER])
            yield Buffer("reduce bucket", smaller(whole, self.bucket_bytes), "block")
            yield Buffer("all-gather bucket", smaller(whole, self.bucket_bytes), "optimizer step")
