"""The command line in the small: narrow terminals, wrong options, names, defaults."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planner import ModelSpec
from planner.catalog import host, load_gpu, names, step_time
from planner.cli import app
from planner.render import console_for, grid
from tests.helpers import LLAMA

RUNS = [
    {
        "id": f"a-run-with-a-long-name-{batch}x{8192 // batch}-on-one-node-of-eight",
        "source": "a log",
        "group": "somebody",
        "tier": "A",
        "kind": "peak",
        "model": "Llama-3.1-8B",
        "seq": 8192,
        "gpu": {"kind": "H100-SXM-80GB", "usable_gib": 79.1},
        "gpus": 8,
        "framework": "torchtitan",
        "precision": "bf16",
        "optimizer": "adamw",
        "options": {"compile": "off", "loss": "eager"},
        "layout": {
            "data_parallel": 8,
            "tensor_parallel": 1,
            "pipeline_parallel": 1,
            "micro_batch_size": batch,
            "grad_accum": 1,
            "sharding": "fsdp",
        },
        "recompute": "full",
        "measured": {"gib": 50.0, "kind": "reserved", "scope": "max"},
    }
    for batch in (1, 2)
]
COMMANDS = {
    "search": ["search", "-m", "llama-2-7b", "-g", "8x80G", "-n", "3"],
    "nothing fits": ["search", "-m", "llama-2-7b", "-g", "1x80G", "-b", "4"],
    "estimate": ["estimate", "-m", "llama-65b", "-g", "64x80G", "-tp", "4", "-pp", "8", "-b", "512"],
    "compare": ["compare", "-m", "llama-2-7b", "-g", "8x80G"],
    "explain": ["explain", "-m", "llama-2-7b", "-g", "8x80G", "-tp", "2", "-pp", "2"],
    "validate": ["validate", "--runs", "RUNS"],
    "infer": ["infer", "-m", "llama-3.1-405b", "-g", "8xH100", "-c", "32768"],
    "accelerate": ["infer", "-m", "llama-2-7b", "--accelerate"],
    "models": ["catalog", "models"],
    "gpus": ["catalog", "gpus"],
    "one model": ["catalog", "models", "llama-2-7b"],
    "one GPU": ["catalog", "gpus", "h100"],
}


def run(*arguments: str, columns: int = 100) -> Any:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def error_of(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return str(result.output)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_cell_of_a_table_is_cut_and_no_line_ends_in_blanks(command: str, tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(json.dumps(RUNS))
    arguments = [part.replace("RUNS", str(tmp_path / "runs.json")) for part in COMMANDS[command]]
    for columns in (60, 80, 100, 140):
        output = run(*arguments, columns=columns).stdout
        lines = output.splitlines()
        assert "…" not in output, (columns, output)
        assert max(map(len, lines)) <= columns, (columns, output)
        assert all(line == line.rstrip() for line in lines), (columns, output)
    assert "no room" not in output


def test_narrow_tables_leave_out_whole_columns_and_say_which() -> None:
    wide, narrow = (run(*COMMANDS["compare"], columns=columns).stdout for columns in (100, 60))
    assert "no room" not in wide
    assert "no room for work, comm" in narrow
    steps = re.findall(r"^ZeRO-\d.* ([\d.]+ s)$", wide, flags=re.M)
    assert re.findall(r"^ZeRO-\d.* ([\d.]+ s)$", narrow, flags=re.M) == steps
    assert len(steps) == 2
    assert re.search(r"^component ", run(*COMMANDS["explain"], columns=60).stdout, flags=re.M)


def test_columns_go_in_their_order_and_the_first_one_never(monkeypatch: pytest.MonkeyPatch) -> None:
    def headings(columns: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        table = grid("name", "size", "time", "note", left=("name", "note"), wrap=("note",), spare=("time",))
        table.add_row("a name", "1,234.5", "12.3 s", "a note of so many words that it wraps")
        console_for(stream := StringIO()).print(table)
        return stream.getvalue().splitlines()[0].split()

    assert headings(60) == headings(42) == ["name", "size", "time", "note"]
    assert headings(41) == headings(35) == ["name", "size", "note"]
    assert headings(34) == headings(14) == ["name", "size"]
    assert headings(13) == ["name"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["estimate", "-m", "gpt2", "-g", "1xH100", "--foo"], "--foo"),
        (["estimate", "-m", "gpt2", "-g", "1xH100", "-s", "abc"], "--seq-length"),
        (["estimate", "-g", "1xH100"], "--model"),
        (["search", "-m", "gpt2"], "--gpus"),
        (["validate", "--worst", "few"], "--worst"),
        (["serach"], "serach"),
        ([], "--json"),
    ],
)
def test_a_wrong_option_is_json_if_json_is_asked_for(arguments: list[str], part: str) -> None:
    result = run(*arguments, "--json")
    assert result.exit_code == 2
    assert part in json.loads(result.stdout)["error"]
    plain = run(*arguments) if arguments else run("--foo")
    assert (plain.exit_code, plain.stdout) == (2, "")
    assert "Error" in plain.stderr


def test_help_and_exit_statuses_are_the_same_with_json() -> None:
    assert "Usage: " in run("search", "--help", "--json").stdout
    assert run("compare", "--model", "llama-65b", "--gpus", "2xV100", "--json").exit_code == 1


def batch_of(*arguments: str) -> tuple[int, str]:
    result = run(*arguments, "--json")
    assert result.exit_code in (0, 1), result.output
    document = json.loads(result.stdout)
    (note,) = [note for note in document["assumptions"] if note.startswith("global batch")] or [""]
    return document["training"]["global_batch_size"], note


def test_a_batch_that_is_not_given_is_one_that_the_layout_divides() -> None:
    job = ["-m", "llama-3-8b", "-g", "8xH100"]
    usual, note = batch_of("estimate", *job)
    assert (usual, "whole micro-batches" in note) == (512, False)
    batch, note = batch_of("estimate", *job, "-mb", "3")
    assert batch == 504  # 21 x 24, nearer than 22 x 24
    assert note.startswith("global batch of 504 sequences")
    assert note.endswith("in whole micro-batches")
    assert batch_of("estimate", *job, "-mb", "3", "-tp", "8")[0] == 513
    # Interleaving needs a multiple of the stages of micro-batches.
    assert batch_of("estimate", *job, "-mb", "3", "-tp", "2", "-pp", "4", "--chunks", "2")[0] == 516
    assert batch_of("search", *job, "-mb", "3", "-n", "1")[0] == 504
    assert "use a multiple of 24" in error_of("estimate", *job, "-mb", "3", "-b", "512")
    assert batch_of("estimate", *job, "-mb", "3", "-b", "48") == (48, "")


def test_compare_takes_a_batch_that_every_strategy_divides() -> None:
    rows = json.loads(run("compare", "-m", "gpt2", "-g", "8xH100", "-mb", "3", "--json").stdout)["rows"]
    plans = [row["plan"] for row in rows if "plan" in row]
    assert len(plans) >= 8
    (batch,) = {plan["training"]["global_batch_size"] for plan in plans}
    assert batch % 24 == 0


QWEN3 = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
}
"""Parameters that transformers 5.23.0 counts, of modules built from each config on the meta device."""


@pytest.mark.parametrize("size", QWEN3)
def test_qwen3_is_in_the_catalog(size: str) -> None:
    for name in (f"qwen3-{size.lower()}", f"Qwen/Qwen3-{size}"):
        model = ModelSpec.from_catalog(name)
        assert model.num_parameters == QWEN3[size]
        assert (model.qk_norm, model.qkv_bias, model.max_position_embeddings) == (True, False, 40960)
        assert f"Qwen/Qwen3-{size} config.json" in model.source


def config(tmp_path: Path, name: str = "config.json", **more: Any) -> str:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(LLAMA | more))
    return str(tmp_path / name)


def test_a_model_that_is_not_known_is_told_apart_from_one_that_is_near(tmp_path: Path) -> None:
    assert "give the config.json" in error_of("estimate", "-m", "mixtral-9x9b", "-g", "8xH100")
    assert "config.json" not in error_of("estimate", "-m", "gpt2", "-g", "8xH10O")
    olmoe = config(tmp_path, model_type="olmoe", num_key_value_heads=4)
    found = error_of("estimate", "-m", olmoe, "-g", "8xH100")
    assert "query and key norms of olmoe's kind" in found
    assert "use --framework fsdp, deepspeed or hf" in found.replace("\n", " ")
    assert "did you mean" not in found
    found = error_of("estimate", "-m", config(tmp_path, model_type="granite"), "-g", "8xH100")
    assert "did you mean" not in found
    assert "llama, mistral, qwen2, qwen3, gpt2, gpt_neox, opt, bloom" in found
    found = error_of("estimate", "-m", config(tmp_path, model_type="phi33"), "-g", "8xH100")
    assert "did you mean" not in found
    assert "llama, mistral, ministral, qwen2" in found


def test_a_framework_that_lacks_the_family_names_all_that_have_it() -> None:
    found = error_of("estimate", "-m", "gpt-neox-20b", "-g", "8xH100", "--framework", "torchtitan")
    assert "use --framework megatron, fsdp, deepspeed or hf" in found


def test_a_model_from_a_file_has_the_files_name_or_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    assert ModelSpec.from_hugging_face(config(folder)).name == "mine"
    assert ModelSpec.from_hugging_face(folder).name == "mine"
    assert ModelSpec.from_hugging_face(config(folder, "a-7b.json")).name == "a-7b"
    assert ModelSpec.from_hugging_face(config(folder, "b-7b.json", _name_or_path="b")).name == "b"
    monkeypatch.chdir(folder)
    assert ModelSpec.from_hugging_face("config.json").name == "mine"
    assert ModelSpec.from_hugging_face(".").name == "mine"


def test_no_answer_within_the_time_limit_has_a_status_of_its_own() -> None:
    arguments = ["search", "-m", "gpt2", "-g", "8xH100", "--time-limit", "1e-9"]
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "--time-limit" in result.stderr
    result = run(*arguments, "--json")
    assert result.exit_code == 3
    assert "--time-limit" in json.loads(result.stdout)["error"]


def test_a_moment_may_be_in_any_case() -> None:
    job = ["explain", "-m", "gpt2", "-g", "1xH100", "-b", "8", "--moment"]
    assert run(*job, "Optimizer Step").stdout == run(*job, "optimizer step").stdout


def test_an_entry_of_the_catalog_is_a_table_with_sources_unless_json_is_asked_for() -> None:
    lines = run("catalog", "gpus", "h100").stdout.splitlines()
    assert lines[0].split() == ["field", "value"]
    assert any(line.split() == ["peak_flops.bf16", "989.4", "TFLOP/s"] for line in lines)
    assert any(line.startswith("achievable.matmul     measured: 794.5 of 989 TFLOPS") for line in lines)
    assert "arXiv:2505.09388" in run("catalog", "models", "qwen3-8b").stdout
    document = json.loads(run("catalog", "gpus", "h100", "--json").stdout)
    assert document["gpus"][0]["peak_flops"]["bf16"] == 989.4e12


def test_chunks_that_no_schedule_takes_are_bad_input() -> None:
    for schedule, chunks in (("interleaved", "1"), ("zb-v", "3"), ("1f1b", "2")):
        search = ["search", "-m", "llama-2-13b", "-g", "16xA100", "--schedule", schedule, "--chunks", chunks]
        found = CliRunner().invoke(app, search)
        assert found.exit_code == 2
        assert f"schedule {schedule} with chunks {chunks}: interleaved takes 2 or more" in found.stderr


def test_every_source_of_the_catalog_says_what_it_is() -> None:
    for name in names("gpus"):
        gpu = load_gpu(name)
        for figure in (*gpu.achievable.values(), *gpu.latency_s.values(), *gpu.attention.values()):
            assert figure.source.split(":")[0].split(" ")[0] in (
                "measured",
                "assumed",
                "fitted",
                "published",
            ), name
    for read, parts in ((host, ("launch_s", "blocked_launch_s")), (step_time, ("least", "most", "tie"))):
        assert all(read(part).source.startswith("fitted") for part in parts)
