"""A sweep: one search for each of many points, in parallel, on any engine, to be gone on with.

A point is a job: what is trained, on what, how, over which layouts. Points that differ in memory only share a
:class:`~planner.best_first.Ground`, so that their layouts are priced once; the answers are those of single
searches, whichever points are searched together, in whichever order and by whom.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from planner import __version__
from planner.advice import nearest_plan, shortfall
from planner.api import check_choices, check_proved, proof_of, settled
from planner.best_first import Ground, find
from planner.defaults import Job, resolve
from planner.errors import InputError, SolverError
from planner.journal import Journal
from planner.layouts import Choices
from planner.pareto import Limits, front
from planner.plan import Plan, make_plan
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from planner.sweep_row import Row, row_of, with_memory

MOST_POINTS = 100_000
"""Points of one sweep at most: days of work on one core."""
TOGETHER = 16
"""Points that one worker takes at a time, and what is lost at most if it ends."""
ENGINES = ("dask", "ray")

T = TypeVar("T")


class Point(NamedTuple):
    """One search of a sweep. ``problem`` is why it cannot be searched, where that is known already."""

    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec = TrainingSpec()
    choices: Choices = Choices()
    problem: str = ""


@dataclass(frozen=True)
class Sweep:
    """The rows of a sweep, in the order of its points, those on the front marked.

    ``points`` is how many were asked for, of which ``repeated`` are the same as others; it is not
    ``complete`` where it was stopped. ``notes`` are about the file that it went on from.
    """

    rows: tuple[Row, ...]
    points: int
    repeated: int = 0
    complete: bool = True
    limits: Limits = field(default_factory=Limits)
    notes: tuple[str, ...] = ()

    @property
    def within(self) -> list[Row]:
        """Rows that fit, within the limits."""
        return [row for row in self.rows if self.limits.allow(row)]

    @property
    def front(self) -> list[Row]:
        """Rows that no other is better than (planner/pareto.py)."""
        return [row for row in self.rows if row.front]

    def count(self, verdict: str) -> int:
        """How many rows have a verdict."""
        return sum(row.verdict == verdict for row in self.rows)


def several(value: T | Sequence[T]) -> Sequence[T]:
    """One value or many, as many."""
    return value if isinstance(value, list | tuple) else (value,)


def grid(
    models: ModelSpec | Sequence[ModelSpec],
    clusters: ClusterSpec | Sequence[ClusterSpec],
    trainings: TrainingSpec | Sequence[TrainingSpec] = TrainingSpec(),
    choices: Choices | Sequence[Choices] = Choices(),
) -> list[Point]:
    """Every model on every cluster, trained every way, over every choice of layouts."""
    parts: Any = product(several(models), several(clusters), several(trainings), several(choices))
    return [Point(*part) for part in parts]


class _Task(NamedTuple):
    """Points that one worker takes: alike but for their memory, most of it first."""

    group: str
    points: tuple[tuple[str, Point], ...]
    objective: str
    time_limit: float


@dataclass
class _Shared:
    """What the points of a group have in common, as far as it was needed."""

    group: str = ""
    ground: Ground | None = None
    nearest: Plan | None = None
    plans: dict[Any, Plan] = field(default_factory=dict)


_here = threading.local()
"""Of the group that this thread was last at: a group's tasks come one after the other."""


def sweep(
    points: Iterable[Point],
    *,
    objective: str = "time",
    time_limit: float = 60.0,
    limits: Limits = Limits(),
    jobs: int | None = None,
    engine: str = "",
    state: Path | None = None,
    resume: bool = False,
    progress: Callable[[int, int], Any] = lambda done, points: None,
) -> Sweep:
    """The best layout of every point, and which of them no other is better than.

    ``objective`` and ``time_limit`` are those of each search (:func:`planner.search`). ``jobs`` are the
    processes: all cores by default, where there is work for them. With ``engine`` Dask or Ray runs them:
    ``dask``, ``dask:tcp://host:8786``, ``ray`` or ``ray:auto``. Each row is added to the file ``state`` as
    it is found; with ``resume`` those that are there are not searched again. ``progress`` is told how many
    points are done, and of how many.

    Raises InputError for what cannot be asked of any point; one that cannot be says so in its row.
    """
    plan = Swept(list(points), objective, time_limit, limits)
    if state is not None:
        plan.open(state, resume)
    for _ in plan.run(jobs, engine):
        progress(plan.done, plan.total)
    return plan.result()


class Swept:
    """A sweep under way: what is left of it, and what was found."""

    def __init__(
        self,
        points: Sequence[Point],
        objective: str = "time",
        time_limit: float = 60.0,
        limits: Limits = Limits(),
    ) -> None:
        if limits.max_days is not None and any(point.training.tokens is None for point in points):
            raise InputError("max_days is for a number of tokens: give --tokens, as in 1.4T")
        if not points:
            raise InputError("a sweep needs at least one point")
        if len(points) > MOST_POINTS:
            raise InputError(f"{len(points):,} points: a sweep has {MOST_POINTS:,} at most: give fewer")
        self.points, self.limits = points, limits
        self.objective, self.time_limit = objective, time_limit
        self.journal: Journal | None = None
        self.rows: dict[str, Row] = {}
        self.kept: dict[str, Point] = {}
        self.groups: dict[str, tuple[str, float]] = {}
        dumped: dict[int, str] = {}
        for point in points:
            key, group, row = self._known(point, dumped)
            if key in self.kept:
                continue
            self.kept[key] = point
            if row:
                self.rows[key] = row
            else:
                self.groups[key] = group, -point.cluster.capacity_bytes

    def _known(self, point: Point, dumped: dict[int, str]) -> tuple[str, str, Row | None]:
        """A point's name, that of what it shares with others, and its row if it cannot be searched."""
        job: Job | None = None
        problem = point.problem
        if not problem:
            try:
                job = resolve(point.model, point.cluster, point.training)
                check_choices(job, point.choices, self.objective, 1, self.time_limit)
            except InputError as error:
                problem = str(error)

        def text(spec: Any, **more: Any) -> str:
            if id(spec) not in dumped:  # the points keep it alive, so that no other gets its id
                dumped[id(spec)] = json.dumps(spec.model_dump(mode="json", **more), sort_keys=True)
            return dumped[id(spec)]

        cluster = text(point.cluster, exclude={"budget_bytes", "headroom", "assumptions"})
        training = (job.training if job else point.training).model_dump_json()
        asked = json.dumps([asdict(point.choices), self.objective, self.time_limit])
        group = _digest(__version__, text(point.model), cluster, training, asked)
        key = _digest(group, problem, str(point.cluster.capacity_bytes))
        if not problem:
            return key, group, None
        return key, group, Row.of_point(*point[:4], "refused", problem)

    @property
    def done(self) -> int:
        """Points whose row is there."""
        return len(self.rows)

    @property
    def total(self) -> int:
        """Points that differ."""
        return len(self.kept)

    def open(self, state: Path, resume: bool) -> None:
        """Keeps rows in a file as they are found, and takes those from there that this sweep asks for."""
        self.journal = Journal(state)
        for key, row in self.journal.read(resume).items():
            if key in self.groups and (known := Row.read(row)):
                self.rows[key] = known
            else:
                self.journal.others += 1

    def tasks(self) -> list[_Task]:
        """What is left to do: points alike but for memory together, most memory first."""
        left = [key for key in self.groups if key not in self.rows]
        groups = dict.fromkeys(group for group, _ in self.groups.values())
        first = {group: index for index, group in enumerate(groups)}
        left.sort(key=lambda key: (first[self.groups[key][0]], self.groups[key][1]))
        found = []
        for group, keys in groupby(left, key=lambda key: self.groups[key][0]):
            own = [(key, self.kept[key]) for key in keys]
            for at in range(0, len(own), TOGETHER):
                found.append(_Task(group, tuple(own[at : at + TOGETHER]), self.objective, self.time_limit))
        return found

    def run(self, jobs: int | None = None, engine: str = "") -> Iterator[None]:
        """Does what is left to do; yields as rows come in."""
        yield None
        for found in _answers(self.tasks(), jobs, engine):
            for key, row in found:
                self.rows[key] = row
                if self.journal and row.verdict != "no answer":
                    self.journal.add(key, row.model_dump())
            yield None

    def result(self) -> Sweep:
        """What was found up to now."""
        rows = [self.rows[key] for key in self.kept if key in self.rows]
        best = front([row for row in rows if self.limits.allow(row)])
        return Sweep(
            rows=tuple(row.model_copy(update={"front": True}) if id(row) in best else row for row in rows),
            points=len(self.points),
            repeated=len(self.points) - len(self.kept),
            complete=len(rows) == len(self.kept),
            limits=self.limits,
            notes=tuple(self.journal.notes()) if self.journal else (),
        )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _answers(tasks: Sequence[_Task], jobs: int | None, engine: str) -> Iterator[list[tuple[str, Row]]]:
    """The rows of every task, in the order in which they are found."""
    count = sum(len(task.points) for task in tasks)
    jobs = cores() if jobs is None else jobs
    if jobs < 1:
        raise InputError(f"jobs={jobs}: use 1 or more processes")
    if engine and engine.partition(":")[0] not in ENGINES:
        raise InputError(f"engine {engine[:40]!r}: use {' or '.join(ENGINES)}, or leave it out")
    if not tasks:
        return
    if not engine and (jobs := min(jobs, len(tasks), -(-count // TOGETHER))) == 1:
        for task in tasks:
            for point in task.points:
                yield answer(task._replace(points=(point,)))
        return
    with _backend(engine, jobs) as own:
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        run = delayed(_as_worker if own else answer)
        try:
            parallel = Parallel(return_as="generator_unordered", batch_size=1)
        except ValueError:  # Ray hands its results over all at once
            parallel = Parallel(batch_size=1)
        try:
            yield from parallel(run(task) for task in tasks)
        except TerminatedWorkerError as error:
            raise SolverError("a process of the sweep was ended, for its memory perhaps") from error


@contextmanager
def _backend(engine: str, jobs: int) -> Iterator[bool]:
    """Where joblib runs the searches; are the processes the sweep's own?"""
    name, _, address = engine.partition(":")
    try:
        from joblib import parallel_config

        if not name:
            with parallel_config(backend="loky", n_jobs=jobs):
                yield True
            return
        there = _dask(address, jobs) if name == "dask" else _ray(address)
        with there, parallel_config(backend=name, n_jobs=-1):
            yield False
    except ImportError as error:
        extra = f"pip install 'distributed-training-planner{f'[{name}]' if name else ''}'"
        raise InputError(f"{error.name or name} is not installed, which this runs on: {extra}") from None


@contextmanager
def _dask(address: str, jobs: int) -> Iterator[None]:
    """The client that there is, or one of the scheduler at an address, of dask's own or of a local one."""
    import dask
    from distributed import Client, default_client

    try:
        client, own = default_client(), False
    except ValueError:
        known = address or dask.config.get("scheduler-address", None)
        local: dict[str, Any] = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
        client, own = Client(known) if known else Client(**local), True
    try:
        yield
    finally:
        if own:
            client.close()


@contextmanager
def _ray(address: str) -> Iterator[None]:
    import ray
    from ray.util.joblib import register_ray

    ray.init(address=address or None, ignore_reinit_error=True, log_to_driver=False)
    register_ray()
    yield


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_worker(task: _Task) -> list[tuple[str, Row]]:
    """The same in a process of the sweep's own, which leaves interruptions to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(100_000)  # as the command does
    return answer(task)


def answer(task: _Task) -> list[tuple[str, Row]]:
    """The rows of a task's points, with what points of its group have left here."""
    shared: _Shared = getattr(_here, "shared", None) or _Shared()
    if shared.group != task.group:
        shared = _here.shared = _Shared(task.group)
    return [(key, _row(point, task, shared)) for key, point in task.points]


def _row(point: Point, task: _Task, shared: _Shared) -> Row:
    """One point's row: what :func:`planner.search` says of it, but for the changes that would fit."""
    job = resolve(point.model, point.cluster, point.training)
    try:
        if shared.ground is None:
            shared.ground = Ground.of(job, point.choices, task.objective)
        found = find(job, point.choices, task.objective, 1, task.time_limit, ground=shared.ground)
        if not found.answers:
            check_proved(job, point.choices, found)
            nearest = shared.nearest = with_memory(shared.nearest or nearest_plan(job, point.choices), job)
            return row_of(point.choices, nearest, job, shortfall(job, found.enumerated, nearest))
    except InputError as error:
        return Row.of_point(job.model, job.cluster, job.training, point.choices, "refused", str(error))
    except SolverError as error:
        return Row.of_point(job.model, job.cluster, job.training, point.choices, "no answer", str(error))
    (solution,) = settled(found, task.objective)
    proof = proof_of(found, task.objective)
    of = solution.candidate.layout, solution.candidate.policies, solution.rows
    if of not in shared.plans:
        shared.plans[of] = make_plan(job, solution, proof)
    plan = with_memory(shared.plans[of], job).model_copy(update={"proof": proof})
    return row_of(point.choices, plan, job)
