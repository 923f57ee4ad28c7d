"""Ranks on nodes: coordinates, and nodes in an order that keeps blocks under one leaf."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from planner.errors import InputError
from planner.hostlist import names_of
from planner.packing import pack
from planner.placement import block_nodes, coordinates, place, place_on, stage_nodes, unit_nodes
from planner.topology import groups_of
from strategies.layout import RANK_ORDERS, Layout
from tests.plans import subject_of


def cost(leaves: Sequence[int], size: int) -> tuple[int, int]:
    """Blocks under several leaves, and how often the leaf changes."""
    blocks = [leaves[at : at + size] for at in range(0, len(leaves), size)]
    return sum(len(set(one)) > 1 for one in blocks), sum(a != b for a, b in pairwise(leaves))


def cheapest(free: list[int], nodes: int, size: int) -> tuple[int, int]:
    """The least of all ways to take the nodes, tried one by one."""
    found: list[tuple[int, int]] = []

    def go(taken: list[int]) -> None:
        if len(taken) == nodes:
            found.append(cost(taken, size))
            return
        for leaf, left in enumerate(free):
            if left:
                free[leaf] -= 1
                go([*taken, leaf])
                free[leaf] += 1

    go([])
    return min(found)


def test_no_way_to_take_nodes_parts_fewer_blocks() -> None:
    draw = random.Random(5)
    ways = more = 0
    while ways < 150:
        size = draw.choice([1, 2, 2, 3, 4])
        blocks = draw.randint(1, 7 // size)
        free = [draw.randint(0, 6) for _ in range(draw.randint(1, 4))]
        if sum(free) < size * blocks:
            continue
        ways += 1
        taken = [leaf for leaf, count in pack(free, blocks, size) for _ in range(count)]
        assert len(taken) == size * blocks
        assert all(taken.count(leaf) <= count for leaf, count in enumerate(free))
        least = cheapest(free, size * blocks, size)
        parted, changes = cost(taken, size)
        assert parted == least[0]
        if not parted:
            assert changes == least[1]  # as few leaves as can be
        more += changes > least[1]
    assert more <= 3


def test_too_few_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        pack([3, 4], 2, 4)
    subject = subject_of("8x8xH100", tp=8, pp=4)
    with pytest.raises(InputError, match="3 nodes are given, the plan takes 8 of 8 GPUs"):
        place_on(subject, "a-[1-3]")


@pytest.mark.parametrize("order", RANK_ORDERS)
def test_coordinates_are_places_in_the_groups(order: str) -> None:
    layout = Layout(
        data_parallel=4,
        tensor_parallel=2,
        pipeline_parallel=2,
        context_parallel=2,
        expert_parallel=8,
        rank_order=order,
    )
    axes = ("tensor", "context", "data", "pipeline", "expert")
    degrees = (2, 2, 4, 2, 8)
    at = [coordinates(layout, rank) for rank in range(32)]
    for axis, (name, degree) in enumerate(zip(axes, degrees, strict=True)):
        if name == "data":  # with context parallelism these groups are of both
            continue
        for ranks in groups_of(name, layout):
            assert sorted(at[rank][axis] for rank in ranks) == list(range(degree))
            if order.startswith("tp"):
                assert [at[rank][axis] for rank in ranks] == list(range(degree))
    assert len({one[:4] for one in at}) == 32


def test_blocks_of_nodes() -> None:
    assert stage_nodes(subject_of("8x8xH100", tp=8, pp=4)) == 2
    assert stage_nodes(subject_of("8x8xH100", tp=8)) == 8
    assert stage_nodes(subject_of("1x8xH100", tp=2, pp=4)) is None
    assert stage_nodes(subject_of("8x8xH100", tp=8, pp=4, rank_order="tp-pp-dp")) is None
    assert block_nodes(subject_of("8x8xH100", tp=8, pp=4, rank_order="tp-pp-dp")) == 4
    assert block_nodes(subject_of("8x8xH100", framework="fsdp", sharding="fsdp", data_shards=16)) == 2
    assert block_nodes(subject_of("8x8xH100", framework="fsdp", sharding="fsdp")) == 8


def test_stages_take_blocks_of_free_nodes_under_one_leaf() -> None:
    subject = subject_of("8x8xH100", tp=8, pp=4)
    placed = place_on(subject, "a-[1-3]/b-[1-5]/c-[1-3]")
    assert placed.parted == 0
    assert placed.nodes == ("b-1", "b-2", "b-3", "b-4", "a-1", "a-2", "c-1", "c-2")
    assert list(placed.notes()) == []
    tight = place_on(subject, "a-[1-3]/b-[1-3]/c-[1-2]")
    assert tight.parted == 1
    assert "1 of 4 blocks of 2 nodes lie under several leaf switches" in next(tight.notes())
    assert place_on(subject, "a-1,c-2,b-[5-10]").nodes == ("a-1", "c-2", *(f"b-{n}" for n in range(5, 11)))
    first, *_, last = placed.ranks()
    assert (first.node, first.gpu, first.pp) == ("b-1", 0, 0)
    assert (last.node, last.gpu, last.tp, last.dp, last.pp) == ("c-2", 7, 7, 1, 3)
    assert place(subject_of("4x8xH100", tp=8, pp=2, leaf=2)).leaves == (
        "leaf-0",
        "leaf-0",
        "leaf-1",
        "leaf-1",
    )


def test_tensor_parallel_groups_of_several_nodes_stay_in_a_domain() -> None:
    subject = subject_of("144xGB200-NVL72", tp=8, pp=2)
    assert unit_nodes(subject) == 2
    nodes = [f"n{number}" for number in range(40)]
    domains = {node: f"rack-{number // 19}" for number, node in enumerate(nodes)}
    with pytest.raises(InputError, match="2 nodes of one NVLink domain"):
        place(subject, nodes[:36], domains=domains)
    placed = place(subject, nodes, {node: "leaf" for node in nodes}, domains)
    each = [placed.nodes[at : at + 2] for at in range(0, 36, 2)]
    assert all(len({domains[node] for node in pair}) == 1 for pair in each)


def test_what_is_written() -> None:
    subject = subject_of("2x8xH100", tp=8, pp=2)
    placed = place_on(subject, "a/b")
    assert placed.hostfile().splitlines()[-2:] == ["a slots=8", "b slots=8"]
    assert placed.hostfile().startswith("# planner ")
    document = json.loads(placed.to_json())
    assert document["schema"] == "planner.placement/1"
    ranks = [
        dict(zip(document["columns"], row, strict=True)) for one in document["nodes"] for row in one["ranks"]
    ]
    assert ranks[9] == {"rank": 9, "gpu": 1, "tp": 1, "cp": 0, "dp": 0, "pp": 1, "ep": 0}
    assert [one["leaf"] for one in document["nodes"]] == ["leaf-1", "leaf-2"]
    part = subject_of("12xH100", pp=2, accum=6)
    assert [slots for _, slots in place(part).slots()] == [8, 4]
    assert len(list(place(part).ranks())) == 12


def test_ranks_of_the_largest_clusters_are_not_listed() -> None:
    many = place(subject_of("300000xH100", accum=1))
    with pytest.raises(InputError, match="300,000 ranks"):
        many.to_json()


@pytest.mark.parametrize(
    "text", ["a b", "a,a", "-x", "$(x)", "a[1-2", "a[x]", "", "a//b", "a\nb", "é", "a[1-999999]"]
)
def test_names_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        place_on(subject_of("2x8xH100", tp=8, pp=2), text)


def test_lists_of_nodes() -> None:
    assert names_of("r[1-2]n[08-09]x, z") == ["r1n08x", "r1n09x", "r2n08x", "r2n09x", "z"]
