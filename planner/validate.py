"""Predictions of measured runs: every run is either predicted or left out with a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import ValidationError

from planner.api import given_plan
from planner.catalog import load_gpu, load_model
from planner.comparison import Prediction, Report, Sizes, report_of
from planner.defaults import Job, resolve
from planner.errors import InputError, PlannerError
from planner.plan import StagePlan
from planner.runs import Run, Runs, load_runs
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec, first_problem
from planner.splits import solve_layout
from planner.stacks import STACKS
from planner.timing import TimeReport, Timing, rankings
from planner.units import GIB
from strategies.layout import Layout

__all__ = ["Prediction", "Report", "chosen", "load_runs", "predict", "report_of", "validate"]

T = TypeVar("T")


def sizes_of(stage: StagePlan) -> Sizes:
    """The three sizes of a stage."""
    return Sizes(stage.tensor_bytes, stage.reserved_bytes, stage.peak_bytes)


def predict(run: Run) -> Prediction | str:
    """The prediction of a run's memory, or why there is none."""
    return _attempt(run, _predict)


def predict_step(run: Run) -> float | str:
    """Seconds of a step, by the closed form that the search ranks by, or why there is no prediction."""
    return _attempt(run, _predict_step)


def _attempt(run: Run, predicted: Callable[[Run], T]) -> T | str:
    if run.needs:
        return ", ".join(run.needs)
    try:
        return predicted(run)
    except PlannerError as error:
        return str(error)
    except ValidationError as error:
        return first_problem(error)


def _predict_step(run: Run) -> float:
    job, layout = _job(run, most=None)
    return float(solve_layout(job, layout, str(run.recompute), run.layout.layers_per_stage).cost)


def _predict(run: Run) -> Prediction:
    # As given, whether or not the framework is known to run it: some runs stand under their nearest one.
    job, layout = _job(run, most=4)
    plan = given_plan(job, solve_layout(job, layout, str(run.recompute), run.layout.layers_per_stage))
    unheeded = tuple(
        f"{name}={value}" for name, value in run.options.items() if name not in job.stack.options
    )
    stages = tuple(sizes_of(stage) for stage in plan.stages)
    return Prediction(run.id, stages, float(plan.capacity_bytes), plan.verdict, unheeded)


def _job(run: Run, most: int | None) -> tuple[Job, Layout]:
    """The job and layout of a run. Raises InputError for what is not given or not planned.

    No schedule but gpipe holds more micro-batches than ``most`` times its stages: where only memory
    matters, fewer take less time to plan.
    """
    stack = STACKS.get(run.framework)
    if stack is None:
        raise InputError(f"framework {run.framework}, which is not planned")
    missing = [name for name in ("data_parallel", "micro_batch_size", "grad_accum") if not _given(run, name)]
    missing += [name for name in ("seq", "gpus", "recompute") if getattr(run, name) is None]
    if missing:
        raise InputError(f"{missing[0]} is not given")
    layout = _layout(run, most)
    options = stack.under(run.options).options
    training = TrainingSpec(
        seq_length=run.seq,
        global_batch_size=int(layout.global_batch_size),
        precision=run.precision,
        optimizer=run.optimizer,
        framework=run.framework,
        gradient_dtype=run.gradient_dtype,
        optimizer_dtype=run.optimizer_dtype,
        master_weights=run.master_weights,
        adapters=run.adapters,
        expert_imbalance=run.expert_imbalance,
        expert_capacity_factor=run.expert_capacity_factor,
        options={name: value for name, value in run.options.items() if name in options},
    )
    return resolve(_model(run), cluster_of(run), training), layout


def validate_times(
    runs: Runs, progress: Callable[[int, int], object] = lambda done, total: None
) -> TimeReport:
    """Predicts every run whose step time was measured. ``progress`` is told runs done and runs in all."""
    timed = [run for run in runs.runs if run.step_s is not None]
    if not timed:
        raise InputError("no run of these has a measured step time")
    timings, left_out = [], {}
    prefixes = [one.prefix for one in runs.timed_fits]
    for number, run in enumerate(timed, 1):
        seconds = predict_step(run)
        if isinstance(seconds, str):
            left_out[run.id] = seconds
        else:
            tokens = int(_layout(run, None).global_batch_size) * (run.seq or 0)
            fitted = any(run.id.startswith(prefix) for prefix in prefixes)
            timings.append(
                Timing(run.id, run.group, run.tier, seconds, float(run.step_s or 0), tokens, fitted)
            )
        progress(number, len(timed))
    return TimeReport(tuple(timings), tuple(rankings(runs, timings)), left_out)


def _given(run: Run, name: str) -> bool:
    return getattr(run.layout, name) is not None


def _model(run: Run) -> ModelSpec:
    model = run.model
    if isinstance(model, str):
        model = ModelSpec.from_hugging_face(model) if model.endswith(".json") else load_model(model)
    # How far a model's positions reach is no matter of memory, but for a learned table.
    longer = run.seq is not None and run.seq > model.max_position_embeddings
    if longer and model.position_embedding != "learned":
        model = model.model_copy(update={"max_position_embeddings": run.seq})
    return model


def cluster_of(run: Run) -> ClusterSpec:
    """The GPUs that a run had."""
    gpu = load_gpu(run.gpu.kind)
    if run.gpu.usable_gib is not None:
        gpu = gpu.model_copy(update={"usable_bytes": int(run.gpu.usable_gib * GIB)})
    if run.gpu.network_gb_per_s is not None:
        network = gpu.network.model_copy(update={"bytes_per_s": run.gpu.network_gb_per_s * 1e9})
        gpu = gpu.model_copy(update={"network": network})
    assert run.gpus is not None
    return ClusterSpec(gpu=gpu, num_gpus=run.gpus, gpus_per_node=min(gpu.gpus_per_node, run.gpus))


def _layout(run: Run, most: int | None) -> Layout:
    given = run.layout
    assert given.data_parallel is not None
    assert given.micro_batch_size is not None
    assert given.grad_accum is not None
    accum = given.grad_accum
    if most is not None and given.schedule != "gpipe":
        accum = min(accum, most * given.pipeline_parallel)
    return Layout(
        data_parallel=given.data_parallel,
        tensor_parallel=given.tensor_parallel,
        pipeline_parallel=given.pipeline_parallel,
        chunks=given.chunks,
        micro_batch_size=given.micro_batch_size,
        grad_accum=accum,
        data_shards=given.data_shards or given.data_parallel,
        sequence_parallel=given.sequence_parallel,
        sharding=given.sharding,
        reshard_after_forward=given.reshard_after_forward,
        schedule=given.schedule,
        context_parallel=given.context_parallel,
        context_comm=given.context_comm or STACKS[run.framework].context_comm,
        ulysses_degree=given.ulysses_degree,
        expert_parallel=given.expert_parallel,
        expert_tensor_parallel=given.expert_tensor_parallel,
    )


def validate(runs: Runs, progress: Callable[[int, int], object] = lambda done, total: None) -> Report:
    """Predicts every run and compares. ``progress`` is told runs done and runs in all."""
    alike: dict[str, Prediction | str] = {}
    found: dict[str, Prediction | str] = {}
    for number, run in enumerate(runs.runs, 1):
        key = run.model_dump_json(exclude={"id", "source", "group", "tier", "kind", "measured", "remark"})
        if key not in alike:
            alike[key] = predict(run)
        answer = alike[key]
        found[run.id] = answer if isinstance(answer, str) else replace(answer, run=run.id)
        progress(number, len(runs.runs))
    return report_of(runs, found)


def chosen(runs: Runs, source: str | None, kind: str | None, tiers: Sequence[str] | None) -> Runs:
    """The runs of a source (part of its name, or of a run's), with such a reading, of these tiers."""

    def wanted(run: Run) -> bool:
        names = f"{run.group} {run.source} {run.id}".lower()
        kinds = {run.measured.kind, *run.measured.others} if run.measured else set()
        return (
            (source is None or source.lower() in names)
            and (kind is None or kind in kinds)
            and (tiers is None or run.tier in tiers)
        )

    left = tuple(run for run in runs.runs if wanted(run))
    if not left:
        raise InputError("no run is left: ask for another --source, --kind or --tier")
    return runs.model_copy(update={"runs": left})
