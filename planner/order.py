"""In which order unlike blocks lie on the stages: rows of layers, and the kinds that they are made of.

A *row* is one layer in each of a stage's chunks. Stages take rows from the first on; row x of chunk c is
layer ``c R + x`` of ``R`` rows, or counted from the model's end in the second chunk of a folded schedule.
Short chunks at the ends lack one layer: there a row counts it as its neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from planner.model import Block, numbered
from strategies.layout import Layout
from strategies.pipeline_parallel import FOLDED


@dataclass(frozen=True)
class Turn:
    """Where a backward goes from one kind of row to another: the part of each kind that is ``done``, the kind
    that ``ends`` there, for now, and the one that ``begins``."""

    done: tuple[float, ...]
    ends: int
    begins: int


@dataclass(frozen=True)
class Order:
    """``rows`` are the kinds of row, each a tuple of the kinds of block in it; ``sequence`` the kind of every
    row from the first stage's first to the last stage's last, empty where all are alike; ``ends`` the kinds
    of the model's last block and of its first."""

    rows: tuple[tuple[int, ...], ...] = ((0,),)
    sequence: tuple[int, ...] = ()
    ends: tuple[int, int] = (0, 0)

    def whole(self, rows: int) -> Order:
        """The same with its sequence, of that many rows."""
        return self if self.sequence else replace(self, sequence=(0,) * rows)

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each kind; none where the sequence is not given."""
        return tuple(self.sequence.count(kind) for kind in range(len(self.rows)) if self.sequence)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Stretches of equal rows: their kind and their length."""
        return [(kind, len(list(same))) for kind, same in groupby(self.sequence)]

    @property
    def turns(self) -> list[Turn]:
        """Every turn of a backward through all rows."""
        found, done = [], [0] * len(self.rows)
        runs = self.runs[::-1]
        for (kind, length), (following, _) in pairwise(runs):
            done[kind] += length
            parts = tuple(n / of for n, of in zip(done, self.counts, strict=True))
            found.append(Turn(parts, kind, following))
        return found

    def split(self, counts: list[int]) -> list[tuple[int, ...]]:
        """Rows of each kind on each stage, where the stages hold ``counts`` rows."""
        found, start = [], 0
        for count in counts:
            part = self.sequence[start : start + count]
            found.append(tuple(part.count(kind) for kind in range(len(self.rows))))
            start += count
        return found


def layer_at(chunk: int, row: int, layers: int, chunks: int, schedule: str) -> int:
    """The layer that a row has in a chunk: -1 or ``layers`` where a short chunk lacks it."""
    short = -layers % chunks
    if schedule in FOLDED:
        if schedule == "dualpipe":  # every layer lies on two stages, as far from either end
            return row if chunk == 0 else layers - 1 - row
        return row - (short == 2) if chunk == 0 else layers + short - 1 - row - (short == 2)
    return chunk * ((layers + short) // chunks) + row - (short == 2)


def order_of(given: tuple[Block, ...], layout: Layout) -> Order:
    """The order of a job's blocks under a layout, or under a family of them with equal chunks."""
    blocks = numbered(given)
    if not any(blocks):
        return Order()
    first = layout.chunks
    chunks = int(first if isinstance(first, int) else first.flat[0])
    depth = len(blocks)
    rows = depth if layout.schedule == "dualpipe" else -(-depth // chunks)
    made = []
    for row in range(rows):
        layers = (layer_at(chunk, row, depth, chunks, layout.schedule) for chunk in range(chunks))
        made.append(tuple(sorted(blocks[min(max(layer, 0), depth - 1)] for layer in layers)))
    known = {row: index for index, row in enumerate(dict.fromkeys(made))}
    return Order(tuple(known), tuple(known[row] for row in made), (blocks[-1], blocks[0]))
