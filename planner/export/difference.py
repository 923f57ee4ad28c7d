"""What a change is in a framework's own words: how the exports of two plans of a job differ."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from planner.export import export
from planner.export.base import Export, NotExpressible, Subject
from planner.export.structured import HEADER, yaml_of

FILES = {"torchtitan": "0.2"}
"""Versions whose configuration is a file, where the usual one's is code."""
READ: Mapping[str, Callable[[str], Mapping[str, Any]]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": lambda text: yaml_of(text, "configuration"),
}
OURS = {HEADER, "run_name"}
"""Settings that say which plan it is."""


def told(framework: str, subject: Subject) -> Export | None:
    """A plan as the framework's configuration; None where it cannot be told."""
    try:
        return export(subject, framework, FILES.get(framework))
    except NotExpressible:
        return None


def changed(before: Export, after: Export) -> tuple[str, ...]:
    """What to set, or to leave out, for the configuration ``before`` to be ``after``; what to do beside it.

    Flags are as a shell takes them, settings of JSON, TOML and YAML as ``section.name = value``.
    """
    old, new = settings_in(before), settings_in(after)
    found = [text for name, text in new.items() if old.get(name) != text]
    gone = [f"without {name}" for name in old if name not in new]
    notes = [note for note in after.notes if note not in before.notes]
    over = [f"no longer: {note}" for note in before.notes if note not in after.notes]
    return (*found, *gone, *notes, *over)


def settings_in(made: Export) -> dict[str, str]:
    """Everything that an export's files and environment set, by name."""
    found: dict[str, str] = {}
    for name, text in made.files.items():
        kind = PurePath(name).suffix
        if kind == ".args":
            lines = [line for line in text.splitlines() if line.startswith("--")]
            found |= {shlex.split(line)[0]: line for line in lines}
        elif kind in READ:
            values = _flat(READ[kind](text))
            found |= {key: f"{key} = {value}" for key, value in values if key not in OURS}
    return found | {name: f"{name}={value}" for name, value in made.env.items()}


def _flat(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", json.dumps(value)
