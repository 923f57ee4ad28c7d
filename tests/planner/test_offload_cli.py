"""Offload: which framework runs what of it, and the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from planner import ClusterSpec, TrainingSpec, estimate, explain, search
from planner.api import trace
from planner.best_first import find
from planner.cli import app
from planner.defaults import resolve
from planner.errors import InputError
from planner.layouts import Choices
from planner.offload_choices import canonical
from planner.program import solve
from planner.stages import price
from strategies.layout import Layout
from tests.helpers import gpt, job_of, llama
from tests.planner.test_offload import small_job

# --- Who runs it -------------------------------------------------------------------------------------

REFUSED = [
    ("megatron", "zero2", "optimizer", "use sharding zero1 with optimizer"),
    ("megatron", "zero1", "optimizer,parameters", "use offload optimizer"),
    ("fsdp", "fsdp", "optimizer", "use offload optimizer,parameters"),
    ("deepspeed", "zero1", "optimizer", "sharding zero2 with optimizer"),
    ("deepspeed", "zero3", "parameters", "use offload optimizer"),
    ("deepspeed", "zero3", "optimizer:nvme", "--nvme 10TB"),
    ("hf", "ddp", "optimizer", "framework megatron"),
]


@pytest.mark.parametrize(("framework", "sharding", "offload", "fix"), REFUSED)
def test_an_offload_that_a_framework_lacks_is_refused_with_what_does(
    framework: str, sharding: str, offload: str, fix: str
) -> None:
    training = TrainingSpec(framework=framework, seq_length=512, global_batch_size=1)
    layout = Layout(sharding=sharding, offload=offload)
    with pytest.raises(InputError, match=fix):
        estimate(llama(), ClusterSpec.parse("1xA100"), training, layout)


@pytest.mark.parametrize(
    ("framework", "layout", "recompute", "fix"),
    [
        ("torchtitan", Layout(sharding="fsdp"), "none", "use framework megatron"),
        ("megatron", Layout(sharding="zero1"), "full", "recompute none or auto"),
        ("megatron", Layout(sharding="zero1", pipeline_parallel=2), "none", "pipeline_parallel 1"),
        ("deepspeed", Layout(sharding="zero2"), "full", "framework"),
    ],
)
def test_activations_that_a_framework_does_not_offload_are_refused(
    framework: str, layout: Layout, recompute: str, fix: str
) -> None:
    training = TrainingSpec(framework=framework, seq_length=512, global_batch_size=1)
    cluster = ClusterSpec.parse(f"{layout.world_size}xA100")
    with pytest.raises(InputError, match=fix):
        estimate(llama(), cluster, training, layout, recompute=f"{recompute}+activations")


def test_megatron_leaves_one_layers_activations_on_the_gpu() -> None:
    """transformer_config.py: fewer than num_layers, however little memory there is."""
    model = llama(4, 1024, 8, 8, vocab_size=32000)
    job = job_of(model, "1xA100", seq_length=4096, global_batch_size=1)
    candidate = price(job, Layout(sharding="zero1"), ("none", "none+activations")).spread()
    three = candidate.peak(0, (1, 3))[0]
    solution = solve([replace(candidate, capacity=three * 1.0001)])
    assert solution is not None
    assert solution.rows == ((1, 3),)
    assert solve([replace(candidate, capacity=(three + candidate.peak(0, (0, 4))[0]) / 2)]) is None


def test_an_offload_is_written_in_one_way() -> None:
    assert canonical(" parameters, Optimizer:nvme") == "optimizer:nvme,parameters"
    for text in ("weights", "optimizer:disk", "optimizer,optimizer:nvme", "activations:nvme", ""):
        with pytest.raises(InputError):
            canonical(text)


def test_a_search_that_may_offload_nothing_is_the_same_search() -> None:
    job = small_job(budget_bytes=12 * 2**30)
    plain = find(job, Choices(), top=3)
    assert all(not own.candidate.stages[0].elsewhere for own in plain.answers)
    wider = find(job, Choices(offload=("optimizer",)), top=3)
    assert wider.answers[0].cost <= plain.answers[0].cost * (1 + 1e-6)


def test_explain_lists_what_lies_on_the_host() -> None:
    model = gpt(4, 1024, 16)
    job = job_of(model, "1xA100", framework="deepspeed", seq_length=512, global_batch_size=1)
    layout = Layout(sharding="zero2", offload="optimizer")
    found = explain(model, job.cluster, job.training, layout, moment="host")
    held = sum(one.held for one in found.entries)
    assert held == pytest.approx(found.plan.stages[0].elsewhere["host"].bytes, abs=1)
    assert resolve(model, job.cluster, job.training).stack.name == "deepspeed"


# --- The command line --------------------------------------------------------------------------------

MODEL = "layers=6,hidden=2048,heads=16,ffn=6144,vocab=32000"


def run(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(options), env={"COLUMNS": "140"})
    return result.exit_code, result.output


def test_a_search_that_offloads_says_what_of_which_stage_and_where() -> None:
    options = ["search", "-m", MODEL, "-g", "4xA100", "-s", "2048", "-b", "8", "--memory-budget", "4GiB"]
    options += ["-tp", "1", "-pp", "2", "--offload", "optimizer", "--host-memory", "1TiB"]
    status, printed = run(*options)
    assert status == 0
    assert "Outside the GPUs" in printed
    assert "--optimizer-offload-fraction" in printed or "--optimizer-cpu-offload" in printed
    status, printed = run(*options, "--json")
    document = json.loads(printed)
    assert document["cluster"]["host_memory_bytes"] == 2**40
    stages = document["plans"][0]["stages"]
    assert all(stage["elsewhere"]["host"]["capacity_bytes"] == 2**40 / 4 for stage in stages)
    assert all(stage["offload"]["optimizer"] for stage in stages)


def test_where_nothing_fits_offload_is_among_what_would() -> None:
    status, printed = run(
        "search", "-m", MODEL, "-g", "1xA100", "-s", "2048", "-b", "8", "--memory-budget", "6GiB", "--json"
    )
    assert status == 1
    assert "--offload optimizer" in {change["option"] for change in json.loads(printed)["changes"]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--offload", "weights"), "use optimizer, parameters, activations"),
        (("--offload", "optimizer", "--host-memory", "12"), "is not a size"),
        (("--offload", "optimizer", "--host-memory", "0GB"), "more than nothing"),
        (("--offload", "parameters"), "megatron"),
    ],
)
def test_an_offload_that_cannot_be_is_bad_input(options: tuple[str, ...], says: str) -> None:
    for command in ("search", "estimate"):
        result = CliRunner().invoke(app, [command, "-m", MODEL, "-g", "1xA100", "-b", "8", *options])
        assert result.exit_code == 2
        assert says in " ".join(result.output.split())


@pytest.mark.parametrize("offload", ["optimizer", "activations", "optimizer,activations"])
def test_an_estimate_explains_and_traces_what_it_offloads(offload: str) -> None:
    model = ["-m", MODEL, "-g", "1xA100", "-b", "8", "-s", "4096", "--offload", offload]
    budget = ["--memory-budget", "9GiB"]
    _, printed = run("estimate", *model, *budget, "--json")
    (plan,) = json.loads(printed)["plans"]
    held = plan["stages"][0]["elsewhere"]["host"]
    _, printed = run("explain", *model, *budget, "--moment", "host", "--json")
    entries = json.loads(printed)["entries"]
    assert sum(entry["held"] for entry in entries) == pytest.approx(held["bytes"], abs=1)
    assert {entry["component"] for entry in entries} == set(held["components"])


def test_a_plan_that_offloads_has_a_timeline() -> None:
    job = small_job(budget_bytes=int(4.5 * 2**30))
    choices = Choices(
        offload=("optimizer",), tensor_parallel=(1,), pipeline_parallel=(2,), schedule=("1f1b",)
    )
    plan = search(job.model, job.cluster, job.training, choices=choices, top=1)[0]
    assert any("+" in way for stage in plan.stages for way in stage.rows)
    assert trace(job.model, job.cluster, plan)["traceEvents"]
