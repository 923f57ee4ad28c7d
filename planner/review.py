"""What a capacity review looks at: exhibits, each a table of a document's figures and how it is drawn.

Every renderer of a report, as a page, as Markdown, as CSV and as JSON, has these and nothing else. Figures
are in bytes, seconds and fractions; a column says how they are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from planner import review_charts as charts
from planner.advice import Binding
from planner.api import job_for
from planner.catalog import step_time
from planner.cost_words import checkpoints
from planner.defaults import Job
from planner.documents import Document
from planner.errors import PlannerError
from planner.ledger import COMPONENTS, components, entries, messages, view
from planner.network import AXES, Network, group
from planner.plan import CostPlan, Plan, make_plan, pass_seconds, priced_again
from planner.program import Solution
from planner.replay import Snapshot, StageReplay
from planner.schedule import shown_microbatches, timeline
from planner.sensitivity import Case, cases
from planner.stages import Prices, price
from planner.sweep_row import Row as Swept
from planner.trace import NAMES
from planner.units import DAY, about, gib, human_count, human_seconds

Unit = Literal["text", "number", "bytes", "seconds", "share", "change"]
MOST_SNAPSHOTS = 160
MOST_FRONT, MOST_NEAR = 60, 5
Row = tuple[Any, ...]
BYTES: tuple[Unit, ...] = tuple("bytes" for _ in COMPONENTS)


@dataclass(frozen=True)
class Exhibit:
    """A table with its heading; ``units`` say what its columns hold, ``charts`` draw the same figures."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    units: tuple[Unit, ...]
    rows: tuple[Row, ...]
    charts: tuple[charts.Chart, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A plan with what it was made from, priced again."""

    document: Document
    plan: Plan
    job: Job
    prices: Prices
    rows: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(document: Document) -> Subject:
        """The first plan of a document, or the nearest where nothing fits."""
        plan, cluster = document.best, document.cluster.spec
        job = job_for(document.model, cluster, plan.training, plan.layout.to_layout())
        return Subject(document, plan, job, *priced_again(job, plan))


def exhibits(subject: Subject, swept: Sequence[Swept] = ()) -> Iterator[Exhibit]:
    """The exhibits of a review, in the order in which they are read; a frontier, if something was swept."""
    yield _stages(subject.plan)
    yield _step(subject)
    yield from _schedule(subject)
    yield _communication(subject)
    if len(subject.document.plans) > 1:
        yield alternatives(subject.document.plans)
    if swept:
        yield _frontier(swept)
    if subject.plan.cost:
        yield _cost(subject.plan.cost)
    if subject.document.changes:
        yield changes(subject.document)
    if subject.document.tried:
        yield _tried(subject.document)
    yield _sensitivity(subject)


def _stages(plan: Plan) -> Exhibit:
    """Per-stage memory against the budget."""
    names = [name.replace("_", " ") for name in COMPONENTS]
    rows: tuple[Row, ...] = tuple(
        (
            str(j),
            stage.layers,
            *(stage.components[name] for name in COMPONENTS),
            stage.peak_bytes,
            stage.most_bytes,
            stage.capacity_bytes,
            stage.moment,
        )
        for j, stage in enumerate(plan.stages)
    )
    return Exhibit(
        "stages",
        "Memory of each pipeline stage against the budget",
        "One GPU of each stage at its fullest moment. The mark shows what it may come to with the most that "
        "lies outside tensors.",
        ("stage", "layers", *names, "peak", "at most", "budget", "fullest at"),
        ("text", "number", *BYTES, "bytes", "bytes", "bytes", "text"),
        rows,
        (charts.stacked([row[0] for row in rows], names, rows, 2, plan.capacity_bytes),),
    )


def _step(subject: Subject) -> Exhibit:
    """Memory of the fullest stage as the step goes on."""
    plan, prices = subject.plan, subject.prices
    index = plan.fullest
    found = StageReplay(prices, index, subject.rows).run()
    shown = _thinned(found.snapshots)
    stage = view(prices, subject.rows, index)
    names = [name.replace("_", " ") for name in COMPONENTS[:-1]]
    rows: list[Row] = []
    for number, (snapshot, size) in shown:
        parts = components(list(entries(prices, stage, snapshot)))
        at = " ".join(filter(None, (snapshot.moment, snapshot.at)))
        rows.append((str(number), at, *(parts[name] for name in COMPONENTS[:-1]), size))
    peak = max(rows, key=lambda row: row[-1])
    left_out = len(found.snapshots) - len(shown)
    note = (
        f"Stage {index}, the fullest. Places of the step in order, until it repeats itself; the highest is "
    )
    note += f"place {peak[0]}, {peak[1]}, {gib(peak[-1])} GiB of tensors."
    note += f" {left_out} places between those shown are left out." if left_out else ""
    return Exhibit(
        "step",
        "Tensors over one step",
        note,
        ("place", "at", *names, "tensors"),
        ("text", "text", *BYTES),
        tuple(rows),
        (charts.over_step(names, rows, plan.capacity_bytes),),
    )


def _thinned(
    snapshots: Sequence[tuple[Snapshot, float]],
) -> list[tuple[int, tuple[Snapshot, float]]]:
    """At most ``MOST_SNAPSHOTS`` of them, the highest of every stretch, with their numbers."""
    every = -(-len(snapshots) // MOST_SNAPSHOTS)
    numbered = list(enumerate(snapshots))
    stretches = [numbered[i : i + every] for i in range(0, len(numbered), every)]
    return [max(stretch, key=lambda one: one[1][1]) for stretch in stretches]


def _schedule(subject: Subject) -> Iterator[Exhibit]:
    """The pipeline's schedule: how a step begins and how it ends."""
    plan, prices = subject.plan, subject.prices
    layout = prices.layout
    depth = len(plan.stages)
    if depth == 1:
        return
    seconds = pass_seconds(prices, subject.rows)
    most = shown_microbatches(layout.schedule, depth, layout.grad_accum, layout.chunks)
    passes = timeline(layout.schedule, seconds, min(most, 2 * depth))
    end = max(one.end for one in passes)
    works = [
        (str(one.work.stage), one.start, one.end - one.start, NAMES[one.work.kind], one.work.microbatch)
        for one in sorted(passes, key=lambda one: one.start)
    ]
    busy = [sum(took for stage, _, took, _, _ in works if stage == str(j)) for j in range(depth)]
    rows = tuple(
        (str(j), plan.stages[j].seconds, busy[j] / end, plan.stages[j].in_flight) for j in range(depth)
    )
    count = max(one[4] for one in works) + 1
    note = f"{layout.schedule}, {layout.grad_accum} micro-batches"
    note += f", of which a step of {count} is drawn" if count < layout.grad_accum else ""
    note += f". Idle over working time of the whole step: {plan.bubble_fraction:.1%} for equal stages."
    yield Exhibit(
        "schedule",
        "The pipeline's schedule",
        note,
        ("stage", "one micro-batch", "busy while drawn", "passes in flight"),
        ("text", "seconds", "share", "number"),
        rows,
        (charts.gantt(works, depth),),
    )


def _communication(subject: Subject) -> Exhibit:
    """What a GPU of the fullest stage sends in a step, by group and level of the network."""
    prices, plan = subject.prices, subject.plan
    layout, network = prices.layout, Network.of(subject.job.cluster)
    stage = view(prices, subject.rows, plan.fullest)
    totals: dict[tuple[str, str, int, str, bool], list[float]] = {}
    for one in messages(prices, stage):
        times = layout.grad_accum if one.per == "micro-batch" else 1
        key = (one.axis, one.kind, one.gpus, _level(network, layout, one.axis), not one.behind)
        found = totals.setdefault(key, [0.0, 0.0])
        found[0] += one.count * one.size * times
        found[1] += one.seconds * times
    rows = tuple(
        (
            axis.replace("_", " "),
            kind.replace("_", "-"),
            gpus,
            level,
            "exposed" if bare else "behind compute",
            size,
            took,
        )
        for (axis, kind, gpus, level, bare), (size, took) in sorted(
            totals.items(), key=lambda item: -item[1][1]
        )
    )
    return Exhibit(
        "communication",
        "Messages of one step, by group and link",
        f"One GPU of stage {plan.fullest}: the buffers of all its messages, and how long they take by "
        "themselves. What is behind compute costs time only where compute is shorter.",
        ("group", "message", "GPUs", "over", "time", "buffers", "takes"),
        ("text", "text", "number", "text", "text", "bytes", "seconds"),
        rows,
        (charts.communication(rows),) if rows else (),
    )


def _level(network: Network, layout: Any, axis: str) -> str:
    """The outermost link that the groups of an axis cross."""
    if axis not in AXES:
        return ""
    crossed = network.place(*group(axis, layout)).crossed
    names = [level.link for level in network.levels]
    if len(names) > 2:
        names[2] = "network above leaf switches"
    over = [name for name, out in zip(names, crossed, strict=True) if bool(out)]
    return over[-1] if over else "itself"


def _frontier(swept: Sequence[Swept]) -> Exhibit:
    """The rows of a sweep that no other is better than, and those that fit not by least."""
    fit = [row for row in swept if row.front]
    near = sorted(
        (row for row in swept if row.over_bytes and not row.fits), key=lambda row: row.over_bytes or 0
    )
    rows = tuple(
        (
            f"{row.num_gpus:,} x {row.gpu}",
            row.seq_length or 0,
            row.layout or row.reason,
            row.verdict,
            row.capacity_bytes,
            row.free_bytes,
            row.step_time_s,
            row.tokens_per_s,
            row.days,
            row.cost,
        )
        for row in [*fit[:MOST_FRONT], *near[:MOST_NEAR]]
    )
    left = max(0, len(fit) - MOST_FRONT)
    fitting = sum(row.fits for row in swept)
    note = f"{len(swept):,} points were searched, {fitting:,} fit; {len(fit):,} are not beaten in GPUs, "
    note += "time per token, memory left free and price at once"
    note += f", of which {MOST_FRONT} are shown" if left else ""
    note += ". Then those that fit not by least: the nearest layout of each." if near else "."
    return Exhibit(
        "frontier",
        "Fewer or more GPUs",
        note,
        ("on", "sequence", "layout", "verdict", "budget", "free", "step", "tokens a second", "days", "price"),
        ("text", "number", "text", "text", "bytes", "bytes", "seconds", "number", "number", "number"),
        rows,
        (charts.frontier(fit[:MOST_FRONT]),) if fit else (),
    )


def _cost(cost: CostPlan) -> Exhibit:
    """What the whole training takes, with the range that the step time's gives."""
    spans = (
        ("days at work", cost.compute_s, 1 / DAY),
        ("days in all", cost.wall_s, 1 / DAY),
        ("GPU-hours", cost.gpu_hours, 1.0),
        ("kWh, all boards at their limit", cost.energy_kwh, 1.0),
        (f"{cost.currency or 'price'} at {cost.price or 0:g} a GPU-hour", cost.money, 1.0),
    )
    rows = tuple(
        (name, span.value * unit, span.least * unit, span.most * unit) for name, span, unit in spans if span
    )
    words = checkpoints(cost)
    note = f"{words[0].upper()}{words[1:]}. "
    if cost.goodput is None:
        note += "No failures and no checkpoints are counted in the time. "
    return Exhibit(
        "cost",
        "Time, energy and price of the whole training",
        note + "The range is the step time's.",
        ("of the whole training", "expected", "least", "most"),
        ("text", "number", "number", "number"),
        rows,
    )


def alternatives(plans: Sequence[Plan]) -> Exhibit:
    """The ranked layouts, and why each lost to the first."""
    best = plans[0]
    rows = tuple(
        (
            str(number),
            plan.layout.to_layout().describe(),
            plan.peak_bytes,
            plan.headroom_bytes,
            plan.step_time_s,
            plan.mfu,
            _why_lost(best, plan) if number > 1 else "first",
        )
        for number, plan in enumerate(plans, 1)
    )
    return Exhibit(
        "alternatives",
        "Layouts considered, and why they lost",
        "The best of those that fit, by step time. Layouts whose step times tie are too near to each other "
        "for their order to be sure.",
        ("rank", "layout", "peak", "free at least", "step", "MFU", "against the first"),
        ("text", "text", "bytes", "bytes", "seconds", "share", "text"),
        rows,
        (charts.alternatives(rows),),
    )


def _why_lost(best: Plan, plan: Plan) -> str:
    """A plan against the best one in words."""
    slower = plan.step_time_s / best.step_time_s - 1
    words = f"{slower:.1%} slower" + (", a tie" if plan.ties_with(best) else "")
    freed = plan.headroom_bytes - best.headroom_bytes
    return words + (f", {gib(abs(freed))} GiB {'more' if freed > 0 else 'less'} free")


def changes(document: Document) -> Exhibit:
    """Changes under which a job that does not fit would."""
    best = document.best
    rows = tuple(
        (
            change["what"],
            change.get("option", ""),
            change["num_gpus"],
            change["peak_bytes"],
            change["step_time_s"],
            change["step_time_s"] / best.step_time_s - 1,
        )
        for change in document.changes
    )
    return Exhibit(
        "changes",
        "What would fit",
        "Each change was planned again, not guessed; least changed first, then the cheapest in GPU time.",
        ("change", "option", "GPUs", "peak", "step", "against the nearest"),
        ("text", "text", "number", "bytes", "seconds", "change"),
        rows,
    )


def _tried(document: Document) -> Exhibit:
    """Changes that are not enough."""
    rows = tuple((one["what"], one["option"], one["surely_over_bytes"]) for one in document.tried)
    return Exhibit(
        "tried",
        "Tried, and not enough by itself",
        "How much is lacking on the fullest GPU, where one layout was asked about.",
        ("change", "option", "over"),
        ("text", "text", "bytes"),
        rows,
    )


def _sensitivity(subject: Subject) -> Exhibit:
    """The same layout with one thing changed."""
    plan, found = subject.plan, []
    for case in cases(subject.job, subject.prices.layout):
        changed = _planned(subject, case)
        if changed is None:
            continue
        found.append(
            (
                case.name,
                changed.num_gpus,
                changed.peak_bytes,
                changed.peak_bytes / plan.peak_bytes - 1,
                changed.step_time_s,
                changed.tokens_per_s / plan.tokens_per_s - 1,
                changed.verdict,
            )
        )
    own = ("as planned", plan.num_gpus, plan.peak_bytes, 0.0, plan.step_time_s, 0.0, plan.verdict)
    rows = (own, *found)
    return Exhibit(
        "sensitivity",
        "What if one thing were changed",
        "The very same layout, layers and recomputation, not searched again; the rest of the job stays as "
        "it is. The dashed line is the budget.",
        ("with", "GPUs", "peak", "memory", "step", "tokens a second", "verdict"),
        ("text", "number", "bytes", "change", "seconds", "change", "text"),
        rows,
        (charts.sensitivity(rows, plan.capacity_bytes),),
    )


def _planned(subject: Subject, case: Case) -> Plan | None:
    """The plan of a case with the subject's own rows; None where it cannot be."""
    try:
        job = job_for(subject.document.model, case.cluster, case.training, case.layout)
        policies = subject.prices.policies
        candidate = price(job, case.layout, policies if subject.prices.offloads else None).spread()
        rows = tuple(subject.rows)
        return make_plan(job, Solution(candidate, rows, candidate.cost(rows), True), {"status": "given"})
    except PlannerError:
        return None


def headline(plan: Plan) -> str:
    """The answer in one line."""
    where = f"{plan.num_gpus:,} x {plan.gpu}"
    layout = plan.layout.to_layout().describe()
    return f"{plan.model} {plan.verdict.replace('at risk', 'is at risk')} on {where} as {layout}"


def binding_words(plan: Plan) -> str:
    """What of a plan that does not fit for sure binds; empty where it fits."""
    return "" if plan.fits else f"What binds: {Binding.of(plan).describe()}."


def subject_words(plan: Plan) -> str:
    """What was planned."""
    return f"{plan.model} on {plan.num_gpus:,} x {plan.gpu}"


def figures(document: Document) -> list[tuple[str, str, str]]:
    """The figures that decide, each with its name and what it stands beside."""
    plan = document.best
    least, most = gib(plan.least_bytes), gib(plan.most_bytes)
    faster, slower = human_seconds(plan.step_time_least_s), human_seconds(plan.step_time_most_s)
    found = [
        (
            "Peak of the fullest GPU",
            f"{gib(plan.peak_bytes)} GiB",
            f"{least} to {most} of {gib(plan.capacity_bytes)}",
        ),
        (
            "Free at least",
            f"{gib(plan.headroom_bytes)} GiB",
            f"{plan.headroom_bytes / plan.capacity_bytes:.1%} of it",
        ),
        ("One step", human_seconds(plan.step_time_s), f"{faster} to {slower}"),
        ("Throughput", f"{plan.tokens_per_s:,.0f} tokens/s", f"MFU {plan.mfu:.0%}"),
        ("Pipeline idle", f"{plan.bubble_fraction:.1%}", f"of working time, {len(plan.stages)} stages"),
    ]
    cost = plan.cost
    if cost and cost.tokens and cost.wall_s and cost.gpu_hours:
        hours = f"{about(cost.gpu_hours.value)} GPU-hours"
        price = f", {about(cost.money.value)} {cost.currency}".rstrip() if cost.money else ""
        days = f"{about(cost.wall_s.value / DAY)} days"
        found.append((f"{human_count(cost.tokens)} tokens", days, hours + price))
    return found


def accuracy(plan: Plan) -> list[str]:
    """How sure the figures are."""
    memory = f"{gib(plan.least_bytes)} to {gib(plan.most_bytes)} GiB"
    faster, slower = human_seconds(plan.step_time_least_s), human_seconds(plan.step_time_most_s)
    return [
        f"Memory: {memory}. Tensors are sums of named terms; what lies outside them (CUDA context, NCCL, the "
        "allocator) varies from run to run.",
        f"Step time: {faster} to {slower}. Four in five published runs that nothing was fitted to took "
        f"between {step_time('least').value:.2f} and {step_time('most').value:.2f} times what was predicted.",
    ]
