"""Exports for Megatron-Bridge in front of its own configuration, as its ``pretrain`` checks it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from planner.export import Export, NotExpressible, Subject, export
from strategies.layout import Layout
from tests.contract import WANTED, judged
from tests.contract.megatron_plans import random_plans
from tests.contract.test_megatron import COMMS, LLAMA, SHARES, subject_of

pytestmark = pytest.mark.contract


def case_of(subject: Subject, made: Export) -> dict[str, Any]:
    arch = 10 if (subject.cluster.gpu.compute_capability or 0) >= 10 else 9
    return {"files": dict(made.files), "env": dict(made.env), "world": subject.plan.num_gpus, "arch": arch}


def check(subject: Subject, told: dict[str, Any]) -> None:
    assert told["ok"], (subject.layout.describe(), told)
    layout, plan, job = subject.layout, subject.plan, subject.job
    precision = str(job.training.precision)
    policy, count = subject.recompute("")
    full = policy == "full"
    multiple = 128 * layout.tensor_parallel
    fsdp = layout.sharding in ("zero2", "fsdp")
    model = {
        "num_layers": subject.model.num_hidden_layers,
        "hidden_size": subject.model.hidden_size,
        "gated_linear_unit": subject.model.gated_mlp,
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": layout.chunks if layout.chunks > 1 else None,
        "context_parallel_size": layout.context_parallel,
        "cp_comm_type": COMMS[layout.context_comm],
        "expert_model_parallel_size": layout.expert_parallel,
        "sequence_parallel": layout.sequence_parallel,
        "seq_length": job.seq_length,
        "vocab_size": -(-subject.model.vocab_size // multiple) * multiple,
        "recompute_method": ("uniform" if count is None else "block") if full else None,
        "recompute_num_layers": (count or 1) if full else None,
        "params_dtype": "float16" if precision == "fp16" else "bfloat16",
        "fp8": "hybrid" if "fp8" in precision else None,
        "fp4": "e2m1" if precision == "nvfp4" else None,
        "num_moe_experts": subject.model.experts.num_experts if subject.model.experts else None,
    }
    assert {name: told["model"][name] for name in model} == model
    assert told["data_parallel_size"] == layout.data_parallel
    assert told["train"]["micro_batch_size"] == layout.micro_batch_size
    assert told["train"]["global_batch_size"] == layout.global_batch_size
    ddp = {
        "use_distributed_optimizer": layout.sharding in SHARES,
        "use_megatron_fsdp": fsdp,
        "grad_reduce_in_fp32": job.recipe.gradient == 4,
        "num_distributed_optimizer_instances": layout.data_parallel // layout.data_shards,
        "fp8_param_gather": job.recipe.cast_alone,
        "reuse_grad_buf_for_mxfp8_param_ag": job.recipe.cast_alone and precision == "mxfp8",
    }
    if fsdp:
        ddp["data_parallel_sharding_strategy"] = SHARES[layout.sharding]
        ddp["megatron_fsdp_main_grads_dtype"] = (
            "float32" if job.recipe.gradient == 4 else model["params_dtype"]
        )
    assert {name: told["ddp"][name] for name in ddp} == ddp
    moments = {"bf16": "bfloat16", "fp8": "uint8"}.get(str(plan.training.optimizer_dtype), "float32")
    assert told["optimizer"]["exp_avg_dtype"] == moments


def test_the_configuration_reads_back_what_was_planned() -> None:
    made, refused = [], Counter[str]()
    for subject in random_plans(11, 5 * WANTED):
        if len(made) == WANTED:
            break
        try:
            made.append((subject, export(subject, "megatron-bridge")))
        except NotExpressible as error:
            refused[str(error)] += 1
    assert len(made) == WANTED, refused
    told = judged("frameworks", "megatron_bridge.py", [case_of(*one) for one in made], timeout=600)
    for (subject, _), one in zip(made, told, strict=True):
        check(subject, one)


def test_a_misspelt_key_is_an_error_and_a_setting_is_inert() -> None:
    subject = subject_of("llama-65b", "64xH100", LLAMA, seq_length=2048)
    good = case_of(subject, export(subject, "megatron-bridge"))
    files = dict(good["files"])
    files["overrides.yaml"] = files["overrides.yaml"].replace("sequence_parallel", "sequence_paralel")
    small = subject_of("llama-3.2-1b", "1xH100", Layout(), seq_length=512)
    value = "$(id) ${oc.env:HOME} 'x' \" # p\u00e4th"
    inert = case_of(small, export(small, "megatron-bridge", settings={"save": value}))
    wrong, right = judged("frameworks", "megatron_bridge.py", [{**good, "files": files}, inert])
    assert not wrong["ok"]
    assert "sequence_paralel" in wrong["error"]
    assert right["ok"], right
    assert right["checkpoint"]["save"] == value
