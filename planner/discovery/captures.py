"""What a cluster is asked: the output of commands, from files, from standard input, or run here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import InputError, nearest_names
from planner.files import content, named, plain

MOST_BYTES = 128 * 2**20
LONGEST = 60.0
"""Seconds that a command may take."""


@dataclass(frozen=True)
class Command:
    """A command that says something of a cluster; one that is ``optional`` may be missing or fail."""

    words: tuple[str, ...]
    optional: bool = False

    @property
    def shown(self) -> str:
        """As a shell takes it."""
        return shlex.join(self.words)


@dataclass(frozen=True)
class Capture:
    """The output of a command, with what errors call it."""

    name: str
    text: str


@dataclass(frozen=True)
class Asked:
    """What ``--gpus`` asks for: how many GPUs (None: what there is), of what source, from which files."""

    count: int | None
    source: str
    files: tuple[str, ...]


def read_asked(text: str, sources: Sequence[str]) -> Asked:
    """``[COUNT@]from-SOURCE[:FILE,...]``. Raises InputError.

    >>> read_asked("64@from-slurm:nodes.txt,topology.txt", ["slurm"])
    Asked(count=64, source='slurm', files=('nodes.txt', 'topology.txt'))
    """
    shape = re.fullmatch(r"\s*(?:(\d{1,8})@)?from-([\w-]{1,20})(?::(.*\S))?\s*", text, re.I | re.S)
    if not shape or text.rstrip().endswith(":"):
        raise InputError(
            f"{plain(text)}: write from-slurm, or from-slurm:FILE of what its commands printed, "
            "several with commas between, - for standard input; 64@ before it for so many GPUs of them"
        )
    source = shape[2].lower()
    if source not in sources:
        known = [f"from-{one}" for one in sources]
        raise InputError(f"{plain(text)}: {nearest_names(f'from-{source}', known)}")
    files = tuple(one.strip() for one in shape[3].split(",")) if shape[3] else ()
    if not all(files):
        raise InputError(f"{plain(text)}: a file has no name: write from-{source}:nodes.txt")
    if files.count("-") > 1:
        raise InputError(f"{plain(text)}: standard input can be read once")
    count = int(shape[1]) if shape[1] else None
    if count == 0:
        raise InputError(f"{plain(text)}: a cluster needs at least 1 GPU")
    return Asked(count, source, files)


def gather(asked: Asked, commands: Sequence[Command]) -> list[Capture]:
    """The files that are named, or else the output of the commands, run here. Raises InputError."""
    if asked.files:
        return [_read(name) for name in asked.files]
    elsewhere = "; ".join(f"{one.shown} > {n}.txt" for n, one in enumerate(commands, 1) if not one.optional)
    hint = f"run elsewhere {elsewhere}; then give from-{asked.source}:1.txt"
    return [found for one in commands if (found := _run(one, hint)) is not None]


def _read(name: str) -> Capture:
    if name == "-":
        data, shown = sys.stdin.buffer.read(MOST_BYTES + 1), "standard input"
        if len(data) > MOST_BYTES:
            raise InputError(f"{shown}: more than {MOST_BYTES:,} bytes: give fewer nodes or pods")
    else:
        path = Path(name)
        data, shown = content(path, MOST_BYTES, "what a cluster says"), named(path)
    text = data.decode("utf-8", "replace").lstrip("\ufeff")
    if not text.strip():
        raise InputError(f"{shown}: empty")
    return Capture(shown, text)


def _run(command: Command, hint: str) -> Capture | None:
    """Runs a fixed command without a shell, for so long and for so much output.

    None where an optional one cannot be run or fails; of any other the message names what to run elsewhere.
    """
    program = command.words[0]
    try:
        data, status, said = _output(command.words)
    except OSError as error:
        if command.optional:
            return None
        raise InputError(f"{program} cannot be run here ({error.strerror}); {hint}") from None
    if status is None:
        raise InputError(
            f"{command.shown}: no end within {LONGEST:.0f} seconds or {MOST_BYTES:,} bytes; {hint}"
        )
    if status:
        if command.optional:
            return None
        raise InputError(
            f"{command.shown} failed with {status}: {plain(said, 200) or 'it says nothing'}; {hint}"
        )
    text = data.decode("utf-8", "replace")
    if not text.strip() and not command.optional:
        raise InputError(f"{command.shown} says nothing: is this the cluster? Else {hint}")
    return Capture(command.shown, text) if text.strip() else None


def _output(words: Sequence[str]) -> tuple[bytes, int | None, str]:
    """Output, exit status (None: stopped) and the beginning of what went to standard error."""
    stopped = threading.Event()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "LC_ALL": "C"},
        )

        def stop() -> None:
            stopped.set()
            process.kill()

        clock = threading.Timer(LONGEST, stop)
        clock.start()
        try:
            assert process.stdout is not None
            with process.stdout as pipe:
                data = pipe.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                stop()
            status = process.wait()
        finally:
            clock.cancel()
        errors.seek(0)
        said = errors.read(1000).decode("utf-8", "replace").strip().split("\n")[0]
    return data, None if stopped.is_set() else status, said


def documents(capture: Capture) -> Iterator[dict[str, Any]]:
    """The JSON objects of a capture, one or several after each other; lists of them as well.

    Raises InputError for what is none.
    """
    decoder, at = json.JSONDecoder(parse_constant=_no_number), 0
    text = capture.text
    try:
        while at < len(text):
            found, at = decoder.raw_decode(text, at)
            for one in found if isinstance(found, list) else [found]:
                if not isinstance(one, dict):
                    raise ValueError
                yield one
            while at < len(text) and text[at].isspace():
                at += 1
    except (ValueError, RecursionError):
        raise InputError(
            f"{capture.name}: not JSON, or not as it is printed: give the output unchanged"
        ) from None


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def items(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list; none where it is none."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def inner(value: Any, *keys: str) -> Any:
    """What lies under keys within each other; None where one is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def word(value: Any) -> str:
    """A text as it may be shown; empty for anything else."""
    return plain(value, 253) if isinstance(value, str) else ""


def count_of(value: Any, where: str) -> int:
    """A whole number, as JSON or as text. Raises InputError."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(?:\.0+)?", value.strip()):
        value = int(value.strip().split(".")[0])
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**9:
        raise InputError(f"{where}: {plain(str(value))} is no number of GPUs: give the output unchanged")
    return value
