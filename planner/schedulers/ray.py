"""RayJob of KubeRay (ray.io/v1): a Ray cluster of the plan's nodes, and a script that starts torchrun there.

The script takes a placement group of one bundle with all GPUs on every node. Ray Train's workers are one to a
GPU and have a process group made for them; frameworks make their own, so a task on each node starts what is
started elsewhere too (kuberay 1.7.0, ray-operator/apis/ray/v1; ray 2.60.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.export.base import Export, NotExpressible, Shell, Subject
from planner.export.rendering import rendered
from planner.schedulers import kueue
from planner.schedulers.pods import SETTINGS as PODS
from planner.schedulers.pods import Pods, count_of, finished

API = "ray.io/v1"
SETTINGS = {
    **PODS,
    **kueue.SETTINGS,
    "wait": "seconds to wait for the nodes, 3600 by default",
    "restarts": "how often the job starts anew, in a new cluster, after a failure, 0 by default",
}
SCRIPT = "ray_train.py"
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
"""Of the head (kuberay 1.7.0, ray-operator/config/samples/ray-job.sample.yaml)."""


def export(subject: Subject, made: Export, settings: Mapping[str, str]) -> Export:
    """A RayJob. Raises NotExpressible, InputError."""
    pods = Pods(subject, made, settings)
    if settings.get("stage-topology"):
        raise NotExpressible(
            "ranks in a Ray cluster follow its nodes' addresses, and pods have no index by which Kueue could "
            "place stages: use --to trainjob or --to jobset for stage-topology"
        )
    worker = pods.container("ray-worker", (), (SCRIPT,))
    head = pods.container("ray-head", (), (SCRIPT,))
    for one in (worker, head):
        one.pop("env", None)  # the script gives it to the processes
    del worker["command"], head["command"], head["resources"]
    head["ports"] = [{"name": name, "containerPort": port} for name, port in PORTS.items()]
    group = {
        "groupName": "worker",
        "replicas": pods.nodes,
        "minReplicas": pods.nodes,
        "maxReplicas": pods.nodes,
        "rayStartParams": {"num-gpus": str(subject.per_node)},
        "template": pods.template(worker, kueue.together(pods)),
    }
    first: dict[str, Any] = {
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
        "template": pods.template(head, {}),
    }
    spec = {
        "entrypoint": f"python {pods.workdir.rstrip('/')}/{SCRIPT}",
        "shutdownAfterJobFinishes": True,
        "backoffLimit": count_of(settings, "restarts", "0"),
        "rayClusterSpec": {"headGroupSpec": first, "workerGroupSpecs": [group]},
    }
    whole = pods.document(API, "RayJob", kueue.labels(pods), spec)
    documents = [pods.config_map({SCRIPT: script(pods)}), whole]
    notes = (
        *kueue.notes(pods),
        "ranks follow the nodes' addresses: neighbours may lie under different switches",
    )
    return finished(pods, "rayjob", documents, kueue.setup(pods), *notes)


def script(pods: Pods) -> str:
    """ray_train.py: what somebody wrote is in it as Python literals of ASCII, never as text."""
    words = pods.on_node(Shell("rank"), Shell("address"), Shell("port"))
    return rendered(
        f"{SCRIPT}.jinja",
        header=pods.made.header(pods.subject),
        nodes=pods.nodes,
        gpus=pods.subject.per_node,
        folder=ascii(pods.workdir),
        env=[(ascii(name), ascii(value)) for name, value in pods.made.env.items()],
        words=[str(word) if isinstance(word, Shell) else ascii(str(word)) for word in words],
        wait=count_of(pods.settings, "wait", "3600"),
    )
