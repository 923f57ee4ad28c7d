"""Tasks in front of dstack's own classes. Reads [{"text"}]; prints what dstack read."""

import json
import sys

import yaml
from dstack._internal.core.models.configurations import parse_run_configuration
from dstack._internal.core.services import validate_dstack_resource_name
from dstack._internal.utils.interpolator import VariablesInterpolator


def judge(text):
    try:
        made = parse_run_configuration(yaml.safe_load(text))
        validate_dstack_resource_name(made.name)
        gpu = made.resources.gpu
        interpolate = VariablesInterpolator(
            {"run": {"args": "INJECTED"}}, skip=["secrets"]
        ).interpolate_or_error
        return {
            "ok": True,
            "type": made.type,
            "name": made.name,
            "nodes": made.nodes,
            "gpu": gpu.name,
            "count": [gpu.count.min, gpu.count.max],
            "memory": [float(gpu.memory.min), float(gpu.memory.max)] if gpu.memory else None,
            "image": made.image,
            "commands": [interpolate(one) for one in made.commands],
            "files": [[one.local_path, one.path] for one in made.files],
            "folder": made.working_dir,
        }
    except Exception as error:  # whatever it says of the task
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}


for case in json.load(sys.stdin):
    print(json.dumps(judge(case["text"]), default=str), flush=True)
