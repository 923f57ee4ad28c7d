"""DeepSpeed's own parser reads what is exported, and reads it as the plan has it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from planner.export.base import Export, Subject
from planner.export.deepspeed import CONFIG, DEVICES, STAGES, accumulated, export
from planner.export.read_deepspeed import read
from planner.specs import ClusterSpec, ModelSpec
from strategies.offload import places_of
from tests.contract import WANTED, judged
from tests.contract.plans import degrees, expressed, layout_of, random_plans, training_of

pytestmark = pytest.mark.contract
OFFLOADS = (
    *("",) * 4,
    "optimizer",
    "optimizer,parameters",
    "optimizer:nvme,parameters",
    "optimizer:nvme,parameters:nvme",
)


def drawn(dice: random.Random, model: ModelSpec, cluster: ClusterSpec) -> dict[str, Any]:
    """A plan of Hugging Face's modules, or of Megatron's kernels with a pipeline."""
    options = {"reduce_bucket_size": dice.choice(("5e8", "2e8", "50000000"))}
    options |= {"stage3_max_live_parameters": dice.choice(("1e9", "3e8"))}
    if dice.random() < 0.4:
        options["kernels"] = "megatron"
        own = degrees(dice, cluster, ("tensor_parallel", "pipeline_parallel"))
        layout = layout_of(dice, own, sharding=dice.choice(("zero1", "ddp")), sequence_parallel=False)
        recompute = dice.choice(("none", "full", "selective"))
    else:
        own = degrees(dice, cluster, ("context_parallel",) if dice.random() < 0.3 else ())
        sharding = dice.choice(("zero1", "zero2", "zero3", "zero3", "ddp"))
        options["overlap"] = dice.choice(("on", "off"))
        options["optimizer_step"] = dice.choice(("fused", "fused", "foreach"))
        layout = layout_of(
            dice, own, sharding=sharding, context_comm="ulysses", offload=dice.choice(OFFLOADS)
        )
        recompute = dice.choice(("none", "full"))
    more = {"gradient_dtype": dice.choice((None, None, "fp32"))}
    more["optimizer"] = dice.choice(("adamw", "adamw", "adam", "sgd", "momentum", "lion"))
    more["precision"] = dice.choice(("bf16", "bf16", "fp16", "fp32"))
    training = training_of(layout, dice, "deepspeed", options=options, **more)
    return {"training": training, "layout": layout, "recompute": recompute}


@pytest.fixture(scope="module")
def plans() -> list[Subject]:
    return list(random_plans(5 * WANTED // 3, 7, drawn))


def case_of(subject: Subject, made: Export) -> dict[str, Any]:
    layout = subject.layout
    parts = layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel
    return {
        "config": json.loads(made.files[CONFIG]),
        "world": subject.plan.num_gpus,
        "parts": parts,
        "layers": subject.model.num_hidden_layers,
        "stages": layout.pipeline_parallel,
    }


@pytest.mark.parametrize(
    ("version", "environment", "share"), [("0.19", "frameworks", 0.6), ("0.16", "deepspeed016", 0.4)]
)
def test_what_is_exported_is_read_as_the_plan_has_it(
    plans: list[Subject], version: str, environment: str, share: float
) -> None:
    able, reasons = expressed(plans, lambda one: export(one, version, {"nvme_path": "/nvme"}))
    print(f"DeepSpeed {version}: {len(able)} of {len(plans)} are expressible; {sorted(set(reasons))[:9]}")
    assert len(able) >= share * len(plans)
    answers = judged(environment, "deepspeed.py", [case_of(*one) for one in able])
    assert len(answers) == len(able)
    for (subject, made), answer in zip(able, answers, strict=True):
        assert answer["ok"], (answer, made.files[CONFIG])
        layout, training, options = subject.layout, subject.job.training, subject.options()
        assert answer["batch"] == [layout.global_batch_size, layout.micro_batch_size, layout.grad_accum]
        assert answer["stage"] == STAGES[layout.sharding]
        assert (answer["bf16"], answer["fp16"]) == (
            training.precision == "bf16",
            training.precision == "fp16",
        )
        assert answer["gradients"] == accumulated(subject)
        sizes = [int(float(options[name])) for name in ("reduce_bucket_size", "stage3_max_live_parameters")]
        if answer["stage"]:
            assert answer["sizes"][0] == sizes[0]
            assert answer["overlap"] == (options.get("overlap") == "on")
        if answer["stage"] == 3:
            assert answer["sizes"][1:] == [sizes[1], 50_000_000, 1_000_000_000]
        places = places_of(layout.offload)
        for item, got in zip(("optimizer", "parameters"), answer["offload"], strict=True):
            place = places.get(item)
            assert got == (place and [DEVICES[place], True, "/nvme" if place == "nvme" else None])
        if layout.pipeline_parallel > 1:
            assert answer["pipeline"] == layout.pipeline_parallel
        assert tuple(answer["split"]) == subject.layers
        full = subject.recompute("DeepSpeed")[0] == "full"
        assert bool(answer["checkpoints"]) == full


def test_what_the_parser_takes_without_a_word_our_reader_finds(plans: list[Subject]) -> None:
    subject = next(one for one in plans if one.layout.sharding == "zero3" and not one.layout.offload)
    good = json.loads(export(subject, "0.19", {}).files[CONFIG])
    silent = {
        "gradient_cliping": {**good, "gradient_cliping": 1.0},
        "train_batchsize": {**good, "train_batchsize": 1},
        "activation_checkpointing.number_checkpoint": {
            **good,
            "activation_checkpointing": {"number_checkpoint": 3},
        },
        "pipeline.stage": {**good, "pipeline": {"stage": 4}},
        "data_types.grad_acum_dtype": {**good, "data_types": {"grad_acum_dtype": "fp32"}},
        "zero_optimization.offload_param": {
            **good,
            "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}},
        },
        "pipeline.stages": {**good, "pipeline": {"stages": 4}},
    }
    case = {"world": subject.plan.num_gpus, "parts": subject.layout.context_parallel}
    answers = judged("frameworks", "deepspeed.py", [{**case, "config": one} for one in silent.values()])
    assert [answer["ok"] for answer in answers] == [True] * len(silent), answers
    for setting, config in silent.items():
        found = read({CONFIG: json.dumps(config)}, {}).findings
        assert any(one.setting == setting and one.severity == "error" for one in found), (setting, found)


def test_what_the_parser_refuses_our_reader_finds_too(plans: list[Subject]) -> None:
    subject = next(one for one in plans if one.layout.sharding == "zero3" and not one.layout.offload)
    good = json.loads(export(subject, "0.19", {}).files[CONFIG])
    zero = good["zero_optimization"]
    refused: dict[str, dict[str, Any]] = {
        "overlap_com": {**good, "zero_optimization": {**zero, "overlap_com": True}},
        "stage": {**good, "zero_optimization": {**zero, "stage": 4}},
        "fp16": {**good, "bf16": {"enabled": True}, "fp16": {"enabled": True}},
        "elasticity": {**good, "elasticity": {"enabled": True}},
        "train_batch_size": {**good, "train_batch_size": good["train_batch_size"] + 1},
        "ratio": {
            **good,
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        },
    }
    case = {"world": subject.plan.num_gpus, "parts": subject.layout.context_parallel}
    answers = judged("frameworks", "deepspeed.py", [{**case, "config": one} for one in refused.values()])
    assert [answer["ok"] for answer in answers] == [False] * len(refused), answers
    launch = f"deepspeed --num_gpus {subject.plan.num_gpus} train.py --deepspeed_config {CONFIG}"
    for setting, config in refused.items():
        found = read({CONFIG: json.dumps(config), "launch.sh": launch}, {}).findings
        assert any(setting in one.setting and one.severity == "error" for one in found), (setting, found)
