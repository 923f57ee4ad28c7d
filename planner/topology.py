"""The cluster as a graph, and every group of an axis routed over it.

GPUs hang on the NVSwitch of their domain (or on its PCIe root) and have a network adapter each. The
adapters with the same number in their domains are a *rail*: one leaf switch joins those of its nodes, a
spine joins the leaves. Edges carry ``capacity`` in bytes per second, one for each direction.

A ring over several domains exists once per member that the group has in a domain, each with its part
of the message, and leaves on a rail of its own (NCCL's channels; the hop to the GPU of that rail is
its PXN). The bandwidth of a group is then the least of capacity over load, with all sibling groups
on the graph at once. It is what :meth:`planner.network.Network.bandwidth` has in closed form; a test
holds them equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from planner.network import Network, group
from strategies.layout import Layout

if TYPE_CHECKING:
    import networkx as nx

SPINE = ("spine",)


def cluster_graph(network: Network) -> nx.DiGraph[Any]:
    """GPUs, NVSwitch domains, adapters, leaf switches by rail and the spine, with their links."""
    import networkx as nx

    graph: nx.DiGraph[Any] = nx.DiGraph()

    def link(a: tuple[Any, ...], b: tuple[Any, ...], capacity: float) -> None:
        graph.add_edge(a, b, capacity=capacity)
        graph.add_edge(b, a, capacity=capacity)

    inside, out, *above = network.levels
    leaf = above[0].gpus if above else network.gpus
    for rank in range(network.gpus):
        domain, rail = divmod(rank, out.gpus)
        switch = ("leaf", rank // leaf, rail)
        link(("gpu", rank), ("nvswitch", domain), inside.bytes_per_s)
        link(("gpu", rank), ("nic", rank), out.bytes_per_s)
        link(("nic", rank), switch, out.bytes_per_s)
        if above:
            link(switch, SPINE, above[0].bytes_per_s * leaf / out.gpus)
    return graph


def groups_of(axis: str, layout: Layout) -> list[list[int]]:
    """The ranks of every group of an axis, in the layout's rank order."""
    parts = [int(number) for number in group(axis, layout)]
    offsets = [0]
    for n, stride in zip(parts[::2], parts[1::2], strict=True):
        offsets = [one + place * stride for place in range(n) for one in offsets]
    firsts = set(range(layout.world_size))
    for n, stride in zip(parts[::2], parts[1::2], strict=True):
        firsts = {first for first in firsts if first // stride % n == 0}
    return [[first + offset for offset in sorted(offsets)] for first in sorted(firsts)]


def rings(ranks: Sequence[int], domain: int) -> Iterator[list[int]]:
    """The rings of a group: in each domain ring k enters at the k-th member and goes round from there."""
    inside = [list(members) for _, members in groupby(ranks, key=lambda rank: rank // domain)]
    for k in range(max(map(len, inside))):
        yield [rank for one in inside for rank in (*one[k % len(one) :], *one[: k % len(one)])]


def route(graph: nx.DiGraph[Any], domain: int, sender: int, receiver: int) -> list[Any]:
    """The nodes that a message passes: over NVLink to the GPU of the receiver's rail, then the network."""
    import networkx as nx

    if sender // domain == receiver // domain:
        return nx.shortest_path(graph, ("gpu", sender), ("gpu", receiver))
    exit_rank = sender // domain * domain + receiver % domain
    inside = nx.shortest_path(graph, ("gpu", sender), ("gpu", exit_rank))
    return [*inside, *nx.shortest_path(graph, ("gpu", exit_rank), ("gpu", receiver))[1:]]


def _slowest(network: Network, hops: Iterable[tuple[int, int, float]]) -> float:
    """The least of capacity over load, of all hops (sender, receiver, part of the message) at once."""
    graph, domain = cluster_graph(network), network.levels[1].gpus
    load: Counter[tuple[Any, Any]] = Counter()
    for sender, receiver, part in hops:
        for edge in pairwise(route(graph, domain, sender, receiver)):
            load[edge] += part  # type: ignore[assignment]
    return min((graph.edges[edge]["capacity"] / part for edge, part in load.items()), default=float("inf"))


def ring_bandwidth(network: Network, axis: str, layout: Layout) -> float:
    """Bytes per second of a group's rings together, all groups of the axis at once."""
    hops: list[tuple[int, int, float]] = []
    for ranks in groups_of(axis, layout):
        if len(ranks) > 1:
            several = list(rings(ranks, network.levels[1].gpus))
            for ring in several:
                hops += [(a, b, 1 / len(several)) for a, b in pairwise([*ring, ring[0]])]
    return _slowest(network, hops)


def send_bandwidth(network: Network, layout: Layout, axis: str = "pipeline") -> float:
    """Bytes per second from each rank of a group to the next, and round, but in a pipeline; all at once."""
    chains = [chain for chain in groups_of(axis, layout) if len(chain) > 1]
    closed = [chain if axis == "pipeline" else [*chain, chain[0]] for chain in chains]
    return _slowest(network, [(a, b, 1.0) for chain in closed for a, b in pairwise(chain)])
