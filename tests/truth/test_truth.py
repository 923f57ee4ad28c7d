"""The planner against PyTorch itself: real modules on fake CUDA tensors, of shapes used nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from planner import ClusterSpec, TrainingSpec
from planner.cli_measure import measure as command
from planner.defaults import resolve
from planner.errors import InputError
from planner.measure import Comparison, config_values, measure, spec_of
from planner.stages import price
from strategies.layout import Layout

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from planner.truth.runs import Run, Trace, trace  # noqa: E402

RUNNER = CliRunner()
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1088,
    "vocab_size": 3072,
    "max_position_embeddings": 1024,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral", "num_key_value_heads": 3, "sliding_window": None},
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 96},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 384,
        "n_layer": 3,
        "n_head": 6,
        "n_positions": 512,
        "vocab_size": 3072,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "vocab_size": 3072,
        "max_position_embeddings": 512,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 384,
        "word_embed_proj_dim": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "ffn_dim": 1536,
        "vocab_size": 3072,
        "max_position_embeddings": 512,
    },
}
SEQ = 256


def training(**more: Any) -> TrainingSpec:
    return TrainingSpec(**{"framework": "hf", "precision": "pure-bf16", "seq_length": SEQ} | more)


def run(family: str = "llama", **more: Any) -> Trace:
    return trace(Run(**{"config": SHAPES[family], "layers": 3, "seq_length": SEQ} | more))


def kept_by_seeds(found: Comparison) -> float:
    """Bytes of the random number generator's state that the flash kernel keeps: not modelled."""
    return sum(one.measured for one in found.kept if one.elements <= 2)


def fast(*names: str) -> list[Any]:
    """Families, those but the named ones marked slow."""
    return [pytest.param(one, marks=() if one in names else pytest.mark.slow) for one in SHAPES]


@pytest.mark.parametrize("family", fast("llama", "gpt2"))
def test_a_layer_keeps_what_the_planner_says_to_the_byte(family: str) -> None:
    found = measure(SHAPES[family], training())
    line = found.line("kept by one layer")
    assert line.measured - kept_by_seeds(found) == line.predicted


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_a_layer_keeps_the_same_with_eager_attention(family: str) -> None:
    # One sequence alone makes some views contiguous, and GPT-NeoX then keeps all of q, k and v for v.
    layout = Layout(micro_batch_size=2)
    line = measure(SHAPES[family], training(attention="eager"), layout).line("kept by one layer")
    assert line.predicted == line.measured


@pytest.mark.parametrize("family", fast("qwen2", "opt"))
def test_model_states_are_exact_but_for_the_allocators_rounding(family: str) -> None:
    found = measure(SHAPES[family], training())
    count = found.line("number of parameters")
    assert count.measured == count.predicted
    for name in ("parameters", "gradients", "optimizer states"):
        line = found.line(name)
        # Each small tensor takes 512 bytes, and AdamW keeps a step counter for every parameter.
        assert 0 <= line.measured - line.predicted < 2 * 512 * 3 * 20, name


@pytest.mark.parametrize("family", fast("llama"))
def test_checkpointing_keeps_the_input_of_a_layer_alone(family: str) -> None:
    config = SHAPES[family]
    hidden = config.get("hidden_size") or config["n_embd"]
    found = measure(config, training(), Layout(micro_batch_size=2), recompute="full")
    assert found.line("kept by one layer").measured == 2 * SEQ * 2 * hidden
    assert found.line("kept by one layer").predicted == 2 * SEQ * 2 * hidden


@pytest.mark.parametrize("family", fast("llama"))
def test_the_loss_needs_what_the_planner_says(family: str) -> None:
    line = measure(SHAPES[family], training(seq_length=512), Layout(micro_batch_size=4)).line("loss")
    assert line.predicted == pytest.approx(line.measured, rel=1e-3)


def test_fsdp_shares_out_states_and_frees_gathered_parameters() -> None:
    found = run(parallel="fsdp", gpus=4, precision="bf16")
    whole = run(precision="fp32", saved=False)
    for name in ("param", "grad", "opt"):
        assert found.states[name] == pytest.approx(whole.states[name] / 4, rel=2e-2), name
    assert found.phase_ends["loss"].get("gathered", 0) == 0
    assert found.phase_peaks["bwd"].by_category["gathered"] > 0
    assert not found.phase_ends["opt"].get("temp", 0)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt_neox", "opt"])
def test_fsdp_layers_are_exact_and_its_moments_near(family: str, recompute: str) -> None:
    fsdp = training(framework="fsdp", precision="bf16")
    found = measure(SHAPES[family], fsdp, Layout(data_parallel=4, sharding="fsdp"), recompute=recompute)
    line = found.line("kept by one layer")
    assert line.predicted == line.measured - (kept_by_seeds(found) if recompute == "none" else 0)
    assert found.line("loss").predicted == pytest.approx(found.line("loss").measured, rel=5e-3)
    assert found.line("backward").predicted == pytest.approx(found.line("backward").measured, rel=0.1)


@pytest.mark.slow
def test_fsdp_that_keeps_parameters_gathered_holds_all_of_them_after_the_forward() -> None:
    kept = run(parallel="fsdp", gpus=4, precision="bf16", reshard_after_forward=False)
    assert kept.phase_ends["loss"]["gathered"] == pytest.approx(2 * kept.n_params, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_accelerates_units_gather_less_at_the_loss_than_one_root(family: str) -> None:
    peaks = {
        name: run(family, parallel="fsdp", gpus=4, precision="bf16", wrapping=name, layers=4).moments["loss"]
        for name in ("blocks", "accelerate")
    }
    assert peaks["accelerate"] < peaks["blocks"]


@pytest.mark.slow
@pytest.mark.parametrize("views", [False, True])
def test_ddp_holds_its_buckets_beside_the_gradients_unless_they_are_views(views: bool) -> None:
    found = run(parallel="ddp", gpus=8, precision="fp32", gradient_as_bucket_view=views)
    copies = (found.states["grad"] + found.states["other"]) / (4 * found.n_params)
    assert copies == pytest.approx(1 if views else 2, rel=1e-2)


@pytest.mark.slow
def test_foreach_needs_one_more_copy_of_the_parameters_than_fused() -> None:
    peaks = {name: run(optimizer=name).moments["optimizer step"] for name in ("fused", "foreach")}
    copy = 2 * run().n_params
    assert peaks["foreach"] - peaks["fused"] == pytest.approx(copy, rel=2e-2)


BY_TWO = {"parallel": "fsdp", "gpus": 4, "tensor_parallel": 2, "precision": "bf16"}
"""FSDP over two and tensor parallelism over two."""


def test_tensor_parallelism_shares_out_matrices_the_sequence_and_the_vocabulary() -> None:
    half, whole = run(**BY_TWO), run(parallel="fsdp", gpus=2, precision="bf16")
    for name in ("param", "grad", "opt"):
        assert half.states[name] == pytest.approx(whole.states[name] / 2, rel=1e-2), name
    hidden, columns, vocabulary = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab_size"]
    lengths = {event.shape[-1] for event in half.events if event.shape}
    assert {columns // 2, vocabulary // 2} <= lengths
    assert not {columns, vocabulary} & lengths, "DTensor's shapes of whole tensors hold nothing"
    # What the norms make is cut; the inputs of the products, two in each block and the head's, are gathered.
    shapes = [one.shape for one in half.saved if one.shape[-1:] == (hidden,)]
    assert shapes.count((1, SEQ // 2, hidden)) == 2 * (2 * 3 + 1)
    assert shapes.count((SEQ, hidden)) == 2 * 3 + 1


def test_waiting_for_a_collective_copies_nothing() -> None:
    events = run(**BY_TWO, saved=False).events
    gathered = [event for event in events if event.op.startswith("_c10d_functional.all_gather")]
    assert gathered
    assert not [event for event in events if "wait_tensor" in event.op]


def test_tied_embeddings_stay_tied_under_tensor_parallelism() -> None:
    tied, own = (
        run("qwen2", config={**SHAPES["qwen2"], "tie_word_embeddings": tie}, saved=False, **BY_TWO)
        for tie in (True, False)
    )
    one = 4 * LLAMA["vocab_size"] * LLAMA["hidden_size"] / 4  # fp32, over four
    assert own.states["param"] - tied.states["param"] == pytest.approx(one, rel=1e-2)


@pytest.mark.slow
def test_without_fsdp_the_embeddings_gradient_stays_whole() -> None:
    """The look-up's backward is replicated; FSDP cuts it before it is reduced."""
    alone = run(gpus=2, tensor_parallel=2)
    half = LLAMA["vocab_size"] * LLAMA["hidden_size"]  # of bf16 elements
    assert alone.states["grad"] - alone.states["param"] == half


def test_tensor_parallelism_is_compared_with_fsdp_and_says_so() -> None:
    layout = Layout(data_parallel=2, tensor_parallel=2, sequence_parallel=True, sharding="fsdp")
    found = measure(LLAMA, training(framework="fsdp", precision="bf16"), layout)
    assert found.run.startswith("one of 4 GPUs, FSDP over 2, tensor and sequence parallelism over 2: ")
    assert "bf16 (fp32 weights)" in found.run
    assert any("loss parallelism" in note for note in found.notes)
    for name in ("parameters", "gradients", "optimizer states", "optimizer step"):
        assert found.line(name).predicted == pytest.approx(found.line(name).measured, rel=5e-3), name


def test_precisions_are_named_as_they_are_run() -> None:
    found = measure(LLAMA, training(precision="fp16"))
    assert "bf16 (fp32 weights)" in found.run
    assert "fp16 is run in bf16, which takes the same bytes" in found.notes
    assert "pure-bf16 (weights too)" in measure(LLAMA, training()).run


def test_the_process_ends_in_order_after_fsdp(tmp_path: Path) -> None:
    """C++ destroys what points to our tables after Python has freed its memory, here overwritten."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "num_hidden_layers": 1}))
    code = "import typer, planner.cli_measure as one; typer.run(one.measure)"
    options = ["--model", str(path), "--framework", "fsdp", "--gpus", "4", "--seq-length", "64"]
    result = subprocess.run(
        [sys.executable, "-c", code, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONMALLOC": "debug"},
    )
    assert "optimizer step" in result.stdout
    assert result.returncode == 0, result.stderr


def test_events_add_up_to_the_live_bytes_of_every_phase() -> None:
    found = run()
    live, peak = found.start, found.start
    for event in found.events:
        live += event.change
        peak = max(peak, live)
    assert live == found.phase_ends["opt"]["total"]
    assert peak == found.peak.total == max(found.moments.values())
    assert sum(one.size for one in found.peak.storages) == peak


def test_two_runs_agree_event_by_event() -> None:
    assert run(saved=False).events == run(saved=False).events


def test_listing_what_is_saved_changes_no_peak() -> None:
    assert run(saved=True).moments == run(saved=False).moments


def test_half_precision_attention_runs_in_the_flash_kernel_without_a_mask() -> None:
    ops = {event.op for event in run("llama", saved=False).events}
    assert "_scaled_dot_product_flash_attention.default" in ops
    assert not [op for op in ops if "softmax" in op and "log_softmax" not in op]


@pytest.mark.slow
def test_deep_models_are_extrapolated_and_say_so() -> None:
    deep = measure(LLAMA, training(), layers=48)
    assert "extrapolated to 48 layers" in deep.notes[0]
    whole = trace(Run(LLAMA, 48, SEQ))
    for name, size in whole.moments.items():
        if name != "forward":
            assert deep.line(name).measured == pytest.approx(size, rel=1e-4), name


@pytest.mark.parametrize("family", SHAPES)
def test_a_spec_builds_the_configuration_that_it_was_read_from(family: str) -> None:
    spec = spec_of(SHAPES[family])
    assert spec_of(config_values(spec)) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": Layout(pipeline_parallel=2)}, "pipelines"),
        ({"layout": Layout(data_parallel=4, sharding="zero1")}, "use ddp or fsdp"),
        ({"layout": Layout(tensor_parallel=2)}, "together with FSDP: use framework fsdp"),
        ({"layout": Layout(tensor_parallel=5)}, "does not divide heads=6"),
        ({"training": training(attention="flash")}, "attention=flash cannot be measured: use sdpa"),
        ({"training": TrainingSpec(framework="megatron")}, "use fsdp or hf"),
        ({"recompute": "selective"}, "use none or full"),
        ({"layers": 0}, "use 1 to 1000"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_can(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(LLAMA, **({"training": training()} | change))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, {"sequence_parallel": False}, "leave it on"),
        (LLAMA, {"attention": "eager"}, "without an attention mask"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": SEQ}, {}, "without an attention mask"),
        (SHAPES["gpt2"], {}, "models with Llama's modules"),
    ],
)
def test_tensor_parallelism_that_cannot_be_measured_is_refused(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    chosen = {
        "data_parallel": 2,
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "sharding": "fsdp",
    } | change
    job = training(framework="fsdp", precision="bf16", attention=chosen.pop("attention", None))
    with pytest.raises(InputError, match=message):
        measure(config, job, Layout(**chosen))


def test_code_of_a_configuration_is_not_run(tmp_path: Path) -> None:
    from planner.truth.models import build_config

    with pytest.raises(InputError, match="transformers itself has"):
        build_config({"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}})
    assert not hasattr(build_config({**LLAMA, "auto_map": {"AutoConfig": "evil.Config"}}), "auto_map")


def test_the_command_prints_both_columns_and_json(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    options = ["--model", str(path), "--seq-length", str(SEQ), "--precision", "pure-bf16"]
    shown = RUNNER.invoke(app, options)
    assert shown.exit_code == 0, shown.output
    assert "measured" in shown.output
    assert "exact" in shown.output
    result = RUNNER.invoke(app, [*options, "--json", "--layers", "2"])
    document = json.loads(result.stdout)
    assert document["schema"] == "planner.measure/1"
    assert document["layers"] == 2
    wrong = RUNNER.invoke(app, [*options, "--framework", "megatron"])
    assert wrong.exit_code == 2


@pytest.mark.parametrize(
    "options",
    ["-tp 2", "--framework hf -g 2 -tp 2", "--framework fsdp -g 2 -tp 2", "--framework fsdp -g 5 -tp 2"],
)
def test_every_wrong_group_is_answered_with_the_same_right_one(options: str) -> None:
    app = typer.Typer()
    app.command()(command)
    wrong = RUNNER.invoke(app, ["--model", "tinyllama-1.1b", *options.split()])
    assert wrong.exit_code == 2
    said = " ".join(wrong.output.split())
    assert "use --framework fsdp and --gpus 4 or another multiple of 2" in said


@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", fast("llama"))
def test_a_step_within_the_backward_holds_what_the_planner_says(family: str, recompute: str) -> None:
    found = run(family, optimizer="in_backward", recompute=recompute, saved=False, layers=None)
    assert found.states["grad"] == 0
    model = spec_of(SHAPES[family])
    options = {"optimizer_step": "in_backward"}
    job = resolve(model, ClusterSpec.parse("1xA100"), training(global_batch_size=1, options=options))
    stage = price(job, Layout(), [recompute]).spread().stages[0]
    moments = [
        model.num_hidden_layers * rows[0] + fixed + working[0]
        for rows, fixed, working in stage.moments.values()
    ]
    assert max(moments) == pytest.approx(found.peak.total, rel=5e-3)
