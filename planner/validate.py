"""Predictions of measured runs: every run is either predicted or left out with a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pydantic import ValidationError

from planner.catalog import load_gpu, load_model
from planner.comparison import Prediction, Report, Sizes, report_of
from planner.defaults import resolve
from planner.errors import InputError, PlannerError
from planner.plan import Plan, StagePlan
from planner.runs import Run, Runs, load_runs
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec, first_problem
from planner.stacks import STACKS
from planner.units import GIB
from strategies.layout import Layout

__all__ = ["Prediction", "Report", "chosen", "load_runs", "predict", "report_of", "validate"]


def sizes_of(plan: Plan, stage: StagePlan) -> Sizes:
    """The three sizes of a stage."""
    if (counted := getattr(stage, "tensor_bytes", None)) is not None:
        return Sizes(counted, getattr(stage, "reserved_bytes", counted), stage.peak_bytes)
    tensors = stage.peak_bytes - stage.components["framework_overhead"]
    slack = STACKS[plan.training.framework].allocator.value
    return Sizes(tensors, tensors * (1 + slack), stage.peak_bytes)


def predict(run: Run) -> Prediction | str:
    """The prediction for a run, or why there is none."""
    if run.needs:
        return ", ".join(run.needs)
    try:
        return _predict(run)
    except PlannerError as error:
        return str(error)
    except ValidationError as error:
        return first_problem(error)


def _predict(run: Run) -> Prediction | str:
    from planner.api import given_plan, solve_layout

    stack = STACKS.get(run.framework)
    if stack is None:
        return f"framework {run.framework}, which is not planned"
    missing = [name for name in ("data_parallel", "micro_batch_size", "grad_accum") if not _given(run, name)]
    missing += [name for name in ("seq", "gpus", "recompute") if getattr(run, name) is None]
    if missing:
        return f"{missing[0]} is not given"
    model = _model(run)
    layout = _layout(run)
    heeded = {name: value for name, value in run.options.items() if name in stack.options}
    training = TrainingSpec(
        seq_length=run.seq,
        global_batch_size=int(layout.global_batch_size),
        precision=run.precision,
        optimizer=run.optimizer,
        framework=run.framework,
        gradient_dtype=run.gradient_dtype,
        optimizer_dtype=run.optimizer_dtype,
        master_weights=run.master_weights,
        options=heeded,
    )
    layers = run.layout.layers_per_stage
    # As given, whether or not the framework is known to run it: some runs stand under their nearest one.
    job = resolve(model, _cluster(run), training)
    plan = given_plan(job, solve_layout(job, layout, str(run.recompute), layers))
    verdict = getattr(plan, "verdict", "fits" if plan.fits else "does not fit")
    unheeded = tuple(f"{name}={value}" for name, value in run.options.items() if name not in heeded)
    stages = tuple(sizes_of(plan, stage) for stage in plan.stages)
    return Prediction(run.id, stages, float(plan.capacity_bytes), verdict, unheeded)


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


def _cluster(run: Run) -> ClusterSpec:
    gpu = load_gpu(run.gpu.kind)
    if run.gpu.usable_gib is not None:
        gpu = gpu.model_copy(update={"usable_bytes": int(run.gpu.usable_gib * GIB)})
    assert run.gpus is not None
    return ClusterSpec(gpu=gpu, num_gpus=run.gpus, gpus_per_node=min(gpu.gpus_per_node, run.gpus))


def _layout(run: Run) -> Layout:
    given = run.layout
    assert given.data_parallel is not None
    assert given.micro_batch_size is not None
    assert given.grad_accum is not None
    # No schedule holds more than this many micro-batches but gpipe: fewer take less time to plan.
    enough = 4 * given.pipeline_parallel
    accum = given.grad_accum
    if given.schedule != "gpipe" and accum > enough:
        accum = enough
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
