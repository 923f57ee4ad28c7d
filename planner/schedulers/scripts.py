"""run.sh: what SkyPilot and dstack run on every node; their YAML says nothing else to a shell."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from planner.export.base import Shell, quoted
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
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    env = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return env.get_template("node.sh.j2").render(
        header=pods.subject.header(),
        tool=words.tool,
        nodes=pods.nodes,
        gpus=pods.subject.per_node,
        nodes_name=words.nodes,
        gpus_name=words.gpus,
        exports=[f"{name}={quoted([value])}" for name, value in pods.made.env.items()],
        address=words.find_address,
        command=quoted(pods.on_node(Shell(f"${words.rank}"), words.address)),
    )
