"""ZeRO stage 3 (P_os+g+p): parameters too; they are gathered where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import (
    STATES,
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


def elements(layer: Layer, size: Size) -> Quantity:
    """Parameters of one layer."""
    return sum(size(term) / term.unit for term in layer.by_role[Role.PARAMETER])


def trained(layer: Layer, size: Size) -> Quantity:
    """Parameters of one layer that have a gradient."""
    return sum(size(term) / term.unit for term in layer.trained)


def on_the_wire(layer: Layer, size: Size, width: float) -> Quantity:
    """Bytes of one layer's parameters, gathered: ``width`` an element, or as stored, if that is less."""
    return sum(size(term) / term.unit * min(term.unit, width) for term in layer.by_role[Role.PARAMETER])


@dataclass(frozen=True)
class Zero3(DataStrategy):
    """All model states cut by d; every layer is gathered before its forward and its backward.

    Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.3 and 7.2.2: two all-gathers of the
    parameters and one reduce-scatter of the gradients per micro-batch, 3 Psi.
    ``gather_bytes`` and ``reduce_bytes`` are bytes per element on the wire. DeepSpeed keeps up to
    ``live_elements`` (``stage3_max_live_parameters``) gathered, gathers ``prefetch_elements``
    (``stage3_prefetch_bucket_size``) ahead and collects gradients in a bucket of ``bucket_elements``
    (``reduce_bucket_size``), which its engine allocates at the start (``owned``), as it does the
    gradients of the own part (DeepSpeed 0.19.8, runtime/zero/stage3.py).
    """

    label: ClassVar[str] = "ZeRO-3"
    gather_bytes: float = 2.0
    reduce_bytes: float = 2.0
    live_elements: float = 1e9
    prefetch_elements: float = 5e7
    bucket_elements: float = 5e8
    owned: bool = False

    def share(self, term: Term) -> Quantity:
        return 1 / self.ranks(term) if term.role in STATES else 1

    def kept_gradients(self) -> Kept | None:
        return Kept(1, 1, 1) if self.owned else None

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        for axis, part in by_group(layer, self.axis):
            gathered = on_the_wire(part, size, self.gather_bytes)
            reduced = trained(part, size) * self.reduce_bytes
            for way in ("forward", "backward"):
                yield Collective("all_gather", axis, gathered, behind="layer", way=way)
            yield Collective("reduce_scatter", axis, reduced, behind="layer")

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        everything = sum(layer.count * elements(layer, size) for layer in layers)
        alive = smaller(everything, self.live_elements + self.prefetch_elements)
        if self.owned:  # what is gathered ahead lies in one piece until each parameter is copied out of it
            alive = alive + smaller(everything, self.prefetch_elements)
        whole = sum(layer.count * on_the_wire(layer, size, self.gather_bytes) for layer in layers)
        yield Buffer("gathered parameters", alive / everything * whole)
        if self.owned:
            for span in ("passes", "reduction", "optimizer step"):
                yield Buffer("reduce bucket", self.bucket_elements * self.reduce_bytes, span)
            return
        for span in ("block", "end"):
            own = sum(layer.count * trained(layer, size) for layer in layers)
            yield Buffer("reduce bucket", smaller(own, self.bucket_elements) * self.reduce_bytes, span)
