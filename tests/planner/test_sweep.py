"""Sweeps: each point's answer is the search's own, and nothing is lost on the way to the file."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import planner
from planner import (
    Choices,
    ClusterSpec,
    InfeasibleError,
    InputError,
    ModelSpec,
    TrainingSpec,
    advice,
    grid,
    sweep,
)
from planner.best_first import Ground, find
from planner.bounds import moment_names, tight_bound
from planner.cli import app
from planner.cli_sweep import gpus_of, sizes_of, whole_of
from planner.defaults import resolve
from planner.layouts import enumerate_layouts
from planner.pareto import GOALS, Limits, best, measured, undominated
from planner.plan import make_plan
from planner.stages import price
from planner.sweep_files import as_csv, write
from planner.sweep_row import Row, with_memory
from planner.sweeping import MOST_POINTS, Point, Swept

GIB = 2**30
SMALL, LARGE = ModelSpec.from_catalog("llama-2-7b"), ModelSpec.from_catalog("llama-65b")
TRAINING = TrainingSpec(seq_length=4096, global_batch_size=256, tokens=1e12)
OPTIONS = (
    "--model llama-2-7b --gpus 4..16xA100-80G --global-batch-size 256 --memory-budget 20GiB,40GiB,60GiB,75GiB"
)
LIMITS = Limits(max_days=30, max_gpus=64, min_free=0.1)


def cluster(gpus: str, gib: float | None = None) -> ClusterSpec:
    budget = None if gib is None else int(gib * GIB)
    return ClusterSpec.parse(gpus).model_copy(update={"budget_bytes": budget})


def run(arguments: str, columns: int = 100) -> Any:
    return CliRunner().invoke(app, ["sweep", *arguments.split()], env={"COLUMNS": str(columns)})


def started(*arguments: str) -> subprocess.Popen[str]:
    # Where the tests run behind a shell's &, interrupts are ignored, and that is inherited.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from planner.cli import app; app()"
    command = [sys.executable, "-c", code, "sweep", *OPTIONS.split(), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_rows(path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an undisturbed sweep."""
    path = tmp_path_factory.mktemp("whole") / "sweep.csv"
    result = run(f"{OPTIONS} --jobs 1 --output {path}")
    assert result.exit_code == 0, result.output
    return path.read_bytes()


# Every point is a search.


def test_a_point_says_what_the_search_of_it_alone_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "changes_that_fit", lambda *_: ([], []))  # which a sweep does not look for
    clusters = [cluster(gpus, gib) for gpus in ("8x80G", "64x80G") for gib in (45, 60, None)]
    points = grid(LARGE, clusters, TrainingSpec(seq_length=2048))
    found = sweep(points, jobs=1)
    assert [row.verdict for row in found.rows] == ["does not fit"] * 3 + ["fits"] * 3
    for point, row in zip(points, found.rows, strict=True):
        if row.verdict != "fits":
            with pytest.raises(InfeasibleError) as raised:
                planner.search(*point[:3], top=1)
            nearest = raised.value.nearest
            assert row.reason == str(raised.value)
            assert row.over_bytes == nearest.most_bytes - nearest.capacity_bytes > 0
            continue
        (plan,) = planner.search(*point[:3], top=1)
        assert row.layout == plan.layout.to_layout().describe()
        assert (row.peak_bytes, row.most_bytes) == (plan.peak_bytes, plan.most_bytes)
        assert (row.step_time_s, row.mfu) == (plan.step_time_s, plan.mfu)
        assert (row.headroom_bytes, row.capacity_bytes) == (plan.headroom_bytes, plan.capacity_bytes)
        assert row.proof == "optimal"


@pytest.mark.parametrize("objective", ["time", "headroom"])
@pytest.mark.parametrize("framework", ["megatron", "torchtitan"])
def test_answers_do_not_depend_on_what_was_searched_before(framework: str, objective: str) -> None:
    training = TrainingSpec(global_batch_size=128, framework=framework)
    budgets = [18, 24, 30, 45, 60, 75]
    random.Random(1).shuffle(budgets)
    jobs = [resolve(SMALL, cluster("16xA100-80G", gib), training) for gib in budgets]
    ground = Ground.of(jobs[0], Choices(), objective)
    for job in jobs:
        shared = find(job, Choices(), objective, top=3, ground=ground).answers
        alone = find(job, Choices(), objective, top=3).answers
        assert [(s.candidate, s.rows, s.cost) for s in shared] == [
            (s.candidate, s.rows, s.cost) for s in alone
        ]


def test_a_tight_bound_is_the_same_with_others_and_rises_as_memory_falls() -> None:
    """Bit for bit, as the order of a search depends on it."""
    job = resolve(LARGE, cluster("32x80G"), TrainingSpec(seq_length=2048))
    less = replace(job, cluster=cluster("32x80G", 50))
    for family in enumerate_layouts(job, Choices(tensor_parallel=(2, 8))).families[:6]:
        prices, small = price(job, family), price(less, family)
        names, count = moment_names(prices), len(family.data_parallel)
        together = tight_bound(prices.take((np.arange(count), None)), names=names)
        for index in range(0, count, 7):
            (alone,) = tight_bound(prices.take((np.array([index]), None)), names=names)
            assert alone == together[index]
        assert np.all(tight_bound(small.take((np.arange(count), None)), names=names) >= together)


def test_a_plan_with_other_memory_is_the_plan_made_with_it() -> None:
    job = resolve(LARGE, cluster("64x80G", 60), TRAINING)
    solution = find(job, top=1).answers[0]
    for gib in (25, 55.5, 70):
        other = resolve(LARGE, cluster("64x80G", gib), TRAINING)
        assert with_memory(make_plan(job, solution, {}), other) == make_plan(other, solution, {})


def test_the_nearest_layout_is_the_same_whatever_the_budget() -> None:
    jobs = [resolve(LARGE, cluster("8x80G", gib), TRAINING) for gib in (30, None)]
    few, all_of_it = (advice.nearest_plan(job, Choices()) for job in jobs)
    assert with_memory(few, jobs[1]) == all_of_it


def test_points_that_are_the_same_are_searched_once() -> None:
    same = [cluster("8xA100-80G"), cluster("8x80G"), cluster("8x80G", 79.9)]  # more than is usable
    found = sweep(grid(SMALL, same, [TRAINING, TRAINING.model_copy(update={"precision": "bf16"})]), jobs=1)
    assert (found.points, found.repeated, len(found.rows)) == (6, 5, 1)


# The front.


def brute_force(values: list[tuple[float, ...]]) -> list[int]:
    def beaten(i: int, j: int) -> bool:
        no_worse = all(b <= a for a, b in zip(values[i], values[j], strict=True))
        return no_worse and (values[j] != values[i] or j < i)

    return [i for i in range(len(values)) if not any(beaten(i, j) for j in range(len(values)))]


@pytest.mark.parametrize("measures", [1, 2, 3, 4])
def test_the_front_is_what_no_pair_contradicts(measures: int) -> None:
    draw = random.Random(measures)
    for most in (2, 5, 1000):
        values = [tuple(float(draw.randint(0, most)) for _ in range(measures)) for _ in range(150)]
        assert undominated(values) == brute_force(values)
    assert undominated([]) == []


def test_the_front_of_a_sweep_is_of_gpus_time_and_memory_for_each_model_and_length() -> None:
    clusters = [cluster(gpus, gib) for gpus in ("8x80G", "16x80G") for gib in (40, 60)]
    lengths = [TRAINING.model_copy(update={"seq_length": n}) for n in (2048, 4096)]
    found = sweep(grid(SMALL, clusters, lengths), jobs=1)
    for length in (2048, 4096):
        rows = [row for row in found.rows if row.seq_length == length]
        expected = brute_force(
            [(float(r.num_gpus), 1 / (r.tokens_per_s or 1), -float(r.free_bytes or 0)) for r in rows]
        )
        assert [i for i, row in enumerate(rows) if row.front] == expected
        assert len(measured(rows)[0]) == 3


def made(**values: Any) -> Row:
    usual = {"model": "m", "gpu": "g", "num_gpus": 8, "gpus_per_node": 8, "seq_length": 2048}
    usual |= {"global_batch_size": 1, "micro_batch_sizes": "", "capacity_bytes": 80, "verdict": "fits"}
    usual |= {"tokens_per_s": 100.0, "free_bytes": 10 * GIB, "most_bytes": 70 * GIB, "days": 10.0}
    return Row.model_validate(usual | values)


def test_goals_and_limits() -> None:
    rows = [
        made(num_gpus=8, tokens_per_s=100.0, seq_length=8192, days=40.0),
        made(num_gpus=16, tokens_per_s=220.0, days=20.0, free_bytes=GIB, most_bytes=79 * GIB),
        made(num_gpus=32, tokens_per_s=400.0, days=11.0, seq_length=4096),
        made(num_gpus=4, verdict="does not fit", tokens_per_s=None),
    ]
    fit = [row for row in rows if Limits().allow(row)]
    reached = {goal: best(fit, goal) for goal in GOALS if goal != "cheapest"}
    assert reached == {
        "fewest-gpus": rows[0],
        "fewest-gpu-hours": rows[1],
        "fastest": rows[2],
        "longest-sequence": rows[0],
    }
    with pytest.raises(InputError, match="not all rows have a price"):
        best(fit, "cheapest")
    assert [row for row in rows if LIMITS.allow(row)] == [rows[2]]
    assert [row for row in rows if Limits(min_free=2.0 * GIB).allow(row)] == [rows[0], rows[2]]
    assert best([], "fastest") is None


# Files.


def test_serial_and_parallel_give_the_same_bytes(whole: bytes, tmp_path: Path) -> None:
    assert run(f"{OPTIONS} --jobs 2 --output {tmp_path / 'sweep.csv'}").exit_code == 0
    assert (tmp_path / "sweep.csv").read_bytes() == whole
    assert os.listdir(tmp_path) == ["sweep.csv"]


@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_dask_gives_the_same_bytes(whole: bytes, tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="the extra dask is not installed")
    result = run(f"{OPTIONS} --jobs 1 --engine dask --output {tmp_path / 'sweep.csv'}")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "sweep.csv").read_bytes() == whole


def test_killed_and_gone_on_with_gives_the_same_bytes(whole: bytes, tmp_path: Path) -> None:
    output, kept = tmp_path / "sweep.csv", tmp_path / "sweep.csv.rows"
    process = started("--jobs", "1", "--output", str(output))
    wait_for_rows(kept, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = kept.read_text().count("\n")
    assert 4 <= before < 12
    assert not output.exists()
    with kept.open("a") as file:  # as if it had been killed in the middle of a line
        file.write('{"key": "0123", "row": {"mod')
    refused = run(f"{OPTIONS} --output {output}")
    assert refused.exit_code == 2
    assert "go on with --resume, or remove it" in " ".join(refused.output.split())
    result = run(f"{OPTIONS} --jobs 1 --output {output} --resume")
    assert f"sweep.csv.rows had already: {before}" in result.output
    assert output.read_bytes() == whole
    assert not kept.exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_interrupted_it_shows_and_keeps_what_there_is(jobs: str, tmp_path: Path) -> None:
    output, kept = tmp_path / "sweep.csv", tmp_path / "sweep.csv.rows"
    process = started("--jobs", jobs, "--output", str(output))
    wait_for_rows(kept, 3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("it was done before it could be interrupted")
    assert process.returncode == 130, err
    assert "of 12 points are done" in err
    assert "go on with --resume" in err
    assert "Traceback" not in err
    assert " of 12 points: " in out
    assert kept.exists()
    assert not output.exists()


def test_rows_of_other_inputs_are_left_alone(tmp_path: Path) -> None:
    state = tmp_path / "rows"
    one, two = (grid(SMALL, cluster("8x80G", gib), TRAINING) for gib in (50, 60))
    sweep(one, jobs=1, state=state)
    lines = state.read_text()
    found = sweep([*two, *one], jobs=1, state=state, resume=True)
    assert found.notes == ("points that rows had already: 1",)
    assert sweep(two, jobs=1, state=state, resume=True).notes == (
        "points that rows had already: 1",
        "rows that rows has of other inputs or another version, left alone: 1",
    )
    assert state.read_text().startswith(lines)
    key, row = json.loads(lines)["key"], json.loads(lines)["row"]
    state.write_text(json.dumps({"key": key, "row": row | {"num_gpus": "many"}}) + "\nnot a row\n")
    assert sweep(one, jobs=1, state=state, resume=True).rows == found.rows[1:]


def test_files_that_cannot_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = grid(SMALL, cluster("8x80G"), TRAINING)
    text = tmp_path / "letter.txt"
    text.write_text("Dear reader,\n")
    for path, message in (
        (text, "has no rows of a sweep"),
        (tmp_path, "not a regular file"),
        (tmp_path / "none" / "rows", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            sweep(point, state=path, resume=True)
    assert text.read_text() == "Dear reader,\n"
    monkeypatch.setattr("planner.journal.MOST_BYTES", 5)
    with pytest.raises(InputError, match="rows are read up to 5"):
        sweep(point, state=text, resume=True)


def test_csv_json_and_parquet_say_the_same(whole: bytes, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    result = run(f"{OPTIONS} --jobs 1 --json --output {tmp_path / 'sweep.parquet'}")
    document = json.loads(result.stdout)
    assert document["schema"] == "planner.sweep/1"
    assert parquet.read_table(tmp_path / "sweep.parquet").to_pylist() == document["rows"]
    table = list(csv.DictReader(whole.decode().splitlines()))
    shown = [{k: "" if v is None else str(v) for k, v in row.items()} for row in document["rows"]]
    assert table == shown
    found = sweep(grid(SMALL, cluster("8x80G"), TRAINING), jobs=1)
    write(found, tmp_path / "sweep.json")
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == [r.model_dump() for r in found.rows]


# The command.


def test_values_and_ranges() -> None:
    assert whole_of("-s", "2048, 4096") == [2048, 4096]
    assert whole_of("-s", "8..100") == [8, 16, 32, 64]
    assert whole_of("-s", "8..40..16,8") == [8, 24, 40]
    assert whole_of("-s", None) == [None]
    assert gpus_of("8..32xA100-80G,2x8xH100") == ["8xA100-80G", "16xA100-80G", "32xA100-80G", "2x8xH100"]
    assert sizes_of("40GiB..60GiB..10GiB, 72GB") == [*(f"{n * GIB}B" for n in (40, 50, 60)), "72GB"]
    assert sizes_of(None) == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m llama-2-7b -g 8,16", "the last one names the kind"),
        ("-m llama-2-7b -g 8..xH100", "whole numbers"),
        ("-m llama-2-7b -g 64..8xH100", "a range goes up"),
        ("-m llama-2-7b -g 8xH1000", "H1000"),
        ("-m llama-2-7c -g 8xH100", "llama-2-7c"),
        ("-m llama-2-7b -g 8xH100 -s 2k", "--seq-length '2k'"),
        ("-m llama-2-7b -g 8xH100 -s 0..8", "a range goes up"),
        ("-m llama-2-7b -g 8xH100 -s 1..9999999..1", "9,999,999 values"),
        ("-m llama-2-7b -g 8xH100 -s 1..9999..1 -b 1..99..1", "989,901 points: a sweep has 100,000 at most"),
        ("-m llama-2-7b -g 8xH100 --memory-budget 40", "is not a size"),
        ("-m llama-2-7b -g 8xH100 --memory-budget 99GiB", "is more than there is"),
        ("-m llama-2-7b -g 8xH100 --goal best", "use fewest-gpus, fewest-gpu-hours"),
        ("-m llama-2-7b -g 8xH100 --goal cheapest", "give --price of a GPU-hour and --tokens"),
        ("-m llama-2-7b -g 8xH100 --max-days 3", "give --tokens"),
        ("-m llama-2-7b -g 8xH100 --max-gpus 0", "use 1 or more"),
        ("-m llama-2-7b -g 8xH100 --min-headroom 5", "is not a fraction"),
        ("-m llama-2-7b -g 8xH100 --jobs 0", "use 1 or more processes"),
        ("-m llama-2-7b -g 8xH100 --engine spark", "use dask or ray"),
        ("-m llama-2-7b -g 8xH100 --resume", "--state"),
        ("-m llama-2-7b -g 8xH100 --output sweep.xls", ".csv, .json, .parquet"),
        ("-m llama-2-7b -g 8xH100 --output none/sweep.csv", "does not exist"),
    ],
)
def test_what_cannot_be_is_said_at_once(arguments: str, message: str) -> None:
    result = run(arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_point_that_cannot_be_keeps_its_reason() -> None:
    result = run("-m llama-2-7b -g 8xA100-40G,8xA100-80G --memory-budget 60GiB -mb 1,3 -b 64 --jobs 1 --json")
    rows = json.loads(result.stdout)["rows"]
    assert result.exit_code == 0
    assert [row["verdict"] for row in rows] == ["refused", "refused", "fits", "refused"]
    assert "more than there is" in rows[0]["reason"]
    assert "micro_batch_size=3 does not divide" in rows[3]["reason"]
    assert rows[2]["micro_batch_size"] == 1


def test_nothing_fits_is_status_1_and_says_what_lacks() -> None:
    result = run("-m llama-65b -g 8xA100-80G --memory-budget 40GiB,60GiB --jobs 1")
    assert result.exit_code == 1
    assert "No point fits; nearest is TP8 PP1 DP1" in " ".join(result.output.split())
    assert "2 do not fit" in result.output


def test_out_of_limits_is_status_1_too() -> None:
    result = run("-m llama-2-7b -g 8xA100-80G -b 256 --jobs 1 --tokens 1T --max-days 2")
    assert result.exit_code == 1
    assert "No point that fits is within the limits" in result.output


@pytest.mark.parametrize("columns", [80, 140])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    result = run(f"{OPTIONS} --tokens 1T --jobs 1 --goal fewest-gpus", columns)
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[0].startswith("Fewest GPUs that fit: 4 x A100-SXM-80GB")
    assert "12 points: " in result.output


def test_a_sweep_has_a_limit() -> None:
    point = Point(SMALL, cluster("8x80G"), TRAINING)
    with pytest.raises(InputError, match="100,001 points: a sweep has 100,000 at most"):
        Swept([point] * (MOST_POINTS + 1))
    with pytest.raises(InputError, match="at least one point"):
        sweep([])


def test_rows_come_in_the_order_of_their_points() -> None:
    clusters = [cluster("8x80G", gib) for gib in (30, 70, 50)]
    rows = sweep(grid(SMALL, clusters, TRAINING), jobs=1).rows
    assert [row.capacity_bytes for row in rows] == [30 * GIB, 70 * GIB, 50 * GIB]
    assert as_csv(sweep(grid(SMALL, clusters, TRAINING), jobs=1)).count("\n") == 4
