"""The integer program: which layout, how many layers on each stage, recomputing and offloading what.

For candidates c with stages j and policies r:

    choose[c] in {0, 1}      rows[c,j,r] integer >= 0      uses[c,j,r] in {0, 1}      slowest[c] >= 0

    one_layout       sum_c choose[c] = 1
    every_layer      sum_{j,r} rows[c,j,k,r] = R[c,k] choose[c], for each kind k of row
    in_order         stages take rows as they come, where these are unlike
    moved_rows       moved[c,j,k] <= sum_r rows[c,j,k,r], rows whose optimizer states lie elsewhere
    no_empty_stage   sum_r rows[c,j,r] >= choose[c]
    alike            sum_r rows[c,j,r] = sum_r rows[c,0,r] over what recomputes, where that is told but once
    mirrored         rows[c,j,r] = rows[c,p-1-j,r], where the stages from both ends hold the same layers
    working_set      rows[c,j,r] <= R[c] uses[c,j,r]
    memory           sum_r bytes rows + working uses + fixed choose <= capacity choose
    slowest_stage    sum_r seconds rows + fixed choose <= slowest[c]
    least_slowest    slowest[c] >= (what bounds.slowest_at_least says) choose[c]
    elsewhere        sum_r bytes rows + fixed choose <= room choose, on the host and on NVMe
    slowest_update   sum_r seconds rows + fixed choose <= update[c], of the optimizer on the host
    not_all          sum_j rows[c,j,r] <= (R[c] - 1) choose[c], where a way leaves out a row at least

    min  sum_c fill sum_j seconds[c,j] + repeat slowest[c] + update[c] + step choose[c]

A row is one layer in each chunk of a stage (one layer, without interleaving); where blocks are unlike, so
are rows, and r stands for a kind of row under a policy (planner/order.py). ``working uses``
adds a policy's working set to a stage only where a layer runs under it. ``least_slowest`` follows
from the others for integers; it closes most of the relaxation's gap. No big M is needed: every
constant is multiplied by ``choose``.

Only this module imports pulp. Branching on ``choose`` first turns the joint program into one
program per candidate; :mod:`planner.best_first` does that, best bound first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from planner.apart import Moved, apart, together
from planner.bounds import fullest_stage, sharp_bound, slowest_at_least
from planner.candidate import Candidate
from planner.errors import SolverError
from strategies.offload import Way

RELATIVE_GAP = 1e-6


@dataclass(frozen=True)
class Solution:
    """The chosen candidate and its rows[stage][column]; ``optimal`` if the solver proved it."""

    candidate: Candidate
    rows: tuple[tuple[int, ...], ...]
    cost: float
    optimal: bool


Gone = tuple[list[Any], Moved]
"""A stage's ``moved`` and what they change."""
NOTHING_MOVED = Moved({}, {}, ())


class _Model:
    """One pulp problem under construction: coefficients go in as plain (variable, number) pairs."""

    def __init__(self, candidates: Sequence[Candidate], objective: str) -> None:
        import pulp

        # Memory counts in capacities and time in ``unit`` seconds: the solver's tolerances are
        # absolute, so that numbers of the order of one are what they are meant for.
        self.pulp, self.objective = pulp, objective
        self.unit = min(fullest_stage(candidate) for candidate in candidates)
        self.room = max(candidate.capacity for candidate in candidates) / 100
        self.problem = pulp.LpProblem("layout", pulp.LpMinimize)
        # Seconds of a step, in units; or minus the fullest stage's headroom, in percent of the room.
        self.cost: list[tuple[Any, float]] = []

    def integer(self, name: str, upper: int) -> Any:
        return self.problem.add_variable(name, 0, upper, self.pulp.LpInteger)

    def sum(self, pairs: list[tuple[Any, float]]) -> Any:
        return self.pulp.lpSum(coefficient * variable for variable, coefficient in pairs)

    def require(self, name: str, pairs: list[tuple[Any, float]], sense: str, right: float = 0.0) -> None:
        left = self.sum(pairs)
        constraint = {"<=": left <= right, "==": left == right, ">=": left >= right}[sense]
        self.problem += constraint, name

    def add(
        self, index: int, candidate: Candidate, least: float
    ) -> tuple[Any, list[list[Any]], list[list[Any]]]:
        """The variables and constraints of one candidate; its ``choose``, ``rows`` and ``moved``."""
        candidate, changes = apart(candidate)
        choose = self.integer(f"choose_{index}", 1)
        rows = [
            [self.integer(f"rows_{index}_{j}_{r}", candidate.rows) for r in range(candidate.columns)]
            for j in range(len(candidate.stages))
        ]
        moved = [self.moved(index, j, candidate, rows[j], change) for j, change in enumerate(changes)]
        gone = list(zip(moved, changes, strict=True)) or [([], NOTHING_MOVED)] * len(rows)
        self.every_layer(index, candidate, choose, rows)
        if candidate.alike:
            self.alike(index, candidate, rows)
        self.memory(index, candidate, choose, rows, gone)
        self.elsewhere(index, candidate, choose, rows, gone)
        self.time(index, candidate, least, choose, rows, gone)
        return choose, rows, moved

    def moved(
        self, index: int, stage: int, candidate: Candidate, rows: list[Any], change: Moved
    ) -> list[Any]:
        """``moved[j,k] <= sum_r rows[j,k,r]``: rows of a kind whose optimizer states lie elsewhere."""
        several, found = len(candidate.policies), []
        for k in range(len(change.updates)):
            one = self.integer(f"moved_{index}_{stage}_{k}", candidate.rows)
            pairs = [(x, -1.0) for x in rows[k * several : (k + 1) * several]]
            self.require(f"moved_rows_{index}_{stage}_{k}", [(one, 1.0), *pairs], "<=")
            found.append(one)
        return found

    def every_layer(self, index: int, candidate: Candidate, choose: Any, rows: list[list[Any]]) -> None:
        """``sum_{j,r} rows[k] = R[k] choose``, ``sum_{k,r} rows[j] >= choose``, equal twins if mirrored."""
        several = len(candidate.policies)
        for k, count in enumerate(candidate.order.counts):
            everything = [(x, 1.0) for stage in rows for x in stage[k * several : (k + 1) * several]]
            self.require(f"every_layer_{index}_{k}", [*everything, (choose, -count)], "==")
        if len(candidate.order.rows) > 1:
            self.in_order(index, candidate, rows)
        for j, stage in enumerate(rows):
            pairs = [(x, 1.0) for x in stage]
            self.require(f"no_empty_stage_{index}_{j}", [*pairs, (choose, -1.0)], ">=")
        if candidate.mirrored:
            for j, (stage, twin) in enumerate(zip(rows[: len(rows) // 2], reversed(rows), strict=False)):
                for r, (x, y) in enumerate(zip(stage, twin, strict=True)):
                    self.require(f"mirrored_{index}_{j}_{r}", [(x, 1.0), (y, -1.0)], "==")

    def alike(self, index: int, candidate: Candidate, rows: list[list[Any]]) -> None:
        """``sum_{k,r} rows[j,k,r] = sum_{k,r} rows[0,k,r]``, r being the policies that recompute."""
        several = len(candidate.policies)
        again = [r for r, policy in enumerate(candidate.policies) if not policy.startswith("none")]
        columns = [k + r for k in range(0, candidate.columns, several) for r in again]
        first = [(rows[0][column], -1.0) for column in columns]
        for j, stage in enumerate(rows[1:], 1):
            own = [(stage[column], 1.0) for column in columns]
            self.require(f"alike_{index}_{j}", [*own, *first], "==")

    def in_order(self, index: int, candidate: Candidate, rows: list[list[Any]]) -> None:
        """``sum_r rows[j,k] = sum_{q of kind k} (upto[j,q] - upto[j-1,q])``: stages take rows as they come.

        ``upto[j,q]`` rows of run q lie on stages up to j; ``after[j,q]`` says whether run q + 1 has begun
        there, so that run q is over: ``length after <= upto`` and ``upto[q+1] <= length[q+1] after``.
        """
        runs, several, depth = candidate.order.runs, len(candidate.policies), len(rows)
        before: list[Any] = []
        for j in range(depth - 1):  # the last stage takes what is left, as every_layer says
            upto = [self.integer(f"upto_{index}_{j}_{q}", n) for q, (_, n) in enumerate(runs)]
            for q, ((_, length), (_, more)) in enumerate(pairwise(runs)):
                after = self.integer(f"after_{index}_{j}_{q}", 1)
                self.require(f"over_{index}_{j}_{q}", [(upto[q], 1.0), (after, -float(length))], ">=")
                self.require(f"begun_{index}_{j}_{q}", [(upto[q + 1], 1.0), (after, -float(more))], "<=")
            for k in range(len(candidate.order.rows)):
                pairs = [(x, -1.0) for x in rows[j][k * several : (k + 1) * several]]
                of_kind = [q for q, (kind, _) in enumerate(runs) if kind == k]
                pairs += [(upto[q], 1.0) for q in of_kind] + [(before[q], -1.0) for q in of_kind if before]
                self.require(f"in_order_{index}_{j}_{k}", pairs, "==")
            before = upto

    def memory(
        self, index: int, candidate: Candidate, choose: Any, rows: list[list[Any]], gone: list[Gone]
    ) -> None:
        """``sum bytes rows + working uses + fixed choose <= capacity choose``, in capacities."""
        scale = candidate.capacity
        spare = []
        if self.objective == "headroom":
            headroom = self.problem.add_variable(f"headroom_{index}", 0, None)
            spare = [(headroom, 1.0)]
            self.cost.append((headroom, -scale / self.room))
        for j, (stage, own) in enumerate(zip(rows, candidate.stages, strict=True)):
            lightest = {moment: min(working) for moment, (_, _, working) in own.moments.items()}
            heavy: list[tuple[int, Any]] = []
            for r, x in enumerate(stage):
                if any(working[r] > lightest[name] for name, (_, _, working) in own.moments.items()):
                    uses = self.integer(f"uses_{index}_{j}_{r}", 1)
                    self.require(f"working_set_{index}_{j}_{r}", [(x, 1.0), (uses, -candidate.rows)], "<=")
                    heavy.append((r, uses))
            for moment, (per_row, fixed, working) in own.moments.items():
                # The heaviest policy in use counts: with two or more above the least, each alone.
                least = lightest[moment]
                alone: list[tuple[Any, float] | None]
                alone = [(uses, working[r] - least) for r, uses in heavy if working[r] > least]
                for number, one in enumerate(alone or [None]):
                    pairs = [(x, b / scale) for x, b in zip(stage, per_row, strict=True)]
                    moved, change = gone[j]
                    pairs += [
                        (x, b / scale) for x, b in zip(moved, change.moments.get(moment, ()), strict=True)
                    ]
                    if one:
                        pairs.append((one[0], one[1] / scale))
                    constant = (fixed + least) / scale - 1.0
                    name = f"memory_{index}_{j}_{moment.replace(' ', '_')}_{number}"
                    self.require(name, [*pairs, *spare, (choose, constant)], "<=")

    def elsewhere(
        self, index: int, candidate: Candidate, choose: Any, rows: list[list[Any]], gone: list[Gone]
    ) -> None:
        """``sum bytes rows + fixed choose <= room choose``, in rooms, on the host and on NVMe."""
        for j, (stage, own) in enumerate(zip(rows, candidate.stages, strict=True)):
            for place, (per_row, fixed) in own.elsewhere.items():
                moved, change = gone[j]
                more = change.elsewhere.get(place, ())
                if not (fixed or any(per_row) or any(more)):
                    continue
                room = candidate.rooms[place] or 1.0  # of nothing: all that is not 0 is too much
                pairs = [(x, b / room) for x, b in zip(stage, per_row, strict=True)]
                pairs += [(x, b / room) for x, b in zip(moved, more, strict=True)]
                full = 1.0 if candidate.rooms[place] else 0.0
                self.require(f"{place}_{index}_{j}", [*pairs, (choose, fixed / room - full)], "<=")
        several = len(candidate.policies)
        for r, never in enumerate(candidate.not_all):
            if never:
                pairs = [(x, 1.0) for stage in rows for x in stage[r::several]]
                self.require(f"not_all_{index}_{r}", [*pairs, (choose, 1.0 - candidate.rows)], "<=")

    def time(
        self,
        index: int,
        candidate: Candidate,
        least: float,
        choose: Any,
        rows: list[list[Any]],
        gone: list[Gone],
    ) -> None:
        """``sum seconds rows + fixed choose <= slowest``, and the candidate's cost."""
        if self.objective == "headroom":
            return
        slowest = self.problem.add_variable(f"slowest_{index}", 0, None)
        unit = self.unit
        for j, (stage, own) in enumerate(zip(rows, candidate.stages, strict=True)):
            pairs = [(x, seconds / unit) for x, seconds in zip(stage, own.seconds, strict=True)]
            self.cost += [(x, candidate.fill * seconds) for x, seconds in pairs]
            pairs += [(choose, own.fixed_seconds / unit), (slowest, -1.0)]
            self.require(f"slowest_stage_{index}_{j}", pairs, "<=")
        self.require(f"least_slowest_{index}", [(slowest, 1.0), (choose, -least / unit)], ">=")
        changed = any(any(change.updates) for _, change in gone)
        if changed or any(own.fixed_update or any(own.updates) for own in candidate.stages):
            update = self.problem.add_variable(f"update_{index}", 0, None)
            for j, (stage, own) in enumerate(zip(rows, candidate.stages, strict=True)):
                moved, change = gone[j]
                pairs = [(x, seconds / unit) for x, seconds in zip(stage, own.updates, strict=True)]
                pairs += [(x, seconds / unit) for x, seconds in zip(moved, change.updates, strict=True)]
                pairs += [(choose, own.fixed_update / unit), (update, -1.0)]
                self.require(f"slowest_update_{index}_{j}", pairs, "<=")
            self.cost.append((update, 1.0))
        fixed = candidate.fill * sum(own.fixed_seconds for own in candidate.stages)
        self.cost += [(slowest, candidate.repeat), (choose, (fixed + candidate.step_seconds) / unit)]


def solve(
    candidates: Sequence[Candidate], objective: str = "time", time_limit: float | None = None
) -> Solution | None:
    """The best of the candidates, or None if none fits.

    ``objective`` is ``time`` (seconds of a step) or ``headroom`` (bytes free on the fullest
    stage, as a negative cost). With a ``time_limit`` in seconds the solution may be feasible
    only: read ``optimal``. Raises SolverError if the solver gives neither.
    """
    bounds = [(c, slowest_at_least(c)) for c in candidates if c.capacity > 0]
    candidates = [candidate for candidate, least in bounds if least < float("inf")]
    slowest = [least for _, least in bounds if least < float("inf")]
    if not candidates:
        return None
    if objective == "time" and len(candidates) == 1 and (even := _even(candidates[0], slowest[0])):
        return even
    model = _Model(candidates, objective)
    pulp = model.pulp
    added = [model.add(index, candidate, slowest[index]) for index, candidate in enumerate(candidates)]
    model.require("one_layout", [(choose, 1.0) for choose, _, _ in added], "==", 1.0)
    model.problem.setObjective(model.sum(model.cost))
    solver = pulp.HiGHS(msg=False, gapRel=RELATIVE_GAP, timeLimit=time_limit, threads=1)
    outcome = _outcome(pulp, model.problem, model.problem.solve(solver))
    if outcome == "infeasible":
        return None
    if outcome == "none":
        raise SolverError("the solver gave no layout" + (f" within {time_limit:.3g} s" if time_limit else ""))
    winner = max(range(len(candidates)), key=lambda i: added[i][0].varValue or 0.0)
    candidate = candidates[winner]
    _, chosen, moved = added[winner]
    rows = tuple(
        together(candidate, *(tuple(round(x.varValue or 0.0) for x in own) for own in pair))
        for pair in zip(chosen, moved or [[]] * len(chosen), strict=True)
    )
    if objective == "time" and not candidate.alike:
        rows = tuple(_kept(candidate, j, _spared(candidate, j, own)) for j, own in enumerate(rows))
    return Solution(candidate, rows, cost_of(candidate, rows, objective), outcome == "optimal")


def _even(candidate: Candidate, least: float) -> Solution | None:
    """The even split without recompute, if it fits and nothing can be quicker: no program is needed."""
    each, rest = divmod(candidate.rows, len(candidate.stages))
    if rest:
        return None
    rows = tuple(candidate.under_one([each] * len(candidate.stages)))
    cost = candidate.cost(rows)
    if cost > sharp_bound(candidate, least) * (1 + RELATIVE_GAP):
        return None
    fits = all(candidate.fits(j, own) for j, own in enumerate(rows)) and candidate.allows(rows)
    return Solution(candidate, rows, cost, True) if fits else None


def settle(solution: Solution) -> Solution:
    """An equally quick split that evens out memory: rows leave the fullest stage while none gets slower.

    A slow last stage leaves the others slack, and the solver spends it anyhow; people do not.
    """
    candidate = solution.candidate
    if candidate.mirrored or candidate.alike or len(candidate.order.rows) > 1:
        return solution  # rows leave a stage in pairs, or as on the others, or in order only
    rows = [list(own) for own in solution.rows]
    slowest = max(candidate.stage_seconds(j, own) for j, own in enumerate(rows))
    update = max(candidate.update_seconds(j, own) for j, own in enumerate(rows))
    peaks = [candidate.peak(j, own)[0] for j, own in enumerate(rows)]
    for _ in range(candidate.rows * len(rows)):
        fullest = max(range(len(rows)), key=peaks.__getitem__)
        if not _hand_over(candidate, rows, peaks, fullest, slowest, update):
            break
    settled = tuple(tuple(own) for own in rows)
    return replace(solution, rows=settled, cost=candidate.cost(settled))


def _hand_over(
    candidate: Candidate,
    rows: list[list[int]],
    peaks: list[float],
    fullest: int,
    slowest: float,
    update: float,
) -> bool:
    """Moves one row from the fullest stage to the emptiest that stays below it and in time, if any."""
    if sum(rows[fullest]) == 1:
        return False
    for taker in sorted(range(len(rows)), key=peaks.__getitem__):
        for policy, count in enumerate(rows[fullest]):
            if not count or taker == fullest:
                continue
            more = [n + (r == policy) for r, n in enumerate(rows[taker])]
            peak = candidate.peak(taker, more)[0]
            in_time = candidate.stage_seconds(taker, more) <= slowest
            in_time = in_time and candidate.update_seconds(taker, more) <= update
            if peak < peaks[fullest] and in_time and candidate.fits(taker, more):
                rows[taker], peaks[taker] = more, peak
                rows[fullest][policy] -= 1
                peaks[fullest] = candidate.peak(fullest, rows[fullest])[0]
                return True
    return False


def _spared(candidate: Candidate, stage: int, rows: tuple[int, ...]) -> tuple[int, ...]:
    """The same rows without recompute, where they fit: never slower, so a tie is settled so.

    A schedule without a flush does not count the time of any but its slowest stage.
    """
    several = len(candidate.policies)
    plain = tuple(sum(rows[at : at + several]) if at % several == 0 else 0 for at in range(len(rows)))
    fits = candidate.fits(stage, plain)
    quicker = candidate.stage_seconds(stage, plain) <= candidate.stage_seconds(stage, rows)
    quicker = quicker and candidate.update_seconds(stage, plain) <= candidate.update_seconds(stage, rows)
    return plain if fits and quicker else rows


def _kept(candidate: Candidate, stage: int, rows: tuple[int, ...]) -> tuple[int, ...]:
    """The same rows with as many optimizer states on the GPU as fit: the update is never slower for it.

    A stage whose update is not the slowest may offload more than it needs to at no cost.
    """
    several, found = len(candidate.policies), list(rows)
    for column in range(len(rows)):
        way = Way.of(candidate.policies[column % several])
        plain = str(Way(way.recompute, tuple(item for item in way.offload if item != "optimizer")))
        if "optimizer" not in way.offload or plain not in candidate.policies:
            continue
        home = column - column % several + candidate.policies.index(plain)
        while found[column]:
            moved = [n + (r == home) - (r == column) for r, n in enumerate(found)]
            if not candidate.fits(stage, moved):
                break
            found = moved
    return tuple(found)


def _outcome(pulp: Any, problem: Any, answer: Any) -> str:
    """``optimal``, ``feasible``, ``infeasible`` or ``none``, of PuLP 3 and of PuLP 4.

    The program is bounded, so "infeasible or unbounded" is infeasible.
    """
    if hasattr(answer, "has_solution"):  # PuLP 4 returns statistics
        if answer.has_solution:
            return "optimal" if answer.status.name == "Optimal" else "feasible"
        return "infeasible" if answer.status.name in ("Infeasible", "Undefined") else "none"
    # PuLP 3's status says Optimal at a time limit too: the solution's status decides.
    if problem.sol_status == pulp.LpSolutionOptimal:
        return "optimal"
    if problem.sol_status == pulp.LpSolutionIntegerFeasible:
        return "feasible"
    return "infeasible" if problem.status == pulp.LpStatusInfeasible else "none"


def cost_of(candidate: Candidate, rows: Sequence[Sequence[int]], objective: str = "time") -> float:
    """The program's objective, computed from the rows rather than read from the solver."""
    if objective == "time":
        return candidate.cost(rows)
    return max(candidate.peak(j, own)[0] for j, own in enumerate(rows)) - candidate.capacity
