"""Exports for Megatron-LM in front of its own parser, and of the model that its flags make."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections import Counter
from functools import cache
from typing import Any

import pytest

from planner import ClusterSpec, ModelSpec, TrainingSpec
from planner.api import estimate
from planner.export import Export, NotExpressible, Subject, export
from planner.rank_parameters import rank_parameters
from strategies.layout import Layout
from tests.contract import HOME, PROBES, WANTED, judged
from tests.contract.megatron_plans import random_plans

pytestmark = pytest.mark.contract
LLAMA = Layout(2, 8, 4, 4, 1, 256, sharding="zero1", sequence_parallel=True, schedule="interleaved")
MIXTRAL = Layout(
    *(8, 2, 4, 1, 1, 32),
    sharding="zero1",
    sequence_parallel=True,
    context_parallel=2,
    expert_parallel=8,
)
SHARES = {"zero1": "optim", "zero2": "optim_grads", "fsdp": "optim_grads_params"}
COMMS = {"ring": "p2p", "all-gather": "all_gather", "ulysses": "a2a", "ulysses+ring": "a2a+p2p"}


def case_of(subject: Subject, made: Export, ranks: tuple[int, ...] = ()) -> dict[str, Any]:
    arch = 10 if (subject.cluster.gpu.compute_capability or 0) >= 10 else 9
    words, env = list(made.program[1:]), dict(made.env)
    return {"words": words, "env": env, "world": subject.plan.num_gpus, "arch": arch, "ranks": list(ranks)}


def subject_of(name: str, gpus: str, layout: Layout, recompute: str = "none", **training: Any) -> Subject:
    model, cluster = ModelSpec.from_catalog(name), ClusterSpec.parse(gpus)
    spec = TrainingSpec(global_batch_size=layout.global_batch_size, **training)
    return Subject(model, cluster, estimate(model, cluster, spec, layout, recompute=recompute))


@cache
def expressible(version: str) -> tuple[tuple[Subject, Export], ...]:
    """As many random plans that can be told as are wanted; the others say why."""
    found, refused = [], Counter[str]()
    for subject in random_plans(7, 3 * WANTED):
        if len(found) == WANTED:
            break
        try:
            found.append((subject, export(subject, "megatron", version)))
        except NotExpressible as error:
            refused[str(error)] += 1
    assert all(len(reason) > 30 for reason in refused)
    assert len(found) == WANTED, refused
    return tuple(found)


def expected(subject: Subject) -> dict[str, Any]:
    """What Megatron-LM must make of a plan."""
    plan, layout, job = subject.plan, subject.layout, subject.job
    precision = str(job.training.precision)
    fsdp = layout.sharding in ("zero2", "fsdp")
    multiple = 128 * layout.tensor_parallel
    policy, count = subject.recompute("")
    full = policy == "full"
    chunks = layout.chunks if layout.chunks > 1 else None
    whole = {
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": chunks,
        "context_parallel_size": layout.context_parallel,
        "expert_model_parallel_size": layout.expert_parallel,
        "data_parallel_size": layout.data_parallel,
        "sequence_parallel": layout.sequence_parallel,
        "use_distributed_optimizer": layout.sharding in SHARES,
        "use_megatron_fsdp": fsdp,
        "num_distributed_optimizer_instances": layout.data_parallel // layout.data_shards,
        "micro_batch_size": layout.micro_batch_size,
        "global_batch_size": layout.global_batch_size,
        "micro_batches": layout.grad_accum,
        "seq_length": job.seq_length,
        "num_layers": subject.model.num_hidden_layers,
        "recompute_method": ("uniform" if count is None else "block") if full else None,
        "recompute_num_layers": (count or 1) if full else None,
        "padded_vocab_size": -(-subject.model.vocab_size // multiple) * multiple,
        "params_dtype": {"fp16": "float16", "fp32": "float32"}.get(precision, "bfloat16"),
        "fp8": "hybrid" if "fp8" in precision else None,
        "fp4": "e2m1" if precision == "nvfp4" else None,
        "fp8_param_gather": job.recipe.cast_alone,
        "reuse_grad_buf_for_mxfp8_param_ag": job.recipe.cast_alone and precision == "mxfp8",
        "exp_avg_dtype": {"bf16": "bfloat16", "fp8": "uint8"}.get(
            str(plan.training.optimizer_dtype), "float32"
        ),
        "optimizer": "adam" if "adam" in plan.training.optimizer else "sgd",
        "optimizer_cpu_offload": "optimizer" in layout.offload,
        "cpu_offloading_num_layers": plan.stages[0].offload.get("activations", 0),
        "num_experts": subject.model.experts.num_experts if subject.model.experts else None,
    }
    if fsdp:
        whole["data_parallel_sharding_strategy"] = SHARES[layout.sharding]
    if layout.context_parallel > 1:
        whole["cp_comm_type"] = [COMMS[layout.context_comm]]
    if subject.model.experts:
        whole["expert_tensor_parallel_size"] = layout.expert_tensor_parallel
    if precision in ("bf16", "fp16") and not fsdp:
        whole["accumulate_allreduce_grads_in_fp32"] = job.recipe.gradient == 4
    modules = {
        "core_attn": policy == "selective",
        "layernorm": job.training.options.get("norm") == "recomputed",
        "mlp": job.training.options.get("mlp") == "recomputed",
    }
    if not full:
        told = [name for name, there in modules.items() if there]
        whole["modules"] = told
    return whole


def check(subject: Subject, told: dict[str, Any]) -> None:
    assert told["ok"], (subject.layout.describe(), told)
    modules = [one for one in told["recompute_modules"] or () if one in ("core_attn", "layernorm", "mlp")]
    read = {**told, "modules": modules if told["recompute_granularity"] == "selective" else []}
    wanted = expected(subject)
    assert {name: read[name] for name in wanted} == wanted
    layout = subject.layout
    for axis, degree in (
        ("tp", layout.tensor_parallel),
        ("cp", layout.context_parallel),
        ("dp", layout.data_parallel),
        ("pp", layout.pipeline_parallel),
    ):
        ranks = [step * layout.stride(axis) for step in range(degree)]
        assert told["groups"][axis] == ranks, (axis, layout.describe())


def test_the_parser_reads_back_what_was_planned() -> None:
    made = expressible("0.19")
    told = judged("frameworks", "megatron.py", [case_of(*one) for one in made], timeout=600)
    for (subject, _), one in zip(made, told, strict=True):
        assert one["version"].startswith("0.19") if one["ok"] else True
        check(subject, one)


def test_the_oldest_version_reads_the_same() -> None:
    folder = HOME / "megatron-0.17"
    if not folder.exists():
        pytest.skip("no megatron-core 0.17: scripts/contract megatron-0.17 makes it")
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    made = expressible("0.17")[:60]
    python, judge = HOME / "frameworks/bin/python", PROBES / "megatron.py"
    done = subprocess.run(
        [str(python), str(judge), site],
        input=json.dumps([case_of(*one) for one in made]),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        env=dict(os.environ),
    )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for (subject, _), one in zip(made, told, strict=True):
        check(subject, one)
        assert one["vocab_tokens"] == subject.model.vocab_size


def whole(data: int, tensor: int, pipeline: int, chunks: int = 1, **more: Any) -> Layout:
    """A layout with as many micro-batches as stages."""
    schedule = "interleaved" if chunks > 1 else "1f1b"
    parallel = tensor > 1
    return Layout(data, tensor, pipeline, chunks, 1, pipeline, 0, parallel, schedule=schedule, **more)


PLANS = [
    ("llama-65b", "64xH100", LLAMA, {}),
    ("llama-3.2-1b", "8xH100", whole(2, 1, 4, 2, sharding="zero1"), {}),
    ("qwen2.5-7b", "16xH100", whole(1, 4, 4), {}),
    ("qwen3-8b", "8xH100", whole(1, 8, 1), {}),
    ("llama-3.1-405b", "128xH100", whole(1, 8, 16, 2), {}),
    ("gpt2-medium", "8xH100", whole(2, 2, 2), {"seq_length": 1024}),
    ("nemotron-4-340b", "64xH100", whole(1, 8, 8), {}),
    ("mixtral-8x7b", "128xH100", MIXTRAL, {}),
    ("qwen3-30b-a3b", "16xH100", whole(4, 2, 2, expert_parallel=4), {}),
    ("qwen2-57b-a14b", "8xH100", whole(2, 4, 1, expert_tensor_parallel=4), {}),
    ("deepseek-v3", "64xH100", whole(2, 4, 8, expert_parallel=8), {}),
    ("gpt-oss-20b", "8xH100", whole(4, 2, 1, expert_parallel=8), {}),
    ("glm-4.5-air", "32xH100", whole(4, 1, 8, expert_parallel=4), {}),
]


def test_the_model_has_the_planned_parameters_on_every_stage() -> None:
    """Of Megatron-LM's own GPTModel, built without storage: exactly, and each stage has its layers."""
    cases, wanted = [], []
    for name, gpus, layout, training in PLANS:
        subject = subject_of(name, gpus, layout, **{"seq_length": 2048, **training})
        stages = sorted({0, layout.pipeline_parallel // 2, layout.pipeline_parallel - 1})
        ranks = tuple(stage * layout.stride("pp") for stage in stages)
        cases.append(case_of(subject, export(subject, "megatron"), ranks))
        wanted.append(
            {
                str(r): [rank_parameters(subject, s), subject.layers[s]]
                for r, s in zip(ranks, stages, strict=True)
            }
        )
    told = judged("frameworks", "megatron.py", cases, timeout=600)
    for (name, *_), one, numbers in zip(PLANS, told, wanted, strict=True):
        assert one["ok"], (name, one)
        found = {
            rank: [sum(part) for part in zip(*chunks, strict=True)] for rank, chunks in one["counts"].items()
        }
        assert found == numbers, name
    assert (wanted[0]["32"][0], wanted[0]["48"][0]) == (2024079360, 2057641984)
    assert wanted[7]["0"][0] == 1642921984


@pytest.mark.parametrize(
    "value", ["$(touch /tmp/x)", "`id`", "a'b\"c", "weights; rm -rf /", "p\u00e4th", "#not a comment"]
)
def test_what_somebody_sets_comes_out_as_it_was(value: str) -> None:
    subject = subject_of("llama-3.2-1b", "1xH100", Layout(), seq_length=512)
    made = export(subject, "megatron", settings={"save": value, "tokenizer-model": value})
    (told,) = judged("frameworks", "megatron.py", [case_of(subject, made)])
    assert told["ok"], told
    assert (told["save"], told["tokenizer_model"]) == (value, value)


def test_the_parser_refuses_broken_flags_or_we_do() -> None:
    subject = subject_of("llama-65b", "64xH100", LLAMA, seq_length=2048)
    good = case_of(subject, export(subject, "megatron"))

    def changed(flag: str, value: str) -> dict[str, Any]:
        words = list(good["words"])
        words[words.index(flag) + 1] = value
        return {**good, "words": words}

    broken = [
        changed("--pipeline-model-parallel-size", "3"),
        changed("--global-batch-size", "511"),
        {**good, "words": [*good["words"], "--sequence-paralel"]},
        {**good, "env": {}},
        {**good, "world": 48},
    ]
    for told in judged("frameworks", "megatron.py", broken):
        assert not told["ok"]
