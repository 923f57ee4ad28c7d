"""The planner against PyTorch itself: real modules on fake CUDA tensors, of shapes used nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from planner import TrainingSpec
from planner.cli_measure import measure as command
from planner.errors import InputError
from planner.measure import Comparison, config_values, measure, spec_of
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


@pytest.mark.slow
def test_tensor_parallelism_shares_out_matrices_and_the_sequence() -> None:
    config = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 96}
    whole = trace(Run(config, 3, SEQ))
    half = trace(Run(config, 3, SEQ, parallel="tensor", gpus=2))
    assert half.states["param"] == pytest.approx(whole.states["param"] / 2, rel=1e-2)
    assert whole.saved_bytes / 2 < half.saved_bytes < whole.saved_bytes


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
        ({"layout": Layout(tensor_parallel=2)}, "sequence parallelism"),
        ({"training": TrainingSpec(framework="megatron")}, "use fsdp or hf"),
        ({"recompute": "selective"}, "use none or full"),
        ({"layers": 0}, "use 1 to 1000"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_can(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(LLAMA, **({"training": training()} | change))


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
