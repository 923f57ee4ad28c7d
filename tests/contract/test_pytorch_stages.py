"""Scripts that cut the model, by tensors and in pipelines, run as one process does: on processes of a CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from planner.api import estimate
from planner.export.base import Export, Subject
from planner.export.hf_config import config_of
from planner.export.pytorch import export
from planner.export.pytorch_stages import OWN
from planner.export.torchtitan_limits import stage_layers
from planner.export.torchtitan_shards import local_parameters
from planner.specs import ClusterSpec, TrainingSpec
from strategies.layout import Layout
from tests.contract import WANTED, judged
from tests.contract.test_pytorch_script import BF16, LENGTH, SEQUENCES, job, tiny

pytestmark = pytest.mark.contract


class Case(NamedTuple):
    """A layout of a tiny model, to be held against the same model's ``like``; that of one process without."""

    family: str = "llama"
    like: str = ""
    framework: str = "torchtitan"
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    shards: int = 0
    schedule: str = "1f1b"
    chunks: int = 1
    sequence: bool = True
    keep: bool = False
    recompute: str = "none"
    layers: tuple[int, ...] | None = None
    training: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, str] = {}  # noqa: RUF012
    saved: bool = False

    def made(self) -> tuple[Subject, Export]:
        """Its plan and its script: plain SGD, whose losses show a gradient that is too large or too small."""
        given: dict[str, Any] = {"precision": "fp32", "optimizer": "sgd", "dropout": 0.0} | self.training
        half = given["optimizer"] == "adamw"
        own = {name: able[0] for name, able in OWN.items()} if self.framework == "torchtitan" else {}
        training = TrainingSpec(
            framework=self.framework,
            seq_length=LENGTH,
            global_batch_size=SEQUENCES,
            options={"optimizer_step": "fused" if half else "foreach"} | own | self.options,
            **given,
        )
        layout = Layout(
            tensor_parallel=self.tensor,
            pipeline_parallel=self.pipeline,
            data_parallel=self.data,
            micro_batch_size=2,
            grad_accum=SEQUENCES // 2 // self.data,
            data_shards=self.shards or self.data,
            sharding="fsdp" if self.data > 1 else "ddp",
            reshard_after_forward=not self.keep,
            sequence_parallel=self.sequence and self.tensor > 1,
            schedule=self.schedule,
            chunks=self.chunks,
        )
        model, cluster = tiny(self.family), ClusterSpec.parse(f"{layout.world_size}xH100")
        plan = estimate(model, cluster, training, layout, recompute=self.recompute, layers=self.layers)
        subject = Subject(model, cluster, plan)
        settings = {"steps": "4", "lr": "0.01" if half else "0.5"}
        return subject, export(subject, "2.13", settings | ({"model-path": "weights"} if self.saved else {}))


ONE: dict[str, Any] = {"framework": "hf"}
MOMENTUM = {"optimizer": "momentum"}
CASES: dict[str, Case] = {
    "llama": Case(**ONE),
    "heads alike": Case("llama, heads alike", **ONE),
    "seven blocks": Case("llama, seven blocks", **ONE),
    "qwen2": Case("qwen2", **ONE),
    "qwen3": Case("qwen3", **ONE),
    "mistral": Case("mistral", **ONE),
    "momentum": Case(training=MOMENTUM, **ONE),
    "bf16": Case(training=BF16, **ONE),
    "loaded": Case(saved=True, **ONE),
    "one process": Case(like="llama"),
    "shards alone": Case(like="llama", data=2),
    "tp2": Case(like="llama", tensor=2),
    "tp2, no sequence parallelism": Case(like="llama", tensor=2, sequence=False),
    "tp4": Case("llama, heads alike", "heads alike", tensor=4),
    "tp4, no sequence parallelism, two blocks recomputed": Case(
        "llama, heads alike", "heads alike", tensor=4, sequence=False, recompute="full:2"
    ),
    "tp2 of tied ends": Case("qwen2", "qwen2", tensor=2),
    "tp2 of tied ends, no sequence parallelism": Case("qwen2", "qwen2", tensor=2, sequence=False),
    "tp2 of heads with norms": Case("qwen3", "qwen3", tensor=2),
    "tp2 of heads with norms, no sequence parallelism": Case("qwen3", "qwen3", tensor=2, sequence=False),
    "tp2 fsdp2, momentum": Case(like="momentum", tensor=2, data=2, training=MOMENTUM),
    "pp2, momentum": Case(like="momentum", pipeline=2, training=MOMENTUM),
    "tp2, pure-bf16": Case(like="bf16", tensor=2, training=BF16 | {"precision": "pure-bf16"}),
    "tp2 fsdp2": Case(like="llama", tensor=2, data=2, recompute="full:1"),
    "tp2 fsdp2, in one root, gathered once, no sequence parallelism": Case(
        like="llama", tensor=2, data=2, keep=True, sequence=False, options={"root": "one"}
    ),
    "tp2 fsdp2 of tied ends": Case("qwen2", "qwen2", tensor=2, data=2),
    "tp2 hsdp2x2": Case(like="llama", tensor=2, data=4, shards=2),
    "tp2 fsdp2, bf16": Case(like="bf16", tensor=2, data=2, training=BF16),
    "tp2 fsdp2, loaded": Case(like="loaded", tensor=2, data=2, saved=True),
    "pp2": Case(like="llama", pipeline=2),
    "pp2, uneven, a block recomputed": Case(like="llama", pipeline=2, layers=(3, 1), recompute="full:1"),
    "pp2 of windows as long as the sequence": Case("mistral", "mistral", pipeline=2),
    "pp4, gpipe": Case(like="llama", pipeline=4, schedule="gpipe"),
    "pp2, interleaved": Case(like="llama", pipeline=2, schedule="interleaved", chunks=2, recompute="full:1"),
    "pp2, zb-v": Case(like="llama", pipeline=2, schedule="zb-v", chunks=2),
    "pp2, interleaved, the last chunk short": Case(
        "llama, seven blocks",
        "seven blocks",
        pipeline=2,
        schedule="interleaved",
        chunks=2,
        recompute="full:1",
    ),
    "pp2 fsdp2": Case(like="llama", pipeline=2, data=2, recompute="full:1"),
    "pp2 hsdp2x2": Case(like="llama", pipeline=2, data=4, shards=2, schedule="gpipe"),
    "pp2 fsdp2, interleaved, gathered once": Case(
        like="llama", pipeline=2, data=2, schedule="interleaved", chunks=2, keep=True
    ),
    "pp2 fsdp2, zb-v, gathered once": Case(
        like="llama", pipeline=2, data=2, schedule="zb-v", chunks=2, keep=True
    ),
    "pp2 fsdp2, bf16": Case(like="bf16", pipeline=2, data=2, training=BF16),
    "pp2, loaded": Case(like="loaded", pipeline=2, saved=True),
    "pp2 tp2": Case(like="llama", pipeline=2, tensor=2),
    "pp2 tp2, no sequence parallelism": Case(like="llama", pipeline=2, tensor=2, sequence=False),
    "pp2 tp2, zb-v": Case(like="llama", pipeline=2, tensor=2, schedule="zb-v", chunks=2),
    "pp2 tp2, pure-bf16": Case(like="bf16", pipeline=2, tensor=2, training=BF16 | {"precision": "pure-bf16"}),
    "pp2 tp2 fsdp2": Case(like="llama", pipeline=2, tensor=2, data=2),
}
FEW = (
    "llama",
    "tp2",
    "tp2 fsdp2",
    "pp2",
    "pp2, uneven, a block recomputed",
    "pp4, gpipe",
    "pp2 fsdp2",
    "pp2 tp2",
)
if WANTED < 200:
    CASES = {name: CASES[name] for name in FEW}


@pytest.fixture(scope="module")
def ran() -> dict[str, tuple[Subject, dict[str, Any]]]:
    """Every case's plan, and what its script reported."""
    made = {name: case.made() for name, case in CASES.items()}
    jobs = [
        job(subject.plan, one) | {"saved": config_of(subject.model) if CASES[name].saved else None}
        for name, (subject, one) in made.items()
    ]
    answers = judged("frameworks", "pytorch.py", jobs, timeout=900)
    assert len(answers) == len(jobs)
    for name, answer in zip(made, answers, strict=True):
        assert not any(answer["codes"]), (name, answer)
    return {name: (made[name][0], answer) for name, answer in zip(made, answers, strict=True)}


def test_every_layout_has_the_losses_of_one_process(ran: dict[str, Any]) -> None:
    for name, case in CASES.items():
        losses = ran[name][1]["report"]["losses"]
        assert losses[-1] < losses[0] - 0.1, name
        if case.like:
            near = 1e-4 if case.training.get("precision", "fp32") == "fp32" else 0.03
            assert losses == pytest.approx(ran[case.like][1]["report"]["losses"], abs=near), name


def test_every_process_holds_the_planned_parameters_and_states(ran: dict[str, Any]) -> None:
    for name, (subject, answer) in ran.items():
        if CASES[name].framework != "torchtitan":
            continue
        ranks, moments = answer["report"]["ranks"], {"sgd": 0, "momentum": 1, "adamw": 2}
        states = moments[subject.plan.training.optimizer]
        each = subject.plan.num_gpus // subject.layout.pipeline_parallel
        for rank, one in enumerate(ranks):
            count = local_parameters(subject, rank)
            width = int(subject.job.recipe.weight)
            assert (one["rank"], one["parameters"]) == (rank, count), name
            assert (one["parameter_bytes"], one["optimizer_bytes"]) == (count * width, count * width * states)
        for index, stage in enumerate(subject.plan.stages):
            held = [one["parameter_bytes"] for one in ranks[index * each : (index + 1) * each]]
            assert sum(held) / each == stage.components["parameters"], name


def test_the_layers_of_a_stage_are_those_of_the_plan() -> None:
    subject, made = CASES["pp2, uneven, a block recomputed"].made()
    assert stage_layers(subject) == [[0, 1, 2], [3]]
    assert "'layers': [[0, 3], [3, 4]]" in made.files["train.py"]
    assert "'recompute': [0, 3]" in made.files["train.py"]
