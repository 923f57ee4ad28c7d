"""When something does not fit: what binds, what comes nearest, and what would fit, each change re-solved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from planner.asked import Asked, options_between, options_text
from planner.best_first import find
from planner.changes import Of, Proposal, proposals
from planner.defaults import Job
from planner.errors import InputError, SolverError
from planner.layouts import Choices
from planner.plan import Plan, make_plan
from planner.program import settle
from planner.units import gib
from strategies.layout import Layout

ENOUGH = 6
"""Changes of a search that are looked for; at least three are found wherever more GPUs can help."""
LIMIT = 20.0
"""Seconds that looking for changes takes at most, but for the last one that was begun."""

ORDER: tuple[Of, ...] = ("layout", "gpus", "training")
"""Who can change the layout changes nothing else; GPUs cost, and what is computed may not do as well."""

Progress = Callable[[int, int], Any]
"""Told how many changes were tried and how many of them fit."""
Estimate = Callable[[Asked], Plan]


@dataclass(frozen=True)
class Binding:
    """The constraint that is not met: a stage, a moment of its step, a place, and what fills it most.

    ``over_bytes`` is by how much it is over at the usual size of everything, ``surely_over_bytes`` at the
    most that it may take: to fit is to have none of the latter. ``component_bytes`` are at the peak.
    """

    stage: int
    moment: str
    place: str  # GPU, host or nvme
    component: str
    component_bytes: int
    usual_bytes: int
    least_bytes: int
    most_bytes: int
    capacity_bytes: int
    over_bytes: int
    surely_over_bytes: int

    @staticmethod
    def all_of(plan: Plan) -> list[Binding]:
        """The fullest GPU, whether it fits or not, and every place outside it that is short."""
        found = []
        for index, stage in enumerate(plan.stages):
            if index == plan.fullest:
                sizes = stage.peak_bytes, stage.least_bytes, stage.most_bytes, stage.capacity_bytes
                found.append(_binding(index, stage.moment, "GPU", stage.components, *sizes))
            for place, own in stage.elsewhere.items():
                sizes = own.bytes, own.bytes, own.most_bytes, own.capacity_bytes
                if own.most_bytes > own.capacity_bytes:
                    found.append(_binding(index, stage.moment, place, own.components, *sizes))
        return sorted(found, key=lambda one: one.place != "GPU")

    @staticmethod
    def of(plan: Plan) -> Binding:
        """The constraint that a plan misses by most, or comes nearest to where it fits."""
        return max(Binding.all_of(plan), key=lambda one: one.surely_over_bytes)

    def describe(self) -> str:
        """The constraint in words: ``at loss stage 0 takes 147.2 GiB (...) of 79.2, 67.97 GiB over; ...``."""
        if self.place != "GPU":
            option = "host-memory" if self.place == "host" else self.place
            return (
                f"its {self.place} is short of {gib(self.surely_over_bytes, 2)} GiB a GPU, where it has "
                f"{gib(self.capacity_bytes)}: give more with --{option}"
            )
        taken = f"{gib(self.usual_bytes)} GiB ({gib(self.least_bytes)} to {gib(self.most_bytes)})"
        words = f"at {self.moment} stage {self.stage} takes {taken} of {gib(self.capacity_bytes)}"
        if not self.surely_over_bytes:
            return words
        largest = f"{self.component.replace('_', ' ')}, {gib(self.component_bytes, 2)} GiB"
        return f"{words}, {over(self.over_bytes, self.surely_over_bytes)}; its largest part is {largest}"


def over(usually: int, surely: int) -> str:
    """By how much something is over: usually, or only where it takes the most that it may.

    >>> over(3 * 2**30, 4 * 2**30), over(0, 2**30)
    ('3.00 GiB over', 'up to 1.00 GiB over')
    """
    return f"{gib(usually, 2)} GiB over" if usually else f"up to {gib(surely, 2)} GiB over"


def _binding(
    stage: int, moment: str, place: str, parts: dict[str, int], usual: int, least: int, most: int, room: int
) -> Binding:
    largest = max(parts, key=lambda name: parts[name])
    beyond = max(0, usual - room), max(0, most - room)
    return Binding(stage, moment, place, largest, parts[largest], usual, least, most, room, *beyond)


@dataclass(frozen=True)
class Change:
    """One change and what comes of it: it fits so, in ``step_time_s`` and with ``peak_bytes``.

    ``options`` are those of the command line by name, to add or replace, or to leave out where they are
    None; ``option`` is how they are written. ``step_time_ratio`` is over the step time of the layout that was
    given; None for a search's. ``of`` is what it changes besides the layout. ``asked`` are the inputs then.
    """

    what: str
    option: str
    options: dict[str, Any]
    layout: Layout
    step_time_s: float
    step_time_ratio: float | None
    peak_bytes: int
    num_gpus: int
    gpu: str
    of: Of
    seconds_per_token: float  # of one GPU
    asked: Asked = field(repr=False)


@dataclass(frozen=True)
class Tried:
    """A change that does not do: by how much it is still over, as of :class:`Binding`, and on which stage.

    None of either for a search's.
    """

    what: str
    option: str
    over_bytes: int | None = None
    surely_over_bytes: int | None = None
    stage: int | None = None


@dataclass(frozen=True)
class Advice:
    """What binds, the changes that fit, best first, and those that were tried and do not, nearest first."""

    binding: Binding
    changes: list[Change]
    tried: list[Tried]

    def document(self) -> dict[str, Any]:
        """The advice as JSON."""
        changes = []
        for change in self.changes:
            values = {name: value for name, value in vars(change).items() if name != "asked"}
            changes.append(values | {"layout": asdict(change.layout)})
        return {
            "binding": asdict(self.binding),
            "changes": changes,
            "tried": [asdict(one) for one in self.tried],
        }


def nearest_plan(job: Job, choices: Choices) -> Plan:
    """The layout that asks for least memory on its fullest GPU, though more than there is.

    It is looked for in the whole GPU, and more: so it is the same whatever part of that the job may use.
    """
    whole = job.cluster.model_copy(update={"budget_bytes": None, "headroom": 0.0})
    stretch = 2.0
    while True:
        stretched = replace(job, cluster=whole, stretch=stretch)
        found = find(stretched, choices, "headroom", top=1)
        if found.answers:
            return make_plan(job, found.answers[0], {"status": "does not fit", "objective": "headroom"})
        stretch *= 2


def shortfall(job: Job, enumerated: int, nearest: Plan) -> str:
    """By how much none of the layouts fits: what binds of the nearest."""
    layout = nearest.layout.to_layout().describe()
    fits = "fits for sure on" if nearest.verdict == "at risk" else "fits on"
    binding = "; ".join(one.describe() for one in Binding.all_of(nearest)[:2])
    return (
        f"{job.model.name} {fits} none of {enumerated:,} layouts of {job.cluster.num_gpus} x "
        f"{job.cluster.gpu.name}. Nearest is {layout}: {binding}"
    )


def changes_that_fit(
    asked: Asked, searching: Progress = lambda done, left: None, limit: float = LIMIT
) -> tuple[list[Change], list[Tried]]:
    """Changes under which a search finds something, in the order of :func:`ranked`, and those that do not do.

    ``searching`` is told how many layouts a search has solved and how many are left.
    """
    trial = _Trial(asked, None, time.monotonic() + limit, enough=ENOUGH, searching=searching)
    trial.run(proposals(asked, asked.job), trial.searched)
    return trial.answer()


def advise(
    asked: Asked,
    plan: Plan,
    estimate: Estimate,
    progress: Progress = lambda done, fit: None,
    limit: float = LIMIT,
) -> Advice:
    """What binds a given layout, ``plan``, and what would fit: changes of it, then the best of all layouts.

    Where not even the best layout of the same GPUs fits, the changes of a search are tried too. ``estimate``
    re-solves a changed layout.
    """
    trial = _Trial(asked, plan, time.monotonic() + limit, trying=progress)
    trial.run(proposals(asked, asked.job), lambda changed: (changed, estimate(changed)))
    free = replace(asked, layout=None, choices=Choices(offload=tuple(filter(None, asked.offload.split(",")))))

    def best(changed: Asked) -> tuple[Asked, Plan | None]:
        laid_out, found = trial.searched(changed)
        return (laid_out, estimate(laid_out)) if found else (changed, None)

    trial.run([Proposal("layout", "the best layout of the same GPUs", lambda: free)], best)
    if "layout" not in trial.found:
        others = (replace(one, sort=f"{one.sort}, best layout") for one in proposals(free, free.job))
        trial.run((replace(one, what=f"{one.what}, its best layout") for one in others), best)
    return Advice(Binding.of(plan), *trial.answer())


@dataclass
class _Trial:
    """Changes as they are tried, by sort: the first of a sort that fits, and those that do not."""

    asked: Asked
    plan: Plan | None  # of the layout that was given
    until: float
    trying: Progress = lambda done, fit: None
    searching: Progress = lambda done, left: None
    enough: int = 1000
    found: dict[str, Change] = field(default_factory=dict)
    failed: dict[str, Tried] = field(default_factory=dict)

    def run(self, changes: Iterable[Proposal], answer: Callable[[Asked], tuple[Asked, Plan | None]]) -> None:
        """Tries changes until there are enough or no time is left; those that cannot be are passed over."""
        for proposal in changes:
            if proposal.sort in self.found:
                continue
            if len(self.found) >= self.enough or time.monotonic() > self.until:
                break
            self.trying(len(self.found) + len(self.failed), len(self.found))
            try:
                changed, plan = answer(proposal.make())
            except (InputError, SolverError):
                continue
            if plan and plan.fits:
                self.found[proposal.sort] = self.change(proposal, changed, plan)
            else:
                self.fail(proposal, changed, plan)

    def change(self, proposal: Proposal, changed: Asked, plan: Plan) -> Change:
        """What came of a change that fits."""
        options = options_between(self.asked, changed)
        return Change(
            proposal.what,
            options_text(options),
            options,
            plan.layout.to_layout(),
            plan.step_time_s,
            plan.step_time_s / self.plan.step_time_s if self.plan else None,
            plan.peak_bytes,
            plan.num_gpus,
            plan.gpu,
            proposal.of,
            plan.num_gpus / plan.tokens_per_s,
            changed,
        )

    def fail(self, proposal: Proposal, changed: Asked, plan: Plan | None) -> None:
        """Keeps of a sort the one that comes nearest."""
        option = options_text(options_between(self.asked, changed))
        one = Tried(proposal.what, option)
        if plan:
            binding = Binding.of(plan)
            beyond = binding.over_bytes, binding.surely_over_bytes
            one = Tried(one.what, one.option, *beyond, binding.stage)
        before = self.failed.get(proposal.sort)
        if before is None or _over(one) <= _over(before):
            self.failed[proposal.sort] = one

    def searched(self, changed: Asked) -> tuple[Asked, Plan | None]:
        """The best layout, as a search has it, and the inputs that ``estimate`` has it with."""
        job = changed.job
        left = max(1.0, self.until - time.monotonic())
        found = find(job, changed.choices, top=1, time_limit=left, progress=self.searching)
        if not found.answers:
            return changed, None
        plan = make_plan(job, settle(found.answers[0]), {})
        if self.asked.layout is None:
            return changed, plan
        moved = "+activations" * any("activations" in stage.offload for stage in plan.stages)
        layout = plan.layout.to_layout()
        return replace(changed, layout=layout, recompute=f"auto{moved}", layers=None), plan

    def answer(self) -> tuple[list[Change], list[Tried]]:
        """Those that fit, ranked, and the sorts of which none does but all help, the nearest first."""
        before = Binding.of(self.plan).surely_over_bytes if self.plan else 0
        failed = [one for sort, one in self.failed.items() if sort not in self.found]
        tried = [one for one in failed if one.surely_over_bytes is None or one.surely_over_bytes < before]
        return list(ranked(self.found.values())), sorted(tried, key=_over)


def _over(one: Tried) -> float:
    return float("inf") if one.surely_over_bytes is None else one.surely_over_bytes


def ranked(changes: Iterable[Change]) -> Iterator[Change]:
    """Changes of the layout, of the GPUs, of what is computed; each cheapest in GPU time per token first.

    Of those that come to the same, the first.
    """
    seen = set()
    for change in sorted(changes, key=lambda one: (ORDER.index(one.of), one.seconds_per_token)):
        same = change.layout, change.step_time_s, change.peak_bytes, change.gpu, change.asked.training
        key = repr(same)
        if key not in seen:
            seen.add(key)
            yield change
