"""Reports of plans as Markdown, CSV, JSON and one page, without a browser."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planner import (
    ClusterSpec,
    Document,
    InputError,
    Layout,
    ModelSpec,
    TrainingSpec,
    document_of,
    estimate,
    grid,
    search,
    sweep,
)
from planner.cli import app
from planner.report import COMMENT_BYTES, PAGE, cell_text, comment, data, page, table
from planner.review import Subject, exhibits
from planner.sweep_files import read_rows, write

HOSTILE = "<script>x</script> | `a` **b** [c](http://d) @e #1 \u202e"


@pytest.fixture(scope="module")
def headline() -> Document:
    model, cluster = ModelSpec.from_catalog("llama-65b"), ClusterSpec.parse("64x80G")
    return document_of(
        model, cluster, search(model, cluster), "planner search --model llama-65b --gpus 64x80G"
    )


def exhibit(document: Document, name: str) -> dict[str, Any]:
    return next(one for one in data(document)["exhibits"] if one["name"] == name)


def test_exhibits_say_what_the_plan_says(headline: Document) -> None:
    plan = headline.best
    stages = exhibit(headline, "stages")
    names = [column["name"] for column in stages["columns"]]
    for stage, row in zip(plan.stages, stages["rows"], strict=True):
        assert row[names.index("peak")] == stage.peak_bytes
        assert sum(row[2:10]) == pytest.approx(stage.peak_bytes, abs=8)
    step = exhibit(headline, "step")
    most = max(row[-1] for row in step["rows"])
    library = 0  # of the fullest stage; what libraries take is a plan's own line
    assert most + library <= plan.stages[plan.fullest].tensor_bytes <= most + 2**28
    for row in step["rows"]:
        assert sum(row[2:-1]) == pytest.approx(row[-1])
    alternatives = exhibit(headline, "alternatives")
    assert [row[4] for row in alternatives["rows"]] == [one.step_time_s for one in headline.plans]
    assert len(exhibit(headline, "schedule")["rows"]) == len(plan.stages)


def test_sensitivity_is_what_an_estimate_of_the_changed_job_says() -> None:
    model, cluster = ModelSpec.from_catalog("llama-2-7b"), ClusterSpec.parse("8xH100")
    training = TrainingSpec(seq_length=2048, global_batch_size=64)
    layout = Layout(4, 1, 2, grad_accum=16, sharding="zero1")
    plan = estimate(model, cluster, training, layout, recompute="full")
    rows = {row[0]: row for row in exhibit(document_of(model, cluster, [plan]), "sensitivity")["rows"]}
    for name, changed, own, pool in (
        ("sequences of 4,096", TrainingSpec(seq_length=4096, global_batch_size=64), layout, cluster),
        (
            "micro-batches of 2",
            training,
            Layout(4, 1, 2, micro_batch_size=2, grad_accum=8, sharding="zero1"),
            cluster,
        ),
        ("16 GPUs", training, Layout(8, 1, 2, grad_accum=8, sharding="zero1"), ClusterSpec.parse("16xH100")),
        ("4 GPUs", training, Layout(2, 1, 2, grad_accum=32, sharding="zero1"), ClusterSpec.parse("4xH100")),
    ):
        other = estimate(model, pool, changed, own, recompute="full")
        assert rows[name][1:3] == [other.num_gpus, other.peak_bytes], name
        assert rows[name][4] == pytest.approx(other.step_time_s), name
        assert rows[name][6] == other.verdict, name


def test_the_headline_page_is_small_and_quick_to_build(headline: Document, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(headline.to_json()))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "planner", "report", str(file), "-o", str(tmp_path / "review.html")]
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4
    )  # 1.2 where nothing else runs
    assert 1_000_000 < (tmp_path / "review.html").stat().st_size < 2_000_000


def test_a_frontier_has_the_front_of_a_sweep_and_what_nearly_fits(headline: Document, tmp_path: Path) -> None:
    clusters = [ClusterSpec.parse(f"{count}x80G") for count in (8, 16, 32)]
    found = sweep(grid(ModelSpec.from_catalog("llama-65b"), clusters), jobs=1)
    path = tmp_path / "sweep.json"
    write(found, path)
    rows = read_rows(path)
    assert rows == list(found.rows)
    one = next(one for one in data(headline, rows)["exhibits"] if one["name"] == "frontier")
    assert [row[0].split()[0] for row in one["rows"]] == ["16", "32", "8"]
    assert [row[3] for row in one["rows"]] == ["fits", "fits", "does not fit"]
    assert page(headline, swept=rows).count("data-chart") == page(headline).count("data-chart") + 1
    for wrong in ("{}", '{"schema": "planner.sweep/1", "rows": [{}]}', '{"schema": "planner.sweep/2"}'):
        path.write_text(wrong)
        with pytest.raises(InputError, match=r"sweep\.json"):
            read_rows(path)


def test_the_library_is_the_released_one() -> None:
    # npm's echarts 6.1.0, dist/echarts.min.js.
    digest = hashlib.sha256((PAGE / "echarts.min.js").read_bytes()).hexdigest()
    assert digest == "b66b25aeb4df84e33199dc21694014d336d222cbd9deb0e5a7c14bd6aa0d0fd0"


def test_a_comment_is_within_what_github_takes_and_text_stays_text(headline: Document) -> None:
    assert len(comment(headline).encode()) <= COMMENT_BYTES
    model, cluster = ModelSpec.from_catalog("llama-3.1-405b"), ClusterSpec.parse("2016xH100")
    training = TrainingSpec(seq_length=4096, global_batch_size=512)
    deep = Layout(16, 1, 126, 1, 1, 32, sharding="zero1")
    large = document_of(model, cluster, [estimate(model, cluster, training, deep)])
    assert len(comment(large).encode()) <= COMMENT_BYTES
    for line, after in pairwise(comment(large).splitlines()):  # a table ends with its rows
        assert not (line.startswith("| ") and after and after[0] not in "|<"), after
    named = headline.best.model_copy(update={"model": HOSTILE, "warnings": (HOSTILE,)})
    text = comment(headline.model_copy(update={"plans": (named,), "command": "x ``` y", "error": HOSTILE}))
    assert "<script" not in text
    assert "](http" not in text.replace("\\](", "")
    assert "````sh\nx ``` y\n````" in text


def test_csv_is_read_back_and_no_formula(headline: Document) -> None:
    rows = list(csv.reader(io.StringIO(table(headline))))
    assert rows[0] == ["exhibit", "stages"]
    assert len({len(row) for row in rows[1:18]}) == 1
    assert rows[2][10] == str(headline.best.stages[0].peak_bytes)
    assert not any(cell[:1] in ("=", "+", "@") for row in rows for cell in row)


def test_every_exhibit_has_a_unit_for_every_cell(headline: Document) -> None:
    for one in exhibits(Subject.of(headline)):
        assert len(one.columns) == len(one.units)
        for row in one.rows:
            assert len(row) == len(one.columns)
            for value, unit in zip(row, one.units, strict=True):
                assert isinstance(value, str) == (unit == "text")
                assert "nan" not in cell_text(value, unit)


def test_the_command_writes_each_format_or_says_why_not(headline: Document, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(headline.to_json()))
    for name in ("review.html", "review.md", "review.csv", "review.json"):
        assert CliRunner().invoke(app, ["report", str(file), "-o", str(tmp_path / name)]).exit_code == 0
        assert (tmp_path / name).stat().st_size > 1000
    assert json.loads((tmp_path / "review.json").read_text())["schema"] == "planner.report/1"
    shown = CliRunner().invoke(app, ["report", str(file), "-o", "-", "--format", "md"])
    assert shown.output == (tmp_path / "review.md").read_text()
    for wrong in (["-o", "x.pdf"], ["-o", str(tmp_path)], ["-o", "/nowhere/x.html"]):
        result = CliRunner().invoke(app, ["report", str(file), *wrong])
        assert result.exit_code == 2
        assert "Traceback" not in result.output
    assert CliRunner().invoke(app, ["report", str(tmp_path / "none.json")]).exit_code == 2


def test_pages_are_the_same_for_the_same_plan(headline: Document) -> None:
    assert page(headline) == page(headline)
