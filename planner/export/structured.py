"""JSON and YAML that users wrote: bounded data, and which of its keys a tool knows (data/known_keys.json).

The list of keys was taken from the installed projects that it names with their versions. DeepSpeed takes any
top-level key and accelerate any key of an inner section without a word, so that a misspelt one does nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from planner.errors import InputError, nearest_names
from planner.export.imported import Finding
from planner.files import deeper, named, plain, yaml_in

MOST_DEPTH = 30
MOST_YAML = 200_000
"""Characters of YAML that are read: its parser is slow."""
HEADER = "_planner"
"""The key of a JSON file's header: JSON has no comments, and DeepSpeed reads past other top-level keys."""


@cache
def keys_of(tool: str) -> dict[str, frozenset[str]]:
    """The keys that a tool knows, by section; the outermost section is the empty name."""
    found = _known()[tool]["keys"]
    return {section: frozenset(names) for section, names in found.items()}


@cache
def removed_of(tool: str) -> tuple[frozenset[str], frozenset[str]]:
    """Keys that DeepSpeed once had and now refuses: of the outermost section, of ``zero_optimization``."""
    found = _known()[tool]
    return frozenset(found["removed"]), frozenset(found["removed_zero"])


SILENT = {
    ("deepspeed", ""),
    ("deepspeed", "activation_checkpointing"),
    ("deepspeed", "pipeline"),
    ("deepspeed", "data_types"),
    ("accelerate", "fsdp_config"),
    ("accelerate", "deepspeed_config"),
}
"""Tools and sections whose own parser says nothing of a key that it does not know."""


def source_of(tool: str) -> str:
    """Where the keys of a tool were read."""
    return str(_known()[tool]["source"])


@cache
def _known() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "known_keys.json").read_text())
    return found


def unknown_keys(
    tool: str, found: Mapping[str, Any], severity: Any = "error", section: str = ""
) -> Iterator[Finding]:
    """Keys that a tool does not know, section by section, with the nearest that it does."""
    known = keys_of(tool)
    for key, value in found.items():
        name = f"{section}.{key}" if section else key
        if str(key).startswith(("_", "//", "#")):  # comments of those who write JSON
            continue
        if key not in known[section]:
            where = f"{tool}'s {section}" if section else tool
            yield Finding(
                severity,
                plain(name),
                f"is no key of {where}" + ", which reads past it" * ((tool, section) in SILENT),
                nearest_names(str(key), known[section]),
            )
        elif isinstance(value, Mapping) and name in known:
            yield from unknown_keys(tool, value, severity, name)


def json_of(text: str, name: str) -> dict[str, Any]:
    """The one mapping of a JSON file. Raises InputError.

    DeepSpeed reads HJSON (hjson.load in runtime/config.py), of which comments, quotes and commas that may be
    left out are YAML's as well.
    """
    shown = named(Path(name))
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, shown))
    except RecursionError:
        raise InputError(f"{shown}: nested too deep to be read") from None
    except ValueError as error:
        try:
            return yaml_of(text, name)
        except InputError:
            raise InputError(f"{shown}: not JSON: {plain(str(error))}") from None
    return _checked(found, shown)


def yaml_of(text: str, name: str) -> dict[str, Any]:
    """The one mapping of a YAML file. Raises InputError."""
    shown = named(Path(name))
    if len(text) > MOST_YAML:
        raise InputError(f"{shown}: {len(text):,} characters; YAML is read up to {MOST_YAML:,}")
    return _checked(yaml_in(text, shown), shown)


def _once(pairs: list[tuple[str, Any]], shown: str) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise InputError(f"{shown}: {plain(name)} is given twice: keep one of them")
    return dict(pairs)


def _checked(found: Any, shown: str) -> dict[str, Any]:
    if not isinstance(found, dict) or not found:
        raise InputError(f"{shown}: a configuration is a mapping of keys and values")
    if deeper(found, MOST_DEPTH):
        raise InputError(f"{shown}: nested deeper than {MOST_DEPTH}")
    return {str(key): value for key, value in found.items()}


def dotted(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Settings within sections, as ``section.name``, and their values.

    >>> dict(dotted({"a": {"b": 1}, "c": 2}))
    {'a.b': 1, 'c': 2}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def names_in(values: Mapping[str, Any]) -> frozenset[str]:
    """The names of all settings, with their sections."""
    return frozenset(name for name, _ in dotted(values))


def number_of(value: Any, name: str, least: float = 0, whole: bool = True) -> float | None:
    """A number of a file; None for what is left to be filled in (``auto`` or nothing).

    Raises InputError for what is none, naming the key.
    """
    if value is None or value == "auto":
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        found = float(value)
        if not least <= found <= 1e15 or (whole and found != int(found)):
            raise ValueError
    except (TypeError, ValueError):
        what = f"a whole number, {least:g} or more" if whole else f"a number, {least:g} or more"
        raise InputError(f"{name}: {plain(str(value))}: use {what}") from None
    return int(found) if whole else found


def section_of(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section, empty where there is none. Raises InputError for what is no mapping."""
    value = found.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{name}: {plain(str(value))}: use a mapping of keys and values")
    return {str(key): one for key, one in value.items()}


def is_on(value: Any) -> bool:
    """Is a switch on, however it is written?"""
    return value is True or str(value).strip().lower() in ("true", "1", "yes", "on")
