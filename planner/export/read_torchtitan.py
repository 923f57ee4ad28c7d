"""torchtitan's TOML in the planner's words: what 0.2.2 would run, and what is wrong with it.

The world size is that of ``WORLD_SIZE``, of ``NGPU`` times ``NNODES`` as run_train.sh has them, or of the
degrees where none is left open.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from planner.errors import InputError
from planner.export.imported import Imported
from planner.export.torchtitan_stages import MOST, Stages
from planner.export.torchtitan_words import (
    CONTEXT,
    FIXED,
    FLOAT8,
    MX,
    OPTIMIZERS,
    TF32,
)
from planner.files import deeper, plain

FRAMEWORK = "torchtitan"
COUNTS_GPUS = True
DEEPEST = 10
CONVERTERS = (FLOAT8, MX, "quantize.grouped_mm.float8", "quantize.grouped_mm.mx")
FLEX = ("deepseek_v3", "gpt_oss")
"""Models whose flavors have FlexAttention, which 0.2.2 does not run with context parallelism."""
ELSEWHERE = {
    "job.custom_config_module": "a configuration with settings of its own is not read",
    "experimental.custom_import": "what its own code changes is not known",
    "parallelism.pipeline_parallel_schedule_csv": "a schedule of a file is not read",
}
NOT_PLANNED = {
    ("parallelism.expert_parallel_comm_backend", "deepep"): "planned as all-to-all: DeepEP has other buffers",
    ("optimizer.implementation", "for-loop"): "planned as foreach: a loop needs less at the step",
    ("optimizer.early_step_in_backward", True): "planned as a step after the backward",
    ("fault_tolerance.enable", True): "planned without torchft's replicas",
}
"""Values that change memory or time in a way that is not planned."""


def recognises(files: Mapping[str, str]) -> bool:
    """Is one of the files TOML with torchtitan's sections?"""
    return any(_document(text) is not None for text in files.values())


def _document(text: str) -> dict[str, Any] | None:
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError):
        return None
    wanted = {"model", "training", "parallelism", "activation_checkpoint"}
    return found if len(wanted & set(found)) >= 2 and not deeper(found, DEEPEST) else None


def read(files: Mapping[str, str], given: Mapping[str, str] | None = None) -> Imported:
    """What a TOML file asks for. Raises InputError where there is none, or more than one."""
    found = {name: document for name, text in files.items() if (document := _document(text)) is not None}
    if len(found) != 1:
        what = f"{len(found)} of them" if found else "none"
        raise InputError(
            f"torchtitan's configuration is one TOML file with [model], [training], [parallelism]: {what} "
            "can be read"
        )
    reading = _Reading(next(iter(found.values())), dict(given or {}))
    return reading.imported()


class _Reading(Stages):
    """One document on its way into the planner's options; findings are collected."""

    def imported(self) -> Imported:
        """Everything that was read."""
        self._degrees()
        self._batch()
        self._precision()
        self._kernels()
        self._pipeline()
        self._others()
        self.options["option"] = [f"{name}={value}" for name, value in sorted(self.choices.items())]
        return Imported(
            FRAMEWORK,
            {name: value for name, value in self.options.items() if value is not None},
            self.model,
            self.world,
            self.per_node,
            tuple(self.findings),
            tuple(sorted(set(self.told) - self.used)),
            FRAMEWORK,
            frozenset(self.told),
        )

    def _number(self, name: str) -> int | None:
        text = self.given.get(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 20 and 0 < int(text) < MOST):
            raise InputError(f"--set {name}={plain(text)}: write how many processes")
        return int(text)

    def _degrees(self) -> None:
        tensor, pipeline = self.degree("tensor_parallel_degree"), self.degree("pipeline_parallel_degree")
        context, replicas = (
            self.degree("context_parallel_degree"),
            self.degree("data_parallel_replicate_degree"),
        )
        shards = self.degree("data_parallel_shard_degree")
        self.per_node = self._number("NGPU")
        world = self._number("WORLD_SIZE")
        if world is None and self.per_node:
            world = self.per_node * (self._number("NNODES") or 1)
        others = tensor * pipeline * context * replicas
        if shards == -1 and world:
            shards = max(1, world // others)
        product = others * shards
        if shards > 0 and world and product != world:
            self.find(
                "error",
                "parallelism",
                f"the degrees multiply to {product}, of {world} processes",
                f"make data_parallel_shard_degree {world // others}"
                if world % others == 0
                else f"use degrees whose product divides {world}",
            )
        if shards == -1 and not world:
            self.find(
                "warning",
                "parallelism.data_parallel_shard_degree",
                "-1 is what is left of the processes, whose number is not said",
                "give --gpus with a number, or --set NGPU=8",
            )
        self.world = world if world else product if shards > 0 else None
        self.shards, self.replicas = shards, replicas
        self.tensor, self.pipeline, self.context = tensor, pipeline, context
        self.sharded = shards * context > 1 or shards == -1
        self.data = replicas * shards if shards > 0 else None
        self.options |= {
            "tensor_parallel": tensor,
            "pipeline_parallel": pipeline,
            "context_parallel": context,
            "data_parallel": self.data,
            "data_shards": shards if shards > 0 else None,
            "sequence_parallel": tensor > 1,
            "sharding": "fsdp" if self.sharded or self.world == 1 else "ddp",
        }
        if not self.sharded:
            self.options["data_shards"] = None
            if replicas > 1 and (tensor > 1 or pipeline > 1):
                self.find(
                    "error",
                    "parallelism.data_parallel_replicate_degree",
                    f"{replicas} replicas beside other parallelism are DDP, which torchtitan runs alone",
                    "shard over them: data_parallel_shard_degree",
                )
        self._context()
        self._experts()

    def _context(self) -> None:
        method = self.of("parallelism.context_parallel_rotate_method")
        self.of("parallelism.context_parallel_load_balancer")
        if self.context == 1:
            return
        self.options["context_comm"] = {value: name for name, value in CONTEXT.items()}[method]
        flavor = self.of("model.flavor")
        if (self.flavor and self.flavor.model in FLEX) or flavor.endswith("varlen"):
            self.find(
                "error",
                "parallelism.context_parallel_degree",
                f"{self.of('model.name')} {flavor} has attention that torchtitan 0.2.2 does not cut so",
                "use 1",
            )

    def _experts(self) -> None:
        degree, own = self.degree("expert_parallel_degree"), self.degree("expert_tensor_parallel_degree")
        if degree > 1 and self.model and not self.model.experts:
            self.find("waste", "parallelism.expert_parallel_degree", f"{degree}: the model has no experts")
            return
        if degree > 1 and own not in (1, self.tensor):
            self.find(
                "error",
                "parallelism.expert_tensor_parallel_degree",
                f"{own} is neither 1 nor tensor_parallel_degree {self.tensor}",
                "use 1",
            )
        self.options["expert_parallel"] = degree
        self.options["expert_tensor_parallel"] = own if degree > 1 else 1

    def _batch(self) -> None:
        local, whole = self.of("training.local_batch_size"), self.of("training.global_batch_size")
        each, seq = self.of("parallelism.pipeline_parallel_microbatch_size"), self.of("training.seq_len")
        for name, value in (("local_batch_size", local), ("seq_len", seq)):
            if value < 1:
                self.find("error", f"training.{name}", f"{value}: use 1 or more")
        local, seq = max(1, local), max(1, seq)
        self.options["seq_length"] = seq
        unit = self.tensor * self.context * 2
        if seq % unit:
            fix = f"use {max(1, seq // unit) * unit}"
            rule = f"{seq} is no multiple of tensor x context x 2 = {unit}"
            self.find("error", "training.seq_len", rule, fix)
        micro = local
        if self.pipeline > 1:
            micro = max(1, each)
            if each < 1 or local % micro:
                self.find(
                    "error",
                    "parallelism.pipeline_parallel_microbatch_size",
                    f"{each} does not divide local_batch_size {local}",
                    "use 1",
                )
                micro = 1
        self.options["micro_batch_size"] = micro
        if self.data is None:
            self.options["global_batch_size"] = whole if whole > 0 else None
            return
        unit = local * self.data
        if whole > 0 and whole % unit:
            self.find(
                "error",
                "training.global_batch_size",
                f"{whole} is no multiple of local_batch_size {local} x {self.data} replicas",
                f"use {max(1, round(whole / unit)) * unit}",
            )
            whole = max(1, round(whole / unit)) * unit
        batch = whole if whole > 0 else unit
        self.options["global_batch_size"] = batch
        if self.pipeline > 1 and batch > unit:
            self.find(
                "warning",
                "training.local_batch_size",
                f"each step empties the pipeline {batch // unit} times, after {local // micro} micro-batches "
                "each: planned as once, with a smaller bubble",
                f"use local_batch_size {batch // self.data}",
            )

    def _precision(self) -> None:
        dtype, param = self.of("training.dtype"), self.of("training.mixed_precision_param")
        self.of("training.mixed_precision_reduce")
        alone = not self.sharded and self.tensor == self.pipeline == 1
        precision = "bf16"
        if dtype == "bfloat16":
            precision = "pure-bf16"
        elif param == "float32":
            precision = "tf32" if self.given.get(TF32) == "1" else "fp32"
        elif alone:
            self.choices["mixed_precision"] = "autocast"
        elif not self.sharded:
            precision = "fp32"
            self.find(
                "warning",
                "training.mixed_precision_param",
                "bfloat16 has no effect on tensor or pipeline parallelism without FSDP: products run in fp32",
                "use data_parallel_shard_degree 2 or more",
            )
        self.options["precision"] = self._quantized(precision)

    def _quantized(self, precision: str) -> str:
        asked = self.of("model.converters")
        for name in asked:
            if name not in CONVERTERS:
                fix = {"float8": f"write {FLOAT8}", "mx": f"write {MX}"}.get(name, "leave it out")
                self.find("error", "model.converters", f"{name} is none of torchtitan's", fix)
        wanted = precision
        if FLOAT8 in asked:
            recipe = self.of(f"{FLOAT8}.recipe_name")
            wanted = "fp8-rowwise" if (recipe or "").startswith("rowwise") else "fp8-tensorwise"
            if recipe == "rowwise_with_gw_hp":
                text = "planned as rowwise: products for weights' gradients take longer here"
                self.find("warning", f"{FLOAT8}.recipe_name", text)
            if self.of(f"{FLOAT8}.enable_fsdp_float8_all_gather"):
                if recipe:
                    text = f"float8 messages go with no recipe_name, not with {recipe}"
                    self.find("error", f"{FLOAT8}.enable_fsdp_float8_all_gather", text, "leave one out")
                else:
                    text = "planned with weights gathered in bf16: messages and buffers are half as long"
                    self.find("warning", f"{FLOAT8}.enable_fsdp_float8_all_gather", text)
            self.of(f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp")
            self._filter(f"{FLOAT8}.filter_fqns")
        elif MX in asked:
            wanted = "mxfp8"
            self.of(f"{MX}.recipe_name")
            self._filter(f"{MX}.filter_fqns")
        for name in asked:
            if name.startswith("quantize.grouped_mm"):
                self.find("warning", "model.converters", f"{name}: experts are planned in bf16")
        if wanted != precision and self.model and (self.model.experts or self.model.latent):
            self.find("warning", "model.converters", f"{wanted} of such a model is planned as {precision}")
            return precision
        if wanted != precision and precision != "bf16":
            self.find("warning", "model.converters", f"{wanted} beside {precision} is planned as {wanted}")
        return wanted

    def _filter(self, name: str) -> None:
        """The head is planned in bf16, everything else of a block in 8 bits."""
        if sorted(self.of(name)) != ["output"]:
            text = "planned as [output]: all of a block's products in 8 bits, the head in bf16"
            self.find("warning", name, text)

    def _kernels(self) -> None:
        name, way = self.of("optimizer.name"), self.of("optimizer.implementation")
        if known := {value: own for own, value in OPTIMIZERS.items()}.get(name):
            self.options["optimizer"] = known
        else:
            has = " or ".join(OPTIMIZERS.values())
            self.find("error", "optimizer.name", f"{name}: torchtitan has {has}", "use AdamW")
        self.choices["optimizer_step"] = "fused" if way == "fused" else "foreach"
        parts = self.of("compile.components") if self.of("compile.enable") else []
        self.of("compile.backend")
        blocks, loss = "model" in parts, "loss" in parts
        special = bool(self.model and (self.model.experts or self.model.latent))
        if blocks and special:
            text = "planned as not compiled: what compiled blocks of such a model keep is not known"
            self.find("warning", "compile.components", text)
        self.choices["compile"] = "on" if blocks and not special else "off"
        self.choices["loss"] = "compiled" if loss else "eager"
        overlapped = self.of("parallelism.enable_async_tensor_parallel")
        if overlapped and not blocks:
            name = "parallelism.enable_async_tensor_parallel"
            self.find("error", name, "it is of compiled blocks, which these are not", "compile.enable = true")
        self.choices["async_tp"] = "on" if overlapped and self.choices["compile"] == "on" else "off"
        for option, values in FIXED["0.2"].items():
            if option == "loss" or not self.model:
                continue
            if option in ("router", "all_to_all") and not self.model.experts:
                continue
            self.choices.setdefault(option, values[0])

    def _others(self) -> None:
        if self.of("training.enable_cpu_offload"):
            if self.sharded:
                self.options["offload"] = "optimizer,parameters"
            else:
                text = "nothing is offloaded without FSDP"
                self.find("warning", "training.enable_cpu_offload", text, "data_parallel_shard_degree = 2")
        if self.of("parallelism.disable_loss_parallel") and self.tensor > 1:
            self.find(
                "waste",
                "parallelism.disable_loss_parallel",
                f"every GPU holds the logits of the whole vocabulary, {self.tensor} times what is planned",
                "false",
            )
        for name, text in ELSEWHERE.items():
            if self.of(name):
                self.find("warning", name, text)
        for (name, value), text in NOT_PLANNED.items():
            if self.of(name) == value:
                self.find("warning", name, text)
