"""Step times held against measured ones: the arithmetic of the report, and where the planner stands."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

from planner.catalog import step_time
from planner.cli import app
from planner.comparison import summarize
from planner.errors import InputError
from planner.runs import Runs, load_runs
from planner.timing import TimeReport, Timing, bands, kendall, rankings
from planner.validate import predict_step, validate_times

RUNS = load_runs(Path(__file__).parent / "runs.json")


@cache
def report() -> TimeReport:
    return validate_times(RUNS)


def timing(run: str, predicted: float, measured: float = 1.0) -> Timing:
    return Timing(run, "group", "A", predicted, measured, 1000, False)


@pytest.mark.parametrize(
    ("predicted", "measured", "tau"),
    [
        ([1, 2], [3, 4], 1),
        ([1, 2], [4, 3], -1),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),
        ([1, 1, 2], [1, 2, 3], 2 / 6**0.5),
        ([1, 2, 3], [1, 1, 2], 2 / 6**0.5),
    ],
)
def test_kendalls_tau_counts_pairs_in_order(
    predicted: list[float], measured: list[float], tau: float
) -> None:
    assert kendall(predicted, measured) == pytest.approx(tau)


def test_errors_are_summed_up_by_source() -> None:
    (found,) = summarize([timing("a", 1.1), timing("b", 0.8), timing("c", 1.3)], lambda one: one.group)
    assert (found.runs, found.worst_run) == (3, "c")
    assert (found.median, found.p90, found.worst, found.bias) == pytest.approx((0.2, 0.3, 0.3, 0.1))


def test_a_table_is_what_shares_all_but_the_layout() -> None:
    """BLOOM's rows of one model on 384 GPUs: one table; the same layout twice counts once."""
    name = "BLOOM, Megatron-DeepSpeed: BLOOM-size-search 196B, 2048 tokens, 384 x A100-SXM-80GB"
    (table,) = [one for one in report().rankings if one.name == name]
    assert table.layouts == 4
    rows = {one.run: one for one in report().timings}
    picked, best = rows[table.picked], rows[table.best]
    per_token = [one.measured / one.tokens for one in (picked, best)]
    assert table.regret == pytest.approx(per_token[0] / per_token[1] - 1)
    assert min(row.predicted / row.tokens for row in rows.values() if "196B-h13824" in row.run) == (
        picked.predicted / picked.tokens
    )


def test_a_perfect_prediction_keeps_every_order_and_costs_nothing() -> None:
    exact = [one._replace(predicted=one.measured) for one in report().timings]
    for table in rankings(RUNS, exact):
        assert table.regret == 0
        assert table.tau == pytest.approx(1)


def test_every_timed_run_is_predicted_or_left_out_with_a_reason() -> None:
    timed = {run.id for run in RUNS.runs if run.step_s is not None}
    assert {one.run for one in report().timings} | set(report().left_out) == timed
    assert all(report().left_out.values())
    assert len(report().timings) > 450


def test_a_step_is_priced_with_all_of_its_micro_batches() -> None:
    run = next(run for run in RUNS.runs if run.id == report().timings[0].run)
    assert run.layout.grad_accum is not None
    twice = run.model_copy(
        update={"layout": run.layout.model_copy(update={"grad_accum": 64 * run.layout.grad_accum})}
    )
    one, many = predict_step(run), predict_step(twice)
    assert isinstance(one, float)
    assert isinstance(many, float)
    assert 20 < many / one < 64.1


def test_where_the_planner_stands_on_what_it_was_not_fitted_to() -> None:
    held_out = [one for one in report().totals if not one.fitted]
    assert held_out[0].runs > 60
    assert held_out[0].median < 0.12
    assert held_out[0].p90 < 0.24
    everything = sorted(abs(one.error) for one in report().timings)
    assert everything[len(everything) // 2] < 0.055
    assert everything[len(everything) * 9 // 10] < 0.17
    assert median(one.tau for one in report().rankings) >= 0.8
    assert median(one.regret for one in report().rankings) < 0.001
    assert max(one.regret for one in report().rankings) < 0.1


def test_runs_without_step_times_are_refused() -> None:
    untimed = tuple(run for run in RUNS.runs if run.step_s is None)
    with pytest.raises(InputError, match="measured step time"):
        validate_times(Runs(runs=untimed))


def test_the_command_prints_times_and_gives_json() -> None:
    shown = CliRunner().invoke(app, ["validate", "--time", "--source", "vTrain", "--worst", "3"])
    assert shown.exit_code == 0
    assert "Kendall's tau" in shown.output
    found = CliRunner().invoke(app, ["validate", "--time", "--source", "vTrain", "--json"])
    document = json.loads(found.stdout)
    assert document["schema"] == "planner.validate_time/1"
    assert document["timed"] == len(document["timings"])
    assert {"name", "layouts", "tau", "regret"} <= set(document["rankings"][0])
    assert CliRunner().invoke(app, ["validate", "--time", "--write", "x.md"]).exit_code == 2


def test_the_bands_are_those_that_every_answer_names() -> None:
    """Of runs that no number was fitted to; and the order of layouts nearer than a tie is not sure."""
    found = bands(report(), RUNS)
    assert found is not None
    named = [step_time(name).value for name in ("least", "most", "tie")]
    assert named == pytest.approx(list(found), abs=0.006)


def test_bands_are_tenths_of_what_was_not_fitted_and_a_tie_is_what_cannot_be_told() -> None:
    exact = [one._replace(predicted=one.measured * 1.25, fitted=False) for one in report().timings]
    found = bands(TimeReport(tuple(exact), (), {}), RUNS)
    assert found is not None
    assert found.least == pytest.approx(0.8)
    assert found.most == pytest.approx(0.8)
    assert found.tie < 0.002
    assert bands(TimeReport(tuple(exact[:5]), (), {}), RUNS) is None


def test_at_most_half_of_the_sources_are_fitted_to() -> None:
    fitted = {one.group for one in report().timings if one.fitted}
    assert not fitted & {one.group for one in report().timings if not one.fitted}
    assert len(fitted) <= len({one.group for one in report().timings}) / 2
