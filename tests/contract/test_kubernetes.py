"""Jobs of Kubernetes in front of Kubernetes' schemas and Kubeflow's classes.

Versions: tests/contract/envs/kubernetes.txt. The definitions of Kueue, Volcano and KubeRay are in no package;
what is written is held against a table of their fields (tests/kubernetes_fields.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from planner.export.base import NotExpressible
from tests.contract import judged
from tests.kubernetes_fields import problems
from tests.planner.test_export_kubernetes import FULL, KINDS, documents, export
from tests.scheduled import many_subjects, subject

pytestmark = pytest.mark.contract


def manifest(made: Any) -> str:
    return str(next(iter(made.files.values())))


@pytest.mark.parametrize("kind", KINDS)
def test_random_plans_are_what_the_api_takes(kind: str) -> None:
    plans, texts, reasons = [], [], set[str]()
    for index, one in enumerate(many_subjects()):
        try:
            made = export(kind, one, **(FULL[kind] if index % 2 else {}))
        except NotExpressible as error:
            reasons.add(str(error).partition(" is no block of whole nodes")[0].partition("a stage of")[0])
            continue
        plans.append(one)
        texts.append(manifest(made))
        assert problems(documents(made)[1]) == []
    assert len(texts) >= 80, "most plans can be told"
    assert reasons <= {""}, "but for stages that are no block of nodes"
    for plan, found in zip(
        plans, judged("kubernetes", "kubernetes_jobs.py", [{"text": t} for t in texts]), strict=True
    ):
        assert found["ok"], found["errors"]
        if "nodes" in found:
            assert found["nodes"] == plan.nodes
        if "processes" in found:
            assert found["processes"] == plan.per_node


MUTATIONS = {
    "trainjob": ["numNodes", "numProcPerNode", "runtimeRef", "volumeMounts", "resourcesPerNode", "args"],
    "jobset": ["completionMode", "replicatedJobs", "failurePolicy", "restartPolicy", "workingDir", "subPath"],
    "volcano": ["tolerations", "containers", "mountPath", "emptyDir"],
    "pytorchjob": ["nprocPerNode", "runPolicy", "pytorchReplicaSpecs", "restartPolicy", "nodeSelector"],
    "rayjob": ["command", "containerPort", "configMap", "claimName"],
}


def renamed(node: Any, key: str) -> Any:
    """A document with a key misspelt wherever it is."""
    if isinstance(node, dict):
        return {(f"{k}s" if k == key else k): renamed(v, key) for k, v in node.items()}
    return [renamed(one, key) for one in node] if isinstance(node, list) else node


@pytest.mark.parametrize("kind", KINDS)
def test_misspelt_fields_are_found(kind: str) -> None:
    files, job = documents(export(kind, **FULL[kind]))
    cases = [{"text": yaml.safe_dump_all([files, renamed(job, key)])} for key in MUTATIONS[kind]]
    cases.append({"text": yaml.safe_dump_all([renamed(files, "data"), job])})
    for key, found in zip(
        [*MUTATIONS[kind], "data"], judged("kubernetes", "kubernetes_jobs.py", cases), strict=True
    ):
        if not (kind == "rayjob" and key == "command"):  # it has none: Ray starts its containers
            assert not found["ok"], key


def test_what_the_judge_refuses_by_type() -> None:
    def changed(kind: str, key: str, value: Any) -> dict[str, str]:
        def walk(node: Any) -> Any:
            if isinstance(node, dict):
                return {k: value if k == key else walk(v) for k, v in node.items()}
            return [walk(one) for one in node] if isinstance(node, list) else node

        files, job = documents(export(kind))
        return {"text": yaml.safe_dump_all([files, walk(job)])}

    cases = [
        changed("trainjob", "numProcPerNode", "auto"),
        changed("jobset", "parallelism", "four"),
        changed("pytorchjob", "nprocPerNode", 8),
        changed("volcano", "command", "torchrun"),
    ]
    assert not any(found["ok"] for found in judged("kubernetes", "kubernetes_jobs.py", cases))
    assert judged("kubernetes", "kubernetes_jobs.py", [{"text": manifest(export("jobset", subject()))}])[0][
        "ok"
    ]
