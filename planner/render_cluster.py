"""What a scheduler's inventory has, and whether a plan fits it, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from planner.discovery.inventory import Inventory, Node, Pool
from planner.discovery.verdicts import Verdict, short
from planner.files import plain
from planner.render import grid

WORDS = {
    "total": ("fits the cluster", "does not fit the cluster", "nodes"),
    "healthy": ("fits when healthy", "does not fit when healthy", "in service"),
    "now": ("fits today", "does not fit today", "free"),
}
"""Of each verdict: where it holds, where it does not, and what its nodes are."""
MOST = 12
"""Nodes, leaves or refusals that are listed, each."""


def show_inventory(console: Console, inventory: Inventory) -> None:
    """Pools in rows; nodes that are out of service or in use; what cannot be planned on; notes."""
    names = ("pool", "memory", "nodes", "in service", "free", "GPUs free", "leaves", "domains", "partitions")
    left = ("pool", "leaves", "partitions")
    table = grid(*names, left=left, wrap=("leaves", "partitions"), spare=("domains", "memory", "partitions"))
    for pool in inventory.pools:
        table.add_row(*map(Text, _cells(pool)))
    console.print(table)
    for pool in inventory.pools:
        _show_away(console, pool)
    if inventory.refused:
        console.print()
        console.print(Text("Not planned on", style="bold"))
        table = grid("GPUs", "nodes", "because", left=("GPUs", "because"), wrap=("because",))
        for one in inventory.refused[:MOST]:
            table.add_row(*map(Text, (plain(one.label), str(len(one.nodes)), one.reason)))
        console.print(table)
    if notes := [*(note for pool in inventory.pools for note in pool.notes), *inventory.notes]:
        console.print()
        for note in notes:
            console.print(Text(f"Note: {note}", style="dim"))


def _cells(pool: Pool) -> tuple[str, ...]:
    free = str(len(pool.whole("now"))) if pool.known else "?"
    free_gpus = f"{pool.gpus('now')} of {pool.gpus('total')}" if pool.known else "?"
    domains = {node.domain for node in pool.nodes if node.domain}
    return (
        pool.name,
        f"{pool.gpu.memory_bytes / 2**30:.0f} GiB",
        str(len(pool.nodes)),
        str(len(pool.whole("healthy"))),
        free,
        free_gpus,
        _listed([f"{leaf} {count}" for leaf, count in pool.leaves().items()]) or "-",
        str(len(domains) or "-"),
        _listed([f"{name} {count}" for name, count in pool.partitions.items()]) or "-",
    )


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:MOST]) + (" ..." if len(parts) > MOST else "")


def _show_away(console: Console, pool: Pool) -> None:
    """Nodes that no job gets whole now, those with the same reason together."""
    groups: dict[tuple[str, str], list[Node]] = {}
    for node in pool.nodes:
        whole = node.healthy == node.gpus and node.free in (node.gpus, None) and not node.busy
        if not whole:
            told = f"{node.free or 0} free" if node.healthy else "out"
            groups.setdefault((told, node.why or node.state), []).append(node)
    if not groups:
        return
    console.print()
    console.print(Text(f"{pool.name}: not whole now", style="bold"))
    table = grid(
        "nodes", "GPUs each", "because", left=("nodes", "GPUs each", "because"), wrap=("nodes", "because")
    )
    for (told, why), nodes in list(groups.items())[:MOST]:
        table.add_row(*map(Text, (short([node.name for node in nodes]), told, why)))
    console.print(table)
    if len(groups) > MOST:
        console.print(Text(f"and {len(groups) - MOST} more reasons", style="dim"))


def show_verdicts(console: Console, found: Sequence[Verdict], slurm: bool = False) -> None:
    """The three verdicts in a line, and where a plan can run or what is missing; how Slurm is told so."""
    console.print(Text(headline(found), style="bold" if found[-1].holds else "bold yellow"))
    for line in _details(found, slurm):
        console.print(Text(f"  {line}"))


def headline(found: Sequence[Verdict]) -> str:
    """The three verdicts in words."""
    parts = []
    for one in found:
        yes, no, have = WORDS[one.fits]
        if one.holds is None:
            parts.append("fits today: not known")
        elif one.holds:
            parts.append(f"{yes} ({one.needed} of {one.nodes} {have})")
        else:
            parts.append(f"{no} ({one.needed} needed, {one.nodes} {have})")
    text = ", ".join(parts)
    return text[0].upper() + text[1:]


def _details(found: Sequence[Verdict], slurm: bool) -> Iterator[str]:
    """Why not, of the verdicts that do not hold; where, of the last that does."""
    for one in found:
        if not one.holds and one.why:
            yield f"{WORDS[one.fits][1]}: {one.why}"
    today = found[-1]
    if today.holds is False and today.leaves:
        yield "free: " + _listed([f"{count} under {leaf}" for leaf, count in today.leaves])
    holding = [one for one in found if one.holds]
    if not holding:
        return
    best = holding[-1]
    yield {"total": "where", "healthy": "where, once they are free", "now": "where"}[best.fits] + _blocks(
        best
    )
    for place in best.where[:MOST]:
        leaf = f"{place.leaf}: " if place.leaf else ""
        yield f"  {leaf}{short(place.nodes)}"
    if len(best.where) > MOST:
        yield f"  and under {len(best.where) - MOST} more"
    elif today.holds and slurm:
        nodes = "/".join(short(place.nodes, 4000) for place in best.where)
        yield f"planner export --to slurm puts it there with --set nodes={nodes}"


def _blocks(one: Verdict) -> str:
    """How much of what belongs together lies under one leaf switch."""
    if not one.blocks:
        return ":"
    if one.blocks == 1:
        return ", all under one leaf switch:" if one.together else ", under several leaf switches:"
    if one.together == one.blocks:
        return f", each block of {one.block} nodes under one leaf switch:"
    return f", {one.together} of {one.blocks} blocks of {one.block} nodes under one leaf switch each:"
