"""What tensors do not explain: the CUDA context, communicators, library workspaces, the allocator.

Named figures of a stack (:class:`planner.stacks.base.Overhead`) or of somebody's profile, each with what
is usual and the range that a job may need; a plan fits for sure only with the most of each.
"""

from __future__ import annotations

from planner.defaults import Job
from strategies.base import Quantity
from strategies.layout import Layout

MIB = 2**20
WORKSPACE = {"torch": (8519680, 32 * MIB), "mcore": (4 * MIB, 32 * MIB)}
"""Bytes that cuBLAS is given before compute capability 9 and from there on: PyTorch's defaults of
``CUBLAS_WORKSPACE_CONFIG``, and Transformer Engine's own (get_cublas_workspace_size_bytes)."""


STREAMS = 4
"""CUDA streams that Transformer Engine runs grouped products on, each with a workspace of its own
(get_cublas_workspace, nvte_get_num_compute_streams)."""


def library_bytes(job: Job) -> float:
    """Workspace of the matrix libraries: allocated like tensors, by none of the layers."""
    recent = (job.cluster.gpu.compute_capability or 0) >= 9
    names = ["torch", *job.stack.words]
    if job.model.experts and job.training.attention != "eager":
        names += [name for name in job.stack.words if name == "mcore"] * STREAMS
    return float(sum(WORKSPACE[name][recent] for name in names))


def device_bytes(job: Job, layout: Layout, tensors: Quantity, bound: str = "value") -> Quantity:
    """Bytes of the GPU that are taken where tensors (or the pools they lie in) take ``tensors``.

    ``bound`` is ``value`` for what is usual, ``least`` and ``most`` for what may be needed.
    """
    stack = job.stack
    context, group, slack = (getattr(o, bound) for o in (stack.context, stack.communicator, stack.allocator))
    return context + group * groups(layout) + (tensors + library_bytes(job)) * (1 + slack)


def groups(layout: Layout) -> Quantity:
    """Kinds of groups that a GPU communicates in: tensor, pipeline, data and context (two if hybrid).

    Experts have groups of their own, one for the tokens and one for the gradients.
    """
    hybrid = (layout.data_shards > 1) * (layout.data_shards < layout.data_parallel)
    degrees = [layout.data_ranks, layout.tensor_parallel, layout.pipeline_parallel]
    degrees += [layout.head_ranks, layout.attention_cut]
    degrees += [layout.expert_parallel, layout.expert_parallel, layout.expert_tensor_parallel]
    return sum((degree > 1) * 1 for degree in degrees) + hybrid * (layout.sharding == "fsdp")


def reserved_bytes(job: Job, layout: Layout, pools: float, tensors: float) -> float:
    """Bytes that PyTorch's allocator is expected to hold.

    What its pools serve and its overhead on them; but when the GPU is full it returns what it only
    caches, so no more than there is, as long as the tensors fit.
    """
    library = library_bytes(job)
    usual = (pools + library) * (1 + job.stack.allocator.value)
    room = job.cluster.gpu.usable_bytes - job.stack.context.value
    room -= job.stack.communicator.value * float(groups(layout))
    return max(tensors + library, min(usual, room))


def tensor_capacity(job: Job, layout: Layout) -> Quantity:
    """Bytes that tensors may fill so that the layout fits for sure: the budget less what lies outside."""
    stack = job.stack
    outside = stack.context.most + stack.communicator.most * groups(layout)
    budget = job.cluster.capacity_bytes * job.stretch - outside
    return budget / (1 + stack.allocator.most) - library_bytes(job)
