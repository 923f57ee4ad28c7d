"""ray_train.py, run by Ray on clusters of made-up GPUs (tests/contract/envs/ray.txt)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract import judged
from tests.planner.test_export_kubernetes import documents, export
from tests.scheduled import made, subject

pytestmark = [pytest.mark.contract, pytest.mark.slow]


def case(gpus: str, nodes: int, free: int, folder: Path, **more: Any) -> dict[str, Any]:
    one = subject(gpus, tensor_parallel=1, pipeline_parallel=1)
    files = documents(export("rayjob", one, made(**more), workdir=str(folder), wait="15"))[0]
    names = list(made(**more).env)
    script = files["data"]["ray_train.py"]
    return {"script": script, "nodes": nodes, "gpus": one.per_node, "free": free, "env": names}


def test_ray_starts_a_node_s_processes_on_every_node_with_all_its_gpus(tmp_path: Path) -> None:
    cases = [
        case("3x4xH100", 4, 3, tmp_path),
        case("1x2xH100", 1, 1, tmp_path),
        case("3x4xH100", 3, 2, tmp_path),
        case("1x2xH100", 1, 1, tmp_path, env={"FAIL": "7"}),
    ]
    three, one, busy, failed = judged("ray", "ray_nodes.py", cases)
    assert (three["code"], one["code"]) == (0, 0), three["error"] + one["error"]
    started = sorted(three["started"], key=lambda each: each["argv"][5])
    assert [each["argv"][:6] for each in started] == [
        ["--nnodes", "3", "--nproc-per-node", "4", "--node-rank", str(rank)] for rank in range(3)
    ]
    assert len({tuple(each["argv"][6:10]) for each in started}) == 1, "one address and port"
    for each in (*started, *one["started"]):
        assert each["argv"][10:] == list(made().program)
        assert each["env"] == made().env
        assert each["cwd"] == str(tmp_path)
    assert {each["gpus"] for each in started} == {"0,1,2,3"}
    assert [each["gpus"] for each in one["started"]] == ["0,1"]
    assert (busy["code"], busy["started"]) == (1, [])
    assert "no 3 nodes with 4 free GPUs each within 15 s" in busy["error"]
    assert failed["code"] == 1
    assert "a node's processes ended with 7" in failed["error"]
