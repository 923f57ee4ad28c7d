"""Jobs of Kubernetes: where ranks land, what is inert, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from planner.errors import InputError
from planner.export import SCHEDULERS, module_of
from planner.export.base import Export, NotExpressible
from planner.schedulers import jobset, pytorchjob, trainjob, volcano
from planner.schedulers import ray as rayjob
from tests.kubernetes_fields import kueue_problems, problems
from tests.scheduled import NASTY, expanded, made, random_subjects, subject

IMAGE = {"image": "registry/train:1"}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KINDS = ("trainjob", "jobset", "volcano", "pytorchjob", "rayjob")
VARIABLES = {
    "trainjob": {"PET_NODE_RANK": "2", "PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "29500"},
    "jobset": {"JOB_COMPLETION_INDEX": "2"},
    "volcano": {"VC_TASK_INDEX": "2"},
    "pytorchjob": {"PET_NODE_RANK": "2", "PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "23456"},
}
ADDRESS = {
    "trainjob": "first",
    "jobset": "{name}-worker-0-0.{name}",
    "volcano": "{name}-worker-0.{name}",
    "pytorchjob": "first",
}


def export(kind: str, of: Any = None, export_of: Export | None = None, **settings: str) -> Export:
    given = {name.replace("_", "-"): value for name, value in settings.items()}
    result: Export = module_of(kind).export(of or subject(), export_of or made(), {**IMAGE, **given})
    return result


def documents(export: Export) -> list[Any]:
    """The manifest's documents."""
    return list(yaml.load_all(next(iter(export.files.values())), LOADER))


def found(node: Any, key: str) -> list[Any]:
    """Every value under a key, wherever it is."""
    if isinstance(node, dict):
        return [x for k, v in node.items() for x in ([v] if k == key else found(v, key))]
    return [x for one in node for x in found(one, key)] if isinstance(node, list) else []


def started(kind: str, job: Any) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of the first container as Kubernetes gives them to it."""
    place = job["spec"]["trainer"] if kind == "trainjob" else found(job, "containers")[0][0]
    env = {one["name"]: one["value"] for one in place["env"]}
    variables = {**env, **VARIABLES[kind], "HOME": "/root", "X": "x", "Y": "y"}
    words = [*place["command"], *place.get("args", [])]
    return [expanded(one, variables) for one in words], {k: expanded(v, variables) for k, v in env.items()}


@pytest.mark.parametrize("kind", sorted(VARIABLES))
def test_ranks_are_where_the_plan_has_them_and_the_rest_is_as_it_was_written(kind: str) -> None:
    words, env = started(kind, documents(export(kind))[1])
    if kind == "trainjob":
        assert words[:2] == ["env", "--chdir=/workspace"]
        words = words[2:]
    port = {"pytorchjob": "23456"}.get(kind, "29500")
    address = ADDRESS[kind].format(name=f"llama-test-{subject().digest[:8]}")
    place = ["--node-rank", "2", "--master-addr", address, "--master-port", port]
    assert words == ["torchrun", "--nnodes", "4", "--nproc-per-node", "8", *place, *made().program]
    assert env == made().env


@pytest.mark.parametrize("kind", KINDS)
def test_files_travel_as_they_are_and_lie_where_the_program_starts(kind: str) -> None:
    files, job = documents(export(kind))
    assert {name: files["data"][name] for name in made().files} == made().files
    for mounts in found(job, "volumeMounts"):
        assert {
            "name": "planner-files",
            "mountPath": "/workspace/plan.args",
            "subPath": "plan.args",
            "readOnly": True,
        } in mounts
    claimed = found(found(job, "volumes"), "configMap")
    assert claimed
    assert (
        {one["name"] for one in claimed}
        == {files["metadata"]["name"]}
        == {f"llama-test-{subject().digest[:8]}-files"}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_has_its_node_s_gpus(kind: str) -> None:
    for gpus, name in (("2x4xMI300X", "amd.com/gpu"), ("2x4xH100", "nvidia.com/gpu")):
        job = documents(export(kind, subject(gpus)))[1]
        limits = found(job, "limits")
        assert limits
        assert all(one == {name: "4"} for one in limits)
        assert all(one[0]["key"] == name for one in found(job, "tolerations"))


@pytest.mark.parametrize("kind", KINDS)
def test_settings_reach_the_pods(kind: str) -> None:
    job = documents(
        export(
            kind,
            namespace="train",
            workdir="/opt/megatron",
            cpu="96",
            memory="1.5Ti",
            shm="64Gi",
            pvc="data:/data",
            pull_secret="regcred",
            gpu_product="NVIDIA-H100-80GB-HBM3",
            node_selector="pool=h100,topology.kubernetes.io/zone=a",
            rdma="rdma/hca:8",
        )
    )
    manifest = job[1]
    assert [one["metadata"]["namespace"] for one in job] == ["train", "train"]
    assert found(manifest, "limits")[0] == {
        "nvidia.com/gpu": "8",
        "cpu": "96",
        "memory": "1.5Ti",
        "rdma/hca": "8",
    }
    assert found(manifest, "nodeSelector")[0] == {
        "pool": "h100",
        "topology.kubernetes.io/zone": "a",
        "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
    }
    assert {"name": "planner-data", "mountPath": "/data"} in found(manifest, "volumeMounts")[0]
    assert found(manifest, "emptyDir")[0] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert found(manifest, "imagePullSecrets")[0] == [{"name": "regcred"}]
    assert found(manifest, "capabilities")[0] == {"add": ["IPC_LOCK"]}
    assert "/opt/megatron/train.py" in found(manifest, "mountPath")


@pytest.mark.parametrize("kind", [one for one in KINDS if one != "trainjob"])
def test_the_node_s_network_where_it_is_wanted(kind: str) -> None:
    job = documents(export(kind, host_network="yes"))[1]
    assert found(job, "hostNetwork")
    assert set(found(job, "dnsPolicy")) == {"ClusterFirstWithHostNet"}
    assert not found(documents(export(kind, host_network="no"))[1], "hostNetwork")


def test_a_trainjob_cannot_have_the_node_s_network() -> None:
    with pytest.raises(NotExpressible, match="node's network: its runtime can, or use --to jobset"):
        export("trainjob", host_network="yes")


def test_stages_are_slices_for_kueue() -> None:
    four = subject("16x8xH100", pipeline_parallel=4)
    for kind in ("trainjob", "jobset"):
        job = documents(export(kind, four, queue="train", topology="net/block", stage_topology="net/rack"))[1]
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "train"
        assert found(job, "annotations") == [
            {
                "kueue.x-k8s.io/podset-required-topology": "net/block",
                "kueue.x-k8s.io/podset-slice-required-topology": "net/rack",
                "kueue.x-k8s.io/podset-slice-size": "4",
            }
        ]


def test_stages_are_partitions_for_volcano() -> None:
    job = documents(export("volcano", subject("16x8xH100", pipeline_parallel=4), tier="2", stage_tier="1"))[1]
    task = job["spec"]["tasks"][0]
    assert job["spec"]["minAvailable"] == task["minAvailable"] == task["replicas"] == 16
    assert task["partitionPolicy"] == {
        "totalPartitions": 4,
        "partitionSize": 4,
        "networkTopology": {"mode": "hard", "highestTierAllowed": 1},
    }
    assert job["spec"]["networkTopology"] == {"mode": "hard", "highestTierAllowed": 2}


@pytest.mark.parametrize(("kind", "name"), [("jobset", "stage_topology"), ("volcano", "stage_tier")])
def test_a_stage_that_fills_no_nodes_is_no_slice(kind: str, name: str) -> None:
    small = subject("1x8xH100")
    value = {"stage_topology": "net/rack", "stage_tier": "1"}[name]
    with pytest.raises(NotExpressible, match="is no block of whole nodes of 8 GPUs: leave"):
        export(kind, small, queue="train", **{name: value})


@pytest.mark.parametrize("kind", ["pytorchjob", "rayjob"])
def test_kinds_without_an_index_over_all_pods_keep_no_stages_together(kind: str) -> None:
    with pytest.raises(NotExpressible, match="use --to trainjob or --to jobset for stage-topology"):
        export(kind, queue="train", stage_topology="net/rack")


def test_master_and_workers_of_a_pytorchjob_are_one_group_for_kueue() -> None:
    job = documents(export("pytorchjob", queue="train", topology="net/block"))[1]
    specs = job["spec"]["pytorchReplicaSpecs"]
    assert (specs["Master"]["replicas"], specs["Worker"]["replicas"]) == (1, 3)
    for one in specs.values():
        assert one["template"]["metadata"]["annotations"]["kueue.x-k8s.io/podset-group-name"] == "all"
    alone = documents(export("pytorchjob", subject("1x8xH100"), queue="train", topology="net/block"))[1]
    assert set(alone["spec"]["pytorchReplicaSpecs"]) == {"Master"}
    assert "kueue.x-k8s.io/podset-group-name" not in found(alone, "annotations")[0]


def test_the_queue_is_made_with_the_cluster_s_quota() -> None:
    made_of = export(
        "jobset",
        queue="train",
        topology="net/block",
        stage_topology="net/rack",
        kueue_setup="yes",
        memory="1.5Ti",
        cpu="96",
        rdma="rdma/hca:8",
        node_selector="pool=h100",
    )
    topology, flavor, queue, local = yaml.safe_load_all(made_of.files["kueue.yaml"])
    levels = [one["nodeLabel"] for one in topology["spec"]["levels"]]
    assert levels == ["net/block", "net/rack", "kubernetes.io/hostname"]
    assert flavor["spec"]["nodeLabels"] == {"pool": "h100"}
    group = queue["spec"]["resourceGroups"][0]
    assert {one["name"]: one["nominalQuota"] for one in group["flavors"][0]["resources"]} == {
        "nvidia.com/gpu": "32",
        "cpu": "384",
        "memory": "6Ti",
        "rdma/hca": "32",
    }
    assert group["coveredResources"] == ["nvidia.com/gpu", "cpu", "memory", "rdma/hca"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"] == "train"


def test_a_trainjob_of_2_1_overrides_pod_templates() -> None:
    job = documents(export("trainjob", trainer_version="2.1", queue="train", topology="net/block"))[1]
    (patch,) = job["spec"]["podTemplateOverrides"]
    assert patch["targetJobs"] == [{"name": "node"}]
    assert patch["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-required-topology": "net/block"}
    assert "runtimePatches" not in job["spec"]
    with pytest.raises(NotExpressible, match=r"2.1 cannot let a container lock memory for rdma: use 2.2"):
        export("trainjob", trainer_version="2.1", rdma="rdma/hca:8")


def test_a_trainjob_holds_so_many_words() -> None:
    many = made(program=("train.py", *[f"--a{i}" for i in range(250)]))
    with pytest.raises(
        NotExpressible, match=r"a command of 264 words .* 256 and 128 at most: use --to jobset"
    ):
        export("trainjob", export_of=many)
    assert export("jobset", export_of=many).files
    fewer = made(program=("train.py", *[f"--a{i}" for i in range(200)]))
    job = documents(export("trainjob", export_of=fewer))[1]
    assert started("trainjob", job)[0][-201:] == list(fewer.program)
    assert problems(job) == []


def test_accelerate_starts_in_pods_as_torchrun_does() -> None:
    launcher = made(
        launcher="accelerate", launcher_options=("--config_file", "a.yaml"), program=("train.py",)
    )
    words = started("jobset", documents(export("jobset", export_of=launcher))[1])[0]
    assert words[:4] == ["accelerate", "launch", "--config_file", "a.yaml"]
    assert words[4:6] == ["--machine_rank", "2"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Llama 3.1/70B", "llama-3-1-70b"),
        ("7b", "train-7b"),
        ("X", "train-x"),
        ("日本語", "train"),
        (NASTY, "a-b-c-home-x-y-id-z-run-args-py"),
        ("x" * 90, "x" * 31),
    ],
)
def test_names_are_made_of_models_names(name: str, shown: str) -> None:
    one = subject(name=name)
    assert documents(export("jobset", one))[1]["metadata"]["name"] == f"{shown}-{one.digest[:8]}"


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("name", "Llama", "lower-case letters, digits and -, first a letter"),
        ("name", "x" * 41, "2 to 40 lower-case letters"),
        ("name", "x", "2 to 40"),
        ("name", "x-", "last no -"),
        ("name", "a.b", "lower-case"),
        ("namespace", "a/b", "a namespace's name"),
        ("image", "a b", "an image, as in registry/train:1"),
        ("image", "-x", "an image"),
        ("image", "a\nb", "one line"),
        ("workdir", "work", "a folder from / on"),
        ("workdir", "/$(HOME)", "a folder from / on"),
        ("cpu", "many", "a quantity"),
        ("memory", "900 Gi", "a quantity"),
        ("shm", "-1", "a quantity"),
        ("pvc", "data", "write CLAIM:/PATH"),
        ("pvc", "data:/", "write CLAIM:/PATH"),
        ("pull-secret", "A B", "a secret's name"),
        ("gpu-product", "H100 80GB", "a label's value"),
        ("node-selector", "pool", "write LABEL=VALUE"),
        ("node-selector", "a b=c", "write LABEL=VALUE"),
        ("rdma", "hca:8", "write RESOURCE:COUNT"),
        ("rdma", "rdma/hca:0", "write RESOURCE:COUNT"),
        ("host-network", "true", "use yes or no"),
        ("queue", "a b", "a queue's name"),
        ("topology", "net/block", "give the queue too"),
        ("kueue-setup", "yes", "give the queue too"),
        ("restarts", "-1", "a whole number below 10000"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: str, value: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule.replace("(", r"\(")):
        jobset.export(subject(), made(), {**IMAGE, setting: value})


@pytest.mark.parametrize(
    ("kind", "settings", "rule"),
    [
        ("trainjob", {"trainer-version": "1.9"}, "use 2.3, 2.2, 2.1"),
        ("trainjob", {"runtime": "A b"}, "a runtime's name"),
        ("volcano", {"tier": "low"}, "a whole number"),
        ("volcano", {"tier": "1", "tier-mode": "harder"}, "use hard or soft"),
        ("volcano", {"tier-mode": "soft"}, "give --set tier or stage-tier too"),
        ("rayjob", {"wait": "long"}, "a whole number"),
    ],
)
def test_settings_of_one_kind_are_refused(kind: str, settings: dict[str, str], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        module_of(kind).export(subject(), made(), {**IMAGE, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_in_part_many_bytes_and_no_program_are_refused(kind: str) -> None:
    with pytest.raises(NotExpressible, match=r"12 GPUs are not whole nodes of 8.*use 8 or 16"):
        export(kind, subject("12xH100", pipeline_parallel=1, tensor_parallel=1))
    with pytest.raises(NotExpressible, match=r"a ConfigMap 1,048,576 at most"):
        export(kind, export_of=made(files={"a.json": "x" * 1_048_577}))
    with pytest.raises(NotExpressible, match="a file called a/b: use letters"):
        export(kind, export_of=made(files={"a/b": ""}))
    with pytest.raises(NotExpressible, match="names no program"):
        export(kind, export_of=made(program=()))


@pytest.mark.parametrize("kind", [one for one in KINDS if one != "trainjob"])
def test_an_image_is_needed_where_no_runtime_has_one(kind: str) -> None:
    with pytest.raises(InputError, match="no image is set: --set image=NAME, one with megatron"):
        module_of(kind).export(subject(), made(), {})
    assert any("no image" in one for one in trainjob.export(subject(), made(), {}).notes)


def test_gpus_of_other_vendors_are_refused() -> None:
    with pytest.raises(NotExpressible, match="Ascend-910B-64GB is of Huawei: resources are written for"):
        export("jobset", subject("1x8xAscend-910B", tensor_parallel=1))


@pytest.mark.parametrize("kind", KINDS)
def test_random_plans_are_jobs_of_as_many_pods_as_they_have_nodes(kind: str) -> None:
    for one in random_subjects(20):
        text = next(iter(export(kind, one).files.values()))
        files, job = yaml.safe_load_all(text)
        assert files["data"]["plan.args"] == made().files["plan.args"]
        counts = {
            "trainjob": lambda spec: spec["trainer"]["numNodes"],
            "jobset": lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["completions"],
            "volcano": lambda spec: spec["tasks"][0]["replicas"],
            "pytorchjob": lambda spec: sum(x["replicas"] for x in spec["pytorchReplicaSpecs"].values()),
            "rayjob": lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"],
        }
        assert counts[kind](job["spec"]) == one.nodes
        assert text.startswith("# planner ")
        assert one.digest in text.splitlines()[0]


def test_a_number_in_text_is_text_to_every_parser() -> None:
    text = export("jobset").files["jobset.yaml"]
    for bare in ("1e-4", "on", "0x1F", "1_000", "~", ""):
        assert f"- '{bare}'\n" in text
    assert "&id" not in text
    assert "!!" not in text.replace(NASTY, "").split("data:")[0]


def test_a_host_s_memory_is_asked_for_where_states_are_offloaded() -> None:
    one = subject()
    stage = one.plan.stages[0].model_copy(
        update={"elsewhere": {"host": _elsewhere(10 * 2**30), "nvme": _elsewhere(2**30)}}
    )
    changed = type(one)(one.model, one.cluster, one.plan.model_copy(update={"stages": (stage,)}))
    notes = export("jobset", changed).notes
    assert "offloaded states take up to 80.0 GiB of a node's host: --set memory" in notes
    assert any("8.0 GiB of a node's nvme" in note for note in notes)


def _elsewhere(size: int) -> Any:
    from planner.plan import ElsewherePlan

    return ElsewherePlan(bytes=size, most_bytes=size, capacity_bytes=size, components={})


def test_every_scheduler_says_what_may_be_set() -> None:
    for module in (trainjob, jobset, volcano, pytorchjob, rayjob):
        assert all(words and words[-1] != "." for words in module.SETTINGS.values())
    assert set(KINDS) < set(SCHEDULERS)


ALL = {
    "namespace": "train",
    "cpu": "96",
    "memory": "1.5Ti",
    "shm": "64Gi",
    "pvc": "data:/data",
    "pull-secret": "regcred",
    "gpu-product": "NVIDIA-H100-80GB-HBM3",
    "node-selector": "pool=h100",
}
QUEUED = {"queue": "train", "topology": "net/block", "kueue-setup": "yes"}
FULL = {
    "trainjob": {**ALL, **QUEUED, "rdma": "rdma/hca:8", "stage-topology": "net/rack"},
    "jobset": {**ALL, **QUEUED, "stage-topology": "net/rack", "restarts": "2"},
    "volcano": {**ALL, "queue": "train", "tier": "2", "stage-tier": "1", "restarts": "2"},
    "pytorchjob": {**ALL, **QUEUED, "restarts": "2"},
    "rayjob": {**ALL, **QUEUED, "restarts": "2"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_one_of_the_definition_and_within_its_limits(kind: str) -> None:
    for one in (subject(), subject("1x8xH100", pipeline_parallel=1), *random_subjects(5)):
        for settings in ({}, FULL[kind]):
            try:
                made_of = export(kind, one, **settings)
            except NotExpressible:
                continue
            assert problems(documents(made_of)[1]) == []
            if "kueue.yaml" in made_of.files:
                queue = list(yaml.safe_load_all(made_of.files["kueue.yaml"]))
                assert [line for part in queue for line in problems(part)] == []
                assert kueue_problems(queue) == []
    if kind == "trainjob":
        old = export(kind, trainer_version="2.1", **{k: v for k, v in FULL[kind].items() if k != "rdma"})
        assert problems(documents(old)[1], " 2.1") == []
        assert problems(documents(old)[1]) == ["spec.podTemplateOverrides is not known"]


@pytest.mark.parametrize(
    ("kind", "path", "value", "problem"),
    [
        ("trainjob", "spec.trainer.numNode", 4, "spec.trainer.numNode is not known"),
        ("trainjob", "spec.trainer.numProcPerNode", "8", "spec.trainer.numProcPerNode is '8', not integer"),
        ("jobset", "spec.replicatedJobs", {}, "spec.replicatedJobs is {}, not array"),
        ("jobset", "spec.failurePolicy.maxRestart", 1, "spec.failurePolicy.maxRestart is not known"),
        ("volcano", "spec.queue", "A b", "spec.queue is 'A b', not"),
        ("volcano", "spec.networkTopology.mode", "harder", "is 'harder', not one of"),
        ("pytorchjob", "spec.nprocPerNode", 8, "spec.nprocPerNode is 8, not string"),
        ("rayjob", "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "is 0, not string"),
    ],
)
def test_the_table_of_fields_finds_what_is_wrong(kind: str, path: str, value: Any, problem: str) -> None:
    job = documents(export(kind, **FULL[kind]))[1]
    place, words = job, path.split(".")
    for word in words[:-1]:
        place = place[word]
    place[words[-1]] = value
    assert any(problem in line for line in problems(job))


@pytest.mark.parametrize("kind", KINDS)
def test_a_framework_s_plan_goes_through_both_in_one_call(kind: str) -> None:
    from planner.export import export as export_both

    both = export_both(subject(), f"megatron,{kind}", settings=IMAGE)
    alone = export_both(subject(), "megatron")
    *files, job = documents(both)
    assert both.target == f"megatron,{kind}"
    # The words are the job's own: files that say them to somebody who starts nodes by hand are left out.
    assert [set(one["data"]) for one in files] == ([{rayjob.SCRIPT}] if kind == "rayjob" else [])
    if kind != "rayjob":
        assert "planner-files" not in json.dumps(job)
    assert set(alone.notes) <= set(both.notes)
    assert both.submit == ("kubectl", "apply", "-f", f"{kind}.yaml")
    if kind in VARIABLES:
        place = job["spec"]["trainer"] if kind == "trainjob" else found(job, "containers")[0][0]
        words = [expanded(one, {}) for one in (*place["command"], *place.get("args", []))]
        assert words[-len(alone.program) :] == list(alone.program)
