"""The search: every layout bounded, few of them solved, the best ones proved.

Best bound first. A layout's quick bound is refined when its turn comes; a refined one is solved by
the integer program when *its* turn comes; the search ends when no bound is left below the k-th best
answer. What is never solved is therefore never better: that is the proof.
"""

from __future__ import annotations

import copy
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from planner.bounds import (
    Array,
    moment_names,
    quick_bound,
    sharp_bound,
    slowest_at_least,
    tight_bound,
)
from planner.candidate import Candidate
from planner.defaults import Job
from planner.errors import SolverError
from planner.layouts import Choices, Space, enumerate_layouts
from planner.offload_choices import menus, offloads
from planner.overheads import tensor_capacity
from planner.program import RELATIVE_GAP, Solution, solve
from planner.stages import Prices, price
from strategies.layout import RANK_ORDERS, Layout

BATCH = 64
"""Quick bounds refined first; each further batch is twice the last."""


@dataclass
class Found:
    """What a search found: answers, best first, and the account of what it did."""

    space: Space
    enumerated: int = 0  # layouts that were looked at: those that do not fit, were pruned or were solved
    answers: list[Solution] = field(default_factory=list)
    optimal: bool = True
    gap: float = 0.0  # by which fraction something better than the best answer may exist
    unfitting: int = 0  # proved not to fit: by its states, by a bound or by the program
    pruned: int = 0  # proved not to be among the best, by a bound
    solved: int = 0  # split over its stages by the program
    seconds: float = 0.0

    @property
    def refused(self) -> int:
        """Combinations of degrees and choices that were refused before they became layouts."""
        return sum(self.space.refused.values())


@dataclass
class Ground:
    """What searches of one job share that differ in memory only: layouts, prices and candidates.

    Bytes and seconds do not depend on how much memory there is. ``known`` are tight bounds of every family
    that were found under ``capacity`` bytes or more: with less memory nothing is quicker, so that they hold.
    """

    space: Space
    prices: list[Prices]
    names: list[list[str]] = field(default_factory=list)
    known: list[Array] = field(default_factory=list)
    capacity: float = float("inf")
    candidates: dict[tuple[int, int], Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = [moment_names(own) for own in self.prices]

    @staticmethod
    def of(job: Job, choices: Choices, objective: str) -> Ground:
        """The layouts of a job, priced."""
        space = layouts_for(job, choices, objective)
        return Ground(space, priced(job, choices, space))

    def under(self, job: Job) -> None:
        """From here on there is as much memory as this job has, which is else the same. Best: ever less."""
        if (capacity := job.cluster.capacity_bytes * job.stretch) > self.capacity or not self.known:
            self.known = [np.full(len(own.layout.data_parallel), -np.inf) for own in self.prices]
        self.capacity = capacity
        for index, own in enumerate(self.prices):
            self.prices[index] = changed = copy.copy(own)
            changed.job, changed.capacity = job, tensor_capacity(job, own.layout)

    def candidate(self, family: int, index: int) -> Candidate:
        """One layout, for the program."""
        if (family, index) not in self.candidates:
            self.candidates[family, index] = self.prices[family].take(index).spread()
        found = self.candidates[family, index]
        capacity = float(np.broadcast_to(self.prices[family].capacity, self.known[family].shape)[index])
        return found if capacity == found.capacity else replace(found, capacity=capacity)


@dataclass
class _Frontier:
    """Layouts in order of what they may cost at best; bounds are tightened as they come up.

    They come in the order of their tight bounds, then of families and layouts: whatever is refined when.
    """

    ground: Ground
    objective: str
    order: list[tuple[float, int, int]] = field(default_factory=list)
    refined: list[tuple[float, int, int]] = field(default_factory=list)
    unfitting: int = 0
    batch: int = BATCH
    sharpened: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        for family, (prices, known) in enumerate(zip(self.ground.prices, self.ground.known, strict=True)):
            bound, possible = quick_bound(prices)
            if self.objective == "headroom":
                bound = np.full_like(bound, -np.inf)
            bound, possible = np.maximum(bound, known), np.logical_and(possible, known < np.inf)
            self.unfitting += int(np.count_nonzero(possible == 0))
            self.order += [(float(bound[i]), family, int(i)) for i in np.nonzero(possible)[0]]
        self.order.sort(reverse=True)

    def refine(self) -> None:
        """Replaces the quick bounds of the next layouts by tight ones."""
        batch = [self.order.pop() for _ in range(min(self.batch, len(self.order)))]
        self.batch = min(2 * self.batch, 32 * BATCH)
        for family in {f for _, f, _ in batch}:
            chosen = np.array(sorted(i for _, f, i in batch if f == family))
            prices, names = self.ground.prices[family].take((chosen, None)), self.ground.names[family]
            bounds = tight_bound(prices, self.objective, names)
            lasting = bounds if self.objective == "time" else np.where(bounds < np.inf, -np.inf, np.inf)
            self.ground.known[family][chosen] = lasting
            for index, bound in zip(chosen, bounds, strict=True):
                if np.isfinite(bound):
                    heapq.heappush(self.refined, (float(bound), family, int(index)))
                else:
                    self.unfitting += 1

    def next_bound(self) -> float:
        """The least cost that a layout still to come may have; infinite at the end."""
        while self.order and (not self.refined or self.order[-1][0] <= self.refined[0][0]):
            self.refine()
        return self.refined[0][0] if self.refined else float("inf")

    def pop(self) -> Candidate | None:
        """The layout whose bound is least; None if its sharp bound sends it back or rules it out."""
        bound, family, index = heapq.heappop(self.refined)
        candidate = self.ground.candidate(family, index)
        if self.objective == "headroom" or (family, index) in self.sharpened:
            return candidate
        self.sharpened.add((family, index))
        sharp = sharp_bound(candidate, slowest_at_least(candidate))
        if sharp <= bound:
            return candidate
        if sharp == float("inf"):
            self.unfitting += 1
        else:
            heapq.heappush(self.refined, (sharp, family, index))
        return None

    def __len__(self) -> int:
        return len(self.order) + len(self.refined)


def layouts_for(job: Job, choices: Choices, objective: str) -> Space:
    """The layouts to search: for headroom in one rank order, as memory does not depend on it."""
    if objective == "headroom":
        first = tuple(choices.rank_order or job.stack.rank_orders)[:1]
        choices = replace(choices, rank_order=first)
    return enumerate_layouts(job, choices)


def priced(job: Job, choices: Choices, space: Space) -> list[Prices]:
    """Every family with each offload that it may have, under each set of ways of running its layers."""
    policies = choices.policies(job)
    if not choices.offload:
        return [price(job, family, policies) for family in space.families]
    return [
        price(job, one, menu)
        for family in space.families
        for one in (replace(family, offload=text) for text in offloads(job, family, choices.offload))
        for menu in menus(job, one, policies, choices.offload)
    ]


def find(
    job: Job,
    choices: Choices = Choices(),
    objective: str = "time",
    top: int = 5,
    time_limit: float = 60.0,
    progress: Callable[[int, int], Any] = lambda done, left: None,
    ground: Ground | None = None,
) -> Found:
    """The ``top`` best layouts that fit, with proof.

    ``objective`` is ``time`` (seconds of a step) or ``headroom`` (bytes free on the fullest GPU).
    After ``time_limit`` seconds the search stops with what it has: ``optimal`` is then False and
    ``gap`` says by which fraction something better may exist. ``progress`` is told how many
    layouts were solved and how many are left. ``ground`` is that of the same search with other memory:
    the answers are those without it, sooner.
    """
    start = time.perf_counter()
    told = job.stack.recomputes if choices.launchable else "each"
    ground = ground or Ground.of(job, choices, objective)
    ground.under(job)
    frontier = _Frontier(ground, objective)
    found = Found(ground.space, sum(len(own.layout.data_parallel) for own in ground.prices))
    worst = unproved = float("inf")
    while _beats(bound := frontier.next_bound(), worst):
        left = time_limit - (time.perf_counter() - start)
        if left <= 0:
            found.optimal = False
            break
        progress(found.solved, len(frontier))
        candidate = frontier.pop()
        if candidate is None:  # dearer than it seemed
            continue
        if _settled(found.answers, candidate.layout, bound):
            found.pruned += 1
            continue
        try:
            solution = _solved(candidate, told, objective, left)
        except SolverError:  # out of time: this layout is left as it was
            found.optimal = False
            unproved = min(unproved, bound)
            found.pruned += 1
            break
        if solution is None:
            frontier.unfitting += 1
            continue
        found.solved += 1
        if not solution.optimal:
            found.optimal = False
            unproved = min(unproved, bound)
        found.answers = best_of([*found.answers, solution], top)
        if len(found.answers) == top:
            worst = found.answers[-1].cost
    if not found.optimal and found.answers:
        best = found.answers[0].cost
        found.gap = max(0.0, best - min(bound, unproved)) / (abs(best) or 1.0)
    found.unfitting = frontier.unfitting
    found.pruned += len(frontier)
    found.seconds = time.perf_counter() - start
    return found


def _solved(candidate: Candidate, told: str, objective: str, left: float) -> Solution | None:
    """The best split of a layout, of those that its framework can be told."""
    ways = (solve([way], objective, left) for way in candidate.as_told(told))
    return min((one for one in ways if one is not None), key=lambda one: one.cost, default=None)


def _beats(bound: float, worst: float) -> bool:
    """May a cost be better than the worst answer that is kept, by more than the solver's gap?"""
    if worst == float("inf"):
        return bound < worst
    return bound < worst - RELATIVE_GAP * abs(worst)


def _whatever_order(layout: Layout) -> Layout:
    return replace(layout, rank_order=RANK_ORDERS[0])


def _settled(answers: Sequence[Solution], layout: Layout, bound: float) -> bool:
    """Is the layout answered in another rank order that costs no more than this one must?"""
    twins = (one for one in answers if _whatever_order(one.candidate.layout) == _whatever_order(layout))
    return any(one.cost <= bound for one in twins)


def best_of(answers: Sequence[Solution], top: int) -> list[Solution]:
    """The best layouts, each in its best rank order only."""
    best: dict[Layout, Solution] = {}
    for answer in sorted(answers, key=lambda answer: answer.cost):
        best.setdefault(_whatever_order(answer.candidate.layout), answer)
    return list(best.values())[:top]


def exhaustive(job: Job, choices: Choices, objective: str, top: int) -> Sequence[Solution]:
    """Every layout solved, none pruned: what :func:`find` must agree with. For tests."""
    answers = []
    for prices in priced(job, choices, layouts_for(job, choices, objective)):
        for index in range(len(prices.layout.data_parallel)):
            told = job.stack.recomputes if choices.launchable else "each"
            solution = _solved(prices.take(index).spread(), told, objective, 60.0)
            if solution:
                answers.append(solution)
    return best_of(answers, top)
