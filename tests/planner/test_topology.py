"""Bandwidth of groups by the closed form of the levels, against rings routed over the cluster's graph."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.network import AXES, Level, Network, group, size_of
from planner.topology import cluster_graph, groups_of, ring_bandwidth, rings, send_bandwidth
from strategies.layout import RANK_ORDERS, Layout

FACTORS = st.sampled_from([1, 1, 2, 2, 3, 4])


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A node's links are the faster ones; a leaf switch's way up is no wider than down."""
    domain, nodes, leaves = draw(st.sampled_from([1, 2, 4, 6, 8])), draw(FACTORS), draw(FACTORS)
    inside = draw(st.floats(20e9, 900e9))
    out = inside / draw(st.floats(1, 20))
    up = out / draw(st.floats(1, 8))
    levels = [Level(1, inside, 0, "NVLink"), Level(domain, out, 0, "network")]
    if draw(st.booleans()):
        levels.append(Level(domain * nodes, up, 0, "network"))
    return Network(domain * nodes * leaves, tuple(levels))


@st.composite
def layouts(draw: st.DrawFn, gpus: int) -> Layout:
    divisors = [d for d in range(1, gpus + 1) if gpus % d == 0]
    tensor = draw(st.sampled_from(divisors))
    pipeline = draw(st.sampled_from([d for d in divisors if gpus // tensor % d == 0]))
    context = draw(st.sampled_from([d for d in divisors if gpus // tensor // pipeline % d == 0]))
    heads = draw(st.sampled_from([d for d in divisors if context % d == 0]))
    data = gpus // tensor // pipeline // context
    shards = draw(st.sampled_from([d for d in divisors if data % d == 0]))
    order = draw(st.sampled_from(RANK_ORDERS))
    near = tensor * context
    own = draw(st.sampled_from([d for d in divisors if near % d == 0]))
    carved = [n * own for n in divisors if shards * near % (n * own) == 0]
    experts = draw(st.sampled_from([n // own for n in carved if near % n == 0 or n % near == 0]))
    return Layout(
        data,
        tensor,
        pipeline,
        data_shards=shards,
        rank_order=order,
        context_parallel=context,
        context_comm="ulysses+ring",
        ulysses_degree=heads,
        expert_parallel=experts,
        expert_tensor_parallel=own,
    )


def divides(network: Network, axis: str, layout: Layout) -> bool:
    """Do units hold whole groups, or a group's block and its stride whole units?"""
    parts = group(axis, layout)
    return all(
        level.gpus % length == 0 or length % level.gpus == 0
        for level in network.levels
        for n, stride in zip(parts[::2], parts[1::2], strict=True)
        for length in (stride, n * stride)
    )


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_rings_over_the_graph_get_what_the_levels_say(data: st.DataObject) -> None:
    network = data.draw(networks())
    layout = data.draw(layouts(network.gpus))
    axis = data.draw(st.sampled_from(AXES))
    assume(divides(network, axis, layout))
    closed = network.bandwidth(network.place(*group(axis, layout)))
    assert ring_bandwidth(network, axis, layout) == pytest.approx(float(closed))


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_every_rank_is_in_one_group_of_every_axis(data: st.DataObject) -> None:
    layout = data.draw(layouts(data.draw(st.sampled_from([8, 24, 64]))))
    axis = data.draw(st.sampled_from(AXES))
    groups = groups_of(axis, layout)
    assert sorted(rank for ranks in groups for rank in ranks) == list(range(layout.world_size))
    assert {len(ranks) for ranks in groups} == {size_of(axis, layout)}


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_sends_over_the_graph_get_what_the_levels_say(data: st.DataObject) -> None:
    network = data.draw(networks())
    layout = data.draw(layouts(network.gpus))
    axis = data.draw(st.sampled_from(["pipeline", "context", "context_ring"]))
    assume(divides(network, axis, layout))
    closed = float(network.send_bandwidth(layout, axis))
    assert send_bandwidth(network, layout, axis) == pytest.approx(closed)


TWO_LEAVES = Network(
    32,
    (
        Level(1, 400e9, 0, "NVLink"),
        Level(8, 50e9, 0, "network"),
        Level(16, 12.5e9, 0, "network"),
    ),
)


def test_the_graph_has_a_leaf_switch_for_each_rail_and_a_spine() -> None:
    graph = cluster_graph(TWO_LEAVES)
    assert sum(node[0] == "leaf" for node in graph) == 2 * 8
    assert graph.edges[("leaf", 0, 3), ("spine",)]["capacity"] == 2 * 12.5e9
    # All that 16 GPUs can send to the other 16, 4 : 1 oversubscribed.
    everyone = nx.DiGraph(graph)
    for rank in range(16):
        everyone.add_edge("all", ("gpu", rank), capacity=1e12)
        everyone.add_edge(("gpu", rank + 16), "others", capacity=1e12)
    assert nx.maximum_flow_value(everyone, "all", "others") == pytest.approx(16 * 12.5e9)
    assert len(cluster_graph(replace(TWO_LEAVES, levels=TWO_LEAVES.levels[:2]))) == 32 + 4 + 32 + 8


def test_groups_follow_the_rank_order() -> None:
    """Two axes of two: Megatron's default, and with the pipeline inside."""
    layout = Layout(data_parallel=2, tensor_parallel=2, pipeline_parallel=2)
    assert groups_of("tensor", layout) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups_of("data", layout) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups_of("pipeline", layout) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    inside = replace(layout, rank_order="tp-pp-dp")
    assert groups_of("pipeline", inside) == groups_of("data", layout)
    assert groups_of("data", inside) == groups_of("pipeline", layout)
    # FSDP's shards are neighbours among the data-parallel ranks, replicas lie further apart.
    # Heads are handed out among neighbours, rings join every fourth of them: parallel_state.py, docstring of
    # create_hierarchical_groups, whose third level is this ring.
    both = Layout(context_parallel=16, context_comm="ulysses+ring", ulysses_degree=4)
    assert groups_of("context_heads", both)[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups_of("context_ring", both) == [[k, k + 4, k + 8, k + 12] for k in range(4)]
    hybrid = Layout(data_parallel=4, tensor_parallel=2, data_shards=2, sharding="fsdp")
    assert groups_of("data_shard", hybrid)[:2] == [[0, 2], [1, 3]]
    assert groups_of("data_replicate", hybrid)[:2] == [[0, 4], [1, 5]]


def test_every_ring_leaves_a_domain_on_a_rail_of_its_own() -> None:
    found = list(rings([0, 1, 8, 9], 8))
    assert found == [[0, 1, 8, 9], [1, 0, 9, 8]]


def test_a_group_that_straddles_units_is_not_the_closed_forms() -> None:
    """Six neighbours on nodes of eight: the second group has two in one node and four in the next."""
    network = Network(24, TWO_LEAVES.levels[:2])
    layout = Layout(data_parallel=6, pipeline_parallel=4)
    closed = float(network.bandwidth(network.place(6, 1)))
    assert closed == 6 * 50e9  # as if its unit were full of it
    assert ring_bandwidth(network, "data", layout) != pytest.approx(closed)
