"""The settings of torchtitan's TOML (0.2.2): names, types, defaults; what of a file is none of them.

torchtitan refuses names that it does not know, but takes values of any type: those fail on the GPUs, or are
read as something else. Sections and keys are as in config/job_config.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from planner.export.imported import Finding
from planner.files import plain

MOVED: Mapping[str, str] = {
    "training.batch_size": "training.local_batch_size",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.compile": "compile.enable",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "experimental.enable_async_tensor_parallel": "parallelism.enable_async_tensor_parallel",
    "model.tokenizer_path": "model.hf_assets_path",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "float8.filter_fqns": "quantize.linear.float8.filter_fqns",
    "float8.enable_fsdp_float8_all_gather": "quantize.linear.float8.enable_fsdp_float8_all_gather",
}
"""Names of earlier releases, and where they went."""
EXTENDING = ("job.custom_config_module", "experimental.custom_args_module")
"""Settings that name a module with more settings: others are its own then."""


@cache
def keys() -> Mapping[str, tuple[str, Any]]:
    """All settings by dotted name: type and default. ``'a'|'b'`` is a choice, ``int|none`` a union."""
    table = json.loads((Path(__file__).parent / "data" / "torchtitan_keys.json").read_bytes())
    return {name: (kind, default) for name, (kind, default) in table["keys"].items()}


@cache
def sections() -> frozenset[str]:
    """Names of tables, nested ones dotted."""
    parts = [name.split(".")[:-1] for name in keys()]
    return frozenset(".".join(own[:n]) for own in parts for n in range(1, len(own) + 1))


def flattened(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of a TOML document by dotted name; a table that is no section is a value."""
    for name, value in document.items():
        path = prefix + name
        if isinstance(value, dict) and (path in sections() or path not in keys()) and path.count(".") < 6:
            yield from flattened(value, f"{path}.")
        else:
            yield path, value


def checked(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """The settings that are of the right type, and what is wrong with the others."""
    found: dict[str, Any] = {}
    findings: list[Finding] = []
    given = dict(flattened(document))
    extended = any(given.get(name) for name in EXTENDING)
    for path, value in given.items():
        shown = plain(path, 120)
        if path not in keys() and path not in sections() and extended:
            found[shown] = value
        elif path in sections():
            wrong = f"{_shown(value)} in place of a table"
            findings.append(Finding("error", shown, wrong, f"write [{path}]"))
        elif path not in keys():
            findings.append(Finding("error", shown, "torchtitan 0.2.2 has no such setting", _nearest(path)))
        elif not fits(value, keys()[path][0]):
            kind, default = keys()[path]
            rule = f"{_shown(value)} is not {words(kind)}"
            unsaid = (
                "" if path.startswith(("activation", "compile")) else "; torchtitan itself does not check"
            )
            fix = f"write {_toml(default)}" if default not in (None, "", []) else "leave it out"
            findings.append(Finding("error", shown, rule + unsaid, fix))
        else:
            found[path] = value
    return found, findings


def fits(value: Any, kind: str) -> bool:
    """Is a value of TOML one of a type?

    >>> fits(8, "int|none"), fits(True, "int"), fits("full", "'full'|'none'"), fits(["a"], "list[str]")
    (True, False, True, True)
    """
    return any(_is(value, part) for part in kind.split("|"))


def _is(value: Any, part: str) -> bool:
    if part.startswith("list["):
        inner = part[5:-1]
        return isinstance(value, list) and all(_is(one, inner) for one in value)
    if part.startswith("'"):
        return bool(value == part.strip("'"))
    if part == "float":  # a whole number will do
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if part == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, {"str": str, "bool": bool}.get(part, type(None)))


def words(kind: str) -> str:
    """A type in words.

    >>> words("int|none"), words("'full'|'none'")
    ('a whole number', 'full or none')
    """
    parts = [part for part in kind.split("|") if part != "none"]
    if parts[0].startswith("'"):
        names = [part.strip("'") for part in parts]
        return f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]
    known = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    return known.get(parts[0], "a list of lists of names" if "list[list" in kind else "a list of names")


def _nearest(path: str) -> str:
    if path in MOVED:
        return f"it is {MOVED[path]} now"
    section, _, name = path.rpartition(".")
    here = [one for one in keys() if one.rpartition(".")[0] == section]
    last = [one.rpartition(".")[2] for one in here]
    if near := get_close_matches(name[:100], last, n=1, cutoff=0.6):
        return f"did you mean {near[0]}?"
    if near := [one for one in keys() if one.rpartition(".")[2] == name]:
        return f"it is in another section: {near[0]}"
    near = get_close_matches(path[:200], keys(), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "leave it out"


def _shown(value: Any) -> str:
    return plain(repr(value), 60)


def _toml(value: Any) -> str:
    return json.dumps(value)
