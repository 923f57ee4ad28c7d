"""Readings out of text: logs of Megatron-LM and torchtitan, and tables of one's own.

Formats, each as the software prints it:

- Megatron-LM, ``report_memory`` (core 0.16): one line per rank with the allocator's present and most
  bytes in MB of 2^20 bytes, and with ``--log-device-memory-used`` those in use of the whole GPU.
- torchtitan, ``MetricsProcessor`` (0.1 to 0.3): one line per logged step with the most that the
  allocator held since the line before, in GiB and in percent of the GPU.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from planner.errors import InputError
from planner.files import plain
from planner.readings import MAX_TABLE_BYTES, Reading, Readings, lines, number
from planner.units import GIB, MIB, SUFFIXES

MEGATRON_MARK = "memory (MB)"
MEGATRON_START = re.compile(r"(?:\[Rank (\d{1,9})\][^|\[\]]{0,200})?memory \(MB\)")
MEGATRON_FIELD = re.compile(r"\| ([a-z][a-z ]{0,40}): ([^\s|\[]{0,60})")
MEGATRON_NEEDS = ("allocated", "max allocated", "reserved", "max reserved")
DEVICE_FIELD = "total device memory used"
DEGREES = re.compile(r"(?:data|context|tensor-model|pipeline-model)-parallel[- ]size: (\d{1,9})")
OWN_ESTIMATE = "Theoretical memory footprints:"
TOTAL = re.compile(r"total=([\d.]{1,30}) MB")

TITAN_STEP = re.compile(r"(validate )?step:\s{0,10}(\d{1,12})\s")
TITAN_MEMORY = re.compile(r"([^\sA-Z(]{1,40})GiB\(([^%)]{1,40})%\)")
TITAN_GPU = re.compile(r"[A-Z]{1,12} capacity: (.{1,100}?) with ([\d.]{1,30})GiB memory")
RANK = re.compile(r"\[(?:rank|default)(\d{1,9})\]")

SIZES = ("allocated", "active", "reserved", "predicted")  # names that want a unit
UNITS = {**SUFFIXES, "bytes": 1}
COLUMN = re.compile(r"(allocated|active|reserved|device|predicted)_([a-z]{1,5})")
TITAN_COLUMN = re.compile(r"(?:.{0,80}[ /])?memory/max_(active|reserved)\(gib\)")


def text_format(path: Path) -> str:
    """``megatron``, ``torchtitan`` or ``csv``, by the first line that is unmistakable."""
    for count, line in lines(path):
        if count == 1 and any(_column(cell) or cell.strip().lower() in SIZES for cell in line.split(",")):
            return "csv"
        if MEGATRON_MARK in line and "allocated" in line:
            return "megatron"
        if _titan_step(line):
            return "torchtitan"
    raise InputError(
        f"{path}: no reading of memory in it: neither a log of Megatron-LM ('{MEGATRON_MARK} | "
        "allocated: ...') or torchtitan ('step: ... memory: ...GiB'), nor a table with columns such "
        "as allocated_gib and reserved_gib"
    )


@dataclass(slots=True)
class _Process:
    """What a rank has reported so far, and how often it was started."""

    last: Reading
    step: int = 0
    starts: int = 1


def _named(path: Path, rank: str, starts: int) -> str:
    return f"{plain(path.name, 30)} rank {rank}" + (f" start {starts}" if starts > 1 else "")


def _megatron_reports(path: Path, count: int, line: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Ranks and their fields in MB; two ranks' lines may have run into one."""
    starts = list(MEGATRON_START.finditer(line))
    for one, after in zip(starts, [*starts[1:], None], strict=True):
        part = line[one.end() : after.start() if after else None]
        fields = {name.strip(): value for name, value in MEGATRON_FIELD.findall(part)}
        if missing := [name for name in MEGATRON_NEEDS if name not in fields]:
            raise InputError(f"{path}:{count}: the memory report is cut off before {missing[0]!r}")
        wanted = [*MEGATRON_NEEDS, *([DEVICE_FIELD] if DEVICE_FIELD in fields else [])]
        yield one[1] or "0", {name: number(fields[name], name, f"{path}:{count}") for name in wanted}


def read_megatron(path: Path) -> Readings:
    """A Megatron-LM log: each rank's last report, of each time that it was started.

    A report's ``max`` figures only rise while a process lives: where they fall, a new one began.
    """
    done: list[Reading] = []
    ranks: dict[str, _Process] = {}
    notes: list[str] = []
    groups: int | None = None
    for count, line in lines(path):
        if "-parallel" in line and "world size:" in line:
            groups = sum(int(degree) > 1 for degree in DEGREES.findall(line))
        if not notes and OWN_ESTIMATE in line and (own := TOTAL.search(line)):
            total = number(own[1], "total", f"{path}:{count}") * MIB / GIB
            notes.append(f"{plain(path.name)}: Megatron-LM's own estimate is {total:.1f} GiB; it is not used")
        if MEGATRON_MARK not in line:
            continue
        for rank, mb in _megatron_reports(path, count, line):
            if mb["allocated"] > mb["max allocated"] or mb["reserved"] > mb["max reserved"]:
                raise InputError(f"{path}:{count}: rank {rank}: more than the most: a garbled report")
            before = ranks.get(rank)
            starts = 1 if before is None else before.starts
            if before is not None and mb["max allocated"] * MIB < (before.last.allocated or 0):
                done.append(before.last)
                starts += 1
            now = Reading(
                name=_named(path, rank, starts),
                where=f"{path}:{count}",
                allocated=mb["max allocated"] * MIB,
                reserved=mb["max reserved"] * MIB,
                groups=groups,
            )
            if DEVICE_FIELD in mb:
                now = replace(now, device=mb[DEVICE_FIELD] * MIB, reserved_then=mb["reserved"] * MIB)
            elif before is not None and before.starts == starts:
                now = replace(now, device=before.last.device, reserved_then=before.last.reserved_then)
            ranks[rank] = _Process(now, starts=starts)
    readings = (*done, *(one.last for one in ranks.values()))
    return Readings("megatron", readings, tuple(notes), framework="megatron")


def _titan_step(line: str) -> tuple[int, str] | None:
    """Number and memory of a training step's line, as text; None for any other line."""
    head, colon, memory = line.partition("memory:")
    match = TITAN_STEP.search(head[-500:]) if colon else None
    return None if match is None or match[1] else (int(match[2]), memory.lstrip()[:60])


def _titan_memory(path: Path, count: int, text: str, capacity: float | None) -> float:
    """Bytes of ``82.40GiB(86.70%)``; the two figures must agree with the GPU's size, if known."""
    where = f"{path}:{count}"
    match = TITAN_MEMORY.match(text)
    if not match:
        raise InputError(f"{where}: memory {plain(text, 40)!r} is not as in 82.40GiB(86.70%): cut off?")
    size, percent = number(match[1], "memory", where) * GIB, number(match[2], "percentage", where)
    if capacity is not None and abs(size - capacity * percent / 100) > 0.02 * GIB + 0.005 * capacity:
        raise InputError(
            f"{where}: {plain(text, 40)} does not agree with a GPU of {capacity / GIB:.2f} GiB: "
            "lines of several runs mixed?"
        )
    return size


def read_torchtitan(path: Path) -> Readings:
    """A torchtitan log: the most that the allocator held at any step, per rank and start.

    Steps of validation and the line before training are left out. The log has no allocated bytes.
    """
    done: list[Reading] = []
    ranks: dict[str, _Process] = {}
    short = plain(path.name, 30)
    notes = [
        f"{short}: a torchtitan log has reserved bytes only; for the allocator's part give a CSV with its "
        "metrics memory/max_active(GiB) and memory/max_reserved(GiB)"
    ]
    capacity: float | None = None
    for count, line in lines(path):
        if " capacity: " in line and (gpu := TITAN_GPU.search(line)):
            capacity = number(gpu[2], "capacity", f"{path}:{count}") * GIB
            note = f"{short}: run on {plain(gpu[1])} with {capacity / GIB:.2f} GiB"
            notes += [note] if note not in notes else []
        found = _titan_step(line)
        if found is None:
            continue
        step, size = found[0], _titan_memory(path, count, found[1], capacity)
        tag = RANK.search(line[:300])
        rank = tag[1] if tag else "0"
        before = ranks.get(rank)
        starts = 1 if before is None else before.starts
        if before is not None and step <= before.step:
            done.append(before.last)
            starts, before = starts + 1, None
        if before is not None and size <= (before.last.reserved or 0):
            ranks[rank] = _Process(before.last, step, starts)
            continue
        now = Reading(_named(path, rank, starts), f"{path}:{count}", reserved=size)
        ranks[rank] = _Process(now, step, starts)
    readings = (*done, *(one.last for one in ranks.values()))
    return Readings("torchtitan", readings, tuple(notes), framework="torchtitan")


def _column(heading: str) -> tuple[str, float] | None:
    """What a column holds, and its unit in bytes: ``("reserved", 2**30)`` of ``reserved_gib``."""
    name = heading.strip().strip('"').lower()
    if name == "groups":
        return "groups", 1
    if titan := TITAN_COLUMN.fullmatch(name):
        return titan[1], GIB
    match = COLUMN.fullmatch(name)
    return (match[1], UNITS[match[2]]) if match and match[2] in UNITS else None


def _columns(path: Path, headings: list[str]) -> dict[int, tuple[str, float]]:
    """Which columns are read, by their place."""
    found: dict[int, tuple[str, float]] = {}
    for place, heading in enumerate(headings):
        name = heading.strip().lower()
        column = ("name", 1.0) if name == "name" else _column(heading)
        if column is None:
            if re.split(r"[\W_]", name)[0] in SIZES:
                raise InputError(
                    f"{path}:1: column {plain(heading)!r} has no unit: call it as in allocated_gib, "
                    "with _gib, _mib, _gb, _mb or _bytes"
                )
            continue
        if column[0] in (known[0] for known in found.values()):
            raise InputError(f"{path}:1: {column[0]} twice, in two columns: keep one")
        found[place] = column
    if not found:
        raise InputError(f"{path}:1: no column as in allocated_gib, reserved_gib, device_gib or groups")
    return found


def read_csv(path: Path) -> Readings:
    """A table with a heading: ``allocated_gib``, ``reserved_gib``, ``device_gib``, ``groups`` ...

    Units by suffix: gib, mib, kib (powers of 1024), gb, mb, kb (of 1000), b or bytes. ``active`` is
    taken for ``allocated`` where that is missing. Other columns are left alone and named.
    """
    text = [line for _, line in lines(path, MAX_TABLE_BYTES)]
    rows = csv.reader(text, strict=True)
    readings: list[Reading] = []
    try:
        headings = next(rows)
        columns = _columns(path, headings)
        for row in rows:
            if any(cell.strip() for cell in row):
                readings.append(_row(path, rows.line_num, headings, columns, row))
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not a table: {error}") from None
    titan = any(TITAN_COLUMN.fullmatch(heading.strip().lower()) for heading in headings)
    if titan and readings:
        readings = [max(readings, key=lambda one: one.reserved or 0)]  # its rows are one run's steps
    other = [plain(heading, 30) for place, heading in enumerate(headings) if place not in columns]
    notes = [f"{plain(path.name)}: columns not read: {', '.join(other[:8])}"] if other else []
    kinds = {column[0] for column in columns.values()}
    if "active" in kinds and "allocated" not in kinds:
        notes.append(f"{plain(path.name)}: active bytes are taken for allocated ones")
    return Readings("csv", tuple(readings), tuple(notes), framework="torchtitan" if titan else None)


def _row(
    path: Path, count: int, headings: list[str], columns: dict[int, tuple[str, float]], row: list[str]
) -> Reading:
    """The reading of a row; an empty cell says nothing."""
    where = f"{path}:{count}"
    if len(row) != len(headings):
        raise InputError(f"{where}: {len(row)} cells under {len(headings)} headings: cut off?")
    values: dict[str, float] = {}
    name = f"{plain(path.name, 30)}:{count}"
    for place, (kind, unit) in columns.items():
        cell = row[place].strip()
        if kind == "name":
            name = plain(cell) or name
        elif cell:
            values[kind] = number(cell, plain(headings[place]), where) * unit
    groups = values.get("groups")
    if groups is not None and groups != int(groups):
        raise InputError(f"{where}: groups is {groups:g}: a whole number is needed")
    if not values.keys() - {"groups"}:
        raise InputError(f"{where}: a row without a size")
    return Reading(
        name=name,
        where=where,
        allocated=values.get("allocated", values.get("active")),
        reserved=values.get("reserved"),
        device=values.get("device"),
        groups=None if groups is None else int(groups),
        predicted=values.get("predicted"),
    )
