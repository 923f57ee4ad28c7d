"""Files from users: regular, of a bounded size, and what of them may be shown; and files for them, whole."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def deeper(value: Any, most: int) -> bool:
    """Are there more than so many levels of lists and objects within each other?

    >>> deeper({"a": [1]}, 2), deeper({"a": [1]}, 1)
    (False, True)
    """
    level = [value]
    for _ in range(most + 1):
        held = [one for one in level if isinstance(one, (dict, list))]
        level = [inner for one in held for inner in (one.values() if isinstance(one, dict) else one)]
        if not held:
            return False
    return True


def yaml_in(text: str, shown: str) -> Any:
    """What a text of YAML says, without tags, anchors and keys given twice. Raises InputError.

    It is for the caller to bound the text: the parser is slow.
    """
    import yaml

    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise InputError(f"{shown}: anchors and aliases are not read: write the value out")
        _check_twice(yaml.compose(text, yaml.SafeLoader), shown)
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        why = getattr(error, "problem", None) or "it is nested too deep"
        raise InputError(f"{shown}{line}: not YAML: {plain(str(why))}") from None


def _check_twice(node: Any, shown: str) -> None:
    pairs = getattr(node, "value", None)
    if not isinstance(pairs, list):
        return
    names = []
    for pair in pairs:
        if isinstance(pair, tuple):
            names.append(str(pair[0].value))
            _check_twice(pair[1], shown)
        else:
            _check_twice(pair, shown)
    for one, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{shown}: {plain(one)} is given twice: keep one of them")


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
