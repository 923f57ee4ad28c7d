"""accelerate: ``accelerate.yaml`` for ``accelerate launch``, and TrainingArguments for the Trainer.

Read in accelerate 1.15 (commands/config/config_args.py, commands/launch.py, utils/launch.py,
utils/dataclasses.py, utils/fsdp_utils.py, parallelism_config.py). The tables here serve
:mod:`planner.export.read_accelerate` as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from planner.export import deepspeed, huggingface
from planner.export.base import Export, NotExpressible, Subject
from planner.export.huggingface import ARGUMENTS, script_of, text_of

VERSIONS = ("1.15",)
FRAMEWORKS = ("hf", "fsdp", "deepspeed")
SETTINGS = {
    "script": "your training script, which reads TrainingArguments from a JSON file",
    "nvme_path": deepspeed.SETTINGS["nvme_path"],
}
CONFIG = "accelerate.yaml"
DEEPSPEED_VERSION = "0.19"
"""Of DeepSpeed, for plans of its."""
COMMS = {"all-gather": "allgather", "ring": "alltoall"}
"""Ways of context parallelism -> parallelism_config_cp_comm_strategy."""
STRATEGIES = {
    ("full", "all"): "FULL_SHARD",
    ("keep", "all"): "SHARD_GRAD_OP",
    ("full", "node"): "HYBRID_SHARD",
    ("keep", "node"): "HYBRID_SHARD_ZERO2",
}
"""FSDP1: is a unit cut again after its forward, and over what -> fsdp_sharding_strategy."""
MIXED = {"bf16": "bf16", "fp16": "fp16"}
"""Precisions -> mixed_precision; of the others it is no."""


def export(subject: Subject, version: str, settings: Mapping[str, str]) -> Export:
    """``accelerate.yaml`` and ``training_args.json``; of DeepSpeed's plans ``ds_config.json`` as well.

    Raises NotExpressible for what accelerate and the Trainer cannot be told.
    """
    import yaml

    framework = subject.plan.training.framework
    layout = subject.layout
    if layout.pipeline_parallel > 1 or layout.tensor_parallel > 1:
        raise NotExpressible(
            f"{layout.describe()}: accelerate runs these modules without a pipeline, and they are planned "
            "without tensor parallelism: use tensor_parallel 1 and pipeline_parallel 1",
            {"tensor_parallel": 1, "pipeline_parallel": 1},
        )
    script = script_of(settings)
    if subject.plan.num_gpus % subject.per_node:
        raise NotExpressible(
            f"{subject.plan.num_gpus} GPUs on {subject.nodes} nodes: accelerate starts as many processes on "
            f"each: use a multiple of {subject.per_node}"
        )
    files: dict[str, str] = {}
    notes: list[str] = []
    if framework == "deepspeed":
        given = {name: value for name, value in settings.items() if name in ("nvme_path", "script")}
        made = deepspeed.export(subject, DEEPSPEED_VERSION, {**given, "batch": "auto"})
        files |= made.files
        notes += made.notes
        arguments = deepspeed.arguments_of(subject)
        sections = _deepspeed(subject)
    else:
        notes += huggingface.notes_of(subject)
        arguments = huggingface.training_arguments(subject) | {"optim": huggingface.optimizer_of(subject)}
        full = huggingface.recomputed(subject, "the Trainer")
        if framework == "fsdp":
            sections = _fsdp(subject, full)
        else:
            sections = _ddp(subject)
            arguments |= {"gradient_checkpointing": True} if full else {}
            arguments |= {"ddp_find_unused_parameters": False} if layout.data_ranks > 1 else {}
        files |= huggingface.peft_of(subject, flat=framework == "fsdp")
    notes.append(f"{ARGUMENTS} is for HfArgumentParser.parse_json_file; max_steps, output_dir are yours")
    common = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        **sections,
        "num_machines": subject.nodes,
        "num_processes": subject.plan.num_gpus,
        "machine_rank": 0,
        "rdzv_backend": "static",
        "same_network": True,
        "main_training_function": "main",
        "use_cpu": False,
    }
    text = subject.header("# ", also=(f"for accelerate {version}",))
    files = {CONFIG: text + yaml.safe_dump(common, sort_keys=False, allow_unicode=False), **files}
    files[ARGUMENTS] = text_of(arguments)
    return Export(
        "accelerate",
        version,
        files,
        program=(script, ARGUMENTS),
        launcher="accelerate",
        launcher_options=("--config_file", CONFIG),
        notes=tuple(dict.fromkeys(notes)),
    )


def _ddp(subject: Subject) -> dict[str, Any]:
    if subject.options().get("gradient_view") == "on":
        raise NotExpressible(
            "gradient_view=on is DistributedDataParallelKwargs(gradient_as_bucket_view=True) in your code: "
            "TrainingArguments have no such switch",
            {"option": {"gradient_view": "off"}},
        )
    if subject.options().get("optimizer_step") == "in_backward" and subject.job.training.optimizer != "lomo":
        raise NotExpressible(
            "optimizer_step=in_backward is hooks in your code: the Trainer steps after the backward",
            {"option": {"optimizer_step": "fused"}},
        )
    kind = "MULTI_GPU" if subject.plan.num_gpus > 1 else "NO"
    return {
        "distributed_type": kind,
        "mixed_precision": MIXED.get(str(subject.job.training.precision), "no"),
    }


def _fsdp(subject: Subject, full: bool) -> dict[str, Any]:
    layout, options = subject.layout, subject.options()
    precision = str(subject.job.training.precision)
    first = options.get("version") == "1"
    for message, instead in _fsdp_refused(subject, precision, first):
        raise NotExpressible(message, instead)
    found: dict[str, Any] = {
        "fsdp_version": 1 if first else 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": bool(layout.offload),
        "fsdp_activation_checkpointing": full,
    }
    if first:
        over = "all" if layout.data_shards == layout.data_parallel else "node"
        found |= {
            "fsdp_sharding_strategy": STRATEGIES["full" if layout.reshard_after_forward else "keep", over],
            "fsdp_use_orig_params": True,
            "fsdp_sync_module_states": True,
            "fsdp_backward_prefetch": "BACKWARD_PRE",
            "fsdp_forward_prefetch": False,
        }
    else:
        found["fsdp_reshard_after_forward"] = layout.reshard_after_forward
    sections: dict[str, Any] = {
        "distributed_type": "FSDP",
        "mixed_precision": MIXED.get(precision, "no"),
        "fsdp_config": found,
    }
    hybrid = layout.data_shards != layout.data_parallel
    if layout.context_parallel > 1 or (hybrid and not first):
        sections["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": layout.data_parallel // layout.data_shards,
            "parallelism_config_dp_shard_size": layout.data_shards,
            "parallelism_config_tp_size": 1,
            "parallelism_config_cp_size": layout.context_parallel,
            "parallelism_config_cp_backend": "torch",
            "parallelism_config_cp_comm_strategy": COMMS.get(layout.context_comm, "allgather"),
        }
    return sections


def _fsdp_refused(subject: Subject, precision: str, first: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What accelerate does in its own way: units, types, meshes."""
    layout, options = subject.layout, subject.options()
    root = "one" if first else "split"
    if options.get("root") != root:
        yield (
            f"root={options.get('root')}: accelerate makes embedding, and norm and head, units of their own "
            f"under FSDP2 and not under FSDP1: use root={root}",
            {"option": {"root": root}},
        )
    if options.get("mixed_precision") == "autocast":
        yield (
            "mixed_precision=autocast: accelerate gives FSDP a mixed precision policy: use fsdp",
            {"option": {"mixed_precision": "fsdp"}},
        )
    # utils/dataclasses.py, set_mixed_precision: gradients are reduced in the type of the products.
    reduced = "fp32" if precision in ("fp32", "tf32") else "bf16"
    if options.get("reduce_dtype") != reduced:
        yield (
            f"reduce_dtype={options.get('reduce_dtype')} with precision={precision}: accelerate reduces "
            f"gradients in the type of the products: use reduce_dtype={reduced}",
            {"option": {"reduce_dtype": reduced}},
        )
    if options.get("compile") == "on" and layout.context_parallel > 1:
        yield ("compile=on with context parallelism is not known to run: use compile=off", {})
    replicas = layout.data_parallel // layout.data_shards
    if not first and layout.data_shards * layout.context_parallel == 1 and layout.data_parallel > 1:
        yield (
            f"data_shards=1 of {replicas} replicas: accelerate has no FSDP with nothing to share out: use "
            "framework hf, or data_shards 2",
            {"data_shards": 2},
        )
    if not first and layout.data_shards == 1 and replicas > 1:
        yield (
            f"data_shards=1 with context_parallel={layout.context_parallel} and {replicas} replicas: "
            "ParallelismConfig takes replicas with dp_shard_size 2 and more",
            {"data_shards": 2},
        )
    if first and layout.data_shards not in (layout.data_parallel, subject.per_node):
        yield (
            f"data_shards={layout.data_shards}: FSDP1's HYBRID_SHARD shares out within a node of "
            f"{subject.per_node} GPUs: use {subject.per_node}, or option version=2",
            {"data_shards": subject.per_node},
        )


def _deepspeed(subject: Subject) -> dict[str, Any]:
    """A section that names DeepSpeed's file: what that says is not said twice, or accelerate refuses it."""
    layout = subject.layout
    sections: dict[str, Any] = {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": deepspeed.CONFIG,
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": layout.sharding == "zero3",
        },
    }
    if layout.context_parallel > 1:
        attention = huggingface.ATTENTION[subject.options()["attention"]]
        sections["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": 1,
            "parallelism_config_dp_shard_size": layout.data_parallel,
            "parallelism_config_tp_size": 1,
            "parallelism_config_cp_size": 1,
            "parallelism_config_sp_size": layout.context_parallel,
            "parallelism_config_sp_backend": "deepspeed",
            "parallelism_config_sp_seq_length": subject.job.seq_length,
            "parallelism_config_sp_seq_length_is_variable": False,
            "parallelism_config_sp_attn_implementation": attention,
        }
    return sections
