"""TrainJob of Kubeflow Trainer (trainer.kubeflow.org/v1alpha1): a job of a runtime that the cluster has.

The runtime's torch policy gives every pod ``PET_NODE_RANK``, its index, and the address of pod 0; the command
names them, so that ranks are where the plan has them whatever launches the processes (trainer 2.3.0,
pkg/runtime/framework/plugins/torch/torch.go). What a TrainJob cannot say itself, volumes and labels of pods,
patches the runtime: ``runtimePatches`` since 2.2, ``podTemplateOverrides`` in 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import InputError
from planner.export.base import Export, NotExpressible, Shell, Subject
from planner.schedulers import kueue
from planner.schedulers.pods import SETTINGS as PODS
from planner.schedulers.pods import SUBDOMAIN, Pods, checked, finished, said_yes

API = "trainer.kubeflow.org/v1alpha1"
VERSIONS = ("2.3", "2.2", "2.1")
"""Of Kubeflow Trainer."""
SETTINGS = {
    **PODS,
    **kueue.SETTINGS,
    "runtime": "the ClusterTrainingRuntime, torch-distributed by default",
    "trainer-version": f"of Kubeflow Trainer: {', '.join(VERSIONS)}; {VERSIONS[0]} by default",
}
RUNTIME = "torch-distributed"
JOB = "node"
"""The runtime's job and its container."""
MOST_WORDS = 128
"""Words of a command, and as many of its arguments; variables (trainer 2.3.0, trainjob_types.go)."""


def export(subject: Subject, made: Export, settings: Mapping[str, str]) -> Export:
    """A TrainJob. Raises NotExpressible, InputError."""
    pods = Pods(subject, made, settings)
    version = settings.get("trainer-version", VERSIONS[0])
    if version not in VERSIONS:
        raise InputError(f"--set trainer-version={version[:20]!r}: use {', '.join(VERSIONS)}")
    if said_yes(settings, "host-network"):
        raise NotExpressible(
            "a TrainJob cannot ask for the node's network: its runtime can, or use --to jobset"
        )
    spec = {
        "runtimeRef": {
            "apiGroup": API.partition("/")[0],
            "kind": "ClusterTrainingRuntime",
            "name": checked(settings, "runtime", SUBDOMAIN, "a runtime's name", RUNTIME),
        },
        "trainer": _trainer(pods),
        **_patches(pods, version),
    }
    whole = pods.document(API, "TrainJob", kueue.labels(pods), spec)
    image = (
        ()
        if pods.image
        else ("no image is set: the pods have the runtime's, in which the framework must be",)
    )
    documents = [pods.config_map(), whole]
    notes = (*image, *kueue.notes(pods))
    return finished(pods, "trainjob", documents, kueue.setup(pods), *notes)


def _trainer(pods: Pods) -> dict[str, Any]:
    """Nodes, processes, resources; a command that moves to the working folder, the program its arguments."""
    started = pods.command(
        Shell("$(PET_NODE_RANK)"), Shell("$(PET_MASTER_ADDR)"), Shell("$(PET_MASTER_PORT)")
    )
    words = ["env", f"--chdir={pods.workdir}", *started]
    cut = len(words) - min(len(pods.made.program), MOST_WORDS)
    if cut > MOST_WORDS or len(pods.env()) > MOST_WORDS:
        raise NotExpressible(
            f"a command of {len(words)} words with {len(pods.env())} environment variables: a TrainJob takes "
            f"{2 * MOST_WORDS} and {MOST_WORDS} at most: use --to jobset"
        )
    return {
        **({"image": pods.image} if pods.image else {}),
        "numNodes": pods.nodes,
        "numProcPerNode": pods.subject.per_node,
        "resourcesPerNode": pods.resources,
        **({"env": env} if (env := pods.env()) else {}),
        "command": words[:cut],
        "args": words[cut:],
    }


def _patches(pods: Pods, version: str) -> dict[str, Any]:
    """What the runtime's pods have more, in the words of a version."""
    container: dict[str, Any] = {"name": JOB, "volumeMounts": pods.mounts()}
    if pods.security and version == "2.1":
        raise NotExpressible("Kubeflow Trainer 2.1 cannot let a container lock memory for rdma: use 2.2 on")
    if pods.security:
        container["securityContext"] = pods.security
    spec = {
        **({"nodeSelector": pods.selector} if pods.selector else {}),
        "tolerations": pods.tolerations,
        **({"imagePullSecrets": pods.pull_secrets} if pods.pull_secrets else {}),
        "containers": [container],
        "volumes": pods.volumes(container["volumeMounts"]),
    }
    annotations = kueue.together(pods)
    template = {**({"metadata": {"annotations": annotations}} if annotations else {}), "spec": spec}
    if version == "2.1":
        return {"podTemplateOverrides": [{"targetJobs": [{"name": JOB}], **template}]}
    job = {"name": JOB, "template": {"spec": {"template": template}}}
    runtime = {"template": {"spec": {"replicatedJobs": [job]}}}
    return {"runtimePatches": [{"manager": "planner/export", "trainingRuntimeSpec": runtime}]}
