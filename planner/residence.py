"""When the gradients that stay on a GPU are there: from the start, as they arise, or as an engine has it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.defaults import Job
from strategies.base import Quantity
from strategies.layout import Layout, Wire, strategies_of


@dataclass(frozen=True)
class Residence:
    """What part of them is there in the forward, from the start of the backward on, in the update.

    The rest arises layer by layer in the backward. ``first`` is of the first micro-batch's forward.
    """

    first: Quantity
    forward: Quantity
    backward: Quantity
    update: Quantity
    engine: bool = False  # a ZeRO engine's own rule; else what a micro-batch leaves stays


def residence_of(job: Job, layout: Layout, wire: Wire) -> Residence:
    """The residence of a job's gradients under a layout, or under each of a family of layouts.

    A ZeRO engine has its own rule (``kept_gradients``). Else they are all there in one buffer or from the
    second micro-batch on; or what DDP's buckets take beside them is there, a part of both together.
    """
    kept = strategies_of(layout, wire)[0].kept_gradients()
    if kept:
        return Residence(kept.forward, kept.forward, kept.backward, kept.update, engine=True)
    in_buckets = (layout.sharding == "ddp") * (layout.data_ranks > 1)
    buckets = wire.bucket_fraction * in_buckets / (1 + wire.bucket_fraction * in_buckets)
    always = np.maximum(wire.bucket_view * in_buckets, job.stack.gradients_resident) * 1.0
    first = np.maximum(always, buckets)
    later = np.maximum(np.maximum(layout.grad_accum > 1, always) * 1.0, buckets)
    return Residence(first, later, later, 1.0)
