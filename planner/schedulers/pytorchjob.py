"""PyTorchJob (kubeflow.org/v1) of the Kubeflow Training Operator, which Kubeflow Trainer follows.

Its operator gives the pods ``PET_NODE_RANK`` and the master's address; the master is node 0, the workers
those after it (training-operator 1.9.0, pkg/controller.v1/pytorch/envvar.go). Master and workers are two sets
of pods to Kueue, so that stages cannot be kept together: the first would lack a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.export.base import Export, NotExpressible, Shell, Subject
from planner.schedulers import kueue
from planner.schedulers.pods import SETTINGS as PODS
from planner.schedulers.pods import Pods, count_of, finished

API = "kubeflow.org/v1"
SETTINGS = {**PODS, **kueue.SETTINGS, "restarts": "how often a failed pod is started anew, 0 by default"}
CONTAINER = "pytorch"
"""The operator asks for this name."""


def export(subject: Subject, made: Export, settings: Mapping[str, str]) -> Export:
    """A PyTorchJob. Raises NotExpressible, InputError."""
    pods = Pods(subject, made, settings)
    if settings.get("stage-topology"):
        raise NotExpressible(
            "the master of a PyTorchJob is a set of pods of its own, and the first stage would be cut: use "
            "--to trainjob or --to jobset for stage-topology"
        )
    command = pods.command(
        Shell("$(PET_NODE_RANK)"), Shell("$(PET_MASTER_ADDR)"), Shell("$(PET_MASTER_PORT)")
    )
    annotations = kueue.together(pods)
    if annotations and pods.nodes > 1:
        annotations[f"{kueue.PREFIX}/podset-group-name"] = "all"
    template = pods.template(pods.container(CONTAINER, command), annotations)
    restarts = count_of(settings, "restarts", "0")

    def replicas(count: int) -> dict[str, Any]:
        policy = "OnFailure" if restarts else "Never"
        return {"replicas": count, "restartPolicy": policy, "template": template}

    workers = {"Worker": replicas(pods.nodes - 1)} if pods.nodes > 1 else {}
    spec = {
        "nprocPerNode": str(subject.per_node),
        "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": restarts},
        "pytorchReplicaSpecs": {"Master": replicas(1), **workers},
    }
    whole = pods.document(API, "PyTorchJob", kueue.labels(pods), spec)
    documents = [pods.config_map(), whole]
    return finished(pods, "pytorchjob", documents, kueue.setup(pods), *kueue.notes(pods))
