"""A step as a trace: what chrome://tracing and Perfetto read, and the numbers in it."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planner import api
from planner import trace as traces
from planner.cli import app
from planner.errors import InputError
from planner.plan import Plan
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from planner.stages import price
from strategies.layout import Layout
from strategies.pipeline_parallel import PipelineParallel
from tests.helpers import llama

MODEL = llama(8, 1024, 8, 8, vocab_size=32000)
SCHEDULES = [
    ("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2), ("dualpipe", 2),
]  # fmt: skip


def traced(schedule: str, chunks: int, m: int = 8, p: int = 4) -> tuple[dict[str, Any], Plan]:
    cluster = ClusterSpec.parse(f"{p}xA100")
    training = TrainingSpec(seq_length=512, global_batch_size=m)
    layout = Layout(pipeline_parallel=p, grad_accum=m, chunks=chunks, schedule=schedule)
    plan = api.estimate(MODEL, cluster, training, layout)
    return json.loads(json.dumps(api.trace(MODEL, cluster, plan))), plan


def work_of(lanes: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [e for lane in lanes.values() for e in lane if e["cat"] not in ("bubble", "update")]


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_the_trace_is_the_steps_timeline(schedule: str, chunks: int) -> None:
    document, plan = traced(schedule, chunks)
    lanes, messages = defaultdict(list), []
    for event in document["traceEvents"]:
        assert event["ph"] in "XCM"
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        if event["ph"] == "X":
            assert event["dur"] > 0
            lanes[event["pid"]].append(event) if event["tid"] == 0 else messages.append(event)
    assert set(lanes) == {0, 1, 2, 3}
    for lane in lanes.values():  # nothing overlaps, and bubbles leave no gap
        assert all(a["ts"] + a["dur"] == pytest.approx(b["ts"]) for a, b in pairwise(lane))
        assert lane[0]["ts"] == 0
        assert lane[-1]["ts"] + lane[-1]["dur"] == pytest.approx(plan.critical_path_s * 1e6)
        assert lane[-1]["cat"] == "update"
    # Messages are the end of their pass; those of weights' gradients alone have none.
    for message in messages:
        assert message["cat"] == "communication"
        end = message["ts"] + message["dur"]
        assert any(
            e["ts"] + e["dur"] == pytest.approx(end) and e["ts"] <= message["ts"] * (1 + 1e-9)
            for e in work_of({0: lanes[message["pid"]]})
            if e["cat"] != "weight gradient"
        )
    sends = [e for e in work_of(lanes) if e["cat"] != "weight gradient"]
    assert len(messages) == len(sends)
    work = work_of(lanes)
    assert len(work) == document["otherData"]["passes"] == document["otherData"]["passes_shown"]
    split = {"zb-h1", "zb-h2", "zb-v", "dualpipe"}
    assert any(e["cat"] == "weight gradient" for e in work) == (schedule in split)


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_the_counters_peak_is_the_states_and_the_passes_in_flight(schedule: str, chunks: int) -> None:
    document, plan = traced(schedule, chunks)
    layout = plan.layout.to_layout()
    job = api.job_for(MODEL, ClusterSpec.parse("4xA100"), plan.training, layout)
    saved = float(price(job, layout).plain.saved)
    counters = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "C":
            counters[event["pid"]].append(event["args"])
    for stage, values in counters.items():
        own = plan.stages[stage]
        assert values[-1]["activations"] == 0
        held = own.components["parameters"] + own.components["gradients"] + own.components["optimizer_states"]
        assert values[0]["model states"] == pytest.approx(held, rel=1e-6)
        if not own.embedding and not own.head:
            pipeline = PipelineParallel(4, stage, 8, chunks, schedule)
            rows = own.layers // chunks
            peak = max(value["activations"] for value in values)
            assert peak == pytest.approx(float(pipeline.in_flight) * rows * saved, abs=2)


def test_a_step_of_thousands_of_micro_batches_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    document, _ = traced("1f1b", 1, m=20_000, p=2)
    notes = document["otherData"]
    assert notes["micro_batches"] == 20_000
    assert notes["passes"] == 80_000
    assert notes["passes_shown"] <= traces.MOST_TRACED
    assert "of its 20000 micro-batches" in notes["note"]
    assert len(json.dumps(document)) < 10_000_000
    monkeypatch.setattr(traces, "MOST_TRACED", 100)
    document, _ = traced("zb-h1", 1, m=64)
    shown = [
        e for e in document["traceEvents"] if e["ph"] == "X" and e["cat"] not in ("bubble", "communication")
    ]
    assert document["otherData"]["passes_shown"] == len(shown) < 110
    assert "the first" in document["otherData"]["note"]


def test_search_and_estimate_write_the_winners_trace(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    common = ["--model", "gpt2-xl", "--gpus", "4xA100", "--global-batch-size", "16", "--trace", str(path)]
    for command in (["search", *common], ["estimate", *common, "-pp", "4", "--schedule", "zb-v"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        document = json.loads(path.read_text())
        assert document["otherData"]["model"] == "gpt2-xl"
        assert list(tmp_path.iterdir()) == [path]
    assert document["otherData"]["schedule"] == "zb-v"


def test_a_trace_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        traces.write_trace({}, tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        traces.write_trace({}, tmp_path / "nowhere" / "step.json")
    path = tmp_path / "step.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        traces.write_trace({"a": object()}, path)
    assert path.read_text() == "old"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    traces.write_trace({"traceEvents": []}, pipe)
    reader.join(10)
    assert json.loads(read[0]) == {"traceEvents": []}
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_models_whose_chunks_lack_a_layer_have_a_trace_as_long_as_their_plan() -> None:
    model: ModelSpec = llama(7, 1024, 8, 8, vocab_size=32000)
    cluster = ClusterSpec.parse("2xA100")
    layout = Layout(pipeline_parallel=2, grad_accum=8, chunks=2, schedule="zb-v")
    plan = api.estimate(model, cluster, TrainingSpec(seq_length=512, global_batch_size=8), layout)
    assert [stage.layers for stage in plan.stages] in ([3, 4], [4, 3])
    events = api.trace(model, cluster, plan)["traceEvents"]
    end = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X")
    assert end == pytest.approx(plan.critical_path_s * 1e6)
