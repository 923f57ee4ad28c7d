"""What a whole training takes: checkpoints against files, failures against a simulation, identities."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from planner import ClusterSpec, Layout, ModelSpec, Plan, TrainingSpec, estimate
from planner.cli import app
from planner.cost import checkpoint_bytes, cost_plan, daly_goodput, daly_interval, young_interval
from planner.cost_inputs import read_price
from planner.errors import InputError
from planner.plan import CostPlan, Span
from planner.render_cost import cost_lines
from planner.stacks import STACKS
from planner.units import HOUR, parse_seconds
from tests.helpers import gpt, job_of, llama

DATA = json.loads((Path(__file__).parents[1] / "data" / "checkpoints.json").read_text())


def written(**more: Any) -> ModelSpec:
    """The model whose checkpoints were written."""
    return llama(2, 256, 4, 4, intermediate_size=512, vocab_size=1000, **more)


@pytest.mark.parametrize("case", DATA["files"], ids=lambda case: "-".join(map(str, case.values())))
def test_checkpoints_are_as_large_as_those_that_frameworks_wrote(case: dict[str, Any]) -> None:
    """Files have headers besides: 0.05 to 1.5 % of a model as small as this, never less than the tensors."""
    fields: dict[str, Any] = {name: case[name] for name in ("framework", "precision")}
    fields |= {"optimizer": case["optimizer"]} if "optimizer" in case else {}
    fields |= {"frozen": {"embeddings": True}} if case.get("frozen") else {}
    fields |= {"adapters": {"rank": case["lora"], "targets": ("q", "v")}} if "lora" in case else {}
    job = job_of(written(tie_word_embeddings=case.get("tied", False)), "1xA100", **fields)
    predicted = checkpoint_bytes(job, Layout(sharding=case["sharding"]))
    assert predicted <= case["bytes"] <= predicted * 1.015


def test_megatron_saves_weights_masters_and_moments_in_fp32() -> None:
    """Two bytes of the model's own, four each of the optimizer's weights and moments."""
    model = gpt(2, 256, 4, vocab=1024)
    job = job_of(model)
    assert checkpoint_bytes(job, Layout(sharding="zero1")) == 14 * model.num_parameters
    lean = job_of(model, optimizer_dtype="bf16")  # which are saved in fp32 all the same
    assert checkpoint_bytes(lean, Layout(sharding="zero1")) == 14 * model.num_parameters
    whole = job_of(model, precision="fp32")
    assert checkpoint_bytes(whole, Layout(sharding="ddp")) == 12 * model.num_parameters
    assert checkpoint_bytes(whole, Layout(sharding="zero1")) == 16 * model.num_parameters
    for job in (job_of(model), whole):  # Megatron-FSDP's parameters are the main weights
        assert checkpoint_bytes(job, Layout(sharding="fsdp")) == 12 * model.num_parameters


def test_a_checkpoint_does_not_depend_on_the_layout_but_for_the_padded_vocabulary() -> None:
    job = job_of(llama(vocab_size=1024), "64xA100")
    once = checkpoint_bytes(job, Layout())
    for layout in (Layout(tensor_parallel=8), Layout(pipeline_parallel=4), Layout(data_parallel=64)):
        assert checkpoint_bytes(job, layout) == once
    padded = job_of(llama(vocab_size=1000), "64xA100")
    more = checkpoint_bytes(padded, Layout(tensor_parallel=16)) - checkpoint_bytes(padded, Layout())
    assert more == 2 * 14 * (2048 - 1024) * 256


def test_evicted_states_are_saved_too() -> None:
    paged = job_of(written(), "1xA100", framework="hf", optimizer="paged-adamw")
    usual = job_of(written(), "1xA100", framework="hf")
    assert checkpoint_bytes(paged, Layout(sharding="ddp")) == checkpoint_bytes(usual, Layout(sharding="ddp"))


@pytest.mark.parametrize("framework", STACKS)
def test_every_framework_has_a_source_for_what_it_saves(framework: str) -> None:
    saving = STACKS[framework].saving
    assert saving.source
    assert {*saving.in_fp32, *saving.without_weights} <= {*STACKS[framework].shardings}


# Failures.


def simulated(interval: float, write: float, restart: float, mtbf: float, work: float, seed: int) -> float:
    """Wall time of one run, failure by failure: their times are drawn first, work goes on between them."""
    random = Random(seed)
    now = saved = 0.0
    failure = random.expovariate(1 / mtbf)
    ready = 0.0  # when work may go on
    while saved < work:
        end = ready + interval + write
        if end <= failure:
            now = ready = end
            saved += interval
            continue
        ready = failure + restart  # one that strikes within a restart starts it again
        failure += random.expovariate(1 / mtbf)
        while failure < ready:
            ready = failure + restart
            failure += random.expovariate(1 / mtbf)
    return now


@pytest.mark.parametrize(
    ("mtbf", "restart", "write"),
    [(24, 10, 5), (6, 10, 5), (0.25, 10, 5), (2.8, 10, 0.05), (3, 60, 10), (1, 0, 20)],
)
def test_goodput_is_that_of_a_simulation_of_failures(mtbf: float, restart: float, write: float) -> None:
    """Hours between failures, minutes of the rest; Daly 2006, figures 3 to 5, have the first three."""
    mtbf, restart, write = mtbf * HOUR, restart * 60, write * 60
    interval = daly_interval(write, mtbf)
    work = 3000 * interval
    runs = [simulated(interval, write, restart, mtbf, work, seed) for seed in range(40)]
    mean = sum(runs) / len(runs)
    spread = sqrt(sum((run - mean) ** 2 for run in runs) / (len(runs) - 1) / len(runs))
    expected = work / daly_goodput(interval, write, restart, mtbf)
    assert abs(mean - expected) < 3.5 * spread
    assert spread / mean < 0.01  # the test could tell a difference of a few per cent


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_intervals_are_those_of_dalys_figures(mtbf: float, minutes: float) -> None:
    """Daly 2006, figures 3, 4 and 5: checkpoints of 5 minutes."""
    assert daly_interval(5 * 60, mtbf * 60) / 60 == pytest.approx(minutes, abs=0.5 if minutes > 10 else 0.05)


@settings(deadline=None)
@given(
    mtbf=st.floats(1e3, 1e7),
    write=st.floats(1e-4, 0.5),
    restart=st.floats(0, 1),
    factor=st.floats(0.2, 5),
)
def test_no_other_interval_has_a_better_goodput(
    mtbf: float, write: float, restart: float, factor: float
) -> None:
    """Daly's is an expansion: it loses no more than a five-hundredth against any other."""
    write, restart = write * mtbf, restart * mtbf
    best = daly_interval(write, mtbf)
    goodput = daly_goodput(best, write, restart, mtbf)
    assert daly_goodput(best * factor, write, restart, mtbf) <= goodput * 1.002
    assert 0 < goodput < 1
    assert young_interval(write, mtbf) > best or write / mtbf > 0.3  # to first order both are one


def test_of_half_the_time_between_failures_a_checkpoint_has_dalys_other_branch() -> None:
    assert daly_interval(200.0, 100.0) == 100.0
    assert daly_interval(600.0, 100.0) == 100.0


# The plan.

GPUS = "16xA100"
LAYOUT = Layout(data_parallel=16, data_shards=16, grad_accum=4, sharding="zero1")


def plan_of(tokens: float | None = 1e12, **cluster: Any) -> Plan:
    """A small model on 16 GPUs."""
    spec = ClusterSpec.model_validate({**dict(ClusterSpec.parse(GPUS)), **cluster})
    training = TrainingSpec(seq_length=1024, global_batch_size=64, tokens=tokens)
    return estimate(llama(), spec, training, LAYOUT)


def cost_of(tokens: float | None = 1e12, **cluster: Any) -> CostPlan:
    cost = plan_of(tokens, **cluster).cost
    assert cost is not None
    return cost


def test_without_tokens_and_prices_there_is_no_cost() -> None:
    assert plan_of(None).cost is None


def test_hours_energy_and_money_follow_from_the_step() -> None:
    plan = plan_of(price=2.5, currency="USD", pue=1.2)
    cost = plan.cost
    assert cost
    assert cost.wall_s
    assert cost.gpu_hours
    assert cost.energy_kwh
    assert cost.money
    assert cost.compute_s
    assert cost.steps == 15_258_790
    assert cost.goodput is None
    assert cost.compute_s.value == pytest.approx(float(plan.days or 0) * 86400)
    assert cost.wall_s == cost.compute_s
    assert cost.compute_s.least / cost.compute_s.value == pytest.approx(
        plan.step_time_least_s / plan.step_time_s
    )
    assert cost.gpu_hours.value == pytest.approx(16 * cost.wall_s.value / 3600)
    assert cost.energy_kwh.most == pytest.approx(cost.gpu_hours.most * 0.4 * 1.2)
    assert cost.money.least == pytest.approx(cost.gpu_hours.least * 2.5)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_failures_lengthen_everything_by_the_goodput() -> None:
    failing = {"gpu_mtbf_s": 16 * 5 * HOUR, "checkpoint_bytes_per_s": 1e6, "restart_s": 600}
    without, cost = cost_of(price=1.0), cost_of(price=1.0, **failing)
    assert cost.goodput
    assert cost.money
    assert without.money
    assert cost.interval_s
    assert cost.checkpoint_s
    assert cost.mtbf_s == 5 * HOUR
    assert cost.checkpoint_s == cost.checkpoint_bytes / 1e6
    assert cost.compute_s == without.compute_s
    assert cost.money.value == pytest.approx(without.money.value / cost.goodput)
    assert cost.interval_s == daly_interval(cost.checkpoint_s, cost.mtbf_s)
    step = plan_of().step_time_s
    assert cost.interval_steps == round(cost.interval_s / step)
    assert cost.goodput == daly_goodput(cost.interval_steps * step, cost.checkpoint_s, 600, 5 * HOUR)
    assert cost_of(job_mtbf_s=5 * HOUR, checkpoint_bytes_per_s=1e6, restart_s=600).goodput == cost.goodput


def test_an_interval_is_a_step_at_least_and_the_training_at_most() -> None:
    often = cost_of(job_mtbf_s=2.0, checkpoint_bytes_per_s=1e13)
    assert often.interval_steps == 1
    assert often.interval_s
    assert often.interval_s < plan_of().step_time_s
    short = cost_of(tokens=1e6, job_mtbf_s=1e9, checkpoint_bytes_per_s=1e6)
    assert short.interval_steps == short.steps == 16


def test_what_is_not_given_is_said_not_to_be_counted() -> None:
    notes = " ".join(plan_of().assumptions)
    assert "failures and checkpoints are not counted" in notes
    assert "no price" in notes
    assert "--pue" in notes
    failing = plan_of(job_mtbf_s=1e5, checkpoint_bytes_per_s=1e9, price=1.0)
    notes = " ".join(failing.assumptions)
    assert "--restart-time" in notes
    assert "no price" not in notes
    assert "not counted in days" not in notes
    assert not any("checkpoint" in note for note in plan_of(None).assumptions)


def test_a_job_that_fails_before_it_gets_on_is_refused() -> None:
    with pytest.raises(InputError, match=r"fails every 20 s.*a restart of 600 s.*restart sooner"):
        cost_of(job_mtbf_s=20.0, checkpoint_bytes_per_s=1e9, restart_s=600)
    with pytest.raises(InputError, match="raise --checkpoint-bandwidth"):
        cost_of(job_mtbf_s=20.0, checkpoint_bytes_per_s=1e4)
    failing = {"job_mtbf_s": 1.0, "checkpoint_bytes_per_s": 1e15}
    job = job_of(llama(), GPUS)
    job = replace(job, cluster=job.cluster.model_copy(update=failing))
    with pytest.raises(InputError, match="smaller steps"):
        cost_plan(job, LAYOUT, Span(value=5, least=4, most=6))


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "price without tokens": (["--price", "2.5"], ["--price 2.5", "--tokens"]),
    "pue without tokens": (["--pue", "1.1"], ["--pue 1.1", "--tokens"]),
    "pue below 1": (["--pue", "0.9", "--tokens", "1T"], ["--pue 0.9", "1"]),
    "failures without checkpoints": (["--gpu-mtbf", "50000h"], ["--gpu-mtbf", "--checkpoint-bandwidth"]),
    "restart without failures": (["--restart-time", "10min"], ["--restart-time", "--gpu-mtbf"]),
    "both": (
        ["--gpu-mtbf", "1h", "--job-mtbf", "1h", "--checkpoint-bandwidth", "1GB"],
        ["--gpu-mtbf and --job-mtbf"],
    ),
    "bare time": (["--job-mtbf", "8"], ["'8'", "10min"]),
    "bare bandwidth": (["--checkpoint-bandwidth", "50"], ["--checkpoint-bandwidth", "'50'"]),
    "no bandwidth": (["--checkpoint-bandwidth", "0GB"], ["--checkpoint-bandwidth 0"]),
    "a price in words": (["--price", "cheap", "--tokens", "1T"], ["'cheap'", "2.5USD"]),
    "markup": (["--price", "2[red]", "--tokens", "1T"], ["'2[red]'"]),
    "free": (["--price", "0", "--tokens", "1T"], ["--price 0"]),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_option_rule_and_fix(options: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(app, ["estimate", "-m", "gpt2-small", "-g", "8xH100", *options])
    assert result.exit_code == 2
    for word in words:
        assert word in result.output, result.output


def test_times_and_prices_are_read_in_their_units() -> None:
    assert [parse_seconds(t) for t in ("90s", "10min", "8h", "2d")] == [90, 600, 8 * HOUR, 48 * HOUR]
    assert read_price("2.5USD") == (2.5, "USD")
    assert read_price(" 3 € ") == (3.0, "€")


@pytest.mark.parametrize("command", ["search", "estimate", "compare"])
def test_commands_take_them_and_json_has_them(command: str) -> None:
    options = ["-m", "gpt2-small", "-g", "8xH100", "--tokens", "10B", "--price", "2USD", "--json"]
    document = json.loads(CliRunner().invoke(app, [command, *options]).output)
    rows = document["plans"] if "plans" in document else [r["plan"] for r in document["rows"] if "plan" in r]
    assert all(row["cost"]["money"]["value"] == 2 * row["cost"]["gpu_hours"]["value"] for row in rows)


def test_the_lines_below_the_headline_say_what_was_given_and_no_more() -> None:
    lines = [str(line) for line in cost_lines(cost_of(tokens=1e9))]
    assert "hours (" in lines[0]
    assert "price" not in lines[0]
    assert lines[1].startswith("checkpoint ")
    assert "goodput" not in lines[1]
    failing = {"job_mtbf_s": 1e5, "checkpoint_bytes_per_s": 1e9}
    lines = [str(line) for line in cost_lines(cost_of(price=2.0, **failing))]
    assert "at work" in lines[0]
    assert "price " in lines[0]
    assert "1 GB/s" in lines[1]
    assert "a failure every 27.8 h: goodput 9" in lines[1]
    (line,) = cost_lines(cost_of(tokens=None, **failing))
    assert "goodput" in str(line)


def test_nothing_of_it_is_imported_unless_asked_for() -> None:
    code = (
        "import sys; from planner.cli import app\n"
        "try: app(['estimate', '-m', 'gpt2-small', '-g', '8xH100', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if 'cost' in name and name.startswith('planner')))"
    )
    for options, found in (
        ([], "[]"),
        (["--tokens", "1B"], "['planner.cost', 'planner.cost_words', 'planner.render_cost']"),
    ):
        run = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
        assert run.stdout.splitlines()[-1] == found, run.stderr
