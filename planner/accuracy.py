"""docs/accuracy.md: a validation report as a page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from planner.comparison import OUTCOMES, VERDICTS, Comparison, Outcome, Report, Summary
from planner.errors import InputError

WORST = 30
OPENING = """# How far predictions are off

Written by `planner validate --write docs/accuracy.md`; a test keeps it in step with the code.

The planner's predictions against {runs:,} published runs (`tests/measured/runs.json`, each with its source):
{predicted:,} can be predicted, {left:,} cannot, each with a reason (at the end). A run's own tables, logs or
commit messages give its settings; a setting that is not printed there is the framework's default at the
time, and the run says so (`assumed`). No setting was chosen to make a run agree.

A reading is held against what it counts. *Allocated* and *active* bytes are those of tensors, which the
planner counts exactly if it knows the software; *reserved* adds the allocator's slack, *nvidia-smi* the
context and the communication buffers as well, and both of these vary between equal runs. Where a source
does not say which counter it read, the kind is *unknown* and its errors say little. An error is predicted
over measured, less 1; median, 90th percentile and worst are without sign, *bias* is the median with it.
Tier A runs have complete settings, B lack one or two, C are loose.
"""
FITTED = """Some numbers of the planner were chosen by looking at a part of these readings, which are marked
*fitted* and are no test of those numbers:

{what}
"""


def percent(part: float, sign: bool = False) -> str:
    """A share as a percentage with one digit.

    >>> percent(0.1234), percent(0.1, sign=True)
    ('12.3 %', '+10.0 %')
    """
    return f"{100 * part:+.1f} %" if sign else f"{100 * part:.1f} %"


def read_causes(path: str | Path) -> dict[str, str]:
    """Causes of errors by the beginning of a run's id; none if there is no such file."""
    path = Path(path)
    if not path.exists():
        return {}
    try:
        causes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {str(error)[:200]}") from None
    if not isinstance(causes, dict) or not all(isinstance(cause, str) for cause in causes.values()):
        raise InputError(f"{path}: write a table of ids, or beginnings of ids, and causes")
    return causes


def cause_of(run: str, causes: Mapping[str, str]) -> str:
    """The cause noted for the longest beginning of a run's id."""
    fitting = [start for start in causes if run.startswith(start)]
    return causes[max(fitting, key=len)] if fitting else ""


def _cause(run: str, causes: Mapping[str, str]) -> str:
    return cause_of(run, causes) or "not known"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """A Markdown table; columns of figures are not aligned."""
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"
    yield ""


def figures(summary: Summary) -> list[str]:
    """Count and errors of a summary."""
    errors = (summary.median, summary.p90, abs(summary.worst))
    return [str(summary.runs), *map(percent, errors), percent(summary.bias, sign=True)]


ERRORS = ("runs", "median", "p90", "worst", "bias")


def document(report: Report, causes: Mapping[str, str], times: str = "") -> str:
    """The page; ``times`` is its section on step times."""
    counts = {"runs": report.runs, "predicted": len(report.predictions), "left": len(report.reasons)}
    parts = [OPENING.format(**counts)]
    if report.fitted:
        parts.append(FITTED.format(what="\n".join(f"- {what}" for what in report.fitted)))
    sections = (_totals, _sources, _verdicts, _differences, _ranks)
    lines = [line for section in sections for line in section(report)]
    lines += [*_worst(report, causes), *_wrong(report, causes), times, *_left_out(report)]
    return "\n".join(["\n".join(parts), *lines]).rstrip() + "\n"


def _mark(fitted: bool) -> str:
    return "fitted" if fitted else ""


def _totals(report: Report) -> Iterator[str]:
    yield "## By kind of reading\n"
    rows = ((s.kind, _mark(s.fitted), *figures(s)) for s in report.totals)
    yield from table(("reading", "", *ERRORS), rows)
    yield "By tier:\n"
    rows = ((s.kind, s.group, *figures(s)) for s in report.tiers)
    yield from table(("reading", "tier", *ERRORS), rows)


def _sources(report: Report) -> Iterator[str]:
    yield "## By source\n"
    rows = ((s.kind, s.group, _mark(s.fitted), *figures(s), f"`{s.worst_run}`") for s in report.summaries)
    yield from table(("reading", "source", "", *ERRORS, "worst run"), rows)


def _verdicts(report: Report) -> Iterator[str]:
    yield "## Verdict and outcome\n"
    yield "Every run that is predicted either ran out of memory or ran; one that gave a reading ran.\n"
    found = report.confusion
    rows = ((name, *(found.get((name, verdict), 0) for verdict in VERDICTS)) for name in OUTCOMES)
    yield from table(("outcome", *VERDICTS), rows)


def _differences(report: Report) -> Iterator[str]:
    if not report.differences:
        return
    yield "## What a change of one setting costs\n"
    yield "Between two runs of one source that differ in one thing, in GiB:\n"
    rows = (
        (d.name, d.kind, f"{d.predicted:+.1f}", f"{d.measured:+.1f}", percent(d.error, True))
        for d in report.differences
    )
    yield from table(("runs", "reading", "predicted", "measured", "error"), rows)


def _ranks(report: Report) -> Iterator[str]:
    if not report.ranks:
        return
    runs: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in report.ranks:
        runs.setdefault((comparison.run, comparison.kind), []).append(comparison)
    yield "## Rank by rank\n"
    yield "Where every GPU's reading is published:\n"
    rows = (
        (f"`{run}`", kind, len(ranks), *(percent(f(c.error for c in ranks), True) for f in (min, max)))
        for (run, kind), ranks in runs.items()
    )
    yield from table(("run", "reading", "ranks", "lowest error", "highest error"), rows)


def worst_comparisons(report: Report, count: int) -> list[Comparison]:
    """The comparisons that are furthest off, either way."""
    return sorted(report.comparisons, key=lambda c: -abs(c.error))[:count]


def _worst(report: Report, causes: Mapping[str, str]) -> Iterator[str]:
    yield f"## The {WORST} that are furthest off\n"
    rows = (
        (
            f"`{c.run}`",
            c.kind,
            f"{c.predicted:.1f}",
            f"{c.measured:.1f}",
            percent(c.error, True),
            _cause(c.run, causes),
        )
        for c in worst_comparisons(report, WORST)
    )
    yield from table(("run", "reading", "predicted GiB", "measured GiB", "error", "cause"), rows)


def wrong(report: Report) -> list[Outcome]:
    """Runs that were promised and failed, then those refused that ran, the furthest off first."""
    return sorted((o for o in report.outcomes if o.wrong), key=lambda o: (not o.ran_out, -abs(o.fill - 1)))


def _wrong(report: Report, causes: Mapping[str, str]) -> Iterator[str]:
    yield "## Wrong verdicts\n"
    found = wrong(report)
    if not found:
        yield "None.\n"
        return
    yield "*Fill* is what tensors need over what a process can use.\n"
    rows = (
        (f"`{o.run}`", OUTCOMES[o.ran_out], o.verdict, f"{o.fill:.2f}", _cause(o.run, causes)) for o in found
    )
    yield from table(("run", "outcome", "verdict", "fill", "cause"), rows)


def _left_out(report: Report) -> Iterator[str]:
    yield "## Why runs are not predicted\n"
    yield f"Of {len(report.reasons):,} runs; one can lack several things.\n"
    yield from table(("what it would take", "runs"), report.needs.items())
    if report.unheeded:
        yield "Settings that runs state and their framework's tables lack, so that they are not heeded:\n"
        yield from table(("setting", "runs"), report.unheeded.items())
