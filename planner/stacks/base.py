"""What a software stack is, to the planner: tables of what its layers keep, and its defaults.

A stack is data. The same transformer keeps 26 to 42 bytes per element of its residual stream
depending on whose kernels run it, so a layer is built *for a named stack* from rows such as

    Row("attention output", "batch seq heads head_dim", 1, COMPUTE, NONE)

that can be read beside the code they were counted in. Options select rows by words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from strategies.base import POLICIES, Role
from strategies.context_parallel import COMMS
from strategies.layout import Wire
from strategies.offload import NO_STAGING, Staging
from strategies.pipeline_parallel import SPLIT

if TYPE_CHECKING:
    from planner.weights import Weight

COMPUTE, GRADIENT, FP32, BYTE, INT64 = "compute", "gradient", "fp32", "byte", "int64"
CAST, CAST_WEIGHT = "cast", "cast weight"
"""Element types of a row; ``compute`` is the precision that the matrix products run in, ``gradient``
that in which autograd makes the gradients of the weights, ``cast`` that of operands that are quantized for
products of 8 or 4 bits, with their scales."""
BESIDE = "quantized !fp8_param_gather:on"
"""When a quantized copy lies beside the weight that it is of."""

WIDTHS = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
"""Bytes of an element."""

ALWAYS = POLICIES
NONE = ("none",)
UNTIL_FULL = ("none", "selective")


@dataclass(frozen=True, slots=True)
class Row:
    """``count`` tensors of ``dims``, kept under the policies ``kept_by``, if ``when`` holds.

    ``when`` is a list of feature words that must all be present, or absent after a ``!``:
    ``rotary !eager``. ``steps`` lists the steps of the layer's backward (planner/layers.py) that the
    tensors belong to, evenly: after which an activation is freed, during which a transient lives.
    ``read_by`` says that only gradients of weights need them, and of which: ``norms``, ``head``, or the
    products of those steps, one for each of ``steps``; or that only that of an adapter's ``input`` does.
    """

    name: str
    dims: str
    count: float
    dtype: str = COMPUTE
    kept_by: tuple[str, ...] = ALWAYS
    when: str = ""
    role: Role = Role.ACTIVATION
    steps: str = ""
    read_by: str = ""

    def applies(self, features: frozenset[str]) -> bool:
        """Does this row belong to a model and job with these features?"""
        present, absent = _words(self.when)
        return present <= features and features.isdisjoint(absent)


@cache
def _words(when: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words that must be present, and those that must be absent."""
    absent = {word for word in when.split() if word[0] == "!"}
    return frozenset(when.split()) - absent, frozenset(word[1:] for word in absent)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Bytes per parameter at rest: weight, gradient, master copies, one optimizer moment."""

    weight: float
    gradient: float
    master: float
    moment: float
    compute: float = 2.0  # bytes of an element in the matrix products and on the wire
    unit: str = "bf16"  # which of the GPU's peaks the blocks' matrix products run at
    rest: str = ""  # which the head and attention do, if another
    cast: float = 0.0  # bytes of an element that is quantized for the blocks' products, with its scales
    cast_weight: float = 0.0  # the same of a weight's, whose scales may be shared by more
    cast_gathered: float = 0.0  # the same as replicas gather it, where it is kept in no other form
    cast_alone: bool = False  # are those weights kept so, without one of ``weight`` bytes beside them?

    @property
    def quantized(self) -> bool:
        """Do the blocks' products take operands of 8 or 4 bits?"""
        return self.unit in ("fp8", "fp4")

    @property
    def quantized_weights(self) -> bool:
        """Can weights be kept as the blocks' products take them alone?"""
        return self.cast_gathered > 0

    @property
    def gathered(self) -> float:
        """Bytes of an element at least, where replicas gather weights as they are kept."""
        return self.cast_gathered if self.cast_alone else self.weight

    def weight_of(self, weight: Weight) -> float:
        """Bytes of an element of a weight at rest, as its product's operand or in full."""
        return self.cast_weight if self.cast_alone and weight.quantized else self.weight


@dataclass(frozen=True, slots=True)
class Overhead:
    """Memory outside tensors: a named, tagged number with the range it was seen in.

    Bytes, or for the allocator a fraction of what tensors need. ``least`` and ``most`` bound what a
    job needs of it: between them a plan is at risk.
    """

    name: str
    value: float
    least: float
    most: float
    tag: str  # measured or assumed
    source: str
    fraction: bool = False
    of_tensors: bool = False  # measured against what is allocated, whatever the pools


CONTEXT = Overhead(
    "CUDA context and libraries",
    0.5 * 2**30,
    0.3 * 2**30,
    0.6 * 2**30,
    "assumed",
    "0.3-0.6 GiB are commonly reported",
)
COMMUNICATOR = Overhead(
    "NCCL buffers, per group of GPUs",
    0.25 * 2**30,
    0.1 * 2**30,
    0.4 * 2**30,
    "assumed",
    "NVIDIA/nccl#964: 544-688 MB with one group, context included; nvidia-smi readings of BLOOM's runs "
    "hold 1.1-1.6 GB beside PyTorch's with three",
)


ALLOCATOR = Overhead(
    "allocator: reserved over what its pools serve",
    0.09,
    0.0,
    0.12,
    "measured",
    "28 readings of torchtitan, eager and compiled, two thirds of them 5 to 12 %; under pressure PyTorch "
    "returns cached blocks before it fails",
    fraction=True,
)


@dataclass(frozen=True, slots=True)
class Offloading:
    """What a stack offloads under one kind of sharding, and how.

    ``whole`` maps what of the whole model it offloads (a Layout's ``offload``) to how it is asked for,
    ``layers`` what it offloads of single layers, as many as one likes. Beside what the GPU no longer holds,
    the host has ``gradients`` bytes of fp32 gradients per parameter of a GPU's own part (None: the gradients
    as they are), and ``halves`` of half-precision ones, if ``accumulated`` only of accumulated micro-batches.
    """

    whole: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    takes_gradients: bool = False  # they leave the GPU as they arise; else the update copies them
    gradients: float | None = 4.0
    halves: float = 0.0
    accumulated: bool = False
    staging: Staging = NO_STAGING
    returned: float = 0.0  # bytes per parameter that the update brings back, in the open
    checkpoints: bool = False  # the activations that it moves are those of recomputed layers, in the open


@dataclass(frozen=True, slots=True)
class Saving:
    """What a framework's checkpoint has: trained weights and optimizer states once, but for what this says.

    ``without_weights`` are the shardings that save master copies, where there are any, in place of the
    weights; ``in_fp32`` those that save a master copy and moments in fp32 even if the optimizer has none.
    """

    source: str
    without_weights: tuple[str, ...] = ()
    in_fp32: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stack:
    """Everything the planner knows of one training framework."""

    name: str
    version: str
    rows: Mapping[str, tuple[Row, ...]]  # per layer kind
    recipes: Mapping[str, Recipe]  # per precision
    shardings: Mapping[str, bool]  # kind -> does it run together with a pipeline?
    sharding_notes: Mapping[str, str]  # how each is asked for, in the framework's own words
    schedules: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]  # option -> its values, the default first
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields that an option replaces, as in ``kernels:megatron``."""
    rank_orders: Mapping[str, str] = field(default_factory=lambda: {"tp-dp-pp": ""})
    """Rank orders that it runs, innermost axis first, and how each is asked for; the default first."""
    words: tuple[str, ...] = ()  # feature words of its own
    precision_words: tuple[str, ...] = ()  # of a job's precision on its GPU (planner/precision.py)
    alone: Mapping[str, str] = field(default_factory=dict)  # options' defaults on a single GPU
    notes: Mapping[str, str] = field(default_factory=dict)  # precision -> what to know of it
    gradients_as_weights: bool = False  # gradients are of the weights' type, as autograd makes them
    moment_types: tuple[str, ...] = ("fp32", "bf16")  # those that --optimizer-dtype may ask for
    autocast: tuple[str, ...] = ()  # precisions that run fp32 weights under torch.autocast
    vocabulary_multiple: int = 1  # the vocabulary is padded to a multiple of this times t
    gradients_resident: bool = False  # one buffer for the whole step
    casts_weights: bool = False  # FSDP2's mixed precision: half-precision copies run forward and backward
    fused_accumulation: bool = False  # products add to the gradients without a copy of their own
    gradient_copies: bool = False  # the optimizer step copies half-precision gradients to fp32
    flat_copies: bool = False  # in one piece, from others that lie beside it
    receives_ahead: bool = False  # pipelines allocate what they receive of all micro-batches
    both_gradients: bool = False  # fp32 gradients are kept besides half-precision ones
    takes: Callable[[Mapping[str, bool], Recipe], Mapping[str, bool]] = lambda shardings, recipe: shardings
    """The shardings that are run with a recipe."""
    reduces_as_weights: bool = False  # FSDP's gradients, where the weights are in half precision
    tensor_parallel: bool = True
    context_comms: Mapping[str, str] = field(default_factory=dict)
    """Ways of context parallelism that it runs, the default first, and how each is asked for: with
    ``{heads}`` and ``{ring}`` for the degrees of two levels."""
    context_attention: tuple[str, ...] = ()  # the attention that these run; any, if empty
    rotated_bytes: float = 0.0  # of the gradients that PyTorch's own context parallelism sends round
    replicates: bool = True  # one replica, or those of DDP, without anything that is shared out
    expert_parallel: bool = False
    expert_tensor_parallel: bool = False
    tensor_cuts_experts: bool = False  # where expert parallelism is off, the width of routed experts
    policies: tuple[str, ...] = POLICIES  # the recompute policies it knows
    # What it can be told to recompute: of each layer apart, the first layers of every chunk, or all alike.
    recomputes: str = "all"
    split_policies: tuple[str, ...] = POLICIES  # those it runs where a schedule splits the backward
    block_policies: tuple[str, ...] = ("full",)  # those that run a whole block again before its backward
    rerun: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Products that a policy milder than ``full`` runs again: name -> policies that do not."""
    reruns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Products that an option runs again under every policy: ``name:value`` -> their names."""
    concerns: Mapping[str, str] = field(default_factory=dict)
    """What a model or a recipe must have for an option to mean anything: option -> a field of either."""
    families: tuple[str, ...] = ()  # the model types it has; all, if empty
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts of a model (``experts latent attention_sinks``) that its rows have, and the feature words that
    these rows were not counted with."""
    traced: tuple[str, ...] = ()  # model types beyond Llama's and GPT's parts that its rows were traced for
    separate_root: bool = False  # FSDP units: embedding and head each one of their own, unless root=one
    keeps_last: bool = False  # with one root unit, FSDP does not reshard the last block after its forward
    sizes: Mapping[str, float] = field(default_factory=dict)  # options that are numbers of elements
    bucket_fraction: float = 0.0
    eager_alibi: bool = False  # no fused attention for ALiBi models
    repeats_heads: bool = False  # tensor parallelism may exceed the key and value heads
    overlaps_regions: bool = False  # tensor parallelism reduces gradients behind the weights' products
    launches: tuple[float, float] = (20.0, 38.0)  # kernels of a block's forward and of its backward
    family_launches: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The same of single families, where their modules were counted."""
    attention_kernels: tuple[str, ...] = ("flash", "cudnn")  # fused ones, the preferred first
    hidden_transfers: str = ""  # the flags behind the overlap that is assumed
    offloading: Mapping[str, Offloading] = field(default_factory=dict)  # per sharding
    saving: Saving = field(kw_only=True)
    context: Overhead = CONTEXT
    communicator: Overhead = COMMUNICATOR
    allocator: Overhead = ALLOCATOR

    def under(self, options: Mapping[str, str]) -> Stack:
        """The stack as a job's options make it."""
        changed: dict[str, Any] = {}
        for name, value in options.items():
            changed |= self.variants.get(f"{name}:{value}", {})
        again = [part for name, value in options.items() for part in self.reruns.get(f"{name}:{value}", ())]
        if again:
            changed["rerun"] = {**changed.get("rerun", self.rerun), **dict.fromkeys(again, ())}
        return replace(self, **changed) if changed else self

    def concerned(self, option: str, model: object, recipe: Recipe) -> bool:
        """Has a model, or the precision that it is trained in, what an option is of?"""
        field = self.concerns.get(option)
        return field is None or any(getattr(of, field, False) for of in (model, recipe))

    @property
    def context_comm(self) -> str:
        """How context parallelism exchanges keys and values unless told otherwise."""
        return next(iter(self.context_comms), COMMS[0])

    def attention_kernel(self, attention: str | None, there: Iterable[str]) -> str:
        """The fused kernel that is run, of those that are known of a GPU; empty where none is."""
        wanted = {"eager": (), "flash1": ("flash1",)}.get(str(attention), self.attention_kernels)
        return next((name for name in wanted if name in there), "")

    def policies_with(self, schedule: str, wanted: Sequence[str] | None = None) -> tuple[str, ...]:
        """The recompute policies, or ways of running a layer, of those wanted, that a schedule allows."""
        policies = tuple(wanted or self.policies)
        if schedule not in SPLIT:
            return policies
        return tuple(way for way in policies if way.partition("+")[0] in self.split_policies)

    def autograd_bytes(self, recipe: Recipe) -> float:
        """Bytes per element of the gradients that autograd makes, before they are stored."""
        return recipe.compute if self.casts_weights else recipe.weight

    def size(self, name: str, options: Mapping[str, str]) -> float:
        """Elements of a buffer: as asked for, else the stack's own; 0 if it has none of that name."""
        return float(options.get(name, self.sizes.get(name, 0.0)))

    def wire(self, recipe: Recipe, options: Mapping[str, str]) -> Wire:
        """What this stack sends for data parallelism under a recipe and options."""
        usual = recipe.compute if self.both_gradients else recipe.gradient
        wire = Wire(
            gather_bytes=recipe.compute if self.casts_weights else recipe.gathered,
            reduce_bytes=WIDTHS.get(options.get("reduce_dtype", ""), usual),
            bucket_bytes=self.size("reduce_bucket_size", options) * recipe.compute,
            bucket_fraction=self.bucket_fraction if options.get("gradient_view") != "on" else 0.0,
            bucket_view=options.get("gradient_view") == "on",
            lasting=4 / recipe.gradient if self.both_gradients and recipe.gradient > 4 else 0.0,
            copies=options.get("version") != "1",
            overlaps_regions=self.overlaps_regions,
            repeats_heads=self.repeats_heads,
            separate_root=self.separate_root and options.get("root") != "one",
            keeps_last=self.keeps_last and options.get("root") == "one",
            rotated_bytes=self.rotated_bytes,
        )
        if not self.sizes:
            return wire
        return replace(
            wire,
            sub_group=self.size("sub_group_size", options),
            bucket_elements=self.size("reduce_bucket_size", options),
            live_elements=self.size("stage3_max_live_parameters", options),
            prefetch_elements=self.size("stage3_prefetch_bucket_size", options),
        )
