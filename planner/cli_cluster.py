"""``planner cluster``: what a scheduler says there is to train on, and whether a plan fits it today."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner import options as o
from planner.options import option

if TYPE_CHECKING:
    from planner.discovery.inventory import Inventory, Pool
    from planner.discovery.verdicts import Verdict
    from planner.export import Subject
    from planner.plan import Plan
    from planner.specs import ClusterSpec, ModelSpec

EXAMPLE = "Example: planner cluster from-slurm:nodes.txt,topology.txt plan.json"
Source = Annotated[
    str, typer.Argument(help="from-slurm, from-k8s or from-ray; from-slurm:FILE,... of captured output.")
]
File = Annotated[str | None, typer.Argument(help="What planner search or estimate --json wrote.")]
Number = Annotated[int | None, option("--plan", help="Which of the plans, counted from 1, the best.")]


def cluster(
    source: Source,
    plan: File = None,
    number: Number = None,
    pool: o.PoolName = None,
    gpu_type: o.GpuType = None,
    as_json: o.Json = False,
) -> None:
    """GPUs as Slurm, Kubernetes or Ray lists them; with a plan, does it fit today, and where? 1 if not."""
    from planner.cli import print_json, reported

    with reported(as_json):
        from planner.discovery import asked_of, discover, kinds_said
        from planner.discovery.verdicts import verdicts
        from planner.errors import InputError

        asked = asked_of(source)
        if asked.count is not None:
            raise InputError(f"{source[:60]}: cluster shows all there is: leave {asked.count}@ out")
        inventory = discover(asked, kinds_said(gpu_type or []))
        if plan is None:
            if number is not None:
                raise InputError("--plan is of a file with plans: name that too")
            shown = inventory if pool is None else _only(inventory, inventory.pool(pool))
            if as_json:
                return print_json(document_of(shown))
            from planner.render import console_for
            from planner.render_cluster import show_inventory

            return show_inventory(console_for(), shown)
        subject = _subject(plan, number)
        chosen = _pool(inventory, pool, subject)
        found = verdicts(chosen, subject)
        if as_json:
            print_json(document_of(_only(inventory, chosen), subject, found))
        else:
            from planner.render import console_for
            from planner.render_cluster import show_inventory, show_verdicts

            console = console_for()
            show_inventory(console, _only(inventory, chosen))
            console.print()
            show_verdicts(console, found, inventory.source == "Slurm")
        if not found[-1].holds:
            raise typer.Exit(1)


def discovered(given: dict[str, Any]) -> tuple[ClusterSpec, Pool]:
    """What ``--gpus from-...`` asks for, with a command's other options, and the pool that it is of."""
    from planner.cli import cluster_of
    from planner.discovery.clusters import cluster_from
    from planner.errors import InputError

    if "from-" not in given["gpus"]:
        own = next(name for name in o.INVENTORY if given[name] is not None).replace("_", "-")
        raise InputError(f"--{own} is of --gpus from-slurm, from-k8s or from-ray: leave it out")
    found, pool = cluster_from(*(given[name] for name in ("gpus", *o.INVENTORY)))
    return cluster_of({**given, "gpus": found}), pool


def show_where(pool: Pool, model: ModelSpec, cluster: ClusterSpec, plan: Plan) -> None:
    """Whether a plan fits what there is, what is in service and what is free, and where."""
    from planner.discovery.verdicts import verdicts
    from planner.export import Subject
    from planner.render import console_for
    from planner.render_cluster import show_verdicts

    console = console_for()
    console.print()
    show_verdicts(console, verdicts(pool, Subject(model, cluster, plan)))


def _only(inventory: Inventory, pool: Pool) -> Inventory:
    from dataclasses import replace

    return replace(inventory, pools=(pool,), refused=())


def _subject(plan: str, number: int | None) -> Subject:
    from pathlib import Path

    from planner.documents import read_document
    from planner.errors import InputError
    from planner.export import Subject

    document = read_document(Path(plan))
    plans = document.plans or ((document.nearest,) if document.nearest else ())
    if number is not None and not 1 <= number <= len(plans):
        raise InputError(f"--plan {number}: there are {len(plans)}: use 1 to {len(plans)}")
    return Subject(document.model, document.cluster.spec, plans[(number or 1) - 1])


def _pool(inventory: Inventory, name: str | None, subject: Subject) -> Pool:
    """The pool that is named, or else the only one of the plan's GPUs."""
    if name is None:
        alike = [one for one in inventory.pools if one.gpu.name == subject.cluster.gpu.name]
        alike = [one for one in alike if one.gpus_per_node >= subject.per_node] or alike
        if alike:
            from dataclasses import replace

            return replace(inventory, pools=tuple(alike)).pool()
    return inventory.pool(name)


def document_of(
    inventory: Inventory, subject: Subject | None = None, found: tuple[Verdict, ...] = ()
) -> dict[str, Any]:
    """An inventory as JSON values, with the verdicts on a plan; counts are of whole nodes."""
    from dataclasses import asdict

    document: dict[str, Any] = {
        "schema": "planner.cluster/1",
        "source": inventory.source,
        "pools": [_pool_document(one) for one in inventory.pools],
        "refused": [{**asdict(one), "partitions": sorted(one.partitions)} for one in inventory.refused],
        "notes": list(inventory.notes),
    }
    if subject is not None:
        rows = [{**asdict(one), "leaves": dict(one.leaves)} for one in found]
        document["verdict"] = {"plan": subject.digest, "fits_today": found[-1].holds, "verdicts": rows}
    return document


def _pool_document(pool: Pool) -> dict[str, Any]:
    from dataclasses import asdict

    from planner.discovery.inventory import FITS

    return {
        "pool": pool.name,
        "gpu": pool.gpu.name,
        "memory_bytes": pool.gpu.memory_bytes,
        "gpus_per_node": pool.gpus_per_node,
        "free_known": pool.known,
        "quota": pool.quota,
        "whole_nodes": {fits: len(pool.whole(fits)) for fits in FITS},
        "gpus": {fits: pool.gpus(fits) for fits in FITS},
        "leaves": pool.leaves(),
        "partitions": pool.partitions,
        "notes": list(pool.notes),
        "nodes": [{**asdict(node), "partitions": sorted(node.partitions)} for node in pool.nodes],
    }
