"""What a framework can be told to recompute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.stacks.base import Stack

Rows = Sequence[Mapping[str, Sequence[int]]]
"""Of every stage its rows of layers by policy."""


def one_way(stages: Rows) -> tuple[str, int | None] | None:
    """The policy that layers run under and how many of each chunk do, None standing for all.

    None of both where stages differ, or mix policies other than none.
    """
    counts = [{way: sum(own) for way, own in rows.items() if sum(own)} for rows in stages]
    ways = sorted({way.partition("+")[0] for own in counts for way in own} - {"none"})
    if not ways:
        return "none", None
    if len(ways) > 1:
        return None
    again = [sum(n for way, n in own.items() if way.startswith(ways[0])) for own in counts]
    kept = [sum(own.values()) - n for own, n in zip(counts, again, strict=True)]
    if not any(kept):
        return ways[0], None
    most = max(again)
    alike = all(n == most or not left for n, left in zip(again, kept, strict=True))
    return (ways[0], most) if alike else None


def untold(stack: Stack, stages: Rows) -> list[str]:
    """A warning where the framework cannot be told what a plan recomputes."""
    if stack.recomputes == "each":
        return []
    way = one_way(stages)
    if way is not None and (stack.recomputes == "first" or way[1] is None):
        return []
    told = "the same layers of every stage" if stack.recomputes == "first" else "all layers or none"
    return [f"not to be launched as it is: {stack.name} recomputes {told} (--launchable: only such plans)"]
