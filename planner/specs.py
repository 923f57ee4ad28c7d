"""The three inputs: what is trained (ModelSpec), on what (ClusterSpec), how (TrainingSpec).

They are pydantic models, frozen, and refuse unknown fields. Lengths are in elements, sizes in
bytes. Anything left out of a TrainingSpec is filled in by :func:`planner.defaults.resolve`,
which lists what it assumed.
"""

from __future__ import annotations

import re
from math import gcd
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from planner.adapters import Adapters, Frozen
from planner.errors import InputError
from planner.model import FROZEN
from planner.model import ModelSpec as ModelSpec

if TYPE_CHECKING:
    from planner.stacks.base import Overhead


class Link(BaseModel):
    """A way out of a GPU: bytes per second per direction, and how many GPUs it joins."""

    model_config = FROZEN

    kind: str
    bytes_per_s: float = Field(gt=0)
    gpus: int = Field(1, ge=1)


class Figure(BaseModel):
    """A measured or assumed number with its source."""

    model_config = FROZEN

    value: float = Field(gt=0)
    source: str


class AttentionCurve(BaseModel):
    """What a fused attention kernel reaches of the GPU's peak, counted causal (half of all pairs).

    ``forward`` and ``backward`` are what it tends to in long sequences, with heads of 128; half of it is
    reached at ``half_length`` tokens. ``narrow`` is the part of it with heads of 64 or less.
    """

    model_config = FROZEN

    forward: float = Field(gt=0, le=1)
    backward: float = Field(gt=0, le=1)
    half_length: float = Field(ge=0)
    narrow: float = Field(1.0, gt=0, le=1)
    source: str

    def rates(self, head_dim: int, seq_length: Any) -> tuple[Any, Any]:
        """Fractions of the peak that forward and backward reach with such heads and sequences."""
        part = seq_length / (seq_length + self.half_length) * (self.narrow if head_dim <= 64 else 1.0)
        return self.forward * part, self.backward * part


class Host(BaseModel):
    """The CPUs of a node: bytes of memory, and bytes per second of it."""

    model_config = FROZEN

    memory_bytes: int = Field(gt=0)
    bytes_per_s: float = Field(gt=0)


FIGURES = {
    "peak_flops": {"fp32"},
    "achievable": {"in_step", "intra_node", "kernels", "matmul", "memory", "network", "sustained"},
    "latency_s": {"intra_node", "network"},
}
"""What is known of every GPU: its peaks, the parts of them that steps reach, delays of messages."""


class Gpu(BaseModel):
    """One kind of GPU, from the catalog. Bytes, bytes/s, FLOP/s (dense), watts."""

    model_config = FROZEN

    name: str
    aliases: tuple[str, ...] = ()
    vendor: str
    compute_capability: float | None = None  # NVIDIA's
    multiprocessors: int | None = Field(None, ge=1)  # that compute tiles of products; NVIDIA's
    marketed_gb: int
    memory_bytes: int = Field(gt=0)
    usable_bytes: int = Field(gt=0)
    peak_flops: dict[str, float]
    hbm_bytes_per_s: float = Field(gt=0)
    intra_node: Link
    pcie_bytes_per_s: float = Field(gt=0)
    network: Link
    gpus_per_node: int = Field(ge=1)
    power_w: float = Field(gt=0)
    achievable: dict[str, Figure]
    attention: dict[str, AttentionCurve] = Field(default_factory=dict)  # by kernel
    latency_s: dict[str, Figure]
    host: Host | None = None  # of a node, where it is the GPU's own
    source: dict[str, str]

    @model_validator(mode="after")
    def _figures(self) -> Gpu:
        for name, needed in FIGURES.items():
            if missing := needed - set(getattr(self, name)):
                raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
        if not all(peak > 0 for peak in self.peak_flops.values()):
            raise ValueError("peak_flops: use numbers above 0")
        return self


class ClusterSpec(BaseModel):
    """One pool of equal GPUs. ``capacity_bytes`` is what one process may fill, of its GPU.

    ``nodes_per_leaf`` nodes share leaf switches, whose way up has 1/``oversubscription`` of the bandwidth
    down to the nodes. None: one non-blocking switch joins all nodes. ``host_memory_bytes`` and
    ``nvme_bytes`` are a node's, with their bytes per second; they count where something is offloaded.

    What a whole training takes (docs/cost.md): ``price`` of a GPU-hour in a ``currency``; the mean time
    between failures of a GPU with its part of everything else, ``gpu_mtbf_s``, or of the job, ``job_mtbf_s``;
    ``checkpoint_bytes_per_s`` with which the GPUs together write a checkpoint; ``restart_s`` from a failure
    until training goes on; ``pue``, the data centre's power over its machines'. None: not counted.
    """

    model_config = FROZEN

    gpu: Gpu
    num_gpus: int = Field(ge=1, le=10_000_000)
    gpus_per_node: int = Field(ge=1, le=100_000)
    budget_bytes: int | None = Field(None, gt=0)
    headroom: float = Field(0.0, ge=0, lt=1)
    nodes_per_leaf: int | None = Field(None, ge=1, le=10_000_000)
    oversubscription: float = Field(1.0, ge=1, le=1000, allow_inf_nan=False)
    host_memory_bytes: int | None = Field(None, gt=0, le=10**15)
    host_bytes_per_s: float | None = Field(None, gt=0, le=1e15)
    nvme_bytes: int | None = Field(None, gt=0, le=10**17)
    nvme_bytes_per_s: float | None = Field(None, gt=0, le=1e15)
    price: float | None = Field(None, gt=0, le=1e9)
    currency: str = Field("", max_length=8)
    gpu_mtbf_s: float | None = Field(None, gt=0, le=1e12)
    job_mtbf_s: float | None = Field(None, gt=0, le=1e12)
    checkpoint_bytes_per_s: float | None = Field(None, gt=0, le=1e18)
    restart_s: float | None = Field(None, ge=0, le=1e9)
    pue: float | None = Field(None, ge=1, le=10)
    assumptions: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _leaves(self) -> ClusterSpec:
        if self.nodes_per_leaf is None:
            if self.oversubscription > 1:
                raise ValueError(
                    f"oversubscription={self.oversubscription:g} is of leaf switches: give nodes_per_leaf too"
                )
        elif (leaf := self.nodes_per_leaf * self.gpus_per_node) % self.domain:
            whole = self.domain // gcd(self.domain, self.gpus_per_node)
            near = max(1, round(self.nodes_per_leaf / whole)) * whole
            raise ValueError(
                f"nodes_per_leaf={self.nodes_per_leaf} of {self.gpus_per_node} GPUs are {leaf}, not whole "
                f"NVLink domains of {self.domain}: use {near}"
            )
        return self

    @model_validator(mode="after")
    def _running(self) -> ClusterSpec:
        if self.gpu_mtbf_s and self.job_mtbf_s:
            raise ValueError("gpu_mtbf_s and job_mtbf_s: give the one or the other")
        if not self.currency.isprintable():
            raise ValueError(f"currency={self.currency!r}: use characters that can be printed, as in USD")
        return self

    @property
    def costed(self) -> bool:
        """Is anything given of what a whole training takes?"""
        given = (self.price, self.gpu_mtbf_s, self.job_mtbf_s, self.checkpoint_bytes_per_s, self.restart_s)
        return any(one is not None for one in (*given, self.pue))

    @property
    def mtbf_s(self) -> float | None:
        """Mean seconds between failures of a job on all GPUs: any failure of a GPU is one of the job."""
        return self.job_mtbf_s or (self.gpu_mtbf_s / self.num_gpus if self.gpu_mtbf_s else None)

    @property
    def domain(self) -> int:
        """GPUs that share the fast links: a node, or more where NVLink spans nodes (NVL72)."""
        joined = self.gpu.intra_node.gpus
        return joined if joined > self.gpu.gpus_per_node else self.gpus_per_node

    @property
    def capacity_bytes(self) -> int:
        """Bytes that one process may use: the GPU's, or the budget if smaller, less headroom."""
        usable = self.gpu.usable_bytes
        budget = usable if self.budget_bytes is None else min(usable, self.budget_bytes)
        return int(budget * (1 - self.headroom))

    @staticmethod
    def parse(text: str) -> ClusterSpec:
        """A cluster from ``64x80G``, ``64xH100``, ``64xH100-80G`` or ``8x8xH100``.

        The last is nodes x GPUs per node x kind. Raises InputError, naming the nearest kinds.
        """
        from planner.catalog import gpu_of_memory, load_gpu

        text = text.replace("\u00d7", "x")
        shape = re.fullmatch(r"\s*(\d{1,9})\s*x\s*(?:(\d{1,6})\s*x\s*)?([\w. -]{1,60}?)\s*", text, re.I)
        if re.match(r"\s*(?:\d+@)?from-", text, re.I):
            raise InputError(
                f"--gpus {text[:60]!r}: a scheduler is asked by search, estimate, explain, compare, "
                "cluster: write count x kind here, as in 64xH100"
            )
        if "," in text:
            raise InputError(f"--gpus {text!r}: several pools are not supported; plan one pool at a time")
        if not shape:
            raise InputError(
                f"--gpus {text!r} is not a cluster: write count x kind, as in 64x80G, 64xH100 or "
                "8x8xH100 (nodes x GPUs per node x kind)"
            )
        first, second, kind = int(shape[1]), shape[2], shape[3]
        notes: list[str] = []
        if memory := re.fullmatch(r"(\d{1,4})\s*g(?:i?b)?", kind, re.I):
            gpu = gpu_of_memory(int(memory[1]))
            notes.append(f"GPU kind: {gpu.name}, as --gpus {text} names only its memory")
        elif kind.isdigit():
            raise InputError(f"--gpus {text!r}: {kind} is no kind of GPU; for its memory write {kind}G")
        else:
            gpu = load_gpu(kind)
        nodes, per_node = (first, int(second)) if second else (None, gpu.gpus_per_node)
        count = first * per_node if nodes is not None else first
        if count < 1 or per_node < 1:
            raise InputError(f"--gpus {text!r}: a cluster needs at least 1 GPU")
        if nodes is None:
            per_node = min(per_node, count)
            notes.append(
                f"{per_node} GPUs per node, {gpu.intra_node.kind} within, {gpu.network.kind} between"
            )
            if count % per_node:
                notes.append(f"the last node holds {count % per_node} GPUs only")
        try:
            return ClusterSpec(gpu=gpu, num_gpus=count, gpus_per_node=per_node, assumptions=tuple(notes))
        except ValidationError as error:
            raise InputError(f"--gpus {text!r}: {first_problem(error)}") from None


class OverheadFigure(BaseModel):
    """Memory outside tensors as measured: what is usual, and the range; bytes or a fraction.

    ``few`` says that the range is of too few runs to tell how far the figure spreads.
    """

    model_config = FROZEN

    value: float = Field(ge=0, le=1e12)
    least: float = Field(ge=0, le=1e12)
    most: float = Field(ge=0, le=1e12)
    few: bool = False
    source: str = Field(max_length=500)

    @model_validator(mode="after")
    def _ordered(self) -> OverheadFigure:
        if not self.least <= self.value <= self.most:
            raise ValueError(f"least {self.least:g}, value {self.value:g}, most {self.most:g}: not in order")
        return self

    def range_beside(self, own: Overhead) -> tuple[float, float]:
        """The least and the most to plan with; those of few runs take in the framework's own."""
        if not self.few:
            return self.least, self.most
        return min(self.least, own.least), max(self.most, own.most)


class Profile(BaseModel):
    """What lies outside tensors on somebody's own machines: written by ``planner calibrate``.

    ``overheads`` replace the framework's own: ``context`` and ``communicator`` in bytes,
    ``allocator`` (reserved over allocated) as a fraction of what tensors need. ``runs`` is how many
    runs they were measured on; ``framework`` and ``gpu`` are None where nobody named them.
    """

    model_config = FROZEN

    schema_version: Literal["planner.profile/1"] = "planner.profile/1"
    framework: str | None = Field(None, max_length=50)
    gpu: str | None = Field(None, max_length=100)
    overheads: dict[Literal["context", "communicator", "allocator"], OverheadFigure]
    runs: int = Field(ge=1)
    notes: tuple[str, ...] = ()


class TrainingSpec(BaseModel):
    """How a model is trained. None means: the usual value, which the plan lists as assumed.

    ``precision`` and ``optimizer`` are names of planner/precision.py and planner/optimizers.py.
    ``gradient_dtype``, ``master_weights`` and ``optimizer_dtype`` change the precision's recipe;
    ``tokens`` is what the whole training sees, for its duration. ``options`` are the framework's own
    choices of kernels and buffers (``loss``, ``norm`` ..., each stack's table lists them);
    ``attention`` and ``swiglu`` are two of them with a name of their own. ``profile`` replaces
    the framework's overheads by measured ones. ``expert_imbalance`` is how many tokens the fullest GPU's
    experts get over the average; with ``expert_capacity_factor`` all are padded to as many.
    ``adapters`` are trained in place of the weights, which
    are frozen; else those that ``frozen`` names.
    """

    model_config = FROZEN

    seq_length: int | None = Field(None, ge=1, le=100_000_000)
    global_batch_size: int | None = Field(None, ge=1, le=100_000_000)
    precision: str | None = Field(None, max_length=100)
    optimizer: str = Field("adamw", max_length=100)
    framework: str = "megatron"
    attention: Literal["flash", "sdpa", "eager", "flash1"] | None = None
    swiglu: Literal["fused", "unfused", "recomputed"] | None = None
    dropout: float | None = Field(None, ge=0, lt=1)
    gradient_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    optimizer_dtype: Literal["fp32", "bf16", "fp16", "fp8"] | None = None
    master_weights: bool | None = None
    expert_imbalance: float = Field(1.0, ge=1, le=1000)
    expert_capacity_factor: float | None = Field(None, gt=0, le=1000)
    adapters: Adapters | None = None
    frozen: Frozen = Frozen()
    tokens: float | None = Field(None, gt=0, le=1e18)
    options: dict[str, str] = Field(default_factory=dict, max_length=50)
    profile: Profile | None = None


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line: value, rule, field."""
    problem: Any = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{field} is missing"
    value = problem.get("input")
    value = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not field:
        return message
    return f"{field}={value if len(value) < 60 else value[:57] + '...'}: {message}"
