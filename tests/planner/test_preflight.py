"""Preflight: what is asked of an interpreter, and what is made of its answer."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planner import ClusterSpec, InputError, Layout, ModelSpec, TrainingSpec, document_of, estimate
from planner.cli import app
from planner.export import Export, Subject, export
from planner.preflight import PROBES, Preflight, preflight
from planner.rank_parameters import rank_parameters

MODEL, CLUSTER = ModelSpec.from_catalog("llama-2-7b"), ClusterSpec.parse("8xA100")
LAYOUT = Layout(2, 2, 2, grad_accum=16, sharding="zero1", sequence_parallel=True)


def subject() -> Subject:
    training = TrainingSpec(seq_length=4096, global_batch_size=32)
    return Subject(MODEL, CLUSTER, estimate(MODEL, CLUSTER, training, LAYOUT))


def interpreter(folder: Path, says: str, error: str = "") -> str:
    """A program in an interpreter's place: it keeps the case that it is given and says something."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\ncat > {folder}/case.json\ncat {folder}/says\ncat {folder}/error >&2\n")
    (folder / "says").write_text(says)
    (folder / "error").write_text(error)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def answer(one: Subject, **changed: Any) -> dict[str, Any]:
    counts = {str(4 * stage): [[rank_parameters(one, stage), 16]] for stage in (0, 1)}
    told = {
        "ok": True,
        "version": "0.19.2",
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "data_parallel_size": 2,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "micro_batch_size": 1,
        "micro_batches": 16,
        "global_batch_size": 32,
        "seq_length": 4096,
        "counts": counts,
    }
    return told | changed


def asked(folder: Path, **changed: Any) -> Preflight:
    one = subject()
    python = interpreter(folder, "noise\n" + json.dumps(answer(one, **changed)) + "\n")
    return preflight(one, export(one, "megatron"), python)


def test_the_plan_is_read(tmp_path: Path) -> None:
    found = asked(tmp_path)
    assert found.holds
    assert found.version == "megatron 0.19.2"
    names = [check.what for check in found.checks]
    assert names[-1] == "parameters of rank 4"
    [case] = json.loads((tmp_path / "case.json").read_text())
    assert case["world"] == 8
    assert case["ranks"] == [0, 4]
    assert "--tensor-model-parallel-size" in case["words"]


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"micro_batches": 8}, "grad accum"),
        ({"data_parallel_size": 4}, "data parallel"),
        ({"counts": {"0": [[1, 16]], "4": [[2, 16]]}}, "parameters of rank 0"),
    ],
)
def test_something_else_that_is_read_is_found(tmp_path: Path, changed: dict[str, Any], wrong: str) -> None:
    found = asked(tmp_path, **changed)
    assert not found.holds
    assert wrong in [check.what for check in found.checks if not check.holds]


def test_a_refusal_is_shown_as_it_is(tmp_path: Path) -> None:
    python = interpreter(tmp_path, json.dumps({"ok": False, "error": "AssertionError: \x1b[31mheads"}))
    found = preflight(subject(), export(subject(), "megatron"), python)
    assert not found.holds
    assert found.problem == "AssertionError: ?[31mheads"


@pytest.mark.parametrize(
    ("says", "error", "message"),
    [
        ("", "ModuleNotFoundError: No module named 'megatron.core'", "has no megatron.core: run this where"),
        ("", "Killed", "gave no answer; it said: Killed"),
        ("", "", "it said: nothing"),
        ("{broken", "", "gave no answer"),
    ],
)
def test_no_answer_says_why(tmp_path: Path, says: str, error: str, message: str) -> None:
    python = interpreter(tmp_path, says, error)
    with pytest.raises(InputError, match=message):
        preflight(subject(), export(subject(), "megatron"), python)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    made = Export("nanotron", "1", {})
    with pytest.raises(InputError, match="it can be asked of megatron"):
        preflight(subject(), made, "python")
    with pytest.raises(InputError, match="cannot be run"):
        preflight(subject(), export(subject(), "megatron"), str(tmp_path / "nothing"))


def test_probes_are_scripts_that_import_nothing_of_the_planner() -> None:
    folder = Path(__file__).parents[2] / "planner" / "probes"
    versions = ("0.2", "0.3")
    named = {name for probe in PROBES.values() for version in versions for name in probe.scripts(version)}
    assert named <= {file.stem for file in folder.glob("*.py")}
    for file in folder.glob("*.py"):
        assert "import planner" not in file.read_text()
        assert "from planner" not in file.read_text()


def test_the_command(tmp_path: Path) -> None:
    one = subject()
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(document_of(one.model, one.cluster, [one.plan]).to_json()))
    python = interpreter(tmp_path, json.dumps(answer(one)))
    words = ["preflight", str(plan), "--python", python]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert "takes the export and reads the plan" in result.output
    interpreter(tmp_path, json.dumps(answer(one, seq_length=2048)))
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found["schema"] == "planner.preflight/1"
    assert [check["what"] for check in found["checks"] if not check["holds"]] == ["seq length"]
