"""SkyPilot's and dstack's tasks, whose script runs here; the script that Ray runs."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.errors import InputError
from planner.export import module_of
from planner.export.base import Export, NotExpressible
from tests.scheduled import NASTY, made, random_subjects, subject

TOOLS = {
    "skypilot": ("sky.yaml", ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE")),
    "dstack": ("task.dstack.yml", ("DSTACK_NODE_RANK", "DSTACK_NODES_NUM", "DSTACK_GPUS_PER_NODE")),
}
FIRST = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "DSTACK_MASTER_NODE_IP": "10.0.0.1"}


def export(tool: str, of: Any = None, **settings: str) -> Export:
    result: Export = module_of(tool).export(of or subject(name=NASTY), made(), settings)
    return result


def run(tool: str, folder: Path, rank: str, nodes: str, gpus: str) -> subprocess.CompletedProcess[str]:
    """The script on a node, where torchrun writes down what it was given."""
    for name, text in export(tool).files.items():
        (folder / name).write_text(text)
    torchrun = folder / "torchrun"
    torchrun.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))\n"
    )
    torchrun.chmod(0o755)
    variables = dict(zip(TOOLS[tool][1], (rank, nodes, gpus), strict=True))
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        **FIRST,
        **variables,
    }
    return subprocess.run(
        ["bash", str(folder / "run.sh")], env=env, capture_output=True, text=True, check=False, cwd="/"
    )


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_node_starts_its_ranks_with_words_as_they_were_written(tool: str, tmp_path: Path) -> None:
    done = run(tool, tmp_path, "2", "4", "8")
    assert done.returncode == 0, done.stderr
    words, env, folder = json.loads(done.stdout)
    place = ["--node-rank", "2", "--master-addr", "10.0.0.1", "--master-port", "29500"]
    assert words == ["--nnodes", "4", "--nproc-per-node", "8", *place, *made().program]
    assert {name: env[name] for name in made().env} == made().env
    assert folder == str(tmp_path)


@pytest.mark.parametrize("tool", sorted(TOOLS))
@pytest.mark.parametrize(("nodes", "gpus"), [("3", "8"), ("4", "4")])
def test_other_nodes_than_the_plan_s_are_refused(tool: str, nodes: str, gpus: str, tmp_path: Path) -> None:
    done = run(tool, tmp_path, "0", nodes, gpus)
    assert done.returncode == 3
    assert f"the plan is of 4 nodes with 8 GPUs, these are {nodes} with {gpus}" in done.stderr


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_scripts_are_clean(tool: str, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    for one in (subject(name=NASTY), *random_subjects(3)):
        script.write_text(export(tool, one).files["run.sh"])
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
        if shellcheck := shutil.which("shellcheck"):  # SC2016: what is not to be expanded is quoted so
            words = [shellcheck, "--exclude=SC2016", str(script)]
            assert subprocess.run(words, check=False).returncode == 0


def test_a_task_of_skypilot_names_nodes_and_gpus() -> None:
    task = yaml.safe_load(
        export("skypilot", infra="aws/us-east-1", network="best", image="r/t:1").files["sky.yaml"]
    )
    assert task["num_nodes"] == 4
    assert task["resources"] == {
        "accelerators": "H100:8",
        "image_id": "docker:r/t:1",
        "infra": "aws/us-east-1",
        "network_tier": "best",
    }
    assert (task["workdir"], task["run"]) == (".", "bash run.sh\n")
    assert export("skypilot").submit == ("sky", "launch", "sky.yaml")
    placed = yaml.safe_load(export("skypilot", workdir="/opt/m").files["sky.yaml"])
    assert "workdir" not in placed
    assert placed["file_mounts"]["/opt/m/plan.args"] == "./plan.args"


def test_a_task_of_dstack_names_nodes_and_gpus() -> None:
    task = yaml.safe_load(export("dstack", shm="64GB", fleet="big").files["task.dstack.yml"])
    assert (task["type"], task["nodes"], task["fleets"]) == ("task", 4, ["big"])
    assert task["resources"] == {"gpu": {"name": "H100", "memory": "80GB", "count": 8}, "shm_size": "64GB"}
    assert task["commands"] == ["bash /workspace/run.sh"]
    assert export("dstack").submit == ("dstack", "apply", "-f", "task.dstack.yml")


@pytest.mark.parametrize(
    ("tool", "settings", "rule"),
    [
        ("skypilot", {"infra": "aws us"}, "infrastructure, as in aws/us-east-1"),
        ("skypilot", {"network": "fast"}, "best or standard"),
        ("skypilot", {"accelerators": "H100:8"}, "a name as SkyPilot's catalog has it"),
        ("skypilot", {"workdir": "/$HOME"}, "a folder from / on"),
        ("dstack", {"gpu": "H100:8"}, "a name as gpuhunt has it"),
        ("dstack", {"shm": "64"}, "a size, as in 64GB"),
        ("dstack", {"fleet": "Big"}, "a fleet's name"),
        ("dstack", {"image": "${{ secrets.x }}"}, "an image"),
        ("dstack", {"name": "$(x)"}, "lower-case letters"),
    ],
)
def test_settings_that_cannot_be_are_refused(tool: str, settings: dict[str, str], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        export(tool, **settings)


@pytest.mark.parametrize(("tool", "name"), [("skypilot", "accelerators"), ("dstack", "gpu")])
def test_gpus_that_a_tool_has_no_name_for_are_refused_but_may_be_named(tool: str, name: str) -> None:
    other = subject("2x8xH800")
    with pytest.raises(NotExpressible, match=f"H800-SXM-80GB is not known here: --set {name}=NAME"):
        export(tool, other)
    assert export(tool, other, **{name: "H800"}).files


def test_names_of_gpus_are_the_catalog_s() -> None:
    from planner.catalog import load_gpu
    from planner.schedulers import dstack, skypilot

    for gpu in {*skypilot.ACCELERATORS, *dstack.GPUS}:
        assert load_gpu(gpu).name == gpu
        assert dstack.GPUS[gpu][1] == load_gpu(gpu).marketed_gb


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_file_that_is_there_already_is_not_written_over(tool: str) -> None:
    with pytest.raises(NotExpressible, match=r"a file called run\.sh"):
        module_of(tool).export(subject(), made(files={"run.sh": ""}), {})


def test_what_ray_runs_is_python_with_literals() -> None:
    made_of = module_of("rayjob").export(subject(name=NASTY), made(), {"image": "r/t:1"})
    files, _ = yaml.safe_load_all(made_of.files["rayjob.yaml"])
    script = files["data"]["ray_train.py"]
    tree = ast.parse(script)
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert values == {"NODES": 4, "GPUS": 8, "FOLDER": "/workspace", "ENV": dict(made().env)}
    space: dict[str, Any] = {}
    command = next(one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == "command")
    exec(compile(ast.Module([command], []), "command", "exec"), space)
    place = ["--node-rank", "2", "--master-addr", "10.0.0.1", "--master-port", "1234"]
    assert space["command"]("2", "10.0.0.1", "1234") == [
        *("torchrun", "--nnodes", "4", "--nproc-per-node", "8"),
        *place,
        *made().program,
    ]
    imported = [one.module or "" for one in tree.body if isinstance(one, ast.ImportFrom)]
    assert imported == ["ray.util.placement_group", "ray.util.scheduling_strategies"]
