"""Volcano (batch.volcano.sh/v1alpha1): a job whose pods start all or none, near each other in its network.

The rank of a node is its pod's index, which the env plugin gives (``VC_TASK_INDEX``); the svc plugin names
the pods: ``NAME-worker-0.NAME``. Pods ``i`` with the same ``i // partitionSize`` are a partition, so
partitions of as many pods as a pipeline stage has nodes are the stages (volcano 1.15.1,
pkg/controllers/job/job_controller_util.go).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from planner.errors import InputError
from planner.export.base import Export, Shell, Subject
from planner.schedulers.kueue import nodes_of_stage
from planner.schedulers.pods import NAME, Pods, checked, count_of, finished
from planner.schedulers.pods import SETTINGS as PODS

API = "batch.volcano.sh/v1alpha1"
SETTINGS = {
    **PODS,
    "queue": "Volcano's queue, default by default",
    "tier": "highest tier of HyperNodes that the job may span, as in 2",
    "stage-tier": "highest tier of HyperNodes that a pipeline stage may span, as in 1 (Volcano 1.14 on)",
    "tier-mode": "hard: wait for it; soft: as near as can be; hard by default",
    "restarts": "how often the job starts anew after a failure, 0 by default",
}
TASK = "worker"


def export(subject: Subject, made: Export, settings: Mapping[str, str]) -> Export:
    """A Volcano job. Raises NotExpressible, InputError."""
    pods = Pods(subject, made, settings)
    command = pods.command(Shell("$(VC_TASK_INDEX)"), f"{pods.name}-{TASK}-0.{pods.name}")
    restarts = count_of(settings, "restarts", "0")
    task: dict[str, Any] = {
        "name": TASK,
        "replicas": pods.nodes,
        "minAvailable": pods.nodes,
        "template": pods.template(pods.container(TASK, command), {}, restartPolicy="Never"),
    }
    stages = subject.layout.pipeline_parallel
    if near := _near(settings, "stage-tier"):
        size = nodes_of_stage(pods)
        task["partitionPolicy"] = {"totalPartitions": stages, "partitionSize": size, "networkTopology": near}
    whole = _near(settings, "tier")
    spec = {
        "schedulerName": "volcano",
        "queue": checked(settings, "queue", NAME, "a queue's name, as in training", "default"),
        "minAvailable": pods.nodes,
        "maxRetry": max(restarts, 1),
        "plugins": {"env": [], "svc": ["--publish-not-ready-addresses=true"]},
        "policies": [
            {"event": "PodEvicted", "action": "RestartJob"},
            {"event": "PodFailed", "action": "RestartJob" if restarts else "AbortJob"},
            {"event": "TaskCompleted", "action": "CompleteJob"},
        ],
        **({"networkTopology": whole} if whole else {}),
        "tasks": [task],
    }
    document = pods.document(API, "Job", {}, spec)
    notes = (
        ()
        if settings.get("tier") or settings.get("stage-tier")
        else ("pods may lie under different switches: --set tier and stage-tier keep them together",)
    )
    return finished(pods, "volcano", [pods.config_map(), document], {}, *notes)


def _near(settings: Mapping[str, str], name: str) -> dict[str, Any]:
    """How far apart pods may lie, where that was set."""
    mode = checked(settings, "tier-mode", re.compile("hard|soft"), "hard or soft", "hard")
    if not settings.get(name):
        if "tier-mode" in settings and not (settings.get("tier") or settings.get("stage-tier")):
            raise InputError("--set tier-mode is of a tier: give --set tier or stage-tier too")
        return {}
    return {"mode": mode, "highestTierAllowed": count_of(settings, name, "")}
