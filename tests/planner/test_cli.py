"""The command line as people and pipelines meet it: answers, exit status, and wrong inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planner.cli import app
from tests.helpers import LLAMA

RUNNER = CliRunner()
SMALL = ["--model", "gpt2-small", "--gpus", "2xA100", "--global-batch-size", "8"]


def run(*arguments: str) -> Any:
    result = RUNNER.invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def test_search_says_the_answer_first_and_the_proof_last() -> None:
    result = run("search", *SMALL)
    assert result.exit_code == 0
    lines = result.output.strip().splitlines()
    assert lines[0].startswith("gpt2-small fits on 2 x A100-SXM-80GB as TP")
    assert "proved optimal" in " ".join(lines[-2:])
    assert "Assumed" in result.output


@pytest.mark.parametrize("command", ["search", "estimate", "explain", "compare"])
def test_json_is_alone_on_standard_output(command: str) -> None:
    document = json.loads(run(command, *SMALL, "--json").stdout)
    assert document["schema"].startswith("planner.")


def test_json_of_search_has_the_promised_fields() -> None:
    document = json.loads(run("search", *SMALL, "--json").stdout)
    assert {"schema", "model", "cluster", "training", "assumptions", "plans", "proof"} <= set(document)
    assert document["model"]["num_parameters"] == 124_439_808
    plan = document["plans"][0]
    wanted = {
        "layout",
        "verdict",
        "fits",
        "peak_bytes",
        "least_bytes",
        "most_bytes",
        "capacity_bytes",
        "step_time_s",
        "tokens_per_s",
        "mfu",
        "bubble_fraction",
        "stages",
    }
    assert wanted <= set(plan)
    stage = plan["stages"][0]
    assert {"layers", "recompute", "peak_bytes", "moment", "components"} <= set(stage)
    parts = [
        "parameters",
        "gradients",
        "optimizer_states",
        "activations",
        "workspace",
        "logits",
        "communication_buffers",
        "framework_overhead",
    ]
    assert list(stage["components"]) == parts


def test_explain_lists_terms_whose_sum_is_the_peak() -> None:
    document = json.loads(run("explain", *SMALL, "--json").stdout)
    held = sum(entry["held"] for entry in document["entries"])
    assert held == pytest.approx(document["plan"]["peak_bytes"], abs=2)
    text = run("explain", *SMALL, "-v").output
    assert "x batch 1 x seq 1,024" in text
    assert "1/2" in text  # ZeRO-1 on two GPUs


HIDING = [("all_gather", "layer"), ("reduce_scatter", ""), ("reduce_scatter", "layer")]


def test_explain_lists_messages_with_what_hides_them() -> None:
    """TP8 PP2 of LLaMA-65B: per block and micro-batch four gathers of bsh, exposed, and two behind the layer;
    of the four reductions the two of the backward are behind the weights' products."""
    arguments = ["--model", "llama-65b", "--gpus", "64x80G", "-tp", "8", "-pp", "2", "-b", "512"]
    messages = json.loads(run("explain", *arguments, "--json").stdout)["messages"]
    found = {(m["kind"], m["layer"], m["axis"], m["behind"]): m for m in messages}
    gathers = found["all_gather", "block", "tensor", ""]
    assert (gathers["count"], gathers["size"], gathers["gpus"]) == (160, 2 * 2048 * 8192, 8)
    counts = [found[kind, "block", "tensor", behind]["count"] for kind, behind in HIDING]
    assert counts == [80, 80, 80]
    gradients = found["reduce_scatter", "block", "data", "backward"]
    per_layer = 4 * (4 * 8192**2 + 3 * 8192 * 22016) / 8 + 4 * 2 * 8192
    assert (gradients["count"], gradients["size"], gradients["per"]) == (40, per_layer, "step")
    assert found["send", "stage", "pipeline", ""]["size"] == 2 * 2048 * 8192 / 8


def test_compare_has_every_strategy() -> None:
    names = [row["strategy"] for row in json.loads(run("compare", *SMALL, "--json").stdout)["rows"]]
    for name in (
        "DDP",
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-3",
        "FSDP",
        "TP2",
        "PP2 1F1B",
        "PP2 GPipe",
        "PP2 PipeDream",
    ):
        assert name in names


def test_compare_exits_1_if_nothing_fits_and_2_if_nothing_can_be() -> None:
    assert run("compare", "--model", "llama-65b", "--gpus", "2xV100").exit_code == 1
    assert run("compare", *SMALL, "-mb", "3").exit_code == 2


def test_a_schedule_asked_for_is_the_only_one_searched() -> None:
    arguments = ["--model", "gpt2-small", "--gpus", "4xA100", "-b", "32", "--json", "-n", "50"]
    for schedule, chunks in (("interleaved", {2, 3, 4, 6, 7}), ("gpipe", {1}), ("1f1b", {1})):
        plans = json.loads(run("search", *arguments, "--schedule", schedule).stdout)["plans"]
        layouts = [plan["layout"] for plan in plans]
        assert {layout["schedule"] for layout in layouts} == {schedule}
        assert {layout["chunks"] for layout in layouts} <= chunks
        assert all(layout["pipeline_parallel"] > 1 or schedule == "1f1b" for layout in layouts)


def test_layers_per_stage_are_taken_as_given() -> None:
    arguments = ["--model", "gpt2-small", "--gpus", "2xA100", "-pp", "2", "-b", "8", "--json"]
    for given, expected in ((["--layers-per-stage", "7,5"], [7, 5]), ([], [6, 6])):
        stages = json.loads(run("estimate", *arguments, *given).stdout)["plans"][0]["stages"]
        assert [stage["layers"] for stage in stages] == expected


def test_what_must_not_be_overlooked_is_a_warning() -> None:
    base = ["--model", "llama-65b", "--gpus", "16x80G", "-b", "64"]
    warnings = {
        "leaves its node": ["-tp", "16"],
        "beyond the model's 2048 positions": ["-tp", "8", "-s", "4096"],
    }
    for part, arguments in warnings.items():
        assert f"{part}" in run("estimate", *base, *arguments).output, part
    # What tensors need leaves too little for the most that may lie outside them.
    at_risk = run("estimate", *base, "-tp", "8", "-pp", "2").output
    assert "at risk: it depends on what lies outside tensors" in " ".join(at_risk.split())
    assert "at risk" not in run("search", *base).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--framework hf --sharding zero1", "hf does not run zero1: use ddp, or framework deepspeed"),
        ("--framework hf --sharding fsdp", "hf does not run fsdp: use ddp, or framework fsdp"),
        ("--framework hf -tp 2", "use tensor_parallel 1, or framework megatron"),
        (
            "--framework deepspeed -tp 8 --option kernels=hf",
            "or framework deepspeed with option kernels=megatron",
        ),
        ("--sharding zero3", "does not run zero3: use ddp, zero1, zero2, fsdp, or framework deepspeed"),
        ("--sharding fsdp -pp 2", "use pipeline_parallel 1, ddp, zero1, or framework torchtitan"),
        (
            "--framework deepspeed -pp 2 --attention sdpa",
            "1, or framework deepspeed with option kernels=megatron",
        ),
        (
            "--framework hf -pp 2",
            "hf runs ddp without a pipeline only: use pipeline_parallel 1, or framework",
        ),
    ],
)
@pytest.mark.parametrize("command", ["estimate", "explain"])
def test_what_a_framework_does_not_run_is_refused_with_what_does(
    command: str, arguments: str, said: str
) -> None:
    result = run(command, "--model", "llama-2-7b", "--gpus", "8x80G", *arguments.split())
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_deepspeed_runs_tensor_parallelism_and_pipelines_with_megatrons_kernels() -> None:
    """Nobody has to say so; and it is said."""
    arguments = ["--model", "llama-2-7b", "--gpus", "8x80G", "--framework", "deepspeed", "-b", "64", "--json"]
    for degrees in (["-tp", "8"], ["-pp", "2"], ["-tp", "2", "-pp", "2"]):
        found = json.loads(run("estimate", *arguments, *degrees).stdout)
        asked = json.loads(run("estimate", *arguments, *degrees, "--option", "kernels=megatron").stdout)
        assert found["plans"][0]["stages"] == asked["plans"][0]["stages"]
        assert "kernels megatron: those that deepspeed runs this layout with" in found["assumptions"]


@pytest.mark.parametrize("framework", ["megatron", "torchtitan", "fsdp", "deepspeed", "hf"])
def test_the_default_layout_is_one_that_the_framework_runs(framework: str) -> None:
    for gpus in ("1xH100", "8xH100"):
        result = run("estimate", "--model", "tinyllama-1.1b", "--gpus", gpus, "--framework", framework)
        assert result.exit_code == 0, result.output


def test_catalog_lists_and_shows_sources() -> None:
    assert "llama-65b" in run("catalog", "models").output
    assert "H100-SXM-80GB" in run("catalog", "gpus").output
    assert json.loads(run("catalog", "gpus", "h100", "--json").stdout)["gpus"][0]["source"]["peak_flops"]


def test_estimate_exits_1_when_the_layout_does_not_fit() -> None:
    result = run("estimate", "--model", "llama-65b", "--gpus", "8x80G", "-b", "8")
    assert result.exit_code == 1
    assert "does not fit" in result.output


def test_nothing_fits_exits_1_with_the_nearest_layout_and_three_changes_that_do_fit() -> None:
    result = run("search", "--model", "llama-65b", "--gpus", "8x80G", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    nearest = document["nearest"]
    assert (nearest["fits"], nearest["verdict"]) == (False, "does not fit")
    (stage,) = nearest["stages"]
    over = (stage["peak_bytes"] - stage["capacity_bytes"]) / 2**30
    assert f"at {stage['moment']} stage 0 takes {stage['peak_bytes'] / 2**30:.1f} GiB" in document["error"]
    assert f", {over:.2f} GiB over" in document["error"]
    assert f"optimizer states, {stage['components']['optimizer_states'] / 2**30:.2f} GiB" in document["error"]
    assert len(document["changes"]) >= 3
    for change in document["changes"]:
        option, value = change["option"].split(" ", 1)
        arguments = {"--gpus": "8x80G", option: value}
        flat = [part for pair in arguments.items() for part in pair]
        again = run("search", "--model", "llama-65b", *flat, "--json", "-n", "1")
        assert again.exit_code == 0, change
        best = json.loads(again.stdout)["plans"][0]
        assert best["fits"]
        assert best["step_time_s"] == pytest.approx(change["step_time_s"], rel=0.2)


def test_nothing_fits_in_words_too() -> None:
    result = run("search", "--model", "llama-65b", "--gpus", "8x80G")
    assert result.exit_code == 1
    assert result.output.startswith("llama-65b fits on none of ")
    assert "layouts of 8 x A100" in result.output
    assert "What would fit" in result.output


def test_a_nearest_layout_at_risk_is_said_to_be_no_sure_fit() -> None:
    arguments = ["--model", "gpt2-small", "--gpus", "1xA100", "-b", "1"]
    found = run("search", *arguments, "--objective", "headroom", "-n", "1", "--json").stdout
    (leanest,) = json.loads(found)["plans"]
    between = (leanest["least_bytes"] + leanest["most_bytes"]) // 2
    result = run("search", *arguments, "--memory-budget", f"{between}B", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["nearest"]["verdict"] == "at risk"
    assert document["error"].startswith("gpt2-small fits for sure on none of ")
    (stage,) = document["nearest"]["stages"]
    most = (stage["most_bytes"] - stage["capacity_bytes"]) / 2**30
    usual = (stage["peak_bytes"] - stage["capacity_bytes"]) / 2**30
    over = f"{usual:.2f}" if usual > 0 else f"up to {most:.2f}"
    assert f", {over} GiB over" in document["error"]


BAD = {
    "unknown model": (["--model", "lama-65", "--gpus", "8xH100"], ["'lama-65'", "llama-65b"]),
    "unknown GPU": (["--model", "gpt2", "--gpus", "8xH10O"], ["'H10O'", "did you mean"]),
    "memory nobody sells": (["--model", "gpt2", "--gpus", "8x81G"], ["81 GB", "80G"]),
    "no cluster": (["--model", "gpt2", "--gpus", "H100"], ["'H100'", "64x80G"]),
    "zero GPUs": (["--model", "gpt2", "--gpus", "0xH100"], ["at least 1 GPU"]),
    "absurdly many GPUs": (["--model", "gpt2", "--gpus", "999999999xH100"], ["num_gpus"]),
    "two pools": (["--model", "gpt2", "--gpus", "8xH100,8xA100"], ["one pool"]),
    "zero sequence": (
        ["--model", "gpt2", "--gpus", "1xH100", "--seq-length", "0"],
        ["--seq-length 0", "greater"],
    ),
    "negative batch": (["--model", "gpt2", "--gpus", "1xH100", "-b", "-4"], ["--global-batch-size -4"]),
    "absurd sequence": (["--model", "gpt2", "--gpus", "1xH100", "-s", "999999999999"], ["--seq-length"]),
    "too long for its positions": (["--model", "gpt2", "--gpus", "1xH100", "-s", "4096"], ["4096", "1024"]),
    "impossible batch": (
        ["--model", "gpt2", "--gpus", "7xH100", "-b", "3", "-tp", "1", "-pp", "1"],
        ["global_batch_size=3"],
    ),
    "a degree that does not divide": (
        ["--model", "gpt2", "--gpus", "8xH100", "-tp", "3"],
        ["tensor_parallel=3", "8 GPUs"],
    ),
    "degrees that are no numbers": (
        ["--model", "gpt2", "--gpus", "8xH100", "-tp", "two"],
        ["'two'", "whole numbers"],
    ),
    "unknown sharding": (["--model", "gpt2", "--gpus", "8xH100", "--sharding", "zero4"], ["zero4", "zero1"]),
    "unknown framework": (
        ["--model", "gpt2", "--gpus", "8xH100", "--framework", "megatorn"],
        ["megatorn", "megatron"],
    ),
    "unknown precision": (["--model", "gpt2", "--gpus", "8xH100", "--precision", "fp12"], ["fp12", "bf16"]),
    "no units for it": (["--model", "gpt2", "--gpus", "8xV100", "--precision", "bf16"], ["bf16", "fp16"]),
    "not an option of the stack": (
        ["--model", "gpt2", "--gpus", "8xH100", "--attention", "sdpa"],
        ["sdpa", "flash"],
    ),
    "a bare number of bytes": (
        ["--model", "gpt2", "--gpus", "8xH100", "--memory-budget", "72"],
        ["'72'", "72GiB"],
    ),
    "more than the card": (
        ["--model", "gpt2", "--gpus", "8xH100", "--memory-budget", "800GB"],
        ["800GB", "usable"],
    ),
    "all headroom": (["--model", "gpt2", "--gpus", "8xH100", "--headroom", "100%"], ["100%", "99%"]),
    "tokens in words": (["--model", "gpt2", "--gpus", "8xH100", "--tokens", "many"], ["'many'", "1.4T"]),
    "no objective": (["--model", "gpt2", "--gpus", "8xH100", "--objective", "joy"], ["joy", "headroom"]),
    "a micro-batch that does not divide": (
        ["--model", "gpt2", "--gpus", "8xH100", "-b", "64", "-mb", "3"],
        ["micro_batch_size=3", "does not divide the"],
    ),
    "degrees that do not multiply": (
        ["--model", "gpt2", "--gpus", "8xH100", "-tp", "4", "-pp", "4"],
        ["tensor_parallel 4", "do not multiply to the GPUs"],
    ),
    "contradicting options": (["--model", "gpt2", "--gpus", "8xH100", "-q", "-v"], ["contradict"]),
    "no time": (["--model", "gpt2", "--gpus", "8xH100", "--time-limit", "0"], ["time_limit=0"]),
    "memory without its unit": (["--model", "gpt2", "--gpus", "8x80"], ["80G"]),
    "no model": (["--model", "", "--gpus", "8xH100"], ["--model is empty"]),
    "flash attention before its time": (
        ["--model", "gpt2", "--gpus", "8xV100", "--attention", "flash"],
        ["V100", "eager"],
    ),
    "a family the stack lacks": (
        ["--model", "gpt2", "--gpus", "8xH100", "--framework", "torchtitan"],
        ["gpt2", "llama"],
    ),
    "no layouts wanted": (["--model", "gpt2", "--gpus", "8xH100", "-n", "0"], ["top=0"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_2_naming_value_rule_and_fix(case: str) -> None:
    arguments, parts = BAD[case]
    result = run("search", *arguments)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.output, result.output
    assert result.stdout == ""


BAD_LAYOUTS = {
    "more GPUs than there are": (["-tp", "4", "-pp", "4"], "8 GPUs"),
    "a degree that heads refuse": (["-tp", "8"], "use 1, 2, 3, 4, 6 or 12"),
    "a batch that does not divide": (["-mb", "3", "-b", "8"], "micro_batch_size=3"),
    "interleaving without stages": (["--schedule", "interleaved"], "pipeline_parallel 2 or more"),
    "more stages than layers": (["-pp", "8", "--chunks", "4"], "layers"),
    "unknown schedule": (["--schedule", "zigzag"], "zigzag"),
    "unknown sharding": (["--sharding", "zero9"], "zero9"),
    "unknown recompute": (["--recompute", "half"], "half"),
    "zero degrees": (["-tp", "0"], "1 or more"),
    "shards without sharding": (["--sharding", "ddp", "--data-shards", "4"], "belong to fsdp"),
    "interleaving nothing": (["-pp", "2", "--schedule", "interleaved"], "chunks 2 or more"),
    "layers that do not add up": (["-pp", "2", "--layers-per-stage", "6,7"], "add up to 12"),
    "layers for other stages": (["-pp", "2", "--layers-per-stage", "4,4,4"], "give 2 numbers"),
    "a product that does not divide": (["-tp", "3"], "their product must be one of 1, 2, 4, 8"),
    "shards that do not divide": (["--sharding", "fsdp", "--data-shards", "3"], "data_shards=3"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_a_bad_layout_exits_2_with_the_reason(case: str) -> None:
    arguments, part = BAD_LAYOUTS[case]
    result = run("estimate", "--model", "gpt2", "--gpus", "8xH100", *arguments)
    assert result.exit_code == 2, result.output
    assert part in result.output


HOSTILE: dict[str, tuple[Any, str]] = {
    "wrong type": (LLAMA | {"hidden_size": "256"}, "hidden_size"),
    "a bool for a number": (LLAMA | {"hidden_size": True}, "hidden_size"),
    "a list for a number": (LLAMA | {"num_key_value_heads": [4]}, "num_key_value_heads"),
    "huge number": (LLAMA | {"hidden_size": 10**30}, "hidden_size"),
    "negative number": (LLAMA | {"num_hidden_layers": -1}, "num_hidden_layers"),
    "zero heads": (LLAMA | {"num_attention_heads": 0}, "num_attention_heads"),
    "heads that do not divide": (LLAMA | {"num_attention_heads": 7}, "7 heads"),
    "kv heads that do not divide": (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    "missing key": ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "vocab_size is missing"),
    "unknown family": (LLAMA | {"model_type": "lllama"}, "lllama"),
    "family of another kind": (LLAMA | {"model_type": 7}, "model_type"),
    "no family": ({"hidden_size": 4}, "model_type"),
    "mixture of experts": (LLAMA | {"num_local_experts": 8}, "mixtures of experts"),
    "not an object": ([1, 2], "JSON object"),
    "infinity": (LLAMA | {"attention_dropout": float("inf")}, "attention_dropout"),
    "head size zero": (LLAMA | {"head_dim": 0}, "head_dim"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_exits_2_naming_the_key(case: str, tmp_path: Path) -> None:
    content, part = HOSTILE[case]
    (tmp_path / "config.json").write_text(json.dumps(content))
    result = run("search", "--model", str(tmp_path), "--gpus", "1xH100")
    assert result.exit_code == 2, result.output
    assert part in result.output, result.output
    assert len(result.output) < 1500


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("\x00\xff", "not JSON"),
        (" " * 2_000_000, "read up to"),
    ],
)
def test_what_is_not_json_exits_2(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    result = run("search", "--model", str(path), "--gpus", "1xH100")
    assert result.exit_code == 2
    assert part in result.output


def test_missing_files_and_folders_exit_2(tmp_path: Path) -> None:
    assert run("search", "--model", str(tmp_path / "no.json"), "--gpus", "1xH100").exit_code == 2
    assert run("search", "--model", str(tmp_path), "--gpus", "1xH100").exit_code == 2
    assert run("search", "--model", "x" * 5000, "--gpus", "1xH100").exit_code == 2


def test_a_good_config_and_its_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"auto_map": {"AutoModel": "evil.py"}}))
    for path in (tmp_path, tmp_path / "config.json"):
        assert run("search", "--model", str(path), "--gpus", "1xH100", "-b", "4").exit_code == 0


def planner(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from planner.cli import app; app()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_output_that_cannot_be_written_is_no_traceback() -> None:
    command = f"{sys.executable} -c 'from planner.cli import app; app()' search {' '.join(SMALL)} > /dev/full"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "cannot be written" in result.stderr


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -c 'from planner.cli import app; app()' catalog models | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr


def test_tables_fit_80_columns() -> None:
    for arguments in (["search", *SMALL], ["estimate", *SMALL], ["compare", *SMALL]):
        lines = planner(*arguments, COLUMNS="80").stdout.splitlines()
        assert max(map(len, lines)) <= 80, arguments


def test_no_colour_when_piped() -> None:
    assert "\x1b[" not in planner("search", *SMALL).stdout


def test_the_same_input_gives_the_same_output() -> None:
    first, second = (json.loads(planner("search", *SMALL, "--json").stdout) for _ in range(2))
    for document in (first, second):
        document["proof"].pop("seconds")
        for plan in document["plans"]:
            plan["proof"].pop("seconds")
    assert first == second


def test_help_teaches_with_examples() -> None:
    for command in ("search", "estimate", "explain", "compare", "catalog"):
        assert f"Example: planner {command}" in run(command, "--help").output


def test_explain_gives_the_formula_of_every_state() -> None:
    arguments = ["--model", "llama-65b", "--gpus", "64x80G", "-tp", "8", "-pp", "2", "-b", "512", "-v"]
    formulas = run("explain", *arguments).output.partition("bytes per element x lengths")[2]
    for unit in (2, 4, 12):  # weights, gradients, optimizer states
        assert f"block: gate weight = {unit} x hidden 8,192 x ffn 22,016" in formulas


def test_how_a_framework_is_told_to_shard_is_said() -> None:
    said = run("estimate", "--model", "llama-65b", "--gpus", "64x80G", "-tp", "8").output
    assert "zero1 is megatron's --use-distributed-optimizer" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--swiglu", "fused"], "swiglu=fused is not an option of deepspeed"),
        (["--option", "loss=parallel"], "use eager or fused or chunked"),
        (["--option", "kernels=megatron", "--option", "loss=chunked"], "use parallel or fused"),
        (["--option", "kernels=megatron", "--attention", "sdpa"], "use flash or eager"),
    ],
)
def test_deepspeed_offers_what_its_kernels_heed(options: list[str], said: str) -> None:
    result = run("estimate", "--model", "llama-2-7b", "--gpus", "8x80G", "--framework", "deepspeed", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def changes(*arguments: str) -> dict[str, dict[str, Any]]:
    result = run("search", *arguments, "--json")
    assert result.exit_code == 1
    return {change["option"]: change for change in json.loads(result.stdout)["changes"]}


def test_what_would_fit_is_what_the_framework_can_be_told() -> None:
    seven = ["--model", "llama-2-7b", "--gpus", "8x80G", "--framework", "hf"]
    assert {"--framework fsdp", "--framework deepspeed"} <= set(changes(*seven))
    alone = changes("--model", "llama-2-7b", "--gpus", "1x80G", "--framework", "hf")
    assert "--precision pure-bf16" in alone
    assert not [option for option in alone if "--framework" in option]
    for framework, offered in (("torchtitan", False), ("megatron", True)):
        one = ["--model", "tinyllama-1.1b", "--gpus", "1x80G", "--framework", framework, "-s", "512"]
        assert ("--optimizer-dtype bf16" in changes(*one, "--memory-budget", "18GiB")) == offered


# --- Defaults, files and readers that go away -----------------------------------------------------


def test_layers_go_on_stages_as_evenly_as_they_go() -> None:
    """Nobody configures 5 layers on one stage and 9 on another; the split is said where it is not even."""
    arguments = ["--model", "llama-3.1-405b", "--gpus", "128xH100", "-tp", "8", "-pp", "16", "-b", "64"]
    result = run("estimate", *arguments)
    assert "layers 7 8x14 7" in result.output
    assert "layers on the stages 7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7: as even" in " ".join(
        result.output.split()
    )
    assert "vocabulary padded from 128,256 to 129,024" in result.output
    asked = ",".join(["7", *["8"] * 14, "7"])
    assert "as even as they go" not in run("estimate", *arguments, "--layers-per-stage", asked).output


@pytest.mark.parametrize("given", ["ZeRO-2", "ZERO2", "zero2"])
def test_shardings_are_read_as_they_are_written(given: str) -> None:
    result = run("estimate", "--model", "gpt2-small", "--gpus", "2xA100", "--sharding", given, "--json")
    assert json.loads(result.stdout)["plans"][0]["layout"]["sharding"] == "zero2"


@pytest.mark.parametrize("schedule", ["gpipe", "pipedream", "interleaved"])
def test_a_schedule_without_a_pipeline_is_refused(schedule: str) -> None:
    result = run("estimate", "--model", "gpt2-small", "--gpus", "2xA100", "--schedule", schedule)
    assert result.exit_code == 2
    assert f"{schedule} schedule without a pipeline" in result.output


def test_a_schedule_that_the_framework_does_not_run_is_a_warning() -> None:
    arguments = ["--model", "gpt2-small", "--gpus", "2xA100", "-pp", "2", "--schedule", "gpipe"]
    assert "megatron is not known to run the gpipe schedule" in run("estimate", *arguments).output
    assert "not known" not in run("estimate", *arguments, "--framework", "torchtitan").output


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin"])
def test_what_is_no_regular_file_is_not_read(path: str) -> None:
    for arguments in (["estimate", "--model", path, "--gpus", "1xH100"], ["validate", "--runs", path]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "not a regular file" in result.output


def test_a_models_name_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    name = "x\r\x1b[2K\nx fits on 8 x H100: all good" + "y" * 5000
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"_name_or_path": name}))
    output = run("estimate", "--model", str(tmp_path), "--gpus", "1xH100").output
    assert "\x1b" not in output
    assert "\nx fits" not in output
    assert "y" * 100 not in output


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    config = LLAMA | {"quantization_config": {"load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("estimate", "--model", str(tmp_path), "--gpus", "1xH100")
    assert result.exit_code == 2
    assert "quantized weights are not planned" in result.output


@pytest.mark.parametrize("extra", [[], ["--json"]])
@pytest.mark.parametrize(("model", "status"), [("gpt2-small", 0), ("llama-65b", 1)])
def test_a_reader_that_goes_away_leaves_the_answers_exit_status(
    model: str, status: int, extra: list[str]
) -> None:
    command = [sys.executable, "-c", "from planner.cli import app; app()"]
    command += ["estimate", "--model", model, "--gpus", "1xA100", *extra]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (result.returncode, result.stderr) == (status, "")


def test_explain_says_what_it_explains() -> None:
    result = run("explain", "--model", "llama-65b", "--gpus", "8x80G", "-tp", "8", "-b", "64")
    assert result.output.startswith("llama-65b does not fit on 8 x A100-SXM-80GB as TP8 PP1 DP1")


def test_advice_leaves_out_frameworks_that_cannot_take_the_job() -> None:
    arguments = ["--model", "llama-2-13b", "--gpus", "1x24G", "-b", "2", "-s", "1024", "--framework", "hf"]
    result = run("search", *arguments, "--precision", "pure-bf16")
    assert result.exit_code == 1
    assert "fits on none" in result.output
