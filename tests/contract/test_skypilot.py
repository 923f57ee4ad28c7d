"""Tasks in front of SkyPilot's parser (tests/contract/envs/skypilot.txt)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from planner.export import module_of
from planner.export.base import Export, NotExpressible
from tests.contract import judged
from tests.scheduled import made, many_subjects, subject

pytestmark = pytest.mark.contract


def written(export: Export, folder: Path) -> dict[str, str]:
    """A case: the files in a folder, as SkyPilot looks for them."""
    folder.mkdir()
    for name, text in export.files.items():
        (folder / name).write_text(text)
    return {"text": export.files["sky.yaml"], "folder": str(folder)}


def test_random_plans_are_read_with_their_nodes_and_gpus(tmp_path: Path) -> None:
    plans, cases = [], []
    for index, one in enumerate(many_subjects()):
        settings = {"image": "registry/train:1", "workdir": "/opt/m", "infra": "k8s", "network": "best"}
        try:
            export = module_of("skypilot").export(one, made(), settings if index % 2 else {})
        except NotExpressible:
            pytest.fail(f"{one.plan.gpu} has a name in SkyPilot")
        plans.append(one)
        cases.append(written(export, tmp_path / str(index)))
    for index, found in enumerate(judged("skypilot", "skypilot_tasks.py", cases)):
        assert found["ok"], found
        one = plans[index]
        assert found["nodes"] == one.nodes
        assert sum(found["gpus"].values()) == one.per_node
        if index % 2:
            assert found["run"] == "bash /opt/m/run.sh\n"
            assert set(found["mounts"]) == {"/opt/m/plan.args", "/opt/m/train.py", "/opt/m/run.sh"}
        else:
            assert (found["run"], found["workdir"]) == ("bash run.sh\n", ".")


def test_what_skypilot_refuses_is_not_written(tmp_path: Path) -> None:
    export = module_of("skypilot").export(subject(), made(), {})
    task = yaml.safe_load(export.files["sky.yaml"])
    cases = []
    for index, wrong in enumerate(
        ({"num_node": 4}, {"num_nodes": "four"}, {"resources": {"accelerator": "H100:8"}}, {"run": 1})
    ):
        cases.append(written(export, tmp_path / str(index)) | {"text": yaml.safe_dump({**task, **wrong})})
    assert not any(found["ok"] for found in judged("skypilot", "skypilot_tasks.py", cases))
