"""What a cluster has: pools of equal GPUs, on nodes that are in service, broken, busy or free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from planner.errors import InputError, nearest_names
from planner.files import plain
from planner.specs import Gpu

Fits = Literal["total", "healthy", "now"]
FITS: tuple[Fits, ...] = ("total", "healthy", "now")
MOST_NODES = 200_000
MOST_GPUS = 1024
"""Nodes of a cluster and GPUs of a node at most: what says more is no inventory."""


@dataclass(frozen=True)
class Found:
    """A node as its scheduler describes it, before its GPUs have a kind.

    ``label`` is what the GPUs are called there, ``features`` and ``memory_mib`` what else tells their kind;
    ``gpus`` are on the node, ``healthy`` of them in service, ``free`` in no use now: None where nobody said.
    Others' jobs run on a ``busy`` node. ``why`` says what keeps GPUs back, ``refused`` why the node cannot be
    planned on at all.
    """

    name: str
    label: str
    gpus: int
    healthy: int
    free: int | None
    state: str
    busy: bool = False
    why: str = ""
    memory_mib: int | None = None
    features: tuple[str, ...] = ()
    partitions: frozenset[str] = frozenset()
    leaf: str = ""
    domain: str = ""
    refused: str = ""


@dataclass(frozen=True)
class Node:
    """A node of a pool: GPUs there are, in service (``healthy``) and in no use now (``free``, if known).

    A ``busy`` node has jobs of others, be it on its CPUs alone: no job gets it whole.
    """

    name: str
    gpus: int
    healthy: int
    free: int | None
    state: str
    busy: bool = False
    why: str = ""
    leaf: str = ""
    domain: str = ""
    partitions: frozenset[str] = frozenset()

    def count(self, fits: Fits) -> int:
        """GPUs in all, in service, or free now."""
        return {"total": self.gpus, "healthy": self.healthy, "now": self.free or 0}[fits]


@dataclass(frozen=True)
class Pool:
    """Nodes with as many GPUs of one kind each. ``quota`` is how many GPUs may be taken now, if limited."""

    gpu: Gpu
    gpus_per_node: int
    nodes: tuple[Node, ...]
    quota: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """GPUs of a node x their kind: what ``--pool`` takes."""
        return f"{self.gpus_per_node}x{self.gpu.name}"

    @property
    def known(self) -> bool:
        """Was it said of every node what is free?"""
        return all(node.free is not None for node in self.nodes)

    def whole(self, fits: Fits) -> tuple[Node, ...]:
        """Nodes with all their GPUs there, in service, or free now."""
        return tuple(
            node
            for node in self.nodes
            if node.count(fits) == self.gpus_per_node and not (fits == "now" and node.busy)
        )

    def gpus(self, fits: Fits) -> int:
        """GPUs in all, in service, or free now."""
        return sum(node.count(fits) for node in self.nodes)

    @property
    def partitions(self) -> dict[str, int]:
        """Partitions that the nodes are in, and how many of them."""
        return dict(sorted(Counter(name for node in self.nodes for name in node.partitions).items()))

    def leaves(self, nodes: Iterable[Node] | None = None) -> dict[str, int]:
        """Nodes under each leaf switch, of those given or of all; none where the switches are not known."""
        return dict(Counter(node.leaf for node in (self.nodes if nodes is None else nodes) if node.leaf))


@dataclass(frozen=True)
class Refusal:
    """Nodes that cannot be planned on, and why."""

    label: str
    nodes: tuple[str, ...]
    gpus: int
    reason: str
    partitions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Inventory:
    """Pools of a cluster, the nodes that cannot be planned on, and what else is to be known."""

    source: str
    pools: tuple[Pool, ...]
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    def pool(self, name: str | None = None) -> Pool:
        """The pool of that name, kind or partition; without a name the only one.

        Raises InputError with the pools there are where none or several are meant, as where a pool's nodes
        lie in several partitions: a job runs in one.
        """
        found, asked = list(self.pools), ""
        if name is not None:
            found, asked = self._named(name), f"--pool {plain(name)}: "
        if len(found) == 1:
            pool = found[0]
            shared = frozenset.intersection(*(node.partitions for node in pool.nodes))
            if pool.partitions and not shared:
                raise InputError(
                    f"{asked}the nodes of {pool.name} lie in partitions {_counted(pool.partitions, 'node')}, "
                    f"and a job runs in one: use --pool, as in --pool {next(iter(pool.partitions))}"
                )
            return pool
        listed = "; ".join(f"{one.name} ({_plural(len(one.nodes), 'node')})" for one in found)
        raise InputError(f"{asked}there are {len(found)} pools, and one is planned at a time: {listed}: use "
                         f"--pool {found[0].name}")  # fmt: skip

    def _named(self, name: str) -> list[Pool]:
        """Pools of that name or kind, or what of them lies in the partition of that name."""
        tidy = name.strip().lower()
        for is_meant in (
            lambda pool: pool.name.lower() == tidy,
            lambda pool: tidy in (pool.gpu.name.lower(), *pool.gpu.aliases) and not self._has_partition(name),
        ):
            if found := [pool for pool in self.pools if is_meant(pool)]:
                return found
        if found := [part for pool in self.pools if (part := within(pool, name.strip()))]:
            return found
        for one in self.refused:
            if tidy == one.label.lower() or name.strip() in one.partitions:
                raise InputError(
                    f"--pool {plain(name)}: {plain(one.label)} cannot be planned on: {one.reason}"
                )
        known = [pool.name for pool in self.pools]
        known += sorted({partition for pool in self.pools for partition in pool.partitions})
        raise InputError(
            f"--pool {plain(name)}: no pool or partition of that name: {nearest_names(name, known)}"
        )

    def _has_partition(self, name: str) -> bool:
        return any(name.strip() in pool.partitions for pool in self.pools)


def within(pool: Pool, partition: str) -> Pool | None:
    """What of a pool lies in a partition."""
    nodes = tuple(node for node in pool.nodes if partition in node.partitions)
    return replace(pool, nodes=nodes) if nodes else None


def _counted(names: Mapping[str, int], what: str, most: int = 8) -> str:
    shown = [f"{name} ({_plural(count, what)})" for name, count in list(names.items())[:most]]
    return ", ".join(shown) + (" ..." if len(names) > most else "")


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


@dataclass(frozen=True)
class Collected:
    """What a parser makes of captures: nodes, the leaf switch of nodes by name, and what is to be known.

    ``quota`` is how many GPUs a queue still gives. ``blocks`` says that leaves are Slurm's blocks: an NVLink
    domain each, where domains span nodes.
    """

    source: str
    nodes: Sequence[Found]
    leaves: Mapping[str, str] = field(default_factory=dict)
    quota: int | None = None
    notes: tuple[str, ...] = ()
    blocks: bool = False


def inventory_of(collected: Collected, said: Mapping[str, str]) -> Inventory:
    """Pools of equal GPUs. ``said`` are the kinds that a user gave to names: ``{"a100": "a100-80gb"}``.

    Raises InputError for a name that no node has, and where no node can be planned on, with the reasons.
    """
    from planner.discovery.kinds import Unresolved, kind_of

    pools: dict[tuple[str, int], list[Node]] = {}
    kinds: dict[str, Gpu] = {}
    resolved: dict[tuple[str, int | None, tuple[str, ...]], tuple[Gpu | None, str]] = {}
    assumed: dict[str, list[str]] = {}
    refused: dict[tuple[str, str], list[Found]] = {}
    for one in collected.nodes:
        if one.refused:
            refused.setdefault((one.label, one.refused), []).append(one)
            continue
        key = (one.label, one.memory_mib, one.features)
        if key not in resolved:
            try:
                resolved[key] = kind_of(*key, said)
            except Unresolved as error:
                resolved[key] = None, str(error)
        gpu, note = resolved[key]
        if gpu is None:
            refused.setdefault((one.label, note), []).append(one)
            continue
        kinds[gpu.name] = gpu
        if note and note not in assumed.setdefault(gpu.name, []):
            assumed[gpu.name].append(note)
        pools.setdefault((gpu.name, one.gpus), []).append(_node(one, gpu, collected))
    refusals = tuple(
        Refusal(
            label,
            tuple(one.name for one in nodes),
            sum(one.gpus for one in nodes),
            reason,
            frozenset(name for one in nodes for name in one.partitions),
        )
        for (label, reason), nodes in refused.items()
    )
    if unknown := [name for name in said if name not in _labels(collected.nodes)]:
        raise InputError(
            f"--gpu-type {plain(unknown[0])}: no GPUs are called so here: "
            f"{nearest_names(unknown[0], _labels(collected.nodes) or ['nothing'])}"
        )
    if not pools:
        raise InputError(f"{collected.source}: no GPUs to plan on: {_reasons(refusals)}")
    made = tuple(
        Pool(kinds[kind], per_node, tuple(nodes), collected.quota, tuple(assumed.get(kind, ())))
        for (kind, per_node), nodes in sorted(pools.items(), key=lambda item: (-len(item[1]), item[0]))
    )
    return Inventory(collected.source, made, refusals, collected.notes)


def _node(one: Found, gpu: Gpu, collected: Collected) -> Node:
    leaf = one.leaf or collected.leaves.get(one.name, "")
    joined = collected.blocks and gpu.intra_node.gpus > gpu.gpus_per_node
    more = (one.state, one.busy, one.why, leaf, one.domain or (leaf if joined else ""), one.partitions)
    return Node(one.name, one.gpus, one.healthy, one.free, *more)


def _labels(nodes: Iterable[Found]) -> set[str]:
    from planner.discovery.kinds import tidy

    return {tidy(one.label) for one in nodes}


def _reasons(refusals: Sequence[Refusal]) -> str:
    if not refusals:
        return "no node with GPUs is listed"
    told = [f"{_plural(len(one.nodes), 'node')} of {plain(one.label)}: {one.reason}" for one in refusals[:3]]
    return "; ".join(told) + (" ..." if len(refusals) > 3 else "")


def check_counts(nodes: Sequence[Found]) -> list[Found]:
    """The nodes, each once. Raises InputError for names given twice and for numbers that cannot be."""
    if len(nodes) > MOST_NODES:
        raise InputError(f"{len(nodes):,} nodes: an inventory is read up to {MOST_NODES:,}")
    seen: set[str] = set()
    for one in nodes:
        if one.name in seen:
            raise InputError(f"node {plain(one.name)} is listed twice: give one capture of each node")
        seen.add(one.name)
        numbers = (one.gpus, one.healthy, one.gpus if one.free is None else one.free)
        if not all(0 <= number <= MOST_GPUS for number in numbers) or max(numbers) > one.gpus:
            raise InputError(
                f"node {plain(one.name)}: {one.gpus} GPUs, {one.healthy} in service, {one.free} free: that "
                f"cannot be: a node has 1 to {MOST_GPUS}, and no more in service or free than that"
            )
    return [one for one in nodes if one.gpus]
