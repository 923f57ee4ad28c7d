"""Inventories of Kubernetes and Ray, from captures written by hand.

Kubernetes' by the API's reference, GPU Feature Discovery's README (labels), the DRA driver's ResourceSlices
(v1beta1 and v1), Kueue's ClusterQueue; Ray's by ray.nodes() and `ray status -v` of 2.60.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.discovery.clusters import cluster_of
from planner.discovery.inventory import Inventory
from planner.errors import InputError
from tests.planner.test_discovery import counts, read

H200 = {
    "nvidia.com/gpu.product": "NVIDIA-H200",
    "nvidia.com/gpu.memory": "143771",
    "nvidia.com/gpu.count": "8",
}


def node(name: str, gpus: int = 8, able: int | None = None, **more: Any) -> dict[str, Any]:
    ready = more.get("ready", "True")
    held = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {**H200, **more.get("labels", {})}},
        "spec": {
            "taints": [
                dict(zip(("key", "value", "effect"), one, strict=True)) for one in more.get("taints", [])
            ],
            "unschedulable": more.get("cordoned", False),
        },
        "status": {
            "capacity": {"cpu": "192", **held, **more.get("resources", {})},
            "allocatable": {
                "cpu": "190",
                **({"nvidia.com/gpu": str(able if able is not None else gpus)} if gpus else {}),
            },
            "conditions": [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": ready}],
        },
    }


def pod(on: str | None, *gpus: int, phase: str = "Running", first: tuple[Any, ...] = ()) -> dict[str, Any]:
    def container(count: int, **more: Any) -> dict[str, Any]:
        return {"resources": {"limits": {"nvidia.com/gpu": str(count)}}, **more}

    inits = [
        container(one) if isinstance(one, int) else container(one[0], restartPolicy="Always") for one in first
    ]
    spec = {"containers": [container(one) for one in gpus], "initContainers": inits}
    return {
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": spec | ({"nodeName": on} if on else {}),
        "status": {"phase": phase},
    }


def k8s(tmp_path: Path, *lists: list[dict[str, Any]], **said: str) -> Inventory:
    texts = [json.dumps({"apiVersion": "v1", "kind": "List", "items": one}) for one in lists]
    return read(tmp_path, *texts, source="k8s", **said)


def test_pods_take_gpus_while_they_run(tmp_path: Path) -> None:
    nodes = [node(name) for name in "abcdef"]
    pods = [
        pod("a", 4, 4),
        pod("b", 2, phase="Succeeded"),
        pod("c", 1, first=(6,)),
        pod("d", 2, first=([1], 5)),
        pod("e", 0),
        pod(None, 8, phase="Pending"),
    ]
    (pool,) = k8s(tmp_path, nodes, pods).pools
    assert {one.name: one.free for one in pool.nodes} == {"a": 0, "b": 8, "c": 2, "d": 2, "e": 8, "f": 8}
    assert (pool.name, counts(pool)) == ("8xH200-SXM-141GB", (6, 6, 3))


def test_without_pods_it_is_not_known_what_is_free(tmp_path: Path) -> None:
    found = k8s(tmp_path, [node("a"), node("b", cordoned=True)])
    pool = found.pool()
    assert not pool.known
    assert [one.free for one in pool.nodes] == [None, 0]
    assert any("what is free is not known" in note for note in found.notes)
    with pytest.raises(InputError, match="was not said"):
        cluster_of(found, pool, None, "now")
    assert cluster_of(found, pool, None).num_gpus == 8


def test_nodes_that_take_no_pods_are_out_or_held(tmp_path: Path) -> None:
    nodes = [
        node("fine", taints=[("nvidia.com/gpu", "present", "NoSchedule"), ("x", "y", "PreferNoSchedule")]),
        node("cordoned", cordoned=True),
        node("gone", ready="Unknown"),
        node("lost one", able=7),
        node("team", taints=[("team", "b", "NoSchedule")]),
        node("full", taints=[("node.kubernetes.io/disk-pressure", "", "NoSchedule")]),
        node("cpu", gpus=0, taints=[("cpu", "", "NoSchedule")]),
    ]
    (pool,) = k8s(tmp_path, nodes, [pod(None, 0)]).pools
    assert {one.name: (one.healthy, one.free, one.why) for one in pool.nodes} == {
        "fine": (8, 8, ""),
        "cordoned": (0, 0, "cordoned"),
        "gone": (0, 0, "not ready"),
        "lost one": (7, 7, "1 of 8 GPUs not healthy"),
        "team": (8, 0, "tainted team=b:NoSchedule"),
        "full": (0, 0, "tainted node.kubernetes.io/disk-pressure:NoSchedule"),
    }


def test_a_taint_of_every_node_is_one_for_jobs_to_tolerate(tmp_path: Path) -> None:
    nodes = [node(name, taints=[("gpus", "only", "NoSchedule")]) for name in "ab"]
    found = k8s(tmp_path, nodes, [pod(None, 0)])
    assert counts(found.pool()) == (2, 2, 2)
    assert "every node with GPUs is tainted gpus=only:NoSchedule: the job has to tolerate it" in found.notes


@pytest.mark.parametrize(
    ("labels", "resources", "reason"),
    [
        ({"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3-MIG-1g.10gb"}, {}, "MIG"),
        ({}, {"nvidia.com/mig-1g.10gb": "7"}, "MIG"),
        (
            {"nvidia.com/gpu.product": "NVIDIA-H200-SHARED", "nvidia.com/gpu.replicas": "4"},
            {},
            "time slicing",
        ),
        ({"nvidia.com/gpu.replicas": "2"}, {}, "time slicing"),
        ({"nvidia.com/gpu.replicas": "2", "nvidia.com/gpu.sharing-strategy": "mps"}, {}, "MPS"),
        ({"nvidia.com/gpu.product": "GRID-A100-40C"}, {}, "vGPU"),
        ({"nvidia.com/vgpu.present": "true"}, {}, "vGPU"),
        (
            {"nvidia.com/gpu.product": "NVIDIA-H200", "nvidia.com/gpu.memory": "100000"},
            {},
            "no kind of the catalog",
        ),
    ],
)
def test_parts_of_gpus_are_refused_with_the_reason(
    tmp_path: Path, labels: dict[str, str], resources: dict[str, str], reason: str
) -> None:
    odd = node("odd", gpus=0 if resources else 8, labels=labels, resources=resources)
    found = k8s(tmp_path, [node("fine"), odd], [pod(None, 0)])
    assert [(one.nodes, reason in one.reason) for one in found.refused] == [(("odd",), True)]
    assert len(found.pool().nodes) == 1


def test_racks_and_nvlink_domains_come_from_labels(tmp_path: Path) -> None:
    gb200 = {"nvidia.com/gpu.product": "NVIDIA-GB200", "nvidia.com/gpu.memory": "189471"}
    nodes = [
        node(
            f"t{n}",
            gpus=4,
            labels={
                **gb200,
                "nvidia.com/gpu.clique": f"c0ffee.{n // 18}",
                "fabric.topograph.run/tier-0": "l1",
            },
        )
        for n in range(36)
    ]
    found = k8s(tmp_path, nodes, [pod(None, 0)])
    pool = found.pool()
    made = cluster_of(found, pool, None)
    assert (pool.name, made.num_gpus, made.gpus_per_node, made.domain) == ("4xGB200-NVL72-186GB", 144, 4, 72)
    assert "2 NVLink domains of 18 nodes" in made.assumptions
    torn = k8s(tmp_path, nodes[:20], [pod(None, 0)])
    assert (
        "NVLink domains of 18 nodes, though 2 have 2 to 18" in cluster_of(torn, torn.pool(), None).assumptions
    )
    aws = [
        node(
            n,
            labels={
                "topology.k8s.aws/network-node-layer-3": f"nn-{n}",
                "topology.k8s.aws/network-node-layer-1": "x",
            },
        )
        for n in "ab"
    ]
    assert k8s(tmp_path, aws, [pod(None, 0)]).pool().leaves() == {"nn-a": 1, "nn-b": 1}


def device(name: str, product: str = "NVIDIA H100 80GB HBM3", kind: str = "gpu") -> dict[str, Any]:
    return {
        "name": name,
        "attributes": {"type": {"string": kind}, "productName": {"string": product}},
        "capacity": {"memory": {"value": "81559Mi"}},
    }


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_devices_of_a_dra_driver_are_gpus_too(tmp_path: Path, version: str) -> None:
    devices = [device(f"gpu-{n}") for n in range(8)]
    if version == "v1beta1":
        devices = [
            {"name": one["name"], "basic": {k: v for k, v in one.items() if k != "name"}} for one in devices
        ]
    slices = [
        {
            "kind": "ResourceSlice",
            "spec": {"driver": driver, "nodeName": name, "pool": {"name": name}, "devices": devices},
        }
        for name in "ab"
        for driver in ("gpu.nvidia.com", "compute-domain.nvidia.com")
    ]
    bare = [node(name, gpus=0, labels=dict.fromkeys(H200, "")) for name in "ab"]
    claim = {
        "kind": "ResourceClaim",
        "status": {
            "allocation": {
                "devices": {"results": [{"pool": "a", "device": "gpu-1", "driver": "gpu.nvidia.com"}]}
            }
        },
    }
    found = k8s(tmp_path, bare, slices, [pod(None, 0)])
    assert found.pool().name == "8xH100-SXM-80GB"
    assert not found.pool().known
    known = k8s(tmp_path, bare, slices, [pod(None, 0)], [claim])
    assert [one.free for one in known.pool().nodes] == [7, 8]


def queue(name: str, quota: str, total: str) -> dict[str, Any]:
    return {
        "kind": "ClusterQueue",
        "metadata": {"name": name},
        "spec": {
            "resourceGroups": [
                {
                    "coveredResources": ["cpu", "nvidia.com/gpu"],
                    "flavors": [
                        {
                            "name": "h200",
                            "resources": [
                                {"name": "cpu", "nominalQuota": "1k"},
                                {"name": "nvidia.com/gpu", "nominalQuota": quota},
                            ],
                        }
                    ],
                }
            ]
        },
        "status": {
            "flavorsReservation": [
                {"name": "h200", "resources": [{"name": "nvidia.com/gpu", "total": total}]}
            ]
        },
    }


def test_a_queue_gives_no_more_than_its_quota(tmp_path: Path) -> None:
    nodes = [node(name) for name in "abcd"]
    found = k8s(tmp_path, nodes, [pod(None, 0)], [queue("team", "28", "8")])
    assert found.pool().quota == 20
    assert cluster_of(found, found.pool(), None, "now").num_gpus == 16
    assert "cluster queue team still gives 20 GPUs; what it may borrow is not counted" in found.notes
    with pytest.raises(InputError, match="several cluster queues"):
        k8s(tmp_path, nodes, [queue("a", "1", "0"), queue("b", "1", "0")])


def test_documents_after_each_other_are_read_as_several_files(tmp_path: Path) -> None:
    both = json.dumps({"kind": "NodeList", "items": [{k: v for k, v in node("a").items() if k != "kind"}]})
    both += "\n" + json.dumps({"kind": "List", "items": [pod("a", 3)]}) + "\n"
    assert read(tmp_path, both, source="k8s").pool().nodes[0].free == 5


RAY = [
    {
        "NodeID": "aa",
        "Alive": True,
        "NodeManagerHostname": "w1",
        "Resources": {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H200": 1.0},
    },
    {
        "NodeID": "bb",
        "Alive": True,
        "NodeManagerHostname": "w2",
        "Resources": {"GPU": 8.0},
        "Labels": {"ray.io/accelerator-type": "H200"},
    },
    {
        "NodeID": "cc",
        "Alive": False,
        "NodeManagerHostname": "w3",
        "Resources": {"GPU": 8.0, "accelerator_type:H200": 1.0},
    },
    {"NodeID": "dd", "Alive": True, "NodeManagerHostname": "head", "Resources": {"CPU": 4.0}},
]
STATUS = """======== Autoscaler status: 2026-01-05 10:00:00.000000 ========
Resources
---------------------------------------------------------------
Total Usage:
 4.5/24.0 GPU (1.5 used of 4.0 reserved in placement groups)

Node: w1 (gpu-group)
 Usage:
  3.0/8.0 GPU
  0.0/1.0 accelerator_type:H200
Node: w2 (gpu-group)
 Usage:
  1.5/8.0 GPU (1.5 used of 4.0 reserved in placement groups)
  0.0/1.0 accelerator_type:H200
 Activity:
  Busy workers on node.
Node: w3
 Usage:
  0.5/8.0 GPU
  0.0/1.0 accelerator_type:H200
Node: head
 Usage:
  0.0/4.0 CPU
"""


def test_rays_nodes_are_read_from_json(tmp_path: Path) -> None:
    whole = {"nodes": RAY, "available": {"aa": {"CPU": 90.0}, "bb": {"GPU": 8.0}, "cc": {"GPU": 8.0}}}
    pool = read(tmp_path, json.dumps(whole), source="ray").pool()
    assert {one.name: (one.healthy, one.free) for one in pool.nodes} == {
        "w1": (8, 0),
        "w2": (8, 8),
        "w3": (0, 0),
    }
    alone = read(tmp_path, json.dumps(RAY), source="ray").pool()
    assert [one.free for one in alone.nodes] == [None, None, 0]
    listed = [
        {
            "node_id": "aa",
            "node_ip": "10.0.0.1",
            "state": "ALIVE",
            "resources_total": {"GPU": 4.0},
            "labels": {"ray.io/accelerator-type": "A100-80G"},
        }
    ]
    assert read(tmp_path, json.dumps(listed), source="ray").pool().name == "4xA100-SXM-80GB"


def test_rays_status_counts_what_placement_groups_reserve_as_used(tmp_path: Path) -> None:
    pool = read(tmp_path, STATUS, source="ray").pool()
    assert {one.name: one.free for one in pool.nodes} == {"w1": 5, "w2": 4, "w3": 7}
    with pytest.raises(InputError, match="ray status -v"):
        read(tmp_path, STATUS.split("Node: ")[0], source="ray")
