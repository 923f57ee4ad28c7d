"""Megatron-LM's command line as its own parser takes it, with what it would refuse.

Its flags are in planner/export/data/megatron_flags.json, which scripts/megatron_flags writes from the parser
itself. That one takes no abbreviations (``allow_abbrev=False``), no other spellings, and the last of what is
given twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

from planner.export.imported import Finding
from planner.export.shell_expand import shown, unknown_in

MOST_WORDS = 20_000
OLD: dict[str, tuple[str, tuple[str, ...]]] = {
    "--batch-size": ("--micro-batch-size", ("--micro-batch-size",)),
    "--model-parallel-size": ("--tensor-model-parallel-size", ("--tensor-model-parallel-size",)),
    "--checkpoint-activations": (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    ),
    "--activations-checkpoint-method": (
        "--recompute-granularity full --recompute-method",
        ("--recompute-granularity", "full", "--recompute-method"),
    ),
    "--activations-checkpoint-num-layers": ("--recompute-num-layers", ("--recompute-num-layers",)),
    "--checkpoint-num-layers": ("--recompute-num-layers", ("--recompute-num-layers",)),
    "--fp8-hybrid": ("--fp8-format hybrid", ("--fp8-format", "hybrid")),
    "--fp8-e4m3": ("--fp8-format e4m3", ("--fp8-format", "e4m3")),
    "--use-custom-fsdp": ("--use-megatron-fsdp", ("--use-megatron-fsdp",)),
    "--hybrid-override-pattern": ("--hybrid-layer-pattern", ("--hybrid-layer-pattern",)),
    "--moe-layer-recompute": (
        "--recompute-granularity selective --recompute-modules moe",
        ("--moe-layer-recompute",),
    ),
    "--DDP-impl": ("", ()),
    "--use-contiguous-buffers-in-local-ddp": ("", ()),
    "--no-contiguous-buffers-in-local-ddp": ("", ()),
    "--no-async-tensor-model-parallel-allreduce": ("", ()),
    "--empty-unused-memory": ("--empty-unused-memory-level 1", ()),
    "--moe-extended-tp": ("--expert-tensor-parallel-size", ()),
    "--standalone-embedding-stage": ("--account-for-embedding-in-pipeline-split", ()),
    "--pipeline-model-parallel-split-rank": ("", ()),
    "--retro-workdir": ("", ()),
    "--bias-swiglu-fusion": ("", ()),
}
"""Flags that Megatron-LM once had, or keeps to refuse them: what is written now, and the words that each is
read as."""
STILL = ("--moe-layer-recompute", "--hybrid-override-pattern")
"""Of these the ones that are still heeded."""


@cache
def table() -> dict[str, Any]:
    """Megatron-LM's flags by name: ``kind``, ``dest``, what a switch ``sets``, ``choices``."""
    return dict(_data()["flags"])


def version() -> str:
    """The megatron-core whose flags these are."""
    return str(_data()["version"])


@cache
def _data() -> dict[str, Any]:
    text = files("planner.export").joinpath("data/megatron_flags.json").read_text()
    return dict(json.loads(text))


@dataclass
class Arguments:
    """What a command line says: values by the parser's names, and what is wrong with it."""

    values: dict[str, Any] = field(default_factory=dict)
    open: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Flags whose values are not known, with the names that would tell."""
    loose: dict[str, None] = field(default_factory=dict)
    """Words that are not known and may be flags."""
    findings: list[Finding] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """The flag that gave a value, by the parser's name."""

    def get(self, flag: str, default: Any = None) -> Any:
        """The value of a flag that takes one."""
        return self.values.get(table()[flag]["dest"], default)

    def on(self, flag: str) -> bool:
        """Was a switch given, and not its opposite after it?"""
        row = table()[flag]
        return row["dest"] in self.values and self.values[row["dest"]] == row["sets"]

    def add(self, severity: Any, setting: str, text: str, fix: str = "") -> None:
        """One more finding."""
        if len(self.findings) < 200:
            self.findings.append(Finding(severity, setting, text, fix))


def parse(words: Sequence[str], adds: bool = False) -> Arguments:
    """A command line's words, those of the launcher and the script left out. ``adds``: the script that is run
    may have flags of its own.
    """
    found = Arguments()
    if len(words) > MOST_WORDS:
        found.add("error", "arguments", f"{len(words):,} words: the first {MOST_WORDS:,} are read")
        words = words[:MOST_WORDS]
    queue, strange = list(words)[::-1], dict[str, None]()
    while queue:
        word = queue.pop()
        if not word.startswith("--"):
            _stray(found, [word, *_values(queue)])
            continue
        name, equals, value = word.partition("=")
        after = [value] if equals else list(_values(queue))
        if name in OLD and _old(found, name, after, queue):
            continue
        row = table().get(name)
        if row is None:
            if not _misspelt(found, word, name, "warning" if adds else "error"):
                strange[shown(name)] = None
            continue
        rest = _take(found, name, row, after, bool(equals))
        if not equals:
            queue += reversed(rest)
    if strange:
        text = f"no flag of Megatron-LM {version()}, which refuses it unless the script adds it"
        names = ", ".join(list(strange)[:20]) + (", ..." if len(strange) > 20 else "")
        found.add("warning", names, text, "check that the script that is run knows it")
    return found


def _values(queue: list[str]) -> Iterator[str]:
    """The words up to the next flag, taken off; a negative number is none."""
    while queue and not (queue[-1].startswith("-") and not _is_number(queue[-1])):
        yield queue.pop()


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _stray(found: Arguments, words: list[str]) -> None:
    """Words where a flag should be."""
    known = [word for word in words if not unknown_in(word)]
    found.loose.update(dict.fromkeys(name for word in words for name in unknown_in(word)))
    if known:
        near = " (its flags take --)" if known[0].startswith("-") else ""
        what = "belong to no flag" if known[1:] else "belongs to no flag"
        text = f"{what}: Megatron-LM refuses such words{near}"
        found.add("error", shown(" ".join(known)), text, "leave them out, or quote a value that has blanks")


def _old(found: Arguments, name: str, after: list[str], queue: list[str]) -> bool:
    now, words = OLD[name]
    instead = f"write {now}" if now else "leave it out"
    if name not in STILL:
        text = f"older Megatron-LM had it, {version()} does not take it"
        found.add("warning", name, text, instead)
    else:
        found.add("warning", name, "is deprecated", instead)
    if words == (name,):
        queue += reversed(after)
        return False
    if words:
        queue += reversed([*words, *after])
    return True


def _misspelt(found: Arguments, word: str, name: str, severity: str) -> bool:
    """Is a flag that the parser does not have one that it has, written otherwise? Then that is a finding."""
    if " " in word and (first := word.split()[0].partition("=")[0]) in table():
        text = "is one word with a blank in it: quotes keep the flag and its value together"
        found.add("error", shown(word), text, f"write {first} and its value as two words")
        return True
    if names := unknown_in(name):
        found.loose.update(dict.fromkeys(names))
        return True
    dashes = name.replace("_", "-")
    longer = [flag for flag in table() if flag.startswith(dashes)] if len(dashes) > 6 else []
    near = get_close_matches(dashes[:100], list(table()), 1, 0.86)
    if dashes in table():
        text, fix = "has no such flag", dashes
    elif len(longer) == 1:
        text, fix = "takes no abbreviations", longer[0]
    elif near:
        text, fix = "has no such flag", near[0]
    else:
        return False
    found.add(severity, shown(name), f"Megatron-LM {version()} {text}", f"write {fix}")
    return True


def _take(found: Arguments, name: str, row: dict[str, Any], after: list[str], joined: bool) -> list[str]:
    """Reads a flag's value; gives back words that are none of its."""
    kind, dest = row["kind"], row["dest"]
    if kind == "switch":
        if joined:
            text = f"{name}={shown(after[0])}: the flag takes no value, Megatron-LM refuses one"
            found.add("error", name, text, f"write {name}, or leave it out")
            return []
        rest = _after_switch(found, name, after)
        _store(found, name, dest, row["sets"])
        return rest
    several = kind.endswith("s")
    taken, rest = (after, []) if several or joined else (after[:1], after[1:])
    if not taken:
        if not row.get("may_be_empty"):
            found.add(
                "error", name, "has no value: Megatron-LM refuses it so", "give it one, or leave it out"
            )
        return rest
    if names := [one for word in taken for one in unknown_in(word)]:
        found.open[name] = tuple(dict.fromkeys(names))
        found.values.pop(dest, None)
        return rest
    values = [_typed(found, name, row, word) for word in taken]
    if None not in values:
        found.open.pop(name, None)
        _store(found, name, dest, values if several else values[0])
    return rest


def _after_switch(found: Arguments, name: str, after: list[str]) -> list[str]:
    if after and after[0].lower() in ("true", "false", "1", "0", "on", "off"):
        text = f"takes no value: {shown(after[0])} after it is refused by Megatron-LM"
        off = after[0].lower() in ("false", "0", "off")
        found.add("error", name, text, "leave the flag out" if off else f"write {name} alone")
        return after[1:]
    return after


def _typed(found: Arguments, name: str, row: dict[str, Any], word: str) -> Any:
    kind = row["kind"].removesuffix("s")
    try:
        value: Any = int(word) if kind == "integer" else float(word) if kind == "number" else word
    except ValueError:
        what = "a whole number" if kind == "integer" else "a number"
        found.add("error", name, f"{shown(word)} is not {what}: Megatron-LM refuses it", f"give {what}")
        return None
    if row.get("choices") and word not in row["choices"]:
        able = ", ".join(row["choices"])
        found.add("error", name, f"{shown(word)} is none of its values", f"use {able}")
        return None
    return value


def _store(found: Arguments, name: str, dest: str, value: Any) -> None:
    if dest in found.values and found.values[dest] != value:
        before = found.names[dest]
        both = f"{before} {_plainly(found.values[dest])}" if before != name else _plainly(found.values[dest])
        text = f"is given twice: {both}, then {_plainly(value)}; the last one counts"
        found.add("warning", name, text, "keep one")
    found.values[dest] = value
    found.names[dest] = name


def _plainly(value: Any) -> str:
    words = value if isinstance(value, list) else [value]
    return shown(" ".join(str(word) for word in words))
