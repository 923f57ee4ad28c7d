"""DeepSpeed's own estimate of model states, as its documentation prints it: for comparison, and for tests.

deepspeed 0.19.8, ``estimate_zero2_model_states_mem_needs`` (runtime/zero/stage_1_and_2.py) and
``estimate_zero3_model_states_mem_needs`` (runtime/zero/stage3.py). They count model states alone and allow
1.5 times of them on the host. What they leave out of what the engine does is in :data:`LEFT_OUT`.
"""

from __future__ import annotations

from typing import NamedTuple

FACTOR = 1.5
LEFT_OUT = (
    "activations, logits and working sets",
    "buckets, gathered parameters and what lies outside tensors",
    "half-precision gradients on the host: stage 3 always has them, stage 2 where it accumulates",
    "buffers in front of NVMe",
)


class Estimate(NamedTuple):
    """Bytes of a node's host, and of each GPU."""

    host: int
    gpu: int


def zero2(parameters: int, gpus_per_node: int, nodes: int = 1, offload: bool = False) -> Estimate:
    """ZeRO-2: 2 bytes stay on the GPU, 16 are on the host, or a copy in fp32 of every process at the start.

    >>> zero2(10**9, 8, offload=True)
    Estimate(host=48000000000, gpu=2000000000)
    """
    gpus = gpus_per_node * nodes
    if offload:
        return Estimate(int(parameters * max(4 * gpus, 16) * FACTOR), 2 * parameters)
    return Estimate(
        int(parameters * 4 * gpus_per_node * FACTOR), 2 * parameters + int(18 * parameters / gpus)
    )


def zero3(
    parameters: int, largest_layer: int, gpus_per_node: int, nodes: int = 1, offload: bool = False
) -> Estimate:
    """ZeRO-3: all 18 bytes are cut, or on the hosts; the largest layer is gathered, 4 bytes of it."""
    gathered = 4 * largest_layer
    if offload:
        return Estimate(int(parameters * 18 * (1 / nodes) * FACTOR), gathered)
    host = int(largest_layer * 4 * gpus_per_node * FACTOR)
    return Estimate(host, gathered + int(18 * parameters / (gpus_per_node * nodes)))
