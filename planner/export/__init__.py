"""Launch configurations: a plan in the words of the framework that runs it, and of what schedules it.

An exporter is a module with ``export(subject, version, settings) -> Export``, ``VERSIONS`` (those that it
writes for, the usual one first), ``FRAMEWORKS`` (those whose plans it takes) and ``SETTINGS`` (what may be
set, with what it is). What a target cannot be told is refused with the reason: nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from planner.errors import InputError, nearest_names
from planner.export.base import Export as Export
from planner.export.base import NotExpressible as NotExpressible
from planner.export.base import Subject as Subject
from planner.files import plain

TARGETS = {
    "megatron": "planner.export.megatron",
    "megatron-bridge": "planner.export.megatron_bridge",
    "deepspeed": "planner.export.deepspeed",
    "torchtitan": "planner.export.torchtitan",
    "accelerate": "planner.export.accelerate",
    "nanotron": "planner.export.nanotron",
    "pytorch": "planner.export.pytorch",
}
"""Frameworks, by name: the module that writes their configuration."""
SCHEDULERS = {
    "slurm": "planner.schedulers.slurm",
    "hostfile": "planner.schedulers.hostfile",
    "trainjob": "planner.schedulers.trainjob",
    "jobset": "planner.schedulers.jobset",
    "volcano": "planner.schedulers.volcano",
    "pytorchjob": "planner.schedulers.pytorchjob",
    "rayjob": "planner.schedulers.ray",
    "skypilot": "planner.schedulers.skypilot",
    "dstack": "planner.schedulers.dstack",
}
"""Schedulers, by name: the module that writes what is handed to them."""
KUBERNETES = ("trainjob", "jobset", "volcano", "pytorchjob", "rayjob")
USUAL = {
    "megatron": "megatron",
    "torchtitan": "torchtitan",
    "fsdp": "pytorch",
    "deepspeed": "deepspeed",
    "hf": "accelerate",
}
"""The target that a framework's plans go to where only a scheduler is named."""


def module_of(name: str) -> Any:
    """The module of a framework or scheduler. Raises InputError with the nearest names."""
    known = {**TARGETS, **SCHEDULERS}
    if name in USUAL and name not in known:
        raise InputError(f"--to {plain(name)}: plans of --framework {name} go to {USUAL[name]}")
    if name in ("kubernetes", "k8s"):
        raise InputError(f"--to {name}: name its kind of job: {', '.join(KUBERNETES)}")
    if name not in known:
        raise InputError(f"--to {plain(name)}: {nearest_names(name, known)}")
    return import_module(known[name])


def export(
    subject: Subject, to: str = "", version: str | None = None, settings: Mapping[str, str] | None = None
) -> Export:
    """A plan as files for ``to``: a framework, a scheduler, or both with a comma between.

    Raises NotExpressible for what the target cannot be told, InputError for an unknown target, version or
    setting.
    """
    names = [name.strip().lower() for name in to.split(",") if name.strip()]
    for name in names:
        module_of(name)
    framework = [name for name in names if name not in SCHEDULERS]
    scheduler = [name for name in names if name in SCHEDULERS]
    if len(framework) > 1 or len(scheduler) > 1:
        raise InputError(f"--to {plain(to)}: name one framework and one scheduler at most")
    if (own := subject.plan.training.framework) not in USUAL:
        raise InputError(f"the plan's framework {plain(own)}: {nearest_names(own, USUAL)}")
    target = (*framework, USUAL[own])[0]
    given = dict(settings or {})
    writer = module_of(target)
    _check_settings(given, target, *scheduler)
    if own not in writer.FRAMEWORKS:
        raise NotExpressible(
            f"{target} runs plans of --framework {' or '.join(writer.FRAMEWORKS)}, this one is of "
            f"{own}: use --to {USUAL[own]}"
        )
    made: Export = writer.export(subject, version_of(target, writer.VERSIONS, version), given)
    if not scheduler:
        return made
    module = module_of(scheduler[0])
    if not getattr(module, "BY_HAND", False):  # it has the words itself, and they are said once
        kept = {name: text for name, text in made.files.items() if name not in made.by_hand}
        made = replace(made, files=kept, by_hand=())
    placed: Export = module.export(subject, made, given)
    return placed


def version_of(target: str, known: tuple[str, ...], version: str | None) -> str:
    """The version to write for: the usual one, or that given, of which only the first parts matter."""
    if version is None:
        return known[0]
    for one in known:
        if version == one or version.startswith(f"{one}."):
            return one
    raise InputError(f"{target} {plain(version)} is not one that is written for: use {', '.join(known)}")


def _check_settings(given: Mapping[str, str], *names: str) -> None:
    known = {one: words for name in names for one, words in module_of(name).SETTINGS.items()}
    for name in given:
        if name not in known:
            has = f"{nearest_names(name, known)} They are {', '.join(known)}" if known else "it has none"
            raise InputError(f"--set {plain(name)}: no setting of {' and '.join(names)}: {has}")
