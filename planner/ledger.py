"""Where every byte of a stage comes from: one entry per term, strategy shares in columns.

A stage's components are sums of these entries and nothing else, so that each printed figure can be
taken apart. The entries are made by the same ``held(term)`` as the search's prices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from planner.collectives import Messages
from planner.layer_price import LayerPrice
from planner.network import size_of
from planner.offload import host_buffers, moved_terms, moves
from planner.optimizers import INDICES, TEMPORARIES
from planner.overheads import groups, library_bytes
from planner.replay import Snapshot, chunk_blocks
from planner.spans import SPANS_OF
from planner.stages import Prices
from strategies.base import AbstractStrategy, Layer, Role, Term, held, size_seen_by
from strategies.layout import Layout, Wire, collectives_of, strategies_of
from strategies.offload import Way
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
    Role.OUTPUT_GRADIENT: "activations",
    Role.TRANSIENT: "workspace",
    Role.BUFFER: "workspace",
}

OF_LOGITS = (Role.ACTIVATION, Role.OUTPUT_GRADIENT, Role.TRANSIENT)


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
    """One stage of a solved candidate: its place, and its layers by kind of block and policy.

    ``first`` says whether it holds the embedding, ``last`` whether it holds the head and the loss.
    """

    index: int
    depth: int
    layers: tuple[int, ...]
    first: bool
    last: bool


def view(prices: Prices, rows: Sequence[Sequence[int]], index: int) -> StageView:
    """A stage of ``rows[stage][column]`` with the layers that it really holds."""
    first, last = map(bool, prices.pipeline_at(index).ends)
    held = [block for chunk in chunk_blocks(prices, rows, index) for block in chunk]
    layers = tuple(held.count(block) for block in range(len(prices.blocks)))
    return StageView(index, len(rows), layers, first, last)


def entries(prices: Prices, stage: StageView, snapshot: Snapshot, pools: float = 0.0) -> Iterator[Entry]:
    """All that a GPU of this stage holds at a snapshot of its step, what lies outside tensors too.

    ``pools`` are the bytes of all streams' pools, if more than the snapshot's tensors.
    """
    tensors = library_bytes(prices.job)
    for entry in tensor_entries(prices, stage, snapshot):
        tensors += entry.held
        yield entry
    idle = pools + library_bytes(prices.job) - tensors
    if idle > 1:
        tensors += idle
        where = "for the optimizer step's flat copies" if prices.apart else "in other pools"
        yield _plain("framework_overhead", f"idle room {where}", idle)
    stack, layout = prices.job.stack, prices.layout
    library = library_bytes(prices.job)
    yield _plain("framework_overhead", "workspace of the matrix libraries", library)
    for overhead, size in (
        (stack.context, stack.context.value),
        (stack.communicator, stack.communicator.value * groups(layout)),
        (stack.allocator, stack.allocator.value * tensors),
    ):
        yield Entry(
            "framework_overhead", overhead.name, "", {}, 1, 1, size, {}, size, overhead.tag, overhead.source
        )


def _plain(component: str, name: str, size: float, count: float = 1.0) -> Entry:
    return Entry(component, name, "", {}, 1, count, size, {}, size * count)


def tensor_entries(prices: Prices, stage: StageView, now: Snapshot) -> Iterator[Entry]:
    """The tensors of a snapshot: states, activations, buffers, the working set of what is at work."""
    embedding, *blocks, head = prices.layers
    several = len(prices.policies)
    of_kind = [sum(stage.layers[k * several : (k + 1) * several]) for k in range(len(blocks))]
    step = peak_step(prices, now)
    own = {"embedding": prices.embedding, "head": prices.head}.get(now.at, prices.blocks[now.block])
    for layer, count, arrived in (
        (embedding, int(stage.first), int(now.embedding_arrived)),
        *zip(blocks, of_kind, now.arrived, strict=True),
        (head, int(stage.last), int(now.head_arrived)),
    ):
        if count:
            there = arrived + (count - arrived) * now.started
            kept = float(prices.resident.update) if now.at == "optimizer" else 1.0
            yield from _states(prices, stage, layer, count, there * kept)
    yield from _optimizer_states(prices, stage)
    yield from _terms(prices, prices.once, Role.BUFFER, "none", 1)
    at_work_on = {"block": prices.block_layer(now.block), "head": head, "embedding": embedding}.get(now.at)
    for layer, kept, policy, of in _activations(prices, stage, now):
        at_work = layer is at_work_on and (not layer.is_block or policy == prices.policy_of(now.block))
        within = step if at_work and not prices.pipeline.split else None
        yield from _terms(prices, layer, Role.ACTIVATION, policy, kept, kept / of, within)
    for index, pending in enumerate(now.pending):
        yield from _delayed(prices, prices.block_layer(index), prices.policy_of(index), pending)
    yield from _delayed(prices, head, "none", now.pending_heads)
    if now.moment != "optimizer step":
        gathered = zip(prices.blocks[::several], now.gathered, strict=True)
        for name, price, held_by in (
            ("embedding", prices.embedding, stage.first),
            ("head", prices.head, stage.last),
            *(("layers", price, count) for price, count in gathered),
        ):
            if held_by and float(price.gathered):
                yield _plain("communication_buffers", f"gathered {name}", float(price.gathered), held_by)
    if at_work_on:
        policy = prices.policy_of(now.block) if now.at == "block" else "none"
        yield from _working(prices, at_work_on, policy, own, step, now)
    elif now.at == "optimizer":
        prices_of = zip(prices.blocks, stage.layers, strict=True)
        room = sum(float(price.update_room) * count for price, count in prices_of)
        room += (
            float(prices.embedding.update_room) * stage.first + float(prices.head.update_room) * stage.last
        )
        if room:
            yield _plain("workspace", "copies of gradients, or a foreach optimizer's updates", room)
    for buffer in prices.buffers(stage.first, stage.last):
        if buffer.span in SPANS_OF[now.place] and float(buffer.size):
            kind = "workspace" if buffer.name in (TEMPORARIES, INDICES) else "communication_buffers"
            yield _plain(kind, buffer.name, float(buffer.size))


def _states(
    prices: Prices, stage: StageView, layer: Layer, count: float, gradients: float
) -> Iterator[Entry]:
    pipeline = prices.pipeline_at(stage.index)
    for role in (Role.PARAMETER, Role.GRADIENT, Role.BUFFER):
        copies = gradients if role is Role.GRADIENT else count
        share = float(pipeline.share(Term("", role, {}, 1.0)))
        yield from _terms(prices, layer, role, "none", copies, share)


def held_layers(prices: Prices, stage: StageView) -> Iterator[tuple[Layer, str, int]]:
    """The layers of a stage with their counts, alike where they offload alike; a way stands for each."""
    embedding, *_, head = prices.layers
    if stage.first:
        yield embedding, "none", 1
    counts: dict[tuple[int, tuple[str, ...]], tuple[str, int]] = {}
    for block, count in enumerate(stage.layers):
        way = prices.policy_of(block)
        key = block // len(prices.policies), Way.of(way).offload
        found, before = counts.get(key, (way, 0))
        counts[key] = found, before + count
    for (kind, _), (way, count) in counts.items():
        if count:
            yield prices.layers[1 + kind], way, count
    if stage.last:
        yield head, "none", 1


def _optimizer_states(prices: Prices, stage: StageView) -> Iterator[Entry]:
    for layer, way, count in held_layers(prices, stage):
        yield from _terms(prices, layer, Role.OPTIMIZER, way, count)


def entries_elsewhere(prices: Prices, stage: StageView, place: str) -> Iterator[Entry]:
    """All that a GPU of this stage has on its host, or on NVMe."""
    job, layout = prices.job, prices.layout
    layers: list[tuple[Layer, str, int]] = []
    for index, count in enumerate(stage.layers):
        if count:
            layers.append((prices.block_layer(index), prices.policy_of(index), count))
    ends = [(prices.layers[0], "none", 1)] * stage.first + [(prices.layers[-1], "none", 1)] * stage.last
    for layer, way, count in (*ends, *layers):
        strategies = _strategies(layout, prices.wire, way)
        shares_of = [one for one in strategies if one.axis not in ("offload", "recompute")]
        for move in moves(job, layout, way):
            if move.place != place:
                continue
            for term, size in moved_terms(layer, move, strategies):
                if float(size):
                    dims = {key: int(value) for key, value in term.dims.items()}
                    shares = {one.label: float(one.share(term)) for one in shares_of}
                    whole, unit = float(term.amount), float(term.unit)
                    total = float(size) * count
                    yield Entry(
                        move.component, term.name, layer.kind, dims, unit, count, whole, shares, total
                    )
    if place == "host":
        strategies = _strategies(layout, prices.wire)
        sizes = host_buffers(job, layout, prices.stage_layers(stage.first, stage.last), strategies)
        for name, size in sizes:
            if float(size):
                yield _plain("communication_buffers", name, float(size))


def _activations(
    prices: Prices, stage: StageView, now: Snapshot
) -> Iterator[tuple[Layer, float, str, float]]:
    """Layer, layer-activations kept, policy, layers that they belong to."""
    if stage.first and now.embeddings:
        yield prices.layers[0], now.embeddings, "none", 1
    for index, (kept, layers) in enumerate(zip(now.kept, stage.layers, strict=True)):
        if kept:
            yield prices.block_layer(index), kept, prices.policy_of(index), max(layers, 1)
    if stage.last and now.heads:
        yield prices.layers[-1], now.heads, "none", 1


def _delayed(prices: Prices, layer: Layer, policy: str, count: float) -> Iterator[Entry]:
    """What a split backward leaves for the gradients of the weights, besides what was kept before it."""
    recompute = Way.of(policy).recompute
    for term in layer.by_role[Role.ACTIVATION]:
        if recompute not in term.kept_by and "none" in term.kept_by:
            yield from _one(prices, layer, term, "none", count, f"{term.name}, recomputed")
    yield from _terms(prices, layer, Role.OUTPUT_GRADIENT, "none", count)


def peak_step(prices: Prices, now: Snapshot) -> int | None:
    """The step of the layer at work at which its working set is largest; None at the start of it."""
    if now.at not in ("block", "head", "embedding") or now.place == "logits":
        return None
    own = {"embedding": prices.embedding, "head": prices.head}.get(now.at, prices.blocks[now.block])
    level = best = float(own.recomputed)
    number = None
    for index, step in enumerate(own.walk):
        level += float(step.whole) + float(step.final)
        if level + float(step.passing) > best:
            best, number = level + float(step.passing), index
        level -= float(step.freed)
    return number


def _before(term: Term, layer: Layer, step: int) -> float:
    """The part of a term whose steps are over when a step begins."""
    return sum(layer.steps.index(one) < step for one in term.steps) / max(len(term.steps), 1)


def _until(term: Term, layer: Layer, step: int) -> float:
    return sum(layer.steps.index(one) <= step for one in term.steps) / max(len(term.steps), 1)


def _in(term: Term, layer: Layer, step: int) -> float:
    return (layer.steps[step] in term.steps) / max(len(term.steps), 1)


def _working(
    prices: Prices, layer: Layer, policy: str, own: LayerPrice, step: int | None, now: Snapshot
) -> Iterator[Entry]:
    """What the layer at work holds besides what it saved."""
    strategies = _strategies(prices.layout, prices.wire)
    data, size = strategies[0], size_seen_by(strategies[0], strategies)
    split = prices.pipeline.split
    if split and now.place != "logits":  # which end the forward
        yield from _terms(prices, layer, Role.OUTPUT_GRADIENT, "none", 1)
    way, policy = Way.of(policy), Way.of(policy).recompute
    at_start = split or policy in prices.job.stack.block_policies
    for term in layer.by_role[Role.ACTIVATION]:
        if policy in term.kept_by and "activations" in way.offload:
            part = prices.brought_back - (0.0 if step is None else _before(term, layer, step))
            yield from _one(prices, layer, term, "none", part, f"{term.name}, brought back", "workspace")
        if policy not in term.kept_by and "none" in term.kept_by:
            if at_start:
                part = 1.0 if step is None or split else 1 - _before(term, layer, step)
            else:
                part = 0.0 if step is None else _in(term, layer, step)
            yield from _one(prices, layer, term, "none", part, f"{term.name}, recomputed", "workspace")
    for term in layer.by_role[Role.TRANSIENT]:
        part = 0.0
        if term.steps == ("logits",):
            part = float(now.place == "logits")
        elif step is not None and now.place != "logits":
            part = _in(term, layer, step)
        # Its amount is that of all of its steps together, evenly.
        times = max(len(term.steps), 1)
        each = replace(term, unit=term.unit / times)
        yield from _one(prices, layer, each, "none", part * times)
    if step is None:
        return
    whole = final = fresh = 0.0
    for term in layer.by_role[Role.GRADIENT]:
        arriving = data.arriving(term, size)
        if arriving is not None:
            whole += float(arriving) * _until(term, layer, step)
        if not arriving:
            final += (
                float(held(term, strategies))
                * (1 - float(prices.resident.backward))
                * _until(term, layer, step)
            )
            if not prices.job.stack.fused_accumulation and float(prices.resident.backward) == 1:
                fresh += float(size(term)) * (1 - prices.wire.lasting) * _in(term, layer, step)
    for name, amount in (
        ("gradients of the layer at work", final),
        ("gradients of the layer at work, whole", whole),
        ("gradients about to be added", fresh),
    ):
        if amount:
            yield _plain("gradients", name, amount)


def _terms(
    prices: Prices,
    layer: Layer,
    role: Role,
    policy: str,
    count: float,
    flight: float = 1.0,
    step: int | None = None,
) -> Iterator[Entry]:
    """Entries of a layer's terms of a role, ``count`` of each less what one layer freed by a step."""
    for term in layer.by_role[role]:
        left = count - (_before(term, layer, step) if step is not None else 0.0)
        name = term.name if policy == "none" or role is not Role.ACTIVATION else f"{term.name} ({policy})"
        yield from _one(prices, layer, term, policy, left, name, flight=flight)


@lru_cache(maxsize=64)
def _strategies(layout: Layout, wire: Wire, policy: str = "none") -> tuple[AbstractStrategy, ...]:
    """The strategies of a single layout but the pipeline's, made once for all of a stage's terms."""
    return strategies_of(layout, wire, 0, policy)[:-1]


def _one(
    prices: Prices,
    layer: Layer,
    term: Term,
    policy: str,
    count: float,
    name: str = "",
    component: str = "",
    flight: float = 1.0,
) -> Iterator[Entry]:
    if not count:
        return
    strategies = _strategies(prices.layout, prices.wire, policy)
    shares = {s.label: float(s.share(term)) for s in strategies if not isinstance(s, Recompute)}
    recompute = next(s for s in strategies if isinstance(s, Recompute))
    if term.role is Role.ACTIVATION:
        shares[recompute.label] = float(recompute.share(term))
        count = count / flight
    if flight != 1:
        shares["in flight"] = flight
    whole = float(term.amount)
    amount = whole * count
    for share in shares.values():
        amount *= share
    if not amount:
        return
    if not component:
        component = COMPONENT_OF[term.role]
        if layer.kind == "head" and "vocab" in term.dims and term.role in OF_LOGITS:
            component = "logits"
    dims = {key: int(value) for key, value in term.dims.items()}
    yield Entry(component, name or term.name, layer.kind, dims, term.unit, count, whole, shares, amount)


@dataclass(frozen=True)
class Message:
    """What a GPU of a stage sends: ``count`` times ``size`` bytes within a group of ``gpus``.

    ``seconds`` is for all of them, per micro-batch or per step as ``per`` says, with what exposed ones wait
    for the slowest of their group; ``behind`` names the computation they overlap with, and is empty where
    they are exposed.
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
    layers: list[tuple[Layer, str, float]] = [(prices.layers[0], "none", 1)] * stage.first
    for index, held_here in enumerate(stage.layers):
        if held_here:
            layers.append((prices.block_layer(index), prices.policy_of(index), held_here))
    layers += [(prices.layers[-1], "none", 1)] * stage.last
    sent = Messages.of(prices.job.cluster, prices.layout)
    for layer, policy, copies in layers:
        strategies = _strategies(prices.layout, prices.wire, policy)
        alike: dict[tuple[Any, ...], Message] = {}
        for one in collectives_of(layer, strategies):
            gpus = int(size_of(one.axis, prices.layout))
            if gpus > 1 and one.times:
                one = one if prices.overlap else replace(one, behind="")
                kind = one.kind, one.axis, layer.kind, gpus, one.per, one.behind
                more = alike.get((*kind, float(one.size)), Message(*kind, 0.0, float(one.size), 0.0))
                count = more.count + float(one.times) * copies
                alone = one.per == "micro-batch" and not one.behind  # waits for the slowest of its group
                each = float(sent.seconds(one)) / (prices.compute.in_step if alone else 1.0)
                seconds = more.seconds + each * copies
                alike[*kind, float(one.size)] = replace(more, count=count, seconds=seconds)
        yield from alike.values()
    if stage.depth > 1:
        sends = 2 * float(prices.pipeline.passes)
        yield Message(
            "send", "pipeline", "stage", 2, "micro-batch", "", sends, prices.send_bytes, float(prices.send)
        )


def components(items: Sequence[Entry]) -> dict[str, float]:
    """Bytes by component, every component present."""
    totals: dict[str, Any] = dict.fromkeys(COMPONENTS, 0.0)
    for entry in items:
        totals[entry.component] += entry.held
    return totals
