"""``planner validate`` as a command: what it prints, writes, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from planner import cli_validate

APP = typer.Typer()
APP.command()(cli_validate.validate)
RUNS = [
    {
        "id": f"mine-{number}",
        "group": "lab" if number else "shop",
        "kind": kind,
        "model": "llama-2-7b",
        "seq": 4096,
        "gpu": {"kind": "H100-SXM-80GB"},
        "gpus": 8,
        "framework": "megatron",
        "layout": {"data_parallel": 8, "micro_batch_size": 1, "grad_accum": 4, "sharding": "zero1"},
        "recompute": "none",
        **more,
    }
    for number, (kind, more) in enumerate(
        [
            ("peak", {"measured": {"gib": 61.0, "kind": "allocated"}}),
            ("oom", {}),
            ("ran", {"needs": ["LoRA"]}),
        ]
    )
]


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(RUNS))
    (tmp_path / "causes.json").write_text('{"mine-1": "somebody else was on the GPU"}')
    return str(file)


def run(*args: str) -> Any:
    return CliRunner().invoke(APP, args, env={"COLUMNS": "120"})


def test_tables_of_errors_verdicts_and_reasons(path: str) -> None:
    result = run("--runs", path)
    assert result.exit_code == 0
    for words in ("2 of 3 runs predicted; 1 cannot be", "allocated shop", "out of memory", "LoRA"):
        assert words in result.output


def test_json_has_every_comparison_and_every_reason(path: str) -> None:
    document = json.loads(run("--runs", path, "--json").output)
    assert document["schema"] == "planner.validate/1"
    assert [one["run"] for one in document["comparisons"]] == ["mine-0"]
    assert document["not_predicted"] == {"mine-2": ["LoRA"]}
    assert [one["ran_out"] for one in document["outcomes"]] == [False, True]


def test_a_page_is_written_with_causes(path: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert run("--runs", path, "--write", str(page)).exit_code == 0
    text = page.read_text()
    assert text.startswith("# How far predictions are off")
    outcome = "somebody else was on the GPU" in text
    assert outcome or "does not fit" in text


def test_runs_can_be_chosen(path: str) -> None:
    assert "1 of 1 runs predicted" in run("--runs", path, "--source", "SHOP").output
    assert "1 of 1 runs predicted" in run("--runs", path, "--kind", "allocated").output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--kind", "resident"), "use allocated, active, reserved"),
        (("--tier", "D"), "use A, B or C"),
        (("--worst", "-1"), "use a number"),
        (("--source", "nowhere"), "no run is left"),
        (("--write", "/nowhere/at/all.md"), "--write /nowhere"),
    ],
)
def test_what_cannot_be_asked_is_refused(path: str, args: tuple[str, ...], words: str) -> None:
    result = run("--runs", path, *args)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_a_file_that_is_not_there_is_refused() -> None:
    result = run("--runs", "none.json")
    assert result.exit_code == 2
    assert "no such file" in result.output


def test_without_the_repository_a_file_must_be_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli_validate, "HOME", tmp_path)
    result = run()
    assert result.exit_code == 2
    assert "come with its repository" in " ".join(result.output.split())
