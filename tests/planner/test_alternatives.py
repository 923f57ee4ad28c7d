"""The same job on other numbers of GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner import api
from planner.alternatives import alternatives, counts_of, document_for, plans_of
from planner.cli import app
from planner.documents import Document, document_of, read_document
from planner.errors import InputError
from planner.reading import read_cluster
from planner.specs import ModelSpec, TrainingSpec


@pytest.fixture(scope="module")
def document() -> Document:
    model = ModelSpec.from_catalog("llama-2-7b")
    cluster = read_cluster("16xA100-80G").model_copy(update={"price": 2.0, "currency": "USD"})
    plans = api.search(model, cluster, TrainingSpec(global_batch_size=96, tokens=1e9), top=1)
    return document_of(model, cluster, plans)


def test_each_number_has_its_best_plan_with_the_same_batch(document: Document) -> None:
    found = alternatives(document, (16, 24, 8, 7, 24, 1))
    rows = {row["gpus"]: row for row in document_for(document, found)["alternatives"]}
    assert list(rows) == [24, 16, 8, 7, 1]
    for count in (24, 16, 8):
        plan = rows[count]["plan"]
        assert plan["num_gpus"] == count
        assert plan["training"]["global_batch_size"] == 96
        layout = plan["layout"]
        assert layout["data_parallel"] * layout["micro_batch_size"] * layout["grad_accum"] == 96
        assert rows[count]["gpu_hours"] == pytest.approx(rows[count]["money"] / 2)
        assert rows[count]["nodes"] == count // 8
    assert rows[16]["step_time_s"] == pytest.approx(document.best.step_time_s)
    assert rows[24]["step_time_s"] < rows[16]["step_time_s"] < rows[8]["step_time_s"]
    assert not rows[1]["fits"]
    assert "fits on none" in rows[1]["reason"]


def test_a_number_that_the_batch_cannot_be_cut_for_says_why(document: Document) -> None:
    small = ModelSpec.from_catalog("llama-2-7b")
    cluster = read_cluster("64xA100-80G")
    plan = api.search(small, cluster, TrainingSpec(framework="fsdp", global_batch_size=64), top=1)
    (row,) = document_for(
        document_of(small, cluster, plan), alternatives(document_of(small, cluster, plan), (56,))
    )["alternatives"]
    assert not row["fits"]
    assert "64" in row["reason"]
    assert "plan" not in row


def test_numbers_where_none_are_given(document: Document) -> None:
    assert counts_of(document) == [16, 8]
    assert counts_of(document, available=45) == [40, 32, 24, 16, 8]
    assert counts_of(document, available=5) == [5]
    assert len(counts_of(document, available=10_000)) <= 16
    for wrong in ((0,), tuple(range(1, 300))):
        with pytest.raises(InputError, match="--counts"):
            counts_of(document, wrong)
    with pytest.raises(InputError, match="--available"):
        counts_of(document, available=0)


def test_plans_are_written_for_the_other_commands(document: Document, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(document.to_json()))
    for _ in range(2):  # those of an earlier call are replaced
        done = CliRunner().invoke(
            app, ["alternatives", str(plan), "--counts", "8", "-o", str(tmp_path / "out")]
        )
        assert done.exit_code == 0, done.output
    kept = read_document(tmp_path / "out" / "gpus-8.json")
    assert kept.best.num_gpus == kept.cluster.num_gpus == 8
    assert kept.command.endswith("--counts 8")
    assert list(dict(plans_of(document, alternatives(document, (8,)), "x"))) == ["gpus-8.json"]
    done = CliRunner().invoke(app, ["alternatives", str(plan), "--counts", "1", "--json"])
    assert done.exit_code == 1
    said = json.loads(done.output)
    assert said["schema"] == "planner.alternatives/1"
    assert said["alternatives"][0]["fits"] is False
    done = CliRunner().invoke(app, ["alternatives", str(plan), "--counts", "x"])
    assert done.exit_code == 2
