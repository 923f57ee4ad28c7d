"""The steps of a layer's backward."""

from __future__ import annotations

STEPS = {
    "embedding": ("embedding",),
    "block": ("forward", "down", "act", "up", "norm2", "out", "core", "qkv", "norm1"),
    "scan": ("forward", "down", "act", "up", "norm2", "out", "scan", "core", "qkv", "norm1"),
    "head": ("loss", "head", "norm"),
}
"""The steps of a layer's backward, in order: of a block the end of its forward (beside which there is as
much as at the start of its backward, or which is then run again), the down product, the activation function,
the up (and gate) products, the second norm, the attention output product, the attention core, the query, key
and value products, the first norm. A block with parallel residuals runs the same steps. In a block
with a state space the core's has two: up to the gradients of its chunks' states (``scan``), and the rest."""
