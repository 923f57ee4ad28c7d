"""Job files: a command's options in YAML, kept in a repository and read with ``--job``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import InputError, nearest_names
from planner.files import content, named, plain, write_whole, yaml_in

MOST_BYTES = 65_536
SCHEMA = "planner.job/1"
PATHS = ("model", "profile")
"""Options that may be a path: a relative one is of the job file's folder."""


def read_job(path: Path, known: Mapping[str, bool]) -> dict[str, Any]:
    """Options by name, as a command line would have them. ``known`` says which may be given repeatedly.

    A key is an option's long name, with ``-`` or ``_``; a list stands for values with commas between them,
    a mapping for NAME=VALUE. Raises InputError for what is not such a file: it is data, of bounded size,
    without tags, anchors or keys given twice.
    """
    shown = named(path)
    found = _mapping(content(path, MOST_BYTES, "a job file"), shown)
    schema = found.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise InputError(f"{shown}: schema {plain(str(schema))} is not known here: use {SCHEMA}")
    options: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = nearest_names(name, known).replace("_", "-")
            raise InputError(f"{shown}: {plain(str(key))} is no option of this command: {near}")
        if value is None:
            continue
        options[name] = _value(value, f"{shown}: {name}", repeatable=known[name])
        beside = path.parent / str(options[name])
        if name in PATHS and ("/" in str(options[name]) or beside.suffix == ".json") and beside.exists():
            options[name] = str(beside)
    return options


def _value(value: Any, where: str, repeatable: bool) -> Any:
    """A value as a command line would have it."""
    if isinstance(value, dict):
        value = [f"{name}={_word(one, where)}" for name, one in value.items()]
    elif isinstance(value, bool):
        return value
    if isinstance(value, list):
        words = [_word(one, where) for one in value]
        return words if repeatable else ",".join(words)
    return [_word(value, where)] if repeatable else _word(value, where)


def _word(value: Any, where: str) -> str:
    if isinstance(value, bool):  # YAML's on and off
        return "on" if value else "off"
    if isinstance(value, (str, int, float)):
        return str(value)
    raise InputError(f"{where} is {plain(str(value))}: use a number, a word or a list of them")


def _mapping(data: bytes, shown: str) -> dict[str, Any]:
    """The one mapping of a YAML file."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{shown}: not text: give a job file") from None
    found = yaml_in(text, shown)
    if not isinstance(found, dict) or not found:
        raise InputError(f"{shown}: a job is a mapping of options, as in 'model: llama-65b'")
    return {str(name): value for name, value in found.items()}


def text_of(given: Mapping[str, Any], command: str) -> str:
    """A job file of options that were given, with the command that reads it."""
    import yaml

    lines = yaml.safe_dump({"schema": SCHEMA, **given}, sort_keys=False, allow_unicode=True, width=100)
    return f"# planner {command} --job FILE\n{lines}"


def write_job(given: Mapping[str, Any], command: str, path: Path) -> None:
    """Writes a job file, whole or not at all."""
    write_whole(path, text_of(given, command), f"--save-job {plain(str(path))}", "job.yaml")


def command_line(command: str, given: Mapping[str, Any], flags: Mapping[str, tuple[str, str]]) -> str:
    """The command that gives these options, as a shell takes it.

    ``flags`` are each option's long name, and the one that says no.

    >>> command_line("search", {"model": "a b"}, {"model": ("--model", "")})
    "planner search --model 'a b'"
    """
    words = ["planner", command]
    for name, value in given.items():
        yes, no = flags[name]
        if isinstance(value, bool):
            words.append(yes if value else no)
        else:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += [yes, str(one)]
    return shlex.join(words)
