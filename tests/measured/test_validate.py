"""The validation itself: files of runs, the arithmetic of the report, and that no run is dropped."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from planner.accuracy import cause_of, document, read_causes
from planner.cli_validate import times_section
from planner.comparison import Comparison, Prediction, Report, Sizes, percentile, report_of, summarize
from planner.errors import InputError
from planner.runs import Run, Runs, load_runs
from planner.units import GIB
from planner.validate import chosen, predict, validate

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "accuracy.md"
ROW: dict[str, Any] = {
    "id": "one",
    "kind": "peak",
    "model": "llama-2-7b",
    "seq": 4096,
    "gpu": {"kind": "H100-SXM-80GB"},
    "gpus": 8,
    "framework": "megatron",
    "precision": "bf16",
    "layout": {"data_parallel": 8, "micro_batch_size": 1, "grad_accum": 4, "sharding": "zero1"},
    "recompute": "none",
    "measured": {"gib": 60.0, "kind": "allocated"},
}


@cache
def runs() -> Runs:
    return load_runs(HERE / "runs.json")


@cache
def report() -> Report:
    return validate(runs())


def written(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def run_of(**changes: Any) -> Run:
    return Run(**{**ROW, **changes})


def made(*sizes: float, verdict: str = "fits", capacity: float = 80.0) -> Prediction:
    stages = tuple(Sizes(size * GIB, 1.1 * size * GIB, (1.1 * size + 1) * GIB) for size in sizes)
    return Prediction("one", stages, capacity * GIB, verdict)


# Files of runs.


def test_a_list_alone_is_a_file_of_runs(tmp_path: Path) -> None:
    assert load_runs(written(tmp_path / "my.json", [ROW])).runs[0].measured is not None


def test_models_beside_the_runs_are_known_by_name(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128, "vocab_size": 1000}
    shape |= {"max_position_embeddings": 4096}
    data = {"models": {"tiny": shape}, "runs": [{**ROW, "model": "tiny"}]}
    run = load_runs(written(tmp_path / "my.json", data)).runs[0]
    assert isinstance(predict(run), Prediction)


def test_csv_has_a_column_for_every_field(tmp_path: Path) -> None:
    names = "id,kind,model,seq,gpu,usable_gib,gpus,framework,precision,data_parallel,tensor_parallel"
    names += ",micro_batch_size,grad_accum,sharding,recompute,gib,memory,options.attention,needs"
    cells = "mine,peak,llama-2-7b,4096,H100,,8,megatron,bf16,4,2,1,4,zero1,none,41.5,allocated,flash,"
    run = load_runs(written(tmp_path / "my.csv", f"{names}\n{cells}\n")).runs[0]
    assert (run.layout.tensor_parallel, run.gpu.usable_gib, run.needs) == (2, None, ())
    assert run.options == {"attention": "flash"}
    assert run.measured is not None
    assert (run.measured.gib, run.measured.kind) == (41.5, "allocated")
    assert isinstance(predict(run), Prediction)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"kind": "fine"}, ["run 1 (one)", "kind='fine'"]),
        ({"gpus": 0}, ["run 1 (one)", "gpus=0"]),
        ({"layout": {"micro_batch_size": -3}}, ["layout.micro_batch_size=-3"]),
        ({"layout": {"width": 3}}, ["layout.width=3"]),
        ({"measured": {"gib": 0}}, ["measured.gib=0"]),
        ({"measured": {"gib": 3, "kind": "resident"}}, ["measured.kind='resident'"]),
        ({"id": ""}, ["id=''"]),
        ({"wheels": 4}, ["wheels=4"]),
    ],
)
def test_an_error_names_the_run_and_the_field(tmp_path: Path, row: dict[str, Any], words: list[str]) -> None:
    path = written(tmp_path / "my.json", [{**ROW, **row}])
    with pytest.raises(InputError) as error:
        load_runs(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("my.json", "{", "is not JSON"),
        ("my.json", "3", "no list of runs"),
        ("my.json", "[]", "runs"),
        ("my.json", "[3]", "run 1: '3' is not a table"),
        ("my.json", json.dumps([ROW, ROW]), "id='one' is there twice"),
        ("my.json", json.dumps({"runs": [ROW], "models": {"tiny": {"hidden_size": 0}}}), "model tiny"),
        ("my.csv", "", "empty"),
        ("my.csv", "id,kind\na\n", "line 2"),
        ("my.csv", "id,kind,gpus\na,peak,many\n", "run 1 (a)"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, name: str, text: str, word: str) -> None:
    with pytest.raises(InputError, match=word.replace("(", r"\(").replace(")", r"\)")):
        load_runs(written(tmp_path / name, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_runs(tmp_path / "none.json")


# Predictions.


def test_what_a_run_needs_is_its_reason() -> None:
    assert predict(run_of(needs=["LoRA", "offload"])) == "LoRA, offload"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"framework": "abacus"}, "framework abacus"),
        ({"seq": None}, "seq is not given"),
        ({"recompute": None}, "recompute is not given"),
        ({"layout": {"data_parallel": 8}}, "micro_batch_size is not given"),
        ({"layout": {**ROW["layout"], "data_parallel": 7}}, "is 7, not the 8 GPUs"),
        ({"model": "llama-2-8b"}, "unknown model"),
        ({"gpu": {"kind": "abacus"}}, "unknown GPU kind"),
        ({"recompute": "some"}, "recompute='some'"),
    ],
)
def test_what_cannot_be_predicted_has_a_reason(changes: dict[str, Any], word: str) -> None:
    reason = predict(run_of(**changes))
    assert isinstance(reason, str)
    assert word in reason


def test_a_setting_that_the_stack_lacks_is_told() -> None:
    prediction = predict(run_of(options={"weather": "fair", "attention": "flash"}))
    assert isinstance(prediction, Prediction)
    assert prediction.unheeded == ("weather=fair",)


def test_many_micro_batches_are_planned_as_few_with_the_same_memory() -> None:
    layout = {**ROW["layout"], "data_parallel": 2, "pipeline_parallel": 4}
    many, few = (predict(run_of(layout={**layout, "grad_accum": count})) for count in (4096, 16))
    assert many == few


# The report's arithmetic.


def test_a_reading_is_held_against_what_it_counts() -> None:
    expected = {"allocated": 50, "active": 50, "reserved": 55, "unknown": 55, "nvidia-smi": 56}
    for kind, size in expected.items():
        run = run_of(measured={"gib": 50.0, "kind": kind})
        (one,) = report_of(Runs(runs=(run,)), {"one": made(50.0, 40.0)}).comparisons
        assert one.predicted == pytest.approx(size)
        assert one.error == pytest.approx(size / 50 - 1)


def test_a_scope_says_which_stages_count() -> None:
    for scope, size in (("max", 50.0), ("first and last", 40.0)):
        run = run_of(measured={"gib": 50.0, "kind": "allocated", "scope": scope})
        (one,) = report_of(Runs(runs=(run,)), {"one": made(40.0, 50.0, 30.0)}).comparisons
        assert one.predicted == pytest.approx(size)


def test_every_counter_of_a_run_is_compared() -> None:
    run = run_of(measured={"gib": 50.0, "kind": "allocated", "others": {"reserved": 60.0}})
    found = report_of(Runs(runs=(run,)), {"one": made(50.0)}).comparisons
    assert [(one.kind, one.measured) for one in found] == [("allocated", 50.0), ("reserved", 60.0)]


def test_ranks_are_compared_with_their_own_stage() -> None:
    measured = {"gib": 50.0, "kind": "allocated", "ranks_gib": [50.0, 50.0, 40.0, 40.0]}
    found = report_of(Runs(runs=(run_of(measured=measured),)), {"one": made(50.0, 40.0)}).ranks
    assert [one.rank for one in found] == [0, 1, 2, 3]
    assert all(one.error == pytest.approx(0) for one in found)


def test_verdicts_meet_outcomes() -> None:
    kinds = {"a": "oom", "b": "ran", "c": "peak", "d": "oom", "e": "ran"}
    verdicts = {"a": "fits", "b": "fits", "c": "does not fit", "d": "does not fit", "e": "at risk"}
    listed = Runs(runs=tuple(run_of(id=name, kind=kind) for name, kind in kinds.items()))
    found = report_of(listed, {name: made(50.0, verdict=verdict) for name, verdict in verdicts.items()})
    assert found.confusion == {
        ("out of memory", "fits"): 1,
        ("ran", "fits"): 1,
        ("ran", "does not fit"): 1,
        ("out of memory", "does not fit"): 1,
        ("ran", "at risk"): 1,
    }
    assert [one.run for one in found.outcomes if one.wrong] == ["a", "c"]
    assert found.outcomes[0].fill == pytest.approx(50 / 80)


def test_a_difference_needs_both_runs_and_the_same_counter() -> None:
    listed = Runs(
        runs=(run_of(id="less"), run_of(id="more", measured={"gib": 65.0, "kind": "allocated"})),
        differences=(
            {"name": "a", "less": "less", "more": "more"},
            {"name": "b", "less": "less", "more": "none"},
        ),
    )
    found = report_of(listed, {"less": made(50.0), "more": made(54.0)}).differences
    assert [(one.name, one.predicted, one.measured) for one in found] == [("a", pytest.approx(4.0), 5.0)]


def test_errors_are_summed_up_without_their_sign_but_for_the_bias() -> None:
    sizes = {"a": 90.0, "b": 101.0, "c": 102.0, "d": 130.0}
    rows = [Comparison(name, "lab", "A", "reserved", size, 100.0, False) for name, size in sizes.items()]
    (one,) = summarize(rows, lambda c: c.group)
    assert (one.runs, one.worst_run) == (4, "d")
    assert (one.median, one.p90, one.worst) == (pytest.approx(0.06), pytest.approx(0.3), pytest.approx(0.3))
    assert one.bias == pytest.approx(0.015)


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([float(x) for x in range(1, 11)], 0.9) == 9
    assert percentile([7.0], 0.9) == 7


def test_the_longest_beginning_of_an_id_gives_the_cause(tmp_path: Path) -> None:
    causes = read_causes(written(tmp_path / "causes.json", {"lab-": "broad", "lab-7": "narrow"}))
    assert [cause_of(name, causes) for name in ("lab-71", "lab-3", "shop")] == ["narrow", "broad", ""]
    with pytest.raises(InputError, match="table of ids"):
        read_causes(written(tmp_path / "causes.json", [1]))


def test_a_part_of_the_runs_can_be_chosen() -> None:
    listed = Runs(runs=(run_of(id="a", tier="A"), run_of(id="b", group="Lab"), run_of(id="c", kind="ran")))
    assert [run.id for run in chosen(listed, "lab", None, None).runs] == ["b"]
    assert [run.id for run in chosen(listed, None, None, ("A",)).runs] == ["a"]
    with pytest.raises(InputError, match="no run is left"):
        chosen(listed, "nowhere", None, None)


# The repository's own runs.


def test_every_run_is_predicted_or_has_a_reason() -> None:
    found = report()
    ids = [run.id for run in runs().runs]
    assert len(ids) == len(set(ids)) == found.runs == len(found.predictions) + len(found.reasons)
    assert set(ids) == set(found.predictions) | set(found.reasons)
    assert all(reason.strip() for reasons in found.reasons.values() for reason in reasons)


def test_every_reading_of_a_predicted_run_is_compared() -> None:
    read = {run.id for run in runs().runs if run.measured and run.measured.scope != "sum"}
    assert {one.run for one in report().comparisons} == read & set(report().predictions)


def test_runs_have_sources_and_readings() -> None:
    for run in runs().runs:
        assert run.source, run.id
        assert (run.measured is not None) == (run.kind == "peak"), run.id


def test_notes_lead_to_runs() -> None:
    ids = {run.id for run in runs().runs}
    for pair in runs().differences:
        assert {pair.less, pair.more} <= ids
    for start in [*read_causes(HERE / "causes.json"), *(one.prefix for one in runs().fitted)]:
        assert any(name.startswith(start.removeprefix("step time of ")) for name in ids), start


def test_the_page_is_what_the_code_says() -> None:
    causes = read_causes(HERE / "causes.json")
    expected = document(report(), causes, times_section(runs(), causes))
    assert PAGE.read_text() == expected, "write it anew: planner validate --write docs/accuracy.md"
