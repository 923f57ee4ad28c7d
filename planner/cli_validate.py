"""``planner validate``: predictions held against measured runs, the repository's or your own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from planner import options as o
from planner.options import option

if TYPE_CHECKING:
    from planner.comparison import Report
    from planner.runs import Runs
    from planner.timing import Bands, TimeReport

EXAMPLE = "Example: planner validate --source torchtitan --kind reserved --worst 20"
HOME = Path(__file__).parents[1] / "tests" / "measured"

RunsFile = Annotated[
    str | None, option("--runs", help="A .json or .csv of measured runs; the repository's by default.")
]
Source = Annotated[str | None, option("--source", help="Only runs whose source has this in its name.")]
Kind = Annotated[
    str | None, option("--kind", help="Only allocated, active, reserved, nvidia-smi or unknown readings.")
]
Tier = Annotated[str | None, option("--tier", help="Only these tiers, as in A or A,B.")]
Worst = Annotated[int, option("--worst", help="How many of the runs furthest off to list.")]
Times = Annotated[bool, option("--time", help="Step times and the order of layouts, instead of memory.")]
Write = Annotated[str | None, option("--write", help="Write the report as a page, as in docs/accuracy.md.")]


def validate(
    runs: RunsFile = None,
    source: Source = None,
    kind: Kind = None,
    tier: Tier = None,
    worst: Worst = 10,
    time: Times = False,
    write: Write = None,
    as_json: o.Json = False,
) -> None:
    """Predict measured runs: errors per source, verdicts against outcomes, and why the rest are left out."""
    from planner.cli import print_json, reported

    with reported(as_json):
        from planner.accuracy import document, read_causes
        from planner.errors import InputError
        from planner.runs import load_runs
        from planner.validate import chosen
        from planner.validate import validate as run_all

        if not 0 <= worst <= 10_000:
            raise InputError(f"--worst {worst}: use a number from 0 to 10000")
        path = runs_path(runs)
        picked = chosen(load_runs(path), source, check_kind(kind), tiers_of(tier))
        if time:
            return show_times(picked, worst, as_json, write)
        with progress(as_json) as report_progress:
            report = run_all(picked, report_progress)
        causes = read_causes(path.parent / "causes.json")
        if write is not None:
            write_page(write, document(report, causes, times_section(picked, causes)))
        if as_json:
            return print_json(as_document(report))
        if write is None:
            from planner.render import console_for
            from planner.render_validate import show_report

            show_report(console_for(), report, causes, worst)


def times_section(picked: Runs, causes: Mapping[str, str]) -> str:
    """The page's section on step times; empty where too few were measured."""
    from planner.accuracy_times import section
    from planner.timing import bands
    from planner.validate import validate_times

    if not any(run.step_s is not None for run in picked.runs):
        return ""
    report = validate_times(picked)
    sure = bands(report, picked)
    return "" if sure is None else section(report, sure, causes)


def show_times(picked: Runs, worst: int, as_json: bool, write: str | None) -> None:
    """Step times: printed, or as JSON."""
    from planner.cli import print_json
    from planner.errors import InputError
    from planner.timing import bands
    from planner.validate import validate_times

    if write is not None:
        raise InputError(
            f"--write {write[:200]}: the page has step times too; leave out --time, or take --json"
        )
    with progress(as_json) as report_progress:
        report = validate_times(picked, report_progress)
    if as_json:
        return print_json(times_document(report, bands(report, picked)))
    from planner.render import console_for
    from planner.render_validate import show_times as show

    show(console_for(), report, worst, bands(report, picked))


def runs_path(given: str | None) -> Path:
    """The file of runs that was asked for, or the repository's."""
    from planner.errors import InputError

    if given is not None:
        return Path(given)
    path = HOME / "runs.json"
    if not path.is_file():
        raise InputError(
            "--runs: give a file of measured runs; those of the project come with its repository, "
            "not with the installed package"
        )
    return path


def check_kind(kind: str | None) -> str | None:
    """The kind of reading, if it is one."""
    from planner.errors import InputError
    from planner.runs import MEMORY

    if kind is not None and kind not in MEMORY:
        raise InputError(f"--kind {kind[:40]!r}: use {', '.join(MEMORY)}")
    return kind


def tiers_of(text: str | None) -> tuple[str, ...] | None:
    """Tiers of ``A,B``."""
    from planner.errors import InputError

    if text is None:
        return None
    tiers = tuple(part.strip().upper() for part in text.split(","))
    if not set(tiers) <= {"A", "B", "C"}:
        raise InputError(f"--tier {text[:40]!r}: use A, B or C, as in A,B")
    return tiers


def write_page(path: str, text: str) -> None:
    """Writes the page, whole or not at all, and says so on standard error."""
    from planner.files import write_whole

    write_whole(Path(path), text, f"--write {path}", "accuracy.md")
    sys.stderr.write(f"written to {path}\n")


def as_document(report: Report) -> dict[str, Any]:
    """The JSON of a report."""
    return {
        "schema": "planner.validate/1",
        "runs": report.runs,
        "predicted": len(report.predictions),
        "fitted": list(report.fitted),
        "totals": [one._asdict() for one in report.totals],
        "sources": [one._asdict() for one in report.summaries],
        "outcomes": [{**one._asdict(), "wrong": one.wrong} for one in report.outcomes],
        "comparisons": [{**one._asdict(), "error": one.error} for one in report.comparisons],
        "ranks": [{**one._asdict(), "error": one.error} for one in report.ranks],
        "differences": [one._asdict() for one in report.differences],
        "not_predicted": {run: list(reasons) for run, reasons in report.reasons.items()},
        "not_heeded": report.unheeded,
    }


def times_document(report: TimeReport, sure: Bands | None) -> dict[str, Any]:
    """The JSON of a report of step times."""
    return {
        "schema": "planner.validate_time/1",
        "timed": len(report.timings),
        "bands": sure and sure._asdict(),
        "totals": [one._asdict() for one in report.totals],
        "sources": [one._asdict() for one in report.sources],
        "rankings": [one._asdict() for one in report.rankings],
        "timings": [{**one._asdict(), "error": one.error} for one in report.timings],
        "not_predicted": dict(report.left_out),
    }


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """How far it is, on standard error, once it has taken a second; nothing when piped."""
    import time

    start, shown = time.monotonic(), False

    def report(done: int, total: int) -> None:
        nonlocal shown
        if not quiet and sys.stderr.isatty() and time.monotonic() - start > 1 and done % 10 == 0:
            shown = True
            sys.stderr.write(f"\r\x1b[Kpredicting: {done:,} of {total:,} runs")
            sys.stderr.flush()

    try:
        yield report
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
