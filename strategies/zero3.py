"""ZeRO stage 3 (P_os+g+p): parameters too; whole layers exist only while they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import (
    STATES,
    AbstractStrategy,
    Buffer,
    Collective,
    Layer,
    Quantity,
    Role,
    Size,
    Term,
)


def unit_elements(layers: Sequence[Layer], size: Size, block: bool) -> Quantity:
    """Parameters of the block unit, or of the root unit (embedding, final norm, head) around it."""
    total: Quantity = 0
    for layer in layers:
        if (layer.kind == "block") is block:
            total = total + sum(size(t) / t.unit for t in layer.by_role[Role.PARAMETER])
    return total


@dataclass(frozen=True)
class Zero3(AbstractStrategy):
    """All model states cut by d; every layer is gathered before its forward and its backward.

    Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.3 and 7.2.2: two all-gathers of the
    parameters and one reduce-scatter of the gradients per micro-batch, 3 Psi.
    ``gather_bytes`` and ``reduce_bytes`` are bytes per element on the wire.
    """

    axis: ClassVar[str] = "data"
    label: ClassVar[str] = "ZeRO-3"
    gather_bytes: float = 2.0
    reduce_bytes: float = 2.0

    def share(self, term: Term) -> Quantity:
        return 1 / self.degree if term.role in STATES else 1

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        elements = unit_elements([layer], size, block=layer.kind == "block")
        gathered, reduced = elements * self.gather_bytes, elements * self.reduce_bytes
        yield Collective("all_gather", self.axis, gathered, times=2, behind="layer")
        yield Collective("reduce_scatter", self.axis, reduced, behind="layer")

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        block = unit_elements(layers, size, block=True)
        root = unit_elements(layers, size, block=False)
        yield Buffer("gathered root unit", root * self.gather_bytes)
        yield Buffer("gathered layers, in use and prefetched", 2 * block * self.gather_bytes)
        # The gradients of the layer, and the reduce-scatter's input of the one before it.
        gradients = block * (self.gather_bytes + self.reduce_bytes)
        yield Buffer("unsharded gradients", gradients, "backward")
