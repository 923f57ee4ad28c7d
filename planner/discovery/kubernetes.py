"""Nodes of Kubernetes, from what kubectl prints as JSON: nodes, pods, resource slices, queues of Kueue.

GPUs are those that a device plugin reports (``nvidia.com/gpu``, ``amd.com/gpu``), with the labels of GPU
Feature Discovery, or those of a DRA driver's ResourceSlices. Labels of switches are topograph's, AWS's,
Google's and those of Kueue's examples.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from planner.discovery.captures import Capture, Command, count_of, documents, inner, items, word
from planner.discovery.inventory import Collected, Found
from planner.discovery.kinds import slice_of
from planner.errors import InputError
from planner.files import plain

COMMANDS = (
    Command(("kubectl", "get", "nodes", "-o", "json")),
    Command(("kubectl", "get", "pods", "-A", "-o", "json"), optional=True),
    Command(("kubectl", "get", "resourceslices.resource.k8s.io", "-o", "json"), optional=True),
    Command(("kubectl", "get", "resourceclaims.resource.k8s.io", "-A", "-o", "json"), optional=True),
    Command(("kubectl", "get", "clusterqueues.kueue.x-k8s.io", "-o", "json"), optional=True),
)
RESOURCES = ("nvidia.com/gpu", "amd.com/gpu")
PRODUCTS = ("nvidia.com/gpu.product", "amd.com/gpu.product-name")
LEAVES = (
    "fabric.topograph.run/tier-0",
    "network.topology.nvidia.com/leaf",
    "topology.k8s.aws/network-node-layer-4",
    "topology.k8s.aws/network-node-layer-3",
    "cloud.google.com/gce-topology-subblock",
    "cloud.provider.com/topology-rack",
)
"""Labels that name what joins nodes directly, the first that a node has. Topograph counts tiers from the
node, AWS layers towards it."""
DOMAINS = (
    "nvidia.com/gpu.clique",
    "accelerator.topograph.run/domain",
    "network.topology.nvidia.com/accelerator",
)
"""Labels that name the NVLink domain of an NVL72."""
DRIVERS = ("gpu.nvidia.com", "gpu.amd.com")
OVER = ("Succeeded", "Failed")
"""Phases of pods that hold nothing any more."""
SCALES = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass
class Objects:
    """Objects of a cluster by kind, and by node what pods and claims take; None where none were given."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    queues: list[dict[str, Any]] = field(default_factory=list)
    slices: list[dict[str, Any]] = field(default_factory=list)
    taken: Counter[str] | None = None
    claimed: set[tuple[str, str]] | None = None


def collect(captures: Sequence[Capture]) -> Collected:
    """Nodes of the captures. Raises InputError."""
    objects = Objects()
    for capture in captures:
        for document in documents(capture):
            for kind, one in _objects(document, capture.name):
                _sort(objects, kind, one)
    if not objects.nodes:
        raise InputError(f"{captures[0].name}: no nodes: give what this prints: {COMMANDS[0].shown}")
    devices = _devices(objects)
    taints = Counter(taint for one in objects.nodes if _gpus(one, "capacity") for taint in _taints(one))
    every = {taint for taint, count in taints.items()
             if count == sum(1 for one in objects.nodes if _gpus(one, "capacity"))}  # fmt: skip
    nodes = [
        found
        for one in objects.nodes
        if (found := _found(one, objects.taken, devices.get(_name(one), []), every, objects.claimed))
    ]
    notes = [
        f"every node with GPUs is tainted {taint}: the job has to tolerate it" for taint in sorted(every)
    ]
    if any(one.free is None for one in nodes):
        notes.append(
            "what is free is not known: give kubectl get pods -A -o json too"
            + (", and resourceclaims" if devices else "")
        )
    quota, of_queue = _quota(objects.queues)
    return Collected("Kubernetes", nodes, {}, quota, (*notes, *of_queue))


def _objects(document: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects with their kinds, of a list or by themselves."""
    kind = word(document.get("kind"))
    if not kind.endswith("List"):
        if not kind:
            raise InputError(
                f"{where}: not an object of Kubernetes: give what kubectl get ... -o json prints"
            )
        yield kind, document
        return
    for one in items(document.get("items")):
        yield word(one.get("kind")) or kind.removesuffix("List"), one


def _sort(objects: Objects, kind: str, one: dict[str, Any]) -> None:
    if kind == "Node":
        objects.nodes.append(one)
    elif kind == "ClusterQueue":
        objects.queues.append(one)
    elif kind == "ResourceSlice":
        objects.slices.append(one)
    elif kind == "ResourceClaim":
        objects.claimed = set() if objects.claimed is None else objects.claimed
        for result in items(inner(one, "status", "allocation", "devices", "results")):
            objects.claimed.add((word(result.get("pool")), word(result.get("device"))))
    elif kind == "Pod":
        objects.taken = Counter() if objects.taken is None else objects.taken
        node = word(inner(one, "spec", "nodeName"))
        if node and inner(one, "status", "phase") not in OVER:
            objects.taken[node] += _of_pod(one, node)


def _name(one: Mapping[str, Any]) -> str:
    return word(inner(one, "metadata", "name"))


def _gpus(one: Mapping[str, Any], which: str) -> int:
    held = inner(one, "status", which)
    held = held if isinstance(held, dict) else {}
    return sum(count_of(held[name], f"node {_name(one)}") for name in RESOURCES if name in held)


def _of_pod(one: Mapping[str, Any], node: str) -> int:
    """GPUs that a pod holds: its containers together, or its largest init container with its sidecars.

    Kubernetes, Sidecar Containers, "Resource sharing within containers".
    """

    def asked(container: Mapping[str, Any]) -> int:
        for which in ("requests", "limits"):
            held = inner(container, "resources", which)
            if isinstance(held, dict) and (own := [held[name] for name in RESOURCES if name in held]):
                return sum(count_of(value, f"a pod on node {node}") for value in own)
        return 0

    sidecars = most = 0
    for container in items(inner(one, "spec", "initContainers")):
        if container.get("restartPolicy") == "Always":
            sidecars += asked(container)
            most = max(most, sidecars)
        else:
            most = max(most, sidecars + asked(container))
    return max(most, sidecars + sum(map(asked, items(inner(one, "spec", "containers")))))


def _taints(one: Mapping[str, Any]) -> list[str]:
    """Taints that keep pods away, but for those of GPUs, which Kubernetes has every such pod tolerate."""
    found = []
    for taint in items(inner(one, "spec", "taints")):
        key, value, effect = (word(taint.get(name)) for name in ("key", "value", "effect"))
        if effect in ("NoSchedule", "NoExecute") and key not in RESOURCES:
            found.append(plain(f"{key}{f'={value}' if value else ''}:{effect}", 120))
    return found


def _devices(objects: Objects) -> dict[str, list[dict[str, Any]]]:
    """Devices of DRA drivers by node, with the pool that claims name."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in objects.slices:
        spec = one.get("spec")
        if inner(spec, "driver") not in DRIVERS:
            continue
        for device in items(inner(spec, "devices")):
            basic = inner(device, "basic")  # v1beta1 has a level more
            held = basic if isinstance(basic, dict) else device
            own = {"name": word(device.get("name")), "pool": word(inner(spec, "pool", "name"))}
            found[word(inner(spec, "nodeName"))].append(
                {**own, "attributes": held.get("attributes"), "capacity": held.get("capacity")}
            )
    return found


def _found(
    one: Mapping[str, Any],
    taken: Mapping[str, int] | None,
    devices: Sequence[Mapping[str, Any]],
    every: set[str],
    claimed: set[tuple[str, str]] | None,
) -> Found | None:
    """A node with GPUs; None for one without."""
    name, labels = _name(one), inner(one, "metadata", "labels")
    labels = labels if isinstance(labels, dict) else {}
    if not name:
        raise InputError("a node without a name: give what kubectl prints unchanged")
    gpus, able = _gpus(one, "capacity"), _gpus(one, "allocatable")
    label = next((word(labels[key]) for key in PRODUCTS if key in labels), "gpu") or "gpu"
    memory = _memory(labels, name)
    used = None if taken is None else taken.get(name, 0)
    refused = _refused(labels, label)
    if not gpus and devices:
        gpus, label, memory, refused = _of_devices(devices)
        able = gpus
        if claimed is not None:
            used = sum((device["pool"], device["name"]) in claimed for device in devices)
        else:
            used = None
    if not gpus:
        resources = inner(one, "status", "capacity")
        shared = ("nvidia.com/mig-", "nvidia.com/gpu.shared")
        if not isinstance(resources, dict) or not any(key.startswith(shared) for key in resources):
            return None
        gpus, able = 1, 1
        refused = refused or "slices of GPUs (MIG): a process of a plan has a GPU to itself"
    out, why = _judged(one, every)
    healthy = 0 if out else min(gpus, able)
    held = bool(why) and not out
    free = 0 if out or held else None if used is None else max(0, healthy - used)
    if not why and able < gpus:
        why = f"{gpus - able} of {gpus} GPUs not healthy"
    if not why and used:
        why = "in use"
    return Found(
        name=name,
        label=label,
        gpus=gpus,
        healthy=healthy,
        free=free,
        state=out or ("held" if held else "ready"),
        why=why,
        memory_mib=memory,
        leaf=next((word(labels[key]) for key in LEAVES if labels.get(key)), ""),
        domain=next((word(labels[key]) for key in DOMAINS if labels.get(key)), ""),
        refused=refused,
    )


def _memory(labels: Mapping[str, Any], name: str) -> int | None:
    text = labels.get("nvidia.com/gpu.memory")
    return count_of(text, f"node {name}, nvidia.com/gpu.memory") or None if text else None


def _refused(labels: Mapping[str, Any], label: str) -> str:
    """Why GPUs of these labels are none that a process has to itself; GPU Feature Discovery's README."""
    strategy = word(labels.get("nvidia.com/gpu.sharing-strategy"))
    replicas = word(labels.get("nvidia.com/gpu.replicas"))
    if why := slice_of(label):
        return why
    if strategy == "mps":
        return "GPUs that several processes share (MPS): a process of a plan has a GPU to itself"
    if strategy not in ("", "none") or (replicas.isdigit() and int(replicas[:9]) > 1):
        return "GPUs that several processes share in turn (time slicing): a process has a GPU to itself"
    if word(labels.get("nvidia.com/vgpu.present")) == "true":
        return "parts of GPUs for virtual machines (vGPU): a process has a GPU to itself"
    return ""


def _of_devices(devices: Sequence[Mapping[str, Any]]) -> tuple[int, str, int | None, str]:
    """GPUs, their name, their memory in MiB and why they are refused, of a DRA driver's devices."""

    def text(device: Mapping[str, Any], name: str) -> str:
        value = inner(device, "attributes", name)
        return word(value.get("string")) if isinstance(value, dict) else ""

    whole = [one for one in devices if text(one, "type") in ("gpu", "")]
    if not whole:
        return len(devices), "gpu", None, "slices of GPUs (MIG): a process of a plan has a GPU to itself"
    names = sorted({text(one, "productName") for one in whole})
    if len(names) > 1:
        return (
            len(whole),
            "+".join(names),
            None,
            "GPUs of several kinds in one node: plan on nodes of one kind",
        )
    value = inner(whole[0], "capacity", "memory")
    amount = re.fullmatch(
        r"(\d{1,15})([A-Za-z]{0,2})", str(value.get("value") if isinstance(value, dict) else value)
    )
    scale = SCALES.get(amount[2]) if amount else None
    memory = int(amount[1]) * scale // 2**20 if amount and scale else None
    return len(whole), names[0] or "gpu", memory, slice_of(names[0])


def _judged(one: Mapping[str, Any], every: set[str]) -> tuple[str, str]:
    """What puts a node out of service, and why it takes no pods now."""
    ready = [c for c in items(inner(one, "status", "conditions")) if c.get("type") == "Ready"]
    if ready and ready[0].get("status") != "True":
        reason = word(ready[0].get("reason"))
        return "not ready", f"not ready{f': {reason}' if reason else ''}"
    if inner(one, "spec", "unschedulable") is True:
        return "cordoned", "cordoned"
    taints = [taint for taint in _taints(one) if taint not in every]
    broken = [taint for taint in taints if taint.startswith("node.kubernetes.io/")]
    if broken:
        return "tainted", f"tainted {broken[0]}"
    return "", f"tainted {taints[0]}" if taints else ""


def _quota(queues: Sequence[Mapping[str, Any]]) -> tuple[int | None, list[str]]:
    """GPUs that a ClusterQueue still gives: its nominal quota less what its flavors reserve.

    Kueue's ClusterQueue, v1beta1 and v1beta2. What may be borrowed from the cohort is not counted.
    """
    limits: dict[str, int] = {}
    for one in queues:
        name, given, limited = _name(one), 0, False
        for group in items(inner(one, "spec", "resourceGroups")):
            for flavor in items(group.get("flavors")):
                for resource in items(flavor.get("resources")):
                    if resource.get("name") in RESOURCES:
                        limited = True
                        given += count_of(resource.get("nominalQuota"), f"cluster queue {name}")
        for flavor in items(inner(one, "status", "flavorsReservation")):
            for resource in items(flavor.get("resources")):
                if resource.get("name") in RESOURCES:
                    given -= count_of(resource.get("total"), f"cluster queue {name}")
        if limited:
            limits[name] = max(0, given)
    if len(limits) > 1:
        raise InputError(
            f"several cluster queues give GPUs, {', '.join(sorted(limits)[:5])}: give that which you use"
        )
    for name, left in limits.items():
        return left, [f"cluster queue {name} still gives {left} GPUs; what it may borrow is not counted"]
    return None, []
