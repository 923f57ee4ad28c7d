"""Times of collectives against published measurements, and against arithmetic by hand.

tests/data/nccl_tests.json holds the measurements: bus bandwidths by size as nccl-tests prints them, in
GB/s, or times in microseconds, each table with its source.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pytest

from planner import ClusterSpec, Layout
from planner.collectives import BASE_S, PROTOCOLS, Messages
from planner.network import Level, Network
from strategies.base import Collective

MIB, GIB = 2**20, 2**30
BUS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
"""Of (n - 1)/n: bus bandwidth over algorithm bandwidth (NVIDIA/nccl-tests, doc/PERFORMANCE.md)."""


class Point(NamedTuple):
    gpu: str
    gpus: int
    kind: str
    size: int
    error: float  # predicted over measured seconds, less 1

    @property
    def across(self) -> bool:
        return self.gpus > 8 and "NVL72" not in self.gpu


@cache
def points() -> list[Point]:
    found = []
    for table in json.loads((Path(__file__).parents[1] / "data" / "nccl_tests.json").read_text()):
        n, kind = table["gpus"], table["kind"]
        cluster = ClusterSpec.parse(f"{n}x{table['gpu']}")
        if "network_gbps" in table:  # fewer adapters than the catalog's servers have
            slower = cluster.gpu.network.model_copy(update={"bytes_per_s": table["network_gbps"] * 1e9})
            gpu = cluster.gpu.model_copy(update={"network": slower})
            cluster = cluster.model_copy(update={"gpu": gpu})
        messages = Messages.of(cluster, Layout(data_parallel=n))
        for size, figure in table.get("us") or table["bus_gbps"]:
            bus = BUS[kind] * (n - 1) / n * size / (figure * 1e9)
            measured = figure * 1e-6 if "us" in table else bus
            predicted = float(messages.seconds(Collective(kind, "data", size)))
            found.append(Point(cluster.gpu.name, n, kind, size, predicted / measured - 1))
    return found


def errors(of: Callable[[Point], bool]) -> list[float]:
    return [abs(point.error) for point in points() if of(point)]


def test_large_messages_take_as_long_as_measured() -> None:
    """In a domain, 256 MiB and more: 49 points of A100, H100, H200, H800, B200 and NVL72."""
    inside = errors(lambda point: not point.across and point.size >= 256 * MIB)
    assert len(inside) > 45
    assert median(inside) < 0.03
    assert max(inside) < 0.15


def test_what_a_layer_sends_is_within_a_third_of_what_was_measured() -> None:
    """In a domain, 16 MiB to 256 MiB: in-switch reductions reach their speed later than modelled."""
    inside = errors(lambda point: not point.across and 16 * MIB <= point.size < 256 * MIB)
    assert median(inside) < 0.27
    assert max(inside) < 0.47


def test_small_messages_are_within_a_factor_of_three() -> None:
    inside = errors(lambda point: not point.across and point.size < 16 * MIB)
    assert median(inside) < 0.31
    assert max(inside) < 0.65


def test_collectives_across_nodes() -> None:
    """Three and four nodes of A100 and H200, all-to-all over eight of H800, smallest over 16 of H100."""
    across = errors(lambda point: point.across and "B200" not in point.gpu)
    assert len(across) >= 6
    assert max(across) < 0.2


def test_in_switch_reductions_exceed_what_the_links_could_do() -> None:
    """NVIDIA/nccl-tests issue 212: about 480 GB/s on 8 H100, 370 by a ring, of 450."""

    def bus_gbps(kind: str, gpu: str, n: int, size: int = 16 * GIB) -> float:
        messages = Messages.of(ClusterSpec.parse(f"8x{gpu}"), Layout(data_parallel=n, tensor_parallel=8 // n))
        taken = float(messages.seconds(Collective(kind, "data", size)))
        return BUS[kind] * (n - 1) / n * size / taken / 1e9

    assert bus_gbps("all_reduce", "H100", 8) == pytest.approx(480, rel=0.02)
    assert bus_gbps("all_gather", "H100", 8) == pytest.approx(370, rel=0.01)
    assert bus_gbps("all_reduce", "A100", 8) == pytest.approx(235, rel=0.01)
    # NCCL takes the ring with few members; the gain grows with them (stas00/ml-engineering).
    assert bus_gbps("all_reduce", "B200", 4) == pytest.approx(bus_gbps("all_gather", "B200", 4), rel=1e-3)
    assert bus_gbps("all_reduce", "H200", 8) > 1.25 * bus_gbps("all_gather", "H200", 8)


NODES = Network(
    1024, (Level(1, 200e9, 0.6e-6, "NVLink"), Level(8, 20e9, 2.7e-6, "network")), generation=8
)  # NCCL's own latencies


def ways(kind: str, layout: Layout, size: float, network: Network = NODES) -> float:
    return float(Messages(network, layout).seconds(Collective(kind, "data", size)))


def test_the_smallest_message_takes_as_long_as_nccl_says() -> None:
    """NVIDIA/nccl issue 1453 logs 25.87 us for 4 KiB on two nodes of eight H100: a tree under LL."""
    network = Network(16, NODES.levels, generation=9)
    assert ways("all_reduce", Layout(data_parallel=16), 4096, network) == pytest.approx(25.87e-6, rel=0.03)
    # Within a node it is 6.6 us and 14 steps of a ring under LL.
    alone = ways("all_reduce", Layout(data_parallel=8, tensor_parallel=1), 8)
    assert alone == pytest.approx(6.6e-6 + 14 * 0.6e-6, rel=1e-3)


def test_trees_need_few_steps_and_rings_have_the_bandwidth() -> None:
    """64 nodes: a ring passes 1,022 links twice, a tree the height of two trees and two chains."""
    layout = Layout(data_parallel=512)
    small, large = ways("all_reduce", layout, 1024), ways("all_reduce", layout, 1e12)
    assert small == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 6 * 5e-6), rel=0.01)
    assert large == pytest.approx(2 * 511 / 512 * 1e12 / 160e9, rel=0.01)
    # Only an all-reduce can go up and down a tree.
    assert ways("all_gather", layout, 1024) > 5 * small


def test_two_nodes_tree_sends_half_of_what_a_ring_does() -> None:
    """NVIDIA/nccl-tests issue 196: on two nodes trees exceed the network's bandwidth."""
    two, four = (ways("all_reduce", Layout(data_parallel=8 * k), 1e12) for k in (2, 4))
    assert four / two > 1.1
    assert two == pytest.approx(2 * 1e12 / (0.92 * 200e9), rel=0.01)


def test_an_all_to_all_is_as_fast_as_what_leaves_a_node() -> None:
    """NVIDIA/nccl-tests issue 130: on N nodes N/(N-1) times the network's bandwidth per GPU."""
    for nodes in (2, 4, 16):
        n = 8 * nodes
        taken = ways("all_to_all", Layout(data_parallel=n), 1e12)
        assert (n - 1) / n * 1e12 / taken == pytest.approx(nodes / (nodes - 1) * 20e9 * (n - 1) / n, rel=1e-3)
    assert ways("all_to_all", Layout(data_parallel=8), 1e12) == pytest.approx(7 / 8 * 1e12 / 200e9, rel=1e-3)


def test_a_broadcast_passes_the_whole_buffer_on() -> None:
    assert ways("broadcast", Layout(data_parallel=8), 1e12) == pytest.approx(1e12 / 200e9, rel=1e-3)


def test_a_group_of_one_sends_nothing() -> None:
    for kind in (*BUS, "broadcast"):
        assert ways(kind, Layout(tensor_parallel=8), 1e9) == 0


def test_larger_messages_never_take_less_and_never_run_slower() -> None:
    sizes = np.logspace(1, 11, 60)
    for kind in BUS:
        messages = Messages(NODES, Layout(data_parallel=64))
        taken = np.array([float(messages.seconds(Collective(kind, "data", size))) for size in sizes])
        assert np.all(np.diff(taken) > 0)
        assert np.all(np.diff(sizes / taken) > 0)
    assert len(PROTOCOLS) == len(BASE_S["ring"])


def test_a_family_takes_as_long_as_its_layouts_one_by_one() -> None:
    rows = [(8, 1, 1), (4, 2, 1), (16, 8, 8), (2, 4, 2), (1, 8, 16), (128, 8, 1)]
    data, tensor, pipeline = (np.array(column) for column in zip(*rows, strict=True))
    sizes = np.array([1e3, 1e6, 1e8, 1e9, 1e5, 1e7])
    for order in ("tp-dp-pp", "tp-pp-dp"):
        family = Messages(NODES, Layout(data, tensor, pipeline, data_shards=data, rank_order=order))
        for kind, axis in (("all_reduce", "data"), ("all_gather", "tensor"), ("all_to_all", "data_shard")):
            together = family.seconds(Collective(kind, axis, sizes))
            for index, row in enumerate(rows):
                alone = Messages(NODES, Layout(*row, rank_order=order))
                one = alone.seconds(Collective(kind, axis, sizes[index]))
                assert together[index] == pytest.approx(float(one), rel=1e-12)
        sends = family.send_seconds(sizes)
        assert sends[4] == pytest.approx(
            float(Messages(NODES, Layout(1, 8, 16, rank_order=order)).send_seconds(1e5))
        )
