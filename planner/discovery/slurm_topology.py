"""Switches and blocks above Slurm's nodes: `scontrol show topology`, topology.conf, topology.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

from planner.discovery.captures import Capture
from planner.discovery.inventory import MOST_NODES
from planner.errors import InputError
from planner.files import plain

LONGEST = 5_000_000
"""Bytes of a topology.yaml at most."""


def expand(text: str, where: str) -> list[str]:
    """Names of a list as Slurm writes it. Raises InputError.

    >>> expand("h100-[001-003,7],login,r[1-2]n[1-2]", "here")
    ['h100-001', 'h100-002', 'h100-003', 'h100-7', 'login', 'r1n1', 'r1n2', 'r2n1', 'r2n2']
    """
    found: list[str] = []
    for one in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        parts = [list(_numbers(part[1:-1], where)) if part.startswith("[") else [part]
                 for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", one)]  # fmt: skip
        size = 1
        for part in parts:
            size *= len(part)
        if len(found) + size > MOST_NODES:
            raise InputError(f"{where}: {plain(text)} names more than {MOST_NODES:,} nodes")
        found += map("".join, product(*parts))
    return found


def _numbers(text: str, where: str) -> Iterator[str]:
    """Numbers of ``001-003,7``, as wide as they are written."""
    total = 0
    for one in text.split(","):
        shape = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", one.strip(), re.ASCII)
        first, last = (int(shape[1]), int(shape[2] or shape[1])) if shape else (1, 0)
        total += last - first + 1
        if not shape or last < first or total > MOST_NODES:
            raise InputError(f"{where}: [{plain(text)}] is no list of up to {MOST_NODES:,} numbers")
        yield from (f"{number:0{len(shape[1])}}" for number in range(first, last + 1))


def leaves_of_line(line: str, where: str) -> dict[str, str]:
    """The leaf switch or block of nodes, of a line of scontrol or topology.conf.

    Lines of switches above leaves and of blocks of blocks say nothing of nodes.
    """
    pairs = dict(re.findall(r"(\w+)=(\S*)", line))
    name = pairs.get("SwitchName") or pairs.get("BlockName") or ""
    if not name or "Switches" in pairs or pairs.get("Level", "0") != "0" or not pairs.get("Nodes"):
        return {}
    return dict.fromkeys(expand(pairs["Nodes"], where), plain(name))


def leaves_of_yaml(capture: Capture) -> dict[str, str]:
    """The leaf switch or block of nodes, of a topology.yaml (Slurm 25.05 and later).

    Of several topologies the default one, or else the first. Raises InputError.
    """
    import yaml

    if len(capture.text) > LONGEST:
        raise InputError(f"{capture.name}: a topology is read up to {LONGEST:,} bytes")
    try:
        for event in yaml.parse(capture.text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{capture.name}: anchors and aliases are not read: write the value out")
        found = yaml.safe_load(capture.text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        why = getattr(error, "problem", None) or "it is nested too deep"
        raise InputError(f"{capture.name}: not YAML: {plain(str(why))}") from None
    topologies = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    if not topologies:
        raise InputError(f"{capture.name}: no topology.yaml: a list of topologies is expected")
    chosen = next((one for one in topologies if one.get("cluster_default")), topologies[0])
    leaves: dict[str, str] = {}
    for kind, rows, name in (("tree", "switches", "switch"), ("block", "blocks", "block")):
        held: Any = chosen.get(kind)
        for row in (held.get(rows) or []) if isinstance(held, dict) else []:
            if isinstance(row, dict) and isinstance(row.get("nodes"), str):
                leaf = plain(str(row.get(name, "")))
                leaves |= dict.fromkeys(expand(row["nodes"], capture.name), leaf)
    return leaves
