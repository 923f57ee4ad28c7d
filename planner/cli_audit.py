"""``planner audit``: a launch configuration that somebody already has, judged."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner import options as o
from planner.options import option

EXAMPLE = "Example: planner audit train.sh --gpus H100"
DEGREES = {"tensor_parallel", "pipeline_parallel", "context_parallel"}
"""Where one of them is given on the command line, the replicas follow."""
Files = Annotated[
    list[str],
    typer.Argument(
        help="A launch script, an arguments file, DeepSpeed JSON, torchtitan TOML, accelerate YAML."
    ),
]
As = Annotated[
    str | None, option("--as", help="Of which framework: megatron, deepspeed, torchtitan, accelerate.")
]
Set = Annotated[
    list[str] | None, option("--set", help="NAME=VALUE of a variable that a script leaves open; repeatable.")
]


@o.takes(
    {"files": (Files,), "framework_of": (As, None), "variables": (Set, None)},
    o.JOB | {"model": (o.Model, None), "gpus": (o.Gpus, None)},
    o.LAYOUT,
    o.TRAINING,
    o.COST,
    {"as_json": (o.Json, False), "verbose": (o.Verbose, False)},
)
def audit(given: dict[str, Any]) -> None:
    """Read a launch configuration and judge it: fits or not, what is wrong, wasteful, better."""
    from planner.cli import print_json, progress, reported

    with reported(given["as_json"]):
        from pathlib import Path

        from planner import audit as audits
        from planner import reading
        from planner.cli import cluster_of
        from planner.errors import InputError
        from planner.export.base import settings_of

        files = audits.read_files([Path(name) for name in given["files"]])
        variables = settings_of(given["variables"] or [], keep_case=True)
        imported = audits.read_configuration(files, given["framework_of"], variables, given["gpus"])
        asked = given["asked"]
        left_out = {*asked, *(["data_parallel"] if DEGREES & set(asked) else [])}
        merged = given | {k: v for k, v in imported.options.items() if k not in left_out}
        if own := imported.options.get("option"):
            merged["option"] = _options(own, asked.get("option"))
        if given["model"]:
            model = reading.read_model(given["model"])
        elif imported.model:
            model = audits.named_as_known(imported.model)
        else:
            wrong = [f"{one.setting}: {one.text}" for one in imported.findings if one.severity == "error"]
            unknown = "the configuration does not say which model it trains: give --model"
            raise InputError("; ".join(wrong) or unknown)
        cluster = cluster_of(merged | {"gpus": audits.cluster_text(given["gpus"], imported)})
        with progress(given["as_json"], "looking for changes: {} tried, {} fit") as report:
            found = audits.audit(imported, model, cluster, merged, report)
        if given["as_json"]:
            print_json(found.document())
        else:
            from planner.render import console_for
            from planner.render_audit import show_audit

            show_audit(console_for(), found, given["verbose"])
        if not found.holds:
            raise typer.Exit(1 if found.plan else 2)


def _options(own: Any, asked: Any) -> list[str]:
    """NAME=VALUE of the configuration, but for those that were given on the command line."""
    told = list(asked or ())
    names = {one.partition("=")[0].strip().lower() for one in told}
    return [one for one in own if one.partition("=")[0] not in names] + told
