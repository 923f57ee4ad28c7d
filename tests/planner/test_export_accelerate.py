"""Plans in accelerate's words and back, with TrainingArguments and peft's keys beside them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from planner.errors import InputError
from planner.export import NotExpressible, export
from planner.export.accelerate import CONFIG
from planner.export.base import quoted
from planner.export.huggingface import ARGUMENTS, PEFT
from planner.export.read_accelerate import read, recognises
from tests.planner.exported import again, planned, same

FSDP: dict[str, Any] = {"sharding": "fsdp"}
SPLIT = {"root": "split", "reduce_dtype": "bf16"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("hf", {}),
    ("hf", {"gpus": "1xh100", "recompute": "full", "options": {"attention": "flash", "loss": "fused"}}),
    ("hf", {"optimizer": "trainer-adamw8bit", "precision": "fp16"}),
    ("hf", {"optimizer": "transformers-adafactor", "precision": "tf32", "options": {"compile": "on"}}),
    ("hf", {"adapters": {"rank": 8, "targets": ("q", "v"), "dropout": 0.1}}),
    ("hf", {"adapters": {"rank": 16, "quantize": "nf4", "double": True}, "recompute": "full"}),
    ("fsdp", {**FSDP, "options": SPLIT, "recompute": "full"}),
    ("fsdp", {**FSDP, "options": {**SPLIT, "optimizer_step": "foreach"}, "reshard_after_forward": False}),
    ("fsdp", {**FSDP, "options": SPLIT, "data_shards": 4}),
    ("fsdp", {**FSDP, "options": SPLIT, "context_parallel": 2, "context_comm": "all-gather"}),
    ("fsdp", {**FSDP, "options": SPLIT, "context_parallel": 4, "context_comm": "ring", "data_shards": 2}),
    ("fsdp", {**FSDP, "options": SPLIT, "offload": "optimizer,parameters"}),
    ("fsdp", {**FSDP, "options": {"root": "split"}, "precision": "fp32"}),
    ("fsdp", {**FSDP, "options": {"version": "1", "reduce_dtype": "bf16"}, "data_shards": 8}),
    ("fsdp", {**FSDP, "options": {"version": "1", "reduce_dtype": "bf16"}, "reshard_after_forward": False}),
    ("deepspeed", {"sharding": "zero3", "recompute": "full"}),
    ("deepspeed", {"sharding": "zero2", "offload": "optimizer", "options": {"attention": "flash"}}),
    ("deepspeed", {"sharding": "zero3", "context_parallel": 2, "context_comm": "ulysses"}),
]


def attended(given: dict[str, Any]) -> dict[str, Any]:
    """What no file says: how the model is loaded."""
    attention = given.get("options", {}).get("attention")
    return {"attention": attention} if attention else {}


@pytest.mark.parametrize(("framework", "given"), CASES, ids=lambda one: str(one)[:60])
def test_what_is_exported_reads_back_as_the_same_plan(framework: str, given: dict[str, Any]) -> None:
    subject = planned(framework, **given)
    made = export(subject, "accelerate")
    files = {**made.files, "launch.sh": quoted(made.on_node(subject, "0", "host"))}
    assert recognises(files)
    found = read(files, {})
    assert not [one for one in found.findings if one.severity == "error"], found.findings
    assert (found.world_size, found.per_node) == (subject.plan.num_gpus, subject.per_node)
    plan = again(subject, found, **attended(given))
    assert same(plan, subject)
    assert plan.peak_bytes == subject.plan.peak_bytes
    assert plan.step_time_s == subject.plan.step_time_s


def test_every_file_says_where_it_is_from() -> None:
    made = export(planned("deepspeed", sharding="zero3", adapters={"rank": 4}), "accelerate")
    assert set(made.files) == {CONFIG, "ds_config.json", ARGUMENTS, PEFT}
    assert all("planner " in text[:400] for text in made.files.values())
    assert made.launcher == "accelerate"
    assert "mixed_precision" not in yaml.safe_load(made.files[CONFIG])  # it is in DeepSpeed's file
    assert json.loads(made.files[PEFT])["lora"]["target_modules"] == "all-linear"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("fsdp", {**FSDP}, "root"),
    ("fsdp", {**FSDP, "options": {"root": "split"}}, "reduce_dtype"),
    ("fsdp", {**FSDP, "options": {**SPLIT, "mixed_precision": "autocast"}}, "autocast"),
    ("fsdp", {**FSDP, "options": SPLIT, "data_shards": 1}, "data_shards"),
    ("fsdp", {**FSDP, "options": {"version": "1", "reduce_dtype": "bf16"}, "data_shards": 4}, "HYBRID"),
    ("fsdp", {**FSDP, "options": {**SPLIT, "attention": "flash1"}}, "flash1"),
    ("fsdp", {**FSDP, "options": SPLIT, "recompute": "full:2"}, "all layers"),
    ("hf", {"options": {"gradient_view": "on"}}, "gradient_view"),
    ("hf", {"optimizer": "muon"}, "muon"),
    ("hf", {"optimizer": "adamw8bit"}, "trainer-adamw8bit"),
    ("hf", {"optimizer": "sgd"}, "optimizer_step"),
    ("hf", {"precision": "bf16-kahan"}, "bf16-kahan"),
    ("deepspeed", {"sharding": "zero1", "pipeline_parallel": 2}, "without a pipeline"),
]


@pytest.mark.parametrize(("framework", "given", "word"), REFUSED, ids=lambda one: str(one)[:60])
def test_what_cannot_be_told_is_refused_with_what_can(
    framework: str, given: dict[str, Any], word: str
) -> None:
    with pytest.raises(NotExpressible, match=word) as caught:
        export(planned(framework, **given), "accelerate")
    assert caught.value.instead


def test_names_come_out_inert() -> None:
    evil = "a: [b]\n# $(touch /tmp/x) `id` '\"\u202e!!python/object"
    made = export(planned("fsdp", sharding="fsdp", options=SPLIT, name=evil), "accelerate")
    assert yaml.safe_load(made.files[CONFIG])["num_processes"] == 16
    assert "\n" not in json.loads(made.files[ARGUMENTS])["run_name"]
    with pytest.raises(InputError, match="script"):
        export(planned("hf"), "accelerate", settings={"script": "-m evil"})


def findings_of(text: str, launch: str = "") -> dict[str, str]:
    found = read({"a.yaml": text} | ({"run.sh": launch} if launch else {}), {})
    return {one.setting: one.severity for one in found.findings}


def test_what_accelerate_takes_without_a_word_is_found() -> None:
    text = """
distributed_type: FSDP
mixed_precision: bf16
num_processes: 16
num_machines: 3
fsdp_config: {fsdp_ofload_params: true, fsdp_version: 2, fsdp_sharding_strategy: FULL_SHARD,
  fsdp_auto_wrap_policy: SIZE_BASED_WRAP, fsdp_forward_prefetch: true}
parallelism_config: {parallelism_config_tp_size: 3, parallelism_config_dp_shard_size: 4}
nonsense: 1
"""
    found = findings_of(text)
    for name in ("fsdp_config.fsdp_ofload_params", "nonsense", "parallelism_config", "num_processes"):
        assert found[name] == "error", (name, found)
    assert found["fsdp_config.fsdp_forward_prefetch"] == "error"
    assert found["fsdp_config.fsdp_sharding_strategy"] == "warning"


def test_the_command_line_wins_over_the_file() -> None:
    text = "distributed_type: FSDP\nnum_processes: 8\nnum_machines: 1\nmixed_precision: no\n"
    launch = "accelerate launch --config_file a.yaml --num_processes 16 --mixed_precision=bf16 train.py"
    found = read({"a.yaml": text, "run.sh": launch}, {})
    assert found.world_size == 16
    assert found.options["precision"] == "bf16"


def test_deepspeed_in_accelerates_own_keys() -> None:
    text = """
distributed_type: DEEPSPEED
mixed_precision: bf16
num_processes: 8
deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu, offload_param_device: cpu,
  gradient_accumulation_steps: 4}
"""
    found = read({"a.yaml": text}, {})
    assert found.framework == "deepspeed"
    assert (found.options["sharding"], found.options["offload"]) == ("zero3", "optimizer,parameters")
    assert found.options["precision"] == "bf16"
    beside = text.replace("zero_stage: 3", "zero_stage: 3, deepspeed_config_file: ds.json")
    assert findings_of(beside)["deepspeed_config.zero_stage"] == "error"


def test_megatron_in_accelerates_own_keys() -> None:
    text = """
distributed_type: MEGATRON_LM
mixed_precision: bf16
num_processes: 16
megatron_lm_config: {megatron_lm_tp_degree: 2, megatron_lm_pp_degree: 2,
  megatron_lm_recompute_activations: true,
  megatron_lm_sequence_parallelism: true, megatron_lm_use_distributed_optimizer: true}
"""
    options = read({"a.yaml": text}, {}).options
    assert (options["tensor_parallel"], options["pipeline_parallel"]) == (2, 2)
    assert (options["sharding"], options["recompute"]) == ("zero1", "selective")


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x",
        "distributed_type: FSDP\nnum_processes: many",
        "distributed_type: FSDP\nfsdp_config: 3",
        "distributed_type: FSDP\ndistributed_type: NO",
        "distributed_type: !!python/object:os.system x",
        "[" * 10000,
        "hello: world",
    ],
)
def test_what_is_broken_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError):
        read({"a.yaml": text}, {})
