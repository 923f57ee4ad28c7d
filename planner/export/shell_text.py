"""Launch files as text, before they are read: bounded, printable; flags alone or a script."""

from __future__ import annotations

import re
import shlex

from planner.errors import InputError
from planner.export.shell_expand import MOST_BYTES
from planner.files import plain


def checked(name: str, text: str) -> str:
    """The text of a file, with line ends as bash has them. Raises InputError for what is no text."""
    if len(text) > MOST_BYTES:
        raise InputError(
            f"{plain(name)}: {len(text):,} characters: launch files are read up to {MOST_BYTES:,}"
        )
    text = text.replace("\r\n", "\n").replace("\ufeff", "")
    if bad := re.search("[\x00-\x08\x0b-\x1f\x7f\ue000\ue001\ufffd\ud800-\udfff]", text):
        line = text.count("\n", 0, bad.start()) + 1
        raise InputError(f"{plain(name)}, line {line}: a character {bad[0]!r}: this is no launch script")
    return text


def is_arguments(text: str) -> bool:
    """Is a text flags alone, as ``$(cat FILE)`` takes them? Its first word is one."""
    return next((line.strip().startswith("-") for line in text.splitlines() if _speaks(line)), False)


def _speaks(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def arguments(name: str, text: str) -> list[str]:
    """The words of a file with flags alone: quotes and comments as in a shell. Raises InputError."""
    try:
        return shlex.split(checked(name, text).replace("\\\n", " "), comments=True)
    except ValueError:
        raise InputError(f"{plain(name)}: a quote that is opened is not closed: close it") from None
