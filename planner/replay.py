"""A step gone through: what one GPU of a stage holds, layer by layer, from forward to optimizer.

The stage works through its passes in the order of its schedule. A forward brings a layer's
activations, a backward takes them away and brings its gradients; while a layer runs backward its
working set and the strategies' buffers come and go. Every state that may be a peak is a
:class:`Snapshot`; :func:`planner.ledger.entries` takes one apart, term by term. The search's closed
form (:func:`planner.moments.stage_moments`) is never below the highest of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from planner.layer_price import LayerPrice
from planner.order import layer_at
from planner.schedule import Kind, Pass, order
from planner.stages import Prices
from strategies.base import Role, Term

MOMENTS = ("forward end", "loss", "backward", "gradients complete", "optimizer step")


class Snapshot(NamedTuple):
    """What exists at one place of a step, in layers; the bytes follow from the prices.

    ``kept`` counts layer activations by block (:attr:`Prices.blocks`), ``pending`` those of them whose
    backward is done but for the gradients of the weights, ``pending_heads`` the same of the heads;
    ``embeddings`` and ``heads`` count those of the ends; ``arrived`` counts layers, by kind of block, whose
    gradients exist in full, ``started`` is the fraction that exists of all others. ``place`` names the
    buffers' spans (planner/spans.py), ``at`` what is at work: a block, which one ``block`` says, the head
    ...; ``gathered`` are the layers kept gathered, by kind of block.
    """

    moment: str
    place: str
    kept: tuple[int, ...]
    embeddings: int
    heads: int
    started: float
    arrived: tuple[int, ...]
    embedding_arrived: bool
    head_arrived: bool
    gathered: tuple[int, ...]
    at: str = ""
    block: int = 0
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

    def __init__(self, prices: Prices, stage: int, rows: Sequence[Sequence[int]]) -> None:
        self.prices, self.stage = prices, stage
        pipeline = prices.pipeline_at(stage)
        self.first, self.last = map(bool, pipeline.ends)
        self.chunks = chunk_blocks(prices, rows, stage)
        self.several = len(prices.policies)
        kinds = [block // self.several for chunk in self.chunks for block in chunk]
        self.layers = tuple(kinds.count(kind) for kind in range(len(prices.layers) - 2))
        self.ends = [*([prices.embedding] if self.first else []), *([prices.head] if self.last else [])]
        self.copies = {role: float(pipeline.share(Term("", role, {}, 1.0))) for role in Role}
        ends = self.first, self.last
        self.sizes = {place: float(size) for place, size in prices.buffer_bytes[ends].items()}
        self.gather = {place: float(size) for place, size in prices.gather_bytes[ends].items()}
        self.blocks = prices.blocks[:: self.several]
        self.held = [prices.blocks[block] for chunk in self.chunks for block in chunk]
        self.states = sum(map(self._states, self.held))
        self.gradients = [float(own.states[Role.GRADIENT]) for own in self.blocks]
        self.gathered = [float(own.gathered) for own in self.blocks]
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
        gradients = sum(
            own * (arrived + (layers - arrived) * fraction)
            for own, arrived, layers in zip(self.gradients, now.arrived, self.layers, strict=True)
        )
        size = self.fixed + self.states + self.sizes[now.place]
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
        size += sum(n * own for n, own in zip(now.gathered, self.gathered, strict=True))
        if now.at == "block":
            size += self.working[now.block]
        elif now.at == "head":
            size += self.ahead if now.place == "logits" else self.head_working
        elif now.at == "embedding":
            size += self.embedding_working
        apart = 0.0
        if not passes:
            gradients *= float(prices.resident.update)
            room = sum(float(price.update_room) for price in (*self.held, *self.ends))
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
            for block in chunk:
                kept[block] += waiting
        whole = started == 1.0
        none = (0,) * len(self.layers)
        gathered = self.layers if prices.pipelined else none
        now = Snapshot(
            "forward end", "forward end", tuple(kept), waiting * self.first, waiting * self.last, started,
            self.layers if whole else none, whole, whole, gathered, pending=(0,) * len(kept),
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
                        started=started, arrived=none, embedding_arrived=False, head_arrived=False
                    )
        yield now._replace(
            moment="optimizer step", place="optimizer step", at="optimizer", kept=(0,) * len(kept),
            pending=(0,) * len(kept), embeddings=0, heads=0, gathered=none, arrived=self.layers,
            embedding_arrived=True, head_arrived=True,
        )  # fmt: skip

    def _top(self, one: Pass) -> bool:
        """Does a pass go through the head?"""
        return self.last and one.chunk == len(self.chunks) - 1

    def _release(self, now: Snapshot, one: Pass) -> Snapshot:
        """What the gradients of a chunk's weights free: they are counted from its backward on."""
        kept, pending = list(now.kept), list(now.pending)
        for block in self.chunks[one.chunk]:
            kept[block] -= 1
            pending[block] -= 1
        return now._replace(
            kept=tuple(kept),
            pending=tuple(pending),
            embeddings=now.embeddings - (self.first and one.chunk == 0),
            heads=now.heads - self._top(one),
            pending_heads=now.pending_heads - self._top(one),
        )

    def _forward(self, now: Snapshot, one: Pass) -> Snapshot:
        kept = list(now.kept)
        for block in self.chunks[one.chunk]:
            kept[block] += 1
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
        arrived, whole = list(now.arrived), one.kind is Kind.BACKWARD
        gathered = list(now.gathered)
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
        for number, block in enumerate(reversed(layers)):
            left = len(layers) - number - 1
            place = (
                ("only" if number == 0 else "last") if left == 0 else ("first" if number == 0 else "inner")
            )
            moment = "gradients complete" if left == 0 and one.chunk == 0 else "backward"
            now = now._replace(moment=moment, place=place, at="block", block=block)
            yield now
            kept[block] -= whole
            pending[block] += not whole
            kind = block // self.several
            arrived[kind] = min(arrived[kind] + 1, self.layers[kind])
            gathered[kind] -= not self.prices.pipelined
            now = now._replace(
                kept=tuple(kept), pending=tuple(pending), arrived=tuple(arrived), gathered=tuple(gathered)
            )
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


def chunk_blocks(prices: Prices, rows: Sequence[Sequence[int]], stage: int) -> list[list[int]]:
    """The layers of a stage's chunks, each as the number of its block, in the order of the forward.

    Of a kind, the layers that recompute most come first, where activations wait longest for their backward.
    """
    several, layout = len(prices.policies), prices.layout
    chunks, schedule = int(layout.chunks), str(layout.schedule)
    start, count = sum(map(sum, rows[:stage])), sum(rows[stage])
    sequence = prices.order.whole(int(prices.rows)).sequence
    left = list(rows[stage])
    policies = []  # of every row
    for kind in sequence[start : start + count]:
        policy = next(r for r in reversed(range(several)) if left[kind * several + r])
        left[kind * several + policy] -= 1
        policies.append(policy)
    depth = prices.job.model.num_hidden_layers
    kinds = prices.kinds
    found = []
    for chunk in range(chunks):
        placed = sorted(
            (layer_at(chunk, start + x, depth, chunks, schedule), policy) for x, policy in enumerate(policies)
        )
        found.append([kinds[i] * several + policy for i, policy in placed if 0 <= i < depth])
    return found


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
