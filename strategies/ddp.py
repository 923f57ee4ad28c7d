"""Distributed data parallelism: every GPU holds everything and averages gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import (
    Buffer,
    Collective,
    DataStrategy,
    Layer,
    Quantity,
    Role,
    Size,
    Term,
    by_group,
    smaller,
)


@dataclass(frozen=True)
class DataParallel(DataStrategy):
    """Replicas that all-reduce their gradients once per step.

    Li et al. 2020, arXiv:2006.15704, section 3.2: gradients are reduced in buckets while the
    backward pass runs. Where the framework copies gradients into buckets of its own (torch DDP
    without ``gradient_as_bucket_view``), those cost ``bucket_fraction`` of the gradients. DeepSpeed's
    engine reduces them at the end, flattened into copies of up to ``bucket_bytes``.
    """

    label: ClassVar[str] = "DDP"
    bucket_fraction: float = 0.0
    bucket_bytes: float = 0.0

    def share(self, term: Term) -> Quantity:
        if term.role is Role.GRADIENT:
            return 1 + self.bucket_fraction * (self.ranks(term) > 1)
        return 1

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        for axis, part in by_group(layer, self.axis):
            gradients = sum(size(term) for term in part.by_role[Role.GRADIENT])
            yield Collective("all_reduce", axis, gradients, per="step", behind="backward")

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        if self.bucket_bytes:
            whole = sum(layer.count * size(t) for layer in layers for t in layer.trained)
            yield Buffer("all-reduce bucket", smaller(whole, self.bucket_bytes), "reduction")
