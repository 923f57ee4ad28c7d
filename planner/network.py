"""The links of a cluster, as levels, and where on them the groups of a layout lie.

A level is a kind of unit, GPU, NVLink domain or leaf switch, and its way out. A group of n ranks at
a stride has some members in each unit that it leaves; its sibling groups have the rest of the unit's
GPUs. While they all talk, a ring of the group gets of that unit's way out

    members within a unit x bytes per second out of the unit for each of its GPUs

and the least of these, over the levels that it crosses, is its bandwidth. That is what routing all
groups' rings over the cluster's graph gives (:mod:`planner.topology`), in closed form, where units
hold whole groups or groups whole units. Where one straddles the other the members are those of a
unit that the stride fills.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import numpy as np

from planner.specs import ClusterSpec
from strategies.base import Quantity
from strategies.layout import Layout


@dataclass(frozen=True)
class Level:
    """A unit of ``gpus`` neighbouring ranks and its way out: bytes per second for each of its GPUs.

    ``latency_s`` is a step of a ring over that link under NCCL's LL protocol; ``link`` is ``NVLink``,
    ``PCI`` or ``network``.
    """

    gpus: int
    bytes_per_s: float
    latency_s: float
    link: str


class Place(NamedTuple):
    """Groups of ``n`` ranks on the levels: do they leave its units, and how many members has a unit?

    Members of a level that is not left are all ``n``.
    """

    n: Quantity
    crossed: tuple[Any, ...]
    members: tuple[Any, ...]

    @property
    def units(self) -> tuple[Any, ...]:
        """Units of each level that a group spreads over: 1 where it does not leave one."""
        return tuple(self.n / members for members in self.members)


@dataclass(frozen=True)
class Network:
    """The levels of a cluster at what they achieve, from the GPU itself outwards."""

    gpus: int
    levels: tuple[Level, ...]
    generation: int = 0  # NVIDIA's compute capability, whole number; 0 of other vendors

    @staticmethod
    def of(cluster: ClusterSpec) -> Network:
        """The network of a cluster, from its GPU's catalog entry."""
        gpu, domain = cluster.gpu, cluster.domain
        reach = {name: figure.value for name, figure in gpu.achievable.items()}
        delay = {name: figure.value for name, figure in gpu.latency_s.items()}
        inside = "PCI" if gpu.intra_node.kind.startswith("PCI") else "NVLink"
        out = gpu.network.bytes_per_s * reach["network"]
        levels = [
            Level(1, gpu.intra_node.bytes_per_s * reach["intra_node"], delay["intra_node"], inside),
            Level(domain, out, delay["network"], "network"),
        ]
        if cluster.nodes_per_leaf:
            leaf = cluster.nodes_per_leaf * cluster.gpus_per_node
            levels.append(Level(leaf, out / cluster.oversubscription, delay["network"], "network"))
        return Network(cluster.num_gpus, tuple(levels), int(gpu.compute_capability or 0))

    def holds(self, unit: int, span: Quantity) -> Any:
        """Do blocks of ``span`` neighbouring ranks lie within such units, none across two?"""
        return (span <= unit) & ((unit % np.maximum(span, 1) == 0) | (self.gpus <= unit))

    def place(self, n: Quantity, stride: Quantity, *outer: Quantity) -> Place:
        """Where groups of ``n`` ranks at a stride lie; or of several of these, their number and stride."""
        if outer:
            near, far = self.place(n, stride), self.place(*outer)
            crossed = tuple(a | b for a, b in zip(near.crossed, far.crossed, strict=True))
            members = tuple(a * b for a, b in zip(near.members, far.members, strict=True))
            return Place(near.n * far.n, crossed, members)
        crossed = tuple((n > 1) & ~self.holds(level.gpus, n * stride) for level in self.levels)
        members = tuple(
            np.where(out, np.clip(level.gpus // stride, 1, n), n)
            for out, level in zip(crossed, self.levels, strict=True)
        )
        return Place(n, crossed, members)

    def bandwidth(self, place: Place) -> Any:
        """Bytes per second of a ring of each group while all of them talk; infinite in a group of one."""
        return self.slowest(place, place.members)

    def slowest(self, place: Place, sharers: tuple[Any, ...]) -> Any:
        """The least over the levels crossed of ``sharers`` times the bytes per second of one GPU."""
        speeds = [
            np.where(out, several * level.bytes_per_s, np.inf)
            for out, several, level in zip(place.crossed, sharers, self.levels, strict=True)
        ]
        return reduce(np.minimum, speeds)

    def send_bandwidth(self, layout: Layout, axis: str = "pipeline") -> Any:
        """Bytes per second from every rank of a group to the next, at the slowest boundary.

        A send has its own GPU's adapter alone. Those of a boundary share the switches' ways out with
        no others: each has what a member of a ring at the larger of stride and domain has.
        """
        n, stride = group(axis, layout)
        apart = self.place(n, np.maximum(stride, self.levels[1].gpus))
        return self.slowest(self.place(n, stride), (1, 1, *apart.members[2:]))

    def same(self, one: Layout, other: Layout) -> Any:
        """Do all groups of two layouts with equal degrees lie alike, so that no time differs?"""
        alike: Any = True
        for axis in AXES:
            if axis in LEVELS and one.context_comm != "ulysses+ring":
                continue  # a part of the axis "context" or all of it
            if all(isinstance(n, int) and n == 1 for n in group(axis, one)[::2]):
                continue
            first, second = (self.place(*group(axis, layout)) for layout in (one, other))
            for a, b in zip(
                (*first.crossed, *first.members), (*second.crossed, *second.members), strict=True
            ):
                alike = alike & (a == b)
        return alike


AXES = (
    "tensor",
    "data",
    "data_shard",
    "data_replicate",
    "pipeline",
    "context",
    "context_heads",
    "context_ring",
    "expert",
    "expert_tensor",
    "expert_data",
)
"""The axes that messages are sent along."""


LEVELS = ("context_heads", "context_ring")
"""Of Ulysses within a ring."""


def group(axis: str, layout: Layout) -> tuple[Quantity, ...]:
    """Size of the group of an axis and the stride between its ranks.

    Where it is as many of such groups at a larger stride, their number and that stride follow. A group of
    experts takes neighbours first: of the ranks that share a sequence, tensor and context parallel ones, then
    of the replicas (Megatron Core's parallel_state.py; torchtitan's parallel_dims.py). Of those that
    share a sequence neighbours hand out heads, and rings join equal heads (create_hierarchical_groups).
    """
    match axis:
        case "tensor":
            return layout.tensor_parallel, layout.stride("tp")
        case "context":
            return layout.context_parallel, layout.stride("cp")
        case "context_heads":
            return layout.head_ranks, layout.stride("cp")
        case "context_ring":
            return layout.attention_cut, layout.stride("cp") * layout.head_ranks
        case "data":
            return _with_context(layout, layout.data_parallel)
        case "data_shard":
            return _with_context(layout, layout.data_shards)
        case "data_replicate":
            replicas = layout.data_parallel // layout.data_shards
            return replicas, layout.stride("dp") * layout.data_shards
        case "pipeline":
            return layout.pipeline_parallel, layout.stride("pp")
        case "expert_tensor":
            return _carved(layout, 1, layout.expert_tensor_parallel)
        case "expert":
            return _carved(layout, layout.expert_tensor_parallel, layout.expert_parallel)
        case "expert_data":
            inner = layout.expert_tensor_parallel * layout.expert_parallel
            return _carved(layout, inner, layout.expert_shards)
    raise ValueError(f"no message is sent along axis {axis!r}")


def size_of(axis: str, layout: Layout) -> Quantity:
    """GPUs of the group of an axis."""
    return prod(group(axis, layout)[::2])


def _with_context(layout: Layout, replicas: Quantity) -> tuple[Quantity, ...]:
    c = layout.context_parallel
    if isinstance(c, int) and c == 1:
        return replicas, layout.stride("dp")
    return c, layout.stride("cp"), replicas, layout.stride("dp")


def _carved(layout: Layout, inner: Quantity, n: Quantity) -> tuple[Quantity, ...]:
    """Groups of ``n`` ranks that are ``inner`` apart, counted over tensor, context and then data ranks."""
    near = layout.tensor_parallel * layout.context_parallel
    within = np.clip(near // inner, 1, n)  # members that share a sequence
    first = layout.stride("tp") * np.minimum(inner, near)
    second = layout.stride("dp") * np.maximum(inner // near, 1)
    return within, first, n // within, second
