"""Plans as Megatron-LM's flags and Megatron-Bridge's overrides; tests/contract has their own parsers."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner import ClusterSpec, ModelSpec, TrainingSpec
from planner.api import estimate
from planner.errors import InputError
from planner.export import Export, NotExpressible, Subject, export
from planner.export.megatron_flags import BY_NAME, FLAGS
from planner.export.megatron_layout import chunk_layers
from planner.rank_parameters import rank_parameters
from strategies.layout import Layout

WIDE = Layout(2, 8, 4, 4, 1, 8, sharding="zero1", sequence_parallel=True, schedule="interleaved")


def subject_of(
    name: str = "llama-3.2-1b",
    gpus: str = "8xH100",
    layout: Layout = Layout(8, sharding="zero1"),
    recompute: str = "none",
    layers: list[int] | None = None,
    model: ModelSpec | None = None,
    **training: Any,
) -> Subject:
    model, cluster = model or ModelSpec.from_catalog(name), ClusterSpec.parse(gpus)
    spec = TrainingSpec(**{"global_batch_size": layout.global_batch_size, "seq_length": 1024, **training})
    plan = estimate(model, cluster, spec, layout, recompute=recompute, layers=layers)
    return Subject(model, cluster, plan)


def words_of(made: Export) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in made.program[1:]:
        if word.startswith("--"):
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def flags(
    version: str | None = None, settings: dict[str, str] | None = None, **given: Any
) -> dict[str, list[str]]:
    return words_of(export(subject_of(**given), "megatron", version, settings))


def test_a_plan_is_flags() -> None:
    told = flags(name="llama-65b", gpus="64xH100", layout=WIDE, seq_length=2048)
    for name, *value in (
        ("--num-layers", "80"),
        ("--tensor-model-parallel-size", "8"),
        ("--pipeline-model-parallel-size", "4"),
        ("--num-virtual-stages-per-pipeline-rank", "4"),
        ("--sequence-parallel",),
        ("--use-distributed-optimizer",),
        ("--padded-vocab-size", "32768"),
        ("--global-batch-size", "16"),
        ("--bf16",),
        ("--mock-data",),
    ):
        assert told[name] == value
    assert "--recompute-granularity" not in told
    assert "--group-query-attention" not in told


def test_the_file_and_the_command_say_the_same() -> None:
    made = export(subject_of(), "megatron")
    assert tuple(shlex.split(made.files["plan.args"], comments=True)) == made.program[1:]
    assert made.program[0] == "pretrain_gpt.py"
    assert made.files["plan.args"].startswith("# planner ")


@pytest.mark.parametrize(
    ("layout", "layers", "expected"),
    [
        (Layout(1, 1, 4, 1, 1, 4), [4, 4, 4, 4], {}),
        (Layout(1, 1, 4, 1, 1, 4), [3, 5, 5, 3], {"first": "3", "last": "3"}),
        (Layout(1, 1, 4, 1, 1, 4), [3, 5, 4, 4], {"layout": "Et*3|t*5|t*4|t*4L"}),
        (
            Layout(1, 1, 4, 2, 1, 4, schedule="interleaved"),
            [2, 6, 4, 4],
            {"layout": "Et|t*3|t*2|t*2|t|t*3|t*2|t*2L"},
        ),
        (Layout(1, 1, 4, 2, 1, 4, schedule="interleaved"), [2, 6, 6, 2], {"first": "2", "last": "2"}),
    ],
)
def test_layers_on_the_stages(layout: Layout, layers: list[int], expected: dict[str, str]) -> None:
    told = flags(gpus="4xH100", layout=layout, layers=layers)
    names = {
        "first": "--decoder-first-pipeline-num-layers",
        "last": "--decoder-last-pipeline-num-layers",
        "layout": "--pipeline-model-parallel-layout",
    }
    assert {short: told[name][0] for short, name in names.items() if name in told} == expected
    if "layout" not in expected:
        assert told.get("--num-virtual-stages-per-pipeline-rank", ["1"]) == [str(layout.chunks)]


def test_short_chunks_at_the_ends_are_in_the_layout() -> None:
    layout = Layout(1, 8, 16, 8, 1, 16, sequence_parallel=True, schedule="interleaved")
    subject = subject_of("llama-3.1-405b", "128xH100", layout)
    chunks = chunk_layers(subject)
    assert chunks[0] == [0, *[1] * 7]
    assert chunks[-1] == [*[1] * 7, 0]
    (text,) = words_of(export(subject, "megatron"))["--pipeline-model-parallel-layout"]
    assert text.split("|")[:2] == ["E", "t"]
    assert text.endswith("|t|L")
    assert text.count("t") == 126


@pytest.mark.parametrize(
    ("recompute", "options", "expected"),
    [
        ("none", {}, None),
        ("full", {}, ("full", "uniform", "1", None)),
        ("full:2", {}, ("full", "block", "2", None)),
        ("selective", {}, ("selective", None, None, ["core_attn"])),
        ("none", {"norm": "recomputed"}, ("selective", None, None, ["layernorm"])),
        ("selective", {"mlp": "recomputed"}, ("selective", None, None, ["core_attn", "mlp"])),
    ],
)
def test_recomputation(recompute: str, options: dict[str, str], expected: tuple[Any, ...] | None) -> None:
    told = flags(recompute=recompute, options=options)
    if expected is None:
        assert not [name for name in told if "recompute" in name]
        return
    single = [told.get(f"--recompute-{name}", [None])[0] for name in ("granularity", "method", "num-layers")]
    assert (*single, told.get("--recompute-modules")) == expected


def test_context_parallelism_of_two_levels() -> None:
    layout = Layout(2, 1, 1, context_parallel=4, context_comm="ulysses+ring", ulysses_degree=2)
    told = flags(layout=layout)
    assert told["--cp-comm-type"] == ["a2a+p2p"]
    assert told["--hierarchical-context-parallel-sizes"] == ["2", "2"]


def test_megatron_fsdp_with_replicas() -> None:
    made = export(subject_of(layout=Layout(8, sharding="fsdp", data_shards=4)), "megatron")
    told = words_of(made)
    assert told["--data-parallel-sharding-strategy"] == ["optim_grads_params"]
    assert told["--num-distributed-optimizer-instances"] == ["2"]
    assert told["--ckpt-format"] == ["fsdp_dtensor"]
    assert told["--megatron-fsdp-main-grads-dtype"] == ["fp32"]
    assert made.env == {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}


@pytest.mark.parametrize(
    ("gpus", "tensor", "env"),
    [
        ("8xH100", 1, {}),
        ("8xH100", 2, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        ("8xB200", 2, {}),
    ],
)
def test_one_queue_only_where_it_is_needed(gpus: str, tensor: int, env: dict[str, str]) -> None:
    assert export(subject_of(gpus=gpus, layout=Layout(8 // tensor, tensor)), "megatron").env == env


def test_precision_gradients_and_moments() -> None:
    told = flags(precision="fp16")
    assert told["--fp16"] == told["--accumulate-allreduce-grads-in-fp32"] == []
    told = flags(gradient_dtype="bf16", optimizer_dtype="fp8")
    assert told["--grad-reduce-in-bf16"] == told["--use-precision-aware-optimizer"] == []
    assert told["--exp-avg-dtype"] == told["--exp-avg-sq-dtype"] == ["fp8"]
    told = flags(gpus="8xB200", precision="mxfp8")
    assert (told["--bf16"], told["--fp8-format"], told["--fp8-recipe"]) == ([], ["hybrid"], ["mxfp8"])
    assert flags(gpus="8xB200", precision="nvfp4")["--fp4-recipe"] == ["nvfp4"]


def test_a_mixture_has_its_experts_cut_as_planned() -> None:
    layout = Layout(4, 2, 1, sequence_parallel=True, expert_parallel=8, sharding="zero1")
    told = flags(name="qwen2-57b-a14b", layout=layout, expert_capacity_factor=1.25)
    assert told["--expert-tensor-parallel-size"] == ["1"]  # left out it would be 2
    assert told["--moe-shared-expert-intermediate-size"] == ["20480"]
    assert told["--moe-expert-capacity-factor"] == ["1.25"]
    assert told["--moe-token-dispatcher-type"] == ["alltoall"]
    assert {"--moe-grouped-gemm", "--moe-permute-fusion", "--add-qkv-bias", "--disable-bias-linear"} <= set(
        told
    )


def test_latent_attention_and_modules_for_further_tokens() -> None:
    layout = Layout(8, 1, 1, expert_parallel=8, sharding="zero1")
    told = flags(name="deepseek-v3", layout=layout, options={"mtp": "on"})
    assert told["--kv-channels"] == ["128"]
    assert told["--mtp-num-layers"] == ["1"]
    assert told["--moe-layer-freq"] == ["[" + ",".join(["0"] * 3 + ["1"] * 58) + "]"]
    assert {"--multi-latent-attention", "--qk-layernorm"} <= set(told)
    assert "--group-query-attention" not in told


def test_a_hybrid_has_a_pattern_and_a_script_of_its_own() -> None:
    subject = subject_of("nemotron-h-8b", layout=Layout(2, 2, 2, 1, 1, 2, sequence_parallel=True))
    for version, script in (("0.19", "pretrain_hybrid.py"), ("0.17", "pretrain_mamba.py")):
        made = export(subject, "megatron", version)
        (pattern,) = words_of(made)["--hybrid-layer-pattern"]
        assert made.program[0] == script
        assert len(pattern.replace("|", "")) == 52
        assert [len(part) for part in pattern.split("|")] == list(subject.layers)


def test_offloading() -> None:
    told = flags(layout=Layout(8, sharding="zero1", offload="optimizer"))
    assert {"--optimizer-cpu-offload", "--use-precision-aware-optimizer"} <= set(told)
    assert "--optimizer-offload-fraction" not in told


@pytest.mark.parametrize(
    ("given", "reason", "instead"),
    [
        ({"name": "pythia-1.4b"}, "parallel_residual", {}),
        ({"name": "gemma-2b"}, "hidden_act", {}),
        ({"name": "bloom-7b1"}, "embedding_norm", {}),
        ({"name": "opt-1.3b"}, "position_offset", {}),
        ({"name": "deepseek-v2-lite"}, "q_lora_rank=None", {}),
        ({"precision": "tf32"}, "tf32", {"precision": "bf16"}),
        ({"precision": "fp32"}, "attention=flash", {"option": {"attention": "eager"}}),
        ({"master_weights": False}, "master_weights", {"master_weights": ""}),
        (
            {"layout": Layout(8, sharding="zero1", offload="optimizer"), "optimizer": "momentum"},
            "offload of the states",
            {"optimizer": "adamw"},
        ),
        ({"options": {"swiglu": "recomputed"}}, "swiglu", {"option": {"mlp": "recomputed"}}),
        ({"options": {"loss": "fused"}}, "loss=fused", {"option": {"loss": "parallel"}}),
        (
            {"name": "mixtral-8x7b", "options": {"attention": "eager", "moe_act": "recomputed"}},
            "--moe-grouped-gemm",
            {"option": {"attention": "flash"}},
        ),
        ({"options": {"norm": "recomputed"}, "recompute": "full"}, "norm=recomputed", {"recompute": "none"}),
        (
            {"layout": Layout(8, sharding="fsdp", reshard_after_forward=False)},
            "ZeRO-2",
            {"sharding": "zero2"},
        ),
        (
            {"gpus": "4xH100", "layout": Layout(1, 1, 4, 1, 1, 8, schedule="zb-h1")},
            "schedule=zb-h1",
            {"schedule": "1f1b"},
        ),
        (
            {"layout": Layout(2, 1, 2, 1, 1, 2, rank_order="tp-pp-dp", context_parallel=2)},
            "where these products are equal",
            {"rank_order": "tp-dp-pp"},
        ),
        (
            {"layout": Layout(2, 2, 2, 1, 1, 2, rank_order="pp-tp-dp")},
            "rank_order",
            {"rank_order": "tp-dp-pp"},
        ),
        (
            {"layout": Layout(4, 2, sequence_parallel=True), "options": {"attention": "eager"}},
            "torch_norm",
            {"option": {"attention": "flash"}},
        ),
    ],
)
def test_what_cannot_be_told_is_refused(given: dict[str, Any], reason: str, instead: dict[str, Any]) -> None:
    with pytest.raises(NotExpressible, match=reason) as caught:
        export(subject_of(**given), "megatron")
    assert caught.value.instead == instead


def test_older_versions_take_what_newer_ones_refuse() -> None:
    assert flags("0.18", options={"loss": "fused"})["--cross-entropy-fusion-impl"] == ["te"]
    assert "--multi-latent-attention" in flags("0.17", name="deepseek-v2-lite")
    assert flags("0.17")["--vocab-size"] == ["128255"]


@pytest.mark.parametrize("value", ["a'b", '$(id)"', "`x`", "a b#c", "\\n", "\u00e4\u2019"])
def test_settings_are_inert(value: str, tmp_path: Path) -> None:
    made = export(subject_of(), "megatron", settings={"save": value, "script": value})
    assert value in shlex.split(made.files["plan.args"], comments=True)
    script = tmp_path / "launch.sh"
    script.write_text(made.files["launch.sh"])
    subprocess.run(["bash", "-n", str(script)], check=True)
    (tmp_path / "plan.args").write_text(made.files["plan.args"])
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    fake.chmod(0o755)
    path = f"{tmp_path}:/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(["bash", str(script), "--x"], env={"PATH": path}, capture_output=True, check=True)
    words = done.stdout.decode().split("\0")[:-1]
    assert words[-1] == "--x"
    assert tuple(words[words.index(value) : -1]) == made.program


def test_a_model_s_name_cannot_leave_the_comment() -> None:
    model = ModelSpec.from_catalog("llama-3.2-1b").model_copy(
        update={"name": "x\nrm -rf ~\n--bf16 coding:utf-7"}
    )
    for target in ("megatron", "megatron-bridge"):
        made = export(subject_of(model=model), target)
        for text in made.files.values():
            assert all(line.startswith("#") for line in text.splitlines() if "rm -rf" in line)
        if target == "megatron-bridge":  # a coding line counts on the first two
            assert not any("coding" in line for line in made.files["train.py"].splitlines()[:2])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"save": "--load"}, "flag"),
        ({"train-iters": "0"}, "whole number"),
        ({"lr": "fast"}, "number above 0"),
        ({"data-path": "'a"}, "quote"),
        ({"save-interval": "5"}, "nothing is saved"),
        ({"tokeniser": "x"}, "tokeniser"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        export(subject_of(), "megatron", settings=settings)


def test_steps_follow_from_tokens() -> None:
    assert flags(tokens=8e9)["--train-iters"] == [str(-(-int(8e9) // (8 * 1024)))]
    assert flags(settings={"data-path": "0.3 a 0.7 b"})["--data-path"] == ["0.3", "a", "0.7", "b"]


def test_the_table_has_every_flag_once() -> None:
    assert len(BY_NAME) == len(FLAGS)
    for flag in FLAGS:
        assert flag.name.startswith("--")
        assert flag.of


def test_bridge_overrides() -> None:
    subject = subject_of("llama-65b", "64xH100", WIDE, recompute="full:1", seq_length=2048)
    made = export(subject, "megatron-bridge")
    told = yaml.safe_load(made.files["overrides.yaml"])
    model = told["model"]
    assert (model["tensor_model_parallel_size"], model["virtual_pipeline_model_parallel_size"]) == (8, 4)
    assert (model["recompute_granularity"], model["recompute_num_layers"]) == ("full", 1)
    assert model["seq_length"] == told["dataset"]["seq_length"] == 2048
    assert told["train"]["global_batch_size"] == 16
    assert told["ddp"]["use_distributed_optimizer"] is told["optimizer"]["use_distributed_optimizer"] is True
    assert model["share_embeddings_and_output_weights"] is model["add_bias_linear"] is False
    compile(made.files["train.py"], "train.py", "exec")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"name": "deepseek-v3", "layout": Layout(8, expert_parallel=8)}, "latent attention"),
        ({"name": "gpt2-small", "seq_length": 512}, "learned positions"),
        ({"options": {"attention": "eager"}}, "attention=eager"),
    ],
)
def test_bridge_refuses(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotExpressible, match=reason):
        export(subject_of(**given), "megatron-bridge")


def test_bridge_settings_are_not_interpolated() -> None:
    made = export(subject_of(), "megatron-bridge", settings={"save": "x${oc.env:HOME}"})
    assert yaml.safe_load(made.files["overrides.yaml"])["checkpoint"]["save"] == r"x\${oc.env:HOME}"


def test_tied_embeddings_are_on_both_ends_of_a_pipeline() -> None:
    subject = subject_of(gpus="4xH100", layout=Layout(1, 1, 4, 1, 1, 4))
    ends = [rank_parameters(subject, stage) for stage in range(4)]
    assert ends[0] - ends[1] == 128256 * 2048
    assert ends[3] - ends[2] == 128256 * 2048 + 2048
