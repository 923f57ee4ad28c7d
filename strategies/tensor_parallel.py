"""Tensor parallelism: heads, MLP columns and vocabulary are cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import (
    AbstractStrategy,
    Collective,
    Layer,
    Quantity,
    Role,
    Size,
    Term,
)

CUT = frozenset(("heads", "kv_heads", "ffn", "shared_ffn", "vocab", "rank")).union(
    ("ssm_heads", "ssm_groups", "delta_heads", "delta_key_heads")
)
"""The dimensions that tensor parallelism cuts; the rank of adapters too, as Megatron Bridge does
(peft/utils.py, ``ParallelLinearAdapter``); of a state space its heads and the groups of them that share B
and C (Dao and Gu 2024, arXiv:2405.21060, section 8.1), of a delta net those of values and of keys."""


@dataclass(frozen=True)
class TensorParallel(AbstractStrategy):
    """1/t of everything with heads, MLP width or vocabulary; the residual stream is repeated.

    Shoeybi et al. 2019, arXiv:1909.08053, section 3: one all-reduce of the residual stream per
    region and direction, so four per block. Korthikanti et al. 2022, arXiv:2205.05198, section
    4.2.2: with sequence parallelism each becomes a reduce-scatter and an all-gather of the same
    buffer, and the backward gathers the region's input once more, behind the matrix products.
    Key and value heads fewer than the group (``repeats_heads``) are held by several of its GPUs each: the
    product of queries, keys and values is cut all the same, then gathered (Megatron Core, attention.py).
    Where ``overlaps``, the gradient of a region's input is reduced behind the product that makes its
    weight's: Megatron-LM without ``--no-async-tensor-model-parallel-allreduce``.
    """

    axis: ClassVar[str] = "tensor"
    label: ClassVar[str] = "TP"
    sequence_parallel: bool = False
    overlaps: bool = False
    repeats_heads: bool = False

    def share(self, term: Term) -> Quantity:
        return 1 if CUT.isdisjoint(term.dims) else 1 / self.degree

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        behind = "layer" if self.overlaps else ""
        for term in [t for t in layer.by_role[Role.MESSAGE] if "gathered_heads" in t.dims]:
            yield Collective("all_gather", self.axis, size(term), way="forward", of=term)
            yield Collective("reduce_scatter", self.axis, size(term))
        for term in [t for t in layer.by_role[Role.MESSAGE] if "crossings" in t.dims]:
            crossings = term.dims["crossings"]
            region, half = size(term) / crossings, crossings / 2
            if not self.sequence_parallel:
                yield Collective("all_reduce", self.axis, region, times=half, way="forward", of=term)
                yield Collective("all_reduce", self.axis, region, times=half, behind=behind, of=term)
                continue
            for kind in ("all_gather", "reduce_scatter"):
                yield Collective(kind, self.axis, region, times=half, way="forward", of=term)
            yield Collective("all_gather", self.axis, region, times=half, of=term)
            yield Collective("reduce_scatter", self.axis, region, times=half, behind=behind, of=term)
            if layer.is_block:
                yield Collective("all_gather", self.axis, region, times=half, behind="layer")

    def objections(self, layers: Sequence[Layer]) -> Iterable[str]:
        lengths = {
            name: length
            for layer in layers
            for term in layer.by_role[Role.PARAMETER]
            for name, length in term.dims.items()
            if name in CUT - {"vocab"}  # a vocabulary that does not divide is padded in the layer
        }
        for name, length in lengths.items():
            repeated = self.repeats_heads and name == "kv_heads" and self.degree % length == 0
            if length % self.degree and not repeated:
                fits = [str(d) for d in range(1, min(length, 64) + 1) if length % d == 0]
                choice = " or ".join([", ".join(fits[:-1]), fits[-1]] if fits[1:] else fits)
                yield f"tensor_parallel={self.degree} does not divide {name}={length}: use {choice}"
