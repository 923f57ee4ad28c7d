"""The answer: a Plan, its stages, and where it came from. JSON in, JSON out.

Sizes in bytes, times in seconds. Fields may be added; none of these goes away within a version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from planner.catalog import step_time
from planner.defaults import Job, profile_notes
from planner.given import beyond_node
from planner.layer_price import LayerPrice
from planner.ledger import StageView, components, entries, entries_elsewhere, view
from planner.offload import offloading_of, rates_noted, surely
from planner.overheads import device_bytes, library_bytes, reserved_bytes
from planner.program import Solution
from planner.replay import StageReplay, chunk_blocks
from planner.schedule import PassSeconds, step_seconds
from planner.specs import TrainingSpec
from planner.stages import Prices, price
from planner.told import untold
from planner.utilization import utilization
from strategies.base import POLICIES
from strategies.context_parallel import COMMS
from strategies.layout import RANK_ORDERS, Layout
from strategies.offload import PLACES, Way, places_of

SCHEMA = "planner.plan/1"
TOLERANCE = 1e-6
"""The solver's own, on a stage's memory."""
Verdict = Literal["fits", "at risk", "does not fit"]
MODEL = ConfigDict(frozen=True, extra="forbid")


class ElsewherePlan(BaseModel):
    """What one GPU of a stage has on its node's host or NVMe, of its equal share of the node's."""

    model_config = MODEL

    bytes: int
    most_bytes: int
    capacity_bytes: int
    components: dict[str, int]


class StagePlan(BaseModel):
    """One pipeline stage: what it holds, and its peak with the moment and the components of it.

    ``rows`` are its rows of layers by policy, each a number for every kind of row (planner/order.py).
    ``tensor_bytes`` is what PyTorch calls allocated, at its peak, ``moments`` that of every moment;
    ``reserved_bytes`` is what its allocator is expected to hold, ``peak_bytes`` what is taken of the
    GPU; the job needs at least ``least_bytes`` of it and no more than ``most_bytes``. ``elsewhere`` is what
    lies outside the GPU, by place, where something is offloaded; ``offload`` counts the layers that offload
    an item.
    """

    model_config = MODEL

    layers: int = Field(ge=0)
    recompute: dict[str, int]
    rows: dict[str, tuple[NonNegativeInt, ...]]
    in_flight: float
    tensor_bytes: int
    reserved_bytes: int
    peak_bytes: int
    least_bytes: int
    most_bytes: int
    capacity_bytes: int
    moment: str
    moments: dict[str, int]
    components: dict[str, int]
    seconds: float
    embedding: bool
    head: bool
    offload: dict[str, int] = Field(default_factory=dict)
    elsewhere: dict[str, ElsewherePlan] = Field(default_factory=dict)
    update_seconds: float = 0.0


class LayoutPlan(BaseModel):
    """The degrees, in the field's names."""

    model_config = MODEL

    data_parallel: int
    tensor_parallel: int
    pipeline_parallel: int
    chunks: int
    micro_batch_size: int
    grad_accum: int
    data_shards: int
    sequence_parallel: bool
    sharding: str
    reshard_after_forward: bool
    schedule: str
    rank_order: str = RANK_ORDERS[0]
    context_parallel: int = 1
    context_comm: str = COMMS[0]
    ulysses_degree: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    offload: str = ""

    def to_layout(self) -> Layout:
        """The layout that the strategies are made from."""
        return Layout(**self.model_dump())


class Span(BaseModel):
    """A figure, and between what it lies: as the step time does, four times in five."""

    model_config = MODEL

    value: float
    least: float
    most: float

    def times(self, factor: float) -> Span:
        """The figure and its range, multiplied."""
        return Span(value=self.value * factor, least=self.least * factor, most=self.most * factor)


class CostPlan(BaseModel):
    """What a whole training takes (planner/cost.py); None is not counted, as something was not given.

    Seconds of work are ``compute_s``, with checkpoints and failures ``wall_s``: their ratio is ``goodput``.
    GPU-hours, energy and money are of the latter. ``interval_s`` of work lie between checkpoints at best, in
    whole steps ``interval_steps``.
    """

    model_config = MODEL

    tokens: float | None
    steps: int | None
    checkpoint_bytes: int
    checkpoint_s: float | None = None
    mtbf_s: float | None = None
    restart_s: float | None = None
    young_interval_s: float | None = None
    interval_s: float | None = None
    interval_steps: int | None = None
    goodput: float | None = None
    compute_s: Span | None = None
    wall_s: Span | None = None
    gpu_hours: Span | None = None
    power_w: float
    pue: float | None = None
    energy_kwh: Span | None = None
    price: float | None = None
    currency: str = ""
    money: Span | None = None


class Plan(BaseModel):
    """A layout with its memory, its time and its proof."""

    model_config = MODEL

    schema_version: str = SCHEMA
    model: str
    num_parameters: int
    num_trained_parameters: int | None = None  # not in plans of before there were adapters
    gpu: str
    num_gpus: int
    training: TrainingSpec
    layout: LayoutPlan
    verdict: Verdict
    fits: bool
    peak_bytes: int
    least_bytes: int
    most_bytes: int
    capacity_bytes: int
    step_time_s: float
    step_time_least_s: float
    step_time_most_s: float
    critical_path_s: float
    tokens_per_s: float
    mfu: float
    mfu_causal: float
    hfu: float
    model_flops_per_s: float
    hardware_flops_per_s: float
    days: float | None
    bubble_fraction: float
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]
    assumptions: tuple[str, ...]
    proof: dict[str, Any]
    cost: CostPlan | None = None  # where tokens, or what failures depend on, are given

    @model_validator(mode="after")
    def _whole(self) -> Plan:
        own = self.layout
        taken = own.data_parallel * own.tensor_parallel * own.pipeline_parallel * own.context_parallel
        if not 1 <= taken == self.num_gpus or own.pipeline_parallel != len(self.stages):
            raise ValueError(f"its layout takes {taken} GPUs and {own.pipeline_parallel} stages")
        if not self.least_bytes <= self.peak_bytes == max(one.peak_bytes for one in self.stages):
            raise ValueError("peak_bytes is not that of the fullest stage")
        return self

    @property
    def headroom_bytes(self) -> int:
        """Bytes left on the fullest GPU whatever it needs; negative where it may not fit."""
        return self.capacity_bytes - self.most_bytes

    def ties_with(self, other: Plan) -> bool:
        """Are two step times so near that their order is right less than nine times in ten?"""
        slower, quicker = max(self.step_time_s, other.step_time_s), min(self.step_time_s, other.step_time_s)
        return slower <= quicker * (1 + step_time("tie").value)

    @property
    def fullest(self) -> int:
        """Index of the stage with the highest peak."""
        return max(range(len(self.stages)), key=lambda j: self.stages[j].peak_bytes)


def proof_words(proof: Mapping[str, Any]) -> tuple[str, str]:
    """What a search did, and how certain its answer is; the second empty where nothing was searched."""
    if "enumerated" not in proof:
        return "One given layout: nothing was searched.", ""
    certain = "proved optimal" if proof["status"] == "optimal" else f"feasible, gap {proof['gap']:.2%}"
    counts = (
        f"{proof['enumerated']:,} layouts: {proof['does_not_fit']:,} do not fit, "
        f"{proof['pruned_by_bound']:,} pruned by bound, {proof['solved']:,} solved; "
        f"{proof['refused']:,} combinations refused before."
    )
    return counts, f"Best by {proof['objective']}, {certain}"


def plan_stage(prices: Prices, solution: Solution, index: int) -> StagePlan:
    """One stage of a plan, replayed; its figures are sums of the ledger's entries."""
    candidate = solution.candidate
    stage = view(prices, solution.rows, index)
    job, layout = prices.job, prices.layout
    timeline = StageReplay(prices, index, solution.rows).run()
    peaks = timeline.peaks()
    moment = max(peaks, key=lambda name: peaks[name][1])
    snapshot, tensors = peaks[moment]
    library = library_bytes(job)
    held = list(entries(prices, stage, snapshot, timeline.pools))

    def taken(size: float, bound: str = "value") -> int:
        return round(float(device_bytes(job, layout, size, bound)))

    return StagePlan(
        layers=sum(stage.layers),
        recompute=_layers_by(prices, stage, lambda way: (way.recompute,)),
        rows={
            policy: own
            for r, policy in enumerate(prices.policies)
            if any(own := solution.rows[index][r :: len(prices.policies)])
        },
        in_flight=float(prices.pipeline_at(index).in_flight),
        tensor_bytes=round(tensors + library),
        reserved_bytes=round(float(reserved_bytes(job, layout, timeline.pools, tensors))),
        peak_bytes=taken(timeline.pools),
        least_bytes=taken(tensors, "least"),
        most_bytes=taken(timeline.pools, "most"),
        capacity_bytes=job.cluster.capacity_bytes,
        moment=moment,
        moments={name: round(size + library) for name, (_, size) in peaks.items()},
        components={name: round(size) for name, size in components(held).items()},
        seconds=candidate.stage_seconds(index, solution.rows[index]),
        embedding=stage.first,
        head=stage.last,
        **(_of_offload(prices, solution, stage) if prices.offloads else {}),
    )


def _layers_by(prices: Prices, stage: StageView, names: Callable[[Way], Iterable[str]]) -> dict[str, int]:
    """A stage's layers by what their ways have: each of them under every name."""
    found: dict[str, int] = {}
    for block, count in enumerate(stage.layers):
        for name in names(Way.of(prices.policy_of(block))) if count else ():
            found[name] = found.get(name, 0) + count
    return found


def _of_offload(prices: Prices, solution: Solution, stage: StageView) -> dict[str, Any]:
    """What a stage of a plan that offloads has more: layers, places, and the host's update."""
    places = {}
    for place in PLACES:
        held = list(entries_elsewhere(prices, stage, place))
        total = sum(entry.held for entry in held)
        if total:
            sizes = {name: round(size) for name, size in components(held).items() if size}
            room = round(prices.host.capacity[place])
            places[place] = ElsewherePlan(
                bytes=round(total),
                most_bytes=round(total * surely(place)),
                capacity_bytes=room,
                components=sizes,
            )
    layers = _layers_by(prices, stage, lambda way: way.offload)
    whole = places_of(prices.layout.offload)
    return {
        "offload": {name: sum(stage.layers) if name in whole else count for name, count in layers.items()}
        | {name: sum(stage.layers) for name in whole},
        "elsewhere": places,
        "update_seconds": solution.candidate.update_seconds(stage.index, solution.rows[stage.index]),
    }


def verdict_of(stages: Sequence[StagePlan]) -> Verdict:
    """``fits`` if every stage does at most, ``does not fit`` if one does not at least."""
    sizes = [(stage.least_bytes, stage.most_bytes, stage.capacity_bytes) for stage in stages]
    places = [own for stage in stages for own in stage.elsewhere.values()]
    sizes += [(own.bytes, own.most_bytes, own.capacity_bytes) for own in places]
    if any(least > capacity * (1 + TOLERANCE) for least, _, capacity in sizes):
        return "does not fit"
    if all(most <= capacity * (1 + TOLERANCE) for _, most, capacity in sizes):
        return "fits"
    return "at risk"


def warnings_for(job: Job, layout: Layout, verdict: Verdict) -> list[str]:
    """What a reader of the plan must not overlook."""
    notes = [note] if (note := beyond_node(job, layout)) else []
    if layout.pipeline_parallel > 1 and layout.schedule not in job.stack.schedules:
        notes.append(f"{job.stack.name} is not known to run the {layout.schedule} schedule")
    if layout.rank_order not in (known := job.stack.rank_orders):
        runs = " and ".join(known)
        notes.append(f"{job.stack.name} is not known to run rank order {layout.rank_order}: it runs {runs}")
    if job.seq_length > (positions := job.model.max_position_embeddings):
        notes.append(f"sequence length {job.seq_length} is beyond the model's {positions} positions")
    notes += profile_notes(job.training.profile, job.cluster.gpu.name)
    if verdict == "at risk":
        notes.append("at risk: it depends on what lies outside tensors, which varies from run to run")
    return notes


def _of_layout(job: Job, layout: Layout) -> list[str]:
    """What a layout takes for granted: how the framework is told to shard so, the padded vocabulary."""
    notes = []
    how = job.stack.sharding_notes.get(layout.sharding)
    if how and layout.data_ranks > 1:
        notes.append(f"{layout.sharding} is {job.stack.name}'s {how}")
    if layout.sequence_parallel:
        notes.append(
            "sequence parallelism with tensor parallelism, for its memory (--no-sequence-parallel: without)"
        )
    if layout.context_parallel > 1 and (flag := job.stack.context_comms.get(layout.context_comm)):
        flag = flag.format(heads=layout.head_ranks, ring=layout.attention_cut)
        notes.append(f"context parallelism by {layout.context_comm} is {job.stack.name}'s {flag}")
    if flag := job.stack.rank_orders.get(layout.rank_order):
        notes.append(f"rank order {layout.rank_order} is {job.stack.name}'s {flag}")
    multiple, vocabulary = job.stack.vocabulary_multiple * layout.tensor_parallel, job.model.vocab_size
    if vocabulary % multiple:
        padded = -(-vocabulary // multiple) * multiple
        notes.append(f"vocabulary padded from {vocabulary:,} to {padded:,}, a multiple of {multiple:,}")
    return notes


def _of_host(job: Job, layout: Layout, stages: Sequence[StagePlan]) -> list[str]:
    """How an offload is asked for, and what is assumed of the host."""
    offloading = offloading_of(job.stack, layout)
    notes = []
    if layout.offload:
        notes.append(f"offload {layout.offload} is {job.stack.name}'s {offloading.whole[layout.offload]}")
    for name, flag in offloading.layers.items():
        counts = [stage.offload.get(name, 0) for stage in stages]
        if name not in places_of(layout.offload) and any(counts):
            shown = ", ".join(f"{n} of {s.layers}" for n, s in zip(counts, stages, strict=True))
            notes.append(f"offload {name} of layers on the stages: {shown}; {job.stack.name}'s {flag}")
    if not any(stage.elsewhere for stage in stages):
        return notes
    return [*notes, *rates_noted(job.cluster)]


def pass_seconds(prices: Prices, rows: Sequence[Sequence[int]]) -> list[list[PassSeconds]]:
    """Seconds of a micro-batch's passes through every chunk of every stage, for a split of the layers.

    Of a chunk's two sends one belongs to its forward, one to the gradient of its input.
    """

    def parts(price: LayerPrice) -> npt.NDArray[np.float64]:
        return np.array([float(price.forward), float(price.inputs), float(price.weights)])

    layers = [parts(price) for price in prices.blocks]
    sent = prices.one_send * np.array([1, 1, 0])
    stages = []
    for j in range(len(rows)):
        first, last = map(bool, prices.pipeline_at(j).ends)
        chunks = [sum(layers[b] for b in chunk) + sent for chunk in chunk_blocks(prices, rows, j)]
        chunks[0] = chunks[0] + parts(prices.embedding) * first
        chunks[-1] = chunks[-1] + parts(prices.head) * last
        stages.append([PassSeconds(*map(float, chunk)) for chunk in chunks])
    return stages


def make_plan(job: Job, solution: Solution, proof: dict[str, Any]) -> Plan:
    """A plan from a solved candidate: stages, time on the schedule graph, proof."""
    candidate = solution.candidate
    layout = candidate.layout
    prices = price(job, layout, candidate.policies)
    alike: dict[Any, StagePlan] = {}
    stages = []
    for j, rows in enumerate(solution.rows):
        pipeline = prices.pipeline_at(j)
        blocks = tuple(map(tuple, chunk_blocks(prices, solution.rows, j)))
        key = (rows, blocks, *map(bool, pipeline.ends), tuple((float(n), float(k)) for n, k in pipeline.held))
        if key not in alike:
            alike[key] = plan_stage(prices, solution, j)
        stages.append(alike[key])
    step = candidate.cost(solution.rows)
    tokens_per_s = job.tokens_per_step / step
    peak = max(stage.peak_bytes for stage in stages)
    verdict = verdict_of(stages)
    least, most = (step * step_time(name).value for name in ("least", "most"))
    cost, notes = None, tuple[str, ...]()
    if job.training.tokens or job.cluster.costed:
        from planner import cost as costs

        cost = costs.cost_plan(job, layout, Span(value=step, least=least, most=most))
        notes = tuple(costs.notes_on(job, cost))
    return Plan(
        model=job.model.name,
        num_parameters=job.model.num_parameters,
        num_trained_parameters=job.trained_parameters,
        gpu=job.cluster.gpu.name,
        num_gpus=job.cluster.num_gpus,
        training=job.training,
        layout=LayoutPlan(**{name: getattr(layout, name) for name in LayoutPlan.model_fields}),
        verdict=verdict,
        fits=verdict == "fits",
        peak_bytes=peak,
        least_bytes=max(stage.least_bytes for stage in stages),
        most_bytes=max(stage.most_bytes for stage in stages),
        capacity_bytes=job.cluster.capacity_bytes,
        step_time_s=step,
        step_time_least_s=least,
        step_time_most_s=most,
        critical_path_s=step_seconds(layout, pass_seconds(prices, solution.rows))
        + candidate.step_seconds
        + max(candidate.update_seconds(j, own) for j, own in enumerate(solution.rows)),
        tokens_per_s=tokens_per_s,
        **utilization(prices, solution.rows, tokens_per_s)._asdict(),
        days=job.training.tokens / tokens_per_s / 86400 if job.training.tokens else None,
        bubble_fraction=float(prices.pipeline.bubble),
        stages=tuple(stages),
        warnings=(
            *warnings_for(job, layout, verdict),
            *untold(job.stack, [stage.rows for stage in stages]),
        ),
        assumptions=(
            *job.assumptions,
            *_of_layout(job, layout),
            *(_of_host(job, layout, stages) if prices.offloads else ()),
            *notes,
        ),
        proof=proof,
        cost=cost,
    )


def priced_again(job: Job, plan: Plan) -> tuple[Prices, tuple[tuple[int, ...], ...]]:
    """The prices that a plan was made from, and its rows on each stage by kind of row and policy.

    The rows are those of the program, with the layers that short chunks lack.
    """
    ways = {name: Way.of(name) for stage in plan.stages for name in stage.rows}

    def place(name: str) -> tuple[bool, int, tuple[str, ...]]:
        return "optimizer" in (way := ways[name]).offload, POLICIES.index(way.recompute), way.offload

    moved, offloads = sorted(ways, key=place), any(way.offload for way in ways.values())
    prices = price(job, plan.layout.to_layout(), moved if offloads else None)
    kinds = len(next(iter(plan.stages[0].rows.values())))
    none = (0,) * kinds
    rows = tuple(
        tuple(stage.rows.get(name, none)[k] for k in range(kinds) for name in prices.policies)
        for stage in plan.stages
    )
    return prices, rows
