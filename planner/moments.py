"""The moments of a step, in closed form: what a stage holds at most, as numbers of the layers it holds.

A layer's backward is a walk over its steps (planner/layers.py): activations are freed, gradients
arise, transients live in one step each. ``working`` is the most that a layer needs on the way above
what it has saved. The peak of a stage is the maximum over the moments of a step, each linear in the
layers it holds; :mod:`planner.replay` goes through all of them, layer by layer, and is never above:

- ``loss`` (last stage): model states, activations in flight, the working set of the head;
- ``backward``: model states, activations in flight, the working set of the first or second layer. Where
  gradients arrive in the only backward, a layer may hold more when it is done than before, one of another
  kind less: ``backward after`` a turn from one kind to another as well;
- ``gradients complete``: model states with all gradients, the working set of the last layer to run
  backward or of the embedding, where gradients arrive during the only backward of a step;
- ``optimizer step``: model states, the optimizer's buffers and temporaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from planner.layer_price import LayerPrice, highest
from strategies.base import Quantity, Role

if TYPE_CHECKING:
    from planner.stages import Prices


def stage_moments(
    prices: Prices, stage: Quantity, first: bool, last: bool
) -> dict[str, tuple[list[Quantity], Quantity, list[Quantity]]]:
    """Every moment of a stage as numbers of the layers it holds; see :class:`Stage`.

    Bytes that PyTorch's allocator needs to serve the stage's tensors: each stream's pool as large
    as it ever is.
    """
    pipeline = prices.pipeline_at(stage)
    chunks, whole = prices.layout.chunks, 1 - pipeline.split
    there, sizes = prices.held_room, prices.buffer_bytes[first, last]
    gathering = highest(prices.gather_bytes[first, last].values())
    around = [*([prices.embedding] if first else []), *([prices.head] if last else [])]
    columns, blocks = prices.heaviest, prices.blocks[:: len(prices.policies)]

    # Embedding and head, if kept gathered, stay so to the end of the backward.
    def fixed(gradients: Quantity, kept: Quantity, ends: float = 1.0) -> Quantity:
        states = sum(
            prices.state_bytes(p, pipeline, gradients) + p.gathered * ends + p.update_room * prices.apart
            for p in around
        )
        lacking = sum(n * row(p, gradients, kept) for n, p in prices.missing(first, last)) / chunks
        return states - lacking + prices.once_bytes + gathering

    def row(price: LayerPrice, gradients: Quantity, kept: Quantity) -> Quantity:
        states = prices.state_bytes(price, pipeline, gradients)
        return (states + price.gathered * kept + price.update_room * prices.apart) * chunks

    def rows(gradients: Quantity, kept: Quantity) -> list[Quantity]:
        found: dict[int, Quantity] = {}  # policies that offload nothing share their states
        for price in columns:
            if id(price.states) not in found:
                found[id(price.states)] = row(price, gradients, kept)
        return [found[id(price.states)] for price in columns]

    def kept(price: LayerPrice) -> Quantity:
        times = [n * price.saved + k * (price.saved + price.recomputed) for n, k in pipeline.held]
        return times[0] if whole else highest(times)

    # The embedding's activations are in flight like a first chunk's; the head's never wait, unless
    # the whole batch is sent forward first or the gradients of its weights are made later.
    start = prices.embedding.saved * pipeline.first_chunk_in_flight * first
    flight = [kept(price) for price in columns]
    running = [states + own for states, own in zip(rows(there, 1.0), flight, strict=True)]
    head = prices.head.states[Role.GRADIENT] * (1.0 - there) * last
    waiting = prices.head.saved + prices.head.recomputed * (1 - whole)
    start = start + waiting * (pipeline.last_chunk_in_flight - whole) * last
    started = fixed(there, 1.0) + start + head
    # The second layer may need more than the first: what is left of the first one's gradients.
    lightest = reduce(np.minimum, [price.saved for price in prices.blocks])
    left = highest(
        p.states[Role.GRADIENT] * (1.0 - there) - p.gathered * (1 - prices.pipelined) for p in blocks
    )
    left = sizes["inner"] + left - lightest * whole
    # Other micro-batches wait while this one is done.
    done_with = [own - price.saved * whole for own, price in zip(flight, columns, strict=True)]
    ready = [states + own for states, own in zip(rows(1.0, prices.pipelined), done_with, strict=True)]
    done = fixed(1.0, prices.pipelined) + start
    # Of the last layer to run backward, its own gradients are not there in full, and the embedding's
    # come after it; the layer after it in the forward may be heavier yet, where it is prefetched for.
    late = prices.embedding.states[Role.GRADIENT] * (1.0 - there) * first
    ending = np.maximum(sizes["end"] + (prices.embedding.working - late) * first, sizes["reduction"])
    ahead = sizes["inner"] > sizes["last"]
    bottom = []
    for price in columns:
        own = price.states[Role.GRADIENT] * (1.0 - there)
        freed = price.gathered * (1 - prices.pipelined) - own - late
        before = sizes["inner"] + price.saved + price.gathered - own
        around_it = np.where(ahead, np.maximum(sizes["last"], before), sizes["last"])
        bottom.append(np.maximum(price.working + price.saved + freed + around_it, ending))
    nothing: list[Quantity] = [0.0] * len(columns)
    updated, shared = prices.resident.update, 1 - prices.apart
    working = [price.working for price in columns]
    result = {
        "backward": (running, started + np.maximum(sizes["first"], left), working),
        "gradients complete": (ready, done, bottom),
        "optimizer step": (
            [
                states + price.update_room * chunks * shared
                for states, price in zip(rows(updated, 0.0), columns, strict=True)
            ],
            fixed(updated, 0.0, 0.0) + sizes["optimizer step"] + sum(p.update_room for p in around) * shared,
            nothing,
        ),
    }
    if np.ndim(there) == 0 and there < 1 and len(prices.order.rows) > 1:
        passing = _turns(prices, running, ready)
        for number, (passed, room) in enumerate(passing):
            result[f"backward after {number}"] = (passed, started + sizes["inner"], room)
    if last:
        loss = fixed(prices.waiting_room, 1.0) + start + prices.head.saved * whole
        room = np.maximum(sizes["loss"] + prices.head.working, sizes["logits"] + prices.head.ahead)
        waited = [states + own for states, own in zip(rows(prices.waiting_room, 1.0), flight, strict=True)]
        result["loss"] = (waited, loss + room, nothing)
    return result


def _turns(
    prices: Prices, running: list[Quantity], ready: list[Quantity]
) -> Iterator[tuple[list[Quantity], list[Quantity]]]:
    """What rows hold in the middle of the only backward of a single layout, and what runs there.

    On one stage at every turn from one kind to another, of which one is the highest: between two of them all
    layers are alike, and of those the ones that recompute most come last. Which turns a stage of several has
    depends on where it begins: there every row counts as it holds most, before or after.
    """
    columns, several = prices.heaviest, len(prices.policies)
    working = [price.working for price in columns]
    if prices.layout.pipeline_parallel > 1:
        yield [np.maximum(a, b) for a, b in zip(running, ready, strict=True)], working
        return
    for turn in prices.order.turns:
        parts = [turn.done[column // several] for column in range(len(columns))]
        room: list[Quantity] = [0.0] * len(columns)
        for column, price in enumerate(columns):
            if column // several == turn.begins:
                room[column] = price.working
            elif column // several == turn.ends:  # its own gradients and activations are counted as after it
                own = price.states[Role.GRADIENT] * (1.0 - prices.held_room)
                room[column] = price.working + price.saved + price.gathered * (1 - prices.pipelined) - own
        yield [a + part * (b - a) for a, b, part in zip(running, ready, parts, strict=True)], room
