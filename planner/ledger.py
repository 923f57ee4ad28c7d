"""Where every byte of a stage comes from: one entry per term, strategy shares in columns.

A stage's components are sums of these entries and nothing else, so that each printed figure can be
taken apart. The entries are made by the same ``held(term)`` as the search's prices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from planner.candidate import Candidate
from planner.network import group
from planner.stages import Prices, exists, groups
from strategies.base import STATES, Layer, Role, Term, size_seen_by
from strategies.layout import strategies_of
from strategies.recompute import Recompute

COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer_states",
    "activations",
    "workspace",
    "logits",
    "communication_buffers",
    "framework_overhead",
)
COMPONENT_OF = {
    Role.PARAMETER: "parameters",
    Role.GRADIENT: "gradients",
    Role.OPTIMIZER: "optimizer_states",
    Role.ACTIVATION: "activations",
    Role.TRANSIENT: "workspace",
}


@dataclass(frozen=True)
class Entry:
    """``count`` copies of ``whole`` bytes, times the shares, is ``held`` bytes on this GPU."""

    component: str
    name: str
    layer: str
    dims: dict[str, int]
    unit: float
    count: float
    whole: float
    shares: dict[str, float]
    held: float
    tag: str = "exact"
    source: str = ""


@dataclass(frozen=True)
class StageView:
    """One stage of a solved candidate: its place, its rows by policy, and its layers by policy."""

    index: int
    depth: int
    rows: tuple[int, ...]
    layers: dict[str, int]

    @property
    def first(self) -> bool:
        """Does it hold the embedding?"""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Does it hold the head and the loss?"""
        return self.index == self.depth - 1


def view(candidate: Candidate, rows: Sequence[Sequence[int]], index: int) -> StageView:
    """A stage with the layers that it really holds: rows times chunks, less a missing one."""
    depth, chunks = len(candidate.stages), candidate.layout.chunks
    layers = {p: n * chunks for p, n in zip(candidate.policies, rows[index], strict=True)}
    missing = (candidate.short >= 1) * (index == depth - 1) + (candidate.short == 2) * (index == 0)
    for policy in layers:
        taken = min(missing, layers[policy])
        layers[policy] -= taken
        missing -= taken
    return StageView(index, depth, tuple(rows[index]), layers)


def entries(prices: Prices, stage: StageView, moment: str) -> Iterator[Entry]:
    """All that a GPU of this stage holds at a moment (``forward end`` or one of MOMENTS)."""
    tensors = 0.0
    for entry in _tensor_entries(prices, stage, moment):
        tensors += entry.held
        yield entry
    stack, layout = prices.job.stack, prices.layout
    for overhead, size in (
        (stack.context, stack.context.value),
        (stack.communicator, stack.communicator.value * groups(layout)),
        (stack.allocator, stack.allocator.value * tensors),
    ):
        yield Entry(
            "framework_overhead", overhead.name, "", {}, 1, 1, size, {}, size, overhead.tag, overhead.source
        )


def _tensor_entries(prices: Prices, stage: StageView, moment: str) -> Iterator[Entry]:
    embedding, block, head = prices.layers
    pipeline = prices.pipeline_at(stage.index)
    depth = sum(stage.layers.values())
    gradients = float(prices.resident) if moment in ("forward end", "loss", "backward") else 1.0
    for layer, count, present in ((embedding, 1, stage.first), (block, depth, True), (head, 1, stage.last)):
        if present:
            for role in STATES:
                copies = count * (gradients if role is Role.GRADIENT else 1.0)
                if layer is embedding and role is Role.GRADIENT and moment == "gradients complete":
                    copies = float(prices.resident)  # it comes after the first block's backward
                share = float(pipeline.share(Term("", role, {}, 1.0)))
                yield from _entries(prices, layer, role, "none", copies, share if share != 1 else None)
    if moment in ("forward end", "loss", "backward"):
        flight = float(pipeline.in_flight)
        chunks = prices.layout.chunks
        waiting = prices.layout.grad_accum if prices.layout.schedule == "gpipe" else 1
        if stage.first:
            first = float(pipeline.first_chunk_in_flight)
            yield from _entries(prices, embedding, Role.ACTIVATION, "none", 1, first)
        for policy, rows in zip(prices.policies, stage.rows, strict=True):
            if rows:
                yield from _entries(prices, block, Role.ACTIVATION, policy, rows * chunks, flight / chunks)
        if stage.last:
            yield from _entries(prices, head, Role.ACTIVATION, "none", 1, float(waiting))
    if moment == "loss":
        yield from _entries(prices, head, Role.TRANSIENT, "none", 1, None)
    if moment in ("backward", "gradients complete"):
        used = [i for i, rows in enumerate(stage.rows) if rows]
        policy = prices.policies[max(used, key=lambda i: float(prices.blocks[i].working))]
        yield from _entries(prices, block, Role.TRANSIENT, policy, 1, None)
        if policy != "none":
            yield from _entries(prices, block, Role.ACTIVATION, "none", 1, None, freed_by=policy)
    for buffer in prices.buffers(stage.first, stage.last):
        if exists(buffer, moment):
            size = float(buffer.size)
            yield Entry("communication_buffers", buffer.name, "", {}, 1, 1, size, {}, size)


def _entries(
    prices: Prices,
    layer: Layer,
    role: Role,
    policy: str,
    count: float,
    flight: float | None,
    freed_by: str = "",
) -> Iterator[Entry]:
    """Entries of a layer's terms of a role; with ``freed_by``, only of what that policy frees."""
    *strategies, _ = strategies_of(prices.layout, prices.wire, 0, policy)
    for term in layer.by_role[role]:
        if freed_by and freed_by in term.kept_by:
            continue
        shares = {s.label: float(s.share(term)) for s in strategies if not isinstance(s, Recompute)}
        recompute = next(s for s in strategies if isinstance(s, Recompute))
        if role is Role.ACTIVATION:
            shares[recompute.label] = float(recompute.share(term))
        if flight is not None:
            shares["in flight"] = flight
        whole = float(term.amount)
        held = whole * count
        for share in shares.values():
            held *= share
        if held:
            component = COMPONENT_OF[role]
            if freed_by:
                component = "workspace"
            elif layer.kind == "head" and "vocab" in term.dims and role not in STATES:
                component = "logits"
            name = term.name if policy == "none" or role in STATES else f"{term.name} ({policy})"
            if freed_by:
                name = f"{term.name}, recomputed"
            dims = {key: int(value) for key, value in term.dims.items()}
            yield Entry(component, name, layer.kind, dims, term.unit, count, whole, shares, held)


@dataclass(frozen=True)
class Message:
    """What a GPU of a stage sends: ``count`` times ``size`` bytes within a group of ``gpus``.

    ``seconds`` is for all of them, per micro-batch or per step as ``per`` says; ``behind`` names
    the computation they overlap with, and is empty where they are exposed.
    """

    kind: str
    axis: str
    layer: str
    gpus: int
    per: str
    behind: str
    count: float
    size: float
    seconds: float


def messages(prices: Prices, stage: StageView) -> Iterator[Message]:
    """The messages of a stage, as the prices count them, layer kind by layer kind."""
    embedding, block, head = prices.layers
    layers = [(embedding, "none", 1)] * stage.first
    layers += [(block, policy, count) for policy, count in stage.layers.items() if count]
    layers += [(head, "none", 1)] * stage.last
    for layer, policy, copies in layers:
        *strategies, _ = strategies_of(prices.layout, prices.wire, 0, policy)
        for strategy in strategies:
            for one in strategy.collectives(layer, size_seen_by(strategy, strategies)):
                gpus = int(group(one.axis, prices.layout)[0])
                if gpus > 1 and one.times:
                    count = float(one.times) * copies
                    seconds = float(prices.network.seconds(one, prices.layout)) * copies
                    yield Message(
                        one.kind,
                        one.axis,
                        layer.kind,
                        gpus,
                        one.per,
                        one.behind,
                        count,
                        float(one.size),
                        seconds,
                    )
    if stage.depth > 1:
        sends = 2 * prices.layout.chunks
        yield Message(
            "send", "pipeline", "stage", 2, "micro-batch", "", sends, prices.send_bytes, float(prices.send)
        )


def components(items: Sequence[Entry]) -> dict[str, float]:
    """Bytes by component, every component present."""
    totals: dict[str, Any] = dict.fromkeys(COMPONENTS, 0.0)
    for entry in items:
        totals[entry.component] += entry.held
    return totals
