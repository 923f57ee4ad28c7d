"""``planner diff`` and ``planner check``: plans that were kept, beside each other and against limits."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner import options as o
from planner.options import option

DIFF = "Example: planner diff before.json after.json"
CHECK = "Example: planner check plan.json --max-gpus 64 --min-headroom 5%"
File = Annotated[str, typer.Argument(help="What planner search or estimate --json wrote.")]
ExitCode = Annotated[bool, option("--exit-code", help="Exit status 1 if anything differs.")]
MaxGpus = Annotated[int | None, option("--max-gpus", help="GPUs at most.")]
MaxPeak = Annotated[str | None, option("--max-peak", help="Of the fullest GPU, as in 72GiB.")]
MinHeadroom = Annotated[
    str | None, option("--min-headroom", help="Free on the fullest GPU whatever it needs: 5% or 4GiB.")
]
MaxStep = Annotated[float | None, option("--max-step-time", help="Seconds a step.")]
MinMfu = Annotated[str | None, option("--min-mfu", help="As in 40%.")]
MaxDays = Annotated[
    float | None, option("--max-days", help="Of a plan with --tokens; with failures, if counted.")
]
MaxHours = Annotated[float | None, option("--max-gpu-hours", help="Of a plan with --tokens.")]
MaxCost = Annotated[float | None, option("--max-cost", help="Of a plan with --price, in its unit.")]
MinGoodput = Annotated[str | None, option("--min-goodput", help="Of a plan with --gpu-mtbf, as in 95%.")]


def diff(before: File, after: File, exit_code: ExitCode = False, as_json: o.Json = False) -> None:
    """What changed between two plans: inputs, assumptions, layout, memory, time and cost."""
    from planner.cli import print_json, reported

    with reported(as_json):
        from dataclasses import asdict
        from pathlib import Path

        from planner.difference import differences
        from planner.documents import read_document

        found = differences(read_document(Path(before)), read_document(Path(after)))
        if as_json:
            print_json({"schema": "planner.diff/1", "differences": [asdict(one) for one in found]})
        else:
            from planner.render import console_for
            from planner.render_plans import show_differences

            show_differences(console_for(), found)
        if found and exit_code:
            raise typer.Exit(1)


def check(
    plan: File,
    max_gpus: MaxGpus = None,
    max_peak: MaxPeak = None,
    min_headroom: MinHeadroom = None,
    max_step_time: MaxStep = None,
    min_mfu: MinMfu = None,
    max_days: MaxDays = None,
    max_gpu_hours: MaxHours = None,
    max_cost: MaxCost = None,
    min_goodput: MinGoodput = None,
    as_json: o.Json = False,
) -> None:
    """Does a plan fit, within these limits? Exit status 1 if not."""
    given = dict(locals())
    from planner.cli import print_json, reported

    with reported(as_json):
        from dataclasses import asdict
        from pathlib import Path

        from planner import gate
        from planner.documents import read_document

        rules = gate.check(read_document(Path(plan)).best, _limits(given))
        holds = all(rule.holds for rule in rules)
        if as_json:
            rows = [asdict(rule) for rule in rules]
            print_json({"schema": "planner.check/1", "holds": holds, "rules": rows})
        else:
            from planner.render import console_for
            from planner.render_plans import show_rules

            show_rules(console_for(), rules)
        if not holds:
            raise typer.Exit(1)


def _limits(given: dict[str, Any]) -> dict[str, float]:
    """The limits that were given, as numbers. Raises InputError."""
    from planner.errors import InputError
    from planner.units import parse_bytes, parse_fraction

    limits: dict[str, float] = {}
    for name in ("max_gpus", "max_step_time", "max_days", "max_gpu_hours", "max_cost"):
        if (value := given[name]) is not None:
            if not 0 < value < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} {value}: use a number above 0")
            limits[name] = value
    if given["max_peak"] is not None:
        limits["max_peak"] = parse_bytes(given["max_peak"], "--max-peak ")
    for name in ("min_mfu", "min_goodput"):
        if given[name] is not None:
            limits[name] = parse_fraction(given[name], f"--{name.replace('_', '-')} ")
    if (text := given["min_headroom"]) is not None:
        if text.strip()[-1:].lower() == "b":
            limits["min_headroom_bytes"] = parse_bytes(text, "--min-headroom ")
        else:
            limits["min_headroom"] = parse_fraction(text, "--min-headroom ")
    return limits
