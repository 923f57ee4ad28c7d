"""The step times of docs/accuracy.md: errors by source, the order of layouts within tables, the worst."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from planner.accuracy import ERRORS, cause_of, figures, percent, table
from planner.timing import Bands, TimeReport

WORST = 20
OPENING = """## Step times

Predicted against measured seconds of a step, of {timed:,} runs. The numbers that were fitted, and to which
runs, are in [time.md](time.md#how-near-it-is); rows of those sources are marked *fitted* and are no test of
them. Of runs that no number was fitted to, four in five took {least:.2f} to {most:.2f} times as long as
predicted.

![Predicted against measured seconds of a step](step_times.svg)
"""
TABLES = """### The order of layouts

Within tables that vary the layout of one model on the same GPUs: Kendall's tau (1: the same order; 0: none),
and *regret*, what the layout that the planner would pick took longer than the measured best. Pairs of layouts
whose predicted times are less than {tie:.1%} apart are in the right order less than nine times in ten: ties.
"""


def section(report: TimeReport, bands: Bands, causes: Mapping[str, str]) -> str:
    """The section, in Markdown."""
    lines = [OPENING.format(timed=len(report.timings), least=bands.least, most=bands.most)]
    lines += [*_sources(report), TABLES.format(tie=bands.tie), *_tables(report), *_worst(report, causes)]
    return "\n".join(lines).rstrip() + "\n"


def _sources(report: TimeReport) -> Iterator[str]:
    rows = [
        (one.group, "fitted" if one.fitted else "", *figures(one), f"`{one.worst_run}`")
        for one in (*report.totals, *report.sources)
    ]
    yield from table(("source", "", *ERRORS, "worst run"), rows)


def _tables(report: TimeReport) -> Iterator[str]:
    found = report.rankings
    if not found:
        return
    rows = [
        (one.name, "fitted" if one.fitted else "", str(one.layouts), f"{one.tau:+.2f}", percent(one.regret))
        for one in found
    ]
    middle = (median(one.tau for one in found), median(one.regret for one in found))
    rows.append(("**median**", "", "", f"{middle[0]:+.2f}", percent(middle[1])))
    yield from table(("table", "", "layouts", "tau", "regret"), rows)


def _worst(report: TimeReport, causes: Mapping[str, str]) -> Iterator[str]:
    yield f"### The {WORST} step times that are furthest off\n"
    worst = sorted(report.timings, key=lambda one: -abs(one.error))[:WORST]
    rows = (
        (
            f"`{one.run}`",
            f"{one.predicted:,.3g}",
            f"{one.measured:,.3g}",
            percent(one.error, sign=True),
            cause_of(f"step time of {one.run}", causes) or "not known",
        )
        for one in worst
    )
    yield from table(("run", "predicted s", "measured s", "error", "cause"), rows)
