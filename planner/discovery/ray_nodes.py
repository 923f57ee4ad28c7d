"""Nodes of Ray: `ray status -v`, or ray.nodes() as JSON with the resources that are free beside it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from planner.discovery.captures import Capture, Command, count_of, documents, inner, items, word
from planner.discovery.inventory import Collected, Found
from planner.discovery.kinds import slice_of
from planner.errors import InputError
from planner.files import plain

COMMANDS = (Command(("ray", "status", "-v")),)
ACCELERATOR = "accelerator_type:"
LABEL = "ray.io/accelerator-type"
USAGE = re.compile(
    r"([\d.]+)/([\d.]+) (GPU|accelerator_type:\S+)"
    r"(?: \(([\d.]+) used of ([\d.]+) reserved in placement groups\))?"
)


def collect(captures: Sequence[Capture]) -> Collected:
    """Nodes of the captures. Raises InputError."""
    nodes: list[Found] = []
    for capture in captures:
        is_json = capture.text.lstrip().startswith(("{", "["))
        nodes += _of_json(capture) if is_json else _of_status(capture)
    notes = ["Ray lists nodes that have joined: those that have not are not counted"]
    if any(one.free is None for one in nodes):
        notes.append("what is free is not known: give ray status -v")
    return Collected("Ray", nodes, {}, None, tuple(notes))


def _of_status(capture: Capture) -> list[Found]:
    """Nodes of `ray status -v`: what is used of each, and what placement groups hold beside that."""
    found: list[Found] = []
    blocks = re.split(r"^Node: ", capture.text, flags=re.M)[1:]
    if not blocks:
        raise InputError(f"{capture.name}: no nodes: give what ray status -v prints, or ray.nodes() as JSON")
    for block in blocks:
        name = plain(block.split("\n", 1)[0].split(" (")[0], 253)
        kind, gpus, used = "gpu", 0, 0.0
        for used_text, total, resource, within, reserved in USAGE.findall(block):
            if resource.startswith(ACCELERATOR):
                kind = plain(resource.removeprefix(ACCELERATOR))
                continue
            gpus = count_of(total, f"node {name}")
            used = _amount(used_text) + (_amount(reserved) - _amount(within) if reserved else 0)
        found.append(_found(name, kind, gpus, gpus - used, "alive"))
    return found


def _of_json(capture: Capture) -> list[Found]:
    """Nodes of ray.nodes(), or of ``{"nodes": ray.nodes(), "available": {node: resources}}``, or of
    `ray list nodes --format json --detail`."""
    nodes: list[dict[str, Any]] = []
    available: Mapping[str, Any] | None = None
    for document in documents(capture):
        if isinstance(document.get("nodes"), list):
            nodes += items(document["nodes"])
            available = document["available"] if isinstance(document.get("available"), dict) else available
        elif "NodeID" in document or "node_id" in document:
            nodes.append(document)
        else:
            raise InputError(f"{capture.name}: no nodes of Ray: give ray status -v, or ray.nodes() as JSON")
    made: list[tuple[str, str, str, int, float | None, bool]] = []
    for one in nodes:
        key = word(one.get("NodeID") or one.get("node_id"))
        host = word(one.get("NodeManagerHostname") or one.get("node_name") or one.get("node_ip"))
        held = one.get("Resources") or one.get("resources_total")
        held = held if isinstance(held, dict) else {}
        labels = one.get("Labels") or one.get("labels")
        labels = labels if isinstance(labels, dict) else {}
        typed = [name.removeprefix(ACCELERATOR) for name in held if str(name).startswith(ACCELERATOR)]
        kind = word(labels.get(LABEL)) or (plain(str(typed[0])) if typed else "gpu")
        alive = one.get("Alive") is True or one.get("state") == "ALIVE"
        gpus = count_of(held.get("GPU", 0), f"node {key}")
        free = None
        if available is not None:
            free = _amount(inner(available.get(key), "GPU") or 0)
        made.append((host, key, kind, gpus, free if alive else 0, alive))
    hosts = Counter(host for host, *_ in made)  # several nodes of Ray may run on one host
    return [
        _found(host if host and hosts[host] == 1 else key, kind, gpus, free, "alive" if alive else "dead")
        for host, key, kind, gpus, free, alive in made
    ]


def _amount(value: Any) -> float:
    """GPUs, perhaps a part of one. Raises InputError."""
    try:
        amount = float(value)
    except (TypeError, ValueError):
        amount = -1.0
    if not 0 <= amount < 10**6:
        raise InputError(f"{plain(str(value))} is no number of GPUs: give the output unchanged")
    return amount


def _found(name: str, kind: str, gpus: int, free: float | None, state: str) -> Found:
    left = None if free is None else max(0, min(gpus, int(free)))
    dead = state == "dead"
    return Found(
        name=name,
        label=kind,
        gpus=gpus,
        healthy=0 if dead else gpus,
        free=left,
        state=state,
        why="dead" if dead else "in use" if left is not None and left < gpus else "",
        refused=slice_of(kind),
    )
