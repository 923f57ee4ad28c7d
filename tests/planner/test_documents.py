"""Documents of plans: written, read back equal, refused where they are not what they say; job files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from planner import ClusterSpec, Layout, ModelSpec, TrainingSpec, estimate, search
from planner.catalog import names
from planner.cli import app
from planner.difference import differences
from planner.documents import Document, document_of, document_of_failure, json_schema, read_document
from planner.errors import InfeasibleError, InputError
from planner.gate import LIMITS, check
from planner.jobs import read_job
from tests.helpers import ANYTHING, places, replaced

ROOT = Path(__file__).parents[2]
SMALL = ["--model", "gpt2-small", "--gpus", "2xA100", "--global-batch-size", "8"]
KNOWN = {"model": False, "gpus": False, "option": True, "tensor_parallel": False, "sequence_parallel": False}


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def small() -> Document:
    model, cluster = ModelSpec.from_catalog("gpt2-small"), ClusterSpec.parse("2xA100")
    plan = estimate(
        model, cluster, TrainingSpec(global_batch_size=8), Layout(2, grad_accum=4, sharding="zero1")
    )
    return document_of(model, cluster, [plan], "planner estimate")


def written(document: Document | dict[str, Any], folder: Path) -> Path:
    values = document if isinstance(document, dict) else document.to_json()
    path = folder / "plan.json"
    path.write_text(json.dumps(values))
    return path


def test_the_published_schema_is_what_is_written() -> None:
    published = json.loads((ROOT / "docs/schema/planner.plans-1.json").read_text())
    assert published == json.loads(json.dumps(json_schema())), "scripts/schema writes it anew"


def test_every_answer_obeys_the_schema_and_is_read_back_equal(small: Document, tmp_path: Path) -> None:
    validate = jsonschema.Draft202012Validator(json_schema()).validate
    searched = json.loads(run("search", *SMALL, "--tokens", "1B", "--json").stdout)
    nothing = json.loads(run("search", "-m", "llama-65b", "-g", "8x80G", "--json").stdout)
    for values in (small.to_json(), searched, nothing):
        validate(values)
        document = read_document(written(values, tmp_path))
        assert json.loads(json.dumps(document.to_json())) == values
    assert all(nothing[name] for name in ("error", "nearest", "changes"))
    assert nothing["plans"] == []
    assert (
        searched["command"]
        == "planner search --model gpt2-small --gpus 2xA100 --global-batch-size 8 --tokens 1B"
    )


@pytest.mark.parametrize("kind", ["models", "gpus"])
def test_whatever_is_in_the_catalog_is_read_back_equal(kind: str, small: Document, tmp_path: Path) -> None:
    for name in names(kind):
        model = ModelSpec.from_catalog(name) if kind == "models" else small.model
        cluster = small.cluster.spec if kind == "models" else ClusterSpec.parse(f"16x{name}")
        document = document_of(model, cluster, small.plans)
        again = read_document(written(document, tmp_path))
        assert again == document, name
        assert (again.model.num_parameters, again.cluster.spec) == (model.num_parameters, cluster)


def test_plans_of_failures_are_read_back_equal(tmp_path: Path) -> None:
    model, cluster = ModelSpec.from_catalog("llama-65b"), ClusterSpec.parse("4x80G")
    with pytest.raises(InfeasibleError) as failed:
        search(model, cluster)
    document = document_of_failure(model, cluster, failed.value)
    again = read_document(written(document, tmp_path))
    assert again == document
    assert again.best == failed.value.nearest


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": "planner.plans/2"}, "schema planner.plans/2 is not read here: give planner.plans/1"),
        ({"schema": None}, "a file without a schema is not read here"),
        ({"plans": []}, "no plan in it"),
        ({"plans": [{"model": 1}]}, "written by planner"),
        ({"surprise": 1}, "surprise=1: Extra inputs are not permitted; plan it again"),
        ({"model": {"name": "<script>"}}, "model.model_type is missing"),
        ({"proof": json.loads("[" * 30 + "]" * 30)}, "not what planner search"),
    ],
)
def test_what_is_no_document_is_refused_with_the_reason(
    change: dict[str, Any], problem: str, small: Document, tmp_path: Path
) -> None:
    path = written(small.to_json() | change, tmp_path)
    with pytest.raises(InputError) as refused:
        read_document(path)
    assert problem in str(refused.value)
    assert run("check", str(path)).exit_code == 2


@pytest.mark.parametrize("seed", range(8))
def test_a_document_with_anything_anywhere_is_exported_or_refused(
    seed: int, small: Document, tmp_path: Path
) -> None:
    dice = random.Random(seed)
    document, path = json.loads(json.dumps(small.to_json())), tmp_path / "plans.json"
    document["plans"] = document["plans"][:1]
    every = list(places(document))
    for place in dice.sample(every, 40):
        path.write_text(json.dumps(replaced(document, place, dice.choice(ANYTHING))))
        for words in (["export", str(path), "--to", "slurm"], ["diff", str(path), str(path)]):
            result = CliRunner().invoke(app, words)
            assert result.exception is None or isinstance(result.exception, SystemExit), (place, words)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": NaN}', "[" * 100_000, "\x00\xff"])
def test_garbage_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError):
        read_document(path)
    with pytest.raises(InputError):
        read_document(tmp_path / "none.json")


def test_a_plan_does_not_differ_from_itself_and_every_change_is_named(
    small: Document, tmp_path: Path
) -> None:
    assert differences(small, small) == []
    model, cluster = ModelSpec.from_catalog("gpt2-medium"), ClusterSpec.parse("2xH100")
    training = TrainingSpec(global_batch_size=16, seq_length=512, tokens=1e9, options={"loss": "fused"})
    other = document_of(model, cluster, [estimate(model, cluster, training, Layout(2, grad_accum=8))])
    found = {(one.section, one.name): (one.before, one.after) for one in differences(small, other)}
    assert found["model", "name"] == ("gpt2-small", "gpt2-medium")
    assert found["cluster", "gpu"] == ("A100-SXM-80GB", "H100-SXM-80GB")
    assert found["training", "seq_length"] == (1024, 512)
    assert found["training", "options.loss"] == ("parallel", "fused")
    assert found["layout", "sharding"] == ("zero1", "ddp")
    assert found["time", "days"][0] is None
    assert found["memory", "peak_bytes"] == (small.best.peak_bytes, other.best.peak_bytes)
    assert {one.name for one in differences(small, other) if one.section == "assumptions" and not one.before}


def test_diff_says_what_changed_at_any_width(small: Document, tmp_path: Path) -> None:
    before = written(small, tmp_path).rename(tmp_path / "before.json")
    after = tmp_path / "after.json"
    after.write_text(run("search", *SMALL, "--seq-length", "512", "--json").stdout)
    for columns in ("60", "80", "140"):
        result = CliRunner().invoke(app, ["diff", str(before), str(after)], env={"COLUMNS": columns})
        assert result.exit_code == 0
        assert "seq_length" in result.output
        assert max(map(len, result.output.splitlines())) <= int(columns) or columns == "60"
    assert run("diff", str(before), str(after), "--exit-code").exit_code == 1
    assert run("diff", str(before), str(before), "--exit-code").output == "No difference.\n"
    document = json.loads(run("diff", str(before), str(after), "--json").stdout)
    assert document["schema"] == "planner.diff/1"
    assert {"section": "training", "name": "seq_length", "before": 1024, "after": 512} in document[
        "differences"
    ]


def test_limits_hold_on_their_own_side_of_the_plans_figure(small: Document) -> None:
    pool = small.cluster.spec.model_copy(
        update={"price": 2.5, "gpu_mtbf_s": 1e8, "checkpoint_bytes_per_s": 1e9}
    )
    training = TrainingSpec(global_batch_size=8, tokens=1e11)
    plan = estimate(small.model, pool, training, small.best.layout.to_layout())
    for name, (figure, most, _, _) in LIMITS.items():
        value = figure(plan)
        assert value is not None
        for factor in (0.99, 1, 1.01):
            holds = factor >= 1 if most else factor <= 1
            assert check(plan, {name: value * factor})[1].holds == holds, (name, factor)
    assert not check(plan.model_copy(update={"fits": False, "verdict": "at risk"}), {})[0].holds


def test_check_gates_a_pipeline(small: Document, tmp_path: Path) -> None:
    path = str(written(small, tmp_path))
    assert run("check", path, "--max-gpus", "2", "--min-headroom", "4GiB", "--min-mfu", "1%").exit_code == 0
    refused = run("check", path, "--max-gpus", "1")
    assert refused.exit_code == 1
    assert "does not hold" in refused.output
    document = json.loads(run("check", path, "--max-peak", "1GiB", "--json").stdout)
    assert document["holds"] is False
    assert [rule["name"] for rule in document["rules"]] == ["verdict", "max peak"]
    for wrong in (("--max-days", "3"), ("--min-headroom", "much"), ("--max-gpus", "0"), ("--max-peak", "80")):
        assert run("check", path, *wrong).exit_code == 2, wrong


def test_a_job_file_stands_for_its_options_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    saved = run("search", *SMALL, "-tp", "1,2", "-o", "loss=fused", "--save-job", str(path), "--json")
    assert path.read_text().startswith(
        "# planner search --job FILE\nschema: planner.job/1\nmodel: gpt2-small\n"
    )
    again = json.loads(run("search", "--job", str(path), "--json").stdout)
    first = json.loads(saved.stdout)
    assert (again["plans"][0]["layout"], again["command"]) == (first["plans"][0]["layout"], first["command"])
    wins = json.loads(run("search", "--job", str(path), "-tp", "2", "--json").stdout)
    assert wins["plans"][0]["layout"]["tensor_parallel"] == 2


def test_a_job_files_values_are_what_a_command_line_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "job.yaml"
    path.write_text(
        "model: config.json\ngpus: 64x80G\ntensor-parallel: [1, 2]\noption: {overlap: on, loss: fused}\n"
        "sequence_parallel: no\n"
    )
    assert read_job(path, KNOWN) == {
        "model": str(tmp_path / "config.json"),
        "gpus": "64x80G",
        "tensor_parallel": "1,2",
        "option": ["overlap=on", "loss=fused"],
        "sequence_parallel": False,
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("modle: x", "modle is no option of this command: did you mean model"),
        ("model: a\nmodel: b", "model is given twice"),
        ("a: &x 1\nb: *x", "anchors and aliases are not read"),
        ("model: !!python/object/apply:os.system [ls]", "not YAML"),
        ("model: {a: [1, {b: 2}]}", "model is"),
        ("[1, 2]", "a job is a mapping of options"),
        ("model: [", "line 1: not YAML"),
        ("schema: planner.job/9\nmodel: x", "schema planner.job/9 is not known here"),
        ("[" * 30_000, "not YAML"),
        ("model: " + "x" * 70_000, "a job file is read up to 65,536"),
    ],
)
def test_wrong_job_files_are_refused_with_the_reason(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_job(path, KNOWN)
    assert problem in str(refused.value)
    result = run("search", "--job", str(path))
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_the_example_of_a_pipeline_runs_and_shows_what_changed(tmp_path: Path) -> None:
    folder = tmp_path / "review"
    folder.mkdir()
    for name in ("job.yaml", "check.sh"):
        (folder / name).write_text((ROOT / "examples/review" / name).read_text())

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=folder, check=True)

    def checked() -> tuple[int, str]:
        command = ["bash", "check.sh", "HEAD"]
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env=environment, check=False
        )
        return done.returncode, done.stdout + done.stderr

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a job")
    status, output = checked()
    assert (status, "No difference." in output) == (0, True), output
    job = folder / "job.yaml"
    job.write_text(job.read_text().replace("8x8xH100", "32x8xH100"))
    status, output = checked()
    assert (status, "num_gpus" in output, "does not hold" in output) == (1, True, True), output
