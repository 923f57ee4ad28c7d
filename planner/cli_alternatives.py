"""``planner alternatives``: a plan's job on the numbers of GPUs that may be free."""

from __future__ import annotations

from typing import Annotated

from planner import options as o
from planner.cli_plans import File
from planner.options import option

EXAMPLE = "Example: planner alternatives plan.json --counts 48,56,64"
Counts = Annotated[str | None, option("--counts", help="Numbers of GPUs, as in 48,56,64.")]
Available = Annotated[
    int | None, option("--available", help="GPUs that are free: whole nodes of them, down to what fits.")
]
Folder = Annotated[str | None, option("--output", "-o", help="A folder to write each plan to.")]


def alternatives(
    plan: File,
    counts: Counts = None,
    available: Available = None,
    output: Folder = None,
    time_limit: o.TimeLimit = 60.0,
    as_json: o.Json = False,
) -> None:
    """The same job on other numbers of GPUs: for a scheduler that gives a gang what is free.

    Exit status 1 if it fits on none.
    """
    from planner.cli import print_json, reported

    with reported(as_json):
        import json
        from pathlib import Path

        from planner import alternatives as own
        from planner import reading
        from planner.documents import read_document

        document = read_document(Path(plan))
        wanted = reading.numbers("--counts", counts) or ()
        found = own.alternatives(document, wanted, available, time_limit)
        if output:
            from planner.export.writing import write_folder

            plans = own.plans_of(document, found, plan)
            write_folder(Path(output), {name: json.dumps(one, indent=1) + "\n" for name, one in plans})
        if as_json:
            print_json(own.document_for(document, found))
        else:
            from planner.render import console_for
            from planner.render_alternatives import show_alternatives

            show_alternatives(console_for(), document, found)
        if not any(one.plan for one in found):
            raise SystemExit(1)
