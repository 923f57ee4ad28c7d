"""Fits, at risk or does not fit: what a stage needs at least and at most, against what there is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner import ClusterSpec, InputError, Layout, Plan, TrainingSpec, estimate
from planner.best_first import find
from planner.defaults import Job, resolve
from planner.layouts import Choices
from planner.plan import make_plan, verdict_of
from planner.specs import OverheadFigure, Profile
from tests.helpers import job_of, llama
from tests.planner.test_cli import run

GIB, MIB = 2**30, 2**20
MODEL = llama(8, 1024, 8, 8, vocab_size=32000)
LAYOUT = Layout(data_parallel=2, tensor_parallel=2, pipeline_parallel=2, grad_accum=4, sharding="zero1")
TRAINING = TrainingSpec(seq_length=1024, global_batch_size=8)


def cluster_of(budget: int | None = None) -> ClusterSpec:
    return ClusterSpec.parse("8xA100").model_copy(update={"budget_bytes": budget})


def plan_of(budget: int | None = None, training: TrainingSpec = TRAINING, layout: Layout = LAYOUT) -> Plan:
    return estimate(MODEL, cluster_of(budget), training, layout)


def test_a_plan_is_certain_beyond_its_bounds_and_at_risk_between_them() -> None:
    """To the byte, but for the solver's own tolerance of a millionth."""
    whole = plan_of()
    least = max(stage.least_bytes for stage in whole.stages)
    most = max(stage.most_bytes for stage in whole.stages)
    assert (whole.least_bytes, whole.most_bytes) == (least, most)
    assert 0 < least < whole.peak_bytes < most
    above, below = 1 + 2e-6, 1 - 2e-6
    expected = {
        most: "fits",
        int(most * above): "fits",
        int(most * below): "at risk",
        whole.peak_bytes: "at risk",
        least: "at risk",
        int(least * below): "does not fit",
    }
    for budget, verdict in expected.items():
        plan = plan_of(budget)
        assert plan.verdict == verdict, budget - most
        assert plan.fits == (verdict == "fits")
        assert any("at risk" in note for note in plan.warnings) == (verdict == "at risk")
        assert plan.headroom_bytes == budget - most
        assert (plan.least_bytes, plan.most_bytes, plan.peak_bytes) == (least, most, whole.peak_bytes)


def test_one_stage_that_cannot_fit_decides_and_one_at_risk_is_enough() -> None:
    stage = plan_of().stages[0]
    safe = stage.model_copy(update={"least_bytes": 1, "most_bytes": 2, "capacity_bytes": 3})
    risky = safe.model_copy(update={"most_bytes": 4})
    never = safe.model_copy(update={"least_bytes": 4, "most_bytes": 5})
    assert verdict_of([safe, safe]) == "fits"
    assert verdict_of([safe, risky]) == "at risk"
    assert verdict_of([risky, never, safe]) == "does not fit"


@pytest.mark.parametrize("framework", ["megatron", "torchtitan", "fsdp", "hf", "deepspeed"])
def test_bounds_are_the_overheads_bounds(framework: str) -> None:
    """Eight GPUs in one data-parallel group: a context, a group's buffers, slack on tensors or pools."""
    job = job_of(MODEL, "8xA100", framework=framework, seq_length=1024, global_batch_size=8)
    sharding = next(iter(job.stack.shardings)) if framework != "megatron" else "zero1"
    layout = Layout(data_parallel=8, sharding=sharding)
    (stage,) = estimate(MODEL, job.cluster, job.training, layout).stages
    context, group, slack = job.stack.context, job.stack.communicator, job.stack.allocator
    tensors = stage.tensor_bytes
    least = context.least + group.least + tensors * (1 + slack.least)
    assert stage.least_bytes == pytest.approx(least, abs=2)
    pools = (stage.peak_bytes - context.value - group.value) / (1 + slack.value)
    most = context.most + group.most + pools * (1 + slack.most)
    assert stage.most_bytes == pytest.approx(most, abs=4)
    # FSDP's streams have pools of their own; DeepSpeed's flat copies fit in none that the passes leave.
    assert (pools > tensors + 1) == (sharding == "fsdp" or framework == "deepspeed")


def test_a_search_answers_only_with_what_fits_for_sure() -> None:
    """A budget below the most that the leanest layout needs, above the least: nothing is offered."""
    job = replace(job_of(MODEL, "8xA100", seq_length=1024, global_batch_size=8))
    choices = Choices(recompute=("full",), sharding=("zero1",))
    leanest = find(job, choices, "headroom", top=1).answers[0]
    plan = make_plan(job, leanest, {})

    def found(budget: int) -> list[Any]:
        tight = replace(job, cluster=cluster_of(budget))
        return find(tight, choices, "time", top=1).answers

    (answer,) = found(plan.most_bytes + 1024)
    assert make_plan(replace(job, cluster=cluster_of(plan.most_bytes + 1024)), answer, {}).verdict == "fits"
    assert not found(int(plan.most_bytes * 0.999))
    assert plan.least_bytes < plan.most_bytes * 0.999


# --- Profiles -------------------------------------------------------------------------------------


def profile_of(**more: Any) -> Profile:
    overheads = {
        "context": OverheadFigure(value=2 * GIB, least=1 * GIB, most=3 * GIB, source="nvidia-smi"),
        "communicator": OverheadFigure(value=0, least=0, most=0, source="counted in the context"),
        "allocator": OverheadFigure(value=0.5, least=0.25, most=1.0, source="memory_stats"),
    }
    return Profile(overheads=overheads, runs=3, **more)


def test_a_profiles_overheads_replace_the_frameworks_own() -> None:
    own, measured = plan_of(), plan_of(training=TRAINING.model_copy(update={"profile": profile_of()}))
    for before, stage in zip(own.stages, measured.stages, strict=True):
        assert stage.tensor_bytes == before.tensor_bytes
        # One stream, one pool: what the pools serve is what the tensors need.
        assert stage.peak_bytes == pytest.approx(2 * GIB + 1.5 * stage.tensor_bytes, abs=2)
        assert stage.least_bytes == pytest.approx(1 * GIB + 1.25 * stage.tensor_bytes, abs=2)
        assert stage.most_bytes == pytest.approx(3 * GIB + 2.0 * stage.tensor_bytes, abs=2)
    notes = [note for note in measured.assumptions if "(measured: " in note]
    assert len(notes) == 3
    assert any("2 GiB, 1 to 3" in note and "nvidia-smi" in note for note in notes)
    assert any("50%, 25% to 100%" in note and "memory_stats" in note for note in notes)


def test_what_a_profile_has_not_measured_stays_the_frameworks() -> None:
    part = Profile(overheads={"context": profile_of().overheads["context"]}, runs=1)
    job = resolve(MODEL, cluster_of(), TRAINING.model_copy(update={"profile": part}))
    plain = resolve(MODEL, cluster_of(), TRAINING)
    assert job.stack.context.value == 2 * GIB
    assert job.stack.communicator == plain.stack.communicator
    assert job.stack.allocator == plain.stack.allocator


def job_with(profile: Profile, framework: str) -> Job:
    return resolve(MODEL, cluster_of(), TrainingSpec(framework=framework, profile=profile))


def test_a_profile_of_another_framework_is_refused() -> None:
    with pytest.raises(InputError, match="measured under torchtitan, not megatron"):
        job_with(profile_of(framework="torchtitan"), "megatron")
    assert job_with(profile_of(framework="torchtitan"), "torchtitan").stack.context.value == 2 * GIB
    assert job_with(profile_of(), "hf").stack.context.value == 2 * GIB


def test_a_figure_whose_bounds_are_out_of_order_is_refused() -> None:
    with pytest.raises(ValueError, match="not in order"):
        OverheadFigure(value=1, least=2, most=3, source="")


def test_the_command_line_reads_a_profile(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(profile_of(framework="hf").model_dump_json())
    arguments = ["--model", "gpt2-small", "--gpus", "2xA100", "-b", "8", "--json", "--profile", str(file)]
    result = run("estimate", *arguments, "--framework", "hf", "--sharding", "ddp")
    assert result.exit_code == 0, result.output
    (stage,) = json.loads(result.stdout)["plans"][0]["stages"]
    assert stage["peak_bytes"] == pytest.approx(2 * GIB + 1.5 * stage["tensor_bytes"], abs=2)
    refused = run("estimate", *arguments, "--framework", "deepspeed")
    assert refused.exit_code == 2
    assert "measured under hf, not deepspeed" in refused.output


def test_the_command_line_says_at_risk_and_exits_1() -> None:
    arguments = ["--model", "gpt2-small", "--gpus", "2xA100", "-b", "8", "--sharding", "ddp"]
    plan = json.loads(run("estimate", *arguments, "--json").stdout)["plans"][0]
    for budget, verdict, code in (
        (plan["most_bytes"], "fits on", 0),
        (plan["peak_bytes"], "is at risk (usually fits) on", 1),
        (plan["peak_bytes"] - MIB, "is at risk (usually too large) on", 1),
        (plan["least_bytes"] - MIB, "does not fit on", 1),
    ):
        result = run("estimate", *arguments, "--memory-budget", f"{budget}B")
        assert result.exit_code == code, result.output
        assert result.output.startswith(f"gpt2-small {verdict} 2 x A100")
