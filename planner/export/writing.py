"""Writes an export's files into a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from planner.errors import InputError
from planner.files import plain, reason_of, write_whole

HEADER = re.compile(rb"planner \d[\w.]*, plan [0-9a-f]{12}")
"""What the first lines of an export's files have (:meth:`planner.export.base.Subject.header`)."""

PLANS = re.compile(rb'"schema": "planner\.plans/1"')
"""What plans begin with. One of the same name is replaced; others may lie in the folder."""


def write_folder(folder: Path, files: Mapping[str, str], force: bool = False) -> None:
    """Writes files of an export, each whole or not at all; those that start something may be executed.

    Where the folder has files that are not these, of another export or changed since, it is left as it is:
    they would be started together. ``force`` takes the place of exports, never of other files of the same
    name. Raises InputError.
    """
    shown = f"--output {plain(str(folder))}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{shown} cannot be made: {reason_of(error)}") from None
    for name in files:
        path = folder / name
        if (path.exists() or path.is_symlink()) and not (_ours(path, PLANS) or _same(path, files)):
            raise InputError(f"{shown}: {name} is there and not an export: choose another folder")
    stale = [path for path in sorted(folder.iterdir()) if _ours(path) and not _same(path, files)]
    if stale and not force:
        raise InputError(
            f"{shown} has {stale[0].name} of another export, or changed since: choose another folder, or "
            "replace its exports with --force"
        )
    for path in stale:
        path.unlink()
    for name, text in files.items():
        write_whole(folder / name, text, shown, name)
        if text.startswith("#!"):
            (folder / name).chmod(0o755)


def _same(path: Path, files: Mapping[str, str]) -> bool:
    """Is a file what would be written?"""
    text = files.get(path.name)
    return text is not None and path.is_file() and path.read_bytes() == text.encode()


def _ours(path: Path, also: re.Pattern[bytes] = HEADER) -> bool:
    """Was a file written by an export, or as ``also`` has it?"""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(1000)
    return (HEADER.search(first) or also.search(first)) is not None
