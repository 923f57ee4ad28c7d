"""``planner calibrate``: from readings of one's own runs to a profile. Registered in planner/cli.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

from planner import options as o

if TYPE_CHECKING:
    from planner.calibrate import Calibration

Output = Annotated[
    str | None, o.option("--output", "-o", help="The profile to write, as in profile.json; none by default.")
]
NAMES = get_args(o.Framework)[1].help.rstrip(".")  # the frameworks, as the other commands list them
Framework = Annotated[str | None, o.option("--framework", help=f"{NAMES}; that of the files by default.")]
Gpu = Annotated[str | None, o.option("--gpu", help="The kind of GPU, as planner catalog gpus has it.")]
Format = Annotated[
    str | None,
    o.option("--format", help="megatron, torchtitan, stats, snapshot or csv; by content if not given."),
]
Groups = Annotated[
    int | None,
    o.option("--groups", help="How many of tensor, pipeline and data parallelism are on, if not said."),
]
Force = Annotated[bool, o.option("--force", help="Replace the profile if it exists.")]
EPILOG = "Example: planner calibrate train.log runs.csv --gpu H100-SXM-80GB --output profile.json"


def calibrate(
    files: list[str],
    output: Output = None,
    framework: Framework = None,
    gpu: Gpu = None,
    format: Format = None,
    groups: Groups = None,
    force: Force = False,
    as_json: o.Json = False,
) -> None:
    """Fit memory outside tensors to logs, memory_stats, snapshots or a CSV of your own runs."""
    from planner.cli import print_json, reported

    with reported(as_json):
        from pathlib import Path

        from planner.calibrate import calibrate as run
        from planner.profiles import refuse_output, write_profile

        paths, target = [Path(file) for file in files], None if output is None else Path(output)
        if target is not None:
            refuse_output(target, paths, force)
        lower = framework.lower() if framework else None
        found = run(paths, lower, gpu, format.lower() if format else None, groups)
        if target is not None:
            write_profile(found.profile, target, force)
        if as_json:
            return print_json(document(found, output))
        from planner.render_calibrate import show_calibration

        show_calibration(found, output)


def document(found: Calibration, output: str | None) -> dict[str, Any]:
    """The JSON of the command: the profile, each reading with its residuals, what stayed assumed."""
    from dataclasses import asdict

    readings = [
        asdict(one.reading)
        | {
            "slack": one.slack,
            "reserved_residual": one.reserved_off,
            "outside": one.reading.outside,
            "outside_residual": one.outside_off,
            "tensors_off": one.tensors_off,
        }
        for one in found.residuals
    ]
    return {
        "schema": "planner.calibrate/1",
        "output": output,
        "profile": found.profile.model_dump(mode="json"),
        "readings_of": {term: fit.readings for term, fit in found.fits.items()},
        "left_at_default": [
            {"term": term, "why": why, **asdict(found.defaults[term])} for term, why in found.left.items()
        ],
        "readings": readings,
    }
