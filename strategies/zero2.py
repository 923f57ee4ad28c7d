"""ZeRO stage 2 (P_os+g): gradients are cut over the data-parallel group as well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import Collective, Layer, Quantity, Role, Size, Term
from strategies.zero1 import Zero1


@dataclass(frozen=True)
class Zero2(Zero1):
    """Each GPU keeps the reduced gradients of its own 1/d of the parameters only.

    Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.2 and 7.2.1. As no GPU keeps the other
    gradients, they are reduce-scattered in every micro-batch, not once per step.
    """

    label: ClassVar[str] = "ZeRO-2"

    def share(self, term: Term) -> Quantity:
        return 1 / self.degree if term.role in (Role.OPTIMIZER, Role.GRADIENT) else 1

    def arriving(self, gradient: Term, size: Size) -> Quantity:
        # Whole until they are reduce-scattered, right after the layer's backward.
        return size(gradient) * (self.degree > 1)

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        gradients = sum(size(term) for term in layer.by_role[Role.GRADIENT])
        parameters = sum(size(term) for term in layer.by_role[Role.PARAMETER])
        yield Collective("reduce_scatter", self.axis, gradients, behind="layer")
        yield Collective("all_gather", self.axis, parameters, per="step", behind="forward")
