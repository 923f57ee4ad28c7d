"""Settings of a torchtitan TOML file on their way into the planner's options: stages and recomputation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import InputError
from planner.export.imported import Finding
from planner.export.torchtitan_flavors import flavor_named, pipelined
from planner.export.torchtitan_schema import checked, keys
from planner.export.torchtitan_words import (
    OTHER_SCHEDULES,
    SCHEDULES,
    SINGLE,
    own_split,
    per_stage,
    virtual_stage,
)
from planner.files import plain
from planner.model import ModelSpec

MOST = 10**7
"""Processes: as many no job has."""


class Settings:
    """A document's settings with torchtitan's defaults; what is looked at counts as read."""

    def __init__(self, document: Mapping[str, Any], given: Mapping[str, str]) -> None:
        self.told, self.findings = checked(document)
        self.given = given
        self.used: set[str] = set()
        self.flavor = self._flavor()
        self.model: ModelSpec | None = self.flavor.spec if self.flavor else None
        self.options: dict[str, Any] = {"framework": "torchtitan"}
        self.choices: dict[str, str] = {}

    def of(self, name: str) -> Any:
        """A setting, or torchtitan's own default."""
        self.used.add(name)
        return self.told.get(name, keys()[name][1])

    def degree(self, name: str) -> int:
        """A degree of parallelism, 1 or more; -1 where it is the rest."""
        path = f"parallelism.{name}"
        value: int = self.of(path)
        if not 1 <= value < MOST and not (name == "data_parallel_shard_degree" and value == -1):
            self.find("error", path, f"{value} is no degree", f"use 1 or more, below {MOST:,}")
            return 1
        return value

    def find(self, severity: Any, setting: str, text: str, fix: str = "") -> None:
        self.findings.append(Finding(severity, setting, plain(text, 500), fix))

    def _flavor(self) -> Any:
        try:
            return flavor_named(self.of("model.name"), self.of("model.flavor"))
        except InputError as error:
            setting, _, rest = str(error).partition("=")
            self.find("error" if setting == "model.flavor" else "warning", setting, rest)
            return None


class Stages(Settings):
    """Which layers are where, and which of them are run again."""

    pipeline = 1
    sharded = True

    def _pipeline(self) -> None:
        way = self.of("parallelism.fsdp_reshard_after_forward")
        keeps = way == "never" or (way == "default" and self.pipeline > 1)
        self.options["reshard_after_forward"] = not keeps if self.sharded else True
        if way == "default" and self.pipeline > 1 and self.sharded:
            self.find(
                "warning",
                "parallelism.fsdp_reshard_after_forward",
                "default is never with a pipeline: parameters stay gathered through the step, as in ZeRO-2",
                "always, if that was not meant",
            )
        parts = self._parts()
        counts = [sum(own) for own in parts] if parts else None
        if counts and len(set(counts)) > 1:
            self.options["layers_per_stage"] = ",".join(map(str, counts))
        self._recompute(parts or ([[self.model.num_hidden_layers]] if self.model else []))

    def _parts(self) -> list[list[int]] | None:
        """Layers of each chunk of each stage, where there is a pipeline and the model is known."""
        word = self.of("parallelism.pipeline_parallel_schedule")
        names = self.of("parallelism.module_fqns_per_model_part")
        each = self.of("parallelism.pipeline_parallel_layers_per_stage")
        first, last = (
            self.of(f"parallelism.pipeline_parallel_{end}_stage_less_layers") for end in ("first", "last")
        )
        if self.pipeline == 1:
            return None
        schedule = {value: own for own, value in SCHEDULES.items()}.get(word)
        where = "parallelism.pipeline_parallel_schedule"
        if schedule is None:
            schedule = OTHER_SCHEDULES.get(word, "1f1b")
            if word in OTHER_SCHEDULES:
                self.find("warning", where, f"{word} is planned as {SCHEDULES[schedule]}")
            else:
                known = ", ".join([*SCHEDULES.values(), *OTHER_SCHEDULES])
                self.find("error", where, f"{word}: PyTorch has {known}", "use 1F1B")
        self.options["schedule"] = schedule
        if self.flavor and not pipelined(self.flavor.model, "0.2"):
            text = f"torchtitan 0.2.2 has no pipeline for {self.flavor.model}"
            self.find("error", "parallelism.pipeline_parallel_degree", text, "use 1")
        if not self.model:
            return None
        single = SCHEDULES[schedule] in SINGLE
        counts = self._counts(names, each, first, last, single)
        chunks = len(counts) // self.pipeline
        self.options["chunks"] = chunks
        return self._placed(counts, chunks, schedule)

    def _counts(self, names: Any, each: Any, first: int, last: int, single: bool) -> list[int]:
        """Layers on each virtual stage."""
        assert self.model is not None
        depth, usual = self.model.num_hidden_layers, self.pipeline * (1 if single else 2)
        if names is not None:
            return self._named(names, usual, single)
        first, last = (min(max(0, less), depth) for less in (first, last))
        number = usual
        where = "parallelism.pipeline_parallel_layers_per_stage"
        if each is not None:
            number = -(-(depth + first + last) // max(1, each))
            held = number / self.pipeline
            if each < 1 or number % self.pipeline or (held != 1 if single else held < 2):
                near = per_stage(depth, usual, first, last)
                fix = f"use {near}" if near else "leave it out"
                rule = f"{each} makes {number} stages of {depth} layers, on {self.pipeline} ranks"
                need = "one on each" if single else "two or more on each, as many on all"
                self.find("error", where, f"{rule}: {need}", fix)
                number = usual
        found = own_split(depth, number, first, last)
        if found is None or min(found) < 0:
            self.find("error", where, f"{depth} layers do not fill {number} stages", "use fewer stages")
            found = [depth // number + (index < depth % number) for index in range(number)]
        return found

    def _named(self, names: list[list[str]], usual: int, single: bool) -> list[int]:
        """Layers of a list of modules for each virtual stage."""
        assert self.model is not None
        where, depth = "parallelism.module_fqns_per_model_part", self.model.num_hidden_layers
        listed = [name for part in names for name in part]
        wanted = ["tok_embeddings", *(f"layers.{layer}" for layer in range(depth)), "norm", "output"]
        if listed != wanted:
            missing = [name for name in wanted if name not in listed]
            extra = [name for name in listed if name not in wanted] or [
                name for name in dict.fromkeys(listed) if listed.count(name) > 1
            ]
            what = f"{missing[0]} is missing" if missing else f"{extra[0]} is" if extra else "the order is"
            text = what if missing else f"{what} not the model's"
            self.find("error", where, text, "name every module once, in the model's order")
        held = len(names) / self.pipeline
        if len(names) % self.pipeline or (held != 1 if single else held < 2):
            self.find("error", where, f"{len(names)} parts for {self.pipeline} ranks", f"use {usual}")
            return [depth // usual + (index < depth % usual) for index in range(usual)]
        if listed != wanted:
            return [depth // len(names) + (index < depth % len(names)) for index in range(len(names))]
        return [sum(name.startswith("layers.") for name in part) for part in names]

    def _placed(self, counts: list[int], chunks: int, schedule: str) -> list[list[int]]:
        """Layers of each stage's chunks, which are planned as equally long but for the model's ends."""
        assert self.model is not None
        places = [
            [virtual_stage(stage, chunk, self.pipeline, schedule) for chunk in range(chunks)]
            for stage in range(self.pipeline)
        ]
        parts = [[counts[part] for part in own] for own in places]
        short = -self.model.num_hidden_layers % chunks
        lacking = {0: int(short == 2), len(counts) - 1: int(short >= 1)}
        full = [[counts[part] + lacking.get(part, 0) for part in own] for own in places]
        where = "parallelism.pipeline_parallel_layers_per_stage"
        if any(len(set(own)) > 1 for own in full):
            shown = plain(", ".join(map(str, counts)), 100)
            text = f"{shown} layers on the virtual stages are planned as chunks of a stage that are as long"
            self.find("warning", where, text)
            if any(sum(own) % chunks for own in full):
                return [[sum(counts) // self.pipeline] for _ in range(self.pipeline)]
        if min(map(sum, parts)) < 1:
            self.find("error", where, "a stage has no layers, which is not planned", "use fewer stages")
        return parts

    def _recompute(self, parts: list[list[int]]) -> None:
        mode = self.of("activation_checkpoint.mode")
        option = self.of("activation_checkpoint.selective_ac_option")
        self.of("activation_checkpoint.memory_budget")
        where = "activation_checkpoint.selective_ac_option"
        self.options["recompute"] = mode
        if mode == "memory_budget":
            self.options["recompute"] = "selective"
            text = "memory_budget is the compiler's own choice: planned as selective by operators"
            self.find("warning", "activation_checkpoint.mode", text)
        if mode != "selective" or option == "op":
            return
        if not (option.isascii() and option.isdigit()):
            self.find("error", where, f"{option} is neither op nor a number of layers", "use op")
            return
        every = int(option[:9])
        if every < 2:  # each one
            self.options["recompute"] = "full"
            return
        wanted = [sum(own) // every for own in parts] or [0]
        first = min(n // len(own) for n, own in zip(wanted, parts, strict=True)) if parts else 0
        self.options["recompute"] = f"full:{first}" if first else "none"
        if any(first * len(own) != n for n, own in zip(wanted, parts, strict=False)):
            shown = ", ".join(map(str, wanted))
            text = f"every {every}th layer, {shown} on the stages, is planned as {first} of every chunk"
            self.find("warning", where, text)
