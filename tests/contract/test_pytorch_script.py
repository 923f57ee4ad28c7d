"""The exported script runs: on four processes of a CPU, as planned, and with one process's losses."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest

from planner.api import estimate
from planner.errors import InputError
from planner.export.base import Export, Subject
from planner.export.hf_config import WRITERS, config_of
from planner.export.pytorch import export
from planner.families import model_from_config
from planner.plan import Plan
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout
from tests.contract import WANTED, judged, python_of

pytestmark = pytest.mark.contract

CATALOG = Path(__file__).parents[2] / "planner" / "catalog" / "models"
SEQUENCES, LENGTH = 16, 32
TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "qkv_bias": True}
    | {"tie_word_embeddings": True},
    "qwen3": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "qk_norm": True},
    "mistral": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "sliding_window": 32},
    "llama, heads alike": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    | {"model_type": "llama"},
    "llama, seven blocks": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    | {"model_type": "llama", "num_hidden_layers": 7},
    "gpt2": {"hidden_size": 64, "intermediate_size": 256, "num_key_value_heads": 4, "gated_mlp": False}
    | {"norm": "layernorm", "position_embedding": "learned", "hidden_act": "gelu_new"}
    | {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    | {"dropout": 0.1, "attention_dropout": 0.1},
}


def tiny(family: str) -> ModelSpec:
    lengths = {"num_attention_heads": 4, "head_dim": 16, "vocab_size": 256, "num_hidden_layers": 4}
    own = {"name": f"tiny-{family}", "model_type": family, "max_position_embeddings": 64}
    return ModelSpec(**lengths | own | TINY[family])


class Case(NamedTuple):
    """A layout of a tiny model, to be held against the ``like`` of its name; of one process without."""

    like: str
    family: str = "llama"
    framework: str = "fsdp"
    data: int = 4
    shards: int = 4
    keep: bool = False
    recompute: str = "none"
    offload: str = ""
    training: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, str] = {}  # noqa: RUF012
    saved: bool = False  # is the model loaded from a folder?

    def made(self) -> tuple[Plan, Export]:
        """Its plan and its script: plain SGD, whose losses show a gradient that is too large or too small."""
        given: dict[str, Any] = {"precision": "fp32", "optimizer": "sgd", "dropout": 0.0} | self.training
        step = "fused" if given["optimizer"] == "adamw" else "foreach"
        training = TrainingSpec(
            framework=self.framework,
            seq_length=LENGTH,
            global_batch_size=SEQUENCES,
            options={"optimizer_step": step} | self.options,
            **given,
        )
        micro = 2 if self.data > 1 else 8
        layout = Layout(
            data_parallel=self.data,
            micro_batch_size=micro,
            grad_accum=SEQUENCES // micro // self.data,
            data_shards=self.shards if self.framework == "fsdp" else self.data,
            sharding="fsdp" if self.framework == "fsdp" else "ddp",
            reshard_after_forward=not self.keep,
            offload=self.offload,
        )
        cluster, model = ClusterSpec.parse(f"{self.data}xH100"), tiny(self.family)
        plan = estimate(model, cluster, training, layout, recompute=self.recompute)
        rate = "0.01" if given["optimizer"] == "adamw" else "0.5"
        settings = {"steps": "4", "lr": rate} | ({"model-path": "weights"} if self.saved else {})
        return plan, export(Subject(model, cluster, plan), "2.13", settings)


ONE: dict[str, Any] = {"framework": "hf", "data": 1}
BF16 = {"precision": "bf16", "optimizer": "adamw"}
FROZEN = {"frozen": {"embeddings": True, "blocks": 2}}
MOMENTUM = {"optimizer": "momentum"}
CASES: dict[str, Case] = {
    "llama": Case("", **ONE),
    "ddp": Case("llama", framework="hf"),
    "ddp, views of buckets, two blocks recomputed, eager attention": Case(
        "llama",
        framework="hf",
        recompute="full:2",
        options={"gradient_view": "on", "attention": "eager"},
    ),
    "fsdp": Case("llama"),
    "fsdp, a block recomputed, gathered once": Case("llama", keep=True, recompute="full:1"),
    "fsdp, ends apart, all recomputed": Case("llama", recompute="full", options={"root": "split"}),
    "hsdp": Case("llama", shards=2),
    "ddp, loss in parts": Case("llama", framework="hf", options={"loss": "chunked"}),
    "fsdp, loss in parts, all recomputed": Case("llama", recompute="full", options={"loss": "chunked"}),
    "momentum": Case("", training=MOMENTUM, **ONE),
    "momentum, fsdp, offloaded": Case("momentum", offload="optimizer,parameters", training=MOMENTUM),
    "frozen": Case("", training=FROZEN, **ONE),
    "frozen, fsdp": Case("frozen", training=FROZEN),
    "gpt2": Case("", "gpt2", **ONE),
    "gpt2, ddp, three blocks recomputed": Case("gpt2", "gpt2", "hf", recompute="full:3"),
    "gpt2, hsdp, ends apart, gathered once": Case(
        "gpt2", "gpt2", shards=2, keep=True, options={"root": "split"}
    ),
    "gpt2, loaded": Case("", "gpt2", saved=True, **ONE),
    "gpt2, loaded, fsdp": Case("gpt2, loaded", "gpt2", saved=True),
    "qwen2": Case("", "qwen2", **ONE),
    "qwen2, fsdp": Case("qwen2", "qwen2"),
    "qwen2, fsdp, loss in parts": Case("qwen2", "qwen2", options={"loss": "chunked"}),
    "bf16": Case("", training=BF16, **ONE),
    "bf16, loss in parts, fsdp": Case("bf16", training=BF16, options={"loss": "chunked"}),
    "bf16, loss in parts, ddp": Case("bf16", framework="hf", training=BF16, options={"loss": "chunked"}),
    "bf16, ddp": Case("bf16", framework="hf", training=BF16),
    "bf16, fsdp": Case("bf16", training=BF16),
    "bf16, fsdp under autocast": Case("bf16", training=BF16, options={"mixed_precision": "autocast"}),
    "pure-bf16, fsdp": Case("bf16", training=BF16 | {"precision": "pure-bf16"}),
    "fp16, ddp": Case("bf16", framework="hf", training=BF16 | {"precision": "fp16"}),
    "fp16, fsdp": Case("bf16", training=BF16 | {"precision": "fp16"}),
}
FEW = ("llama", "ddp", "fsdp", "fsdp, a block recomputed, gathered once", "hsdp", "bf16", "bf16, fsdp")
if WANTED < 200:
    CASES = {name: CASES[name] for name in FEW}


def job(plan: Plan, made: Export) -> dict[str, Any]:
    """What the judge is told."""
    return {"script": made.files["train.py"], "world": plan.num_gpus, "arguments": made.program[1:]}


@pytest.fixture(scope="module")
def ran() -> dict[str, tuple[Plan, dict[str, Any]]]:
    """Every case's plan, and what its script reported."""
    made = {name: case.made() for name, case in CASES.items()}
    jobs = [
        job(plan, one) | {"saved": config_of(tiny(CASES[name].family)) if CASES[name].saved else None}
        for name, (plan, one) in made.items()
    ]
    answers = judged("frameworks", "pytorch.py", jobs, timeout=900)
    assert len(answers) == len(jobs)
    for name, answer in zip(made, answers, strict=True):
        assert not any(answer["codes"]), (name, answer)
    return {name: (made[name][0], answer) for name, answer in zip(made, answers, strict=True)}


def test_every_layout_has_the_losses_of_one_process(ran: dict[str, Any]) -> None:
    for name, case in CASES.items():
        losses = ran[name][1]["report"]["losses"]
        assert min(losses) < losses[0] - 0.1, name
        if case.like:
            near = 1e-4 if case.training.get("precision", "fp32") == "fp32" else 0.03
            assert losses == pytest.approx(ran[case.like][1]["report"]["losses"], abs=near), name


def test_every_process_holds_the_planned_parameters_and_states(ran: dict[str, Any]) -> None:
    for name, (plan, answer) in ran.items():
        ranks = answer["report"]["ranks"]
        assert [one["rank"] for one in ranks] == list(range(plan.num_gpus)), name
        (stage,) = plan.stages
        elsewhere = [one.components for one in stage.elsewhere.values()]
        for planned, measured in (("parameters", "parameter_bytes"), ("optimizer_states", "optimizer_bytes")):
            total = stage.components[planned] + sum(one.get(planned, 0) for one in elsewhere)
            assert {one[measured] for one in ranks} == {total}, (name, measured)
        assert "planned      measured" in answer["output"], name


LENGTHS = {
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_hidden_layers", "n_layer"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "sliding_window", "qk_nope_head_dim", "v_head_dim", "n_routed_experts"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 128),
    **dict.fromkeys(("moe_intermediate_size", "q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("max_position_embeddings", "seq_length"), 64),
    **dict.fromkeys(("ffn_hidden_size", "vocab_size"), 256),
    **dict.fromkeys(("num_local_experts", "num_experts", "qk_rope_head_dim"), 8),
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "phi3": "phi-3-mini",
    "gemma2": "gemma-2-2b",
    "opt": "opt-1.3b",
    "bloom": "bloom-7b1",
    "gpt_neox": "pythia-1.4b",
    "falcon": "falcon-40b",
    "mixtral": "mixtral-8x7b",
    "deepseek_v3": "deepseek-v3",
    "gpt_oss": "gpt-oss-20b",
}
"""Families whose modules differ most from each other, with a model of the catalog."""


def small(name: str) -> ModelSpec:
    """A model of the catalog with four blocks and short lengths."""
    values = config_of(ModelSpec.from_catalog(name))
    values |= {key: length for key, length in LENGTHS.items() if values.get(key) is not None}
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][:4]
    return model_from_config(values, name, name=f"small {name}")


def test_models_of_other_families_learn_in_shards_of_the_planned_size() -> None:
    cluster, made = ClusterSpec.parse("2xH100"), []
    for family, name in FAMILIES.items():
        model = small(name)
        assert model.model_type == family
        training = TrainingSpec(
            framework="fsdp",
            seq_length=LENGTH,
            global_batch_size=4,
            precision="pure-bf16",
            dropout=0.0,
            attention="eager" if family in ("gemma2", "bloom", "gpt_oss") else "sdpa",
        )
        layout = Layout(data_parallel=2, micro_batch_size=2, sharding="fsdp")
        plan = estimate(model, cluster, training, layout, recompute="full:2")
        made.append((plan, export(Subject(model, cluster, plan), "2.13", {"steps": "3", "lr": "0.01"})))
    answers = judged("frameworks", "pytorch.py", [job(*one) for one in made], timeout=600)
    for (plan, _), answer in zip(made, answers, strict=True):
        assert not any(answer["codes"]), (plan.model, answer)
        report = answer["report"]
        assert 5.4 < report["losses"][0] < 5.7, plan.model  # that of guesses: log 256 is 5.55
        assert report["losses"][-1] < report["losses"][0] - 0.1, plan.model
        held = {one["parameter_bytes"] for one in report["ranks"]}
        assert held == {plan.stages[0].components["parameters"]}, plan.model


def test_torchrun_starts_it_as_the_export_says_with_a_file_of_tokens(tmp_path: Path) -> None:
    plan, _ = Case("", training=BF16, recompute="full:2").made()
    tokens = numpy.arange(20 * LENGTH, dtype=numpy.uint16) % 7
    tokens.tofile(tmp_path / "tokens of $(id).bin")
    subject = Subject(tiny("llama"), ClusterSpec.parse("4xH100"), plan)
    made = export(subject, "2.13", {"data": "tokens of $(id).bin", "steps": "3", "lr": "0.02"})
    for name, text in made.files.items():
        (tmp_path / name).write_text(text)
    command = made.on_node(subject, "0", "127.0.0.1", "29571")
    home = python_of("frameworks").parent
    done = subprocess.run(
        [str(home / command[0]), *command[1:], "--report", "report.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["losses"][-1] < report["losses"][0] - 0.5
    assert len(report["ranks"]) == 4


def test_another_number_of_processes_is_refused_by_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(Case("").made()[1].files["train.py"])
    done = subprocess.run(
        [str(python_of("frameworks")), "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "the plan is of 4 processes, there are 1" in done.stderr


def test_transformers_builds_the_catalogs_models_with_all_their_parameters() -> None:
    specs = []
    for file in sorted(CATALOG.glob("*.json")):
        spec = ModelSpec.from_catalog(file.stem)
        if spec.model_type in WRITERS:
            specs.append(spec)
    assert len(specs) >= 80
    answers = judged("frameworks", "hf_config.py", [config_of(spec) for spec in specs])
    for spec, answer in zip(specs, answers, strict=True):
        assert answer == {"parameters": spec.num_parameters}, spec.name


def test_a_model_of_a_family_that_is_not_written_is_refused() -> None:
    with pytest.raises(InputError, match="model_type=t5 cannot be built"):
        config_of(ModelSpec.from_catalog("t5-3b"))
