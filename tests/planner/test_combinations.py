"""Random combinations of everything: each is planned soundly or refused with a reason.

A plan may not hold less than its states, nor anything negative or without a number; a refusal says what is
wrong. Nothing else may come out: no other exception, no nonsense.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import ClusterSpec, ModelSpec, Plan, TrainingSpec, estimate
from planner.api import check_choices
from planner.best_first import find
from planner.catalog import names
from planner.defaults import resolve
from planner.errors import InputError
from planner.layouts import Choices
from planner.optimizers import OPTIMIZERS
from planner.plan import make_plan
from planner.stacks import STACKS
from strategies.context_parallel import COMMS
from strategies.layout import SHARDINGS, Layout
from strategies.pipeline_parallel import FOLDED, SCHEDULES

MODELS = sorted(names("models"), key=lambda name: (not name.startswith("llama"), name))
GPUS = ("V100-32G", "A100", "H100", "H200", "B200")
LORA: tuple[dict[str, Any], ...] = (
    {"rank": 8},
    {"rank": 16, "targets": ("q", "v"), "quantize": "nf4", "double": True},
    {"rank": 4, "dora": True, "dropout": 0.1},
)


TWISTS = (
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
    "expert_parallel",
    "expert_tensor_parallel",
    "sharding",
    "schedule",
    "precision",
    "optimizer",
    "gradient_dtype",
    "attention",
    "adapters",
    "expert_imbalance",
    "expert_capacity_factor",
    "gpu",
    "offload",
)
"""What may be other than the framework's usual: a few at a time, as most pairs contradict."""


@st.composite
def jobs(draw: st.DrawFn) -> tuple[ModelSpec, ClusterSpec, TrainingSpec, Layout, str]:
    """A model of the catalog, GPUs, a way to train it with a few twists, a layout and a recompute policy."""
    twists = draw(st.sets(st.sampled_from(TWISTS), max_size=5))

    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    def twist(name: str, usual: Any, *others: Any) -> Any:
        return pick(*others) if name in twists else usual

    model = ModelSpec.from_catalog(pick(*MODELS))
    framework = pick(*STACKS)
    stack = STACKS[framework]
    tensor, pipeline = twist("tensor_parallel", 1, 2, 4, 8, 16), twist("pipeline_parallel", 1, 2, 3, 8)
    data, micro, accum = pick(1, 2, 8), pick(1, 2), pick(1, 8, 16)
    schedule = "1f1b" if pipeline == 1 else twist("schedule", "1f1b", *SCHEDULES)
    offloads = [item for one in stack.offloading.values() for item in one.whole]
    context, comm = twist("context_parallel", 1, 2, 4, 8), pick(*(stack.context_comms or COMMS))
    layout = Layout(
        offload=twist("offload", "", "", *offloads),
        data_parallel=data,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        context_parallel=context,
        context_comm=comm,
        ulysses_degree=pick(2, 2, 3, 4) if context > 1 and comm == "ulysses+ring" else 1,
        expert_parallel=twist("expert_parallel", 1, 2, 8) if model.experts or pick(True, False) else 1,
        expert_tensor_parallel=twist("expert_tensor_parallel", 1, 1, 2) if model.experts else 1,
        chunks=2 if schedule in (*FOLDED, "interleaved") else 1,
        micro_batch_size=micro,
        grad_accum=accum,
        sequence_parallel=tensor > 1 and pick(True, True, False),
        sharding=twist("sharding", next(iter(stack.shardings)), *SHARDINGS),
        schedule=schedule,
    )
    positions = model.patches.tokens if model.patches else model.max_position_embeddings
    routed = model.experts or pick(False, False, True)
    usual = "pure-bf16" if framework == "hf" else None  # what further families were traced in
    fields: dict[str, Any] = {
        "seq_length": min(pick(512, 2048, 16384), positions),
        "global_batch_size": data * micro * accum,
        "framework": framework,
        "precision": twist("precision", pick(None, usual), *stack.recipes),
        "optimizer": twist("optimizer", "adamw", *OPTIMIZERS),
        "gradient_dtype": twist("gradient_dtype", None, "fp32", "bf16"),
        "attention": twist("attention", None, "eager", "flash"),
        "adapters": twist("adapters", None, *LORA),
        "expert_imbalance": twist("expert_imbalance", 1.0, 1.5, 3.0) if routed else 1.0,
        "expert_capacity_factor": twist("expert_capacity_factor", None, 1.0, 1.25) if routed else None,
    }
    cluster = ClusterSpec.parse(f"{layout.world_size}x{twist('gpu', 'H100', *GPUS)}")
    training = TrainingSpec.model_validate({k: v for k, v in fields.items() if v is not None})
    return model, cluster, training, layout, pick("none", "full", "auto")


def check(model: ModelSpec, cluster: ClusterSpec, plan: Plan) -> None:
    """Nothing of a plan is negative or without a number, and its GPUs hold its states."""
    times = (plan.step_time_s, plan.tokens_per_s, plan.mfu, plan.hfu, plan.critical_path_s)
    assert all(isfinite(value) and value > 0 for value in times)
    assert plan.mfu < 1
    assert plan.hfu < 1.2
    assert isfinite(plan.bubble_fraction)
    whole = 0
    elsewhere = 0
    for stage in plan.stages:
        assert all(size >= 0 for size in stage.components.values())
        assert 0 < stage.least_bytes <= stage.peak_bytes <= stage.most_bytes
        assert sum(stage.components.values()) <= stage.peak_bytes * (1 + 1e-6) + 1000
        assert max(stage.moments.values()) <= stage.peak_bytes
        for own in stage.elsewhere.values():
            assert 0 <= own.bytes <= own.most_bytes
            elsewhere += own.bytes
        whole += sum(stage.components[name] for name in ("parameters", "optimizer_states"))
    ranks = cluster.num_gpus // len(plan.stages)
    trained = plan.num_trained_parameters
    # Half a byte of each weight, of what is trained a byte or more with its state, on all GPUs together.
    least = 0.5 * (model.num_parameters - trained) + trained
    assert (whole + elsewhere) * ranks >= least
    assert sum(stage.layers for stage in plan.stages) >= model.num_hidden_layers


@given(jobs())
@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
def test_every_combination_is_planned_soundly_or_refused_with_a_reason(
    job: tuple[ModelSpec, ClusterSpec, TrainingSpec, Layout, str],
) -> None:
    model, cluster, training, layout, recompute = job
    refusal = ""
    try:
        plan = estimate(model, cluster, training, layout, recompute=recompute)
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert len(refusal) > 20
        assert "\n" not in refusal
    else:
        check(model, cluster, plan)


@given(jobs())
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
def test_what_a_search_finds_of_a_combination_is_what_the_layout_alone_takes(
    job: tuple[ModelSpec, ClusterSpec, TrainingSpec, Layout, str],
) -> None:
    model, cluster, training, layout, _ = job
    several = layout.context_parallel > 1
    choices = Choices(
        tensor_parallel=(int(layout.tensor_parallel),),
        pipeline_parallel=(int(layout.pipeline_parallel),),
        context_parallel=(int(layout.context_parallel),) if several else None,
        context_comm=(layout.context_comm,) if several else None,
        expert_parallel=(int(layout.expert_parallel),),
        across_nodes=True,
    )
    try:
        resolved = resolve(model, cluster, training)
        check_choices(resolved, choices, "time", 1, 5.0)
        answers = find(resolved, choices, top=1, time_limit=5.0).answers
    except InputError:  # estimates of the same say why
        return
    for answer in answers:
        plan = make_plan(resolved, answer, {"status": "feasible", "gap": 0.0})
        check(model, cluster, plan)
        own = plan.layout.to_layout()
        ways = {policy for stage in plan.stages for policy in stage.rows}
        if len(ways) == 1 and layout.pipeline_parallel == 1:
            alone = estimate(model, cluster, training, own, recompute=next(iter(ways)))
            assert (alone.peak_bytes, alone.step_time_s) == (plan.peak_bytes, plan.step_time_s)


@pytest.mark.parametrize("framework", STACKS)
def test_every_optimizer_and_precision_is_searched_or_refused(framework: str) -> None:
    model = ModelSpec.from_catalog("llama-3.2-1b")
    usual = {"framework": framework, "seq_length": 1024, "global_batch_size": 8}
    asked = [{"optimizer": name} for name in OPTIMIZERS]
    asked += [{"precision": name} for name in STACKS[framework].recipes]
    for gpus in ("1xB200", "2xH100"):
        cluster, found = ClusterSpec.parse(gpus), 0
        for fields in asked:
            try:
                job = resolve(model, cluster, TrainingSpec(**usual, **fields))
            except InputError:
                continue
            answers = find(job, Choices(), top=1, time_limit=10.0).answers
            for answer in answers:
                check(model, cluster, make_plan(job, answer, {"status": "feasible", "gap": 0.0}))
                found += 1
        assert found > 3
