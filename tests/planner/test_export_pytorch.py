"""A plan as a training script: what it has, what cannot be said, and that nobody's words become code."""

from __future__ import annotations

import ast
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from planner.api import estimate
from planner.errors import InputError
from planner.export import export as any_export
from planner.export.base import NotExpressible, Subject, quoted
from planner.export.hf_config import WRITERS, config_of
from planner.export.pytorch import OPTIMIZERS, export, problems
from planner.families import model_from_config
from planner.plan import Plan
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout

CATALOG = sorted(one.stem for one in (Path(__file__).parents[2] / "planner/catalog/models").glob("*.json"))
NASTY = "a\"b'c`id`$(id)\n\"\"\"\n'''\\\nimport os; os.abort()\u202e #{{ 7*7 }}{% raw %}"


def subject(
    framework: str = "fsdp",
    model: str | ModelSpec = "llama-3.2-1b",
    gpus: int = 8,
    recompute: str = "none",
    layout: dict[str, Any] | None = None,
    **training: Any,
) -> Subject:
    spec = ModelSpec.from_catalog(model) if isinstance(model, str) else model
    cluster = ClusterSpec.parse(f"{gpus}xH100")
    given = TrainingSpec(framework=framework, **{"seq_length": 1024, "global_batch_size": 32} | training)
    degrees = {"data_parallel": gpus, "grad_accum": 32 // gpus}
    sharding = "fsdp" if framework == "fsdp" else "ddp"
    made = Layout(**degrees | {"sharding": sharding} | (layout or {}))
    return Subject(spec, cluster, estimate(spec, cluster, given, made, recompute=recompute))


def script(one: Subject) -> str:
    return export(one, "2.13", {}).files["train.py"]


def literals(text: str) -> dict[str, Any]:
    """The script's constants, read without running it."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("PLAN", "MODEL")
    }


def test_a_sharded_plan_is_fully_shard_block_by_block() -> None:
    text = script(subject(recompute="full:5"))
    compile(text, "train.py", "exec")
    assert "fully_shard(block, **options, **reshard)" in text
    assert "DistributedDataParallel" not in text
    assert "autocast" not in text.partition("DTYPES")[2]
    plan = literals(text)["PLAN"]
    assert plan["recompute"] == [0, 1, 2, 3, 4]
    assert (plan["weights"], plan["compute"], plan["reduce"], plan["casts_weights"]) == (
        *("fp32", "bf16", "fp32"),
        True,
    )


def test_a_replicated_plan_is_ddp_under_autocast() -> None:
    text = script(subject("hf", options={"gradient_view": "on"}))
    assert "DistributedDataParallel(" in text
    assert "model.no_sync()" in text
    assert "torch.autocast(device.type" in text
    assert "fully_shard" not in text
    assert literals(text)["PLAN"]["gradient_as_bucket_view"] is True


def test_one_process_needs_no_process_group() -> None:
    text = script(subject("hf", gpus=1))
    assert "torch.distributed" not in text
    assert "WORLD_SIZE" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"layout": {"data_shards": 4}},
            ('mesh_dim_names=("replicate", "shard")', "set_requires_all_reduce"),
        ),
        ({"layout": {"reshard_after_forward": False}}, ("'reshard_after_forward': False",)),
        ({"layout": {"offload": "optimizer,parameters"}}, ("CPUOffloadPolicy(", '"cpu:gloo,cuda:nccl"')),
        ({"options": {"root": "split"}}, ("fully_shard(tail",)),
        ({"options": {"loss": "chunked"}}, ("InParts(model)", "model(ids)")),
        ({"options": {"compile": "on"}}, ("torch.compile(block.forward)",)),
        ({"options": {"reduce_dtype": "bf16"}}, ("'reduce': 'bf16'",)),
        ({"options": {"optimizer_step": "foreach"}}, ("foreach=True",)),
        ({"options": {"mixed_precision": "autocast"}}, ("torch.autocast(", "'casts_weights': False")),
        ({"precision": "fp16"}, ("torch.amp.GradScaler(", "scaler.scale(loss).backward()")),
        ({"precision": "pure-bf16"}, ("'weights': 'bf16'",)),
        ({"precision": "tf32"}, ('set_float32_matmul_precision("high")',)),
        ({"attention": "flash"}, ("'attention': 'flash_attention_2'",)),
        ({"frozen": {"embeddings": True, "blocks": 3}}, ("def freeze(", "'frozen_blocks': 3")),
    ],
)
def test_every_choice_of_a_plan_is_in_its_script(given: dict[str, Any], words: tuple[str, ...]) -> None:
    text, plain = script(subject(**given)), script(subject())
    compile(text, "train.py", "exec")
    for word in words:
        assert word in text
        assert word not in plain


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"options": {"loss": "chunked", "root": "split"}}, "loss=chunked: a head that is a unit"),
    ({"options": {"loss": "fused"}}, "loss=fused: transformers' models"),
    ({"options": {"version": "1"}}, "version=1: the script shards with fully_shard"),
    ({"attention": "flash1"}, "attention=flash1: transformers 5 has no"),
    ({"optimizer": "torchao-adamw8bit"}, "optimizer=torchao-adamw8bit: the script has torch's own"),
    ({"optimizer": "sgd"}, "optimizer_step=fused: torch 2.13 has no fused SGD"),
    ({"precision": "bf16-kahan"}, "precision=bf16-kahan: torch's optimizers keep no compensation"),
    ({"optimizer_dtype": "bf16"}, "change precision bf16"),
    ({"precision": "fp16", "layout": {"offload": "optimizer,parameters"}}, "precision=fp16 with offload"),
    ({"gpus": 1}, "precision=bf16 on one GPU"),
    ({"layout": {"data_shards": 1}}, "data_shards=1: every GPU has the whole model"),
    ({"layout": {"data_parallel": 4, "context_parallel": 2, "grad_accum": 8}}, "context_parallel=2"),
    ({"framework": "hf", "gpus": 1, "options": {"optimizer_step": "in_backward"}}, "steps at the end"),
]


@pytest.mark.parametrize(("given", "message"), REFUSALS)
def test_what_the_script_cannot_do_is_refused(given: dict[str, Any], message: str) -> None:
    if given.get("options", {}).get("optimizer_step") == "in_backward":
        given = given | {"global_batch_size": 1, "layout": {"grad_accum": 1}}
    with pytest.raises(NotExpressible, match=message.replace("(", r"\(")):
        export(subject(**given), "2.13", {})


def test_adapters_are_refused_with_what_trains_them() -> None:
    with pytest.raises(NotExpressible, match="leave --lora out, or use peft"):
        export(subject("hf", adapters={"rank": 8}), "2.13", {})


def test_what_is_named_instead_can_be_said() -> None:
    for given, _ in REFUSALS:
        for problem in problems(subject(**given)) if "in_backward" not in str(given) else ():
            changed = dict(given)
            for name, value in problem.instead.items():
                if name == "option":
                    kept = {k: v for k, v in given.items() if k not in value}  # attention's name is its own
                    changed = kept | {"options": given.get("options", {}) | value}
                elif name == "context_parallel":
                    changed.pop("layout")
                elif name == "framework":
                    changed = {k: v for k, v in changed.items() if k != "layout"} | {name: value}
                else:
                    changed |= {name: value}
            if problem.instead:
                assert not problems(subject(**changed)), (given, problem.instead)


def test_plans_of_other_frameworks_go_elsewhere() -> None:
    spec, cluster = ModelSpec.from_catalog("llama-3.2-1b"), ClusterSpec.parse("8xH100")
    training = TrainingSpec(framework="megatron", seq_length=1024, global_batch_size=32)
    plan = estimate(spec, cluster, training, Layout(data_parallel=8, grad_accum=4, sharding="zero1"))
    with pytest.raises(NotExpressible, match="pytorch runs plans of --framework fsdp or hf or torchtitan"):
        any_export(Subject(spec, cluster, plan), "pytorch")


def test_a_tampered_plan_with_other_parallelism_is_refused() -> None:
    one = subject()
    plan = one.plan.model_copy(update={"layout": one.plan.layout.model_copy(update={"tensor_parallel": 2})})
    with pytest.raises(InputError):
        export(Subject(one.model, one.cluster, plan), "2.13", {})


@pytest.mark.parametrize(
    "name",
    [
        NASTY,
        "--steps",
        "№ ∑ 模型\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        "\x00\x1b[31m",
    ],
)
def test_no_name_becomes_code(name: str) -> None:
    plain = subject()
    model = plain.model.model_copy(update={"name": name})
    plan = plain.plan.model_copy(update={"model": name, "warnings": (name,), "assumptions": (name, NASTY)})
    text = script(Subject(model, plain.cluster, plan))
    compile(text, "train.py", "exec")
    assert literals(text)["PLAN"]["name"] == name
    ours, usual = ast.parse(text), ast.parse(script(plain))
    assert len(ours.body) == len(usual.body)
    for one, other in zip(ours.body, usual.body, strict=True):
        if (
            isinstance(one, ast.Assign)
            and isinstance(one.targets[0], ast.Name)
            and one.targets[0].id == "PLAN"
        ):
            continue
        assert ast.dump(one) == ast.dump(other)


@pytest.mark.parametrize("value", ["it's `id` $(id) ; true", "--lr=9", "-", "tokens {{ 7 }} №.bin"])
def test_settings_are_single_words_of_the_command(value: str) -> None:
    made = export(subject(), "2.13", {"data": value, "model-path": value})
    assert made.program == ("train.py", f"--data={value}", f"--model-path={value}")
    command = f"printf '%s\\n' {quoted(made.program[1:])}"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert shown == f"--data={value}\n--model-path={value}\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "0"}, "steps=0: use a whole number"),
        ({"steps": "ten"}, "steps=ten: use a whole number"),
        ({"lr": "fast"}, "lr=fast: use a number above 0"),
        ({"lr": "nan"}, "lr=nan: use a number above 0"),
        ({"data-dtype": "float16"}, "data-dtype=float16: use uint16"),
        ({"data": "a\nb"}, "use one line"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(subject(), "2.13", settings)


@pytest.mark.parametrize("name", CATALOG)
def test_the_catalogs_models_are_written_so_that_they_are_read_back(name: str) -> None:
    spec = ModelSpec.from_catalog(name)
    if spec.model_type not in WRITERS:
        with pytest.raises(InputError, match=f"model_type={spec.model_type} cannot be built"):
            config_of(spec)
        return
    read = model_from_config(config_of(spec), name, name=spec.name, source=spec.source)
    assert read == spec


def test_a_model_that_no_configuration_says_is_refused_by_the_field() -> None:
    spec = ModelSpec.from_catalog("llama-2-7b").model_copy(update={"sliding_window": 128})
    with pytest.raises(InputError, match="sliding_window=128 is no llama model's, which has None"):
        config_of(spec)


def random_plans(count: int) -> list[tuple[Subject, str]]:
    """Plans of random models, layouts and trainings that the planner accepts, and their recompute."""
    choose, found = random.Random(7), []
    names = [one for one in CATALOG if ModelSpec.from_catalog(one).model_type in ("llama", "qwen2", "gpt2")]
    names += ["gemma-2-2b", "mixtral-8x7b", "phi-2", "opt-1.3b", "falcon-7b"]
    while len(found) < count:
        gpus = choose.choice([1, 2, 8, 16])
        framework = choose.choice(["fsdp", "hf"])
        accum, micro = choose.choice([1, 2, 4]), choose.choice([1, 2])
        layout = {"grad_accum": accum, "micro_batch_size": micro}
        options = {}
        if framework == "fsdp":
            layout |= {"data_shards": choose.choice([gpus, max(1, gpus // 2)])}
            layout |= {"reshard_after_forward": choose.random() < 0.7}
            layout |= {"offload": "optimizer,parameters"} if choose.random() < 0.2 else {}
            options |= {"root": choose.choice(["one", "split"])}
        else:
            options |= {"gradient_view": choose.choice(["off", "on"])}
        options |= {"loss": "chunked"} if choose.random() < 0.1 else {}
        options |= {"optimizer_step": choose.choice(["fused", "foreach"])}
        given = {
            "precision": choose.choice(["bf16", "pure-bf16", "fp32", "fp16"]),
            "optimizer": choose.choice(["adamw", "adamw", "momentum", "sgd"]),
            "attention": choose.choice([None, "sdpa", "eager"]),
            "global_batch_size": gpus * accum * micro,
            "options": options,
        }
        recompute = choose.choice(["none", "full", "full:2"])
        try:
            one = subject(framework, choose.choice(names), gpus, recompute, layout, **given)
        except InputError:
            continue
        found.append((one, recompute))
    return found


def test_most_random_plans_are_scripts_that_say_what_they_are() -> None:
    plans = random_plans(120)
    expressible = 0
    for one, recompute in plans:
        if refused := problems(one):
            assert all(len(str(reason)) > 30 for reason in refused)
            continue
        text = script(one)
        expressible += 1
        compile(text, "train.py", "exec")
        said, plan, depth = literals(text), one.plan, one.model.num_hidden_layers
        assert model_from_config(said["MODEL"], "", name=one.model.name, source=one.model.source) == one.model
        layout = plan.layout
        for name in (
            "data_parallel",
            "data_shards",
            "micro_batch_size",
            "grad_accum",
            "reshard_after_forward",
        ):
            assert said["PLAN"][name] == getattr(layout, name)
        assert said["PLAN"]["world_size"] == plan.num_gpus
        assert said["PLAN"]["seq_length"] == plan.training.seq_length
        recomputed = {"none": 0, "full": depth, "full:2": 2}[recompute]
        assert len(said["PLAN"]["recompute"]) == recomputed
        assert ("fully_shard(" in text) == (layout.sharding == "fsdp" and layout.data_parallel > 1)
        assert OPTIMIZERS[plan.training.optimizer].partition("(")[0] in text
    assert expressible > 0.6 * len(plans), expressible


def test_the_plan_of_a_single_stage_predicts_what_the_script_measures() -> None:
    one = subject(layout={"offload": "optimizer,parameters"})
    predicted = literals(script(one))["PLAN"]["predicted"]
    assert predicted["parameter_bytes"] == pytest.approx(one.plan.num_parameters * 4 / 8, rel=1e-6)
    assert predicted["optimizer_bytes"] == pytest.approx(one.plan.num_parameters * 8 / 8, rel=1e-6)
    stage = one.plan.stages[0]
    assert (predicted["allocated_bytes"], predicted["used_bytes"]) == (stage.tensor_bytes, stage.peak_bytes)


def test_versions_are_those_whose_calls_are_public() -> None:
    one: Plan = subject().plan
    made = any_export(subject(), "pytorch", "2.6")
    assert (made.target, made.version) == ("pytorch", "2.6")
    assert one.training.framework == "fsdp"
    with pytest.raises(InputError, match=r"pytorch 2\.5 is not one that is written for"):
        any_export(subject(), "pytorch", "2.5")
