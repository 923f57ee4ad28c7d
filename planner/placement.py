"""Where every rank runs: its node, its GPU there, and its place in the groups of the layout.

Frameworks number ranks over nodes in the order in which the nodes are started, so a placement is an order of
nodes. In all of them the ranks of a pipeline stage follow each other where pipeline parallelism is the
outermost axis: a stage is then a block of nodes, and blocks are what is kept together under a leaf switch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from planner import __version__
from planner.errors import InputError
from planner.files import plain
from planner.hostlist import names_of
from planner.network import Network, group
from planner.packing import pack
from strategies.layout import Layout

if TYPE_CHECKING:
    from planner.export.base import Subject

SCHEMA = "planner.placement/1"
MOST_RANKS = 200_000
"""That are listed one by one."""
LONGEST_NAME = 255
"""Characters of a node's name at most, as of a host's."""


def stage_nodes(subject: Subject) -> int | None:
    """Nodes that one pipeline stage fills, which follow each other; all of them where there is one stage.

    None where a stage is no block of whole nodes: where it fills a node in part, or where pipeline
    parallelism is not the outermost axis of the rank order.
    """
    layout, whole = subject.layout, subject.per_node * subject.layout.pipeline_parallel
    outermost = layout.pipeline_parallel == 1 or layout.rank_order.endswith("-pp")
    return subject.plan.num_gpus // whole if outermost and subject.plan.num_gpus % whole == 0 else None


def block_nodes(subject: Subject) -> int:
    """Nodes of the blocks that are kept together: of the outermost axis that has more than one member.

    Those of a pipeline stage, mostly; of a pipeline, where replicas are outermost; of the replicas that
    share out the model between them, in hybrid sharding. All nodes, where such a block is no whole nodes.
    """
    layout = subject.layout
    replicas = layout.data_parallel // layout.data_shards
    degrees = {"pp": layout.pipeline_parallel, "dp": layout.data_parallel if replicas == 1 else replicas}
    if layout.pipeline_parallel == 1 and replicas == 1:
        return subject.nodes  # one group of neighbours: nothing divides it
    outer = next((axis for axis in layout.rank_order.split("-")[::-1] if degrees.get(axis, 1) > 1), "")
    whole = subject.per_node * degrees.get(outer, 1)
    return subject.plan.num_gpus // whole if subject.plan.num_gpus % whole == 0 else subject.nodes


class Rank(NamedTuple):
    """A process: its node and GPU there, and its number in each of its groups."""

    rank: int
    node: str
    gpu: int
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int


def coordinates(layout: Layout, rank: int) -> tuple[int, int, int, int, int]:
    """The number of a rank in its tensor, context, data, pipeline and expert parallel group.

    >>> coordinates(Layout(tensor_parallel=8, data_parallel=4, pipeline_parallel=2), 43)
    (3, 0, 1, 1, 0)
    """
    degrees = {
        "tp": layout.tensor_parallel,
        "cp": layout.context_parallel,
        "dp": layout.data_parallel,
        "pp": layout.pipeline_parallel,
    }
    tp, cp, dp, pp = (rank // int(layout.stride(axis)) % degree for axis, degree in degrees.items())
    within, near, beyond, far = (int(number) for number in group("expert", layout))
    return tp, cp, dp, pp, rank // near % within + within * (rank // far % beyond)


@dataclass(frozen=True)
class Placement:
    """Nodes in the order of their ranks. ``leaves`` are theirs, empty where it is not known.

    ``block`` nodes at a time belong together (:func:`block_nodes`); ``parted`` blocks lie under several
    leaves nevertheless, and ``changes`` times the leaf is another from one node to the next. ``asked`` is
    whether somebody named the nodes.
    """

    subject: Subject
    nodes: tuple[str, ...]
    leaves: tuple[str, ...]
    asked: bool = False

    @property
    def block(self) -> int:
        """Nodes that belong together."""
        return block_nodes(self.subject)

    @property
    def parted(self) -> int:
        """Blocks that lie under several leaves."""
        return sum(
            len(set(self.leaves[at : at + self.block])) > 1 for at in range(0, len(self.nodes), self.block)
        )

    @property
    def changes(self) -> int:
        """How often neighbouring nodes lie under different leaves."""
        return sum(one != other for one, other in pairwise(self.leaves))

    def ranks(self) -> Iterator[Rank]:
        """Every process, in order."""
        layout, each = self.subject.layout, self.subject.per_node
        for rank in range(self.subject.plan.num_gpus):
            node, gpu = divmod(rank, each)
            yield Rank(rank, self.nodes[node], gpu, *coordinates(layout, rank))

    def slots(self) -> Iterator[tuple[str, int]]:
        """Every node with the processes on it; the last may have fewer."""
        each, left = self.subject.per_node, self.subject.plan.num_gpus
        for node in self.nodes:
            yield node, min(each, left)
            left -= each

    def notes(self) -> Iterator[str]:
        """What is not as good as it could be with other nodes."""
        if self.parted:
            blocks = len(self.nodes) // self.block
            yield (
                f"{self.parted} of {blocks} blocks of {self.block} nodes lie under several leaf switches: no "
                "choice of these nodes parts fewer"
            )

    def hostfile(self) -> str:
        """Nodes and slots in order, as DeepSpeed's launcher and Open MPI's ``--hostfile`` read them.

        What the plan assumes is in the files that start it.
        """
        head = "".join(f"{line}\n" for line in self.subject.header().splitlines()[:2])
        return head + "".join(f"{node} slots={slots}\n" for node, slots in self.slots())

    def document(self) -> dict[str, Any]:
        """As JSON values: every node with its leaf and its ranks. Raises InputError for too many of them."""
        if (count := self.subject.plan.num_gpus) > MOST_RANKS:
            raise InputError(f"{count:,} ranks are not listed one by one: {MOST_RANKS:,} at most are")
        ranks = self.ranks()
        first, _, *axes = (name for name in Rank._fields if name != "node")
        return {
            "schema": SCHEMA,
            "_planner": f"planner {__version__}, plan {self.subject.digest}",
            "layout": self.subject.layout.describe(),
            "block_nodes": self.block,
            "parted_blocks": self.parted,
            "leaf_changes": self.changes,
            "columns": [first, "gpu", *axes],
            "nodes": [
                {
                    "node": node,
                    "leaf": leaf,
                    "ranks": [[one.rank, *one[2:]] for one in islice(ranks, slots)],
                }
                for (node, slots), leaf in zip(self.slots(), self.leaves, strict=True)
            ],
        }

    def to_json(self) -> str:
        """The document as text."""
        return json.dumps(self.document()) + "\n"


def place(
    subject: Subject,
    nodes: Sequence[str] = (),
    leaves: Mapping[str, str] | None = None,
    domains: Mapping[str, str] | None = None,
) -> Placement:
    """The nodes to take out of those that are free, in the order of ranks.

    ``leaves`` and ``domains`` name the leaf switch and the NVLink domain of nodes (a domain of several, as
    NVL72's). Without leaves ``nodes`` are taken in the order given, as many as are needed; without nodes
    they are ``node-0`` and on, under leaves as the cluster has them. Tensor parallel groups that span nodes
    stay inside a domain.

    Raises InputError for too few nodes, one that is named twice or cannot be a name, and where a tensor
    parallel group cannot stay inside a domain.
    """
    given = list(nodes) or [f"node-{number}" for number in range(subject.nodes)]
    _check_names(given)
    if len(given) < subject.nodes:
        raise InputError(
            f"{len(given)} nodes are given, the plan takes {subject.nodes} of {subject.per_node} GPUs: "
            "give more, or plan for fewer GPUs (planner alternatives)"
        )
    per_leaf = subject.cluster.nodes_per_leaf
    if not nodes and per_leaf and leaves is None:
        leaves = {node: f"leaf-{number // per_leaf}" for number, node in enumerate(given)}
    unit = unit_nodes(subject)
    units = _units(given, leaves or {}, domains, unit)
    if len(units) * unit < subject.nodes:
        raise InputError(
            f"a tensor parallel group takes {unit} nodes of one NVLink domain, the plan {subject.nodes} such "
            f"nodes: {len(units) * unit} are free; give whole domains, or plan with a smaller -tp"
        )
    count = -(-subject.nodes // unit)
    taken = units[:count] if leaves is None else _packed(subject, units, leaves, unit)
    order = [node for one in taken for node in one][: subject.nodes]
    return Placement(
        subject, tuple(order), tuple((leaves or {}).get(node, "") for node in order), bool(nodes)
    )


def place_on(subject: Subject, text: str) -> Placement:
    """The same on nodes as Slurm lists them, a slash between leaf switches: ``h100-[1-8]/h100-[9-16]``."""
    groups = [names_of(part) for part in text.split("/")]
    leaves = {node: f"leaf-{number}" for number, group in enumerate(groups, 1) for node in group}
    names = [node for group in groups for node in group]
    return place(subject, names, leaves if len(groups) > 1 else None)


def _check_names(nodes: Sequence[str]) -> None:
    for node in nodes:
        if (
            not node
            or len(node) > LONGEST_NAME
            or not all(c.isascii() and (c.isalnum() or c in "-._") for c in node)
        ):
            raise InputError(f"node {plain(node)!r}: a name has letters, digits, '-', '.' and '_' only")
        if node.startswith("-"):
            raise InputError(f"node {plain(node)!r}: a name does not start with '-'")
    if len(set(nodes)) < len(nodes):
        twice = next(node for at, node in enumerate(nodes) if node in nodes[:at])
        raise InputError(f"node {plain(twice)} is given twice: name every node once")


def unit_nodes(subject: Subject) -> int:
    """Nodes that a tensor parallel group spans inside a domain of several nodes; 1 where it spans none.

    A group that no domain holds, or that lies across its nodes, is the plan's own doing: it says so.
    """
    layout, network = subject.layout, Network.of(subject.cluster)
    span = layout.tensor_parallel * int(layout.stride("tp"))
    if span <= subject.per_node or network.place(*group("tensor", layout)).crossed[1]:
        return 1
    return int(span // subject.per_node)


def _units(
    nodes: Sequence[str], leaves: Mapping[str, str], domains: Mapping[str, str] | None, unit: int
) -> list[tuple[str, ...]]:
    """Groups of ``unit`` nodes of one domain (and leaf), those of a domain next to each other."""
    if domains is None and unit == 1:
        return [(node,) for node in nodes]
    homes: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        homes.setdefault((leaves.get(node, ""), (domains or {}).get(node, "")), []).append(node)
    return [
        tuple(home[at : at + unit]) for home in homes.values() for at in range(0, len(home) - unit + 1, unit)
    ]


def _packed(
    subject: Subject, units: list[tuple[str, ...]], leaves: Mapping[str, str], unit: int
) -> list[tuple[str, ...]]:
    """Units in the order of their leaves' blocks (planner/packing.py)."""
    homes: dict[str, list[tuple[str, ...]]] = {}
    for one in units:
        homes.setdefault(leaves.get(one[0], ""), []).append(one)
    wanted, size = -(-subject.nodes // unit), block_nodes(subject)
    whole = size // unit if size % unit == 0 else wanted
    free, queues = [len(home) for home in homes.values()], [iter(home) for home in homes.values()]
    return [one for leaf, count in pack(free, wanted // whole, whole) for one in islice(queues[leaf], count)]
