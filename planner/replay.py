"""A step gone through: what one GPU of a stage holds, layer by layer, from forward to optimizer.

The stage works through its passes in the order of its schedule. A forward brings a layer's
activations, a backward takes them away and brings its gradients; while a layer runs backward its
working set and the strategies' buffers come and go. Every state that may be a peak is a
:class:`Snapshot`; :func:`planner.ledger.entries` takes one apart, term by term. The search's closed
form (:meth:`planner.stages.Prices.moments`) is never below the highest of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from planner.layer_price import LayerPrice
from planner.schedule import Kind, Pass, order
from planner.stages import Prices
from strategies.base import Role, Term

MOMENTS = ("forward end", "loss", "backward", "gradients complete", "optimizer step")


class Snapshot(NamedTuple):
    """What exists at one place of a step, in layers; the bytes follow from the prices.

    ``kept`` counts layer activations by policy, ``pending`` those of them whose backward is done but for
    the gradients of the weights, ``pending_heads`` the same of the heads; ``embeddings`` and ``heads``
    count those of the ends; ``arrived`` counts layers whose gradients exist in full, ``started`` is the
    fraction that exists of all others. ``place`` names the buffers' spans (planner/spans.py), ``at`` the
    kind of layer that is at work, ``policy`` the policy it runs under and ``gathered`` the layers kept
    gathered.
    """

    moment: str
    place: str
    kept: tuple[int, ...]
    embeddings: int
    heads: int
    started: float
    arrived: int
    embedding_arrived: bool
    head_arrived: bool
    gathered: int
    at: str = ""
    policy: int = 0
    pending: tuple[int, ...] = ()
    pending_heads: int = 0


@dataclass(frozen=True)
class Timeline:
    """Every snapshot of a stage's step with its bytes, in order."""

    snapshots: tuple[tuple[Snapshot, float], ...]
    pools: float
    """Bytes of all streams' pools, each as large as it ever is in the step."""

    def peaks(self) -> dict[str, tuple[Snapshot, float]]:
        """The highest snapshot of each moment, in order."""
        best: dict[str, tuple[Snapshot, float]] = {}
        for snapshot, size in self.snapshots:
            if snapshot.moment not in best or size > best[snapshot.moment][1]:
                best[snapshot.moment] = (snapshot, size)
        return {moment: best[moment] for moment in MOMENTS if moment in best}


class StageReplay:
    """One stage of a single layout, ready to be gone through."""

    def __init__(self, prices: Prices, stage: int, rows: Sequence[int]) -> None:
        self.prices, self.stage = prices, stage
        pipeline = prices.pipeline_at(stage)
        self.first, self.last = map(bool, pipeline.ends)
        self.chunks = chunk_policies(prices, rows, stage)
        self.layers = sum(len(chunk) for chunk in self.chunks)
        self.ends = [*([prices.embedding] if self.first else []), *([prices.head] if self.last else [])]
        self.copies = {role: float(pipeline.share(Term("", role, {}, 1.0))) for role in Role}
        ends = self.first, self.last
        self.sizes = {place: float(size) for place, size in prices.buffer_bytes[ends].items()}
        self.gather = {place: float(size) for place, size in prices.gather_bytes[ends].items()}
        self.block = prices.blocks[0]
        self.states = self._states(self.block)
        self.gradient = float(self.block.states[Role.GRADIENT])
        self.fixed = sum(self._states(price) for price in self.ends) + float(prices.once_bytes)
        self.saved = [float(price.saved) for price in prices.blocks]
        self.delayed = [float(price.recomputed) for price in prices.blocks]
        self.working = [float(price.working) for price in prices.blocks]
        # In one root unit, the head's gradient is reduced with the embedding's, last of all.
        self.head_waits = prices.own_pool and not prices.wire.separate_root and self.first
        self.ahead = float(prices.head.ahead)
        self.head_working = float(prices.head.working)
        self.embedding_working = float(prices.embedding.working)

    def _states(self, price: LayerPrice) -> float:
        """Parameters, optimizer states and buffers of a layer: what never comes or goes."""
        roles = (Role.PARAMETER, Role.OPTIMIZER, Role.BUFFER)
        return sum(float(price.states[role]) * self.copies[role] for role in roles)

    def pools(self, now: Snapshot) -> tuple[float, float, float]:
        """Bytes of a snapshot's tensors by the pool they lie in: compute, gather, and reduce or apart."""
        prices, passes = self.prices, now.moment != "optimizer step"
        fraction = now.started
        gradients = self.gradient * (now.arrived + (self.layers - now.arrived) * fraction)
        size = self.fixed + self.layers * self.states + self.sizes[now.place]
        if self.first:
            gradients += float(prices.embedding.states[Role.GRADIENT]) * (
                1 if now.embedding_arrived else fraction
            )
            size += float(prices.embedding.saved) * now.embeddings + float(prices.embedding.gathered) * passes
        if self.last:
            gradients += float(prices.head.states[Role.GRADIENT]) * (1 if now.head_arrived else fraction)
            size += float(prices.head.saved) * now.heads + float(prices.head.gathered) * passes
            size += float(prices.head.recomputed) * now.pending_heads
        size += sum(n * s for n, s in zip(now.kept, self.saved, strict=True))
        size += sum(n * s for n, s in zip(now.pending, self.delayed, strict=True))
        size += float(self.block.gathered) * now.gathered
        if now.at == "block":
            size += self.working[now.policy]
        elif now.at == "head":
            size += self.ahead if now.place == "logits" else self.head_working
        elif now.at == "embedding":
            size += self.embedding_working
        apart = 0.0
        if not passes:
            gradients *= float(prices.resident.update)
            room = self.layers * float(self.block.update_room)
            room += sum(float(price.update_room) for price in self.ends)
            apart = room * prices.apart
            size += room - apart
        if prices.own_pool:
            return size, self.gather[now.place], gradients + apart
        return size + gradients, self.gather[now.place], apart

    def run(self) -> Timeline:
        """Goes through a step."""
        snapshots = tuple(self._snapshots())
        pools = [self.pools(snapshot) for snapshot in snapshots]
        compute, gather, reduce = (max(sizes) for sizes in zip(*pools, strict=True))
        gather = max(gather, *self.gather.values())
        sizes = tuple((one, sum(parts)) for one, parts in zip(snapshots, pools, strict=True))
        return Timeline(sizes, compute + gather + reduce)

    def _snapshots(self) -> Iterator[Snapshot]:
        prices = self.prices
        started = float(prices.resident.first)
        passes, waiting = worth_replaying(prices, self.stage)
        kept = [0] * len(prices.blocks)
        for chunk in self.chunks:  # micro-batches of GPipe that are never looked at
            for policy in chunk:
                kept[policy] += waiting
        whole = started == 1.0
        gathered = self.layers if prices.pipelined else 0
        now = Snapshot(
            "forward end", "forward end", tuple(kept), waiting * self.first, waiting * self.last, started,
            self.layers if whole else 0, whole, whole, gathered, pending=(0,) * len(kept),
        )  # fmt: skip
        for one in passes:
            if one.kind is Kind.WEIGHT:
                now = self._release(now, one)
            elif one.forward:
                now = self._forward(now, one)
                yield now
                if now.heads and one.chunk == len(self.chunks) - 1:
                    yield now._replace(moment="loss", place="logits", at="head")
            else:
                now = yield from self._backward(now, one)
                if prices.resident.engine:  # what this micro-batch left is added to what was kept
                    now = now._replace(
                        started=started, arrived=0, embedding_arrived=False, head_arrived=False
                    )
        yield now._replace(
            moment="optimizer step", place="optimizer step", at="optimizer", kept=(0,) * len(kept),
            pending=(0,) * len(kept), embeddings=0, heads=0, gathered=0, arrived=self.layers,
            embedding_arrived=True, head_arrived=True,
        )  # fmt: skip

    def _top(self, one: Pass) -> bool:
        """Does a pass go through the head?"""
        return self.last and one.chunk == len(self.chunks) - 1

    def _release(self, now: Snapshot, one: Pass) -> Snapshot:
        """What the gradients of a chunk's weights free: they are counted from its backward on."""
        kept, pending = list(now.kept), list(now.pending)
        for policy in self.chunks[one.chunk]:
            kept[policy] -= 1
            pending[policy] -= 1
        return now._replace(
            kept=tuple(kept),
            pending=tuple(pending),
            embeddings=now.embeddings - (self.first and one.chunk == 0),
            heads=now.heads - self._top(one),
            pending_heads=now.pending_heads - self._top(one),
        )

    def _forward(self, now: Snapshot, one: Pass) -> Snapshot:
        kept = list(now.kept)
        for policy in self.chunks[one.chunk]:
            kept[policy] += 1
        top = self._top(one)
        gathered = now.gathered
        if not self.prices.pipelined:
            gathered = self.layers
        return now._replace(
            moment="forward end",
            place="forward end",
            kept=tuple(kept),
            embeddings=now.embeddings + (self.first and one.chunk == 0),
            heads=now.heads + top,
            gathered=gathered,
            at="",
        )

    def _backward(self, now: Snapshot, one: Pass) -> Generator[Snapshot, None, Snapshot]:
        """The snapshots of a chunk's backward; returns what is left after it."""
        layers, kept, pending = self.chunks[one.chunk], list(now.kept), list(now.pending)
        arrived, whole = now.arrived, one.kind is Kind.BACKWARD
        if self._top(one):
            now = now._replace(moment="loss", place="loss", at="head")
            yield now
            now = now._replace(
                heads=now.heads - whole,
                pending_heads=now.pending_heads + (not whole),
                head_arrived=now.head_arrived or not self.head_waits,
            )
        if self.prices.resident.engine:
            now = now._replace(started=float(self.prices.resident.backward))
        for number, policy in enumerate(reversed(layers)):
            left = len(layers) - number - 1
            place = (
                ("only" if number == 0 else "last") if left == 0 else ("first" if number == 0 else "inner")
            )
            moment = "gradients complete" if left == 0 and one.chunk == 0 else "backward"
            now = now._replace(moment=moment, place=place, at="block", policy=policy, arrived=arrived)
            yield now
            kept[policy] -= whole
            pending[policy] += not whole
            arrived = min(arrived + 1, self.layers)
            gathered = now.gathered - (not self.prices.pipelined)
            now = now._replace(kept=tuple(kept), pending=tuple(pending), arrived=arrived, gathered=gathered)
        if one.chunk == 0:
            now = now._replace(moment="gradients complete")
            if self.first:
                now = now._replace(place="end", at="embedding")
                yield now
                now = now._replace(embedding_arrived=True, embeddings=now.embeddings - whole)
            now = now._replace(place="reduction", at="")
            yield now
        elif not whole:
            yield now._replace(moment="backward", place="forward end", at="")
        return now


def chunk_policies(prices: Prices, rows: Sequence[int], stage: int) -> list[list[int]]:
    """The layers of a stage's chunks, each as the number of its policy, in the order of the forward.

    The layers that recompute most come first, where activations wait longest for their backward.
    """
    row = [policy for policy in reversed(range(len(rows))) for _ in range(rows[policy])]
    chunks = [list(row) for _ in range(int(prices.layout.chunks))]
    first, last = prices.pipeline_at(stage).ends
    if prices.short >= 1 and last:
        chunks[-1].pop()
    if prices.short == 2 and first:
        chunks[0].pop()
    return chunks


def worth_replaying(prices: Prices, stage: int) -> tuple[list[Pass], int]:
    """The passes up to where a step repeats itself, and micro-batches that only wait (GPipe's)."""
    layout: Any = prices.layout
    p, m, v = int(layout.pipeline_parallel), int(layout.grad_accum), int(layout.chunks)
    if layout.schedule == "gpipe":
        shown = min(m, 2)
        return order("gpipe", stage, p, shown), m - shown
    if prices.pipeline.split:
        return order(layout.schedule, stage, p, min(m, 4 * p), v), 0
    shown = min(m, 2 * p + p) if v > 1 else min(m, p - stage + 1)
    schedule = "1f1b" if layout.schedule == "pipedream" else layout.schedule
    return order(schedule, stage, p, max(shown, min(m, 2)), v), 0
