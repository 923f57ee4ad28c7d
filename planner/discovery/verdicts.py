"""Does a plan fit a pool: the nodes there are, those in service, those free now, and where?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from planner.discovery.inventory import FITS, Fits, Pool
from planner.errors import InputError
from planner.files import plain

if TYPE_CHECKING:
    from planner.export.base import Subject


@dataclass(frozen=True)
class Place:
    """Nodes under a leaf switch, in the order of the ranks; ``leaf`` is empty where it is not known."""

    leaf: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Do ``needed`` nodes fit the ``nodes`` that there are, are in service or are free now?

    ``holds`` is None where nobody said what is free, ``why`` what else than their number keeps the plan off.
    ``where`` are nodes to run on, if it holds: ``together`` of ``blocks`` x ``block`` nodes that belong
    together (:func:`planner.placement.block_nodes`) lie under one leaf switch each there; no blocks where the
    switches are not known. ``leaves`` are the nodes that there are under each switch.
    """

    fits: Fits
    holds: bool | None
    needed: int
    nodes: int
    where: tuple[Place, ...] = ()
    together: int = 0
    blocks: int = 0
    block: int = 0
    leaves: tuple[tuple[str, int], ...] = ()
    why: str = ""


def verdicts(pool: Pool, subject: Subject) -> tuple[Verdict, ...]:
    """The three verdicts on a plan: the cluster, when healthy, now.

    Raises InputError for a plan of other GPUs or of nodes that hold more.
    """
    if subject.cluster.gpu.name != pool.gpu.name:
        raise InputError(
            f"the plan is of {subject.cluster.gpu.name}, the pool of {pool.gpu.name}: choose with --pool, or "
            "plan again on this one"
        )
    each = subject.per_node
    if each > pool.gpus_per_node:
        raise InputError(
            f"the plan has {each} GPUs on a node, {pool.name} has {pool.gpus_per_node}: plan again on it"
        )
    return tuple(_verdict(pool, fits, subject) for fits in FITS)


def _verdict(pool: Pool, fits: Fits, subject: Subject) -> Verdict:
    from planner.placement import place

    able = pool.whole(fits)
    if subject.per_node < pool.gpus_per_node:
        able = tuple(node for node in pool.nodes if node.count(fits) >= subject.per_node)
    needed, gpus = subject.nodes, subject.plan.num_gpus
    leaves = tuple(sorted(pool.leaves(able).items(), key=lambda item: (-item[1], item[0])))
    made = Verdict(fits, False, needed, len(able), leaves=leaves)
    if fits == "now" and pool.quota is not None and pool.quota < gpus:
        return replace(made, why=f"the queue still gives {pool.quota} of {gpus} GPUs")
    if len(able) < needed:
        known = fits != "now" or pool.known
        return made if known else replace(made, holds=None, why="what is free was not said")
    names = [node.name for node in able]
    above = {node.name: node.leaf for node in able} if leaves else None
    joined = {node.name: node.domain for node in able}
    try:
        placed = place(subject, names, above, joined if all(joined.values()) else None)
    except InputError as error:
        return replace(made, why=str(error))
    blocks = len(placed.nodes) // placed.block if leaves else 0
    return replace(
        made,
        holds=True,
        where=_places(placed.nodes, placed.leaves),
        together=blocks - placed.parted if leaves else 0,
        blocks=blocks,
        block=placed.block,
    )


def _places(nodes: Sequence[str], leaves: Sequence[str]) -> tuple[Place, ...]:
    """Neighbours in the order of ranks under the same leaf together."""
    pairs = zip(leaves, nodes, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[0])
    return tuple(Place(leaf, tuple(name for _, name in run)) for leaf, run in runs)


def short(names: Sequence[str], most: int = 200) -> str:
    """Names of nodes as Slurm lists them, numbers together.

    >>> short(["h100-1", "h100-2", "h100-3", "h100-7", "login"])
    'h100-[1-3,7],login'
    """
    runs: dict[tuple[str, int], list[int]] = {}
    alone: list[str] = []
    for name in names:
        number = re.fullmatch(r"(.*?)(\d{1,9})", name)
        if number is None:
            alone.append(name)
        else:
            padded = len(number[2]) if number[2].startswith("0") else 0
            runs.setdefault((number[1], padded), []).append(int(number[2]))
    shown = [_run(prefix, width, numbers) for (prefix, width), numbers in runs.items()]
    return plain(",".join([*shown, *alone]), most)


def _run(prefix: str, width: int, numbers: Iterable[int]) -> str:
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    parts = [f"{a:0{width}}" if a == b else f"{a:0{width}}-{b:0{width}}" for a, b in ranges]
    whole = ",".join(parts)
    return f"{prefix}{whole}" if len(ranges) == 1 and ranges[0][0] == ranges[0][1] else f"{prefix}[{whole}]"
