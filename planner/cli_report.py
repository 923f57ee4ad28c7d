"""``planner report``: the page for the capacity review."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.options import option

EXAMPLE = "Example: planner report plan.json -o review.html"
File = Annotated[str, typer.Argument(help="What planner search or estimate --json wrote.")]
Output = Annotated[
    str, option("--output", "-o", help="review.html, or .md, .csv, .json; - for standard output.")
]
Format = Annotated[str | None, option("--format", help="html, md, csv or json, if the name does not say.")]
Swept = Annotated[str | None, option("--sweep", help="A sweep.json of planner sweep: its frontier.")]
Title = Annotated[str, option("--title", help="In place of the answer in words.")]
Note = Annotated[str, option("--note", help="What reviewers should know.")]


def report(
    plan: File,
    output: Output = "review.html",
    format: Format = None,
    sweep: Swept = None,
    title: Title = "",
    note: Note = "",
) -> None:
    """The capacity review of a plan: one page, a pull request's comment, a table or data."""
    from planner.cli import reported

    with reported():
        import sys
        from pathlib import Path

        from planner import report as reports
        from planner.documents import read_document
        from planner.errors import InputError
        from planner.files import plain, write_whole

        form = (format or Path(output).suffix.removeprefix(".") or "html").lower()
        if form not in reports.FORMATS:
            raise InputError(f"--format {plain(form)}: use {', '.join(reports.FORMATS)}")
        document = read_document(Path(plan))
        swept = []
        if sweep:
            from planner.sweep_files import read_rows

            swept = read_rows(Path(sweep))
        text = reports.report(document, form, title, note, swept)
        if output == "-":
            sys.stdout.write(text)
        else:
            write_whole(Path(output), text, f"--output {plain(output)}", "review.html")
