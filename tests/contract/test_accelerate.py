"""accelerate's launcher and the Trainer's parser read what is exported, as the plan has it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import yaml

from planner.export.accelerate import CONFIG, MIXED, export
from planner.export.base import Subject
from planner.export.deepspeed import STAGES
from planner.export.huggingface import ARGUMENTS, PEFT, TARGETS, optimizer_of
from planner.export.read_accelerate import read
from planner.specs import ClusterSpec, ModelSpec
from tests.contract import WANTED, judged
from tests.contract.plans import degrees, expressed, layout_of, random_plans, training_of

pytestmark = pytest.mark.contract
ADAPTERS = (None, None, None, {"rank": 8}, {"rank": 16, "targets": ("q", "v"), "quantize": "nf4"})
OPTIMIZERS = {
    "hf": ("adamw", "adamw", "trainer-adamw8bit", "transformers-adafactor", "lion", "paged-adamw", "muon"),
    "fsdp": ("adamw", "adamw", "torchao-adamw8bit", "sgd"),
    "deepspeed": ("adamw", "lion", "adam"),
}


def drawn(dice: random.Random, model: ModelSpec, cluster: ClusterSpec) -> dict[str, Any]:
    """A plan of Hugging Face's modules under DDP, FSDP1, FSDP2 or DeepSpeed."""
    framework = dice.choice(("hf", "fsdp", "fsdp", "deepspeed"))
    options: dict[str, str] = {"attention": dice.choice(("sdpa", "flash"))}
    options["loss"] = dice.choice(("eager", "eager", "fused", "chunked"))
    options["optimizer_step"] = dice.choice(("fused", "fused", "foreach"))
    more: dict[str, Any] = {"precision": dice.choice(("bf16", "bf16", "fp16", "fp32", "pure-bf16"))}
    if framework == "fsdp":
        version = dice.choice(("2", "2", "1"))
        options |= {"version": version, "root": "one" if version == "1" else "split"}
        options["reduce_dtype"] = "fp32" if more["precision"] == "fp32" else "bf16"
        options["compile"] = dice.choice(("off", "off", "on"))
        own = degrees(dice, cluster, ("context_parallel",) if dice.random() < 0.3 else ())
        shards = dice.choice([n for n in (2, 4, 8, 16, 64) if not own["data_parallel"] % n] or [1])
        layout = layout_of(
            dice,
            own,
            sharding="fsdp",
            data_shards=dice.choice((own["data_parallel"], shards)),
            context_comm=dice.choice(("all-gather", "ring")),
            reshard_after_forward=dice.random() < 0.7,
            offload=dice.choice(("", "", "optimizer,parameters")),
        )
    elif framework == "deepspeed":
        own = degrees(dice, cluster, ("context_parallel",) if dice.random() < 0.2 else ())
        sharding = dice.choice(("zero1", "zero2", "zero3"))
        layout = layout_of(dice, own, sharding=sharding, context_comm="ulysses")
    else:
        options["compile"] = dice.choice(("off", "off", "on"))
        layout = layout_of(dice, degrees(dice, cluster, ()))
    more["optimizer"] = dice.choice(OPTIMIZERS[framework])
    adapters = dice.choice(ADAPTERS)
    more |= {"adapters": adapters} if adapters else {}
    training = training_of(layout, dice, framework, options=options, **more)
    return {"training": training, "layout": layout, "recompute": dice.choice(("none", "full"))}


@pytest.fixture(scope="module")
def plans() -> list[Subject]:
    return list(random_plans(5 * WANTED // 3, 11, drawn))


def data_of(subject: Subject) -> int:
    """Processes that have data of their own."""
    return int(subject.layout.data_parallel)


def test_what_is_exported_is_read_as_the_plan_has_it(plans: list[Subject]) -> None:
    able, reasons = expressed(plans, lambda one: export(one, "1.15", {}))
    print(f"accelerate: {len(able)} of {len(plans)} are expressible; {sorted(set(reasons))[:9]}")
    assert len(able) >= 0.5 * len(plans)
    cases = [{"files": dict(made.files), "world": data_of(subject)} for subject, made in able]
    for (subject, made), answer in zip(able, judged("frameworks", "accelerate.py", cases), strict=True):
        assert answer["ok"], (answer, made.files[CONFIG], made.files[ARGUMENTS])
        layout, training, options = subject.layout, subject.job.training, subject.options()
        framework = subject.plan.training.framework
        assert (answer["processes"], answer["machines"]) == (subject.plan.num_gpus, subject.nodes)
        assert answer["kind"] == {"hf": "ddp"}.get(framework, framework)
        arguments = answer["arguments"]
        assert arguments["per_device_train_batch_size"] == layout.micro_batch_size
        assert arguments["gradient_accumulation_steps"] == layout.grad_accum
        assert (arguments["bf16"], arguments["fp16"]) == tuple(training.precision == name for name in MIXED)
        assert arguments["compile"] == (options.get("compile") == "on")
        assert bool(arguments["liger"]) == (options["loss"] != "eager")
        assert subject.digest in arguments["run_name"]
        full = subject.recompute("accelerate")[0] == "full"
        mesh = answer["mesh"]
        if framework == "deepspeed":
            found = answer["deepspeed"]
            assert found["stage"] == STAGES[layout.sharding]
            assert found["init"] == (layout.sharding == "zero3")
            assert found["batch"] == [layout.global_batch_size, layout.micro_batch_size]
            assert mesh.get("sp", 1) == layout.context_parallel
            assert arguments["checkpointing"] == full
            continue
        assert answer["mixed"] == MIXED.get(str(training.precision), "no")
        assert arguments["optim"] == optimizer_of(subject)
        if framework == "hf":
            assert arguments["checkpointing"] == full
            continue
        fsdp = answer["fsdp"]
        assert fsdp["version"] == int(options["version"])
        assert bool(fsdp["offload"]) == bool(layout.offload)
        assert fsdp["checkpointing"] == full
        assert fsdp["wrap"] == "transformer_auto_wrap_policy"
        if options["version"] == "2":
            assert fsdp["reshard"] == str(layout.reshard_after_forward)
            if mesh:
                assert mesh.get("cp", 1) == layout.context_parallel
                assert mesh.get("dp_shard", 1) == layout.data_shards
                assert mesh.get("dp_replicate", 1) == layout.data_parallel // layout.data_shards
            else:
                assert layout.data_shards == layout.data_parallel == layout.world_size
        else:
            hybrid = layout.data_shards != layout.data_parallel
            assert ("HYBRID" in fsdp["strategy"]) == hybrid
            keeps = "GRAD_OP" in fsdp["strategy"] or "ZERO2" in fsdp["strategy"]
            assert keeps == (not layout.reshard_after_forward)
        if training.adapters:
            assert answer["lora"][0] == training.adapters.rank
            assert ("bits" in answer) == bool(training.adapters.quantize)
            assert PEFT in made.files


def test_what_the_parser_takes_without_a_word_our_reader_finds(plans: list[Subject]) -> None:
    able, _ = expressed(plans, lambda one: export(one, "1.15", {}))
    good = next(
        yaml.safe_load(made.files[CONFIG])
        for subject, made in able
        if subject.options().get("version") == "2" and subject.layout.context_parallel == 1
    )
    silent: dict[str, dict[str, Any]] = {
        "fsdp_config.fsdp_ofload_params": {
            **good,
            "fsdp_config": {**good["fsdp_config"], "fsdp_ofload_params": True},
        },
        "fsdp_config.activation_checkpoint": {
            **good,
            "fsdp_config": {**good["fsdp_config"], "activation_checkpoint": True},
        },
    }
    refused: dict[str, dict[str, Any]] = {
        "nonsense": {**good, "nonsense": 1},
        "mixed_precision": {**good, "mixed_precision": "bf17"},
        "parallelism_config": {
            **good,
            "parallelism_config": {"parallelism_config_dp_shard_size": 3, "parallelism_config_tp_size": 1},
        },
    }
    usual = {f"parallelism_config_{name}_size": 1 for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")}
    refused["parallelism_config"]["parallelism_config"] = (
        usual | refused["parallelism_config"]["parallelism_config"]
    )
    cases = [
        {"files": {CONFIG: yaml.safe_dump(one)}, "world": 1} for one in (*silent.values(), *refused.values())
    ]
    answers = judged("frameworks", "accelerate.py", cases)
    assert [one["ok"] for one in answers] == [True] * len(silent) + [False] * len(refused), answers
    for setting, config in {**silent, **refused}.items():
        found = read({CONFIG: yaml.safe_dump(config)}, {}).findings
        assert any(one.setting == setting and one.severity == "error" for one in found), (setting, found)


def test_strings_of_users_come_back_as_they_are(plans: list[Subject]) -> None:
    subject = next(one for one in plans if one.plan.training.framework == "deepspeed")
    model = subject.model.model_copy(update={"name": "a'\"$(x)`y`\n: # \u00e9"})
    plan = subject.plan.model_copy(update={"model": model.name})
    evil = Subject(model, subject.cluster, plan)
    path = "/n'\" $(touch x);\u00e9 #"
    made = export(evil, "1.15", {"nvme_path": path})
    (answer,) = judged("frameworks", "accelerate.py", [{"files": dict(made.files), "world": data_of(evil)}])
    assert answer["ok"], answer
    assert "\n" not in answer["arguments"]["run_name"]
    assert json.loads(made.files[ARGUMENTS])["run_name"] == answer["arguments"]["run_name"]


def test_adapters_stand_beside_the_products_that_they_are_planned_beside() -> None:
    answers = judged("frameworks", "modules.py", list(TARGETS))
    for (kind, table), answer in zip(TARGETS.items(), answers, strict=True):
        assert answer["ok"], (kind, answer)
        names = answer["names"]
        for product, name in table.items():
            found = [one for one in names if one.endswith("." + name)]
            assert len(found) == 1, (kind, product, name, names)
        told = {one for one in names for name in table.values() if one.endswith("." + name)}
        assert told == set(names), (kind, set(names) - told)
