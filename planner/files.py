"""Files from users: regular, of a bounded size, and what of them may be shown; and files for them, whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from planner.errors import InputError


def plain(text: str, most: int = 60) -> str:
    """Text of a file as it may be shown: printable, on one line, of bounded length."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: most + 1]).strip()
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def named(path: Path) -> str:
    """A path as it may be shown; of a long one its name alone."""
    whole = str(path)
    return plain(whole if len(whole) <= 60 else path.name)


def sized(path: Path, most: int, what: str) -> int:
    """The size of a regular file that is neither empty nor larger than ``most`` bytes."""
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file")
        if not path.is_file():
            raise InputError(f"{path}: not a regular file; give {what}, as a file")
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{plain(str(path))}: cannot be read: {reason_of(error)}") from None
    if size == 0:
        raise InputError(f"{path}: empty")
    if size > most:
        raise InputError(f"{path}: {size:,} bytes; {what} is read up to {most:,}")
    return size


def reason_of(error: Exception) -> str:
    """An operating system's error in words."""
    return str(getattr(error, "strerror", None) or error)[:120]


def content(path: Path, most: int, what: str) -> bytes:
    """A whole file of bounded size."""
    sized(path, most, what)
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from None
    if len(data) > most:
        raise InputError(f"{path}: grew beyond {most:,} bytes while it was read")
    return data


def write_whole(
    path: Path, text: str | bytes, shown: str, example: str, check: Callable[[], None] = lambda: None
) -> None:
    """Writes a file whole or not at all: to a new one beside it, which takes its name after ``check``.

    To a device or pipe, such as /dev/stdout, as it comes. ``shown`` is what errors call the path, ``example``
    a name in a folder. Raises InputError if it cannot be written.
    """
    temporary = path.parent / f".{path.name[:100]}.{os.getpid()}.tmp"
    made = False
    try:
        data = text.encode() if isinstance(text, str) else text
        if path.is_dir():
            raise InputError(f"{shown} is a folder: name a file in it, as in {path / example}")
        if not path.parent.is_dir():
            raise InputError(f"{shown} cannot be written: the folder {path.parent} does not exist")
        if path.parts[:2] in (("/", "dev"), ("/", "proc")) or (path.exists() and not path.is_file()):
            with path.open("wb") as file:
                file.write(data)
            return
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        made = True
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be written: {reason_of(error)}") from None
    finally:
        if made:
            temporary.unlink(missing_ok=True)
