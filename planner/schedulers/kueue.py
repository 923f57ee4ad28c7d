"""Kueue: the queue that a job waits in, and where its pods must lie together.

Topology-aware scheduling keeps the whole job, or every pipeline stage, under one node of a tree of switches
whose levels are labels of the nodes. Pods are given places in the order of their index, so a slice of as many
pods as a stage has nodes is that stage (kueue.x-k8s.io/podset-slice-*, kueue 0.19.2,
apis/kueue/v1beta2/topology_types.go).
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from planner.errors import InputError
from planner.export.base import NotExpressible
from planner.placement import stage_nodes
from planner.schedulers.pods import LABEL, NAME, Pods, checked, said_yes

API = "kueue.x-k8s.io/v1beta2"
SETTINGS = {
    "queue": "Kueue's LocalQueue that the job waits in",
    "topology": "label of nodes under one value of which all pods must lie, as in topology/block",
    "stage-topology": "label of nodes under one value of which every pipeline stage must lie",
    "kueue-setup": "yes: also kueue.yaml with the queue, its quota of the whole cluster and the topology",
}
HOST = "kubernetes.io/hostname"
PREFIX = "kueue.x-k8s.io"


def queue_of(pods: Pods) -> str:
    """The LocalQueue that was set, or nothing. Raises InputError for what needs one and has none."""
    queue = checked(pods.settings, "queue", NAME, "a queue's name, as in training")
    for name in ("topology", "stage-topology"):
        if pods.settings.get(name) and not queue:
            raise InputError(f"--set {name} is for Kueue: give the queue too, as in --set queue=training")
    if said_yes(pods.settings, "kueue-setup") and not queue:
        raise InputError("--set kueue-setup=yes: give the queue too, as in --set queue=training")
    return queue


def _level(pods: Pods, name: str) -> str:
    return checked(pods.settings, name, LABEL, "a label of nodes, as in cloud.provider.com/topology-block")


def labels(pods: Pods) -> dict[str, str]:
    """Labels of the job."""
    return {f"{PREFIX}/queue-name": queue} if (queue := queue_of(pods)) else {}


def together(pods: Pods) -> dict[str, str]:
    """Annotations of the pods' template. Raises NotExpressible where a stage is no block of nodes."""
    queue_of(pods)
    found = {}
    if whole := _level(pods, "topology"):
        found[f"{PREFIX}/podset-required-topology"] = whole
    if stage := _level(pods, "stage-topology"):
        found[f"{PREFIX}/podset-slice-required-topology"] = stage
        found[f"{PREFIX}/podset-slice-size"] = str(nodes_of_stage(pods))
    return found


def nodes_of_stage(pods: Pods) -> int:
    """Nodes that a pipeline stage fills. Raises NotExpressible where it is no block of whole nodes."""
    found = stage_nodes(pods.subject)
    if found is None:
        layout = pods.subject.layout
        raise NotExpressible(
            f"a stage of {layout.describe()} is no block of whole nodes of {pods.subject.per_node} GPUs: "
            "leave the stages' topology out, or plan with a pipeline whose stages fill nodes"
        )
    return found


def setup(pods: Pods) -> dict[str, str]:
    """kueue.yaml where it was set, which an administrator makes once; its quota is the plan's cluster."""
    from planner.schedulers.manifests import yaml_of

    if not said_yes(pods.settings, "kueue-setup"):
        return {}
    queue = queue_of(pods)
    levels = [one for name in ("topology", "stage-topology") if (one := _level(pods, name))]
    levels = [*dict.fromkeys(one for one in levels if one != HOST), HOST]
    selector = pods.selector or ({"nvidia.com/gpu.present": "true"} if pods.gpu == "nvidia.com/gpu" else {})
    if not selector:
        raise InputError("--set kueue-setup=yes: say which nodes, as in --set node-selector=pool=mi300x")
    nodes = pods.subject.cluster.num_gpus // pods.subject.cluster.gpus_per_node or 1
    quotas = {name: _times(amount, nodes) for name, amount in pods.limits.items()}
    quotas[pods.gpu] = str(pods.subject.cluster.num_gpus)
    flavor = {"nodeLabels": selector, "tolerations": pods.tolerations, "topologyName": queue}
    resources = [{"name": name, "nominalQuota": quota} for name, quota in quotas.items()]
    group = {"coveredResources": list(quotas), "flavors": [{"name": queue, "resources": resources}]}
    documents: list[dict[str, Any]] = [
        _whole("Topology", queue, {"levels": [{"nodeLabel": one} for one in levels]}),
        _whole("ResourceFlavor", queue, flavor),
        _whole("ClusterQueue", queue, {"namespaceSelector": {}, "resourceGroups": [group]}),
        _whole("LocalQueue", queue, {"clusterQueue": queue}),
    ]
    documents[-1]["metadata"]["namespace"] = pods.namespace or "default"
    return {"kueue.yaml": yaml_of(documents, pods.made.header(pods.subject))}


def _whole(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API, "kind": kind, "metadata": {"name": name}, "spec": spec}


def _times(amount: str, nodes: int) -> str:
    """A quantity of a node, of all nodes.

    >>> _times("1.5Ti", 8), _times("96", 20), _times("0.25Gi", 3)
    ('12Ti', '1920', '0.75Gi')
    """
    number = amount.rstrip("mkKMGTPEi")
    whole = Decimal(number) * nodes
    return f"{whole.normalize() if whole % 1 else int(whole)}{amount[len(number) :]}"


def notes(pods: Pods) -> tuple[str, ...]:
    """What is left open where nothing keeps the pods together."""
    if not queue_of(pods):
        return (
            "pods are started one by one, wherever GPUs are free: --set queue has Kueue start all or none",
        )
    if not (pods.settings.get("topology") or pods.settings.get("stage-topology")):
        return (
            "pods may lie under different switches: --set topology and stage-topology keep them together",
        )
    return ()
