"""What a software stack is, to the planner: tables of what its layers keep, and its defaults.

A stack is data. The same transformer keeps 26 to 42 bytes per element of its residual stream
depending on whose kernels run it, so a layer is built *for a named stack* from rows such as

    Row("attention output", "batch seq heads head_dim", 1, COMPUTE, NONE)

that can be read beside the code they were counted in. Options select rows by words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from strategies.base import POLICIES, Role
from strategies.layout import Wire

COMPUTE, FP32, BYTE, INT64 = "compute", "fp32", "byte", "int64"
"""Element types of a row; ``compute`` is the precision that the matrix products run in."""

ALWAYS = POLICIES
NONE = ("none",)
UNTIL_FULL = ("none", "selective")


@dataclass(frozen=True, slots=True)
class Row:
    """``count`` tensors of ``dims``, kept under the policies ``kept_by``, if ``when`` holds.

    ``when`` is a list of feature words that must all be present, or absent after a ``!``:
    ``rotary !eager``.
    """

    name: str
    dims: str
    count: float
    dtype: str = COMPUTE
    kept_by: tuple[str, ...] = ALWAYS
    when: str = ""
    role: Role = Role.ACTIVATION

    def applies(self, features: frozenset[str]) -> bool:
        """Does this row belong to a model and job with these features?"""
        return all(
            (word[1:] not in features) if word[0] == "!" else (word in features) for word in self.when.split()
        )


@dataclass(frozen=True, slots=True)
class Recipe:
    """Bytes per parameter at rest: weight, gradient, master copies, one optimizer moment."""

    weight: float
    gradient: float
    master: float
    moment: float
    compute: float = 2.0  # bytes of an element in the matrix products and on the wire
    unit: str = "bf16"  # which of the GPU's peaks the matrix products run at


@dataclass(frozen=True, slots=True)
class Overhead:
    """Memory outside tensors: a named, tagged number with the range it was seen in."""

    name: str
    value: float
    tag: str  # measured or assumed
    source: str


@dataclass(frozen=True, slots=True)
class Stack:
    """Everything the planner knows of one training framework."""

    name: str
    version: str
    rows: Mapping[str, tuple[Row, ...]]  # per layer kind
    recipes: Mapping[str, Recipe]  # per precision
    shardings: Mapping[str, bool]  # kind -> does it run together with a pipeline?
    sharding_notes: Mapping[str, str]
    schedules: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]  # option -> its values, the default first
    notes: Mapping[str, str] = field(default_factory=dict)  # precision -> what to know of it
    vocabulary_multiple: int = 1  # the vocabulary is padded to a multiple of this times t
    gradients_resident: bool = False  # one buffer for the whole step
    gradient_copies: bool = False  # half-precision gradients are copied to fp32 beside the master
    tensor_parallel: bool = True
    policies: tuple[str, ...] = POLICIES  # the recompute policies it knows
    rerun: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Products that a policy milder than ``full`` runs again: name -> policies that do not."""
    reduce_bytes: float | None = None  # of ZeRO-3/FSDP's reduce-scatter; None: the gradient's
    families: tuple[str, ...] = ()  # the model types it has; all, if empty
    separate_root: bool = False  # FSDP units: embedding and head each one of their own
    bucket_elements: float = 0.0
    bucket_fraction: float = 0.0
    hidden_transfers: str = ""  # the flags behind the overlap that is assumed
    context: Overhead = field(
        default=Overhead(
            "CUDA context and libraries",
            0.5 * 2**30,
            "assumed",
            "0.3-0.6 GiB are commonly reported; the middle is taken",
        )
    )
    communicator: Overhead = field(
        default=Overhead(
            "NCCL buffers, per group of GPUs",
            0.5 * 2**30,
            "assumed",
            "NVIDIA/nccl#964 reports 544-688 MB for a process with one group, context included",
        )
    )
    allocator: Overhead = field(
        default=Overhead(
            "allocator: reserved over allocated",
            0.05,
            "assumed",
            "1.01-1.09 in SimuMax's per-rank readings of Megatron-LM on B200; the middle is taken",
        )
    )

    def wire(self, recipe: Recipe) -> Wire:
        """What this stack sends for data parallelism under a recipe."""
        return Wire(
            gather_bytes=recipe.compute,
            reduce_bytes=self.reduce_bytes or recipe.gradient,
            bucket_bytes=self.bucket_elements * recipe.compute,
            bucket_fraction=self.bucket_fraction,
            separate_root=self.separate_root,
        )
