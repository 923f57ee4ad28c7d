"""A validation report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.accuracy import ERRORS, cause_of, figures, percent, worst_comparisons, wrong
from planner.comparison import OUTCOMES, VERDICTS, Report, Summary
from planner.render import grid
from planner.timing import Bands, Ranking, TimeReport

SHOWN = 12


def show_report(console: Console, report: Report, causes: Mapping[str, str], worst: int) -> None:
    """Counts, errors per source, verdicts, differences, the worst, and what the rest would take."""
    console.print(
        Text(f"{len(report.predictions):,} of {report.runs:,} runs predicted", style="bold"),
        Text(f"; {len(report.reasons):,} cannot be"),
        sep="",
    )
    if report.comparisons:
        _section(console, "Errors by kind of reading; bias is the median with its sign")
        console.print(_errors(report.totals))
        _section(console, "Errors by source; * a number of the planner was chosen from these")
        console.print(_errors(report.summaries))
    _section(console, "Verdict and outcome")
    console.print(_confusion(report))
    _wrong(console, report, causes)
    _differences(console, report)
    _worst(console, report, causes, worst)
    _reasons(console, "What the runs that are not predicted would take", report.needs)
    _reasons(console, "Settings of runs that are not heeded", report.unheeded)


def _section(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _errors(summaries: Iterable[Summary]) -> Table:
    table = grid("reading", "source", *ERRORS, left=("reading", "source"), spare=("p90", "worst", "bias"))
    for summary in summaries:
        table.add_row(summary.kind, _marked(summary), *figures(summary))
    return table


def _marked(summary: Summary) -> str:
    return summary.group + ("*" if summary.fitted else "")


def _confusion(report: Report) -> Table:
    table = grid("outcome", *VERDICTS, left=("outcome",))
    found = report.confusion
    for outcome in OUTCOMES:
        table.add_row(outcome, *(f"{found.get((outcome, verdict), 0):,}" for verdict in VERDICTS))
    return table


def _wrong(console: Console, report: Report, causes: Mapping[str, str]) -> None:
    found = wrong(report)
    if not found:
        return
    _section(console, "Wrong verdicts; fill is tensors over what a process can use")
    names = ("run", "outcome", "verdict", "fill", "cause")
    left = ("run", "outcome", "verdict", "cause")
    table = grid(*names, left=left, wrap=("run", "cause"), spare=("cause", "fill"))
    for one in found[:SHOWN]:
        table.add_row(
            one.run, OUTCOMES[one.ran_out], one.verdict, f"{one.fill:.2f}", cause_of(one.run, causes)
        )
    console.print(table)
    _more(console, len(found) - SHOWN)


def _differences(console: Console, report: Report) -> None:
    if not report.differences:
        return
    _section(console, "What a change of one setting costs, GiB")
    left = ("runs", "reading")
    names = ("runs", "reading", "predicted", "measured")
    table = grid(*names, left=left, wrap=("runs",), spare=("reading",))
    for one in report.differences:
        table.add_row(one.name, one.kind, f"{one.predicted:+.1f}", f"{one.measured:+.1f}")
    console.print(table)


def _worst(console: Console, report: Report, causes: Mapping[str, str], count: int) -> None:
    found = worst_comparisons(report, count)
    if not found:
        return
    _section(console, f"The {len(found)} that are furthest off, GiB")
    left = ("run", "reading", "cause")
    names = ("run", "reading", "predicted", "measured", "error", "cause")
    table = grid(*names, left=left, wrap=("run", "cause"), spare=("cause", "reading", "predicted"))
    for one in found:
        sizes = (f"{one.predicted:.1f}", f"{one.measured:.1f}", percent(one.error, True))
        table.add_row(one.run, one.kind, *sizes, cause_of(one.run, causes))
    console.print(table)


def _reasons(console: Console, title: str, counts: Mapping[str, int]) -> None:
    if not counts:
        return
    _section(console, title)
    table = grid("runs", "what", left=("what",), wrap=("what",))
    for what, count in list(counts.items())[:SHOWN]:
        table.add_row(f"{count:,}", what)
    console.print(table)
    _more(console, len(counts) - SHOWN)


def _more(console: Console, count: int) -> None:
    if count > 0:
        console.print(Text(f"and {count} more: --json lists all", style="dim"))


def show_times(console: Console, report: TimeReport, worst: int, sure: Bands | None = None) -> None:
    """Errors of step times per source, the order within tables, and the worst."""
    left = f"; {len(report.left_out):,} cannot be" if report.left_out else ""
    console.print(Text(f"{len(report.timings):,} step times predicted", style="bold"), Text(left), sep="")
    if not report.timings:
        return
    _section(console, "Errors of step times by source; * a number of the planner was chosen from these")
    console.print(_time_errors([*report.totals, *report.sources]))
    if report.rankings:
        _section(console, "Order of layouts within tables: Kendall's tau, and what the first choice costs")
        console.print(_orders(report.rankings))
    if sure is not None:
        took = f"{sure.least:.2f} to {sure.most:.2f} times as long as predicted"
        console.print(Text(f"Four in five not fitted to took {took}; layouts within {sure.tie:.1%} tie"))
    _section(console, f"The {worst} that are furthest off, seconds")
    names = ("run", "predicted", "measured", "error")
    table = grid(*names, left=("run",), wrap=("run",))
    for one in sorted(report.timings, key=lambda one: -abs(one.error))[:worst]:
        table.add_row(one.run, f"{one.predicted:,.3g}", f"{one.measured:,.3g}", percent(one.error, sign=True))
    console.print(table)


def _time_errors(summaries: Iterable[Summary]) -> Table:
    table = grid("source", *ERRORS, left=("source",), spare=("p90", "worst"))
    for one in summaries:
        table.add_row(_marked(one), *figures(one))
    return table


def _orders(rankings: Iterable[Ranking]) -> Table:
    found = list(rankings)
    table = grid("table", "layouts", "tau", "regret", left=("table",), wrap=("table",))
    for one in found:
        name = one.name + ("*" if one.fitted else "")
        table.add_row(name, f"{one.layouts:,}", f"{one.tau:+.2f}", percent(one.regret))
    tau, regret = median(one.tau for one in found), median(one.regret for one in found)
    table.add_row(Text("median", style="bold"), "", f"{tau:+.2f}", percent(regret))
    return table
