"""Switches and blocks above Slurm's nodes: `scontrol show topology`, topology.conf, topology.yaml."""

from __future__ import annotations

import re

from planner.discovery.captures import Capture, inner, items
from planner.errors import InputError
from planner.files import plain, yaml_in
from planner.hostlist import names_of

LONGEST = 5_000_000
"""Bytes of a topology.yaml at most."""


def expand(text: str, where: str) -> list[str]:
    """Names of a list as Slurm writes it. Raises InputError."""
    try:
        return names_of(text)
    except RecursionError:
        raise InputError(f"{where}: {plain(text)} has too many brackets to be a list of nodes") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


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
    if len(capture.text) > LONGEST:
        raise InputError(f"{capture.name}: a topology is read up to {LONGEST:,} bytes")
    found = yaml_in(capture.text, capture.name)
    topologies = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    if not topologies:
        raise InputError(f"{capture.name}: no topology.yaml: a list of topologies is expected")
    chosen = next((one for one in topologies if one.get("cluster_default")), topologies[0])
    leaves: dict[str, str] = {}
    for kind, rows, name in (("tree", "switches", "switch"), ("block", "blocks", "block")):
        for row in items(inner(chosen, kind, rows)):
            if isinstance(row.get("nodes"), str):
                leaf = plain(str(row.get(name, "")))
                leaves |= dict.fromkeys(expand(row["nodes"], capture.name), leaf)
    return leaves
