"""Reads ``ds_config.json``, with the script that starts it and Hugging Face's TrainingArguments beside it.

What DeepSpeed 0.19.8 does with a value, and what it refuses at its start or in its engines, was read in
runtime/config.py, runtime/engine.py, runtime/zero/config.py and runtime/pipe/engine.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.export.arguments import MARKS as TRAINER
from planner.export.arguments import Arguments, arguments_in, model_of, structured
from planner.export.deepspeed import DEVICES, PARAMETERS, SIZES, STAGES
from planner.export.deepspeed_zero import zero_findings
from planner.export.imported import Finding, Imported
from planner.export.launch_words import Launch, launch_of
from planner.export.structured import (
    HEADER,
    is_on,
    keys_of,
    names_in,
    number_of,
    removed_of,
    section_of,
    unknown_keys,
)
from planner.files import plain

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
ARGUMENTS = {
    BATCH[0]: ("", "global_batch_size"),
    BATCH[1]: ("per_device_train_batch_size", "micro_batch_size"),
    BATCH[2]: ("gradient_accumulation_steps", ""),
}
"""What fills in ``auto``: one of TrainingArguments, a word of Megatron-DeepSpeed."""
MARKS = frozenset((*BATCH, "zero_optimization"))
"""Keys of which a DeepSpeed configuration has one at least."""
MEGATRON = frozenset(("tensor_model_parallel_size", "pipeline_model_parallel_size", "no_pipeline_parallel"))
"""Words of Megatron-DeepSpeed's scripts."""
READ = frozenset(
    (
        *(HEADER, *BATCH, "optimizer", "bf16", "bfloat16", "fp16", "data_types", "zero_optimization"),
        *("activation_checkpointing", "pipeline", "sequence_parallel_size", "tensor_parallel"),
        *("expert_parallel", "zero_allow_untested_optimizer"),
    )
)
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float": "fp32"}
PLACES = {device: place for place, device in DEVICES.items()}


def recognises(files: Mapping[str, str]) -> bool:
    """Is one of the files a DeepSpeed configuration, and none accelerate's?"""
    found = structured(files)
    own = any(is_configuration(one) for one in found.values())
    return own and not any("distributed_type" in one for one in found.values())


COUNTS_GPUS = True
"""``WORLD_SIZE`` says how many processes there are, where no launcher's words do."""


def is_configuration(found: Mapping[str, Any]) -> bool:
    """Has a mapping a DeepSpeed configuration's keys?"""
    return bool(MARKS & found.keys()) and not {"distributed_type", "compute_environment"} & found.keys()


def read(files: Mapping[str, str], given: Mapping[str, str]) -> Imported:
    """A DeepSpeed configuration in the planner's words. Raises InputError where there is none."""
    launch = launch_of(files, given)
    told = arguments_in(files, launch)
    every = structured(files, strict=True)
    configurations = {name: one for name, one in every.items() if is_configuration(one)}
    own = told.given.get("deepspeed")
    if isinstance(own, dict):  # TrainingArguments take the configuration itself, too
        configurations = {"": own}
    if not configurations:
        raise InputError("no DeepSpeed configuration here: give its JSON, which has zero_optimization")
    named = Path(str(told.given.get("deepspeed_config") or own or "")).name
    name = next((one for one in configurations if Path(one).name == named), next(iter(configurations)))
    found = configurations[name]
    counted = given.get("WORLD_SIZE", "")
    world = launch.world_size or (int(counted) if counted.isdigit() and len(counted) < 9 else None)
    return imported(found, told, world, launch.per_node, launch)


def imported(
    found: Mapping[str, Any],
    told: Arguments,
    world: int | None,
    per_node: int | None,
    launch: Launch = Launch(),
    also: tuple[Finding, ...] = (),
) -> Imported:
    """What a configuration says with its TrainingArguments, on so many processes."""
    one = _Configuration(found, told, world, launch)
    options = one.options()
    unread = sorted(key for key in found if key not in READ and key in keys_of("deepspeed")[""])
    return Imported(
        "deepspeed",
        options,
        model_of(told),
        world,
        per_node,
        tuple(dict.fromkeys((*also, *told.findings, *one.findings))),
        tuple(map(plain, (*unread, *one.unread, *told.unread))),
        "accelerate" if TRAINER & told.given.keys() else "deepspeed",
        names_in(found) | frozenset(told.given),
    )


@dataclass
class _Configuration:
    found: Mapping[str, Any]
    told: Arguments
    world: int | None
    launch: Launch
    findings: list[Finding] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def finding(self, severity: Any, setting: str, text: str, fix: str = "") -> None:
        """Adds one; the setting is named as in the file."""
        self.findings.append(Finding(severity, setting, text, fix))

    @cached_property
    def zero(self) -> dict[str, Any]:
        """zero_optimization; an old ``true`` is stage 1."""
        value = self.found.get("zero_optimization")
        if isinstance(value, bool):
            self.finding(
                "warning",
                "zero_optimization",
                f"zero_optimization: {str(value).lower()} is an old way to write stage {int(value)}",
                f'write "zero_optimization": {{"stage": {int(value)}}}',
            )
            return {"stage": int(value)}
        return section_of(self.found, "zero_optimization")

    @cached_property
    def stage(self) -> int:
        """The stage of ZeRO, 0 to 3; what is none is taken for 0."""
        value = self.zero.get("stage", 0)
        if value == "auto" or isinstance(value, bool) or value not in STAGES.values():
            self.finding(
                "error", "zero_optimization.stage", f"stage {plain(str(value))} is none: DeepSpeed has 0 to 3"
            )
            return 0
        return int(value)

    def options(self) -> dict[str, Any]:
        """Everything, as options of ``planner estimate``; findings on the way."""
        self._check_keys()
        found: dict[str, Any] = {"framework": "deepspeed"}
        found |= self._precision()
        found["sharding"] = next(name for name, stage in STAGES.items() if stage == self.stage)
        found |= self._degrees()
        found |= self._batch(found)
        own: list[str] = [*self._sizes(), *self.told.kernels(), *self._of_megatron()]
        optimizer, step = self._optimizer()
        found |= optimizer
        moved = self._offload()
        found |= self._recompute(moved)
        if moved:
            found["offload"] = ",".join(moved)
        if self.stage:
            usual = self.stage == 3
            overlap = self.zero.get("overlap_comm", usual)
            own.append(f"overlap={'on' if is_on(usual if overlap is None else overlap) else 'off'}")
        own += step
        if (length := self.launch.seq_length) is not None:
            found["seq_length"] = length
        found |= self._dropout()
        found |= self.told.lora()
        found["option"] = own
        self.findings += zero_findings(self.zero, self.stage)
        return found

    def _check_keys(self) -> None:
        removed, of_zero = removed_of("deepspeed")
        gone = {name: name for name in removed & self.found.keys()}
        gone |= {f"zero_optimization.{name}": name for name in of_zero & self.zero.keys()}
        for name, key in gone.items():
            self.finding("error", name, f"{key} was removed: DeepSpeed 0.19 refuses it", "leave it out")
        rest = {key: value for key, value in self.found.items() if key not in removed}
        rest["zero_optimization"] = {k: v for k, v in self.zero.items() if k not in of_zero}
        self.findings += unknown_keys("deepspeed", rest)

    def _precision(self) -> dict[str, Any]:
        on = {name: False for name in ("bf16", "fp16")}
        for name, key in (("bf16", "bfloat16"), ("bf16", "bf16"), ("fp16", "fp16")):
            section = section_of(self.found, key)
            enabled = section.get("enabled", False)
            said = bool(TRAINER & self.told.given.keys())
            if enabled == "auto" and not said and name == "bf16":
                text = "auto is what TrainingArguments say, which are not here: bf16 is planned"
                self.finding("warning", f"{key}.enabled", text, "give them too, or --precision")
            auto = self.told.is_on(name) or (name == "bf16" and not said)
            on[name] |= auto if enabled == "auto" else is_on(enabled)
            for kept in ("bf16_master_weights_and_grads", "fp16_master_weights_and_grads"):
                if is_on(section.get(kept)):
                    text = f"{kept} is not modelled: master weights are planned in fp32"
                    self.finding("warning", f"{key}.{kept}", text)
        if all(on.values()):
            self.finding("error", "fp16.enabled", "bf16 and fp16 are both on", "choose one")
        if is_on(section_of(self.found, "torch_autocast").get("enabled")):
            text = "torch_autocast is not modelled: plain fp32 is planned"
            self.finding("warning", "torch_autocast.enabled", text)
        usual: str = "tf32" if self.told.is_on("tf32") else "fp32"
        precision = next((name for name, enabled in on.items() if enabled), usual)
        found: dict[str, Any] = {"precision": precision}
        given = section_of(self.found, "data_types").get("grad_accum_dtype")
        gradient = TYPES.get(str(given), str(given))
        if given not in (None, "auto") and gradient != precision.replace("tf32", "fp32"):
            found["gradient_dtype"] = gradient
            if precision != "bf16" or gradient != "fp32":
                takes = "DeepSpeed's engine takes the model's type, or fp32 with bf16 and ZeRO"
                text = f"gradients in {plain(gradient)} with {precision}: {takes}"
                self.finding("error", "data_types.grad_accum_dtype", text, f"write {precision}")
                found.pop("gradient_dtype")
        return found

    def _degrees(self) -> dict[str, Any]:
        """Parts of a replica: of the JSON and, of Megatron-DeepSpeed, of the script's words."""
        found: dict[str, Any] = {}
        words = self.launch.arguments
        tensor = number_of(section_of(self.found, "tensor_parallel").get("autotp_size"), "autotp_size")
        stages = section_of(self.found, "pipeline").get("stages")
        context = number_of(self.found.get("sequence_parallel_size"), "sequence_parallel_size", 1)
        pipeline = number_of(stages, "pipeline.stages", 1)
        if tensor and tensor > 1:
            self.finding(
                "warning",
                "tensor_parallel.autotp_size",
                f"AutoTP of {tensor:g} is planned with Megatron's kernels: its bytes are not those of "
                "Hugging Face's modules",
            )
        for name, word in (
            ("tensor_parallel", "tensor_model_parallel_size"),
            ("pipeline_parallel", "pipeline_model_parallel_size"),
        ):
            value = number_of(words.get(word), f"--{word}", 1)
            tensor = value if value and name == "tensor_parallel" else tensor
            pipeline = value if value and name == "pipeline_parallel" else pipeline
        if tensor and tensor > 1:
            found |= {"tensor_parallel": tensor, "sequence_parallel": "sequence_parallel" in words}
        if pipeline and pipeline > 1:
            found["pipeline_parallel"] = pipeline
            if self.stage > 1:
                self.finding(
                    "error",
                    "pipeline.stages",
                    f"ZeRO-{self.stage} with {pipeline:g} stages: PipelineEngine asserts ZeRO-1 at most "
                    "(runtime/pipe/engine.py)",
                    "use stage 1, or no pipeline",
                )
        if context and context > 1:
            found |= {"context_parallel": context, "context_comm": "ulysses"}
        experts = section_of(self.found, "expert_parallel")
        if is_on(experts.get("enabled")):
            found["expert_parallel"] = number_of(experts.get("autoep_size"), "autoep_size", 1) or 1
        return found

    def _batch(self, degrees: Mapping[str, Any]) -> dict[str, Any]:
        whole, micro, steps = (number_of(self._filled(name), name, 1) for name in BATCH)
        parts = 1
        for name in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
            parts *= int(degrees.get(name, 1))
        data = self.world // parts if self.world and not self.world % parts else None
        if self.world and self.world % parts:
            text = f"{self.world} processes are no multiple of {parts} for a replica"
            self.finding("error", "world size", text)
        if whole and micro and steps and data and whole != micro * steps * data:
            self.finding(
                "error",
                "train_batch_size",
                f"train_batch_size {whole:g} is not {micro:g} x {steps:g} x {data} replicas = "
                f"{micro * steps * data:g}",
                f"write {micro * steps * data:g}, or leave one of the three out",
            )
            whole = None
        if whole and data and not micro and not whole % (data * (steps or 1)):
            micro = whole / (data * (steps or 1))
        if not whole and micro and data:
            whole = micro * (steps or 1) * data
        if whole and not micro and not data:
            self.finding(
                "warning",
                "train_batch_size",
                f"train_batch_size {whole:g} alone: micro-batches are it over the replicas and "
                f"{steps or 1:g} steps, and how many replicas there are is not said here",
                "give the launch script too, or --micro-batch-size",
            )
        if micro and steps and not data and not whole:
            self.finding(
                "warning",
                "gradient_accumulation_steps",
                f"micro-batches of {micro:g} times {steps:g}: how many replicas there are is not said here",
                "give the launch script too, or --global-batch-size",
            )
        if not (whole or micro):
            missing = ", ".join(name for name in BATCH if self.found.get(name) == "auto")
            if missing:
                self.finding(
                    "warning",
                    missing.split(", ")[0],
                    f"{missing}: auto, and no TrainingArguments are given that fill it in",
                    "give training_args.json or the launch script too, or -mb and -b",
                )
            elif self.found and not any(name in self.found for name in BATCH):
                self.finding(
                    "error", BATCH[0], "neither train_batch_size nor train_micro_batch_size_per_gpu is there"
                )
        found = {"micro_batch_size": micro, "global_batch_size": whole}
        return {name: int(value) for name, value in found.items() if value}

    def _filled(self, key: str) -> Any:
        """A number of the file, or what the Trainer fills in for ``auto``; a number of both must agree."""
        argument, word = ARGUMENTS[key]
        value, own = self.found.get(key), self.told.given.get(argument)
        own = own if own is not None else self.launch.arguments.get(word)
        if value in (None, "auto"):
            return own if own is not None else value
        if own is not None and argument in self.told.given and str(own) != str(value):
            self.finding(
                "error",
                key,
                f"{key} {plain(str(value))} is not TrainingArguments' {argument} {plain(str(own))}: "
                "transformers stops at the start",
                f'write "{key}": "auto"',
            )
        return value

    def _dropout(self) -> dict[str, Any]:
        """Megatron-DeepSpeed's, where it is the same of layers and attention."""
        words = self.launch.arguments
        if not MEGATRON & words.keys():
            return {}
        layers, attention = (words.get(f"{name}_dropout", "0.1") for name in ("hidden", "attention"))
        if layers != attention:
            self.unread.append(
                f"dropout {plain(layers)} and, of attention, {plain(attention)}: the model's is taken"
            )
            return {}
        return {"dropout": number_of(layers, "--hidden-dropout", whole=False)}

    def _of_megatron(self) -> Iterator[str]:
        """Options of Megatron-DeepSpeed's kernels, where a script has its words."""
        words = self.launch.arguments
        if MEGATRON & words.keys():
            yield "kernels=megatron"
            flash = any(name.startswith("use_flash_attn") for name in words)
            yield f"attention={'flash' if flash else 'eager'}"

    def _sizes(self) -> Iterator[str]:
        for name in SIZES:
            value = self.zero.get(name, self.zero.get(name.removeprefix("stage3_")))
            if value == "auto":
                self.unread.append(f"zero_optimization.{name}: auto, which transformers takes of hidden_size")
                continue
            size = number_of(value, f"zero_optimization.{name}")
            if size is not None and (self.stage == 3 or (self.stage and name == SIZES[0])):
                yield f"{name}={size:g}" if float(f"{size:g}") == size else f"{name}={size}"

    def _optimizer(self) -> tuple[dict[str, Any], list[str]]:
        section = section_of(self.found, "optimizer")
        words = self.launch.arguments
        if MEGATRON & words.keys() and "optimizer" in words:
            still = words["optimizer"] == "sgd" and words.get("sgd_momentum") in ("0", "0.0")
            names = {"adam": "adamw", "sgd": "sgd" if still else "momentum"}
            return {"optimizer": names.get(words["optimizer"], "adamw")}, []
        kind = str(section.get("type", ""))
        if not kind:
            return self.told.optimizer(), []
        params = section_of(section, "params")
        name = kind.lower()
        if name in ("adam", "adamw"):
            plain_adam = name == "adam" and not is_on(params.get("adam_w_mode", True))
            step = ["optimizer_step=foreach"] if is_on(params.get("torch_adam")) else []
            return {"optimizer": "adam" if plain_adam else "adamw"}, step
        if name == "sgd":
            momentum = number_of(params.get("momentum", 0), "optimizer.params.momentum", whole=False)
            return {"optimizer": "momentum" if momentum else "sgd"}, []
        known = {own.lower(): one for one, (own, _) in PARAMETERS.items()}
        if name in known:
            return {"optimizer": known[name]}, []
        self.finding(
            "warning",
            "optimizer.type",
            f"{plain(kind)} is not planned under deepspeed: AdamW's states are taken for its own",
            f"planned are {', '.join(PARAMETERS)}",
        )
        return {}, []

    def _offload(self) -> list[str]:
        found = []
        for key, item, old in (
            ("offload_optimizer", "optimizer", "cpu_offload"),
            ("offload_param", "parameters", "cpu_offload_param"),
        ):
            section = section_of(self.zero, key)
            device = str(section.get("device", "none"))
            where = f"zero_optimization.{key}"
            if is_on(self.zero.get(old)):
                self.finding(
                    "warning",
                    f"zero_optimization.{old}",
                    f"{old} is an old name",
                    f'write "{key}": {{"device": "cpu"}}',
                )
                device = "cpu"
            if device in ("none", "None"):
                continue
            least = 3 if item == "parameters" else 1
            if device not in PLACES:
                self.finding("error", where, f"device {plain(device)}: use cpu, nvme or none")
            elif self.stage < least:
                self.finding(
                    "error",
                    where,
                    f"{key} at stage {self.stage}: DeepSpeed offloads {item} from stage {least} on",
                    f"use stage {least}, or device none",
                )
            else:
                found.append(item + ":nvme" * (device == "nvme"))
            if device == "nvme" and not section.get("nvme_path"):
                self.finding("error", where, "device nvme without nvme_path", "name a folder on the NVMe")
            ratio = number_of(section.get("ratio"), f"{where}.ratio", whole=False)
            if ratio is not None and ratio < 1:
                severity = "warning" if self.stage == 3 else "error"
                rule = "all of it is planned" if self.stage == 3 else "a part is offloaded at stage 3 only"
                self.finding(severity, f"{where}.ratio", f"ratio {ratio:g}: {rule}")
            if section.get("pin_memory") is False:
                self.finding(
                    "waste",
                    f"{where}.pin_memory",
                    "pin_memory off: copies to the host are blocking and slower",
                    "write true, where the host has the memory",
                )
        if found == ["parameters"] or found == ["parameters:nvme"]:
            self.finding(
                "warning",
                "zero_optimization.offload_param",
                "parameters are offloaded without the optimizer's states, which is not planned: they are "
                "taken to go with them",
                'add "offload_optimizer": {"device": "cpu"}',
            )
            found = ["optimizer", *found]
        return found

    def _recompute(self, moved: list[str]) -> dict[str, Any]:
        section = section_of(self.found, "activation_checkpointing")
        words = self.launch.arguments
        on_host = is_on(section.get("cpu_checkpointing"))
        used = section.get("number_checkpoints") not in (None, "auto", 0)
        used |= on_host or is_on(section.get("partition_activations"))
        if is_on(section.get("contiguous_memory_optimization")) and not section.get("number_checkpoints"):
            self.finding(
                "error",
                "activation_checkpointing.contiguous_memory_optimization",
                "contiguous_memory_optimization needs number_checkpoints, which is not given",
                "write how many layers are checkpointed",
            )
        policy = self.told.recompute() or ("full" if used else "")
        if granularity := words.get("recompute_granularity", ""):
            policy = granularity if granularity in ("full", "selective") else policy
            if granularity == "full" and words.get("recompute_method") == "block":
                policy = f"full:{words.get('recompute_num_layers', '1')}"
        if "tensor_model_parallel_size" not in words and not self.told.given and used:
            self.finding(
                "warning",
                "activation_checkpointing",
                "it sets up deepspeed.checkpointing, which the model must call: all layers are taken to",
            )
        if on_host:
            moved.append("activations")
        return {"recompute": policy} if policy else {}
