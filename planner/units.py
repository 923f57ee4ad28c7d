"""Bytes, counts and seconds as text, both ways. Everything inside the package is in SI base units.

A bare number where bytes are meant is an error: ``80`` could be GB or GiB, which differ by 7 %.
"""

from __future__ import annotations

import re

from planner.errors import InputError

KIB, MIB, GIB = 1024, 1024**2, 1024**3
SUFFIXES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SUFFIXES |= {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4}
DAY, HOUR = 86400, 3600
SPANS = {"s": 1, "min": 60, "h": HOUR, "d": DAY, "days": DAY}


def parse_bytes(text: str, what: str = "") -> int:
    """Bytes of ``72GiB`` or ``80 GB``. Raises InputError on a bare number or an unknown unit.

    >>> parse_bytes("72GiB"), parse_bytes("80 GB")
    (77309411328, 80000000000)
    """
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*([a-zA-Z]*)\s*", text)
    if not match or (unit := match[2].lower()) not in SUFFIXES:
        raise InputError(
            f"{what}{text!r} is not a size: write a number and a unit, as in 72GiB (2^30) or 80GB (10^9)"
        )
    return int(float(match[1]) * SUFFIXES[unit])


def parse_fraction(text: str, what: str = "") -> float:
    """0.1 of ``10%`` or ``0.1``. Raises InputError outside 0 ... 0.99."""
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 0.99:
        raise InputError(f"{what}{text!r} is not a fraction: write 10% or 0.1, between 0% and 99%")
    return value


def parse_seconds(text: str, what: str = "") -> float:
    """Seconds of ``10min`` or ``50000h``. Raises InputError on a bare number or an unknown unit.

    >>> parse_seconds("10min"), parse_seconds("1.5 d")
    (600.0, 129600.0)
    """
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*([a-zA-Z]*)\s*", text)
    if not match or (unit := match[2].lower()) not in SPANS:
        raise InputError(f"{what}{text[:40]!r} is not a time: write a number and s, min, h or d, as in 10min")
    return float(match[1]) * SPANS[unit]


def gib(size: float, digits: int = 1) -> str:
    """A size in GiB, as in ``38.7``; the unit is the column's."""
    return f"{size / GIB:,.{digits}f}"


def human_bytes(size: float) -> str:
    """A size with the binary unit that suits it, as in ``2.0 MiB``."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"


def decimal_bytes(size: float) -> str:
    """A size with the decimal unit that storage is sold in, to three digits, as in ``914 GB``.

    >>> decimal_bytes(914_175_410_176), decimal_bytes(2.47e12)
    ('914 GB', '2.47 TB')
    """
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= 0.9995 * scale:
            return f"{about(size / scale)} {unit}"
    return f"{size:,.0f} B"


def about(number: float) -> str:
    """A number to three digits, as in ``1,250,000`` or ``0.4``.

    >>> about(1_253_773.8), about(24.83), about(0.4)
    ('1,250,000', '24.8', '0.4')
    """
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"


def human_count(number: float) -> str:
    """A count in thousands, as in ``65.29 B``."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"


def human_seconds(seconds: float) -> str:
    """A time with the unit that suits it, as in ``14.2 s`` or ``820 ms``."""
    if seconds >= 86400:
        return f"{seconds / 86400:,.1f} days"
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
