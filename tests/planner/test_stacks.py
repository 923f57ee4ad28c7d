"""The frameworks' tables: options, model states, kernels, and what only one of them allocates."""

from __future__ import annotations

from typing import Any

import pytest

from planner import InputError, Layout, ModelSpec, TrainingSpec
from planner.api import explain
from planner.defaults import resolve
from planner.ledger import Entry, tensor_entries, view
from planner.replay import StageReplay
from planner.stacks import STACKS
from planner.stages import price
from strategies.base import Role
from tests.helpers import block_of, gpt, job_of, llama, saved, states
from tests.planner.test_cli import run

MODEL = llama(4, 1024, 8, 8, vocab_size=32000)
BLOCK = 4 * 1024**2 + 3 * 1024 * 3072 + 2 * 1024


def refused(**training: Any) -> str:
    with pytest.raises(InputError) as error:
        job_of(MODEL, **training)
    return str(error.value)


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", STACKS)
def test_an_unknown_option_is_refused_with_those_there_are(framework: str) -> None:
    message = refused(framework=framework, options={"lossy": "yes"})
    assert f"lossy=yes is not an option of {framework}" in message
    for name in (*STACKS[framework].options, *STACKS[framework].sizes):
        assert name in message


@pytest.mark.parametrize("framework", STACKS)
def test_an_unknown_value_is_refused_with_those_there_are(framework: str) -> None:
    for name, values in STACKS[framework].options.items():
        message = refused(framework=framework, options={name: "best"})
        assert f"{name}=best is not offered by {framework}" in message
        for value in values:
            assert value in message
    for name in STACKS[framework].sizes:
        for value in ("many", "0", "-1", "nan", "inf"):
            message = refused(framework=framework, options={name: value})
            assert f"{name}={value}: write a number of elements" in message


@pytest.mark.parametrize("framework", STACKS)
def test_every_option_has_its_first_value_unless_told_otherwise(framework: str) -> None:
    stack = STACKS[framework]
    job = job_of(MODEL, framework=framework, seq_length=512)
    bf16 = stack.recipes["bf16"]
    offered = {k: values for k, values in stack.options.items() if stack.concerned(k, MODEL, bf16)}
    assert {name: job.training.options[name] for name in offered} == {
        name: values[0] for name, values in offered.items()
    }
    mixture = ModelSpec.from_catalog("deepseek-v3")
    for name, values in stack.options.items():
        model = MODEL if name in offered else mixture
        if name not in offered:
            given = {name: values[-1]}
            assert f"{name}={values[-1]}: " in refused(framework=framework, options=given)
        eight = {"precision": "fp8-tensorwise"} if stack.concerns.get(name) == "quantized_weights" else {}
        for value in values:
            given = {"framework": framework, "seq_length": 512, **eight}
            job = job_of(model, "8xH100", options={name: value}, **given)
            assert job.training.options[name] == value
            shown = any(f"{name} {value}" in note for note in job.assumptions)
            assert shown, (name, value, job.assumptions)


def test_an_option_with_a_name_of_its_own_may_be_given_twice_if_alike() -> None:
    job = job_of(MODEL, framework="hf", attention="eager", options={"attention": "eager"})
    assert job.training.attention == "eager"
    message = refused(framework="hf", attention="eager", options={"attention": "sdpa"})
    assert "attention=eager contradicts option attention=sdpa" in message
    message = refused(swiglu="fused", options={"swiglu": "unfused"})
    assert "swiglu=fused contradicts option swiglu=unfused" in message
    assert job_of(MODEL, swiglu="unfused").training.options["swiglu"] == "unfused"


BAD_OPTIONS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "not an option": (["lossy=yes"], [], ["lossy=yes is not an option of megatron", "loss"]),
    "not a value": (["loss=none"], [], ["loss=none is not offered by megatron", "parallel or fused"]),
    "no value": (["loss"], [], ["--option 'loss'", "NAME=VALUE"]),
    "an empty value": (["loss="], [], ["NAME=VALUE"]),
    "no name": (["=fused"], [], ["NAME=VALUE"]),
    "twice, unlike": (
        ["loss=fused", "loss=parallel"],
        [],
        ["--option loss is given twice: fused and parallel"],
    ),
    "against another": (["attention=eager"], ["--attention", "flash"], ["attention=flash contradicts"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_exits_2_with_the_fix(case: str) -> None:
    options, flags, parts = BAD_OPTIONS[case]
    flags = [*flags, *(word for option in options for word in ("--option", option))]
    result = run("estimate", "--model", "gpt2", "--gpus", "8xH100", *flags)
    assert result.exit_code == 2, result.output
    flat = " ".join(result.output.split())
    for part in parts:
        assert part in flat, flat


def test_an_option_on_the_command_line_selects_rows() -> None:
    arguments = ["--model", "gpt2", "--gpus", "1xH100", "-b", "1", "--moment", "loss", "--json"]
    names = {}
    for loss in ("parallel", "fused"):
        result = run("explain", *arguments, "--option", f"loss={loss}", "--option", f"LOSS={loss}")
        assert result.exit_code == 0, result.output
        names[loss] = "probabilities of the loss" in result.output
    assert names == {"parallel": True, "fused": False}


# --- Model states ---------------------------------------------------------------------------------


def per_parameter(framework: str, sharding: str, degree: int = 8, **training: Any) -> dict[Role, float]:
    """Bytes per parameter of a block's states on one GPU."""
    job = job_of(MODEL, framework=framework, seq_length=512, **training)
    layout = Layout(data_parallel=degree, sharding=sharding)
    return {role: size / BLOCK for role, size in states(block_of(job), layout).items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_deepspeed_cuts_twelve_bytes_a_parameter_from_stage_1_on(precision: str) -> None:
    """Master and both moments; weights and gradients in two bytes."""
    cut = {
        "ddp": (2, 2, 12),
        "zero1": (2, 2, 12 / 8),
        "zero2": (2, 2 / 8, 12 / 8),
        "zero3": (2 / 8, 2 / 8, 12 / 8),
    }
    for sharding, expected in cut.items():
        found = per_parameter("deepspeed", sharding, precision=precision)
        assert tuple(found.values()) == pytest.approx(expected), sharding


@pytest.mark.parametrize(
    ("framework", "sharding", "copied"),
    [
        ("deepspeed", "ddp", 4 + 4),  # one by one, then in one piece
        ("deepspeed", "zero1", (2 + 4) / 8),  # in one piece first
        ("deepspeed", "zero2", (2 + 4) / 8),
        ("deepspeed", "zero3", (2 + 4) / 8),
        ("megatron", "ddp", 4),
        ("megatron", "zero1", 4 / 8),
    ],
)
def test_the_step_copies_half_precision_gradients_beside_its_master(
    framework: str, sharding: str, copied: float
) -> None:
    layout = Layout(data_parallel=8, sharding=sharding)
    both = framework == "megatron" or sharding in ("zero1", "zero2")
    for dtype in ("bf16", "fp32")[: 1 + both]:
        found = entries_of(layout=layout, framework=framework, gradient_dtype=dtype)
        sizes = {at: held(entries, "copies of gradients") for at, entries in found.items()}
        expected = copied * MODEL.num_parameters if dtype == "bf16" else 0
        assert sizes.pop("optimizer step") == pytest.approx(expected)
        assert not any(sizes.values())


def test_deepspeeds_fp32_accumulation_keeps_both_gradients_whole() -> None:
    """2 + 2 + 4 bytes whole, master and moments cut: 8 + 12/d."""
    found = per_parameter("deepspeed", "zero1", precision="bf16", gradient_dtype="fp32")
    assert found[Role.PARAMETER] == 2
    assert found[Role.GRADIENT] == 2 + 4
    assert sum(found.values()) == pytest.approx(8 + 12 / 8)


def test_deepspeed_in_fp32_keeps_a_master_copy_all_the_same() -> None:
    """runtime/zero/stage_1_and_2.py clones its part of the weights whatever their type."""
    found = per_parameter("deepspeed", "zero1", precision="fp32")
    assert tuple(found.values()) == pytest.approx((4, 4, 12 / 8))


@pytest.mark.parametrize(
    ("training", "offered"),
    [
        ({"precision": "bf16"}, ["zero1", "zero2", "zero3", "ddp"]),
        ({"precision": "bf16", "gradient_dtype": "fp32"}, ["zero1", "zero2"]),
        ({"precision": "fp32"}, ["zero1", "zero2"]),
    ],
)
def test_deepspeeds_engine_takes_some_recipes_under_zero_only(
    training: dict[str, str], offered: list[str]
) -> None:
    assert list(job_of(MODEL, framework="deepspeed", **training).stack.shardings) == offered


def test_deepspeeds_pipelines_without_zero_are_fp16s() -> None:
    """In bf16 they get an optimizer that shares states out (runtime/engine.py)."""
    kernels = {"framework": "deepspeed", "options": {"kernels": "megatron"}}
    for precision, pipelined in (("fp16", True), ("bf16", False)):
        stack = job_of(MODEL, precision=precision, **kernels).stack
        assert stack.shardings["ddp"] == pipelined
    with pytest.raises(InputError, match="takes precision=bf16"):
        job_of(MODEL, framework="deepspeed", precision="fp16", gradient_dtype="fp32")


def test_megatron_has_gradients_in_fp32_or_half_precision() -> None:
    assert tuple(per_parameter("megatron", "zero1").values()) == pytest.approx((2, 4, 12 / 8))
    lean = per_parameter("megatron", "zero1", gradient_dtype="bf16")
    assert tuple(lean.values()) == pytest.approx((2, 2, 12 / 8))


def test_plain_pytorch_keeps_fp32_throughout_under_mixed_precision() -> None:
    for framework in ("fsdp", "hf", "torchtitan"):
        found = per_parameter(framework, "fsdp")
        assert tuple(found.values()) == pytest.approx((4 / 8, 4 / 8, 8 / 8)), framework


# --- DeepSpeed's buffers and kernels --------------------------------------------------------------


def entries_of(
    model: ModelSpec = MODEL, layout: Layout = Layout(), gpus: str = "8xA100", stage: int = 0, **training: Any
) -> dict[str, list[Entry]]:
    """What a stage holds at each of its moments."""
    more = {"seq_length": 512, "global_batch_size": layout.global_batch_size} | training
    job = job_of(model, gpus, **more)
    prices = price(job, layout, ("none",))
    rows = [(int(prices.rows) // layout.pipeline_parallel,)] * layout.pipeline_parallel
    moments = StageReplay(prices, stage, rows).run().peaks()
    kept = {"recompute": "none", "stage": stage}
    return {
        moment: explain(model, job.cluster, job.training, layout, moment=moment, **kept).entries
        for moment in moments
    }


def held(entries: list[Entry], name: str) -> float:
    return sum(one.held for one in entries if name in one.name)


def test_deepspeeds_buckets_are_as_large_as_the_job_says() -> None:
    layout = Layout(data_parallel=8, sharding="zero1")
    for options, size in (({}, 5e8), ({"reduce_bucket_size": "2e6"}, 2e6)):
        found = entries_of(layout=layout, framework="deepspeed", options=options)
        assert held(found["backward"], "reduce bucket") == 2 * size


def test_zero3_gathers_no_more_than_deepspeeds_limits() -> None:
    layout = Layout(data_parallel=8, sharding="zero3")
    whole = entries_of(layout=layout, framework="deepspeed")["backward"]
    ahead = 5e7  # in one piece before it is copied out
    assert held(whole, "gathered parameters") == 2 * (MODEL.num_parameters + ahead)
    sizes = {"stage3_max_live_parameters": "3e6", "stage3_prefetch_bucket_size": "1e6"}
    limited = entries_of(layout=layout, framework="deepspeed", options=sizes)["backward"]
    assert held(limited, "gathered parameters") == 2 * (4e6 + 1e6)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["flash", "eager"])
def test_megatron_deepspeed_runs_megatrons_kernels(attention: str, policy: str) -> None:
    options = {"kernels": "megatron", "attention": attention, "swiglu": "fused"}
    for model in (MODEL, gpt(2, 1024, 16)):
        ours = block_of(job_of(model, framework="deepspeed", seq_length=512, options=options), 2)
        theirs = block_of(job_of(model, seq_length=512, attention=attention), 2)
        assert saved(ours, policy=policy) == saved(theirs, policy=policy)


def test_deepspeed_runs_transformers_modules_in_half_precision() -> None:
    ours = block_of(job_of(MODEL, framework="deepspeed", precision="bf16", seq_length=512), 2)
    theirs = block_of(job_of(MODEL, framework="hf", precision="pure-bf16", seq_length=512), 2)
    assert saved(ours) == saved(theirs)
    megatron = {"kernels": "megatron"}
    other = block_of(job_of(MODEL, framework="deepspeed", seq_length=512, options=megatron), 2)
    assert saved(other) < saved(ours)


# --- The optimizer step ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("framework", "precision", "moment", "layout"),
    [
        ("hf", "bf16", 4, Layout()),
        ("hf", "pure-bf16", 2, Layout()),
        ("fsdp", "bf16", 4, Layout(data_parallel=8, sharding="fsdp")),
        ("torchtitan", "bf16", 4, Layout(data_parallel=8, sharding="fsdp")),
    ],
)
def test_a_foreach_optimizer_makes_one_update_of_every_parameter(
    framework: str, precision: str, moment: int, layout: Layout
) -> None:
    parts = layout.data_parallel
    sizes = {}
    for step in ("fused", "foreach"):
        more = {"precision": precision, "options": {"optimizer_step": step}, "framework": framework}
        found = entries_of(layout=layout, gpus=f"{parts}xA100", **more)
        sizes[step] = {at: held(entries, "foreach optimizer") for at, entries in found.items()}
    assert not any(sizes["fused"].values())
    assert sizes["foreach"].pop("optimizer step") == pytest.approx(moment * MODEL.num_parameters / parts)
    assert not any(sizes["foreach"].values())


# --- Transformer Engine's stand-in gradients ------------------------------------------------------


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("layers", [4, 12])
def test_transformer_engine_keeps_one_stand_in_for_each_shape_of_weight(tensor: int, layers: int) -> None:
    """Per stage: query-key-value, attention output, gate and up, down; however many layers there are."""
    model = llama(layers, 1024, 8, 4, vocab_size=32000)
    shapes = 1024 * (1024 + 2 * 512) + 1024 * 1024 + 1024 * 2 * 3072 + 3072 * 1024
    layout = Layout(tensor_parallel=tensor, pipeline_parallel=2, grad_accum=2, sharding="ddp")
    for stage in (0, 1):
        found = entries_of(model, layout, f"{2 * tensor}xA100", stage)
        assert len(found) >= 4
        for moment, entries in found.items():
            of_stage = [one for one in entries if one.layer == "stage"]
            assert held(of_stage, "stand-in") == 2 * shapes / tensor, moment


def test_an_ungated_mlp_has_one_stand_in_before_its_activation() -> None:
    found = entries_of(gpt(4, 1024, 16), gpus="1xA100")["backward"]
    assert held(found, "stand-in") == 2 * 12 * 1024**2
    assert held(found, "stand-in gradient, up") == 2 * 4 * 1024**2


def test_without_transformer_engine_nothing_stands_in() -> None:
    """Unfused attention belongs to Megatron's local kernels: one buffer of scores for all layers."""
    found = entries_of(gpus="1xA100", attention="eager")["backward"]
    assert held(found, "stand-in") == 0
    assert held(found, "attention scores, shared") == 2 * 8 * 512**2


@pytest.mark.parametrize("attention", ["flash", "eager"])
def test_megatron_deepspeed_has_no_stand_ins_either(attention: str) -> None:
    """Transformer Engine is Megatron Core's; Megatron-DeepSpeed has the same layers without it."""
    options = {"kernels": "megatron", "attention": attention}
    for moment, entries in entries_of(framework="deepspeed", gpus="1xA100", options=options).items():
        assert held(entries, "stand-in") == 0, moment


# --- Tied embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("framework", "precision", "width"),
    [("hf", "pure-bf16", 2), ("hf", "bf16", 4), ("fsdp", "bf16", 2), ("torchtitan", "bf16", 2)],
)
def test_a_tied_weights_two_gradients_meet_at_the_end_of_the_backward(
    framework: str, precision: str, width: int
) -> None:
    """The head's waits for the look-up's, both as autograd makes them, and for their sum."""
    sharding = "ddp" if framework == "hf" else "fsdp"

    def tied_gradients(tied: bool, stages: int) -> dict[str, float]:
        """The most of them at each place of the first stage's step."""
        model = llama(2, 256, 4, 4, vocab_size=128256, tie_word_embeddings=tied)
        layout = Layout(pipeline_parallel=stages, grad_accum=stages, sharding=sharding)
        job = job_of(
            model,
            f"{stages}xA100",
            framework=framework,
            precision=precision,
            seq_length=64,
            global_batch_size=stages,
        )
        prices = price(job, layout, ("none",))
        rows = [(int(prices.rows) // stages,)] * stages
        stage = view(prices, rows, 0)
        most: dict[str, float] = {}
        for snapshot, _ in StageReplay(prices, 0, rows).run().snapshots:
            entries = tensor_entries(prices, stage, snapshot)
            size = sum(one.held for one in entries if one.name == "gradients of the tied weight")
            most[snapshot.place] = max(size, most.get(snapshot.place, 0.0))
        return most

    found = tied_gradients(True, 1)
    assert found.pop("end") == 2 * width * 128256 * 256
    assert len(found) >= 6
    assert not any(found.values())
    assert not any(tied_gradients(False, 1).values())
    # On stages of their own each has its gradient, and nothing is added up.
    assert not any(tied_gradients(True, 2).values())


# --- Precision ------------------------------------------------------------------------------------


def test_fp32_attention_takes_as_many_keys_and_values_as_queries() -> None:
    """The flash kernel knows no fp32: grouped keys and values are repeated, 2 sb(a - k)d more elements."""
    sizes = {}
    for kv in (2, 8):
        model = llama(2, 1024, 8, kv)
        for precision in ("pure-bf16", "fp32"):
            job = job_of(model, framework="hf", precision=precision, seq_length=512)
            sizes[precision, kv] = saved(block_of(job), without=("norm",))
    grouped = 2 * 512 * (8 - 2) * 128
    assert sizes["pure-bf16", 8] - sizes["pure-bf16", 2] == 2 * grouped
    assert sizes["fp32", 8] == sizes["fp32", 2]


def test_autocast_keeps_a_cast_copy_of_every_matrix_of_a_layer() -> None:
    job = job_of(MODEL, framework="hf", precision="bf16", seq_length=512)
    block = block_of(job)
    casts = saved(block) - saved(block, without=("weight, cast", "weights, cast"))
    assert casts == 2 * (BLOCK - 2 * 1024)
    for framework in ("fsdp", "torchtitan", "deepspeed"):
        other = block_of(job_of(MODEL, framework=framework, seq_length=512))
        assert not any("weight, cast" in term.name for term in other.terms)


def test_options_survive_a_plans_json() -> None:
    spec = TrainingSpec(framework="torchtitan", options={"loss": "compiled"})
    assert TrainingSpec.model_validate_json(spec.model_dump_json()) == spec
    job = resolve(MODEL, job_of(MODEL).cluster, spec)
    again = TrainingSpec.model_validate_json(job.training.model_dump_json())
    assert resolve(MODEL, job.cluster, again).training == job.training


def test_torchs_pipelines_hold_what_they_receive_of_every_micro_batch() -> None:
    """torch.distributed.pipelining, traced on 4 stages of 8 micro-batches: one stage input each, from behind
    only on the first stage, from both sides in the middle; the last one keeps its outputs instead."""
    job = job_of(llama(8), "4xH100", framework="torchtitan", seq_length=512, global_batch_size=8)
    layout = Layout(pipeline_parallel=4, grad_accum=8, sharding="fsdp")
    prices = price(job, layout, ("none",))
    once = 512 * job.model.hidden_size * 2
    for first, last, held in ((True, False, 8), (False, False, 16), (False, True, 16)):
        found = [b.size for b in prices.buffers(first, last) if "receives" in b.name]
        assert found == [held * once]
    megatron = price(job_of(llama(8), "4xH100", seq_length=512, global_batch_size=8), layout, ("none",))
    assert not any("receives" in b.name for b in megatron.buffers(True, False))
