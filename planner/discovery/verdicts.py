"""Does a plan fit a pool: the nodes there are, those in service, those free now, and where?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.discovery.inventory import FITS, Fits, Node, Pool
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

    ``holds`` is None where nobody said what is free. ``where`` are nodes to run on, if it holds; ``stages``
    of ``of_stages`` pipeline stages lie under one leaf switch each there (0 of 0 where stages are no blocks
    of nodes or leaves are not known). ``leaves`` are the nodes that there are under each leaf switch.
    """

    fits: Fits
    holds: bool | None
    needed: int
    nodes: int
    where: tuple[Place, ...] = ()
    stages: int = 0
    of_stages: int = 0
    leaves: tuple[tuple[str, int], ...] = ()
    why: str = ""


def verdicts(pool: Pool, subject: Subject) -> tuple[Verdict, ...]:
    """The three verdicts on a plan: the cluster, when healthy, now.

    Raises InputError for a plan of other GPUs or of nodes that hold more.
    """
    if subject.cluster.gpu.name != pool.gpu.name:
        raise InputError(
            f"the plan is of {subject.cluster.gpu.name}, the pool of {pool.gpu.name}: choose another with --pool, "
            "or plan again on this one"
        )
    each = subject.per_node
    if each > pool.gpus_per_node:
        raise InputError(
            f"the plan has {each} GPUs on a node, {pool.name} has {pool.gpus_per_node}: plan again on it"
        )
    block = stage_nodes(subject)
    return tuple(_verdict(pool, fits, subject.nodes, each, block, subject.plan.num_gpus) for fits in FITS)


def stage_nodes(subject: Subject) -> int | None:
    """Nodes that a pipeline stage fills, one after the other; None where a stage is no block of nodes."""
    layout, whole = subject.layout, subject.per_node * subject.layout.pipeline_parallel
    outermost = layout.pipeline_parallel == 1 or layout.rank_order.endswith("-pp")
    return subject.plan.num_gpus // whole if outermost and subject.plan.num_gpus % whole == 0 else None


def _verdict(pool: Pool, fits: Fits, needed: int, each: int, block: int | None, gpus: int) -> Verdict:
    if each == pool.gpus_per_node:
        able = pool.whole(fits)
    else:
        able = tuple(node for node in pool.nodes if node.count(fits) >= each)
    leaves = tuple(sorted(pool.leaves(able).items(), key=lambda item: (-item[1], item[0])))
    short = fits == "now" and pool.quota is not None and pool.quota < gpus
    why = f"the queue still gives {pool.quota} of {gpus} GPUs" if short else ""
    if fits == "now" and not pool.known and (len(able) < needed or short):
        return Verdict(fits, None, needed, len(able), leaves=leaves, why="what is free was not said")
    if len(able) < needed or short:
        return Verdict(fits, False, needed, len(able), leaves=leaves, why=why)
    chosen = packed(able, needed, block or 1)
    together, stages = _together(chosen, block) if block and leaves else (0, 0)
    return Verdict(fits, True, needed, len(able), _places(chosen), together, stages, leaves)


def packed(nodes: Sequence[Node], needed: int, block: int = 1) -> list[Node]:
    """``needed`` of the nodes under as few leaf switches as can be, in blocks that lie under one each.

    All under the leaf that they fill best, if there is one; else leaf by leaf, the fullest first, whole
    blocks of each; what blocks are still missing then lies across leaves. Nodes without a leaf are each
    other's neighbours as they are listed. Blocks stay together in the order that is returned.
    """
    leaves: dict[str, list[Node]] = {}
    for node in nodes:
        leaves.setdefault(node.leaf, []).append(node)
    chosen: list[Node] = []
    while len(chosen) < needed:
        missing = needed - len(chosen)
        enough = [leaf for leaf, own in leaves.items() if len(own) >= missing]
        if enough:
            best = min(enough, key=lambda leaf: (len(leaves[leaf]), leaf))
            return chosen + leaves[best][:missing]
        best = max(leaves, key=lambda leaf: (len(leaves[leaf]) // block, leaf))
        taken = len(leaves[best]) // block * block
        if not taken:  # no leaf has a whole block left
            rest = sorted((own for own in leaves.values()), key=len, reverse=True)
            return chosen + [node for own in rest for node in own][:missing]
        chosen += leaves[best][:taken]
        leaves[best] = leaves[best][taken:]
    return chosen


def _together(chosen: Sequence[Node], block: int) -> tuple[int, int]:
    """Pipeline stages that lie under one leaf switch each, and all stages."""
    stages = [chosen[at : at + block] for at in range(0, len(chosen), block)]
    return sum(len({node.leaf for node in one}) == 1 for one in stages), len(stages)


def _places(chosen: Iterable[Node]) -> tuple[Place, ...]:
    """Neighbours in the order of ranks under the same leaf together."""
    places: list[Place] = []
    for node in chosen:
        if places and places[-1].leaf == node.leaf:
            places[-1] = Place(node.leaf, (*places[-1].nodes, node.name))
        else:
            places.append(Place(node.leaf, (node.name,)))
    return tuple(places)


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
