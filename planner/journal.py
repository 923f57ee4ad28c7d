"""The rows of a sweep as they are found: a file of JSON lines that a sweep can go on from.

Each line has the row's key, which stands for all inputs and the planner's version. A last line that was
cut off is as if it were not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from planner.errors import InputError
from planner.files import reason_of

MOST_BYTES = 2**29
"""A sweep of the most points has about a third of it."""
LINE = 20_000


class Journal:
    """A file of rows. It is made with the first row, and its lines are whole once they are written."""

    def __init__(self, path: Path) -> None:
        self.path, self.others, self.broken, self.taken = path, 0, 0, 0
        self.begun = False

    def read(self, resume: bool) -> dict[str, Any]:
        """Rows by key, none of no file. Raises InputError for a file that cannot be gone on with."""
        try:
            if not self.path.exists():
                if not self.path.parent.is_dir():
                    raise InputError(f"{self.path}: the folder {self.path.parent} does not exist")
                return {}
            if not self.path.is_file():
                raise InputError(f"{self.path}: not a regular file; name one for the rows of the sweep")
            if (size := self.path.stat().st_size) > MOST_BYTES:
                raise InputError(f"{self.path}: {size:,} bytes; rows are read up to {MOST_BYTES:,}")
            if not resume:
                if size:
                    raise InputError(f"{self.path} has rows of a sweep: go on with --resume, or remove it")
                return {}
            with self.path.open(encoding="utf-8", errors="replace") as file:
                lines = list(self._lines(file))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {reason_of(error)}") from None
        if self.broken and not lines:
            raise InputError(f"{self.path} has no rows of a sweep: name another file with --state")
        self.taken = len(lines)
        return dict(lines)

    def _lines(self, file: TextIO) -> Iterator[tuple[str, Any]]:
        """The lines that are whole."""
        while line := file.readline(LINE):
            if line == "\n":
                continue
            try:
                found: Any = json.loads(line) if line.endswith("\n") else None
                yield str(found["key"]), found["row"]
            except (ValueError, TypeError, KeyError, RecursionError):
                self.broken += 1

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Adds a row. Raises InputError if it cannot be written."""
        line = json.dumps({"key": key, "row": row}) + "\n"
        try:
            with self.path.open("ab") as file:
                if not self.begun and file.tell():  # what may have been cut off gets a line of its own
                    line = "\n" + line
                self.begun = file.write(line.encode()) > 0
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {reason_of(error)}") from None

    def notes(self) -> Iterator[str]:
        """What its reader should know of the file that was gone on from."""
        if self.taken - self.others:
            yield f"points that {self.path.name} had already: {self.taken - self.others:,}"
        if self.others:
            whose = "of other inputs or another version"
            yield f"rows that {self.path.name} has {whose}, left alone: {self.others:,}"

    def remove(self) -> None:
        """Removes the file, now that all rows are elsewhere."""
        self.path.unlink(missing_ok=True)
