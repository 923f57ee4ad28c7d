"""Tasks in front of dstack's classes (tests/contract/envs/dstack.txt)."""

from __future__ import annotations

import pytest
import yaml

from planner.export import module_of
from tests.contract import judged
from tests.scheduled import made, many_subjects, subject

pytestmark = pytest.mark.contract


def test_random_plans_are_read_with_their_nodes_and_gpus() -> None:
    settings = {"image": "registry/train:1", "workdir": "/opt/m", "shm": "64GB", "fleet": "big"}
    cases = [
        {"text": module_of("dstack").export(one, made(), settings if i % 2 else {}).files["task.dstack.yml"]}
        for i, one in enumerate(many_subjects())
    ]
    for index, found in enumerate(judged("dstack", "dstack_tasks.py", cases)):
        assert found["ok"], found
        one, folder = many_subjects()[index], "/opt/m" if index % 2 else "/workspace"
        assert found["nodes"] == one.nodes
        assert found["count"] == [one.per_node, one.per_node]
        assert found["memory"] == [one.cluster.gpu.marketed_gb] * 2
        assert found["commands"] == [f"bash {folder}/run.sh"]
        assert found["files"] == [[n, f"{folder}/{n}"] for n in ("plan.args", "train.py", "run.sh")]


def test_what_dstack_refuses_is_not_written() -> None:
    task = yaml.safe_load(module_of("dstack").export(subject(), made(), {}).files["task.dstack.yml"])
    wrong = (
        {"node": 4},
        {"nodes": "four"},
        {"resources": {"gpus": "H100:8"}},
        {"name": "A b"},
        {"type": "tasks"},
    )
    cases = [{"text": yaml.safe_dump({**task, **one})} for one in wrong]
    assert not any(found["ok"] for found in judged("dstack", "dstack_tasks.py", cases))
