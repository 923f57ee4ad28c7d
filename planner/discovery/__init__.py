"""What there is to train on, as a scheduler tells it: Slurm, Kubernetes or Ray, live or from captured output.

    --gpus from-slurm                       runs sinfo and scontrol here
    --gpus from-slurm:nodes.txt,topo.txt    reads what they printed elsewhere; - is standard input
    --gpus 64@from-k8s:nodes.json           plans on 64 of the GPUs

A source is a module with ``COMMANDS``, those that are run where no file is named, and
``collect(captures) -> Collected``. Captures are data: of bounded size, and shown as plain text only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module

from planner.discovery.captures import Asked, gather, read_asked
from planner.discovery.inventory import Inventory, check_counts, inventory_of
from planner.discovery.inventory import Pool as Pool
from planner.errors import InputError
from planner.files import plain

SOURCES = {
    "slurm": "planner.discovery.slurm",
    "k8s": "planner.discovery.kubernetes",
    "ray": "planner.discovery.ray_nodes",
}
"""By name: the module that reads what the scheduler says."""


def asked_of(text: str) -> Asked:
    """What ``--gpus`` asks for. Raises InputError."""
    return read_asked(text, list(SOURCES))


def discover(asked: Asked, said: Mapping[str, str] | None = None) -> Inventory:
    """The inventory that is asked for. ``said`` are kinds by the names that GPUs have there.

    Raises InputError for what cannot be read or run, and where nothing in it can be planned on.
    """
    source = import_module(SOURCES[asked.source])
    collected = source.collect(gather(asked, source.COMMANDS))
    return inventory_of(replace(collected, nodes=check_counts(collected.nodes)), said or {})


def kinds_said(texts: Sequence[str]) -> dict[str, str]:
    """Kinds of ``["a100=a100-80gb"]``. Raises InputError."""
    from planner.catalog import load_gpu
    from planner.discovery.kinds import tidy

    found: dict[str, str] = {}
    for text in texts:
        name, equals, kind = text.partition("=")
        if not (name.strip() and equals and kind.strip()):
            raise InputError(f"--gpu-type {plain(text)}: write NAME=KIND, as in a100=a100-80gb")
        if tidy(name) in found:
            raise InputError(f"--gpu-type {plain(name)} is given twice: keep one")
        found[tidy(name)] = load_gpu(kind).name
    return found
