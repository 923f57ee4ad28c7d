"""Tasks in front of SkyPilot's schemas and its parser. Reads [{"text", "folder"}]; prints what it read."""

import json
import os
import sys

os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
import yaml
from sky import Task
from sky.utils import common_utils, schemas


def judge(case):
    config = yaml.safe_load(case["text"])
    os.chdir(case["folder"])
    try:
        common_utils.validate_schema(config, schemas.get_task_schema(), "task: ")
        task = Task.from_yaml_config(dict(config))
        (found,) = task.resources
        return {
            "ok": True,
            "name": task.name,
            "nodes": task.num_nodes,
            "gpus": found.accelerators,
            "image": found.image_id,
            "run": task.run,
            "mounts": task.file_mounts,
            "workdir": task.workdir,
            "network": str(found.network_tier.value) if found.network_tier else None,
        }
    except Exception as error:  # whatever it says of the task
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}


for case in json.load(sys.stdin):
    print(json.dumps(judge(case), default=str), flush=True)
