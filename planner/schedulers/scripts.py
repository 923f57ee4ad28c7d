"""run.sh: what SkyPilot and dstack run on every node; their YAML says nothing else to a shell."""

from __future__ import annotations

from typing import NamedTuple

from planner.export.base import Shell, quoted
from planner.export.rendering import rendered
from planner.schedulers.pods import Pods

RUN = "run.sh"


class Words(NamedTuple):
    """A tool's variables on a node: its rank, how many there are, GPUs of each, the first one's address."""

    tool: str
    rank: str
    nodes: str
    gpus: str
    address: Shell
    find_address: str = ""


def run_script(pods: Pods, words: Words) -> str:
    """A script for bash, which shellcheck passes. Raises NotExpressible if nodes are not whole."""
    return rendered(
        "node.sh.jinja",
        header=pods.made.header(pods.subject),
        tool=words.tool,
        needed=list(pods.made.needed()),
        nodes=pods.nodes,
        gpus=pods.subject.per_node,
        nodes_name=words.nodes,
        gpus_name=words.gpus,
        exports=[f"{name}={quoted([value])}" for name, value in pods.made.env.items()],
        address=words.find_address,
        command=quoted(pods.on_node(Shell(f"${words.rank}"), words.address)),
    )
