"""What the pods of every kind of Kubernetes job have in common: their settings, files, command and resources.

A pod runs on a node and has all GPUs that the plan has there. The files of an export travel in a ConfigMap
and lie in the folder in which the program starts, so that names in them hold. Nothing passes through a
shell: the command is a list of words. Kubernetes itself expands ``$(NAME)`` in words and in values of the
environment and takes ``$$`` for ``$`` (kubernetes 1.34, third_party/forked/golang/expansion/expand.go): every
``$`` of what somebody wrote is doubled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from planner.errors import InputError
from planner.export.base import Export, NotExpressible, Shell, Subject, setting_of
from planner.files import plain
from planner.units import gib

SETTINGS = {
    "name": "of the job, as in llama-65b; the model's by default",
    "namespace": "in which the job is made; that of kubectl by default",
    "image": "of the containers, with the framework in it",
    "workdir": "folder in which the program starts and the files lie, /workspace by default",
    "cpu": "CPUs of a node that its pod asks for, as in 96",
    "memory": "host memory of a node that its pod asks for, as in 900Gi",
    "shm": "most that /dev/shm may take, as in 64Gi; half of the node by default",
    "pvc": "CLAIM:/PATH of a volume for data and checkpoints, as in data:/data",
    "pull-secret": "secret with which the image is pulled",
    "gpu-product": "GPU Feature Discovery's name of the GPUs, as in NVIDIA-H100-80GB-HBM3",
    "node-selector": "labels of the nodes, as in pool=h100,zone=a",
    "rdma": "RESOURCE:COUNT of a node's network devices, as in rdma/hca:8",
    "host-network": "yes: the pods have their node's network",
}
"""What may be set for every kind of job."""
RESOURCES = {"NVIDIA": "nvidia.com/gpu", "AMD": "amd.com/gpu"}
"""What device plugins call GPUs, by vendor."""
WORKDIR = "/workspace"
MOST_FILES = 1_048_576
"""Bytes of a ConfigMap: what the API server takes (k8s.io/api core/v1 MaxSecretSize, of both)."""
MOST_NAME = 40
"""Letters of a name: a RayJob's has 47, a dstack run's 41; others add a task and an index to a host's 63."""

JOB = re.compile(rf"[a-z][a-z0-9-]{{0,{MOST_NAME - 2}}}[a-z0-9]", re.ASCII)
NAME = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?", re.ASCII)
SUBDOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?", re.ASCII)
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", re.ASCII)
FOLDER = re.compile(r"/[\w./+-]*", re.ASCII)
QUANTITY = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:m|[KMGTPE]i?|k)?", re.ASCII)
LABEL = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?", re.ASCII)
VALUE = re.compile(r"(?:[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?)?", re.ASCII)
FILES = "planner-files"
"""The volume with the export's files."""
FILE = re.compile(r"[\w.-]{1,253}", re.ASCII)


def checked(
    settings: Mapping[str, str], name: str, rule: re.Pattern[str], use: str, default: str = ""
) -> str:
    """What somebody set, which a rule is of. Raises InputError that says what to use."""
    value = setting_of(settings, name, default)
    if value and not rule.fullmatch(value):
        raise InputError(f"--set {name}={plain(value)}: use {use}")
    return value


def said_yes(settings: Mapping[str, str], name: str) -> bool:
    """Was a switch set to yes? Raises InputError for what is neither yes nor no."""
    value = checked(settings, name, re.compile("yes|no"), "yes or no", "no")
    return value == "yes"


def count_of(settings: Mapping[str, str], name: str, default: str) -> int:
    """A whole number that was set. Raises InputError."""
    return int(
        checked(settings, name, re.compile(r"[0-9]{1,4}", re.ASCII), "a whole number below 10000", default)
    )


def name_of(subject: Subject, settings: Mapping[str, str]) -> str:
    """The job's name: that set, or the model's made one: a DNS label that begins with a letter.

    The plan's digest ends it: another plan's job must not take the place of one that runs. Services have such
    names (RFC 1035), and hosts are named after jobs. Raises InputError.
    """
    use = f"2 to {MOST_NAME} lower-case letters, digits and -, first a letter, last no -"
    if given := checked(settings, "name", JOB, use):
        return given
    words = re.sub(r"[^a-z0-9]+", "-", subject.model.name.lower()).strip("-")
    named = words[:1].isalpha() and len(words) > 1
    digest = subject.digest[:8]
    shortened = (words if named else f"train-{words}")[: MOST_NAME - 1 - len(digest)].strip("-")
    return f"{shortened}-{digest}"


def whole_nodes(subject: Subject) -> int:
    """Nodes of the job. Raises NotExpressible if the last one is taken in part: all pods are the same."""
    if over := subject.plan.num_gpus % subject.per_node:
        whole = subject.plan.num_gpus - over
        raise NotExpressible(
            f"{subject.plan.num_gpus} GPUs are not whole nodes of {subject.per_node}, and every node starts "
            f"as many processes: use {whole} or {whole + subject.per_node} GPUs",
            {"gpus": f"{whole // subject.per_node}x{subject.per_node}x{subject.plan.gpu}"},
        )
    return subject.nodes


def inert(word: str) -> str:
    """A word or value as Kubernetes gives it to a container: as it is, unless it is the exporter's own.

    >>> inert("a$(HOME)"), inert(Shell("$(PET_NODE_RANK)"))
    ('a$$(HOME)', '$(PET_NODE_RANK)')
    """
    return str(word) if isinstance(word, Shell) else word.replace("$", "$$")


@dataclass(frozen=True)
class Pods:
    """The equal pods of a job, one on every node: their parts, as the API has them."""

    subject: Subject
    made: Export
    settings: Mapping[str, str]

    @cached_property
    def name(self) -> str:
        """The job's name."""
        return name_of(self.subject, self.settings)

    @cached_property
    def nodes(self) -> int:
        """Pods, one on every node."""
        return whole_nodes(self.subject)

    @property
    def namespace(self) -> str:
        """The job's namespace, empty for kubectl's own."""
        return checked(self.settings, "namespace", NAME, "a namespace's name, as in training")

    @property
    def image(self) -> str:
        """The image that was set, or nothing."""
        return checked(self.settings, "image", IMAGE, "an image, as in registry/train:1")

    @property
    def workdir(self) -> str:
        """The folder in which the program starts."""
        return checked(self.settings, "workdir", FOLDER, "a folder from / on", WORKDIR).rstrip("/") or "/"

    def metadata(self, name: str, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Name, namespace where one is set, and labels, of which one is the plan's digest."""
        where = {"namespace": self.namespace} if self.namespace else {}
        return {"name": name, **where, "labels": {"planner/plan": self.subject.digest, **(labels or {})}}

    @property
    def gpu(self) -> str:
        """The resource that GPUs are. Raises NotExpressible for a vendor whose plugin is not known here."""
        vendor = self.subject.cluster.gpu.vendor
        if vendor not in RESOURCES:
            raise NotExpressible(
                f"{plain(self.subject.plan.gpu)} is of {plain(vendor)}: resources are written for those of "
                f"{' and '.join(RESOURCES)}"
            )
        return RESOURCES[vendor]

    @cached_property
    def limits(self) -> dict[str, Any]:
        """What a pod takes of its node, each asked for in full."""
        use = "a quantity, as in 96 or 900Gi"
        found: dict[str, Any] = {self.gpu: str(self.subject.per_node)}
        found |= {
            one: value for one in ("cpu", "memory") if (value := checked(self.settings, one, QUANTITY, use))
        }
        if rdma := setting_of(self.settings, "rdma"):
            name, _, count = rdma.rpartition(":")
            if not (
                "/" in name and LABEL.fullmatch(name) and re.fullmatch(r"[1-9][0-9]{0,3}", count, re.ASCII)
            ):
                raise InputError(f"--set rdma={plain(rdma)}: write RESOURCE:COUNT, as in rdma/hca:8")
            found[name] = count
        return found

    @property
    def resources(self) -> dict[str, Any]:
        """Limits and equal requests: the pod is not evicted before others for memory."""
        return {"requests": self.limits, "limits": self.limits}

    @cached_property
    def selector(self) -> dict[str, str]:
        """Labels of the nodes; a product's is NVIDIA's GPU Feature Discovery's, or AMD's node labeller's."""
        found = {}
        for one in filter(None, setting_of(self.settings, "node-selector").split(",")):
            key, equals, value = one.partition("=")
            if not (equals and LABEL.fullmatch(key) and VALUE.fullmatch(value)):
                raise InputError(f"--set node-selector: {plain(one)}: write LABEL=VALUE, as in pool=h100")
            found[key] = value
        if product := checked(
            self.settings, "gpu-product", VALUE, "a label's value, as in NVIDIA-H100-80GB-HBM3"
        ):
            prefix = "nvidia.com/gpu.product" if self.gpu == "nvidia.com/gpu" else "amd.com/gpu.product-name"
            found[prefix] = product
        return found

    @property
    def tolerations(self) -> list[dict[str, str]]:
        """Nodes with GPUs often keep other pods away by a taint named as the resource."""
        return [{"key": self.gpu, "operator": "Exists", "effect": "NoSchedule"}]

    def files(self, more: Mapping[str, str]) -> dict[str, str]:
        """The export's files and more. Raises NotExpressible for names that are taken or cannot be a key."""
        for name in self.made.files:
            if not FILE.fullmatch(name) or name in more:
                raise NotExpressible(
                    f"a file called {plain(name)}: use letters, digits, . _ - and another name"
                )
        return {**self.made.files, **more}

    def config_map(self, more: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The export's files. Raises NotExpressible if they are too large."""
        files = self.files(more or {})
        size = sum(len(name) + len(text.encode()) for name, text in files.items())
        if size > MOST_FILES:
            raise NotExpressible(f"the files have {size:,} bytes, a ConfigMap {MOST_FILES:,} at most")
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": self.metadata(self.files_name),
            "data": files,
        }

    @property
    def files_name(self) -> str:
        """The ConfigMap's name."""
        return f"{self.name}-files"

    def volumes(self, mounts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The files, if there are any, shared memory and what was set to be mounted."""
        memory: dict[str, Any] = {"medium": "Memory"}
        if size := checked(self.settings, "shm", QUANTITY, "a quantity, as in 64Gi"):
            memory["sizeLimit"] = size
        files = {"name": FILES, "configMap": {"name": self.files_name}}
        found: list[dict[str, Any]] = [files] if any(one["name"] == FILES for one in mounts) else []
        found.append({"name": "planner-shm", "emptyDir": memory})
        if claim := self._claim():
            found.append({"name": "planner-data", "persistentVolumeClaim": {"claimName": claim[0]}})
        return found

    def mounts(self, more: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Every file in the working folder, one by one: what is there in the image stays."""
        base = "" if self.workdir == "/" else self.workdir
        found: list[dict[str, Any]] = [
            {"name": FILES, "mountPath": f"{base}/{name}", "subPath": name, "readOnly": True}
            for name in (*self.made.files, *more)
        ]
        found.append({"name": "planner-shm", "mountPath": "/dev/shm"})
        if claim := self._claim():
            found.append({"name": "planner-data", "mountPath": claim[1]})
        return found

    def _claim(self) -> tuple[str, str] | None:
        given = setting_of(self.settings, "pvc")
        claim, _, path = given.partition(":")
        if given and not (SUBDOMAIN.fullmatch(claim) and FOLDER.fullmatch(path) and path != "/"):
            raise InputError(f"--set pvc={plain(given)}: write CLAIM:/PATH, as in data:/data")
        return (claim, path) if given else None

    def env(self) -> list[dict[str, str]]:
        """The export's environment."""
        return [{"name": name, "value": inert(value)} for name, value in self.made.env.items()]

    def command(self, node_rank: str, address: str, port: str = "29500") -> list[str]:
        """What starts a node's processes; of what is :class:`Shell` Kubernetes expands the names."""
        return [inert(word) for word in self.on_node(node_rank, address, port)]

    def on_node(self, node_rank: str, address: str, port: str = "29500") -> tuple[str, ...]:
        """What starts a node's processes. Raises NotExpressible where nothing is, or nodes are not whole."""
        if not self.made.program:
            raise NotExpressible(f"{self.made.target} names no program that a job could start")
        whole_nodes(self.subject)
        return self.made.on_node(self.subject, node_rank, address, port)

    @property
    def security(self) -> dict[str, Any]:
        """A container that registers memory with network devices may lock it."""
        return {"capabilities": {"add": ["IPC_LOCK"]}} if setting_of(self.settings, "rdma") else {}

    @property
    def pull_secrets(self) -> list[dict[str, str]]:
        """The secret with which the image is pulled."""
        found = checked(self.settings, "pull-secret", SUBDOMAIN, "a secret's name")
        return [{"name": found}] if found else []

    @property
    def host_network(self) -> dict[str, Any]:
        """The node's own network, where that was set."""
        wanted = said_yes(self.settings, "host-network")
        return {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if wanted else {}

    def container(self, name: str, command: Sequence[str], more: Sequence[str] = ()) -> dict[str, Any]:
        """The one container of a pod. Raises InputError if no image is set."""
        if not self.image:
            raise InputError(
                f"no image is set: --set image=NAME, one with {self.made.target} and torch in it"
            )
        return {
            "name": name,
            "image": self.image,
            "workingDir": self.workdir,
            "command": list(command),
            **({"env": env} if (env := self.env()) else {}),
            "resources": self.resources,
            **({"securityContext": self.security} if self.security else {}),
            "volumeMounts": self.mounts(more),
        }

    def spec(self, container: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """A pod's spec around its container."""
        return {
            **more,
            **self.host_network,
            **({"nodeSelector": self.selector} if self.selector else {}),
            "tolerations": self.tolerations,
            **({"imagePullSecrets": self.pull_secrets} if self.pull_secrets else {}),
            "containers": [dict(container)],
            "volumes": self.volumes(container["volumeMounts"]),
        }

    def template(
        self, container: Mapping[str, Any], annotations: Mapping[str, str], **more: Any
    ) -> dict[str, Any]:
        """A pod's template around its container."""
        metadata = {"metadata": {"annotations": dict(annotations)}} if annotations else {}
        return {**metadata, "spec": self.spec(container, **more)}

    def document(
        self, api: str, kind: str, labels: Mapping[str, str], spec: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The job as a resource of an API."""
        return {"apiVersion": api, "kind": kind, "metadata": self.metadata(self.name, labels), "spec": spec}

    def notes(self, *more: str) -> tuple[str, ...]:
        """The framework's notes, those of a kind of job, and what the node must have beside GPUs."""
        found = [*self.made.notes, *more]
        script = next(iter(self.made.program), "")
        if not script.startswith(("-", "/")) and script not in self.made.files:
            found.append(f"{script} is looked for where the job starts: it must be in the image there")
        for place in ("host", "nvme"):
            stages = [
                stage.elsewhere[place] for stage in self.subject.plan.stages if place in stage.elsewhere
            ]
            if stages:
                most = max(stage.most_bytes for stage in stages) * self.subject.per_node
                words = "--set memory" if place == "host" else "a volume on the node's NVMe, --set pvc"
                found.append(f"offloaded states take up to {gib(most)} GiB of a node's {place}: {words}")
        return tuple(found)


def finished(
    pods: Pods, kind: str, documents: Sequence[Mapping[str, Any]], also: Mapping[str, str], *notes: str
) -> Export:
    """The export of a kind of job: one manifest, and files beside it."""
    from planner.schedulers.manifests import yaml_of

    file, header = f"{kind}.yaml", pods.made.header(pods.subject)
    cluster = pods.subject.cluster
    missing = {
        "gpu-product": f"any GPU is taken, the plan is for {cluster.gpu.name}",
        "pvc": "nothing outlives the pods",
        "rdma": f"times are of {cluster.gpu.network.kind}, which pods use where it is asked for",
    }
    if pods.nodes == 1:
        del missing["rdma"]
    told = (f"{why}: --set {name}=..." for name, why in missing.items() if not pods.settings.get(name))
    return replace(
        pods.made,
        target=f"{pods.made.target},{kind}",
        files={file: yaml_of([one for one in documents if one.get("data") != {}], header), **also},
        notes=pods.notes(*notes, *told),
        submit=("kubectl", "apply", "-f", file),
    )
