"""Calibration: every format as the software prints it, hostile files, and terms that are known."""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import pickle
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from planner import plain_pickle, readings
from planner.api import estimate
from planner.calibrate import calibrate, fit, line, spread
from planner.cli_calibrate import EPILOG
from planner.cli_calibrate import calibrate as command
from planner.errors import InputError
from planner.plain_pickle import read_plain_pickle
from planner.plan import Plan
from planner.profiles import read_profile, write_profile
from planner.readings import Reading, read_file
from planner.specs import ClusterSpec, ModelSpec, OverheadFigure, Profile, TrainingSpec
from planner.stacks import STACKS
from planner.units import GIB, MIB
from strategies.layout import Layout

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data/calibrate"
PAGE = ROOT / "docs/calibrate.md"
MEGATRON = STACKS["megatron"]
APP = typer.Typer()
APP.command(epilog=EPILOG)(command)


@APP.command()
def other() -> None:
    """A second command, so that the first keeps its name."""


def run(*arguments: str, columns: int = 100) -> Any:
    result = CliRunner().invoke(APP, ["calibrate", *arguments], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def put(folder: Path, text: str | bytes, name: str = "in") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, *words: str, **more: Any) -> str:
    """The message with which a file is refused; it names the file and the words."""
    with pytest.raises(InputError) as caught:
        calibrate([path], **more)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message, message
    return message


# --- what each format says ---------------------------------------------------------------------


def report(rank: int, numbers: tuple[float, ...], device: float | None = None, after: int = 2) -> str:
    names = ("allocated", "max allocated", "reserved", "max reserved")
    parts = [f"{name}: {value:.2f}" for name, value in zip(names, numbers, strict=True)]
    parts += [] if device is None else [f"total device memory used: {device:.2f}"]
    return f"[Rank {rank}] (after {after} iterations) memory (MB) | " + " | ".join(parts)


def test_megatron_log_gives_each_ranks_last_report_and_its_groups() -> None:
    found = read_file(DATA / "megatron.log")
    assert found.format == "megatron"
    assert [one.name for one in found.readings] == ["megatron.log rank 0", "megatron.log rank 8"]
    first = found.readings[0]
    assert first.allocated == 52325.66 * MIB
    assert first.reserved == 54620 * MIB
    assert first.outside == (55886 - 54494) * MIB  # beside what was reserved then, not at most
    assert first.groups == 3
    assert any("46.3 GiB; it is not used" in note for note in found.notes)


def test_megatron_prints_full_floats_and_runs_lines_together(tmp_path: Path) -> None:
    text = (
        "6: [Rank 4] (after 1 iterations) memory (MB) | allocated: 18598.7529296875 | max allocated: "
        "20931.01220703125 | reserved: 21534.0 | max reserved: 21534.0[Rank 0] (after 1 iterations) "
        "memory (MB) | allocated: 20034.75 | max allocated: 30227.64 | reserved: 31086.0 | max "
        "reserved: 31086.0\n"
    )
    found = read_file(put(tmp_path, text, "a.log")).readings
    assert [(one.name, one.reserved) for one in found] == [
        ("a.log rank 4", 21534 * MIB),
        ("a.log rank 0", 31086 * MIB),
    ]


def test_megatron_restart_counts_as_a_process_of_its_own(tmp_path: Path) -> None:
    lines = [report(0, (10, 30, 40, 40)), report(0, (10, 20, 25, 25)), report(0, (10, 22, 26, 26))]
    found = read_file(put(tmp_path, "\n".join(lines))).readings
    assert [one.allocated for one in found] == [30 * MIB, 22 * MIB]
    assert found[1].name.endswith("start 2")


def test_megatron_without_world_size_takes_the_groups_given(tmp_path: Path) -> None:
    path = put(tmp_path, report(0, (1000, 3000, 3100, 3100), 4600))
    assert "give --groups" in calibrate([path]).left["context"]
    found = calibrate([path], groups=2)
    assert found.fits["context"].figure.value == 1500 * MIB - 2 * MEGATRON.communicator.value


def test_torchtitan_log_gives_the_fullest_training_step() -> None:
    found = read_file(DATA / "torchtitan.log")
    assert found.format == "torchtitan"
    (only,) = found.readings
    assert only.reserved == 48.27 * GIB  # not the 52.10 of validation, nor the model's 3.77
    assert only.allocated is None
    assert any("NVIDIA H100 80GB HBM3 with 79.19 GiB" in note for note in found.notes)


def test_torchtitan_log_alone_fits_nothing_and_says_what_would() -> None:
    with pytest.raises(InputError, match=r"nothing to fit.*memory/max_active\(GiB\)"):
        calibrate([DATA / "torchtitan.log"])


def test_torchtitan_ranks_and_restarts_are_apart(tmp_path: Path) -> None:
    def step(rank: int, number: int, size: float) -> str:
        return f"[rank{rank}]:[titan] - INFO - step: {number:2}  loss: 1  memory: {size:5.2f}GiB(9.0%)"

    lines = [step(0, 1, 2.47), step(1, 1, 3.5), step(0, 10, 2.6), step(0, 1, 2.5)]
    found = read_file(put(tmp_path, "\n".join(lines), "t")).readings
    assert sorted((one.name, round((one.reserved or 0) / GIB, 2)) for one in found) == [
        ("t rank 0", 2.6),
        ("t rank 0 start 2", 2.5),
        ("t rank 1", 3.5),
    ]


def test_torchtitan_metrics_are_one_run() -> None:
    found = read_file(DATA / "torchtitan.csv")
    assert found.format == "csv"
    (only,) = found.readings
    assert (only.allocated, only.reserved) == (44.02 * GIB, 48.27 * GIB)


def test_statistics_come_alone_in_a_list_named_or_nested(tmp_path: Path) -> None:
    one = {"allocated_bytes.all.peak": 3 * GIB, "reserved_bytes.all.peak": 4 * GIB}
    nested = {"allocated_bytes": {"all": {"peak": 3 * GIB}}, "reserved_bytes": {"all": {"peak": 4 * GIB}}}
    forms: list[tuple[Any, list[str]]] = [
        (one, ["s.json"]),
        ([one, one], ["s.json rank 0", "s.json rank 1"]),
        ({"a": one}, ["s.json a"]),
        (nested, ["s.json"]),
        ({**one, "name": "mine"}, ["mine"]),
    ]
    for form, names in forms:
        found = read_file(put(tmp_path, json.dumps(form), "s.json"))
        assert found.format == "stats"
        assert [reading.name for reading in found.readings] == names
        assert found.readings[0].reserved == 4 * GIB


def test_statistics_tell_of_a_squeezed_allocator(tmp_path: Path) -> None:
    stats = {"allocated_bytes.all.peak": 30, "reserved_bytes.all.peak": 40, "num_alloc_retries": 3}
    assert "short of memory 3 times" in read_file(put(tmp_path, json.dumps(stats))).notes[0]


def snapshot(trace: bool = True) -> dict[str, Any]:
    """As torch.cuda.memory._snapshot() has it: what is left after a step, and the step."""
    frames = [{"filename": "train.py", "line": 3, "name": "step"}]

    def event(action: str, size: int, address: int) -> dict[str, Any]:
        return {
            "action": action,
            "addr": address,
            "size": size,
            "stream": 0,
            "time_us": 1700000000000000,
            "compile_context": "N/A",
            "user_metadata": "",
            "pool_id": (0, 0),
            "frames": frames,
        }

    events = [
        event("segment_alloc", 20 * MIB, 0),
        event("alloc", 10 * MIB, 0),
        event("segment_map", 40 * MIB, 1),
        event("alloc", 30 * MIB - 100, 1),  # asked for; the allocator rounds up to 512 bytes
        event("free_requested", 30 * MIB - 100, 1),
        event("free_completed", 30 * MIB - 100, 1),
        event("segment_unmap", 40 * MIB, 1),
        {"action": "oom", "device_free": 5, "size": 7, "stream": 0, "frames": frames},
        event("snapshot", 0, 0),
    ]
    block = {"size": 10 * MIB, "requested_size": 10 * MIB, "address": 0, "state": "active_allocated"}
    segment = {
        "device": 0,
        "address": 0,
        "total_size": 20 * MIB,
        "allocated_size": 10 * MIB,
        "active_size": 10 * MIB,
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "blocks": [{**block, "frames": frames}],
    }
    return {
        "segments": [segment],
        "device_traces": [events if trace else [], []],
        "allocator_settings": {"expandable_segments": False, "roundup_power2_divisions": {"1": 0}},
        "external_annotations": [],
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_snapshot_is_replayed_to_its_peak(tmp_path: Path, protocol: int) -> None:
    path = put(tmp_path, pickle.dumps(snapshot(), protocol=protocol), "snapshot.pickle")
    found = read_file(path)
    assert found.format == "snapshot"
    (only,) = found.readings
    assert (only.allocated, only.reserved) == (40 * MIB, 60 * MIB)
    assert calibrate([path]).fits["allocator"].figure.value == 0.5


def test_snapshot_as_json_says_the_same(tmp_path: Path) -> None:
    (only,) = read_file(put(tmp_path, json.dumps(snapshot()), "s.json")).readings
    assert (only.allocated, only.reserved) == (40 * MIB, 60 * MIB)


def test_snapshot_without_history_has_no_peak(tmp_path: Path) -> None:
    path = put(tmp_path, pickle.dumps(snapshot(trace=False)))
    (only,) = read_file(path).readings
    assert not only.at_peak
    with pytest.raises(InputError, match=r"nothing to fit.*no history was recorded"):
        calibrate([path])


def test_snapshot_whose_trace_takes_away_too_much_is_refused(tmp_path: Path) -> None:
    altered = snapshot()
    altered["device_traces"][0].append({"action": "alloc", "size": 30 * MIB, "addr": 9})
    refused(put(tmp_path, pickle.dumps(altered)), "takes more away")


@pytest.mark.parametrize(
    ("heading", "factor"), [("gib", GIB), ("mib", MIB), ("gb", 1e9), ("mb", 1e6), ("kib", 1024), ("bytes", 1)]
)
def test_csv_units_are_in_the_columns_name(tmp_path: Path, heading: str, factor: float) -> None:
    text = f"name,allocated_{heading},reserved_{heading},note\nmine,300,330,x\n"
    found = read_file(put(tmp_path, text, "u.csv"))
    assert found.readings[0].allocated == 300 * factor
    assert found.notes == ("u.csv: columns not read: note",)


def test_csv_may_come_from_a_spreadsheet(tmp_path: Path) -> None:
    text = '\ufeffAllocated_GiB,reserved_gib,device_gib\r\n3,"4",\r\n\r\n,,\r\n2,3,4\r\n'
    found = read_file(put(tmp_path, text, "x")).readings
    assert [(one.name, one.device) for one in found] == [("x:2", None), ("x:5", 4 * GIB)]


def test_the_format_can_be_forced() -> None:
    path = DATA / "runs.csv"
    assert read_file(path, "csv").format == "csv"
    refused(path, "no reading in it", format="megatron")
    with pytest.raises(InputError, match="did you mean csv"):
        calibrate([path], format="cvs")


# --- the fit -----------------------------------------------------------------------------------


def made(slacks: list[float], context: float, share: float, groups: list[int]) -> list[Reading]:
    found = []
    for slack, count in zip(slacks, groups, strict=True):
        reserved = 40 * GIB * (1 + slack)
        device = reserved + context + share * count
        found.append(Reading("r", "w", 40 * GIB, reserved, device, groups=count))
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 0.5), min_size=2, max_size=30),
    st.floats(0, 2 * GIB),
    st.floats(0, GIB),
    st.data(),
)
def test_known_terms_are_recovered(slacks: list[float], context: float, share: float, data: Any) -> None:
    counts = data.draw(st.lists(st.integers(0, 4), min_size=len(slacks), max_size=len(slacks)))
    counts[0], counts[1] = 0, 3
    found = fit(made(slacks, context, share, counts), MEGATRON)
    figures = found.profile.overheads
    assert figures["context"].value == pytest.approx(context, abs=2)
    assert figures["communicator"].value == pytest.approx(share, abs=2)
    middle = sorted(slacks)
    assert middle[0] - 1e-6 <= figures["allocator"].value <= middle[-1] + 1e-6
    assert all(abs(one.outside_off or 0) < 4 for one in found.residuals)
    for figure in figures.values():
        assert 0 <= figure.least <= figure.value <= figure.most


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1e10)), min_size=2, max_size=12))
def test_least_squares_stays_above_zero_and_no_corner_is_better(points: list[tuple[int, float]]) -> None:
    points = [(0, points[0][1]), (2, points[1][1]), *points[2:]]

    def error(context: float, share: float) -> float:
        return sum((size - context - share * groups) ** 2 for groups, size in points)

    context, share = line(points)
    assert context >= 0
    assert share >= 0
    sizes = [size for _, size in points]
    scale = max(1.0, *sizes) ** 2
    squares = sum(groups**2 for groups, _ in points)
    corners = [(0, 0), (sum(sizes) / len(sizes), 0), (0, sum(g * s for g, s in points) / squares)]
    for corner in corners:
        assert error(context, share) <= error(*corner) + 1e-9 * scale


def test_range_is_that_of_percentiles_when_there_are_many() -> None:
    least, most, few = spread([float(x) for x in range(1, 100)], 99)
    assert (round(least, 6), round(most, 6), few) == (5, 95, False)
    assert spread([0.1, 0.3], 2) == (0.1, 0.3, True)
    assert spread([float(x) for x in range(18)], 18) == (0, 17, True)
    assert spread([float(x) for x in range(19)], 19) == pytest.approx((0, 18, False))


@pytest.mark.parametrize("count", [19, 20, 30, 39, 100])
def test_range_holds_the_next_run_nine_times_in_ten(count: int) -> None:
    # Whatever the distribution, it is that of ranks: the next falls into each of the gaps alike.
    least, most, _ = spread([place / (count + 1) for place in range(1, count + 1)], count)
    assert most - least == pytest.approx(0.9)


def test_few_runs_keep_the_frameworks_own_range() -> None:
    found = fit(made([0.05] * 5, GIB, 0.9 * GIB, [0, 1, 2, 3, 3]), MEGATRON)
    for term, fitted in found.fits.items():
        own = getattr(MEGATRON, term)
        least, most = fitted.figure.range_beside(own)
        assert fitted.figure.few
        assert least == min(own.least, fitted.figure.least)
        assert most == max(own.most, fitted.figure.most)
        assert "framework's own until there are" in fitted.figure.source
    assert found.fits["communicator"].figure.range_beside(MEGATRON.communicator)[0] < 0.9 * GIB
    assert any("few runs (5): the range of allocator, context and" in note for note in found.profile.notes)


def test_enough_runs_have_a_range_of_their_own() -> None:
    readings = made([0.05 + i / 1000 for i in range(19)], GIB, 0, [0] * 19)
    found = fit(readings, MEGATRON)
    assert not any(fitted.figure.few for fitted in found.fits.values())
    assert found.fits["allocator"].figure.range_beside(MEGATRON.allocator) == (0.05, 0.068)
    assert found.profile.runs == 19
    assert fit(readings[1:], MEGATRON).fits["allocator"].figure.few


def test_a_line_takes_up_two_runs() -> None:
    slacks, groups = [0.05] * 21, [i % 4 for i in range(21)]
    enough, fewer = (fit(made(slacks[:n], GIB, GIB, groups[:n]), MEGATRON).fits for n in (21, 20))
    assert not any(fitted.figure.few for fitted in enough.values())
    assert {term for term, fitted in fewer.items() if fitted.figure.few} == {"context", "communicator"}


def test_ranks_of_a_run_count_as_one(tmp_path: Path) -> None:
    ranks = "\n".join(report(rank, (1000, 3000 + rank, 3200, 3200)) for rank in range(64))
    found = calibrate([put(tmp_path, ranks, "a.log")])
    assert found.fits["allocator"].figure.few
    assert (found.fits["allocator"].readings, found.profile.runs) == (64, 1)
    assert "median of 64 readings of 1 run" in found.fits["allocator"].figure.source
    logs = [put(tmp_path, ranks, f"{i}.log") for i in range(19)]
    assert not calibrate(logs).fits["allocator"].figure.few
    rows = "allocated_gib,reserved_gib\n" + "30,31\n" * 19
    assert not calibrate([put(tmp_path, rows, "r.csv")]).fits["allocator"].figure.few


def plan_with(profile: Profile | None, gpus: str = "8xH100", budget: int | None = None) -> Plan:
    """Llama 3 8B under torchtitan's FSDP: its allocator serves pools, which take more than tensors."""
    training = TrainingSpec(seq_length=8192, global_batch_size=8, framework="torchtitan", profile=profile)
    cluster = ClusterSpec.parse(gpus).model_copy(update={"budget_bytes": budget})
    layout = Layout(data_parallel=8, data_shards=8, sharding="fsdp")
    return estimate(ModelSpec.from_catalog("llama-3-8b"), cluster, training, layout)


def test_one_reading_does_not_make_a_plan_certain() -> None:
    one = calibrate([DATA / "torchtitan.csv"], gpu="H100").profile
    budget = plan_with(None).most_bytes - MIB
    plain, measured = plan_with(None, budget=budget), plan_with(one, budget=budget)
    assert plain.verdict == measured.verdict == "at risk"
    assert measured.least_bytes <= plain.least_bytes
    assert measured.most_bytes >= plain.most_bytes
    assert any("allocator: " in note and "10%, 0% to 12% (measured" in note for note in measured.assumptions)
    assert any(
        "few runs: the range of allocator takes in the framework's own" in n for n in measured.warnings
    )


def test_a_profile_says_where_it_may_not_hold() -> None:
    def said(profile: Profile, gpus: str = "8xH100") -> list[str]:
        return [note for note in plan_with(profile, gpus=gpus).warnings if note.startswith("the profile")]

    one = calibrate([DATA / "torchtitan.csv"], gpu="H100").profile
    whole = calibrate([DATA / "runs.csv"], framework="torchtitan", gpu="H100").profile
    own = "the profile was measured on H100-SXM-80GB, not A100-SXM-80GB: "
    assert not any("was measured on" in note for note in said(one))
    assert own + "the allocator's part depends little on the GPU" in said(one, "8xA100")
    assert own + "its context and communicator may differ" in said(whole, "8xA100")
    assert not any("no framework" in note for note in said(one))
    unnamed = calibrate([DATA / "runs.csv"]).profile
    assert "the profile names no framework: it may have been measured under another" in said(unnamed)
    assert not said(profile(framework="torchtitan"))


def test_one_number_of_groups_leaves_the_communicator_alone() -> None:
    share = MEGATRON.communicator.value
    found = fit(made([0.1, 0.1], 0.4 * GIB, share, [2, 2]), MEGATRON)
    assert found.profile.overheads["context"].value == pytest.approx(0.4 * GIB, abs=1)
    assert "communicator" not in found.profile.overheads
    assert "cannot be told from context" in found.left["communicator"]


def test_readings_below_the_frameworks_communicators_are_not_exceeded() -> None:
    found = fit(made([0.1], 0, MEGATRON.communicator.value / 2, [3]), MEGATRON)
    figures = found.profile.overheads
    assert figures["context"].value == 0
    assert figures["communicator"].value == pytest.approx(MEGATRON.communicator.value / 2, abs=1)
    assert abs(found.residuals[0].outside_off or 0) < 3


def test_readings_of_one_gpu_give_context_itself() -> None:
    assert fit(made([0.1], 0.6 * GIB, 0, [0]), MEGATRON).fits["context"].figure.value == pytest.approx(
        0.6 * GIB
    )


def test_prediction_is_shown_and_not_fitted() -> None:
    one = Reading("r", "w", 10 * GIB, 11 * GIB, predicted=8 * GIB)
    found = fit([one], MEGATRON)
    assert found.residuals[0].tensors_off == 0.25
    assert found.profile.overheads["allocator"].value == pytest.approx(0.1, abs=1e-6)
    assert any("+25.0%" in note for note in found.profile.notes)


def test_terms_nobody_speaks_of_stay_and_are_named() -> None:
    found = calibrate([DATA / "torchtitan.csv"])
    assert found.defaults["allocator"] == STACKS["torchtitan"].allocator
    assert set(found.left) == {"context", "communicator"}
    assert set(found.profile.overheads) == {"allocator"}


def test_framework_is_the_logs_or_the_one_given() -> None:
    assert calibrate([DATA / "megatron.log"]).profile.framework == "megatron"
    assert calibrate([DATA / "torchtitan.csv"]).profile.framework == "torchtitan"
    unnamed = calibrate([DATA / "runs.csv"]).profile
    assert unnamed.framework is None
    assert any("no file says of which framework" in note for note in unnamed.notes)
    both = calibrate([DATA / "megatron.log", DATA / "runs.csv"]).profile
    assert both.framework == "megatron"
    assert "runs.csv: taken to be of megatron, as the others are" in both.notes
    two = [DATA / "megatron.log", DATA / "torchtitan.csv"]
    with pytest.raises(InputError, match=r"megatron\.log is of megatron, torchtitan\.csv is of torchtitan"):
        calibrate(two)
    assert calibrate(two, framework="fsdp").profile.framework == "fsdp"
    assert calibrate([DATA / "megatron.log"], framework="hf").profile.framework == "hf"
    with pytest.raises(InputError, match="did you mean"):
        calibrate([DATA / "runs.csv"], framework="megatrom")


def test_gpu_is_the_catalogs_and_bounds_every_reading() -> None:
    assert calibrate([DATA / "runs.csv"], gpu="h200").profile.gpu == "H200-SXM-141GB"
    refused(DATA / "runs.csv", "V100", gpu="V100-SXM2-32GB")


def test_the_same_file_counts_once() -> None:
    with pytest.raises(InputError, match="given twice"):
        calibrate([DATA / "runs.csv", DATA / ".." / "calibrate" / "runs.csv"])


# --- what is refused ---------------------------------------------------------------------------

GOOD = report(0, (10, 30, 40, 40))
WRONG_TEXT = [
    ("", ("empty",)),
    ("\n", ("no reading",)),
    ("hello\nworld\n", ("no reading of memory",)),
    (GOOD[:70], (":1", "cut off before")),
    (GOOD + "\n" + GOOD[:90], (":2", "cut off before 'reserved'")),
    (report(0, (10, 50, 40, 40)), (":1", "allocated", "cannot take more")),
    (report(0, (35, 30, 40, 40)), (":1", "garbled")),
    (report(0, (10, 30, 40, 4)), (":1", "garbled")),
    (GOOD.replace("30.00", "nan"), (":1", "max allocated 'nan'", "not a number")),
    (GOOD.replace("30.00", "inf"), (":1", "'inf'")),
    (GOOD.replace("30.00", "-30.00"), (":1", "not negative")),
    (GOOD.replace("30.00", "1e999"), (":1",)),
    (GOOD.replace("30.00", "3_0"), (":1", "digits only")),
    (report(0, (0, 0, 0, 0)), (":1", "nothing was measured")),
    (report(0, (10, 30, 40, 40), 39), (":1", "less than PyTorch alone")),
    (report(0, (1000, 3000, 4000, 4000), 75000), (":1", "another process")),
    (report(0, (1, 2, 9e7, 9e7)), (":1", "no GPU has as much")),
    ("step: 1  loss: 1  memory: 82.4", (":1", "cut off")),
    ("step: 1  loss: 1  memory:", (":1", "cut off")),
    ("step: 1  loss: 1  memory: nanGiB(nan%)", (":1", "not a number")),
    (
        "CUDA capacity: NVIDIA H100 with 95.04GiB memory\nstep: 1  loss: 1  memory: 82.40GiB(50.00%)",
        (":2", "does not agree"),
    ),
    ("allocated,reserved\n1,2", (":1", "'allocated'", "no unit")),
    ("reserved_gib,allocated_tons\n1,2", (":1", "no unit")),
    ("allocated_gib,allocated_mib\n1,2", (":1", "allocated twice")),
    ("allocated_gib,reserved_gib\n1", (":2", "1 cells under 2 headings")),
    ("allocated_gib,reserved_gib\n1,2,3", (":2", "cut off")),
    ("allocated_gib,reserved_gib\n", ("no reading in it",)),
    ("allocated_gib,reserved_gib\n70 GiB,71", (":2", "digits only")),
    ("allocated_gib,reserved_gib\n70,x", (":2", "reserved_gib 'x'", "not a number")),
    ("allocated_gib,reserved_gib\n70,1e400", (":2",)),
    ("allocated_gib,reserved_gib\n70000,71000", (":2", "is its unit right")),
    ("allocated_mib,reserved_gib\n7000,70", (":2", "units mixed up")),
    ("allocated_gib,reserved_gib\n72,70", (":2", "cannot take more")),
    ("allocated_gib,reserved_gib,groups\n1,2,1.5", (":2", "whole number")),
    ("allocated_gib,reserved_gib,groups\n1,2,99", (":2", "0 to 16")),
    ("allocated_gib,groups\n,2", (":2", "without a size")),
    ('allocated_gib,reserved_gib\n"1,2', (":2",)),
]


@pytest.mark.parametrize(("text", "words"), WRONG_TEXT)
def test_wrong_text_is_refused_with_line_and_reason(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    refused(put(tmp_path, text), *words)


WRONG_JSON: list[tuple[str, tuple[str, ...]]] = [
    ("{", ("no reading of memory",)),
    ("[]", ("empty list",)),
    ("{}", ("allocated_bytes.all.peak is missing",)),
    ("[[]]", ("item 0", "list instead of")),
    ('[{"a": 1}', ("not JSON",)),
    ("[" * 100_000, ("nested too deeply",)),
    ('{"allocated_bytes.all.peak": 5}', ("reserved_bytes.all.peak is missing",)),
    ('{"allocated_bytes.all.peak": NaN, "reserved_bytes.all.peak": 5}', ("not JSON", "NaN")),
    ('{"allocated_bytes.all.peak": true, "reserved_bytes.all.peak": 5}', ("bool, not a number",)),
    ('{"allocated_bytes.all.peak": "5", "reserved_bytes.all.peak": 5}', ("str, not a number",)),
    ('{"allocated_bytes.all.peak": -5, "reserved_bytes.all.peak": 5}', ("not negative",)),
    ('{"allocated_bytes.all.peak": 6, "reserved_bytes.all.peak": 5}', ("cannot take more",)),
    ('{"allocated_bytes.all.peak": 1' + "0" * 5000 + "}", ("not JSON",)),
    ('{"allocated_bytes.all.peak": 0, "reserved_bytes.all.peak": 0}', ("nothing was measured",)),
    ('{"segments": 3}', ("segments is not a list",)),
    ('{"segments": [{}]}', ("segment 0", "total_size is NoneType")),
    ('{"segments": [{"total_size": 1, "allocated_size": 2}]}', ("more than total_size",)),
    ('{"segments": [], "device_traces": {}}', ("no reading",)),
    ('{"segments": [], "device_traces": {"a": 1}}', ("not a list",)),
    ('{"segments": [], "device_traces": [[{"size": 1}]]}', ("event 0", "no action")),
    ('{"segments": [], "device_traces": [[{"action": "alloc", "size": "9"}]]}', ("event 0", "str")),
]


@pytest.mark.parametrize(("text", "words"), WRONG_JSON)
def test_wrong_json_is_refused_with_the_reason(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    refused(put(tmp_path, text, "s.json"), *words)


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        refused(path, "not a regular file")
    refused(tmp_path / "absent", "no such file")
    with pytest.raises(InputError):
        calibrate([Path("a\0b")])
    with pytest.raises(InputError):
        calibrate([Path("x" * 5000)])


def test_lines_and_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(put(tmp_path, "x\n" + "y" * (readings.MAX_LINE_BYTES + 1)), ":2", "a line of over")
    refused(put(tmp_path, GOOD + "\n\0"), ":2", "zero byte", format="megatron")
    monkeypatch.setattr(readings, "MAX_TEXT_BYTES", 10)
    refused(put(tmp_path, GOOD), "read up to 10")
    monkeypatch.setattr(readings, "MAX_JSON_BYTES", 10)
    refused(put(tmp_path, json.dumps(snapshot()), "j"), "read up to 10", format="stats")


def test_sparse_giant_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "giant"
    with path.open("wb") as file:
        file.truncate(2**41)
    for name in (None, "snapshot", "stats", "csv", "megatron"):
        refused(path, "read up to", format=name)


def test_hostile_lines_take_no_time(tmp_path: Path) -> None:
    pieces = [
        "[Rank 1] (",
        "step: 1 ",
        "memory (MB) | a",
        "AAAA capacity: ",
        "Theoretical memory footprints:",
    ]
    text = "\n".join([*(piece * (900_000 // len(piece)) for piece in pieces), GOOD])
    start = time.monotonic()
    with contextlib.suppress(InputError):
        calibrate([put(tmp_path, text)], format="megatron")
    with contextlib.suppress(InputError):
        calibrate([put(tmp_path, text)], format="torchtitan")
    assert time.monotonic() - start < 10


def test_names_from_a_file_cannot_move_the_cursor(tmp_path: Path) -> None:
    text = 'name,allocated_gib,reserved_gib\n"\x1b]0;x\x07[red]n[/red]\x1b[2J",3,4\n'
    output = run(str(put(tmp_path, text))).output
    assert "\x1b" not in output
    assert "\x07" not in output
    assert "(red)n(/red)" in output


# --- hostile pickles ---------------------------------------------------------------------------


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "it ran"
    yield path
    assert not path.exists(), "code in the pickle was run"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["alone", "segment", "event", "key"])
def test_pickle_that_would_run_code_runs_nothing(
    tmp_path: Path, marker: Path, protocol: int, place: str
) -> None:
    bomb: Any = Runs(os.system, f"touch '{marker}'")
    data: Any = snapshot()
    if place == "alone":
        data = bomb
    elif place == "segment":
        data["segments"].append(bomb)
    elif place == "event":
        data["device_traces"][0][0]["frames"] = [bomb]
    else:
        data = {"segments": [], ("x", bomb): 1}
    path = put(tmp_path, pickle.dumps(data, protocol=protocol), "bad.pickle")
    message = refused(path, "not a pickle of plain data")
    assert re.search(r"GLOBAL|REDUCE|BINBYTES", message)


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


TOUCH = short("posix") + short("system") + b"\x93"  # STACK_GLOBAL


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("GLOBAL", b"cposix\nsystem\n."),
        ("STACK_GLOBAL", TOUCH + b"."),
        ("INST", b"(iposix\nsystem\n."),
        ("OBJ", b"(" + TOUCH + b"o."),
        ("NEWOBJ", b"})\x81."),
        ("NEWOBJ_EX", b"})}\x92."),
        ("REDUCE", b"})R."),
        ("BUILD", b"}}b."),
        ("EXT1", b"\x82\x01."),
        ("EXT2", b"\x83\x01\x00."),
        ("EXT4", b"\x84\x01\x00\x00\x00."),
        ("PERSID", b"Pid\n."),
        ("BINPERSID", b"}Q."),
        ("NEXT_BUFFER", b"\x97."),
        ("BINBYTES", b"B\x01\x00\x00\x00a."),
        ("BYTEARRAY8", b"\x96\x01\0\0\0\0\0\0\0a."),
        ("EMPTY_SET", b"\x8f."),
        ("FROZENSET", b"(\x91."),
        ("DUP", b"}2\x86."),
        ("INT", b"I5\n."),
        ("LONG4", b"\x8b\x01\x00\x00\x00\x05."),
        ("STRING", b"S'a'\n."),
        ("PUT", b"}p0\n."),
    ],
)
def test_every_instruction_beyond_plain_data_is_refused(tmp_path: Path, name: str, code: bytes) -> None:
    message = refused(put(tmp_path, b"\x80\x04" + code), "byte ")
    assert "GLOBAL" in message if name == "OBJ" else f"instruction {name}," in message


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("memo index", b"}r\xff\xff\xff\x7f."),
        ("memo index", b"h\x05."),
        ("a value is missing", b"\x86."),
        ("a mark is missing", b"}u."),
        ("no dict to fill", b"]K\x01K\x02s."),
        ("no list to fill", b"}K\x01a."),
        ("no list to fill", b"](K\x01(K\x02ee."),
        ("a key without a value", b"}(K\x01u."),
        ("key is tuple", b"}))s."),
        ("key is float", b"}G" + b"\0" * 8 + b"Ns."),
        ("key is int", b"}J\xff\xff\xff\x7fNs."),
        ("a text of over", b"X\x01\x00\x10\x00" + b"a" * (2**20 + 1) + b"."),
        ("many digits", b"\x8a\xff" + b"\x7f" * 255 + b"."),
        ("it ends early", b"}}."),
        ("it ends early", b"}(."),
        ("it ends early", b"."),
        ("nothing to remember", b"\x94."),
        ("", b"X\xff\xff\xff\x7fabc."),
        ("", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc."),
        ("", b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc."),
        ("", b"}"),
        ("", b"\xff."),
        ("", b""),
    ],
)
def test_malformed_pickle_is_refused_without_harm(tmp_path: Path, what: str, code: bytes) -> None:
    start = time.monotonic()
    refused(put(tmp_path, b"\x80\x04" + code), what or "not a pickle of plain data")
    assert time.monotonic() - start < 2


def test_truncated_snapshot_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = pickle.dumps(snapshot(), protocol=4)
    for end in range(3, len(whole) - 1, 37):
        refused(put(tmp_path, whole[:end]), "not a pickle of plain data")


def test_pickle_bombs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_pickle, "MAX_CONTAINERS", 1000)
    with pytest.raises(InputError, match="1,000 lists"):
        read_plain_pickle(b"\x80\x02(" + b"]" * 2000 + b"l.", "x")
    monkeypatch.setattr(plain_pickle, "MAX_INSTRUCTIONS", 500)
    with pytest.raises(InputError, match="500 instructions"):
        read_plain_pickle(b"\x80\x02(" + b"N" * 600 + b"t.", "x")
    shared = b"\x80\x02)q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(200)) + b"Ns."
    with pytest.raises(InputError):  # a tuple of tuples whose hash would take 2^200 steps
        read_plain_pickle(b"\x80\x02}" + shared[2:], "x")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=5), inner, max_size=5)
        | st.tuples(inner, inner)
        | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=30,
)


@settings(deadline=None)
@given(PLAIN, st.integers(2, 5))
def test_plain_data_is_read_as_pickle_would(data: Any, protocol: int) -> None:
    assert read_plain_pickle(pickle.dumps(data, protocol=protocol), "x") == data


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(InputError):
        read_plain_pickle(b"\x80\x04" + data, "x")


@settings(deadline=None, max_examples=100)
@given(
    st.binary(max_size=300) | st.text(max_size=300).map(str.encode),
    st.sampled_from([None, *readings.FORMATS]),
)
def test_any_file_is_read_or_refused(tmp_path_factory: Any, data: bytes, kind: str | None) -> None:
    path = put(tmp_path_factory.getbasetemp(), data, "fuzz")
    with contextlib.suppress(InputError):
        read_file(path, kind)


# --- the profile and the command ---------------------------------------------------------------


def profile(**more: Any) -> Profile:
    figure = OverheadFigure(value=0.05, least=0.01, most=0.09, source="s")
    return Profile(**({"overheads": {"allocator": figure}, "runs": 2, "notes": ("a",)} | more))


def test_profile_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    found = calibrate([DATA / "runs.csv"], gpu="H200")
    write_profile(found.profile, path)
    assert read_profile(path) == found.profile
    assert read_profile(str(path)) == found.profile
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_profile_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "mine", "p.json")
    with pytest.raises(InputError, match="exists"):
        write_profile(profile(), path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_profile(profile(), path, force=True)
    assert path.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": "planner.profile/2"}, "schema_version"),
        ({"extra": 1}, "extra"),
        ({"runs": "2"}, "runs"),
        ({"runs": 0}, "runs"),
        ({"overheads": {}}, "overheads is empty"),
        ({"overheads": {"nccl": {}}}, "overheads.nccl"),
        (
            {"overheads": {"allocator": {"value": 0.1, "least": 0.2, "most": 0.3, "source": ""}}},
            "not in order",
        ),
        ({"overheads": {"allocator": {"value": -1, "least": -1, "most": 1, "source": ""}}}, "allocator"),
        ({"overheads": {"allocator": {"value": 1e9, "least": 1e9, "most": 1e9, "source": ""}}}, "a fraction"),
        (
            {"overheads": {"context": {"value": 0.5, "least": 0.5, "most": 0.5, "source": ""}}},
            "bytes are meant",
        ),
    ],
)
def test_wrong_profile_is_refused_with_the_field(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    text = json.dumps(json.loads(profile().model_dump_json()) | change)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read_profile(put(tmp_path, text, "p.json"))
    assert "p.json" in str(caught.value)


def test_a_foreign_json_is_said_to_be_no_profile(tmp_path: Path) -> None:
    config = put(tmp_path, json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 4096}), "c.json")
    with pytest.raises(InputError) as caught:
        read_profile(config)
    assert str(caught.value) == f"{config} is not a profile of planner calibrate: overheads is missing"


def test_a_profiles_text_cannot_move_the_cursor(tmp_path: Path) -> None:
    for change in ({"gpu": "\x1b[2J"}, {"framework": "a\nb"}, {"notes": ("\x07",)}):
        with pytest.raises(InputError, match="cannot be shown"):
            read_profile(put(tmp_path, profile(**change).model_dump_json(), "p.json"))


def test_a_missing_field_is_called_missing(tmp_path: Path) -> None:
    from planner.runs import load_runs

    runs = put(tmp_path, "name,allocated_gib\na,3\n", "bad.csv")
    with pytest.raises(InputError, match=r"run 1: id is missing$"):
        load_runs(runs)


def test_help_lists_every_framework() -> None:
    words = " ".join(run("--help").output.split())
    assert all(name in words.partition("--framework")[2].partition("--gpu")[0] for name in STACKS)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    nan = profile().model_dump_json().replace("0.05", "NaN")
    for text in ("", "{", "[]", "3", "[" * 100_000, nan, "x" * 1_000_001, b"\xff\xfe"):
        with pytest.raises(InputError, match="profile"):
            read_profile(put(tmp_path, text, "p.json"))
    for path in (tmp_path, tmp_path / "absent", "a\0b", "x" * 5000, "/dev/zero"):
        with pytest.raises(InputError, match="profile"):
            read_profile(path)


def test_reading_a_profile_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    heavy = "{'numpy', 'pulp', 'networkx', 'rich', 'typer', 'pydantic', 'planner.readings'}"
    code = f"import sys, planner.profiles; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("name", ["megatron.log", "runs.csv", "torchtitan.csv", "memory_stats.json"])
def test_tables_fit_the_terminal(name: str, columns: int) -> None:
    output = run(str(DATA / name), columns=columns).output
    assert max(len(line) for line in output.splitlines()) <= columns
    assert "…" not in output


def test_many_readings_and_long_names_fit_too(tmp_path: Path) -> None:
    rows = [f"{'a long name ' * 5}{i},{30 + i / 50},{33 + i / 40},{34.5 + i / 40},{i % 4}" for i in range(40)]
    text = "name,allocated_gib,reserved_gib,device_gib,groups\n" + "\n".join(rows)
    output = run(str(put(tmp_path, text)), columns=80).output
    assert max(len(line) for line in output.splitlines()) <= 80
    assert "the 12 of 40 farthest" in output


def test_command_writes_once_and_replaces_when_forced(tmp_path: Path) -> None:
    target = tmp_path / "p.json"
    arguments = [str(DATA / "runs.csv"), "--output", str(target)]
    first = run(*arguments)
    assert first.exit_code == 0
    assert "wrote" in first.output
    assert read_profile(target).runs == 5
    target.write_text("mine")
    again = run(*arguments)
    assert again.exit_code == 2
    assert "--force" in again.output
    assert target.read_text() == "mine"
    assert run(*arguments, "--force").exit_code == 0
    assert read_profile(target).runs == 5


def test_nothing_is_written_when_anything_is_wrong(tmp_path: Path) -> None:
    bad = put(tmp_path, GOOD[:70], "bad.log")
    target = tmp_path / "p.json"
    result = run(str(DATA / "runs.csv"), str(bad), "--output", str(target))
    assert result.exit_code == 2
    assert "bad.log:1" in result.output
    assert not target.exists()
    kept = put(tmp_path, (DATA / "runs.csv").read_bytes(), "in.csv")
    for output in (str(tmp_path), str(tmp_path / "no" / "p.json"), str(kept), "/dev/null", "a\0b"):
        result = run(str(kept), "--output", output, "--force")
        assert result.exit_code == 2, output
        assert "--output" in result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.log", "in.csv"]


def test_json_is_alone_and_has_every_reading() -> None:
    found = json.loads(run(str(DATA / "runs.csv"), "--json").stdout)
    assert found["schema"] == "planner.calibrate/1"
    assert Profile.model_validate_json(json.dumps(found["profile"])).runs == 5
    assert len(found["readings"]) == 5
    assert found["readings_of"] == {"allocator": 5, "context": 5, "communicator": 5}
    wrong = run(str(DATA / "torchtitan.log"), "--json")
    assert wrong.exit_code == 2
    assert "nothing to fit" in json.loads(wrong.stdout)["error"]


# --- the page ----------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("block", blocks("console"))
def test_console_examples_of_the_page(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    first, *expected = block.splitlines()
    result = CliRunner().invoke(APP, shlex.split(first)[2:], env={"COLUMNS": "100"})
    output, position, anywhere = [line.rstrip() for line in result.output.splitlines()], 0, True
    for one in expected:
        if one == "...":
            anywhere = True
            continue
        rest = output[position:] if anywhere else output[position : position + 1]
        assert one.rstrip() in rest, f"missing: {one!r}\nin:\n{result.output}"
        position += rest.index(one.rstrip()) + 1
        anywhere = False


def test_shell_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command_line,) = blocks("sh")
    for source, name in (("megatron.log", "train.log"), ("runs.csv", "runs.csv")):
        put(tmp_path, (DATA / source).read_bytes(), name)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(APP, shlex.split(command_line)[1:])
    assert result.exit_code == 0, result.output
    assert read_profile("profile.json").gpu == "H100-SXM-80GB"


def test_python_and_json_examples_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks("python")), {}, "page", str(PAGE), 0)
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test)
    assert runner.failures == 0
    (text,) = blocks("json")
    assert read_profile(put(tmp_path, text, "p.json")).gpu == "H100-SXM-80GB"
