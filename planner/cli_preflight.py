"""``planner preflight``: an export before the framework that is installed where the job will run."""

from __future__ import annotations

from typing import Annotated

import typer

from planner import options as o
from planner.cli_launch import File, Number, Set, To, Version
from planner.options import option

EXAMPLE = "Example: planner preflight plan.json --to megatron --python ~/venv/bin/python"
Python = Annotated[
    str | None, option("--python", help="The interpreter that trains, if not the planner's own.")
]


def preflight(
    plan: File,
    to: To = "",
    framework_version: Version = None,
    number: Number = None,
    python: Python = None,
    settings: Set = None,
    as_json: o.Json = False,
) -> None:
    """Hand the export to your installed framework's own parser; compare what it reads with the plan."""
    import sys

    from planner.cli import print_json, reported

    with reported(as_json):
        from pathlib import Path

        from planner import preflight as flights
        from planner.cli_launch import expressible
        from planner.documents import read_document
        from planner.export import export as made_of
        from planner.export.base import settings_of

        given = to, framework_version, settings_of(settings or [])
        subject, made = expressible(read_document(Path(plan)), number, lambda one: made_of(one, *given))
        found = flights.preflight(subject, made, python or sys.executable)
        if as_json:
            print_json(found.document())
        else:
            from planner.render import console_for
            from planner.render_preflight import show_preflight

            show_preflight(console_for(), found)
        if not found.holds:
            raise typer.Exit(1)
