"""Expert parallelism: the routed experts of a mixture are shared out, and tokens sent to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

from strategies.base import AbstractStrategy, Buffer, Collective, Layer, Quantity, Role, Size, Term, larger


@dataclass(frozen=True)
class ExpertParallel(AbstractStrategy):
    """1/e of the routed experts on a GPU; tensor parallelism of its own, ``tensor``, cuts their width.

    Lepikhin et al. 2020, arXiv:2006.16668 (GShard), section 3: an all-to-all hands every token to the GPUs
    of its ``top_k`` experts, a second one brings the results back, and the backward has the same two. Where
    tokens are spread evenly a GPU gets as many as it sends, whatever e is. Its group is carved out of
    those of tensor, context and data parallelism (Megatron Core, parallel_state.py: expert tensor, expert,
    expert data). The ``tensor`` GPUs that share an expert's width gather each other's tokens, so each holds
    ``tensor`` times as many of a 1/``tensor`` of the width, and reduce-scatter the results
    (``MoEAlltoAllTokenDispatcher``). The router, and experts that every token passes, are not its own.
    """

    axis: ClassVar[str] = "expert"
    label: ClassVar[str] = "EP"
    tensor: Quantity = 1

    def share(self, term: Term) -> Quantity:
        dims = term.dims
        share: Quantity = 1
        if "experts" in dims:
            share = share / self.degree
        if "expert_ffn" in dims:
            share = share / self.tensor
        if "routed" in dims and term.role is not Role.MESSAGE:
            share = share * self.tensor
        return share

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        for term in routed(layer):
            own = size(term)
            gathered = own * self.tensor
            for way, of in (("forward", term), ("backward", None)):
                yield Collective("all_to_all", self.axis, own, times=2, way=way, of=of)
                for kind in ("all_gather", "reduce_scatter"):
                    yield Collective(kind, "expert_tensor", gathered, way=way, of=of)

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        sizes = [size(term) for layer in layers for term in routed(layer)]
        if sizes:
            # One side of an all-to-all exists besides the other, which is an activation or a gradient.
            several = self.degree * self.tensor > 1
            yield Buffer("routed tokens, arriving", reduce(larger, sizes) * self.tensor * several, "block")

    def objections(self, layers: Sequence[Layer]) -> Iterable[str]:
        lengths = {
            name: term.dims[name]
            for layer in layers
            for term in layer.by_role[Role.PARAMETER]
            for name in ("experts", "expert_ffn")
            if name in term.dims
        }
        for option, name, degree in (
            ("expert_parallel", "experts", self.degree),
            ("expert_tensor_parallel", "expert_ffn", self.tensor),
        ):
            if degree == 1:
                continue
            if name not in lengths:
                yield f"{option}={degree}, but the model has no routed experts: use {option} 1"
            elif lengths[name] % degree:
                fits = [str(d) for d in range(1, min(lengths[name], 256) + 1) if lengths[name] % d == 0]
                yield f"{option}={degree} does not divide {name}={lengths[name]}: use {', '.join(fits)}"


def routed(layer: Layer) -> list[Term]:
    """The messages of tokens on their way to experts."""
    return [term for term in layer.by_role[Role.MESSAGE] if "routed" in term.dims]
