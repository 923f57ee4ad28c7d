"""Node names as Slurm writes lists of them: ``h100-[001-003,007],login``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from planner.errors import InputError
from planner.files import plain

MOST = 200_000
"""Names that a list may stand for."""
PART = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


def names_of(text: str) -> list[str]:
    """The names that a list stands for, in its order. Raises InputError.

    >>> names_of("h100-[001-003,7],login")
    ['h100-001', 'h100-002', 'h100-003', 'h100-7', 'login']
    """
    stripped = text.strip()
    parts = PART.findall(stripped)
    if not parts or ",".join(parts) != stripped:
        raise InputError(f"nodes {plain(text)!r}: write names as in h100-[001-008],h100-012")
    names: list[str] = []
    for part in parts:
        for name in _expanded(part.strip()):
            names.append(name)
            if len(names) > MOST:
                raise InputError(f"nodes {plain(text)!r}: more than {MOST:,} names")
    return names


def _expanded(part: str) -> Iterator[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    inside, _, after = rest.partition("]")
    for piece in inside.split(","):
        found = RANGE.fullmatch(piece.strip())
        if not found:
            raise InputError(f"nodes {plain(part)!r}: in brackets write numbers, as in [1-8,12]")
        first, last = found[1], found[2] or found[1]
        for number in range(int(first), int(last) + 1):
            for tail in _expanded(after):
                yield f"{before}{number:0{len(first)}d}{tail}"
