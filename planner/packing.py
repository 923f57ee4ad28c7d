"""Blocks of nodes under leaf switches that have unequal numbers of them free."""

from __future__ import annotations

from collections.abc import Sequence

Run = tuple[int, int]
"""A leaf's index, and nodes of it that follow each other."""


def pack(free: Sequence[int], blocks: int, size: int) -> list[Run]:
    """The leaves of ``blocks`` x ``size`` nodes in a row, of leaves with ``free`` nodes each.

    As few blocks as can be lie under more than one leaf: a leaf holds ``free // size`` whole ones at most,
    and so many are taken of each until there are enough. Where no block need be parted the leaves are as few
    as can be too: those with most first, the last that with least to spare. A block that must be parted
    takes what is left of the leaves with most, and lies next to the whole blocks of its leaves: how often
    the leaf changes from node to node is then little, though not always the least.

    Raises ValueError where the nodes are too few.

    >>> pack([4, 9, 6], blocks=2, size=4)
    [(1, 8)]
    >>> pack([6, 6], blocks=3, size=4)
    [(0, 6), (1, 6)]
    """
    if sum(free) < blocks * size:
        raise ValueError("too few nodes")
    whole = [count // size for count in free]
    if sum(whole) >= blocks:
        return [(leaf, count * size) for leaf, count in _fewest(whole, blocks, free)]
    parted = _parted([count % size for count in free], blocks - sum(whole), size)
    return _walk([count * size for count in whole], parted)


def _fewest(counts: Sequence[int], wanted: int, sizes: Sequence[int]) -> list[Run]:
    """``wanted`` out of the fewest holders of ``counts``: those with most, the last with least to spare."""
    left = sorted(range(len(counts)), key=lambda one: (-counts[one], sizes[one], one))
    taken: list[Run] = []
    while wanted > 0:
        enough = [one for one in left if counts[one] >= wanted]
        one = min(enough, key=lambda one: (counts[one], sizes[one], one)) if enough else left[0]
        left.remove(one)
        taken.append((one, min(wanted, counts[one])))
        wanted -= taken[-1][1]
    return taken


def _parted(rest: list[int], blocks: int, size: int) -> list[list[Run]]:
    """The pieces of each block that no leaf has room for alone, out of what leaves have left."""
    found = []
    for _ in range(blocks):
        pieces = _fewest(rest, size, rest)
        for leaf, count in pieces:
            rest[leaf] -= count
        found.append(pieces)
    return found


def _walk(whole: list[int], parted: list[list[Run]]) -> list[Run]:
    """Whole blocks and parted ones in a row, next to each other where they share a leaf."""
    runs: list[Run] = []
    waiting = dict(enumerate(whole))

    def add(leaf: int, count: int) -> None:
        if count and runs and runs[-1][0] == leaf:
            runs[-1] = leaf, runs[-1][1] + count
        elif count:
            runs.append((leaf, count))

    left = list(parted)
    while left:
        here = runs[-1][0] if runs else None
        pieces = next((one for one in left if here in dict(one)), left[0])
        left.remove(pieces)
        # From the leaf where the last block ended, if this one has a part there, to one with blocks to come.
        inside = sorted(pieces, key=lambda piece: (piece[0] != here, bool(waiting.get(piece[0]))))
        first = inside[0][0]
        add(first, waiting.pop(first, 0))
        for leaf, count in inside:
            add(leaf, count)
        last = inside[-1][0]
        add(last, waiting.pop(last, 0))
    for leaf, count in waiting.items():
        add(leaf, count)
    return runs
