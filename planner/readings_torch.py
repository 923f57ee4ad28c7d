"""Readings out of PyTorch's own figures: ``torch.cuda.memory_stats()`` and memory snapshots.

The statistics are a dictionary from names such as ``reserved_bytes.all.peak`` to bytes. A snapshot,
``torch.cuda.memory._snapshot()``, lists the allocator's segments at that moment and, where history
was recorded, what happened before. Snapshots are pickles: :mod:`planner.plain_pickle` reads them
without unpickling.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.files import content, plain
from planner.plain_pickle import read_plain_pickle
from planner.readings import MAX_PICKLE_BYTES, Reading, Readings, finite, load_json

MAX_DEVICES = 1024
MAX_EVENTS = 20_000_000
ROUNDING = 512  # bytes: kMinBlockSize of PyTorch's caching allocator
TENSORS = {"alloc": 1, "free_requested": -1}
SEGMENTS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


def read_json(path: Path) -> Readings:
    """A JSON file that is either of the two."""
    data = load_json(path)
    if isinstance(data, dict) and "segments" in data:
        return _snapshot(path, data)
    return _stats(path, data)


def read_stats(path: Path) -> Readings:
    """``torch.cuda.memory_stats()`` as JSON: one, a list of them, or named ones."""
    return _stats(path, load_json(path))


def read_snapshot(path: Path) -> Readings:
    """A memory snapshot, as pickled by ``torch.cuda.memory._dump_snapshot`` or as JSON."""
    data = content(path, MAX_PICKLE_BYTES, "a snapshot")
    if data[:1] != b"\x80":
        return _snapshot(path, load_json(path))
    return _snapshot(path, read_plain_pickle(data, str(path)))


def _stat(stats: dict[str, Any], key: str, where: str) -> float | None:
    """A statistic by its flat name, or by its path in nested dictionaries."""
    value: Any = stats
    if key in stats:
        value = stats[key]
    else:
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    return None if value is None else finite(value, key, where)


def _one_stats(stats: Any, name: str, where: str) -> tuple[Reading, list[str]]:
    if not isinstance(stats, dict):
        raise InputError(f"{where}: {type(stats).__name__} instead of a dictionary of statistics")
    peaks = {key: _stat(stats, f"{key}_bytes.all.peak", where) for key in ("allocated", "reserved")}
    if missing := [key for key, value in peaks.items() if value is None]:
        raise InputError(
            f"{where}: {missing[0]}_bytes.all.peak is missing: not torch.cuda.memory_stats(), or cut off"
        )
    groups = _stat(stats, "groups", where)
    if groups is not None and groups != int(groups):
        raise InputError(f"{where}: groups is {groups:g}: a whole number is needed")
    device = _stat(stats, "device_bytes", where)
    reading = Reading(
        name=plain(str(stats["name"])) if "name" in stats else name,
        where=where,
        allocated=peaks["allocated"],
        reserved=peaks["reserved"],
        device=device,
        reserved_then=None if device is None else _stat(stats, "reserved_bytes.all.current", where),
        groups=None if groups is None else int(groups),
        predicted=_stat(stats, "predicted_bytes", where),
    )
    notes = []
    for key, what in (("num_ooms", "out of memory"), ("num_alloc_retries", "short of memory")):
        if times := _stat(stats, key, where):
            notes.append(f"{reading.name}: {what} {times:g} times; its allocator was squeezed")
            break
    return reading, notes


def _stats(path: Path, data: Any) -> Readings:
    """Readings of parsed statistics."""
    short = plain(path.name, 30)
    many: list[tuple[str, str, Any]]
    if isinstance(data, list):
        many = [(f"{short} rank {rank}", f"{path}, item {rank}", one) for rank, one in enumerate(data)]
    elif isinstance(data, dict) and data and all(isinstance(one, dict) for one in data.values()):
        nested = "allocated_bytes" in data or "reserved_bytes" in data
        named = [(plain(f"{short} {key}"), f"{path}, {plain(key)!r}", one) for key, one in data.items()]
        many = [(short, str(path), data)] if nested else named
    else:
        many = [(short, str(path), data)]
    if not many:
        raise InputError(f"{path}: an empty list")
    found = [_one_stats(one, name, where) for name, where, one in many]
    notes = [note for _, more in found for note in more]
    return Readings("stats", tuple(reading for reading, _ in found), tuple(notes))


def _dictionaries(value: Any, what: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InputError(f"{where}: {what} is not a list of dictionaries: not a memory snapshot")
    return value


def _snapshot(path: Path, data: Any) -> Readings:
    """Readings of a parsed snapshot, one for each GPU that holds something."""
    where = str(path)
    if not isinstance(data, dict) or "segments" not in data:
        raise InputError(f"{where}: no 'segments': not what torch.cuda.memory._snapshot() returns")
    held: dict[int, tuple[float, float]] = {}
    for place, segment in enumerate(_dictionaries(data["segments"], "segments", where)):
        at = f"{where}, segment {place}"
        gpu = int(finite(segment.get("device", 0), "device", at))
        size, used = (finite(segment.get(key), key, at) for key in ("total_size", "allocated_size"))
        if used > size:
            raise InputError(f"{at}: allocated_size {used:,.0f} is more than total_size {size:,.0f}")
        before = held.get(gpu, (0.0, 0.0))
        held[gpu] = (before[0] + used, before[1] + size)
    traces = _traces(data.get("device_traces") or [], where)
    gpus = sorted(held.keys() | {gpu for gpu, trace in enumerate(traces) if trace})
    found = []
    for gpu in gpus:
        trace = traces[gpu] if gpu < len(traces) else []
        found.append(_replayed(path, gpu, held.get(gpu, (0.0, 0.0)), trace))
    readings = tuple(reading for reading, _ in found if reading.reserved)
    return Readings("snapshot", readings, tuple(note for _, note in found))


def _traces(traces: Any, where: str) -> list[list[dict[str, Any]]]:
    if not isinstance(traces, list) or len(traces) > MAX_DEVICES:
        raise InputError(f"{where}: device_traces is not a list for at most {MAX_DEVICES:,} GPUs")
    if sum(len(trace) for trace in traces if isinstance(trace, list)) > MAX_EVENTS:
        raise InputError(f"{where}: more than {MAX_EVENTS:,} events")
    return [_dictionaries(trace, f"device_traces[{gpu}]", where) for gpu, trace in enumerate(traces)]


def _changes(trace: list[dict[str, Any]], where: str) -> Iterator[tuple[float, float]]:
    """What each event added to allocated and reserved bytes, the last event first."""
    for place in range(len(trace) - 1, -1, -1):
        event = trace[place]
        action = event.get("action")
        if not isinstance(action, str):
            raise InputError(f"{where}, event {place}: no action")
        if action in TENSORS or action in SEGMENTS:
            size = finite(event.get("size"), "size", f"{where}, event {place}")
            rounded = -(-size // ROUNDING) * ROUNDING
            yield TENSORS.get(action, 0) * rounded, SEGMENTS.get(action, 0) * size


def _replayed(
    path: Path, gpu: int, end: tuple[float, float], trace: list[dict[str, Any]]
) -> tuple[Reading, str]:
    """The most that was allocated and reserved, found by undoing the trace from its known end.

    A trace gives the sizes that were asked for; they are rounded up as the allocator does.
    """
    where = f"{path}, GPU {gpu}"
    allocated, reserved = end
    most_allocated, most_reserved, events = allocated, reserved, 0
    for tensor, segment in _changes(trace, where):
        events += tensor > 0
        allocated, reserved = allocated - tensor, reserved - segment
        if allocated < 0 or reserved < 0:
            raise InputError(f"{where}: the trace takes more away than there was: cut off or altered")
        most_allocated, most_reserved = max(most_allocated, allocated), max(most_reserved, reserved)
    name = f"{plain(path.name, 30)} GPU {gpu}"
    reading = Reading(name, where, most_allocated or None, most_reserved, at_peak=events > 0)
    if events:
        return reading, f"{name}: the most within {len(trace):,} recorded events"
    return reading, f"{name}: no history was recorded, so its peak is unknown and nothing is fitted to it"
