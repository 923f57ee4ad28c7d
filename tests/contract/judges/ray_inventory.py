"""A Ray cluster of nodes that claim GPUs: its own account of them, and which placement groups are ready.

Cases ``{"nodes", "busy", "sizes"}`` come as JSON: ``busy`` are GPUs that a placement group holds, each on
a node; a line back for each has ray.nodes() with what is free, `ray status -v`, and for each size whether a
group of so many whole nodes is ready at once.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

GPUS = 8


def free_gpus():
    return sum(one.get("GPU", 0) for one in available_resources_per_node().values())


def settled(wanted, seconds=15):
    end = time.monotonic() + seconds
    while free_gpus() != wanted and time.monotonic() < end:
        time.sleep(0.1)


def status_of(address, free, seconds=40):
    """The autoscaler writes it every few seconds: waits until it knows of what is reserved."""
    end = time.monotonic() + seconds
    while True:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("ray")), "status", "-v", "--address", address],
            capture_output=True,
            text=True,
            check=False,
        )
        total = re.search(r"([\d.]+)/([\d.]+) GPU(?: \(([\d.]+) used of ([\d.]+) reserved)?", done.stdout)
        left = (
            float(total[2]) - float(total[1]) - float(total[4] or 0) + float(total[3] or 0) if total else -1
        )
        if left == free or time.monotonic() > end:
            return done.stdout
        time.sleep(1)


cases = json.load(sys.stdin)
nodes = max(case["nodes"] for case in cases)
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
)
for _ in range(nodes):
    cluster.add_node(
        num_cpus=2,
        num_gpus=GPUS,
        resources={"accelerator_type:H100": 1},
        labels={"ray.io/accelerator-type": "H100"},
        object_store_memory=80 << 20,
    )
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
for case in cases:
    assert case["nodes"] == nodes
    held = []
    if case["busy"]:
        held = [placement_group([{"GPU": n} for n in case["busy"]], strategy="STRICT_SPREAD")]
        assert held[0].wait(30)
    free = nodes * GPUS - sum(case["busy"])
    settled(free)
    capture = {"nodes": ray.nodes(), "available": available_resources_per_node()}
    status = status_of(cluster.address, free)
    ready = {}
    for size in case["sizes"]:
        group = placement_group([{"GPU": GPUS}] * size, strategy="STRICT_SPREAD")
        ready[size] = group.wait(3)
        remove_placement_group(group)
        settled(free)
    for group in held:
        remove_placement_group(group)
    settled(nodes * GPUS)
    print(json.dumps({"capture": capture, "status": status, "ready": ready}), flush=True)
ray.shutdown()
cluster.shutdown()
