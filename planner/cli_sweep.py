"""``planner sweep``: a search for each of many jobs, and which of their answers no other is better than."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from planner import options as o
from planner.options import option

if TYPE_CHECKING:
    from planner.pareto import Limits
    from planner.specs import ClusterSpec, ModelSpec
    from planner.sweeping import Point, Sweep, Swept

EXAMPLE = (
    "Example: planner sweep --model llama-65b --gpus 8..1024xA100-80G --seq-length 2048,4096 "
    "--memory-budget 60GiB,75GiB --jobs 2 --output sweep.csv"
)

Models = Annotated[str, option("--model", "-m", help="One or several, as in llama-2-7b,llama-2-13b.")]
Clusters = Annotated[
    str,
    option("--gpus", "-g", help="8,16,64xA100-80G, 8..1024xH100 (doubling), 8..64..8xH100,32xA100-80G."),
]
Seqs = Annotated[str | None, option("--seq-length", "-s", help="As in 2048,4096 or 2048..32768.")]
Batches = Annotated[
    str | None, option("--global-batch-size", "-b", help="Sequences per step, as in 512,1024.")
]
Budgets = Annotated[
    str | None, option("--memory-budget", help="Bytes per GPU, as in 40GiB,72GiB or 40GiB..80GiB..8GiB.")
]
Headrooms = Annotated[str | None, option("--headroom", help="Fractions to leave free, as in 0%,10%.")]
Micros = Annotated[
    str | None, option("--micro-batch-size", "-mb", help="Each alone, as in 1,2,4; any, where left out.")
]
Goal = Annotated[
    str | None,
    option("--goal", help="fewest-gpus, fewest-gpu-hours, fastest, longest-sequence or cheapest."),
]
MaxDays = Annotated[float | None, option("--max-days", help="Only what trains on --tokens within them.")]
MaxGpus = Annotated[int | None, option("--max-gpus", help="Only what takes no more.")]
MinHeadroom = Annotated[
    str | None, option("--min-headroom", help="Only what leaves this of the GPU free: 10% or 8GiB.")
]
Jobs = Annotated[int | None, option("--jobs", "-j", help="Processes; one for each core by default.")]
Engine = Annotated[
    str, option("--engine", help="dask or ray, with :ADDRESS of one that runs, as in dask:tcp://host:8786.")
]
Output = Annotated[str | None, option("--output", help="A file for all rows: .csv, .json or .parquet.")]
State = Annotated[
    str | None, option("--state", help="Keep rows here as they are found; beside --output by default.")
]
Resume = Annotated[bool, option("--resume", help="Go on from what a sweep that was stopped has kept.")]

AXES: o.Options = {
    "model": (Models,),
    "gpus": (Clusters,),
    "seq_length": (Seqs, None),
    "global_batch_size": (Batches, None),
    "memory_budget": (Budgets, None),
    "headroom": (Headrooms, None),
    "micro_batch_size": (Micros, None),
}
"""Options that take several values: every combination of them is a point."""
ASKED: o.Options = {
    "goal": (Goal, None),
    "max_days": (MaxDays, None),
    "max_gpus": (MaxGpus, None),
    "min_headroom": (MinHeadroom, None),
    "jobs": (Jobs, None),
    "engine": (Engine, ""),
    "output": (Output, None),
    "state": (State, None),
    "resume": (Resume, False),
    "objective": (o.Objective, "time"),
    "time_limit": (o.TimeLimit, 60.0),
    "as_json": (o.Json, False),
    "quiet": (o.Quiet, False),
}
MOST_VALUES = 10_000
"""Values of one option at most."""


@o.takes({"job": o.JOB["job"]}, AXES, o.TRAINING, o.COST, o.CHOICES, AXES, ASKED)
def sweep(given: dict[str, Any]) -> None:
    """The best layout of every combination of several values, and those that none is better than.

    Exit status 1 if none fits within the limits, 130 if it was interrupted.
    """
    from planner.cli import fail, reported

    with reported(given["as_json"]):
        from planner.sweep_files import check_output
        from planner.sweeping import Swept

        output = Path(given["output"]) if given["output"] else None
        if output:
            check_output(output)
        check_goal(given)
        asked = Swept(points_of(given), given["objective"], given["time_limit"], limits_of(given))
        kept = keep(asked, given, output)
        stopped = False
        try:
            with shown(asked, given) as report:
                for _ in asked.run(given["jobs"], given["engine"].strip()):
                    report()
        except KeyboardInterrupt:
            stopped = True
        found = asked.result()
        if problem := all_refused(found):
            if asked.journal and not given["state"]:
                asked.journal.remove()
            fail(problem, 2, given["as_json"])
        finish(asked, found, given, output, kept, stopped)


def finish(
    asked: Swept, found: Sweep, given: dict[str, Any], output: Path | None, kept: Path | None, stopped: bool
) -> None:
    """Writes what was found, shows it, and ends with the status that says so."""
    from planner.cli import print_json

    if output and not stopped:
        from planner.sweep_files import write

        write(found, output)
        if asked.journal and not given["state"]:
            asked.journal.remove()
    if given["as_json"]:
        from planner.sweep_files import document

        print_json(document(found))
    else:
        from planner.render import console_for
        from planner.render_sweep import show_sweep

        show_sweep(console_for(), found, given["goal"], given["quiet"], output if not stopped else None)
    if stopped:
        where = (
            f"their rows are in {kept}: go on with --resume" if kept else "nothing keeps them: give --state"
        )
        sys.stderr.write(f"Interrupted: {asked.done:,} of {asked.total:,} points are done, {where}\n")
        raise SystemExit(130)
    if not found.within:
        raise SystemExit(1)


def all_refused(found: Sweep) -> str:
    """Why no point could be searched, if none could."""
    if found.complete and found.rows and found.count("refused") == len(found.rows):
        return found.rows[0].reason
    return ""


def keep(asked: Swept, given: dict[str, Any], output: Path | None) -> Path | None:
    """Opens the file that rows are kept in; None if there is none."""
    from planner.errors import InputError

    if not (given["state"] or output):
        if given["resume"]:
            raise InputError("--resume goes on from a file: name it with --state, or give --output")
        return None
    path = Path(given["state"] or f"{output}.rows")
    asked.open(path, given["resume"])
    return path


@contextmanager
def shown(asked: Swept, given: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """A bar of how far the sweep is, on standard error; nothing when piped."""
    if given["quiet"] or not sys.stderr.isatty():
        yield lambda: None
        return
    from planner.render_sweep import bar

    with bar(asked.total) as report:
        yield lambda: report(asked.done)


def check_goal(given: dict[str, Any]) -> None:
    """Raises InputError for a goal that no row could be held against."""
    from planner.errors import InputError
    from planner.pareto import GOALS

    if given["goal"] is not None:
        given["goal"] = given["goal"].strip().lower()
        if given["goal"] not in GOALS:
            raise InputError(f"--goal {given['goal'][:40]!r}: use {', '.join(GOALS)}")
        if given["goal"] == "cheapest" and not (given["price"] and given["tokens"]):
            raise InputError(
                "--goal cheapest: give --price of a GPU-hour and --tokens, as in 2.5USD and 1.4T"
            )


def limits_of(given: dict[str, Any]) -> Limits:
    """What rows must keep to. Raises InputError, naming the option."""
    from planner.errors import InputError
    from planner.pareto import Limits
    from planner.units import parse_bytes, parse_fraction

    days, gpus, free = given["max_days"], given["max_gpus"], given["min_headroom"]
    if days is not None and not 0 < days < 1e9:
        raise InputError(f"--max-days {days:g}: use more than 0")
    if gpus is not None and gpus < 1:
        raise InputError(f"--max-gpus {gpus}: use 1 or more")
    least = 0.0
    if free is not None:
        sized = re.search(r"[a-zA-Z]", free)
        least = parse_bytes(free, "--min-headroom ") if sized else parse_fraction(free, "--min-headroom ")
        least = float(least)
    return Limits(max_days=days, max_gpus=gpus, min_free=least)


def points_of(given: dict[str, Any]) -> list[Point]:
    """Every combination of the values of the options. Raises InputError for values that cannot be read."""
    from planner import reading
    from planner.errors import InputError
    from planner.sweeping import MOST_POINTS

    axes: dict[str, list[Any]] = {
        "gpus": gpus_of(given["gpus"]),
        "memory_budget": sizes_of(given["memory_budget"]),
        "headroom": parts(given["headroom"]) or [None],
        "seq_length": whole_of("--seq-length", given["seq_length"]),
        "global_batch_size": whole_of("--global-batch-size", given["global_batch_size"]),
        "micro_batch_size": whole_of("--micro-batch-size", given["micro_batch_size"]),
    }
    names = [given["model"]] if "=" in given["model"] else parts(given["model"]) or [given["model"]]
    count = len(names)
    for values in axes.values():
        count *= len(values)
    if count > MOST_POINTS:
        raise InputError(f"{count:,} points: a sweep has {MOST_POINTS:,} at most; give fewer values")
    models = [reading.read_model(name) for name in names]
    read = _Reader(given)
    return [
        read.point(model, dict(zip(axes, values, strict=True)))
        for model in models
        for values in product(*axes.values())
    ]


class _Reader:
    """Points of a command's options; each cluster and each training is read once."""

    def __init__(self, given: dict[str, Any]) -> None:
        from planner.specs import ClusterSpec

        self.given = given
        self.kinds = {text: ClusterSpec.parse(text) for text in gpus_of(given["gpus"])}
        self.clusters: dict[Any, tuple[ClusterSpec, str]] = {}
        self.trainings: dict[Any, Any] = {}
        self.choices: dict[Any, Any] = {}

    def point(self, model: ModelSpec, values: dict[str, Any]) -> Point:
        """The point of one combination. What contradicts each other in it is the point's own problem."""
        from planner import reading
        from planner.errors import InputError
        from planner.layouts import Choices
        from planner.sweeping import Point

        cluster, problem = self.cluster(values)
        one = {**self.given, **values}
        of = values["seq_length"], values["global_batch_size"]
        if of not in self.trainings:
            self.trainings[of] = reading.read_training(one)
        micro = values["micro_batch_size"]
        if micro not in self.choices:
            text = None if micro is None else str(micro)
            self.choices[micro] = Choices(**reading.read_choices({**one, "micro_batch_size": text}))
        training = self.trainings[of]
        if micro is not None and not problem:
            try:
                training = reading.with_batch(model, cluster, training, cluster.num_gpus * micro)
            except InputError as error:
                problem = str(error)
        return Point(model, cluster, training, self.choices[micro], problem)

    def cluster(self, values: dict[str, Any]) -> tuple[ClusterSpec, str]:
        """The cluster of a combination, or the GPUs alone and why it cannot be."""
        from planner.cli import cluster_of
        from planner.errors import InputError

        of = values["gpus"], values["memory_budget"], values["headroom"]
        if of not in self.clusters:
            try:
                self.clusters[of] = cluster_of({**self.given, **values}), ""
            except InputError as error:
                self.clusters[of] = self.kinds[values["gpus"]], str(error)
        return self.clusters[of]


def parts(text: str | None) -> list[str]:
    """The values of ``a, b``, each once.

    >>> parts("10%, 20%,10%")
    ['10%', '20%']
    """
    return list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def spread(shown: str, first: int, last: int, step: int | None) -> list[int]:
    """The values of a range: doubling, or so far apart.

    >>> spread("8..64", 8, 64, None), spread("8..64..24", 8, 64, 24)
    ([8, 16, 32, 64], [8, 32, 56])
    """
    from planner.errors import InputError

    if not 0 < first <= last or step == 0:
        raise InputError(f"{shown}: a range goes up from 1 or more, as in 8..1024 (doubling) or 8..64..8")
    count = (last // first).bit_length() if step is None else (last - first) // step + 1
    if count > MOST_VALUES:
        raise InputError(f"{shown}: {count:,} values; an option has {MOST_VALUES:,} at most")
    return [first << i for i in range(count)] if step is None else list(range(first, last + 1, step))


def whole_of(flag: str, text: str | None) -> list[int | None]:
    """Whole numbers of ``1,2,4`` and ``8..1024``; None alone where nothing is given."""
    from planner.errors import InputError

    if text is None:
        return [None]
    found: list[int | None] = []
    for part in parts(text):
        ends = part.split("..")
        if len(ends) > 3 or not all(end.isascii() and end.isdigit() and len(end) < 10 for end in ends):
            raise InputError(f"{flag} {part[:40]!r}: write whole numbers, as in 4, 2,4,8, 8..64 or 8..64..8")
        first, *rest = map(int, ends)
        last, step = (*rest, None, None)[:2]
        found += [first] if last is None else spread(f"{flag} {part}", first, last, step)
    if not found or len(found) > MOST_VALUES:
        raise InputError(f"{flag} {text[:40]!r}: give 1 to {MOST_VALUES:,} values")
    return list(dict.fromkeys(found))


def sizes_of(text: str | None) -> list[str | None]:
    """Sizes of ``40GiB,72GiB`` and ``40GiB..80GiB..8GiB``, as text."""
    from planner.errors import InputError
    from planner.units import parse_bytes

    found: list[str | None] = []
    for part in parts(text):
        ends = part.split("..")
        if len(ends) == 1:
            found.append(part)
            continue
        flag = "--memory-budget"
        if len(ends) > 3:
            raise InputError(f"{flag} {part[:40]!r}: write 40GiB..80GiB (doubling) or 40GiB..80GiB..8GiB")
        first, last, *step = (parse_bytes(end, f"{flag} ") for end in ends)
        found += [f"{size}B" for size in spread(f"{flag} {part}", first, last, step[0] if step else None)]
    return found or [None]


def gpus_of(text: str) -> list[str]:
    """Clusters of ``8,16xA100-80G`` and ``8..1024xH100``, each as ``ClusterSpec.parse`` reads it.

    A number without a kind has the kind of the next one that has one.

    >>> gpus_of("8, 16xA100, 1..4x8xH100")
    ['8xA100', '16xA100', '1x8xH100', '2x8xH100', '4x8xH100']
    """
    from planner.errors import InputError

    found: list[str] = []
    waiting: list[int | None] = []
    for part in parts(text.replace("\u00d7", "x")):
        count, x, kind = part.partition("x")
        if not re.fullmatch(r"[\d. ]+", count):
            raise InputError(f"--gpus {part[:40]!r}: write count x kind, as in 64xH100 or 8..64xH100")
        waiting += whole_of("--gpus", count.strip())
        if x:
            found += [f"{number}x{kind.strip()}" for number in waiting]
            waiting = []
    if waiting or not found:
        raise InputError(f"--gpus {text[:40]!r}: the last one names the kind, as in 8,16xA100-80G")
    return list(dict.fromkeys(found))
