"""Optimizer states that lie elsewhere, counted apart from how layers recompute.

Whose optimizer states are offloaded does not matter for what a layer recomputes, nor the other way round: of
rows under every pair of both there are many hand-outs that cost the same. The integer program so counts, on
every stage and of each kind of row, the rows under each recompute policy, and the rows that are *moved*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.candidate import Candidate, Stage
from strategies.offload import Way


@dataclass(frozen=True)
class Moved:
    """What a moved row changes on a stage, one number for each kind of row."""

    moments: dict[str, tuple[float, ...]]
    elsewhere: dict[str, tuple[float, ...]]
    updates: tuple[float, ...]


def apart(candidate: Candidate) -> tuple[Candidate, list[Moved]]:
    """The candidate with the ways that keep optimizer states on the GPU, and what a moved row changes.

    The list is empty where no way of running a layer, or every one, moves them.
    """
    pairs = _pairs(candidate.policies)
    if not pairs:
        return candidate, []
    several, kinds = len(candidate.policies), range(len(candidate.order.rows))
    home, away = pairs[0]

    def kept(numbers: Sequence[float]) -> tuple[float, ...]:
        return tuple(numbers[k * several + plain] for k in kinds for plain, _ in pairs)

    def change(numbers: Sequence[float]) -> tuple[float, ...]:
        return tuple(numbers[k * several + away] - numbers[k * several + home] for k in kinds)

    def without(stage: Stage) -> Stage:
        return replace(
            stage,
            moments={
                name: (kept(rows), fixed, kept(working))
                for name, (rows, fixed, working) in stage.moments.items()
            },
            seconds=kept(stage.seconds),
            elsewhere={place: (kept(rows), fixed) for place, (rows, fixed) in stage.elsewhere.items()},
            updates=kept(stage.updates),
        )

    moved = [
        Moved(
            {name: change(rows) for name, (rows, _, _) in stage.moments.items()},
            {place: change(rows) for place, (rows, _) in stage.elsewhere.items()},
            change(stage.updates),
        )
        for stage in candidate.stages
    ]
    base = replace(
        candidate,
        policies=tuple(candidate.policies[plain] for plain, _ in pairs),
        stages=tuple(map(without, candidate.stages)),
        not_all=tuple(candidate.not_all[plain] for plain, _ in pairs) if candidate.not_all else (),
    )
    return base, moved


def together(candidate: Candidate, rows: Sequence[int], moved: Sequence[int]) -> tuple[int, ...]:
    """Rows of a stage under every way, of those that count apart: what recomputes most is moved first."""
    pairs = _pairs(candidate.policies)
    if not pairs:
        return tuple(rows)
    several = len(candidate.policies)
    found = [0] * candidate.columns
    for kind, count in enumerate(moved):
        left = count
        for index in reversed(range(len(pairs))):
            plain, away = pairs[index]
            own = rows[kind * len(pairs) + index]
            gone = min(own, left)
            found[kind * several + plain], found[kind * several + away] = own - gone, gone
            left -= gone
    return tuple(found)


def _pairs(policies: Sequence[str]) -> list[tuple[int, int]]:
    """Each way that keeps optimizer states on the GPU, and the same way that does not, if there are both."""
    found = []
    for index, text in enumerate(policies):
        way = Way.of(text)
        other = str(Way(way.recompute, ("optimizer", *way.offload)))
        if "optimizer" not in way.offload and other in policies:
            found.append((index, policies.index(other)))
    return found
