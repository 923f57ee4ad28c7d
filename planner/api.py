"""Everything the command line does, as functions. Nothing here prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planner import frozen
from planner.best_first import Found, find
from planner.defaults import Job, resolve
from planner.errors import InfeasibleError, InputError, SolverError
from planner.given import check_layout, check_supported, unsupported
from planner.layouts import CHOSEN_DEGREES, Choices
from planner.offload_choices import canonical
from planner.plan import Plan, make_plan
from planner.program import Solution, settle
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from planner.splits import solve_layout
from strategies.layout import RANK_ORDERS, Layout
from strategies.pipeline_parallel import FOLDED, SCHEDULES

if TYPE_CHECKING:
    from planner.advice import Advice
    from planner.asked import Asked
    from planner.explaining import Explanation

OBJECTIVES = ("time", "headroom")


def proof_of(found: Found, objective: str) -> dict[str, Any]:
    """The account of a search: what it looked at, and what is certain about its answer."""
    refused = sorted(found.space.refused.items(), key=lambda item: -item[1])
    return {
        "status": "optimal" if found.optimal else "feasible",
        "gap": found.gap,
        "objective": objective,
        "enumerated": found.enumerated,
        "refused": found.refused,
        "refused_because": dict(refused),
        "does_not_fit": found.unfitting,
        "pruned_by_bound": found.pruned,
        "solved": found.solved,
        "seconds": found.seconds,
    }


def search(
    model: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec = TrainingSpec(),
    *,
    top: int = 5,
    objective: str = "time",
    choices: Choices = Choices(),
    time_limit: float = 60.0,
    progress: Callable[[int, int], Any] = lambda done, left: None,
) -> list[Plan]:
    """The ``top`` best layouts that fit, best first, each with the search's proof.

    ``objective`` is ``time`` (seconds of a step) or ``headroom`` (bytes free on the fullest GPU);
    ``choices`` restricts the layouts; after ``time_limit`` seconds the proof says ``feasible``
    with its gap instead of ``optimal``. ``progress`` is told layouts solved and layouts left.

    Raises InputError for inputs that cannot be, InfeasibleError (with the nearest plan and with
    changes that would fit) if no layout fits.
    """
    job = resolve(model, cluster, training)
    check_choices(job, choices, objective, top, time_limit)
    found = find(job, choices, objective, top, time_limit, progress)
    proof = proof_of(found, objective)
    if not found.answers:
        from planner.asked import Asked

        _nothing_found(job, Asked(model, cluster, training, choices=choices), found, progress)
    return [make_plan(job, solution, proof) for solution in settled(found, objective)]


def settled(found: Found, objective: str) -> list[Solution]:
    """The answers of a search as they are shown."""
    return [settle(one) if objective == "time" else one for one in found.answers]


def check_choices(job: Job, choices: Choices, objective: str, top: int, time_limit: float) -> None:
    """Raises InputError for what a search of this job cannot be asked."""
    if objective not in OBJECTIVES:
        raise InputError(f"objective={objective!r}: use {' or '.join(OBJECTIVES)}")
    if not 0 < time_limit <= 1e6:
        raise InputError(f"time_limit={time_limit:g}: give the search more than 0 seconds")
    if not isinstance(top, int) or not 1 <= top <= 100:
        raise InputError(f"top={top}: ask for 1 to 100 layouts")
    offered: dict[str, tuple[str, ...]] = {
        "sharding": tuple(job.stack.shardings),
        "schedule": SCHEDULES,
        "recompute": job.stack.policies,
        "rank_order": RANK_ORDERS,
        "context_comm": tuple(job.stack.context_comms),
    }
    for name, allowed in offered.items():
        for value in getattr(choices, name) or ():
            if value not in allowed:
                able = f"use {', '.join(allowed)}" if allowed else "it has none"
                able += frozen.no_recompute(job.training) if name == "recompute" else ""
                raise InputError(f"{name}={value} is not offered by {job.stack.name}: {able}")
    if choices.ulysses_degree and "ulysses+ring" not in (choices.context_comm or ()):
        raise InputError("ulysses_degree is of context_comm ulysses+ring: ask for that too, or leave it out")
    _check_chunks(choices)
    _check_offload(job, choices)
    for name in CHOSEN_DEGREES:
        values = getattr(choices, name)
        if values is not None and not isinstance(values, tuple):
            raise InputError(f"{name}={values!r}: give a tuple, as in ({values!r},)")
        for value in values or ():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}: use whole numbers, 1 or more")
            if name.endswith("_parallel") and "expert" not in name and job.cluster.num_gpus % value:
                raise InputError(f"{name}={value} does not divide the {job.cluster.num_gpus} GPUs")


def _check_offload(job: Job, choices: Choices) -> None:
    """Raises InputError for an offload that the framework has under none of the shardings to search."""
    shardings = [name for name in choices.sharding or job.stack.shardings if name in job.stack.offloading]
    for item in choices.offload:
        name = canonical(item)
        able = [
            one
            for sharding in shardings
            for one in (*job.stack.offloading[sharding].whole, *job.stack.offloading[sharding].layers)
        ]
        if not any(name in one.split(",") for one in able):
            has = dict.fromkeys(part for one in able for part in one.split(","))
            fix = f"use {', '.join(has)}" if has else "use framework deepspeed, megatron, fsdp or torchtitan"
            raise InputError(f"offload {item}: {job.stack.name} does not offload it: {fix}")
        if name.endswith("nvme") and not job.cluster.nvme_bytes:
            raise InputError(f"offload {item}: say how much NVMe a node has, with --nvme 10TB")


def _check_chunks(choices: Choices) -> None:
    """Raises InputError where no schedule that was asked for takes a number of chunks that was."""

    def takes(schedule: str, chunks: int) -> bool:
        return chunks > 1 if schedule == "interleaved" else chunks == (2 if schedule in FOLDED else 1)

    pairs = [(schedule, n) for schedule in choices.schedule or () for n in choices.chunks or ()]
    if pairs and not any(takes(*pair) for pair in pairs):
        names, numbers = (dict.fromkeys(str(pair[part]) for pair in pairs) for part in (0, 1))
        asked = f"schedule {', '.join(names)} with chunks {', '.join(numbers)}"
        raise InputError(f"{asked}: interleaved takes 2 or more, {' and '.join(FOLDED)} take 2, the others 1")


def _nothing_found(job: Job, inputs: Asked, found: Found, progress: Callable[[int, int], Any]) -> None:
    from planner.advice import Binding, changes_that_fit, nearest_plan, shortfall

    check_proved(job, inputs.choices, found)
    nearest = nearest_plan(job, inputs.choices)
    message = shortfall(job, found.enumerated, nearest)
    changes, tried = changes_that_fit(inputs, progress)
    raise InfeasibleError(message, nearest, changes, tried, Binding.of(nearest))


def check_proved(job: Job, choices: Choices, found: Found) -> None:
    """Raises InputError where there was no layout to look at, SolverError where there was no time to."""
    if not found.space.size:
        reasons = sorted(found.space.refused, key=lambda reason: " runs " in reason)
        chosen = {name: value for name, value in vars(choices).items() if value and isinstance(value, tuple)}
        # What was asked for is why, where a reason names it.
        reasons = [one for one in reasons if any(name in one for name in chosen)][:4] or reasons[:4]
        asked = [f"{name} {', '.join(map(str, value))}" for name, value in chosen.items()]
        what = f"no layout of {job.cluster.num_gpus} GPUs has {'; '.join(asked) or 'these choices'}"
        raise InputError(f"{what}: {'; '.join(reasons) or 'their degrees do not multiply to the GPUs'}")
    if not found.optimal:
        raise SolverError("nothing was found within the time limit: give it more with --time-limit")


def job_for(model: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, layout: Layout) -> Job:
    """The job under a layout that was given, with the option that its framework runs it with.

    DeepSpeed runs tensor and pipeline parallelism with Megatron's kernels: so that need not be said. Raises
    InputError for a layout that cannot be, or that the framework is not known to run.
    """
    job = resolve(model, cluster, training)
    check_layout(job, layout)
    for variant in job.stack.variants if unsupported(job.stack, layout) else ():
        option, _, value = variant.partition(":")
        if option in training.options:
            continue
        chosen = training.model_copy(update={"options": {**training.options, option: value}})
        try:
            other = resolve(model, cluster, chosen)
        except InputError:  # another option contradicts it
            continue
        if not unsupported(other.stack, layout):
            note = f"{option} {value}: those that {job.stack.name} runs this layout with"
            return replace(other, assumptions=(*other.assumptions, note))
    check_supported(job, layout)
    return job


def estimate(
    model: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec = TrainingSpec(),
    layout: Layout = Layout(),
    *,
    recompute: str = "none",
    layers: Sequence[int] | None = None,
) -> Plan:
    """One given layout, fitting or not. Raises InputError if it cannot be, or the framework lacks it.

    ``recompute`` is a policy for all layers, or ``auto``: as much as memory forces, per stage. With
    ``+activations`` behind it, the activations of as many layers as memory forces are offloaded.
    ``layers`` are the layers on each stage; without them they are as even as they go, under ``auto``
    the quickest split.
    """
    job = job_for(model, cluster, training, layout)
    return given_plan(job, solve_layout(job, layout, recompute, layers), asked=layers is not None)


def estimate_of(asked: Asked) -> Plan:
    """:func:`estimate` of what was asked for."""
    assert asked.layout is not None
    return estimate(
        asked.model,
        asked.cluster,
        asked.training,
        asked.layout,
        recompute=asked.recompute,
        layers=asked.layers,
    )


def whynot(
    model: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec = TrainingSpec(),
    layout: Layout = Layout(),
    *,
    recompute: str = "none",
    layers: Sequence[int] | None = None,
    progress: Callable[[int, int], Any] = lambda tried, fit: None,
) -> Advice | None:
    """Why a given layout does not fit and what would, each change re-solved; None if it fits.

    Takes what :func:`estimate` takes. ``progress`` is told how many changes were tried and how many fit.
    Raises InputError as :func:`estimate` does.
    """
    from planner.advice import advise
    from planner.asked import Asked

    asked = Asked(model, cluster, training, layout, recompute, tuple(layers) if layers else None)
    plan = estimate_of(asked)
    return None if plan.fits else advise(asked, plan, estimate_of, progress)


def given_plan(job: Job, solution: Solution, asked: bool = False) -> Plan:
    """The plan of a layout that was given. It names an uneven split of layers that nobody ``asked`` for."""
    plan = make_plan(job, solution, {"status": "given", "objective": "time"})
    counts = [stage.layers for stage in plan.stages]
    if asked or len(set(counts)) == 1:
        return plan
    free = len(solution.candidate.policies) > 1
    why = "the quickest split that fits" if free else "as even as they go"
    split = f"layers on the stages {', '.join(map(str, counts))}: {why}"
    return plan.model_copy(update={"assumptions": (*plan.assumptions, split)})


def trace(model: ModelSpec, cluster: ClusterSpec, plan: Plan) -> dict[str, Any]:
    """A plan's step as a timeline in the Trace Event Format, of the model and cluster it was made for."""
    from planner.trace import trace as of_plan

    return of_plan(job_for(model, cluster, plan.training, plan.layout.to_layout()), plan)


def explain(
    model: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec = TrainingSpec(),
    layout: Layout = Layout(),
    *,
    recompute: str = "none",
    layers: Sequence[int] | None = None,
    stage: int | None = None,
    moment: str | None = None,
) -> Explanation:
    """What one stage holds at one moment, and sends; the fullest stage at its peak by default.

    Raises InputError for a stage or moment that the plan does not have.
    """
    from planner.explaining import explained

    plan = estimate(model, cluster, training, layout, recompute=recompute, layers=layers)
    return explained(job_for(model, cluster, training, layout), plan, stage, moment)


def explain_plan(
    model: ModelSpec, cluster: ClusterSpec, plan: Plan, *, stage: int | None = None, moment: str | None = None
) -> Explanation:
    """The same of any plan, a search's too, of the model and cluster that it was made for."""
    from planner.explaining import explained

    return explained(job_for(model, cluster, plan.training, plan.layout.to_layout()), plan, stage, moment)


def compare(
    model: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec = TrainingSpec(),
    *,
    micro_batch_size: int = 1,
    recompute: str = "auto",
) -> list[tuple[str, Plan | str]]:
    """One model under each strategy alone, on the same GPUs: a plan, or the reason for none.

    DDP, ZeRO-1/2/3 and FSDP run over all GPUs; tensor parallelism fills a node, pipeline
    parallelism uses as many stages as divide the GPUs and the layers, and data parallelism the rest.
    """
    if not 1 <= micro_batch_size <= 10**6:
        raise InputError(f"micro_batch_size={micro_batch_size}: use a whole number, 1 or more")
    job = resolve(model, cluster, training)
    rows: list[tuple[str, Plan | str]] = []
    for name, layout in _one_of_each(job, micro_batch_size):
        try:
            own = job_for(model, cluster, training, layout)
            rows.append((name, given_plan(own, solve_layout(own, layout, recompute))))
        except InputError as error:
            rows.append((name, str(error)))
    return rows


def _one_of_each(job: Job, micro: int) -> list[tuple[str, Layout]]:
    gpus, batch = job.cluster.num_gpus, job.global_batch_size
    fast = job.cluster.gpus_per_node
    heads, width = job.model.num_key_value_heads, job.model.intermediate_size
    tensor = max(t for t in range(1, fast + 1) if not (gpus % t or heads % t or width % t))
    depth = job.model.num_hidden_layers
    stages = max(p for p in range(1, min(gpus, depth) + 1) if gpus % p == 0 and depth % p == 0)

    def layout(data: int, **rest: Any) -> Layout:
        accum = max(1, batch // (data * micro))
        return Layout(data_parallel=data, micro_batch_size=micro, grad_accum=accum, data_shards=data, **rest)

    rows = [(label, layout(gpus, sharding=name)) for label, name in _DATA_ONLY]
    rows.append((f"TP{tensor}", layout(gpus // tensor, tensor_parallel=tensor)))
    sp = {"tensor_parallel": tensor, "sequence_parallel": tensor > 1}
    rows.append((f"TP{tensor}+SP", layout(gpus // tensor, **sp)))
    if gpus > tensor:
        rows.append((f"TP{tensor}+SP+ZeRO-1", layout(gpus // tensor, sharding="zero1", **sp)))
    for label, schedule in (("1F1B", "1f1b"), ("GPipe", "gpipe"), ("PipeDream", "pipedream")):
        rest = layout(gpus // stages, pipeline_parallel=stages, schedule=schedule)
        rows.append((f"PP{stages} {label}", rest))
    return rows


_DATA_ONLY = (
    ("DDP", "ddp"),
    ("ZeRO-1", "zero1"),
    ("ZeRO-2", "zero2"),
    ("ZeRO-3", "zero3"),
    ("FSDP", "fsdp"),
)
