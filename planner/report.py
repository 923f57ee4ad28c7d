"""A document of plans as something to be read in a meeting: a page, a comment, a table, or data.

The page is one file that asks nothing of a network: style, charts and their library (Apache ECharts,
Apache-2.0, planner/page/) are in it, and a content security policy with the hashes of its own scripts forbids
everything else. Text from users is text wherever it comes from.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.documents import SCHEMA, Document
from planner.files import plain
from planner.plan import proof_words
from planner.review import (
    Exhibit,
    Subject,
    Unit,
    accuracy,
    binding_words,
    exhibits,
    figures,
    headline,
    subject_words,
)
from planner.sweep_row import Row as Swept
from planner.units import about, gib, human_seconds

if TYPE_CHECKING:
    from jinja2 import Environment

FORMATS = ("html", "md", "csv", "json")
PAGE = Path(__file__).parent / "page"
SCRIPTS = ("echarts.min.js", "review.js")
COMMENT_BYTES = 60_000
"""GitHub takes comments of 65,536 characters."""
COMMENT_ROWS = 24
LONGEST = 300
"""Characters of a user's text in a comment."""
CLASSES = {"fits": "fits", "at risk": "risk", "does not fit": "no"}
MARKS = {"fits": "✅", "at risk": "⚠️", "does not fit": "❌"}


@dataclass(frozen=True)
class Shown:
    """An exhibit with its cells as text."""

    exhibit: Exhibit
    cells: list[list[str]]
    left_out: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.exhibit, name)


def cell_text(value: Any, unit: Unit) -> str:
    """A figure as a table has it."""
    if value is None:
        return "-"
    match unit:
        case "bytes":
            return gib(value, 2)
        case "seconds":
            return human_seconds(value)
        case "share":
            return f"{value:.1%}"
        case "change":
            return f"{value:+.1%}"
        case "number":
            return f"{value:,}" if isinstance(value, int) else about(value)
    return str(value)


def shown(exhibit: Exhibit, most: int | None = None) -> Shown:
    """An exhibit as text, with ``most`` rows at most."""
    rows = exhibit.rows if most is None else exhibit.rows[:most]
    cells = [[cell_text(v, unit) for v, unit in zip(row, exhibit.units, strict=True)] for row in rows]
    return Shown(exhibit, cells, len(exhibit.rows) - len(rows))


def _context(
    document: Document, subject: Subject, swept: Sequence[Swept], most: int | None = None
) -> dict[str, Any]:
    """What every template of a review is filled with."""
    return summary(document) | {"exhibits": [shown(one, most) for one in exhibits(subject, swept)]}


def summary(document: Document) -> dict[str, Any]:
    """A document's answer in words and figures, without its exhibits."""
    plan = document.best
    return {
        "headline": headline(plan),
        "verdict": plan.verdict,
        "verdict_class": CLASSES[plan.verdict],
        "mark": MARKS[plan.verdict],
        "error": document.error or binding_words(plan),
        "figures": figures(document),
        "warnings": plan.warnings,
        "assumptions": plan.assumptions,
        "accuracy": accuracy(plan),
        "command": document.command,
        "proof": " ".join(proof_words(document.proof)),
        "version": document.planner,
        "schema": SCHEMA,
    }


def environment(escape: bool) -> Environment:
    """Where templates are read from; ``escape`` where they make HTML."""
    import jinja2

    loader = jinja2.FileSystemLoader(PAGE)
    return jinja2.Environment(
        loader=loader, autoescape=escape, undefined=jinja2.StrictUndefined, trim_blocks=not escape
    )


def page(document: Document, title: str = "", note: str = "", swept: Sequence[Swept] = ()) -> str:
    """The review as one HTML file."""
    from markupsafe import Markup

    subject = Subject.of(document)
    library, script, css = (_text(name) for name in (*SCRIPTS, "review.css"))
    context = _context(document, subject, swept)
    options = {
        f"{one.exhibit.name}-{index}": chart.option
        for one in context["exhibits"]
        for index, chart in enumerate(one.exhibit.charts)
    }
    return (
        environment(escape=True)
        .get_template("review.html.j2")
        .render(
            **context,
            title=title or subject_words(document.best),
            note=note,
            css=Markup(css),
            library=Markup(library),
            script=Markup(script),
            options=Markup(_inert(options)),
            policy=Markup(policy()),
        )
    )


def _text(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


@cache
def policy() -> str:
    """The content security policy of the page: its own scripts and styles, and nothing else."""
    hashes = " ".join(_hash(_text(name)) for name in SCRIPTS)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _inert(value: Any) -> str:
    """JSON that ends no script element and starts no comment in one."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def comment(document: Document, swept: Sequence[Swept] = ()) -> str:
    """The review as Markdown for a pull request, within what GitHub takes."""
    subject = Subject.of(document)
    markdown = environment(escape=False)
    markdown.filters |= {"md": markdown_text, "fenced": _fenced}
    template = markdown.get_template("review.md.j2")
    text = ""
    for most in (COMMENT_ROWS, COMMENT_ROWS // 3, 0):
        text = re.sub(r"\n{3,}", "\n\n", template.render(**_context(document, subject, swept, most)))
        if len(text.encode()) <= COMMENT_BYTES:
            break
    return text.strip() + "\n"


def markdown_text(value: Any) -> str:
    """Text that stays text in Markdown, on one line."""
    text = html.escape(plain(str(value), LONGEST), quote=False)
    return re.sub(r"([\\`*_\[\]|#~@!:])", r"\\\1", text) if re.search(r"[\\`*_\[\]|#~@]", text) else text


def _fenced(text: str) -> str:
    """A block of code that its content cannot leave."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{plain(text, 4000)}\n{fence}"


def table(document: Document, swept: Sequence[Swept] = ()) -> str:
    """The exhibits as CSV: one table after the other, each behind a line with its name."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for exhibit in exhibits(Subject.of(document), swept):
        writer.writerow(["exhibit", exhibit.name])
        writer.writerow(exhibit.columns)
        writer.writerows([[_harmless(value) for value in row] for row in exhibit.rows])
        writer.writerow([])
    return file.getvalue()


def _harmless(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def data(document: Document, swept: Sequence[Swept] = ()) -> dict[str, Any]:
    """The exhibits as JSON: ``planner.report/1``."""
    own: Iterator[Exhibit] = exhibits(Subject.of(document), swept)
    return {
        "schema": "planner.report/1",
        "headline": headline(document.best),
        "exhibits": [
            {
                "name": one.name,
                "title": one.title,
                "note": one.note,
                "columns": [
                    {"name": name, "unit": unit} for name, unit in zip(one.columns, one.units, strict=True)
                ],
                "rows": [list(row) for row in one.rows],
            }
            for one in own
        ],
        "document": document.to_json(),
    }


def report(
    document: Document, form: str, title: str = "", note: str = "", swept: Sequence[Swept] = ()
) -> str:
    """A document in one of ``FORMATS``, with the frontier of a sweep if there is one."""
    match form:
        case "html":
            return page(document, title, note, swept)
        case "md":
            return comment(document, swept)
        case "csv":
            return table(document, swept)
    return json.dumps(data(document, swept), indent=1) + "\n"
