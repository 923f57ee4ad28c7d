"""ray_train.py on clusters of Ray whose nodes are processes here and whose GPUs are made up.

Reads [{"script", "nodes", "gpus", "free", "env"}]: the script is run as it is, on ``nodes`` nodes of which
``free`` have all GPUs free; ``torchrun`` is a program that writes down what it was given. Prints what it was
given, with which GPUs and variables, and how the script ended.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="1")
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group

TORCHRUN = """#!{python}
import json, os, sys, uuid
given = {{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}
open("{out}/" + uuid.uuid4().hex, "w").write(json.dumps(given))
sys.exit(int(os.environ.get("FAIL", "0")))
"""


def judge(case):
    home = pathlib.Path(tempfile.mkdtemp(prefix="ray"))
    out = home / "out"
    out.mkdir()
    torchrun = home / "torchrun"
    torchrun.write_text(TORCHRUN.format(python=sys.executable, out=out))
    torchrun.chmod(0o755)
    os.environ["PATH"] = f"{home}:{os.environ['PATH']}"
    script = home / "ray_train.py"
    script.write_text(case["script"])
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
    )
    for _ in range(case["nodes"]):
        cluster.add_node(num_cpus=1, num_gpus=case["gpus"], object_store_memory=80 << 20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    busy = case["nodes"] - case["free"]
    if busy:  # a GPU of as many nodes is taken
        taken = placement_group([{"GPU": 1}] * busy, strategy="STRICT_SPREAD")
        ray.get(taken.ready())
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    started = [json.loads(one.read_text()) for one in out.iterdir()]
    ray.shutdown()
    cluster.shutdown()
    return {
        "code": done.returncode,
        "error": done.stderr[-500:],
        "started": [
            {
                "argv": one["argv"],
                "cwd": one["cwd"],
                "gpus": one["env"].get("CUDA_VISIBLE_DEVICES"),
                "env": {name: one["env"].get(name) for name in case["env"]},
            }
            for one in started
        ],
    }


for case in json.load(sys.stdin):
    print(json.dumps(judge(case)), flush=True)
