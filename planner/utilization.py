"""How much of the GPUs a step uses, in the literature's several definitions.

- *Model FLOPs* of a token: ``6 N + 12 L s a d`` (:meth:`planner.specs.ModelSpec.flops_per_token`), nothing
  recomputed, attention as if it were not causal: Chowdhery et al. 2022, arXiv:2204.02311, appendix B;
  of frozen weights ``4 N``, as nobody makes their gradients (:mod:`planner.adapters`).
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
    job, chunks = prices.job, int(prices.layout.chunks)
    model = job.flops_per_token
    attention = job.model.attention_flops_per_token(job.seq_length)
    layers = [chunks * sum(stage[r] for stage in rows) for r in range(len(prices.policies))]
    repeated = sum(
        count * _again(prices, policy) for count, policy in zip(layers, prices.policies, strict=True)
    )
    per_gpu = tokens_per_s / job.cluster.num_gpus
    peak = prices.compute.peak
    return Utilization(
        mfu=model * per_gpu / peak,
        mfu_causal=(model - attention / 2) * per_gpu / peak,
        hfu=(model + repeated) * per_gpu / peak,
        model_flops_per_s=model * per_gpu,
        hardware_flops_per_s=(model + repeated) * per_gpu,
    )


def _again(prices: Prices, policy: str) -> float:
    """FLOPs of a token that a block's recompute runs again: 2 per parameter, 4 s a d of attention."""
    *strategies, _ = strategies_of(prices.layout, prices.wire, 0, policy)
    model, total = prices.job.model, 0.0
    for term in prices.layers[1].by_role[Role.FLOPS]:
        tokens = float(term.dims["batch"] * term.dims["seq"])
        forward = model.attention_flops_per_token(prices.job.seq_length) / (3 * model.num_hidden_layers)
        if "hidden" in term.dims:
            forward = float(term.elements) / tokens * 2
        total += again(term, strategies) * forward
    return total
