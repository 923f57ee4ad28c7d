"""No scheduler: a hostfile, as DeepSpeed's launcher and Open MPI read it, and where every rank runs.

DeepSpeed 0.19.8 (launcher/runner.py, _parse_hostfile) and Open MPI 4.1 take nodes in the order of the file
and number ranks along it: no rank file is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from planner.export.base import Export, Shell, Subject, quoted, setting_of
from planner.placement import place, place_on

BY_HAND = True
"""Nodes are started by hand."""
SETTINGS = {"nodes": "Nodes, as in h100-[1-8]/h100-[9-16]: a slash between leaf switches."}
"""What may be set, with what it is."""


def export(subject: Subject, made: Export, settings: Mapping[str, str]) -> Export:
    """A framework's export with ``hostfile`` and ``placement.json``. Raises InputError for such nodes."""
    text = setting_of(settings, "nodes", most=4000)
    placement = place_on(subject, text) if text else place(subject)
    files = {**made.files, "hostfile": placement.hostfile(), "placement.json": placement.to_json()}
    notes = [*made.notes, *placement.notes()]
    if not text:
        notes.append("nodes have no names yet: --set nodes=h100-[1-8]")
    if made.program and subject.plan.num_gpus % subject.per_node == 0:
        rank, address = Shell("$OMPI_COMM_WORLD_RANK"), placement.nodes[0]
        command = f"exec {quoted(made.on_node(subject, rank, address))}"
        start = ["mpirun", "--hostfile", "hostfile", "--map-by", "ppr:1:node", "--bind-to", "none"]
        start += [word for name, value in made.env.items() for word in ("-x", f"{name}={value}")]
        notes.append(f"with Open MPI: {quoted([*start, 'sh', '-c', command])}")
    return replace(made, target=f"{made.target},hostfile", files=files, notes=tuple(notes))
