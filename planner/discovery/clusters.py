"""From a pool of an inventory to the cluster that is planned on."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from pydantic import ValidationError

from planner.discovery.inventory import FITS, Fits, Inventory, Pool
from planner.errors import InputError
from planner.files import plain
from planner.specs import ClusterSpec, first_problem

WORDS = {"total": "there", "healthy": "in service", "now": "free now"}
MOST_TOLD = 5
"""Refusals that a plan's assumptions name."""


def cluster_from(
    gpus: str, pool: str | None = None, fits: str | None = None, gpu_type: Sequence[str] | None = None
) -> tuple[ClusterSpec, Pool]:
    """The cluster that ``--gpus from-...`` asks for, and the pool that it is of. Raises InputError."""
    from planner.discovery import asked_of, discover, kinds_said

    asked = asked_of(gpus)
    word = fits.strip().lower() if fits else None
    basis = next((one for one in FITS if one == word), None)
    if word is not None and basis is None:
        raise InputError(f"--fits {plain(word)}: use {', '.join(FITS)}")
    inventory = discover(asked, kinds_said(gpu_type or []))
    chosen = inventory.pool(pool)
    return cluster_of(inventory, chosen, asked.count, basis), chosen


def cluster_of(inventory: Inventory, pool: Pool, count: int | None, fits: Fits | None = None) -> ClusterSpec:
    """The cluster of a pool: ``count`` GPUs of it, or all on whole nodes that are ``fits``.

    Left out, ``fits`` is ``healthy``: what a job can hope to get whole; with a count it is ``total``.
    Raises InputError where there are fewer.
    """
    basis: Fits = fits or ("healthy" if count is None else "total")
    nodes = len(pool.whole(basis))
    each = pool.gpus_per_node
    if basis == "now" and not pool.known:
        raise InputError("--fits now: what is free was not said: use --fits healthy, or give that too")
    if basis == "now" and pool.quota is not None:
        nodes = min(nodes, pool.quota // each)
    have = nodes * each
    if count is None and not nodes:
        raise InputError(f"{pool.name}: no whole node is {WORDS[basis]}: use --fits {_weaker(basis)}")
    if count is not None and count > max(have, pool.gpus(basis) if count < each else 0):
        raise InputError(
            f"{count} GPUs: {pool.name} has {have} on whole nodes {WORDS[basis]}: use {have} at most"
        )
    number = have if count is None else count
    per_node = min(each, number)
    leaf, of_leaves = _leaves(pool)
    notes = (_counted(inventory, pool, number, basis if count is None else None), *pool.notes)
    notes += (
        f"{per_node} GPUs per node, {pool.gpu.intra_node.kind} within, {pool.gpu.network.kind} between",
    )
    if number % per_node:
        notes += (f"the last node holds {number % per_node} GPUs only",)
    notes += (*of_leaves, *_domains(pool), *inventory.notes, *_refused(inventory))
    try:
        return ClusterSpec(
            gpu=pool.gpu, num_gpus=number, gpus_per_node=per_node, nodes_per_leaf=leaf, assumptions=notes
        )
    except ValidationError as error:
        raise InputError(f"{pool.name}: {first_problem(error)}") from None


def _weaker(fits: Fits) -> Fits:
    return "healthy" if fits == "now" else "total"


def _counted(inventory: Inventory, pool: Pool, number: int, fits: Fits | None) -> str:
    total, healthy, free = (len(pool.whole(one)) for one in ("total", "healthy", "now"))
    said = f"{free} free" if pool.known else "how many free, nobody said"
    basis = f", those {WORDS[fits]}" if fits else ""
    return (
        f"{number} GPUs{basis}, of {pool.name} as {inventory.source} lists it: {total} nodes, "
        f"{healthy} in service, {said}"
    )


def _leaves(pool: Pool) -> tuple[int | None, tuple[str, ...]]:
    """Nodes under a leaf switch, and what is assumed of them. Of uneven leaves the smallest counts."""
    sizes = sorted(pool.leaves().values())
    if not sizes:
        return None, ()
    if len(sizes) == 1:
        return None, ("all nodes lie under one leaf switch",)
    least, most = sizes[0], sizes[-1]
    whole = _domain_nodes(pool)
    if least % whole:
        return None, (
            f"leaf switches join {least} to {most} nodes, no whole NVLink domains of {whole}: left out",
        )
    uneven = "" if least == most else f", as the smallest: they join {least} to {most}"
    return least, (
        f"{len(sizes)} leaf switches, {least} nodes under each{uneven}; their oversubscription is not said: "
        "--oversubscription",
    )


def _domain_nodes(pool: Pool) -> int:
    """Nodes of an NVLink domain as the catalog has it; 1 where nodes are domains."""
    joined = pool.gpu.intra_node.gpus
    return joined // gcd(joined, pool.gpus_per_node) if joined > pool.gpu.gpus_per_node else 1


def _domains(pool: Pool) -> tuple[str, ...]:
    """What is assumed of NVLink domains that span nodes."""
    whole = _domain_nodes(pool)
    if whole == 1:
        return ()
    sizes: dict[str, int] = {}
    for node in pool.nodes:
        sizes[node.domain] = sizes.get(node.domain, 0) + 1
    if "" in sizes:
        return (f"NVLink domains of {whole} nodes: nobody said which nodes share one",)
    if all(size == whole for size in sizes.values()):
        return (f"{len(sizes)} NVLink domains of {whole} nodes",)
    told = f"{min(sizes.values())} to {max(sizes.values())}"
    return (f"NVLink domains of {whole} nodes, though {len(sizes)} have {told}",)


def _refused(inventory: Inventory) -> tuple[str, ...]:
    told = [
        f"left out: {len(one.nodes)} node{'s' * (len(one.nodes) != 1)} of {plain(one.label)}: {one.reason}"
        for one in inventory.refused[:MOST_TOLD]
    ]
    rest = len(inventory.refused) - MOST_TOLD
    return (*told, *([f"left out: {rest} more groups of nodes"] if rest > 0 else []))
