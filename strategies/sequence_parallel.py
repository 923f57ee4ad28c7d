"""Sequence parallelism: the residual stream is cut within the tensor-parallel group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import AbstractStrategy, Buffer, Layer, Quantity, Role, Size, Term

CUT = (Role.ACTIVATION, Role.OUTPUT_GRADIENT, Role.TRANSIENT, Role.TRAFFIC)
"""Roles whose terms on the residual stream are cut; messages cross it whole."""
ROUTED = (*CUT, Role.FLOPS, Role.MESSAGE)
"""Roles of which those of tokens on their way to experts are cut: a token is sent once, from where it is."""
LATENT = frozenset(("q_rank", "kv_rank"))
"""Latent attention's compressed lengths: the products that make them are whole on every GPU, which runs them
for its own part of the tokens (Megatron Core, multi_latent_attention.py: ``parallel_mode`` duplicated)."""


@dataclass(frozen=True)
class SequenceParallel(AbstractStrategy):
    """1/t of the activations on the residual stream (norms, dropout, block inputs).

    Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2. A column-parallel product needs its
    input gathered: one whole residual stream exists while it runs. (Its messages are those of
    tensor parallelism, all-gather and reduce-scatter instead of all-reduce.) A mixture's router chooses for
    the tokens of a GPU's own part, so that it, and what is routed, is cut too (Megatron Core's dispatchers).
    """

    axis: ClassVar[str] = "tensor"
    label: ClassVar[str] = "SP"

    def share(self, term: Term) -> Quantity:
        stream = term.role in CUT and "residual" in term.dims
        own = term.role in ROUTED and ("routed" in term.dims or "router" in term.dims)
        down = term.role is Role.FLOPS and "heads" not in term.dims and not LATENT.isdisjoint(term.dims)
        return 1 / self.degree if stream or own or down else 1

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        regions = [t for layer in layers for t in layer.by_role[Role.MESSAGE] if "crossings" in t.dims]
        if regions:
            term = max(regions, key=lambda t: t.dims["crossings"])
            yield Buffer("gathered input", size(term) / term.dims["crossings"])

    def objections(self, layers: Sequence[Layer]) -> Iterable[str]:
        if self.degree == 1:
            yield "sequence_parallel without tensor parallelism: use tensor_parallel 2 or more"
        for layer in layers:
            for term in [t for t in layer.by_role[Role.MESSAGE] if "crossings" in t.dims]:
                if term.dims["seq"] % self.degree:
                    yield (
                        f"tensor_parallel={self.degree} does not divide seq_length="
                        f"{term.dims['seq']}, which sequence_parallel cuts: use a multiple of "
                        f"{self.degree}, or leave sequence_parallel off"
                    )
                return
