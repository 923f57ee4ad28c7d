"""Plans in DeepSpeed's words and back: bits that must be there, refusals, the round trip, injection."""

from __future__ import annotations

import json
from typing import Any

import pytest

from planner.errors import InputError
from planner.export import NotExpressible, export
from planner.export.base import quoted
from planner.export.deepspeed import CONFIG, balanced
from planner.export.read_deepspeed import read, recognises
from tests.planner.exported import again, planned, same

ULYSSES = {"sharding": "zero3", "context_parallel": 2, "context_comm": "ulysses"}
CASES: list[dict[str, Any]] = [
    {"sharding": "zero3", "recompute": "full", "options": {"reduce_bucket_size": "2e8"}},
    {"sharding": "zero3", "offload": "optimizer,parameters", "recompute": "full"},
    {"sharding": "zero3", "offload": "optimizer:nvme,parameters:nvme"},
    {"sharding": "zero2", "offload": "optimizer", "options": {"overlap": "off"}},
    {"sharding": "zero1", "gradient_dtype": "fp32"},
    {"sharding": "zero2", "precision": "fp16", "optimizer": "adam", "options": {"optimizer_step": "foreach"}},
    {"sharding": "zero1", "precision": "fp32", "optimizer": "momentum"},
    {"sharding": "zero1", "precision": "fp32", "optimizer": "sgd"},
    {"sharding": "zero3", "optimizer": "lion"},
    ULYSSES,
    {"sharding": "zero1", "tensor_parallel": 2, "pipeline_parallel": 2, "recompute": "full", "grad_accum": 8},
    {"sharding": "zero1", "tensor_parallel": 4, "sequence_parallel": True, "recompute": "selective"},
    {"sharding": "ddp", "pipeline_parallel": 2, "precision": "fp16", "recompute": "full:2", "grad_accum": 8},
    {
        "sharding": "zero1",
        "tensor_parallel": 2,
        "recompute": "full+activations",
        "options": {"attention": "eager"},
    },
]


@pytest.mark.parametrize("given", CASES, ids=lambda given: "-".join(map(str, given.values())))
def test_what_is_exported_reads_back_as_the_same_plan(given: dict[str, Any]) -> None:
    subject = planned("deepspeed", **given)
    made = export(subject, "deepspeed", settings={"nvme_path": "/nvme"})
    files = {**made.files, "launch.sh": quoted(made.on_node(subject, "0", "host")) + "\n"}
    assert recognises(files)
    found = read(files, {})
    assert not [one for one in found.findings if one.severity == "error"], found.findings
    assert (found.world_size, found.per_node) == (subject.plan.num_gpus, subject.per_node)
    plan = again(subject, found)
    assert same(plan, subject)
    assert plan.peak_bytes == subject.plan.peak_bytes
    assert plan.step_time_s == subject.plan.step_time_s


def test_the_trainer_fills_in_what_is_auto() -> None:
    subject = planned("deepspeed", sharding="zero3", recompute="full", options={"attention": "flash"})
    made = export(subject, "deepspeed", settings={"batch": "auto"})
    config = json.loads(made.files[CONFIG])
    assert {config[name] for name in config if name.startswith(("train_", "gradient_acc"))} == {"auto"}
    found = read({**made.files, "launch.sh": quoted(made.on_node(subject, "0", "host"))}, {})
    assert not [one for one in found.findings if one.severity == "error"], found.findings
    assert again(subject, found).peak_bytes == subject.plan.peak_bytes


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"sharding": "zero2", "precision": "bf16", "optimizer_dtype": "bf16"}, "0.19", "bf16_optimizer_states"),
    ({"sharding": "zero2", "master_weights": False}, "0.19", "master"),
    (
        ULYSSES,
        "0.16",
        "sequence_parallel_size",
    ),
    ({"sharding": "zero3", "recompute": "full:2"}, "0.19", "all layers"),
    ({"sharding": "zero2", "offload": "optimizer", "options": {"offload_copy": "tiled"}}, "0.19", "tiled"),
    ({"sharding": "zero1", "tensor_parallel": 2, "options": {"loss": "fused"}}, "0.19", "loss=fused"),
    (
        {
            "sharding": "ddp",
            "pipeline_parallel": 8,
            "precision": "fp16",
            "grad_accum": 8,
            "layers": (3, 1, *[2] * 6),
        },
        "0.19",
        "partition_method",
    ),
]


@pytest.mark.parametrize(("given", "version", "word"), REFUSED, ids=lambda one: str(one)[:40])
def test_what_deepspeed_cannot_be_told_is_refused(given: dict[str, Any], version: str, word: str) -> None:
    subject = planned("deepspeed", **given)
    with pytest.raises(NotExpressible, match=word) as caught:
        export(subject, "deepspeed", version)
    assert caught.value.instead or ": " in str(caught.value)


def test_an_uneven_split_is_balanced_as_pipelinemodule_does() -> None:
    assert balanced(10, 4) == (3, 3, 2, 2)
    subject = planned(
        "deepspeed", sharding="zero1", pipeline_parallel=8, grad_accum=8, layers=(2,) * 8, tensor_parallel=1
    )
    assert json.loads(export(subject, "deepspeed").files[CONFIG])["pipeline"] == {"stages": 8}


def test_names_and_settings_come_out_inert() -> None:
    evil = "a'\"; $(touch /tmp/x) `id`\n\u202e\u00e9--"
    subject = planned("deepspeed", sharding="zero3", name=evil)
    made = export(subject, "deepspeed", settings={"nvme_path": "/n\"'$(x)", "script": "a b;$(c).py"})
    header = json.loads(made.files[CONFIG])["_planner"]
    assert "\n" not in "".join(header)
    assert made.files[CONFIG].isascii()
    assert "'a b;$(c).py'" in quoted(made.program)
    with pytest.raises(InputError, match="script"):
        export(subject, "deepspeed", settings={"script": "--evil"})


def findings_of(config: dict[str, Any], launch: str = "") -> dict[str, str]:
    files = {"ds.json": json.dumps(config)} | ({"run.sh": launch} if launch else {})
    return {one.setting: one.severity for one in read(files, {}).findings}


GOOD = {"train_batch_size": 64, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def test_findings_name_what_is_wrong_and_what_is_wasted() -> None:
    zero: dict[str, Any] = {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 5e9,
        "reduce_scatter": False,
    }
    found = findings_of(
        {
            **GOOD,
            "gradient_cliping": 1,
            "elasticity": {},
            "fp16": {"enabled": True},
            "zero_optimization": {**zero, "offload_param": {"device": "cpu"}, "stage3_gather": 1},
            "pipeline": {"stages": 4, "stage": 2},
        }
    )
    for setting in ("gradient_cliping", "elasticity", "fp16.enabled", "pipeline.stages", "pipeline.stage"):
        assert found[setting] == "error", setting
    assert found["zero_optimization.offload_param"] == "error"
    assert found["zero_optimization.stage3_gather"] == "error"
    for name in ("overlap_comm", "reduce_bucket_size", "reduce_scatter"):
        assert found[f"zero_optimization.{name}"] == "waste"


def test_batches_that_do_not_multiply_are_errors_where_the_world_is_known() -> None:
    config = {**GOOD, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert "train_batch_size" not in findings_of(config, "deepspeed --num_gpus 8 --num_nodes 2 train.py")
    assert findings_of(config, "deepspeed --num_gpus 8 --num_nodes 4 train.py")["train_batch_size"] == "error"
    assert (
        read({"a.json": json.dumps(GOOD), "run.sh": "deepspeed --num_gpus 8 train.py"}, {}).options[
            "micro_batch_size"
        ]
        == 8
    )
    auto = {**GOOD, "train_batch_size": "auto"}
    assert findings_of(auto)["train_batch_size"] == "warning"
    words = "deepspeed --num_gpus=8 train.py --per_device_train_batch_size 4 --model_name_or_path llama-2-7b"
    told = read({"ds.json": json.dumps({**auto, "train_micro_batch_size_per_gpu": 2}), "run.sh": words}, {})
    assert any("stops at the start" in one.text for one in told.findings)
    assert told.model is not None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"train_batch_size": 1, "train_batch_size": 2}',
        '{"train_batch_size": -4}',
        '{"train_batch_size": 1e300}',
        '{"train_batch_size": {"a": [1]}}',
        '{"train_batch_size": 8, "zero_optimization": [1]}',
        '{"train_batch_size": 8, "optimizer": "AdamW"}',
        '{"train_batch_size": 8, "zero_optimization": {"stage": 1, "reduce_bucket_size": "many"}}',
        "not json at all: [",
        '{"a": 1}',
    ],
)
def test_what_is_broken_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError):
        read({"ds.json": text}, {})


def test_comments_of_hjson_are_read_as_deepspeed_does() -> None:
    text = '{\n  # a comment\n  "train_batch_size": 8,\n  "zero_optimization": {"stage": 1,},\n}\n'
    assert read({"ds.json": text}, {}).options["sharding"] == "zero1"
