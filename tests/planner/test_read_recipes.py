"""Settings of configurations that run: read without errors, and found to fit.

Reduced to what is read, from DeepSpeedExamples 45b4b71 (training), accelerate 16cb6eb (examples, tests) and
transformers' documentation of DeepSpeed.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from planner import api, reading
from planner.export import read_accelerate, read_deepspeed
from planner.specs import ClusterSpec, ModelSpec
from tests.planner.exported import GIVEN

BUCKETS: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 5e8}
AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
HOST = {"device": "cpu", "pin_memory": True}
THREE = {
    "stage": 3,
    **BUCKETS,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
WORDS = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --gradient_checkpointing True"
RECIPES: list[tuple[str, str, dict[str, Any], str, str]] = [
    # model, GPUs, configuration, words of the script, sharding
    (
        "gpt2-medium",
        "4xv100",
        {"train_batch_size": 16, "fp16": {"enabled": True}, "zero_optimization": True},
        "",
        "zero1",
    ),
    ("bert-large", "8xv100", {"train_batch_size": 64, "fp16": {"enabled": True}}, "", "ddp"),
    (
        "llama-2-7b",
        "8xa100-80g",
        {**AUTO, "zero_optimization": {"stage": 2, **BUCKETS}},
        f"{WORDS} --bf16",
        "zero2",
    ),
    (
        "llama-2-7b",
        "2xa100-80g",
        {**AUTO, "zero_optimization": {"stage": 2, **BUCKETS, "offload_optimizer": HOST}},
        f"{WORDS} --bf16 True",
        "zero2",
    ),
    ("llama-2-13b", "8xa100-80g", {**AUTO, "zero_optimization": THREE}, f"{WORDS} --fp16 True", "zero3"),
    (
        "llama-2-70b",
        "8xa100-80g",
        {**AUTO, "zero_optimization": {**THREE, "offload_optimizer": HOST, "offload_param": HOST}},
        "--per_device_train_batch_size 1 --gradient_checkpointing --bf16 True",
        "zero3",
    ),
]


def planned(model: str, gpus: str, options: Any) -> Any:
    spec = ModelSpec.from_catalog(model)
    cluster = ClusterSpec.parse(gpus).model_copy(update={"host_memory_bytes": 2 * 10**12})
    merged = {**GIVEN, "seq_length": min(1024, spec.max_position_embeddings), **options}
    training, layout = reading.read_layout(spec, cluster, reading.read_training(merged), merged)
    way = reading.read_way(merged["recompute"], merged["offload"])
    return api.estimate(spec, cluster, training, layout, recompute=way)


@pytest.mark.parametrize(
    ("model", "gpus", "config", "words", "sharding"), RECIPES, ids=lambda one: str(one)[:20]
)
def test_a_recipe_of_deepspeeds_that_runs_is_found_to_fit(
    model: str, gpus: str, config: dict[str, Any], words: str, sharding: str
) -> None:
    count = gpus.partition("x")[0]
    launch = f"deepspeed --num_gpus {count} train.py --deepspeed ds.json {words}"
    found = read_deepspeed.read({"ds.json": json.dumps(config), "run.sh": launch}, {})
    assert not [one for one in found.findings if one.severity == "error"], found.findings
    assert found.options["sharding"] == sharding
    plan = planned(model, gpus, found.options)
    assert plan.verdict != "does not fit", plan.peak_bytes / 2**30


FSDP = {
    "fsdp_activation_checkpointing": True,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_offload_params": False,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
}
ONE = {**FSDP, "fsdp_sharding_strategy": "FULL_SHARD", "fsdp_backward_prefetch": "BACKWARD_PRE"}
ONE |= {"fsdp_forward_prefetch": False, "fsdp_sync_module_states": True, "fsdp_use_orig_params": True}
TWO = {**FSDP, "fsdp_version": 2, "fsdp_reshard_after_forward": True}


@pytest.mark.parametrize(
    ("model", "gpus", "config"),
    [
        ("llama-2-7b", "8xa100-80g", {"distributed_type": "FSDP", "fsdp_config": ONE, "num_processes": 8}),
        ("llama-2-70b", "16xa100-80g", {"distributed_type": "FSDP", "fsdp_config": ONE, "num_processes": 16}),
        (
            "llama-3.1-8b",
            "8xh100",
            {
                "distributed_type": "FSDP",
                "fsdp_config": TWO,
                "num_processes": 8,
                "parallelism_config": {
                    "parallelism_config_cp_size": 4,
                    "parallelism_config_dp_shard_size": 2,
                    "parallelism_config_cp_comm_strategy": "alltoall",
                },
            },
        ),
        ("gpt2-xl", "2xa100", {"distributed_type": "MULTI_GPU", "num_processes": 2, "main_process_port": 0}),
    ],
    ids=lambda one: str(one)[:20],
)
def test_a_recipe_of_accelerates_that_runs_is_found_to_fit(
    model: str, gpus: str, config: dict[str, Any]
) -> None:
    text = yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "mixed_precision": "bf16", **config})
    arguments = json.dumps({"per_device_train_batch_size": 1, "output_dir": "out", "bf16": True})
    found = read_accelerate.read({"a.yaml": text, "args.json": arguments}, {})
    assert not [one for one in found.findings if one.severity == "error"], found.findings
    plan = planned(model, gpus, found.options)
    assert plan.verdict != "does not fit", plan.peak_bytes / 2**30
