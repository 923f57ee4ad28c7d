"""Hugging Face's TrainingArguments as somebody gave them: in a JSON file, in a script's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import InputError, nearest_names
from planner.export.huggingface import ALIASES, ATTENTION, LIGER, OPTIMIZERS, lora_text
from planner.export.imported import Finding
from planner.export.launch_words import Launch
from planner.export.structured import HEADER, is_on, json_of, keys_of, yaml_of
from planner.files import plain
from planner.specs import ModelSpec

MARKS = frozenset(("per_device_train_batch_size", "output_dir", "gradient_checkpointing", "optim"))
"""TrainingArguments of which a file has one at least."""
USED = frozenset(
    (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "tf32", "optim"),
        *("gradient_checkpointing", "activation_checkpointing", "torch_compile", "use_liger_kernel"),
        *("liger_kernel_config", "deepspeed", "run_name"),
    )
)
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""A switch and its older name."""


@dataclass(frozen=True)
class Arguments:
    """TrainingArguments that were given, with findings on them. ``peft`` is the file of the adapters."""

    given: Mapping[str, Any]
    peft: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()
    unread: tuple[str, ...] = ()
    whole: bool = False  # a file: what it leaves out has transformers' defaults

    def is_on(self, name: str) -> bool:
        """Is a switch on? A flag without a value is."""
        value = self.given.get(name)
        return value == "" or is_on(value)

    def recompute(self) -> str:
        """``full`` where layers are checkpointed, ``none`` where that is switched off, empty where unsaid."""
        said = [name for name in CHECKPOINTING if name in self.given]
        if any(self.is_on(name) for name in said):
            return "full"
        return "none" if said else ""

    def optimizer(self) -> dict[str, Any]:
        """``--optimizer`` of ``optim``."""
        return {"optimizer": known[0]} if (known := self._optim()) else {}

    def optimizer_step(self) -> Iterator[str]:
        """The option ``optimizer_step`` of ``optim``."""
        if known := self._optim():
            yield f"optimizer_step={known[1]}"

    def _optim(self) -> tuple[str, str] | None:
        name = str(self.given.get("optim", "adamw_torch_fused" if self.whole else ""))
        name = ALIASES.get(name, name)
        return next((own for own, optim in OPTIMIZERS.items() if optim == name), None)

    def kernels(self) -> Iterator[str]:
        """Options of the modules: loss, attention, compile."""
        attention = str(self.given.get("attn_implementation", ""))
        for name, own in ATTENTION.items():
            if attention == own:
                yield f"attention={name}"
        if self.is_on("use_liger_kernel"):
            config = self.given.get("liger_kernel_config")
            usual = {"fused_linear_cross_entropy": True}
            config = config if isinstance(config, Mapping) else _object(config) or usual
            for loss, kernel in LIGER.items():
                if is_on(config.get(kernel)):
                    yield f"loss={loss}"

    def compiled(self) -> Iterator[str]:
        """The option ``compile``."""
        if self.is_on("torch_compile"):
            yield "compile=on"

    def lora(self) -> dict[str, Any]:
        """``--lora`` and ``--quantize`` of peft's file."""
        if not self.peft:
            return {}
        text, quantize = lora_text(self.peft)
        return {"lora": text} | ({"quantize": quantize} if quantize else {})


def _object(text: Any) -> Mapping[str, Any]:
    """The JSON object of a word of a command line; empty where it is none."""
    try:
        return json_of(text, "liger_kernel_config") if isinstance(text, str) and text.startswith("{") else {}
    except InputError:
        return {}


def structured(files: Mapping[str, str], strict: bool = False) -> dict[str, dict[str, Any]]:
    """Files that are JSON or YAML, as mappings; ``strict`` raises InputError for those that are broken."""
    found: dict[str, dict[str, Any]] = {}
    for name, text in files.items():
        low = name.lower()
        try:
            if low.endswith((".json", ".hjson")) or text.lstrip().startswith("{"):
                found[name] = json_of(text, name)
            elif low.endswith((".yaml", ".yml")):
                found[name] = yaml_of(text, name)
        except InputError:
            if strict:
                raise
    return found


def arguments_in(files: Mapping[str, str], launch: Launch) -> Arguments:
    """TrainingArguments of files and of a script's words; the words win. Raises InputError."""
    known = keys_of("training_arguments")[""]
    given: dict[str, Any] = {}
    peft: dict[str, Any] = {}
    findings: list[Finding] = []
    whole = False
    for one in structured(files, strict=True).values():
        if "lora" in one or {"r", "target_modules"} <= one.keys():
            peft = one if "lora" in one else {"lora": one}
        elif MARKS & one.keys() and "distributed_type" not in one and "zero_optimization" not in one:
            whole = True
            for key, value in one.items():
                if key in known or key == HEADER:
                    given[key] = value
                    continue
                findings.append(
                    Finding(
                        "warning",
                        plain(key),
                        f"{plain(key)} is none of TrainingArguments: HfArgumentParser refuses it unless the "
                        "script has it",
                        nearest_names(key, known),
                    )
                )
    given |= launch.arguments
    optim = str(given.get("optim", ""))
    if optim and ALIASES.get(optim, optim) not in OPTIMIZERS.values():
        able = ", ".join(OPTIMIZERS.values())
        findings.append(
            Finding("warning", "optim", f"{plain(optim)} is not planned: AdamW's states are taken", able)
        )
    unread = [key for key in given if key in known - USED]
    return Arguments(given, peft, tuple(findings), tuple(sorted(unread)), whole)


def model_of(told: Arguments) -> ModelSpec | None:
    """The model that a script names, if the catalog has it."""
    name = told.given.get("model_name_or_path") or told.given.get("model_name")
    try:
        return ModelSpec.from_catalog(str(name)) if name else None
    except InputError:
        return None
