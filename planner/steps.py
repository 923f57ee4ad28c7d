"""The steps of a layer's backward, in order.

Of a block: the end of its forward (beside which there is as much as at the start of its backward, or which is
then run again), the shared experts, what follows its last product (a norm on the MLP's output, the sum over a
token's experts), the down product, the activation function, the up (and gate) products, the second norm, the
attention to an encoder's output, the attention output product, the attention core, the query, key and value
products, the first norm. A block with parallel residuals runs the same steps. In a block with a state space
the core's has two: up to the gradients of its chunks' states (``scan``), and the rest.
"""

from __future__ import annotations

MLP = ("forward", "shared", "combine", "down", "act", "up", "norm2", "cross", "out")
MIXER = ("core", "qkv", "norm1")
STEPS = {
    "embedding": ("norm", "embedding"),
    "block": (*MLP, *MIXER),
    "scan": (*MLP, "scan", *MIXER),
    "head": ("loss", "head", "norm"),
}
