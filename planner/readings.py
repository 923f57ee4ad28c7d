"""Memory readings of real runs: what one is, what is believed of it, and which reader reads a file.

Every file is untrusted: it must be a regular file of a bounded size, is read as data and never run,
and is refused as a whole, with the line and the reason, as soon as one figure in it cannot be.
Sizes are in bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from planner.errors import InputError, nearest_names
from planner.files import content, plain, reason_of, sized
from planner.units import GIB

MAX_TEXT_BYTES = 2**30  # a log is read line by line
MAX_PICKLE_BYTES = 512 * 2**20
MAX_JSON_BYTES = 64 * 2**20  # parsed, it takes some twenty times its size
MAX_TABLE_BYTES = 16 * 2**20
MAX_LINE_BYTES = 2**20
MAX_READINGS = 100_000
MOST_BYTES = 2**40  # of one GPU: none has a TiB
MOST_RATIO = 10.0  # reserved over allocated: beyond it, one of them is in another unit
MOST_OUTSIDE = 32 * GIB  # the whole GPU over PyTorch's part: beyond it, somebody else's process
MOST_GROUPS = 16
FORMATS = ("megatron", "torchtitan", "stats", "snapshot", "csv")
NUMBER = re.compile(r"[+-]?\d{1,20}(\.\d{0,30})?([eE][+-]?\d{1,3})?")
ESCAPES = re.compile(r"\x1b\[[0-9;?]{0,40}[A-Za-z]")


@dataclass(frozen=True, slots=True)
class Reading:
    """What one process reported of one GPU. Bytes; None is what it did not say."""

    name: str
    where: str  # file and line, for messages
    allocated: float | None = None  # the most that tensors took
    reserved: float | None = None  # the most that PyTorch's allocator held
    device: float | None = None  # in use of the whole GPU, by nvidia-smi's count
    reserved_then: float | None = None  # held by the allocator when ``device`` was read
    groups: int | None = None  # kinds of communicator groups: tensor, pipeline, data
    predicted: float | None = None  # what a plan says that tensors take
    at_peak: bool = True  # are ``allocated`` and ``reserved`` those of the fullest moment?
    run: str | None = None  # of a run that has several readings, one for each rank; None: of its own

    @property
    def outside(self) -> float | None:
        """Bytes in use of the GPU that PyTorch's allocator does not hold."""
        held = self.reserved if self.reserved_then is None else self.reserved_then
        return None if self.device is None or held is None else self.device - held


@dataclass(frozen=True, slots=True)
class Readings:
    """What one file says: its readings, and what to know of them."""

    format: str
    readings: tuple[Reading, ...]
    notes: tuple[str, ...] = field(default=())
    framework: str | None = None  # whose format it is, if only one framework's


def number(text: str, what: str, where: str) -> float:
    """A finite number that is not negative. Raises InputError."""
    text = text.strip()
    if not NUMBER.fullmatch(text):
        hint = "write digits only, the column's name has its unit" if text[:1].isdigit() else "not a number"
        raise InputError(f"{where}: {what} {plain(text, 40)!r}: {hint}")
    return finite(float(text), what, where)


def finite(value: Any, what: str, where: str) -> float:
    """The same of a value that is a number already, as in JSON."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {what} is {type(value).__name__}, not a number")
    if not 0 <= value < 1e300:
        raise InputError(f"{where}: {what} {plain(str(value), 30)}: must be finite and not negative")
    return float(value)


def checked(reading: Reading) -> Reading:
    """The same reading, if it can be true. Raises InputError with its place and the reason."""
    where, allocated, reserved = reading.where, reading.allocated, reading.reserved
    for name in ("allocated", "reserved", "device", "predicted"):
        value = getattr(reading, name)
        if value is not None and not 0 < value <= MOST_BYTES:
            hint = "nothing was measured" if value == 0 else "no GPU has as much: is its unit right?"
            raise InputError(f"{where}: {name} is {value / GIB:,.6g} GiB: {hint}")
    if allocated is not None and reserved is not None:
        shown = f"{where}: allocated {allocated / GIB:,.6g} GiB, reserved {reserved / GIB:,.6g} GiB"
        if allocated > reserved:
            raise InputError(f"{shown}: tensors cannot take more than the allocator holds")
        if reading.at_peak and reserved > MOST_RATIO * allocated:
            raise InputError(f"{shown}: over {MOST_RATIO:g} times as much; are the units mixed up?")
    outside = reading.outside
    if outside is not None and reading.device is not None:
        shown = f"{where}: {reading.device / GIB:,.6g} GiB of the GPU in use"
        if outside < 0:
            raise InputError(f"{shown}, {-outside / GIB:,.6g} GiB less than PyTorch alone holds")
        if outside > MOST_OUTSIDE:
            raise InputError(
                f"{shown}, {outside / GIB:,.6g} GiB more than PyTorch holds: is another process on "
                "that GPU, or are the units mixed up?"
            )
    if reading.groups is not None and not 0 <= reading.groups <= MOST_GROUPS:
        raise InputError(f"{where}: groups is {reading.groups}: use 0 to {MOST_GROUPS}")
    return reading


def lines(path: Path, most: int = MAX_TEXT_BYTES) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text, without colours; a progress bar's parts come one by one.

    Raises InputError for a line of over a MiB and for what is no text.
    """
    sized(path, most, "text")
    try:
        with path.open("rb") as file:
            count = read = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                count, read = count + 1, read + len(raw)
                if len(raw) > MAX_LINE_BYTES:
                    raise InputError(f"{path}:{count}: a line of over {MAX_LINE_BYTES:,} bytes: not a log")
                if read > most:
                    raise InputError(f"{path}:{count}: text is read up to {most:,} bytes")
                if b"\0" in raw:
                    raise InputError(f"{path}:{count}: not text: it has a zero byte")
                text = raw.decode("utf-8-sig" if count == 1 else "utf-8", "replace")
                for part in text.rstrip("\r\n").split("\r"):
                    yield count, ESCAPES.sub("", part) if "\x1b" in part else part
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from None


def load_json(path: Path) -> Any:
    """A JSON file. Raises InputError for all that can be wrong with it."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a finite number")

    try:
        return json.loads(content(path, MAX_JSON_BYTES, "JSON"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise InputError(f"{path}: not JSON: {reason}") from None


def format_of(path: Path) -> str:
    """Which of :data:`FORMATS` a file is, by its content. Raises InputError for any other."""
    sized(path, MAX_TEXT_BYTES, "file of readings")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from None
    if head[:1] == b"\x80":
        return "snapshot"
    if re.match(rb"(\xef\xbb\xbf)?\s*(\{\s*[\"}]|\[\s*[\[{\]])", head):
        return "json"
    from planner.readings_text import text_format

    return text_format(path)


def read_file(path: Path, given: str | None = None, groups: int | None = None) -> Readings:
    """The readings of a file, each checked; ``groups`` is for those that do not say.

    ``given`` forces one of :data:`FORMATS`. Raises InputError with file, line and reason.
    """
    if given is not None and given not in FORMATS:
        raise InputError(f"--format {plain(given)!r}: {nearest_names(given, FORMATS)}")
    kind = format_of(path) if given is None else given
    found = _reader(kind)(path)
    if not found.readings:
        raise InputError(f"{path}: no reading in it")
    if len(found.readings) > MAX_READINGS:
        raise InputError(f"{path}: {len(found.readings):,} readings; at most {MAX_READINGS:,}")
    run = None if found.format == "csv" else str(path)
    known = tuple(
        checked(replace(one, run=run, groups=groups if one.groups is None else one.groups))
        for one in found.readings
    )
    return replace(found, readings=known)


def _reader(kind: str) -> Callable[[Path], Readings]:
    if kind in ("megatron", "torchtitan", "csv"):
        from planner import readings_text

        return {
            "megatron": readings_text.read_megatron,
            "torchtitan": readings_text.read_torchtitan,
            "csv": readings_text.read_csv,
        }[kind]
    from planner import readings_torch

    return {
        "json": readings_torch.read_json,
        "stats": readings_torch.read_stats,
        "snapshot": readings_torch.read_snapshot,
    }[kind]
