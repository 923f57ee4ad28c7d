"""A priced layout as plain numbers: all that the integer program ever sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from planner.order import Order
from strategies.layout import Layout


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of a candidate: plain numbers, one per kind of row and policy where it says so.

    ``moments`` maps a moment to (bytes per row, bytes besides, bytes that one layer at work adds: the largest
    in use counts), the first and the last one number for each kind of row under each policy. A *row* is one
    layer in each of the stage's chunks. Where something is offloaded, ``elsewhere`` maps a place outside the
    GPU to (bytes per row, bytes besides), and ``updates`` are seconds of the host's update, per row.
    """

    moments: dict[str, tuple[tuple[float, ...], float, tuple[float, ...]]]
    seconds: tuple[float, ...]  # per row
    fixed_seconds: float
    elsewhere: dict[str, tuple[tuple[float, ...], float]] = field(default_factory=dict)
    updates: tuple[float, ...] = ()
    fixed_update: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A priced layout: all that the integer program sees of it.

    Columns are the kinds of row, each under every policy: kind 0 under all of them first.
    """

    layout: Layout
    policies: tuple[str, ...]
    order: Order  # of the rows of layers to hand out over the stages
    short: int  # chunks at the ends that lack their layer
    capacity: float
    stages: tuple[Stage, ...]
    fill: float
    repeat: float
    step_seconds: float
    mirrored: bool = False  # stage j holds the same layers as stage p - 1 - j
    rooms: dict[str, float] = field(default_factory=dict)  # bytes that a GPU has in each place outside it
    not_all: tuple[bool, ...] = ()  # policies under which one row at least is not run
    alike: bool = False  # every stage recomputes as many rows as the others

    @property
    def rows(self) -> int:
        """Rows of layers in all."""
        return len(self.order.sequence)

    @property
    def columns(self) -> int:
        """Kinds of row times policies."""
        return len(self.order.rows) * len(self.policies)

    def under_one(self, counts: Sequence[int], policy: int = 0) -> list[tuple[int, ...]]:
        """Rows of every column on each stage, where the stages hold ``counts`` rows, all under one policy."""
        several = len(self.policies)
        return [
            tuple(n * (r == policy) for n in kinds for r in range(several))
            for kinds in self.order.split(list(counts))
        ]

    def under(self, policies: Sequence[str], alike: bool = False) -> Candidate:
        """The same with some of its policies only; ``alike`` on every stage."""
        several = len(self.policies)
        chosen = [self.policies.index(policy) for policy in policies]
        columns = [kind * several + r for kind in range(len(self.order.rows)) for r in chosen]

        def of(values: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(values[column] for column in columns) if values else values

        def restricted(stage: Stage) -> Stage:
            moments = {name: (of(a), fixed, of(b)) for name, (a, fixed, b) in stage.moments.items()}
            places = {name: (of(a), fixed) for name, (a, fixed) in stage.elsewhere.items()}
            return replace(
                stage,
                moments=moments,
                seconds=of(stage.seconds),
                elsewhere=places,
                updates=of(stage.updates),
            )

        never = tuple(self.not_all[r] for r in chosen) if self.not_all else ()
        stages = tuple(map(restricted, self.stages))
        return replace(self, policies=tuple(policies), stages=stages, not_all=never, alike=alike)

    def as_told(self, recomputes: str) -> list[Candidate]:
        """One for each way in which a framework can be told what to recompute (``Stack.recomputes``)."""
        groups: dict[str, list[str]] = {}
        for policy in self.policies:
            groups.setdefault(policy.partition("+")[0], []).append(policy)
        if recomputes == "each" or len(groups) == 1:
            return [self]
        ways = [self.under(own) for own in groups.values()]
        if recomputes == "first" and "none" in groups:
            pairs = [[*groups["none"], *own] for name, own in groups.items() if name != "none"]
            ways += [self.under(own, alike=True) for own in pairs]
        return ways

    def cost(self, rows: Sequence[Sequence[int]]) -> float:
        """Seconds of a step that hands ``rows[stage][column]`` rows to each stage."""
        times = [self.stage_seconds(j, own) for j, own in enumerate(rows)]
        update = max(self.update_seconds(j, own) for j, own in enumerate(rows))
        return self.fill * sum(times) + self.repeat * max(times) + self.step_seconds + update

    def update_seconds(self, stage: int, rows: Sequence[int]) -> float:
        """Seconds of a stage's update on its host."""
        own = self.stages[stage]
        return own.fixed_update + sum(n * s for n, s in zip(rows, own.updates, strict=False))

    def held_elsewhere(self, stage: int, rows: Sequence[int]) -> dict[str, float]:
        """Bytes that a GPU of a stage may need in each place outside it."""
        return {
            place: fixed + sum(n * b for n, b in zip(rows, per_row, strict=True))
            for place, (per_row, fixed) in self.stages[stage].elsewhere.items()
        }

    def fits(self, stage: int, rows: Sequence[int]) -> bool:
        """Do so many rows of every column fit on a stage: on the GPU and in every other place?"""
        if self.peak(stage, rows)[0] > self.capacity:
            return False
        return all(size <= self.rooms[place] for place, size in self.held_elsewhere(stage, rows).items())

    def allows(self, rows: Sequence[Sequence[int]]) -> bool:
        """Is no policy that must leave a row out used for all of them?"""
        several = len(self.policies)
        for index, never in enumerate(self.not_all):
            count = sum(n for own in rows for n in own[index::several])
            if never and count >= self.rows:
                return False
        return True

    def stage_seconds(self, stage: int, rows: Sequence[int]) -> float:
        """Seconds of one micro-batch on a stage, forward and backward."""
        own = self.stages[stage]
        return own.fixed_seconds + sum(n * s for n, s in zip(rows, own.seconds, strict=True))

    def peak(self, stage: int, rows: Sequence[int]) -> tuple[float, str]:
        """Bytes of a stage's pools, at most, and the moment at which they are reached."""
        own = self.stages[stage]
        sizes = []
        for moment, (per_row, fixed, working) in own.moments.items():
            used = max((w for n, w in zip(rows, working, strict=True) if n), default=0.0)
            sizes.append((sum(n * b for n, b in zip(rows, per_row, strict=True)) + fixed + used, moment))
        size, moment = max(sizes)
        return size, moment.partition(" after ")[0]
