"""How much of the GPUs a step uses, in the literature's several definitions.

- *Model FLOPs* of a token: ``6 N + 12 L s a d`` (:meth:`planner.specs.ModelSpec.flops_per_token`), nothing
  recomputed, attention as if it were not causal: Chowdhery et al. 2022, arXiv:2204.02311, appendix B;
  of frozen weights ``4 N``, as nobody makes their gradients (:mod:`planner.adapters`), and of blocks that
  no gradient reaches a third of all.
  **MFU** is model FLOPs per second over the peak of all GPUs.
- **MFU, causal**: the same with half of the attention, which is what causal kernels compute.
- *Hardware FLOPs* add what recomputation runs again, at the same count: Korthikanti et al. 2022,
  arXiv:2205.05198, appendix A. **HFU** is hardware FLOPs per second over the peak.

The peak is the dense one, of the precision that the products run in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from planner.compute import again
from planner.replay import chunk_blocks
from planner.stages import Prices
from strategies.base import Role
from strategies.layout import strategies_of


class Utilization(NamedTuple):
    """Fractions of the peak, and FLOP/s per GPU."""

    mfu: float
    mfu_causal: float
    hfu: float
    model_flops_per_s: float
    hardware_flops_per_s: float


def utilization(prices: Prices, rows: Sequence[Sequence[int]], tokens_per_s: float) -> Utilization:
    """Of a layout that has ``rows[stage][policy]`` rows of layers, at that many tokens a second."""
    job = prices.job
    each = [_again(prices, block) for block in range(len(prices.blocks))]
    model = job.flops_per_token
    attention = job.attention_flops_per_token
    repeated = 0.0
    for stage in range(len(rows)):
        blocks = [block for chunk in chunk_blocks(prices, rows, stage) for block in chunk]
        repeated += sum(blocks.count(block) * again for block, again in enumerate(each))
    repeated /= prices.pipeline.copies
    per_gpu = tokens_per_s / job.cluster.num_gpus
    peak = prices.compute.peak
    return Utilization(
        mfu=model * per_gpu / peak,
        mfu_causal=(model - attention / 2) * per_gpu / peak,
        hfu=(model + repeated) * per_gpu / peak,
        model_flops_per_s=model * per_gpu,
        hardware_flops_per_s=(model + repeated) * per_gpu,
    )


def _again(prices: Prices, block: int) -> float:
    """FLOPs of a token that a block's recompute runs again: 2 per parameter, 4 s a d of attention."""
    *strategies, _ = strategies_of(prices.layout, prices.wire, 0, prices.policy_of(block))
    total = 0.0
    for term in prices.block_layer(block).by_role[Role.FLOPS]:
        tokens = float(term.dims["batch"] * term.dims["seq"])
        products = 2 if "seq_k" in term.dims else 1
        total += again(term, strategies) * float(term.elements) / tokens * 2 * products
    return total
