"""dstack: a task on as many nodes as the plan has, of a fleet or of what dstack finds in clouds.

Nodes are ranked as dstack ranks them (``DSTACK_NODE_RANK``); those of a fleet with ``placement: cluster`` lie
together. Names of GPUs are those of gpuhunt (dstack 0.22.5, gpuhunt 0.1.34).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.export.base import Export, NotExpressible, Shell, Subject
from planner.files import plain
from planner.schedulers.manifests import yaml_of
from planner.schedulers.pods import FOLDER, IMAGE, WORKDIR, Pods, checked
from planner.schedulers.scripts import RUN, Words, run_script

SETTINGS = {
    "name": "of the run; the model's by default",
    "image": "Docker image to run in, with the framework in it; dstack's own by default",
    "workdir": "folder in which the program starts and the files lie, /workspace by default",
    "shm": "size of /dev/shm, as in 64GB",
    "gpu": "gpuhunt's name of the GPUs where it is another one",
    "fleet": "the fleet to run on",
}
GPUS = {
    "A100-PCIe-40GB": ("A100", 40),
    "A100-SXM-40GB": ("A100", 40),
    "A100-PCIe-80GB": ("A100", 80),
    "A100-SXM-80GB": ("A100", 80),
    "B200-SXM-180GB": ("B200", 180),
    "GB200-NVL72-186GB": ("GB200", 186),
    "H100-NVL-94GB": ("H100NVL", 94),
    "H100-PCIe-80GB": ("H100", 80),
    "H100-SXM-80GB": ("H100", 80),
    "H200-SXM-141GB": ("H200", 141),
    "L40S-48GB": ("L40S", 48),
    "MI300X-192GB": ("MI300X", 192),
    "RTX-4090-24GB": ("RTX4090", 24),
    "V100-SXM2-16GB": ("V100", 16),
    "V100-SXM2-32GB": ("V100", 32),
}
"""gpuhunt's names and gigabytes of the catalog's GPUs."""
WORDS = Words(
    "dstack",
    "DSTACK_NODE_RANK",
    "DSTACK_NODES_NUM",
    "DSTACK_GPUS_PER_NODE",
    Shell("$DSTACK_MASTER_NODE_IP"),
)
NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*", re.ASCII)
SIZE = re.compile(r"[1-9][0-9]{0,5}(?:MB|GB|TB)", re.ASCII)
FLEET = re.compile(r"[a-z][a-z0-9-]*", re.ASCII)


def export(subject: Subject, made: Export, settings: Mapping[str, str]) -> Export:
    """A task, its script and the export's files. Raises NotExpressible, InputError."""
    pods = Pods(subject, made, settings)
    name, memory = GPUS.get(subject.plan.gpu, ("", 0))
    name = checked(settings, "gpu", NAME, "a name as gpuhunt has it, as in H100", name)
    if not name:
        raise NotExpressible(
            f"gpuhunt's name of {plain(subject.plan.gpu)} is not known here: --set gpu=NAME says it"
        )
    gpu = {"name": name, **({"memory": f"{memory}GB"} if memory else {}), "count": subject.per_node}
    resources: dict[str, Any] = {"gpu": gpu}
    if shm := checked(settings, "shm", SIZE, "a size, as in 64GB"):
        resources["shm_size"] = shm
    folder = checked(settings, "workdir", FOLDER, "a folder from / on", WORKDIR).rstrip("/")
    files = pods.files({RUN: run_script(pods, WORDS)})
    image = checked(settings, "image", IMAGE, "an image, as in registry/train:1")
    fleet = checked(settings, "fleet", FLEET, "a fleet's name")
    task = {
        "type": "task",
        "name": pods.name,
        "nodes": pods.nodes,
        **({"image": image} if image else {}),
        "working_dir": folder or "/",
        "files": [{"local_path": one, "path": f"{folder}/{one}"} for one in files],
        "commands": [f"bash {folder}/{RUN}"],
        "resources": resources,
        **({"fleets": [fleet]} if fleet else {}),
    }
    note = "nodes lie together in a fleet with placement: cluster: --set fleet names one"
    files = {"task.dstack.yml": yaml_of([task], made.header(subject)), **files}
    return replace(
        made,
        target=f"{made.target},dstack",
        files=files,
        notes=pods.notes(note),
        submit=("dstack", "apply", "-f", "task.dstack.yml"),
    )
