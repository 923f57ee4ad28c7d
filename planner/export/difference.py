"""What a change is in a framework's own words: how the exports of two plans of a job differ."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import PurePath
from typing import Any

from planner.errors import InputError
from planner.export import export
from planner.export.base import Export, Subject, by_flags
from planner.export.structured import HEADER, dotted, yaml_of
from planner.export.torchtitan_schema import keys

FILES = {"torchtitan": "0.2"}
"""Versions whose configuration is a file, where the usual one's is code."""
READ: Mapping[str, Callable[[str], Mapping[str, Any]]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": lambda text: yaml_of(text, "configuration"),
}
OURS = {HEADER, "run_name"}
"""Settings that say which plan it is."""
DERIVED = {"--padded-vocab-size"}
"""Settings that say what a framework makes of others by itself."""
OTHER_NAMES = {
    "zero_optimization.stage": "deepspeed_config.zero_stage",
    "zero_optimization.offload_optimizer.device": "deepspeed_config.offload_optimizer_device",
    "zero_optimization.offload_param.device": "deepspeed_config.offload_param_device",
    "gradient_checkpointing": "activation_checkpointing",
}
"""Settings, and another place where the same is said."""
ALSO = {"gradient_accumulation_steps": ("deepspeed_config.gradient_accumulation_steps",)}
"""Settings that are said in two places, which must agree."""
OF_DEEPSPEED = ("zero_optimization.", "activation_checkpointing.", "sequence_parallel_size", "data_types.")
"""Beginnings of settings that DeepSpeed's own file has."""
RIVALS = (
    ("fsdp_config.fsdp_activation_checkpointing", "gradient_checkpointing"),
    (
        "--recompute-activations",
        "--recompute-granularity",
        "--recompute-method",
        "--recompute-num-layers",
        "--recompute-modules",
        "--moe-layer-recompute",
    ),
    (
        "--num-layers-per-virtual-pipeline-stage",
        "--num-virtual-stages-per-pipeline-rank",
        "--pipeline-model-parallel-layout",
        "--decoder-first-pipeline-num-layers",
        "--decoder-last-pipeline-num-layers",
    ),
)
"""Settings that say the same in several ways: where one is set, the others must go."""


def told(target: str, subject: Subject) -> Export | str:
    """A plan as a target's configuration, or why it cannot be told."""
    try:
        return export(subject, target, FILES.get(target))
    except InputError as error:
        return str(error)


def changed(before: Export, after: Export, given: Collection[str] | None = None) -> tuple[str, ...]:
    """What to set, or to leave out, for the configuration ``before`` to be ``after``; what to do beside it.

    Flags are as a shell takes them, settings of JSON, TOML and YAML as ``section.name = value``. ``given``
    are the names of those that somebody's own configuration has: only these can be left out, and what it says
    by another name is said by that.
    """
    old, new = settings_in(before), settings_in(after)
    touched = {name for name in {*old, *new} if old.get(name) != new.get(name)}
    gone = [name for name in old if name not in new]
    if given is not None:
        touched -= DERIVED - {*given}
        if any(name.startswith(("parallelism.", "training.")) for name in touched):
            touched |= {name for name in new if name not in given and _unusual(name, new[name])}
        ways = [name for group in RIVALS if touched & {*group} for name in group]
        touched |= {name for name in ways if name in new and name not in given}
        removed = (*(_own(name, given) for name in gone), *(name for name in ways if name not in new))
        gone = [name for name in dict.fromkeys(removed) if name in given]
    found = [
        text.replace(name, own, 1)
        for name, text in new.items()
        if name in touched
        for own in (_own(name, given), *(one for one in ALSO.get(name, ()) if one in (given or ())))
        if given is None or not _elsewhere(own, given)
    ]
    notes = [note for note in after.notes if note not in before.notes]
    code = [f"no longer: {note}" for note in before.notes if "code" in note and note not in after.notes]
    return (*found, *(f"without {name}" for name in _sections(gone, given or ())), *notes, *code)


def _unusual(name: str, text: str) -> bool:
    """Is a setting of torchtitan's degrees or batch other than its default, which holds if it is not said?"""
    if not name.startswith(("parallelism.", "training.global_batch_size")):
        return False
    default = keys()[name][1] if name in keys() else None
    return text != f"{name} = {json.dumps(default)}"


def _elsewhere(name: str, given: Collection[str]) -> bool:
    """Is a setting of a file that is not there: accelerate's, or DeepSpeed's where accelerate says it all?"""
    if "distributed_type" not in given:
        return name.startswith("deepspeed_config.")
    inline = any(one.startswith("deepspeed_config.zero_stage") for one in given)
    return inline and name.startswith(OF_DEEPSPEED)


def _own(name: str, given: Collection[str] | None) -> str:
    """The name by which a configuration says a setting."""
    other = OTHER_NAMES.get(name, name)
    return other if given and name not in given and other in given else name


def _sections(names: Iterable[str], given: Collection[str]) -> list[str]:
    """Names, those of a section that goes as a whole as that section."""
    gone = list(names)
    whole: dict[str, None] = {}
    for name in gone:
        section = f"{name.rpartition('.')[0]}."
        inner = [one for one in given if one.startswith(section)]
        whole[section[:-1] if section != "." and len(inner) > 1 and {*inner} <= {*gone} else name] = None
    return list(whole)


def settings_in(made: Export) -> dict[str, str]:
    """Everything that an export's program, files and environment set, by name."""
    found = {line[0]: shlex.join(line) for line in by_flags(made.program) if line[0].startswith("--")}
    for name, text in made.files.items():
        if (kind := PurePath(name).suffix) in READ:
            values = dotted(READ[kind](text))
            found |= {key: f"{key} = {json.dumps(value)}" for key, value in values if key not in OURS}
    return found | {name: f"{name}={value}" for name, value in made.env.items()}
