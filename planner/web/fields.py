"""What a browser or a program may ask: the options of ``planner search``, but for those that name files.

A form, an address and JSON come down to the same: texts by option name, so that they have the same answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl

from planner import options as o
from planner.errors import InputError, nearest_names
from planner.files import plain
from planner.jobs import command_line

MOST_BODY = 262_144
"""Bytes of a request's body: the largest configuration, of which a form makes three to a byte, and more."""
MOST_CONFIG = 65_536
MOST_TEXT = 1_000
MOST_NOTE = 4_000
MOST_FIELDS = 100
MOST_SECONDS = 30.0
"""Of one search; ``--time-limit`` may ask for less."""

FILES = {
    "job": "a job file is read by the command alone: give its options here",
    "profile": "a profile is a file, and none is read here: use the command planner search --profile",
    "trace": "nothing is written here: use the command planner search --trace",
    "save_job": "nothing is written here: use the command planner search --save-job",
}
"""Options of the command that name a file."""

SEARCH: o.Options = {
    "objective": (o.Objective, "time"),
    "top": (o.Top, 10),
    "time_limit": (o.TimeLimit, 20.0),
}
NETWORK = ("memory_budget", "headroom", "nodes_per_leaf", "oversubscription")
CLUSTER = (*NETWORK, "host_memory", "host_bandwidth", "nvme", "nvme_bandwidth")
FIRST = ("seq_length", "global_batch_size", "tokens", "framework", "precision", "optimizer", "recompute")
CONFIG, TITLE, NOTE = "config", "title", "note"
HELP = {
    "model": "A name of the catalog, or a shape: layers=32,hidden=4096,heads=32,ffn=11008,vocab=32000.",
    "gpus": "64x80G, 64xH100 or 8x8xH100 (nodes x GPUs per node x kind).",
    "option": "Kernels or buffers of the framework, as in loss=fused; one a line.",
    "time_limit": f"Seconds to search at most, up to {MOST_SECONDS:g}.",
}
LABELS = {
    "gpus": "GPUs",
    "seq_length": "Sequence length",
    "tokens": "Tokens of the training",
    "gpu_mtbf": "GPU MTBF",
    "job_mtbf": "Job MTBF",
    "nvme": "NVMe",
    "nvme_bandwidth": "NVMe bandwidth",
    "pue": "PUE",
    "lora": "LoRA",
    "option": "Options of the framework",
    "swiglu": "SwiGLU",
    "top": "Layouts to show",
}
CHOICES = {
    "framework": ("megatron", "torchtitan", "fsdp", "deepspeed", "hf"),
    "objective": ("time", "headroom"),
}
Kind = Literal["text", "int", "float", "bool", "list"]
KINDS: dict[type, Kind] = {str: "text", int: "int", float: "float", bool: "bool"}


@dataclass(frozen=True)
class Field:
    """An option as a form has it."""

    name: str
    help: str
    kind: Kind
    default: Any
    flags: tuple[str, str]

    @property
    def label(self) -> str:
        """Its name in words."""
        words = self.name.replace("_", " ")
        return LABELS.get(self.name, words[0].upper() + words[1:])

    @property
    def choices(self) -> tuple[str, ...]:
        """What it may be, where that is a short list."""
        return ("yes", "no") if self.kind == "bool" else CHOICES.get(self.name, ())

    @property
    def usual(self) -> str:
        """Its default as text."""
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        return (
            "" if self.default is None else f"{self.default:g}" if self.kind == "float" else str(self.default)
        )


def _field(name: str, annotation: Any, *default: Any) -> Field:
    kind, info = get_args(annotation)
    given = [one for one in (get_args(kind) or (kind,)) if one is not type(None)]
    flags = (info.default, *(info.param_decls or ()))  # typer keeps the first of them as a default
    long = next(flag for flag in flags if isinstance(flag, str) and flag.startswith("--"))
    yes, _, no = long.partition("/")
    text: Kind = KINDS.get(given[0], "list")
    return Field(name, HELP.get(name, info.help), text, next(iter(default), None), (yes, no))


@cache
def fields() -> Mapping[str, Field]:
    """Every field by its name."""
    groups = (o.JOB, o.TRAINING, o.COST, o.CHOICES, SEARCH)
    return {
        name: _field(name, *option) for group in groups for name, option in group.items() if name not in FILES
    }


@cache
def folds() -> tuple[tuple[str, tuple[Field, ...]], ...]:
    """Fields in the order of a form, under headings; the first ones are always seen."""
    shown = ("model", "gpus", *FIRST)
    training = [name for name in o.TRAINING if name not in CLUSTER]
    found = [
        ("", FIRST),
        ("Layouts to search", (*o.CHOICES, *SEARCH)),
        ("Training and kernels", training),
        ("Cluster", CLUSTER),
        ("Price and failures", tuple(o.COST)),
    ]

    def own(heading: str, names: Iterable[str]) -> tuple[Field, ...]:
        return tuple(
            fields()[name] for name in names if name in fields() and (not heading or name not in shown)
        )

    return tuple((heading, own(heading, names)) for heading, names in found)


@dataclass(frozen=True)
class Asked:
    """What was asked: texts by name, only those that say something, in the order of the fields."""

    texts: tuple[tuple[str, str], ...]
    title: str = ""
    note: str = ""

    @property
    def by_name(self) -> dict[str, str]:
        """The texts by name."""
        return dict(self.texts)

    def address(self, *more: tuple[str, str]) -> list[tuple[str, str]]:
        """Pairs of an address that asks it again."""
        return [*self.texts, *(pair for pair in more if pair[1])]

    @property
    def command(self) -> str:
        """The command that answers the same."""
        given = {name: _value(fields()[name], text) for name, text in self.texts if name != CONFIG}
        if CONFIG in self.by_name:
            given = {"model": "config.json", **given}
        return command_line("search", given, {name: field.flags for name, field in fields().items()})

    def given(self) -> dict[str, Any]:
        """Values by option name, as a command has them; the defaults of those that were not given."""
        values = {name: field.default for name, field in fields().items()}
        return values | {name: _value(fields()[name], text) for name, text in self.texts if name != CONFIG}


class Malformed(Exception):
    """A request that nothing can be read from: status 400."""


def from_query(text: bytes) -> dict[str, str]:
    """Texts by name of an address or a form. Raises Malformed."""
    try:
        pairs = parse_qsl(
            text.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS
        )
    except UnicodeDecodeError:
        raise Malformed("the fields are not UTF-8") from None
    except ValueError:
        raise Malformed(f"more than {MOST_FIELDS} fields") from None
    found: dict[str, str] = {}
    for name, value in pairs:
        if name == "option" and found.get(name):
            value = f"{found[name]}\n{value}"
        elif name in found:
            raise Malformed(f"{plain(name)} is given twice")
        found[name] = value
    return found


def from_json(data: bytes) -> dict[str, str]:
    """Texts by name of a JSON object. Raises Malformed."""
    found = _json(data, "the body")
    if not isinstance(found, dict):
        raise Malformed('the body is no JSON object: write {"model": "llama-65b", "gpus": "64x80G"}')
    return {name: _text(name, value) for name, value in found.items() if value is not None}


def _json(data: bytes | str, what: str) -> Any:
    try:
        return json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else plain(str(error), 100)
        raise Malformed(f"{what} is not JSON: {why}") from None


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _text(name: str, value: Any) -> str:
    """A JSON value as a form would have it."""
    if name == CONFIG and isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        return ("\n" if name == "option" else ",").join(_text(name, one) for one in value[:MOST_TEXT])
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (str, int, float)):
        return str(value)
    raise Malformed(f"{plain(name)} is an object: use a text, a number, yes or no, or a list of them")


def read(found: Mapping[str, str]) -> Asked:
    """What was asked. Raises Malformed for fields that do not exist, InputError for what cannot be."""
    known = fields()
    for name in found:
        if name in FILES:
            raise InputError(f"{name}: {FILES[name]}")
        if name not in known and name not in (CONFIG, TITLE, NOTE):
            raise Malformed(f"{plain(name)} is no field: {nearest_names(name, known)}")
    texts: list[tuple[str, str]] = []
    if config := found.get(CONFIG, "").strip():
        if found.get("model", "").strip():
            raise InputError("--model and a config.json are both given: leave one of them out")
        texts.append((CONFIG, _tight(config)))
    for name, field in known.items():
        text = found.get(name, "").strip()
        shown = " ".join(text.split("\n")) if field.kind == "list" else text
        if not shown.replace("\r", "").isprintable() or len(text) > MOST_TEXT:
            rule = f"use up to {MOST_TEXT:,} printable characters"
            raise InputError(f"{field.flags[0]} {plain(text, 40)!r}: {rule}")
        if text and _value(field, text) != field.default:
            texts.append((name, text))
    given = dict(texts)
    if not given.get("gpus"):
        raise InputError("--gpus is empty: write count x kind, as in 64x80G or 64xH100")
    if not (config or given.get("model")):
        raise InputError("--model is empty: give a catalog name, a shape or a config.json")
    return Asked(tuple(texts), _words(found.get(TITLE, ""), 300), _words(found.get(NOTE, ""), MOST_NOTE))


def _tight(config: str) -> str:
    """A configuration without blanks. Raises InputError."""
    if len(config.encode("utf-8", "replace")) > MOST_CONFIG:
        raise InputError(
            f"the config.json is larger than {MOST_CONFIG:,} bytes: leave out what is not its shape"
        )
    try:
        found = _json(config, "the config.json")
    except Malformed as error:
        raise InputError(str(error)) from None
    if not isinstance(found, dict):
        raise InputError("the config.json is no JSON object: paste the whole file, from { to }")
    return json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace").decode()


def _words(text: str, most: int) -> str:
    """Words of a user, on lines of their own, that can be shown."""
    lines = text[:most].replace("\r\n", "\n").split("\n")
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines).strip()


def _value(field: Field, text: str) -> Any:
    """An option's value of its text. Raises InputError."""
    flag = field.flags[0]
    match field.kind:
        case "int":
            if not re.fullmatch(r"-?[0-9]{1,15}", text):
                raise InputError(f"{flag} {plain(text, 40)!r} is no whole number: write it in digits")
            return int(text)
        case "float":
            if not re.fullmatch(r"-?[0-9]{0,15}\.?[0-9]{0,15}(e-?[0-9]{1,2})?", text) or not text.strip(
                "-.e"
            ):
                raise InputError(f"{flag} {plain(text, 40)!r} is no number: write it in digits, as in 1.5")
            value = float(text)
            if field.name == "time_limit" and value > MOST_SECONDS:
                raise InputError(f"{flag} {value:g}: use up to {MOST_SECONDS:g} seconds here")
            return value
        case "bool":
            word = text.lower()
            if word not in ("yes", "no", "true", "false", "on", "off", "1", "0"):
                raise InputError(f"{flag} {plain(text, 40)!r}: write yes or no")
            return word in ("yes", "true", "on", "1")
        case "list":
            return text.split()
    return text
