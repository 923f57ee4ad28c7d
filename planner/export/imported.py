"""What a reader makes of a launch configuration that somebody already has.

A reader is a module with ``recognises(files) -> bool`` and ``read(files, given) -> Imported``: ``files`` are
the texts of what was given, by name, ``given`` the values of variables that they leave open. Nothing in them
is ever executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from planner.specs import ModelSpec

READERS = {
    "deepspeed": "planner.export.read_deepspeed",
    "megatron": "planner.export.read_megatron",
    "torchtitan": "planner.export.read_torchtitan",
    "accelerate": "planner.export.read_accelerate",
}
"""Frameworks, by name: the module that reads their configuration. The first that knows files has them:
DeepSpeed's JSON may be beside a script with Megatron-LM's flags."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, wasteful or worth knowing in a configuration.

    ``error``: the framework refuses it, or it will not do what it says; ``warning``: it likely is not what
    was meant; ``waste``: it costs memory or time for nothing. ``setting`` is what is concerned, in the
    framework's words; ``text`` says value and rule, ``fix`` what to write in its place.
    """

    severity: Literal["error", "warning", "waste"]
    setting: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Imported:
    """A configuration in the planner's words.

    ``options`` are those of ``planner estimate`` by name (``tensor_parallel`` ...; ``option`` is a list of
    NAME=VALUE), as its command line would give them. ``model`` is None where the configuration does not say;
    ``world_size`` and ``per_node`` likewise. ``unread`` are settings that were given and that change nothing
    that is planned, or that are not known here. ``target`` is what such a configuration is exported as,
    ``settings`` are the names of all that it gives: flags, and keys with their sections.
    """

    framework: str
    options: Mapping[str, Any]
    model: ModelSpec | None = None
    world_size: int | None = None
    per_node: int | None = None
    findings: tuple[Finding, ...] = ()
    unread: tuple[str, ...] = field(default=())
    target: str = ""
    settings: frozenset[str] = frozenset()
