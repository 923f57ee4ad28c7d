"""The exported script runs: on four processes of a CPU, as planned, and as one process would."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from planner.api import estimate
from planner.export.base import Export, Subject
from planner.export.pytorch import export
from planner.plan import Plan
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout
from tests.contract import judged

pytestmark = pytest.mark.contract

SEQUENCES, LENGTH = 16, 32
TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "qkv_bias": True}
    | {"tie_word_embeddings": True},
    "gpt2": {"hidden_size": 64, "intermediate_size": 256, "num_key_value_heads": 4, "gated_mlp": False}
    | {"norm": "layernorm", "position_embedding": "learned", "hidden_act": "gelu_new"}
    | {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    | {"dropout": 0.1, "attention_dropout": 0.1},
}


def tiny(family: str) -> ModelSpec:
    lengths = {"num_attention_heads": 4, "head_dim": 16, "vocab_size": 256, "num_hidden_layers": 4}
    own = {"name": f"tiny-{family}", "model_type": family, "max_position_embeddings": 64}
    return ModelSpec(**lengths, **own, **TINY[family])


class Case(NamedTuple):
    """A layout of a tiny model; without ``shards`` there is one process."""

    family: str = "llama"
    framework: str = "hf"
    data: int = 4
    shards: int = 4
    keep: bool = False
    recompute: str = "none"
    training: dict[str, Any] = {}  # noqa: RUF012
    offload: str = ""

    def made(self) -> tuple[Plan, Export]:
        given = {"precision": "fp32", "optimizer": "sgd", "dropout": 0.0} | self.training
        training = TrainingSpec(
            framework=self.framework, seq_length=LENGTH, global_batch_size=SEQUENCES, **given
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
        return plan, export(Subject(model, cluster, plan), "2.13", {"steps": "4", "lr": "0.5"})


def option(**values: str) -> dict[str, Any]:
    return {"options": values}


CASES: dict[str, Case] = {
    "one process": Case(data=1),
    "ddp": Case(),
    "ddp, buckets, first two blocks recomputed": Case(
        recompute="full:2", training=option(gradient_view="on", attention="eager")
    ),
    "fsdp": Case(framework="fsdp"),
    "fsdp, all recomputed": Case(framework="fsdp", recompute="full", training=option(optimizer_step="foreach")),
    "fsdp, kept gathered": Case(framework="fsdp", keep=True, recompute="full:1"),
    "fsdp, ends apart": Case(framework="fsdp", training=option(root="split")),
    "hsdp": Case(framework="fsdp", shards=2),
    "hsdp, kept gathered": Case(framework="fsdp", shards=2, keep=True, recompute="full"),
    "fsdp, offloaded": Case(framework="fsdp", offload="optimizer,parameters"),
    "gpt2, one process": Case("gpt2", data=1),
    "gpt2, ddp": Case("gpt2", recompute="full:3"),
    "gpt2, fsdp": Case("gpt2", framework="fsdp", recompute="full"),
    "gpt2, hsdp, ends apart": Case("gpt2", framework="fsdp", shards=2, training=option(root="split")),
    "qwen2, one process": Case("qwen2", data=1),
    "qwen2, fsdp": Case("qwen2", framework="fsdp"),
    "bf16, one process": Case(data=1, training={"precision": "bf16", "optimizer": "adamw"}),
    "bf16, ddp": Case(training={"precision": "bf16", "optimizer": "adamw"}),
    "bf16, fsdp": Case(framework="fsdp", training={"precision": "bf16", "optimizer": "adamw"}),
    "bf16, fsdp under autocast": Case(
        framework="fsdp",
        training={"precision": "bf16", "optimizer": "adamw"} | option(mixed_precision="autocast"),
    ),
    "pure-bf16, fsdp": Case(framework="fsdp", training={"precision": "pure-bf16", "optimizer": "adamw"}),
    "fp16, ddp": Case(training={"precision": "fp16", "optimizer": "adamw"}),
    "fp16, fsdp": Case(framework="fsdp", training={"precision": "fp16", "optimizer": "adamw"}),
    "frozen, one process": Case(data=1, training={"frozen": {"embeddings": True, "blocks": 2}}),
    "frozen, ddp": Case(training={"frozen": {"embeddings": True, "blocks": 2}}),
    "frozen, fsdp": Case(framework="fsdp", training={"frozen": {"embeddings": True, "blocks": 2}}),
    "momentum, one process": Case(data=1, training={"optimizer": "momentum"}),
    "momentum, fsdp": Case(framework="fsdp", training={"optimizer": "momentum"}),
}


@pytest.fixture(scope="module")
def ran() -> dict[str, tuple[Plan, dict[str, Any]]]:
    made = {name: case.made() for name, case in CASES.items()}
    jobs = [
        {
            "script": one.files["train.py"],
            "world": plan.num_gpus,
            "arguments": [
                "--lr=0.01" if word.startswith("--lr") and plan.training.optimizer == "adamw" else word
                for word in one.program[1:]
            ],
        }
        for plan, one in made.values()
    ]
    answers = judged("frameworks", "pytorch.py", jobs, timeout=600)
    return {name: (plan, answer) for (name, (plan, _)), answer in zip(made.items(), answers, strict=True)}
