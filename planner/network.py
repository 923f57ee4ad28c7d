"""How long a collective takes, by where its group of GPUs lies.

Ranks are laid out as Megatron lays them: tensor innermost, then data, pipeline outermost. A group
of n ranks at a stride then lies within one fast domain (NVLink) or across nodes. Times are those
of ring algorithms: Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002; the factor on the
buffer's size is what nccl-tests calls bus bandwidth over algorithm bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.specs import ClusterSpec
from strategies.base import Collective, Quantity
from strategies.layout import Layout

PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""How often a ring passes the buffer around."""


@dataclass(frozen=True)
class Network:
    """The links of a cluster at what they achieve: bytes per second, seconds per hop."""

    gpus: int
    domain: int
    intra: float
    inter: float
    intra_latency: float
    inter_latency: float

    @staticmethod
    def of(cluster: ClusterSpec) -> Network:
        """The network of a cluster, from its GPU's catalog entry."""
        gpu = cluster.gpu
        reach = {name: figure.value for name, figure in gpu.achievable.items()}
        delay = {name: figure.value for name, figure in gpu.latency_s.items()}
        return Network(
            gpus=cluster.num_gpus,
            domain=fast_domain(cluster),
            intra=gpu.intra_node.bytes_per_s * reach["intra_node"],
            inter=gpu.network.bytes_per_s * reach["network"],
            intra_latency=delay["intra_node"],
            inter_latency=delay["network"],
        )

    def ring(self, n: Quantity, stride: Quantity) -> tuple[Any, Any]:
        """Bytes per second and seconds of latency of one pass round a ring.

        A ring within a domain runs at the domain's speed. One across nodes uses the network of
        every member that it has in a node, up to the domain's own speed.
        """
        inside = np.maximum(1, np.minimum(n, self.domain // np.maximum(stride, 1)))
        within = self.inside(n * stride)
        speed = np.where(within, self.intra, np.minimum(self.intra, inside * self.inter))
        hops = np.where(
            within,
            (n - 1) * self.intra_latency,
            (n / inside - 1) * self.inter_latency + (inside - 1) * self.intra_latency,
        )
        return speed, hops

    def inside(self, span: Quantity) -> Any:
        """Do blocks of that many neighbouring ranks lie within fast domains, none across two?"""
        span = np.maximum(span, 1)
        return (span <= self.domain) & ((self.domain % span == 0) | (self.gpus <= self.domain))

    def seconds(self, collective: Collective, layout: Layout) -> Any:
        """Seconds that a collective takes, all its repetitions together."""
        n, stride = group(collective.axis, layout)
        speed, hops = self.ring(n, stride)
        passes = PASSES[collective.kind]
        return collective.times * passes * ((n - 1) / n * collective.size / speed + hops)

    def send_seconds(self, size: Quantity, layout: Layout) -> Any:
        """Seconds to hand ``size`` bytes to the next pipeline stage."""
        # The slowest of the stages' boundaries counts: within a node only if the pipeline is.
        return np.where(
            self.inside(layout.world_size),
            size / self.intra + self.intra_latency,
            size / self.inter + self.inter_latency,
        )


def fast_domain(cluster: ClusterSpec) -> int:
    """GPUs that share the fast links: a node, or more where NVLink spans nodes (NVL72)."""
    gpu = cluster.gpu
    return gpu.intra_node.gpus if gpu.intra_node.gpus > gpu.gpus_per_node else cluster.gpus_per_node


def group(axis: str, layout: Layout) -> tuple[Quantity, Quantity]:
    """Size of the group of an axis and the stride between its ranks."""
    tensor = layout.tensor_parallel
    match axis:
        case "tensor":
            return tensor, 1
        case "data":
            return layout.data_parallel, tensor
        case "data_shard":
            return layout.data_shards, tensor
        case "data_replicate":
            return layout.data_parallel / layout.data_shards, tensor * layout.data_shards
    raise ValueError(f"no collective runs on axis {axis!r}")
