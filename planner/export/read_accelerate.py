"""Reads what ``accelerate config`` writes, with TrainingArguments and DeepSpeed's JSON beside it.

accelerate 1.15 refuses unknown keys at the top and sets any key of an inner section as an attribute that
nobody reads (commands/launch.py, _validate_launch_command): those are errors here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from planner.errors import InputError, nearest_names
from planner.export import read_deepspeed
from planner.export.accelerate import COMMS, MIXED, STRATEGIES
from planner.export.arguments import Arguments, arguments_in, model_of, structured
from planner.export.imported import Finding, Imported
from planner.export.launch_words import Launch, launch_of
from planner.export.structured import is_on, keys_of, names_in, number_of, section_of
from planner.files import plain

MARKS = frozenset(("distributed_type", "compute_environment"))
"""Keys of which an accelerate configuration has one at least."""
PREFIXES = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}
"""Sections whose keys may be written without the section's own prefix."""
FRAMEWORKS = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed", "MEGATRON_LM": "megatron"}
"""distributed_type -> the framework that it is planned in; others are DDP of Hugging Face's modules."""
SHARDED = {strategy: kind for kind, strategy in STRATEGIES.items()}
NUMBERED = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""Strategies as older files number them, from 1 (utils/constants.py)."""
OF_DEEPSPEED = (
    *("zero_stage", "offload_optimizer_device", "offload_param_device", "gradient_clipping"),
    *("gradient_accumulation_steps", "offload_optimizer_nvme_path", "offload_param_nvme_path"),
    "zero3_save_16bit_model",
)
"""Keys of deepspeed_config that accelerate refuses beside deepspeed_config_file."""
PLANNED = frozenset(
    (
        *MARKS,
        *("mixed_precision", "num_processes", "num_machines", "fsdp_config", "deepspeed_config"),
        *(
            "parallelism_config",
            "megatron_lm_config",
            "dynamo_config",
            "dynamo_backend",
            "fp16",
            "machine_rank",
        ),
    )
)


def recognises(files: Mapping[str, str]) -> bool:
    """Is one of the files accelerate's, or does a script start with ``accelerate launch``?"""
    if any(MARKS & one.keys() for one in structured(files).values()):
        return True
    return launch_of(files, {}).launcher == "accelerate"


def read(files: Mapping[str, str], given: Mapping[str, str]) -> Imported:
    """An accelerate configuration in the planner's words. Raises InputError where there is none."""
    launch = launch_of(files, given)
    every = structured(files, strict=True)
    own = {name: one for name, one in every.items() if MARKS & one.keys()}
    wanted = Path(launch.flags.get("config_file", "")).name
    name = next((one for one in own if wanted and Path(one).name == wanted), next(iter(own), ""))
    if not name and launch.launcher != "accelerate":
        raise InputError("no accelerate configuration here: give its YAML, which has distributed_type")
    found = _Configuration(own.get(name, {}), every, arguments_in(files, launch), launch)
    return found.imported()


@dataclass
class _Configuration:
    found: Mapping[str, Any]
    files: Mapping[str, dict[str, Any]]
    told: Arguments
    launch: Launch
    findings: list[Finding] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def finding(self, severity: Any, setting: str, text: str, fix: str = "") -> None:
        """Adds one; the setting is named as in the file."""
        self.findings.append(Finding(severity, setting, text, fix))

    def value(self, name: str, section: str = "") -> Any:
        """A value: of the command line, which wins, else of the file; switches without a value are on."""
        if name in self.launch.flags:
            return self.launch.flags[name] or True
        inner = section_of(self.found, section) if section else self.found
        prefix = PREFIXES.get(section, "")
        return inner.get(name, inner.get(name.removeprefix(prefix)) if prefix else None)

    @property
    def kind(self) -> str:
        """distributed_type."""
        for flag, kind in (("use_deepspeed", "DEEPSPEED"), ("use_fsdp", "FSDP"), ("multi_gpu", "MULTI_GPU")):
            if flag in self.launch.flags:
                return kind
        return str(self.found.get("distributed_type") or "NO").upper()

    @property
    def world(self) -> int | None:
        """Processes in all."""
        count = number_of(self.value("num_processes"), "num_processes", -1)
        return int(count) if count and count > 0 else None

    @property
    def per_node(self) -> int | None:
        """Processes on a node."""
        nodes = number_of(self.value("num_machines"), "num_machines", 1) or 1
        if self.world is None:
            return None
        if self.world % nodes:
            text = f"{self.world} processes on {nodes:g} machines: accelerate starts as many on each"
            self.finding("error", "num_processes", text, f"use a multiple of {nodes:g}")
            return None
        return int(self.world // nodes)

    def imported(self) -> Imported:
        """Everything; a file of DeepSpeed's goes to its own reader."""
        self._check_keys()
        per_node = self.per_node
        framework = FRAMEWORKS.get(self.kind, "hf")
        if framework == "deepspeed":
            return self._deepspeed(per_node)
        options: dict[str, Any] = {"framework": framework, "precision": self._precision()}
        parts = 1
        own: list[str] = []
        if framework == "megatron":
            options |= self._megatron()
            parts = int(options["tensor_parallel"]) * int(options["pipeline_parallel"])
        else:
            options |= self.told.optimizer()
            own += [*self.told.kernels(), *self.told.optimizer_step(), *self._compiled()]
        if framework == "fsdp":
            options |= self._fsdp(own, str(options["precision"]))
            parts = int(options.get("context_parallel", 1)) * int(options.get("tensor_parallel", 1))
        if framework != "megatron" and (policy := self._recompute(framework)):
            options["recompute"] = policy
        options |= self._batch(parts) | self.told.lora()
        if (length := self.launch.seq_length) is not None:
            options["seq_length"] = length
        options["option"] = own
        return self._made(framework, options, per_node)

    def _made(self, framework: str, options: Mapping[str, Any], per_node: int | None) -> Imported:
        unread = sorted(key for key in self.found if key in keys_of("accelerate")[""] - PLANNED)
        found = tuple(dict.fromkeys((*self.findings, *self.told.findings)))
        rest = tuple(map(plain, (*unread, *self.unread, *self.told.unread)))
        return Imported(
            framework,
            options,
            model_of(self.told),
            self.world,
            per_node,
            found,
            rest,
            "accelerate",
            names_in(self.found) | frozenset(self.told.given),
        )

    def _check_keys(self) -> None:
        known = keys_of("accelerate")
        for key, value in self.found.items():
            if key not in known[""]:
                text = f"{plain(key)} is no key of accelerate 1.15, which refuses the file"
                self.finding("error", plain(key), text, nearest_names(key, known[""]))
            elif isinstance(value, Mapping) and key in known:
                prefix = PREFIXES.get(key, "")
                for name in map(str, value):
                    if name not in known[key] and prefix + name not in known[key]:
                        text = f"{plain(name)} is no key of {key}: accelerate sets it and nobody reads it"
                        self.finding("error", f"{key}.{plain(name)}", text, nearest_names(name, known[key]))

    def _precision(self) -> str:
        mixed = str(
            self.value("mixed_precision") or ("fp16" if is_on(self.found.get("fp16")) else "no")
        ).lower()
        told = next((name for name in MIXED if self.told.is_on(name)), "")
        if told and mixed not in (told, "no"):
            text = f"mixed_precision {plain(mixed)} and TrainingArguments' {told}: the Trainer's wins"
            self.finding("warning", "mixed_precision", text, f"write {told} in both")
        if mixed == "fp8":
            self.finding("warning", "mixed_precision", "fp8 is not planned of these modules: bf16 is taken")
            return "bf16"
        if not told and mixed not in (*MIXED, "no"):
            text = f"mixed_precision {plain(mixed)}: accelerate has no, fp16, bf16 and fp8"
            self.finding("error", "mixed_precision", text)
        if precision := told or (mixed if mixed in MIXED else ""):
            return precision
        width = str(self.told.given.get("dtype") or self.told.given.get("torch_dtype") or "")
        if "bfloat16" in width or width == "bf16":
            return "pure-bf16"
        return "tf32" if self.told.is_on("tf32") else "fp32"

    def _compiled(self) -> Iterator[str]:
        backend = self.value("dynamo_backend", "dynamo_config") or self.found.get("dynamo_backend")
        if str(backend or "no").lower() != "no":
            yield "compile=on"
        else:
            yield from self.told.compiled()

    def _recompute(self, framework: str) -> str:
        policy = self.told.recompute()
        if framework == "fsdp":
            if is_on(self.value("fsdp_activation_checkpointing", "fsdp_config")):
                if policy == "full":
                    self.finding(
                        "waste",
                        "gradient_checkpointing",
                        "layers are checkpointed by FSDP and by the Trainer: they are run again twice",
                        "leave gradient_checkpointing out",
                    )
                policy = "full"
            if is_on(self.value("fsdp_activation_checkpointing_offload", "fsdp_config")):
                text = "offload of checkpointed layers' inputs is not planned here: they stay on the GPU"
                self.finding("warning", "fsdp_config.fsdp_activation_checkpointing_offload", text)
        return policy

    def _batch(self, parts: int) -> dict[str, int]:
        micro, steps = (
            number_of(self.told.given.get(name), name, 1)
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        steps = steps or number_of(
            self.value("gradient_accumulation_steps"), "gradient_accumulation_steps", 1
        )
        if self.told.whole:
            micro = micro or 8
        if not micro:
            return {}
        found = {"micro_batch_size": int(micro)}
        if self.world and not self.world % parts:
            found["global_batch_size"] = int(micro * (steps or 1) * (self.world // parts))
        return found

    def _fsdp(self, own: list[str], precision: str) -> dict[str, Any]:
        version = str(self.value("fsdp_version", "fsdp_config") or 1)
        first = version == "1"
        found: dict[str, Any] = {"sharding": "fsdp"}
        own += [f"version={1 if first else 2}", f"root={'one' if first else 'split'}"]
        if precision in MIXED:  # else the weights' type, which is not said here
            own.append("reduce_dtype=bf16")
        if is_on(self.value("fsdp_offload_params", "fsdp_config")):
            found["offload"] = "optimizer,parameters"
        kept = not is_on(
            self.value("fsdp_reshard_after_forward", "fsdp_config") in (None, True, "true", "True")
        )
        wrap = self.value("fsdp_auto_wrap_policy", "fsdp_config")
        wrapped = "TRANSFORMER_BASED_WRAP" if str(wrap) in ("1", "TRANSFORMER_BASED_WRAP") else str(wrap)
        if wrapped != "TRANSFORMER_BASED_WRAP":
            self.finding(
                "warning",
                "fsdp_config.fsdp_auto_wrap_policy",
                f"{plain(wrapped)}: units are planned as blocks, TRANSFORMER_BASED_WRAP's",
                "write TRANSFORMER_BASED_WRAP",
            )
        if first:
            kept = self._first_version(found)
        elif self.value("fsdp_sharding_strategy", "fsdp_config") is not None:
            text = "fsdp_sharding_strategy is FSDP1's: version 2 reads fsdp_reshard_after_forward"
            self.finding("warning", "fsdp_config.fsdp_sharding_strategy", text, "leave it out")
        if not first and is_on(self.value("fsdp_forward_prefetch", "fsdp_config")):
            text = "fsdp_forward_prefetch is FSDP1's: accelerate stops with version 2"
            self.finding("error", "fsdp_config.fsdp_forward_prefetch", text, "leave it out")
        found["reshard_after_forward"] = not kept
        found |= self._mesh(first)
        return found

    def _first_version(self, found: dict[str, Any]) -> bool:
        """FSDP1's sharding: is a unit kept after its forward? Adds replicas that a hybrid one has."""
        name = self.value("fsdp_sharding_strategy", "fsdp_config") or "FULL_SHARD"
        if str(name) in map(str, range(1, len(NUMBERED) + 1)):
            name = NUMBERED[int(name) - 1]
        name = str(name).upper()
        if name == "NO_SHARD":
            found["sharding"] = "ddp"
            text = "NO_SHARD is DDP, which FSDP is not planned as"
            self.finding("warning", "fsdp_config.fsdp_sharding_strategy", text, "use MULTI_GPU")
            return False
        if name not in SHARDED:
            text = f"fsdp_sharding_strategy {plain(name)} is none: FSDP has {', '.join(NUMBERED)}"
            self.finding("error", "fsdp_config.fsdp_sharding_strategy", text)
            return False
        kept, over = SHARDED[name]
        nodes = number_of(self.value("num_machines"), "num_machines", 1) or 1
        if over == "node" and self.world and not self.world % nodes:
            found["data_shards"] = int(self.world // nodes)
        return kept == "keep"

    def _mesh(self, first: bool) -> dict[str, Any]:
        """Degrees of parallelism_config."""
        section = section_of(self.found, "parallelism_config")
        sizes = {
            name: int(
                number_of(self.value(f"parallelism_config_{name}_size", "parallelism_config"), name, 1) or 1
            )
            for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
        }
        if not section and not any("parallelism_config" in name for name in self.launch.flags):
            return {}
        product = 1
        for size in sizes.values():
            product *= size
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1"
        if first and product > 1:
            text = "parallelism_config needs fsdp_version 2"
            self.finding("error", "parallelism_config", text, "write fsdp_version: 2")
        if self.world and product != self.world:
            text = f"{shown} is {product}, num_processes {self.world}"
            self.finding("error", "parallelism_config", text, f"their product must be {self.world}")
        if sizes["cp"] > 1 and sizes["sp"] > 1:
            self.finding("error", "parallelism_config", "cp and sp exclude each other", "keep one of them")
        if sizes["dp_replicate"] > 1 and sizes["dp_shard"] == 1 and sizes["tp"] * sizes["cp"] > 1:
            text = f"{shown}: replicas with tensor or context parallelism need dp_shard of 2 or more"
            self.finding("error", "parallelism_config.parallelism_config_dp_shard_size", text)
        found: dict[str, Any] = {}
        data = sizes["dp_replicate"] * sizes["dp_shard"]
        if sizes["dp_shard"] != data:
            found["data_shards"] = sizes["dp_shard"]
        if sizes["cp"] > 1:
            comm = self.value("parallelism_config_cp_comm_strategy", "parallelism_config") or "allgather"
            names = {own: name for name, own in COMMS.items()}
            found |= {"context_parallel": sizes["cp"], "context_comm": names.get(str(comm), "all-gather")}
        if sizes["tp"] > 1:
            found |= {"tensor_parallel": sizes["tp"], "sequence_parallel": False}
        return found

    def _megatron(self) -> dict[str, Any]:
        """accelerate's own arguments of Megatron-LM."""

        def own(name: str) -> Any:
            return self.value(f"megatron_lm_{name}", "megatron_lm_config")

        found: dict[str, Any] = {
            "tensor_parallel": int(number_of(own("tp_degree"), "tp_degree", 1) or 1),
            "pipeline_parallel": int(number_of(own("pp_degree"), "pp_degree", 1) or 1),
            "sequence_parallel": is_on(own("sequence_parallelism")),
            "sharding": "zero1" if is_on(own("use_distributed_optimizer")) else "ddp",
        }
        for name, option in (
            ("context_parallel_size", "context_parallel"),
            ("expert_model_parallel_size", "expert_parallel"),
            ("expert_tensor_parallel_size", "expert_tensor_parallel"),
        ):
            if value := number_of(own(name), name, 1):
                found[option] = int(value)
        granularity = str(own("recompute_granularity") or "")
        if granularity in ("full", "selective"):
            found["recompute"] = granularity
        elif is_on(own("recompute_activations")):
            found["recompute"] = "selective"
        return found

    def _deepspeed(self, per_node: int | None) -> Imported:
        section = section_of(self.found, "deepspeed_config")
        wanted = self.value("deepspeed_config_file", "deepspeed_config")
        found: dict[str, Any] = {}
        if wanted:
            if beside := [name for name in OF_DEEPSPEED if name in section]:
                text = f"{', '.join(beside)} beside deepspeed_config_file: accelerate stops"
                self.finding(
                    "error", f"deepspeed_config.{beside[0]}", text, "say it in DeepSpeed's file alone"
                )
            name = next((one for one in self.files if Path(one).name == Path(str(wanted)).name), "")
            found = self.files.get(name, {})
            if not found:
                text = f"{plain(str(wanted))} is not among the files given: ZeRO's stage is not known"
                self.finding("warning", "deepspeed_config.deepspeed_config_file", text, "give it too")
        else:
            found = self._inner()
        mesh = section_of(self.found, "parallelism_config")
        context = number_of(mesh.get("parallelism_config_sp_size"), "parallelism_config_sp_size", 1)
        if context and context > 1:
            found = {**found, "sequence_parallel_size": int(context)}
        made = read_deepspeed.imported(
            found, self.told, self.world, per_node, self.launch, tuple(self.findings)
        )
        own = names_in(self.found) | (made.settings if wanted else frozenset())
        return replace(made, target="accelerate", settings=own | frozenset(self.told.given))

    def _inner(self) -> dict[str, Any]:
        """DeepSpeed's configuration as accelerate makes it of its own keys (utils/dataclasses.py)."""

        def own(name: str) -> Any:
            return self.value(name, "deepspeed_config")

        precision = self._precision()
        zero: dict[str, Any] = {"stage": int(number_of(own("zero_stage"), "zero_stage") or 0)}
        if own("zero_stage") is None:
            zero["stage"] = 2
        for key, name in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_param")):
            device = own(f"{name}_device")
            if device not in (None, "none"):
                path = own(f"{name}_nvme_path")
                zero[key] = {"device": device, **({"nvme_path": path} if path else {})}
        found: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": own("gradient_accumulation_steps") or "auto",
            "zero_optimization": zero,
        }
        if precision in MIXED:
            found[precision] = {"enabled": True}
        return found
