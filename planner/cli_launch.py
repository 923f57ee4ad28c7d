"""``planner export``: a plan as launch configuration, in a framework's words and a scheduler's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner import options as o
from planner.options import option

if TYPE_CHECKING:
    from planner.documents import Document
    from planner.export import Export, Subject

EXPORT = "Example: planner export plan.json --to megatron,slurm -o launch"
File = Annotated[str, typer.Argument(help="What planner search or estimate --json wrote.")]
To = Annotated[
    str,
    option("--to", help="A framework, a scheduler, or both: megatron,slurm (docs/export.md lists them)."),
]
Version = Annotated[str | None, option("--framework-version", help="Of the framework, as in 0.19.")]
Number = Annotated[int | None, option("--plan", help="Which of the plans, counted from 1, the best.")]
Folder = Annotated[str | None, option("--output", "-o", help="A folder to write the files to.")]
Force = Annotated[bool, option("--force", help="Replace exports that are in the folder.")]
Set = Annotated[
    list[str] | None, option("--set", help="NAME=VALUE of the target, as in partition=h100; repeatable.")
]


def export(
    plan: File,
    to: To = "",
    framework_version: Version = None,
    number: Number = None,
    output: Folder = None,
    force: Force = False,
    settings: Set = None,
    as_json: o.Json = False,
) -> None:
    """A plan as files that start it: for Megatron, torchtitan, DeepSpeed ..., Slurm, Kubernetes ..."""
    from planner.cli import print_json, reported

    with reported(as_json):
        from pathlib import Path

        from planner.documents import read_document
        from planner.export import export as made_of
        from planner.export.base import settings_of

        document = read_document(Path(plan))
        given = to, framework_version, settings_of(settings or [])
        subject, made = expressible(document, number, lambda one: made_of(one, *given))
        if output:
            from planner.export.writing import write_folder

            write_folder(Path(output), made.files, force)
        if as_json:
            print_json(document_of(subject, made))
        else:
            _show(subject, made, output)


def expressible(document: Document, number: int | None, make: Any) -> tuple[Subject, Export]:
    """The plan that was asked for, exported; where it cannot be, the message names one that can."""
    from planner.errors import InputError
    from planner.export import NotExpressible, Subject

    plans = document.plans or ((document.nearest,) if document.nearest else ())
    if number is not None and not 1 <= number <= len(plans):
        raise InputError(f"--plan {number}: there are {len(plans)}: use 1 to {len(plans)}")
    subjects = [Subject(document.model, document.cluster.spec, one) for one in plans if one]
    first = subjects[(number or 1) - 1]
    try:
        return first, make(first)
    except NotExpressible as error:
        able: list[str] = []
        for index, other in enumerate(subjects):
            try:
                if other is not first:
                    make(other)
                    able.append(f"--plan {index + 1} can be, {_beside(other, first)}")
                    break
            except InputError:
                continue
        if error.instead:
            from planner.asked import options_text

            able.append(f"or plan it with {options_text(error.instead)}")
        raise InputError("; ".join([str(error), *able])) from None


def _beside(other: Subject, first: Subject) -> str:
    slower = other.plan.step_time_s / first.plan.step_time_s - 1
    return f"{other.layout.describe()}, whose step takes {slower:+.1%}"


def document_of(subject: Subject, made: Export) -> dict[str, Any]:
    """An export as JSON values; ``command`` starts one node."""
    return {
        "schema": "planner.export/1",
        "plan": subject.digest,
        "target": made.target,
        "version": made.version,
        "nodes": subject.nodes,
        "processes_per_node": subject.per_node,
        "files": dict(made.files),
        "env": dict(made.env),
        "command": list(made.on_node(subject, *_place(subject))),
        "submit": list(made.submit),
        "notes": list(made.notes),
    }


def _show(subject: Subject, made: Export, output: str | None) -> None:
    """The files, or where they are; how they are started and what is to be known on standard error."""
    from planner.export.base import quoted

    for name, text in made.files.items():
        if output:
            typer.echo(f"{output.rstrip('/')}/{name}")
            continue
        if len(made.files) > 1:
            typer.echo(f"==> {name} <==")
        typer.echo(text, nl=not text.endswith("\n"))
    folder = f"{output.rstrip('/')}/" if output else ""
    each = "the node" if subject.nodes == 1 else f"each of {subject.nodes} nodes"
    if made.submit:
        inside = f"cd {quoted([folder.rstrip('/')])} && " if folder and made.submit_inside else ""
        words = (folder * (not inside) + word if word in made.files else word for word in made.submit)
        typer.echo(f"\nTo start it: {inside}{quoted(words)}", err=True)
    elif "launch.sh" in made.files:
        rank = "0" if subject.nodes == 1 else f"0..{subject.nodes - 1}"
        typer.echo(f"\nOn {each}: NODE_RANK={rank} MASTER_ADDR=host {folder or './'}launch.sh", err=True)
    elif made.program:
        command = quoted(made.on_node(subject, *_place(subject)))
        env = " ".join(f"{name}={quoted([value])}" for name, value in made.env.items())
        typer.echo(f"\nOn {each}: {env + ' ' if env else ''}{command}", err=True)
    for note in (*subject.doubts(), *made.notes):
        typer.echo(f"Note: {note}", err=True)


def _place(subject: Subject) -> tuple[str, str]:
    """A node's number and the address of the first, as a shell has them; of one node they are known."""
    from planner.export.base import Shell

    return ("0", "127.0.0.1") if subject.nodes == 1 else (Shell("$NODE_RANK"), Shell("$MASTER_ADDR"))
