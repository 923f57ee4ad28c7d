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


def unit_elements(layers: Iterable[Layer], size: Size, *kinds: str) -> Quantity:
    """Parameters of the layers of those kinds, one of each."""
    return sum(
        size(term) / term.unit
        for layer in layers
        if layer.kind in kinds
        for term in layer.by_role[Role.PARAMETER]
    )


def tied_elements(layers: Sequence[Layer], size: Size) -> Quantity:
    """Parameters of the embedding that a tied head on the same stage uses: a unit of both."""
    tied = any("copies" in t.dims for layer in layers for t in layer.by_role[Role.PARAMETER])
    together = {layer.kind for layer in layers} >= {"embedding", "head"}
    return unit_elements(layers, size, "embedding") if tied and together else 0


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
    separate_root: bool = False

    def share(self, term: Term) -> Quantity:
        return 1 / self.degree if term.role in STATES else 1

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        elements = unit_elements([layer], size, layer.kind)
        gathered, reduced = elements * self.gather_bytes, elements * self.reduce_bytes
        yield Collective("all_gather", self.axis, gathered, times=2, behind="layer")
        yield Collective("reduce_scatter", self.axis, reduced, behind="layer")

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        """Units that exist whole: the root, the layers at work, their gradients.

        The root unit (embedding, final norm and head) stays gathered from the forward to the end
        of the backward; where embedding and head are units of their own, only the head's does,
        through the loss. At the loss the last block is gathered ahead of its backward; within the
        backward, one block is in use and one gathered ahead, this block's gradients are whole and
        the previous one's are the reduce-scatter's input.
        """
        block = unit_elements(layers, size, "block")
        if self.separate_root:
            head = unit_elements(layers, size, "head") + tied_elements(layers, size)
            yield Buffer("gathered head unit", head * self.gather_bytes, "loss")
        else:
            root = unit_elements(layers, size, "embedding", "head")
            yield Buffer("gathered root unit", root * self.gather_bytes)
            yield Buffer("gathered layer, prefetched", block * self.gather_bytes, "loss")
        gathered = 2 * block * self.gather_bytes
        yield Buffer("gathered layers, in use and prefetched", gathered, "backward")
        gradients = block * (self.gather_bytes + self.reduce_bytes)
        yield Buffer("unsharded gradients", gradients, "backward")
