"""SkyPilot: a task on as many nodes as the plan has, which SkyPilot finds in clouds, Kubernetes or Slurm.

Nodes are ranked as SkyPilot ranks them (``SKYPILOT_NODE_RANK``); how they lie to each other cannot be said.
Names of GPUs are those of its catalog (skypilot 0.14.1, sky/catalog).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.export.base import Export, NotExpressible, Shell, Subject
from planner.files import plain
from planner.schedulers.manifests import yaml_of
from planner.schedulers.pods import FOLDER, IMAGE, Pods, checked
from planner.schedulers.scripts import RUN, Words, run_script

SETTINGS = {
    "name": "of the task; the model's by default",
    "image": "Docker image to run in, with the framework in it",
    "workdir": "folder of the image in which the program starts; SkyPilot's, with the files, by default",
    "infra": "where to look, as in k8s, aws or aws/us-east-1; everywhere by default",
    "accelerators": "SkyPilot's name of the GPUs where its catalog has another one, as in H100-SXM",
    "network": "best: the fastest network that the cloud has",
}
ACCELERATORS = {
    "A100-PCIe-40GB": "A100",
    "A100-SXM-40GB": "A100",
    "A100-PCIe-80GB": "A100-80GB",
    "A100-SXM-80GB": "A100-80GB",
    "B200-SXM-180GB": "B200",
    "GB200-NVL72-186GB": "GB200",
    "H100-NVL-94GB": "H100-NVL",
    "H100-PCIe-80GB": "H100",
    "H100-SXM-80GB": "H100",
    "H200-SXM-141GB": "H200",
    "L40S-48GB": "L40S",
    "MI300X-192GB": "MI300X",
    "RTX-4090-24GB": "RTX4090",
    "V100-SXM2-16GB": "V100",
    "V100-SXM2-32GB": "V100-32GB",
}
"""SkyPilot's names of the catalog's GPUs."""
WORDS = Words(
    "SkyPilot",
    "SKYPILOT_NODE_RANK",
    "SKYPILOT_NUM_NODES",
    "SKYPILOT_NUM_GPUS_PER_NODE",
    Shell("$MASTER_ADDR"),
    '$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
)
FOUND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
INFRA = re.compile(r"[A-Za-z0-9*][A-Za-z0-9*._/-]*", re.ASCII)


def export(subject: Subject, made: Export, settings: Mapping[str, str]) -> Export:
    """A task, its script and the export's files. Raises NotExpressible, InputError."""
    pods = Pods(subject, made, settings)
    gpu = checked(
        settings,
        "accelerators",
        FOUND,
        "a name as SkyPilot's catalog has it",
        ACCELERATORS.get(subject.plan.gpu, ""),
    )
    if not gpu:
        raise NotExpressible(
            f"SkyPilot's name of {plain(subject.plan.gpu)} is not known here: --set accelerators=NAME says it"
        )
    resources: dict[str, Any] = {"accelerators": f"{gpu}:{subject.per_node}"}
    if image := checked(settings, "image", IMAGE, "an image, as in registry/train:1"):
        resources["image_id"] = f"docker:{image}"
    if infra := checked(settings, "infra", INFRA, "infrastructure, as in aws/us-east-1"):
        resources["infra"] = infra
    if tier := checked(settings, "network", re.compile("best|standard"), "best or standard"):
        resources["network_tier"] = tier
    folder = checked(settings, "workdir", FOLDER, "a folder from / on").rstrip("/")
    files = pods.files({RUN: run_script(pods, WORDS)})
    place: dict[str, Any] = (
        {"file_mounts": {f"{folder}/{name}": f"./{name}" for name in files}} if folder else {"workdir": "."}
    )
    task = {
        "name": pods.name,
        "num_nodes": pods.nodes,
        "resources": resources,
        **place,
        "run": f"bash {folder}/{RUN}\n" if folder else f"bash {RUN}\n",
    }
    note = f"SkyPilot finds {gpu} of any make and anywhere: with --set infra it looks in one place"
    files = {"sky.yaml": yaml_of([task], made.header(subject)), **files}
    return replace(
        made,
        target=f"{made.target},skypilot",
        files=files,
        notes=pods.notes(note),
        submit=("sky", "launch", "sky.yaml"),
        submit_inside=True,  # paths in it are from where sky is called
    )
