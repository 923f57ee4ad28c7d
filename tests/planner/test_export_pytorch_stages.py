"""Scripts of plans with tensor and pipeline parallelism: what they have, and what cannot be."""

from __future__ import annotations

import ast
import random
from typing import Any

import pytest

from planner import api
from planner.errors import PlannerError
from planner.export import export as any_export
from planner.export.base import NotExpressible, Subject
from planner.export.pytorch import export, problems
from planner.export.pytorch_stages import FAMILIES, OWN, SCHEDULES
from planner.export.torchtitan_limits import stage_layers
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout
from tests.planner.test_export_pytorch import NASTY, literals, script

NEAR = {name: able[0] for name, able in OWN.items()}
"""Options of a plan whose blocks are transformers'."""


def subject(
    model: str | ModelSpec = "llama-3.1-8b",
    recompute: str = "none",
    layers: tuple[int, ...] | None = None,
    layout: dict[str, Any] | None = None,
    options: dict[str, str] | None = None,
    **training: Any,
) -> Subject:
    """A plan of torchtitan: of two shards, unless the layout says otherwise."""
    spec = ModelSpec.from_catalog(model) if isinstance(model, str) else model
    given = TrainingSpec(
        framework="torchtitan",
        options=NEAR | (options or {}),
        **{"seq_length": 1024, "global_batch_size": 16} | training,
    )
    degrees: dict[str, Any] = {"data_parallel": 2, "sharding": "fsdp"} | (layout or {})
    degrees.setdefault("sequence_parallel", degrees.get("tensor_parallel", 1) > 1)
    made = Layout(**{"grad_accum": given.global_batch_size // degrees["data_parallel"]} | degrees)
    cluster = ClusterSpec.parse(f"{made.world_size}xH100")
    return Subject(
        spec, cluster, api.estimate(spec, cluster, given, made, recompute=recompute, layers=layers)
    )


TENSOR, PIPELINE = {"tensor_parallel": 2}, {"pipeline_parallel": 2, "schedule": "1f1b"}
ALONE = {"data_parallel": 1, "sharding": "ddp"}


def test_a_model_cut_by_tensors_is_transformers_modules_as_dtensors() -> None:
    text = script(subject(layout=TENSOR, recompute="full:5"))
    compile(text, "train.py", "exec")
    for words in ('"self_attn.q_proj": ColwiseParallel()', "SequenceParallel()", "with loss_parallel():"):
        assert words in text
    for words in ("pipelining", "replicate(", "tie_weights", "q_norm", "dp_replicate", "AutoTokenizer"):
        assert words not in text
    plan = literals(text)["PLAN"]
    assert plan["mesh"] == {"dp_shard": 2, "tp": 2}
    assert plan["recompute"] == [0, 1, 2, 3, 4]
    assert isinstance(plan["predicted"], dict)


def test_norms_are_whole_without_sequence_parallelism() -> None:
    text = script(subject(layout=TENSOR | {"sequence_parallel": False}))
    compile(text, "train.py", "exec")
    assert "replicate(layer.input_layernorm, mesh)" in text
    assert "SequenceParallel" not in text


def test_norms_of_heads_and_tied_ends_are_cut_as_they_are() -> None:
    text = script(subject("qwen3-0.6b", layout=TENSOR | {"sequence_parallel": False}))
    compile(text, "train.py", "exec")
    assert "SequenceParallel(sequence_dim=2, use_local_output=True)" in text
    assert "stage.lm_head.weight = stage.embed_tokens.weight" in text


def test_a_pipeline_has_the_planned_layers_of_every_stage() -> None:
    one = subject(layout=PIPELINE, layers=(17, 15), recompute="full:1")
    plan = literals(text := script(one))["PLAN"]
    compile(text, "train.py", "exec")
    assert (plan["layers"], plan["held"], plan["schedule"]) == (
        [[0, 17], [17, 32]],
        [[0], [1]],
        "Schedule1F1B",
    )
    assert plan["recompute"] == [0, 17]
    assert plan["mesh"] == {"pp": 2, "dp_shard": 2}
    for stage, told in zip(one.plan.stages, plan["predicted"], strict=True):
        assert told["parameter_bytes"] == stage.components["parameters"]
        assert told["used_bytes"] == stage.peak_bytes
    assert "tensor.parallel" not in text


@pytest.mark.parametrize(
    ("layout", "held", "words"),
    [
        ({"schedule": "interleaved", "chunks": 2}, [[0, 2], [1, 3]], "ScheduleInterleaved1F1B(part"),
        (
            {"schedule": "zb-v", "chunks": 2, "reshard_after_forward": False},
            [[0, 3], [1, 2]],
            "ScheduleZBVZeroBubble(part",
        ),
        ({"schedule": "gpipe"}, [[0], [1]], "ScheduleGPipe(part"),
    ],
)
def test_schedules_are_torchs(layout: dict[str, Any], held: list[list[int]], words: str) -> None:
    text = script(subject(layout=PIPELINE | layout))
    compile(text, "train.py", "exec")
    assert literals(text)["PLAN"]["held"] == held
    assert words in text


def test_without_cuts_a_plan_of_torchtitan_is_the_script_of_shards() -> None:
    text = script(subject(options={"loss": "chunked", "root": "one", "compile": "on"}))
    compile(text, "train.py", "exec")
    assert "fully_shard(block, **options, **reshard)" in text
    assert literals(text)["PLAN"]["attention"] == "sdpa"


def test_the_prediction_is_said_to_be_of_other_blocks() -> None:
    made = export(subject(layout=TENSOR), "2.13", {})
    said = "predicted of torchtitan's blocks, transformers' keep others"
    assert any(said in note for note in made.notes)
    assert said in made.files["train.py"].partition('"""')[0]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"options": {"qkv": "fused", "norm": "fused"}}, "qkv=fused, norm=fused: transformers' modules run"),
    (
        {"layout": TENSOR, "options": {"loss": "compiled"}},
        "loss=compiled: transformers' modules run loss=eager",
    ),
    ({"layout": TENSOR, "options": {"compile": "on"}}, "compile=on: transformers' modules run compile=off"),
    ({"precision": "fp8-rowwise"}, "precision=fp8-rowwise: the script has torch's products alone"),
    ({"layout": TENSOR | ALONE}, "precision=bf16 without shards: weights are cast where"),
    ({"layout": ALONE}, "precision=bf16 without shards"),
    ({"layout": TENSOR | {"data_parallel": 1}, "precision": "fp32"}, "sharding=fsdp of one shard"),
    ({"layout": TENSOR | {"offload": "optimizer,parameters"}}, "offload=optimizer,parameters: not run"),
    (
        {"model": "deepseek-v2-lite", "options": {"norm": "fused"}},
        "model_type=deepseek_v2: in",
    ),
    (
        {"model": "mistral-7b", "layout": TENSOR, "seq_length": 8192},
        "sliding_window=4096: the script's attention",
    ),
    ({"recompute": "selective", "layout": PIPELINE}, "recompute=selective: which products"),
    ({"recompute": "selective"}, "recompute=selective: which products"),
    ({"layout": PIPELINE | {"grad_accum": 1}, "global_batch_size": 2}, "grad_accum=1: Schedule1F1B takes"),
    ({"model": "llama-3.2-1b", "layout": PIPELINE}, "tied embeddings: no stage has both ends"),
    (
        {"layout": PIPELINE | {"schedule": "zb-v", "chunks": 2}},
        "reshard_after_forward with zb-v: torch looks for the weights",
    ),
    (
        {
            "layout": TENSOR | ALONE,
            "optimizer": "momentum",
            "precision": "fp32",
            "options": {"optimizer_step": "foreach"},
        },
        "optimizer=momentum without shards",
    ),
    ({"layout": TENSOR, "optimizer": "sgd"}, "optimizer_step=fused: torch 2.13 has no fused SGD"),
    ({"layout": TENSOR | {"data_shards": 1}, "precision": "fp32"}, "data_shards=1: every GPU has the whole"),
    ({"layout": {"context_parallel": 2, "context_comm": "all-gather"}}, "context_parallel=2: the script"),
]


@pytest.mark.parametrize(("given", "message"), REFUSALS)
def test_what_the_script_cannot_do_is_refused(given: dict[str, Any], message: str) -> None:
    found = problems(subject(**given))
    assert any(message in str(problem) for problem in found), found


def test_what_is_named_instead_can_be_said() -> None:
    for given, message in REFUSALS:
        one = next(problem for problem in problems(subject(**given)) if message in str(problem))
        changed = dict(given)
        for name, value in one.instead.items():
            if name == "option":
                changed["options"] = given.get("options", {}) | value
            elif name in Layout.__dataclass_fields__:
                changed["layout"] = given["layout"] | {name: value}
            else:
                changed[name] = value
        if one.instead:
            left = problems(subject(**changed))
            assert not any(message in str(problem) for problem in left), (given, one.instead, left)


def test_releases_that_keep_all_logits_are_refused_for_pipelines() -> None:
    one = subject(layout=PIPELINE)
    assert any_export(one, "pytorch", "2.10").version == "2.10"
    with pytest.raises(NotExpressible, match=r"torch 2\.9 keeps the logits of all micro-batches"):
        any_export(one, "pytorch", "2.9")
    assert any_export(subject(layout=TENSOR), "pytorch", "2.6").version == "2.6"


@pytest.mark.parametrize("name", [NASTY, "--steps", "\x00\x1b[31m"])
def test_no_name_becomes_code(name: str) -> None:
    usual = subject(layout=TENSOR | PIPELINE)
    model = usual.model.model_copy(update={"name": name})
    plan = usual.plan.model_copy(update={"model": name, "warnings": (name,), "assumptions": (name, NASTY)})
    text = script(Subject(model, usual.cluster, plan))
    assert literals(text)["PLAN"]["name"] == name
    ours, other = ast.parse(text).body, ast.parse(script(usual)).body
    assert [ast.dump(one) for one in ours if not isinstance(one, ast.Assign)] == [
        ast.dump(one) for one in other if not isinstance(one, ast.Assign)
    ]


def random_plans(count: int) -> list[Subject]:
    """Plans of random models and layouts that the planner accepts."""
    choose, found = random.Random(5), list[Subject]()
    pick = choose.choice
    while len(found) < count:
        tensor, pipeline, data = pick([1, 2, 4]), pick([1, 2, 4]), pick([1, 2, 4])
        schedule = pick([*SCHEDULES, "1f1b"]) if pipeline > 1 else "1f1b"
        micro = pick([1, 2])
        layout = {
            "tensor_parallel": tensor,
            "pipeline_parallel": pipeline,
            "data_parallel": data,
            "sharding": "fsdp" if data > 1 else "ddp",
            "data_shards": data if data < 4 else pick([2, 4]),
            "micro_batch_size": micro,
            "grad_accum": pick([1, 4, 6]),
            "schedule": schedule,
            "chunks": 2 if schedule in ("interleaved", "zb-v") else 1,
            "reshard_after_forward": data == 1 or (schedule != "zb-v" and choose.random() < 0.7),
            "sequence_parallel": tensor > 1 and choose.random() < 0.7,
        }
        name = pick(["llama-3.1-8b", "llama-2-7b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "qwen3-0.6b"])
        depth = ModelSpec.from_catalog(name).num_hidden_layers
        uneven = pipeline == 2 and layout["chunks"] == 1 and choose.random() < 0.5
        try:
            one = subject(
                name,
                pick(["none", "full", "full:2"]) if schedule != "zb-v" else "none",
                (depth // 2 + 1, depth - depth // 2 - 1) if uneven else None,
                layout,
                {"root": pick(["one", "split"]), "optimizer_step": pick(["fused", "foreach"])},
                global_batch_size=data * micro * layout["grad_accum"],
                precision=pick(["bf16", "pure-bf16", "fp32"] if data > 1 else ["pure-bf16", "fp32", "tf32"]),
            )
        except PlannerError:
            continue
        found.append(one)
    return found


def test_most_random_plans_are_scripts_that_say_what_they_are() -> None:
    plans, expressible = random_plans(100), 0
    for one in plans:
        assert one.model.model_type in FAMILIES
        if refused := problems(one):
            assert all(len(str(reason)) > 30 for reason in refused)
            continue
        expressible += 1
        text, layout = script(one), one.layout
        compile(text, "train.py", "exec")
        plan = literals(text)["PLAN"]
        axes = [layout.pipeline_parallel, layout.data_parallel // layout.data_shards, layout.data_shards]
        sizes = [size for size in (*axes, layout.tensor_parallel) if size > 1]
        if layout.tensor_parallel * layout.pipeline_parallel > 1:
            assert list(plan["mesh"].values()) == sizes
            layers = [list(range(*ends)) for ends in plan["layers"]]
            assert [one for own in layers for one in own] == list(range(one.model.num_hidden_layers))
            if layout.pipeline_parallel > 1:
                assert layers == stage_layers(one)
        count = sum(sum(stage.rows.get("full", ())) for stage in one.plan.stages)
        if layout.chunks == 1:
            assert len(plan["recompute"]) == count
        assert ("fully_shard(" in text) == (layout.data_parallel > 1)
        assert ("SequenceParallel(sequence_dim=2" in text) == (
            one.model.qk_norm and layout.tensor_parallel > 1
        )
    assert expressible > 0.6 * len(plans), expressible
