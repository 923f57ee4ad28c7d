"""ZeRO stage 2 (P_os+g): gradients are cut over the data-parallel group as well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import Buffer, Collective, Kept, Layer, Quantity, Role, Size, Term, by_group
from strategies.zero1 import Zero1


@dataclass(frozen=True)
class Zero2(Zero1):
    """Each GPU keeps the reduced gradients of its own 1/d of the parameters only.

    Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.2 and 7.2.1. As no GPU keeps the other
    gradients, they are reduce-scattered in every micro-batch, not once per step.

    DeepSpeed's engine does so in buckets as the gradients arise and has room for all of its own part
    from the first of these on, on the rank whose part is the last layers' from the start of the backward;
    a micro-batch's part is added to that of those before it.
    """

    label: ClassVar[str] = "ZeRO-2"

    def share(self, term: Term) -> Quantity:
        if term.role is Role.GRADIENT:
            twice = self.accumulates if self.bucket_bytes and not self.lasting else 0
            return (1 + twice) / self.ranks(term)
        return 1 / self.ranks(term) if term.role is Role.OPTIMIZER else 1

    def arriving(self, gradient: Term, size: Size) -> Quantity | None:
        # Whole until they are reduce-scattered, right after the layer's backward; one by one in buckets.
        return None if self.bucket_bytes else size(gradient) * (self.ranks(gradient) > 1)

    def kept_gradients(self) -> Kept | None:
        if not self.bucket_bytes:
            return None
        before = self.accumulates
        if self.lasting:
            return Kept(self.lasting * before, 1, 1)
        return Kept(before / (1 + before), 1, 1 / (1 + before))

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        if self.bucket_bytes:
            for span in ("block", "end", "reduction"):
                yield Buffer("reduce bucket", self.bucket_bytes, span)

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        for axis, part in by_group(layer, self.axis):
            gradients = sum(size(term) for term in part.by_role[Role.GRADIENT])
            parameters = sum(size(term) for term in part.trained)
            yield Collective("reduce_scatter", axis, gradients, behind="layer")
            yield Collective("all_gather", axis, parameters, per="step", behind="forward")
