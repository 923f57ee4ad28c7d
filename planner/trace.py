"""A plan's step as a timeline: what every stage works on, and the bytes it holds meanwhile.

In the Trace Event Format of chrome://tracing, which Perfetto opens too: complete events (``ph`` X) with
``ts`` and ``dur`` in microseconds, counters (C) and names (M). A process is a pipeline stage. The times
are those of the schedule graph (planner/schedule.py); the bytes are model states with all gradients, and
the activations of the passes in flight. Working sets, buffers and what lies outside tensors are in the
plan's peak only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planner.defaults import Job
from planner.files import write_whole
from planner.plan import Plan, pass_seconds, priced_again
from planner.replay import StageReplay
from planner.schedule import Kind, Timed, shown_microbatches, timeline
from strategies.base import STATES

Event = dict[str, Any]
MICROSECONDS = 1e6
MOST_TRACED = 15_000
"""Passes in a trace: some 10 MB of JSON. Later ones are left out."""
NAMES = {
    Kind.FORWARD: "forward",
    Kind.INPUT: "input gradient",
    Kind.WEIGHT: "weight gradient",
    Kind.BACKWARD: "backward",
}


def trace(job: Job, plan: Plan) -> dict[str, Any]:
    """The trace of a plan's step, as JSON: ``traceEvents``, and what of the step is shown."""
    layout = plan.layout.to_layout()
    prices, rows = priced_again(job, plan)
    seconds = pass_seconds(prices, rows)
    m, chunks = layout.grad_accum, layout.chunks
    shown = shown_microbatches(layout.schedule, len(rows), m, chunks)
    passes = timeline(layout.schedule, seconds, shown)
    end = max(one.end for one in passes)
    cut = sorted(one.start for one in passes)[min(len(passes), MOST_TRACED) - 1]
    told = [one for one in passes if one.start <= cut]
    events: list[Event] = []
    for stage in range(len(rows)):
        events += _names(stage)
        works = [one for one in told if one.work.stage == stage]
        replay = StageReplay(prices, stage, rows)
        events += _lane(stage, works, end if len(told) == len(passes) else cut)
        events += _messages(replay, works)
        if len(told) == len(passes):
            events.append(_event(stage, "optimizer step and messages", "update", end, prices.step_seconds))
        events += _memory(replay, works)
    notes = {
        "model": plan.model,
        "layout": layout.describe(),
        "schedule": layout.schedule,
        "step_time_s": plan.step_time_s,
        "critical_path_s": plan.critical_path_s,
        "micro_batches": m,
        "micro_batches_shown": shown,
        "passes": round(len(passes) / shown * m),
        "passes_shown": len(told),
        "memory": "model states with all gradients, and activations of passes in flight; bytes",
    }
    if layout.schedule == "pipedream":
        notes["note"] = "shown from an empty pipeline; without flush the next step follows at once"
    elif len(told) < len(passes) or shown < m:
        notes["note"] = f"a step of {shown} of its {m} micro-batches; the first {len(told)} passes of it"
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": notes}


def _names(stage: int) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": stage, "tid": 0, "args": {"name": f"stage {stage}"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": stage, "tid": 0, "args": {"sort_index": stage}}
    for thread, name in enumerate(("passes", "of these, exposed messages")):
        yield {"ph": "M", "name": "thread_name", "pid": stage, "tid": thread, "args": {"name": name}}


def _event(stage: int, name: str, category: str, start: float, took: float, **args: Any) -> Event:
    event: Event = {"ph": "X", "name": name, "cat": category, "pid": stage, "tid": 0}
    event |= {"ts": float(start) * MICROSECONDS, "dur": float(took) * MICROSECONDS}
    return event | ({"args": args} if args else {})


def _lane(stage: int, works: list[Timed], end: float) -> Iterator[Event]:
    """A stage's passes one after the other, and the bubbles between and around them."""
    clock = 0.0
    for one in works:
        if one.start > clock:
            yield _event(stage, "bubble", "bubble", clock, one.start - clock)
        name = NAMES[one.work.kind]
        kind, number, chunk = one.work.kind, one.work.microbatch, one.work.chunk
        yield _event(
            stage, f"{kind}{number}", name, one.start, one.end - one.start, micro_batch=number, chunk=chunk
        )
        clock = one.end
    if end > clock:
        yield _event(stage, "bubble", "bubble", clock, end - clock)


def _messages(replay: StageReplay, works: list[Timed]) -> Iterator[Event]:
    """What each pass spends on messages that nothing hides, at its end: its layers', and its send."""
    prices = replay.prices
    took = []
    for number, chunk in enumerate(replay.chunks):
        layers = [prices.blocks[block] for block in chunk]
        layers += [prices.embedding] * (replay.first and number == 0)
        layers += [prices.head] * (replay.last and number == len(replay.chunks) - 1)
        ways = ("forward", "backward")
        took.append([sum(float(layer.exposed[way]) for layer in layers) + prices.one_send for way in ways])
    for one in works:
        kind = one.work.kind
        seconds = 0.0 if kind is Kind.WEIGHT else took[one.work.chunk][kind is not Kind.FORWARD]
        if seconds > 0:
            start = max(one.start, one.end - seconds)
            event = _event(replay.stage, "messages", "communication", start, one.end - start)
            yield event | {"tid": 1}


def _memory(replay: StageReplay, works: list[Timed]) -> Iterator[Event]:
    """Model states, and the activations alive after each pass starts (a forward) or ends (a backward)."""
    prices = replay.prices
    ends = sum(float(price.states[role]) * replay.copies[role] for price in replay.ends for role in STATES)
    layers = sum(
        count * float(own.states[role]) * replay.copies[role]
        for count, own in zip(replay.layers, replay.blocks, strict=True)
        for role in STATES
    )
    states = round(ends + layers)
    kept: list[float] = []
    delayed: list[float] = []  # more than that between the two halves of a split backward
    for number, chunk in enumerate(replay.chunks):
        top, bottom = replay.last and number == len(replay.chunks) - 1, replay.first and number == 0
        kept.append(sum(replay.saved[block] for block in chunk))
        kept[-1] += float(prices.head.saved) * top + float(prices.embedding.saved) * bottom
        delayed.append(sum(replay.delayed[block] for block in chunk) + float(prices.head.recomputed) * top)
    now = 0.0
    for one in works:
        size, more, kind = kept[one.work.chunk], delayed[one.work.chunk], one.work.kind
        now += {Kind.FORWARD: size, Kind.INPUT: more, Kind.WEIGHT: -size - more}.get(kind, -size)
        when = one.start if kind is Kind.FORWARD else one.end
        yield {
            "ph": "C",
            "name": "memory",
            "pid": replay.stage,
            "ts": when * MICROSECONDS,
            "args": {"model states": states, "activations": round(now)},
        }


def write_trace(document: dict[str, Any], path: Path) -> None:
    """Writes a trace, whole or not at all; to a device or pipe, such as /dev/stdout, as it comes.

    Raises InputError if it cannot be written.
    """
    text = json.dumps(document, separators=(",", ":")) + "\n"
    write_whole(path, text, f"--trace {str(path)[:200]!r}", "trace.json")
