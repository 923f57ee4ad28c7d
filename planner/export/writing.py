"""Writes an export's files into a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from planner.errors import InputError
from planner.files import plain, reason_of, write_whole


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Writes files of an export, each whole or not at all; those that start something may be executed.

    A file of the same name is replaced if its first lines say that it is an export's too. Raises InputError.
    """
    shown = f"--output {plain(str(folder))}"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{shown} cannot be made: {reason_of(error)}") from None
    for name in files:
        path = folder / name
        if path.exists() and not _ours(path):
            raise InputError(f"{shown}: {name} is there and not an export: choose another folder")
    for name, text in files.items():
        write_whole(folder / name, text, shown, name)
        if text.startswith("#!"):
            (folder / name).chmod(0o755)


def _ours(path: Path) -> bool:
    """Was a file written by an export? Its first lines name the planner and the plan."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"planner " in file.read(400)
