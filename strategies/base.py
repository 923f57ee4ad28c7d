"""The words that every strategy is written in: Role, Term, Layer, Collective, AbstractStrategy.

A paper's formula such as Korthikanti et al.'s ``sbh(34 + 5as/h)`` is a *sum of terms*; a
parallelism strategy says which *share* of a term one GPU holds. What one GPU holds of a term is

    held(term) = term.amount * product of strategy.share(term) over the strategies

and that is the whole of composition. Quantities may be numbers, or numpy arrays that hold one
number per layout: shares are arithmetic without branches on a degree, so that the same four
answers price one layout or a million.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import prod
from typing import Any, ClassVar, NamedTuple

Quantity = Any
"""A number, or a numpy array with one number per layout."""


def smaller(a: Quantity, b: Quantity) -> Quantity:
    """min(a, b), for numbers and arrays alike."""
    return (a + b - abs(a - b)) / 2


def larger(a: Quantity, b: Quantity) -> Quantity:
    """max(a, b), for numbers and arrays alike."""
    return (a + b + abs(a - b)) / 2


POLICIES = ("none", "selective", "full")
"""Recompute policies of a layer, from the one that keeps most to the one that keeps least."""


class Role(StrEnum):
    """What a term is, and so which strategies share it out."""

    PARAMETER = "parameter"
    GRADIENT = "gradient"
    OPTIMIZER = "optimizer"
    ACTIVATION = "activation"  # kept from forward to backward, of one micro-batch
    OUTPUT_GRADIENT = "output gradient"  # kept until the weights' gradients are made, if that is apart
    TRANSIENT = "transient"  # exists only in one step of its own layer's backward (or in the loss)
    BUFFER = "buffer"  # there for the whole step, besides model states
    MESSAGE = "message"  # crosses a tensor-parallel region or a stage boundary
    FLOPS = "flops"  # forward and backward, of one micro-batch
    TRAFFIC = "traffic"  # bytes through the GPU's memory in memory-bound work, one micro-batch


STATES = (Role.PARAMETER, Role.GRADIENT, Role.OPTIMIZER)
"""Model states, in the ZeRO paper's words."""


@dataclass(frozen=True, slots=True)
class Term:
    """One product of a formula: ``2 s b h`` is dims ``{batch: b, seq: s, residual: h}``, unit 2.

    ``dims`` maps dimension names (``batch seq seq_k residual hidden heads kv_heads head_dim ffn
    vocab``) to their lengths; ``unit`` is bytes (or FLOPs) per element. ``residual`` is the
    residual stream of an activation, ``hidden`` the same length in a weight: only the first is
    cut by sequence parallelism. ``seq`` is the sequence as a GPU has it, ``seq_k`` as it attends to it:
    only the first is cut by context parallelism. Of a mixture ``experts`` and ``expert_ffn`` are the number
    and the width of routed experts' weights, ``routed`` the experts that a token goes to, ``width`` the
    residual stream of a routed token, ``router`` the experts that are chosen from.

    ``kept_by`` lists the recompute policies under which the term is
    kept after the forward (activations) or not run again (work and messages). ``steps`` names the
    steps of its layer's backward that it belongs to: after which an activation is freed, in which a
    gradient arises, during which a transient exists; several share the term evenly.
    """

    name: str
    role: Role
    dims: Mapping[str, Quantity]
    unit: float
    kept_by: tuple[str, ...] = POLICIES
    steps: tuple[str, ...] = ()

    @property
    def elements(self) -> Quantity:
        """Number of elements before any strategy shares them out."""
        return prod(self.dims.values())

    @property
    def amount(self) -> Quantity:
        """Bytes (or FLOPs) before any strategy shares them out."""
        return self.elements * self.unit


@dataclass(frozen=True, slots=True)
class Layer:
    """A bill of terms: the embedding, one transformer block, or the head with its loss.

    ``kind`` is ``embedding``, ``head`` or ends in ``block``, of which a model may have several kinds;
    ``steps`` are the steps of its backward, in the order in which they run; ``backward`` is False where no
    gradient reaches it: then its work and its messages are those of the forward alone.
    """

    kind: str
    terms: tuple[Term, ...]
    count: int = 1
    steps: tuple[str, ...] = ()
    backward: bool = True
    by_role: Mapping[Role, tuple[Term, ...]] = field(init=False, repr=False, compare=False)

    @property
    def trained(self) -> tuple[Term, ...]:
        """Parameters that have a gradient."""
        names = {term.name for term in self.by_role[Role.GRADIENT]}
        return tuple(term for term in self.by_role[Role.PARAMETER] if term.name in names)

    def __post_init__(self) -> None:
        grouped: dict[Role, tuple[Term, ...]] = dict.fromkeys(Role, ())
        for term in self.terms:
            grouped[term.role] += (term,)
        object.__setattr__(self, "by_role", grouped)

    @property
    def is_block(self) -> bool:
        """Is it a transformer block?"""
        return self.kind.endswith("block")


@dataclass(frozen=True, slots=True)
class Collective:
    """A message: its kind, the group it runs in, the buffer's bytes, how often, what hides it.

    ``size`` is the whole buffer in bytes (what an all-gather ends with, what a reduce-scatter
    starts from, what a GPU hands to the next one in a send). ``per`` is ``micro-batch`` or ``step``.
    ``behind`` names the computation that it overlaps with (``layer``: its own layer's compute;
    ``attention``: that of attention in it; ``forward``/``backward``: one micro-batch's pass through the
    stage); empty means that it is exposed. ``way`` is the pass of a micro-batch that it belongs to,
    ``forward`` or ``backward``. ``of`` is the term that crosses a region, where there is one: what is
    recomputed of the forward is sent again. ``copied`` are bytes that the GPU moves each time, between the
    message's buffer and the tensors that it is made of.
    """

    kind: str
    axis: str
    size: Quantity
    times: Quantity = 1
    per: str = "micro-batch"
    behind: str = ""
    way: str = "backward"
    of: Term | None = None
    copied: Quantity = 0


Size = Callable[[Term], Quantity]
"""Bytes of a term that the strategies on *other* axes, pipeline aside, leave on this GPU."""


SPANS = (
    "start",
    "passes",
    "logits",
    "loss",
    "block",
    "not first",
    "not last",
    "end",
    "reduction",
    "optimizer step",
)
"""When a buffer exists: as the forward starts; in all of forward and backward; when the logits have been
made; in the loss's and the head's backward; while a block runs backward, any, any but the first to do
so, any but the last; while the embedding's gradient is made; while the last gradients are reduced; in
the optimizer step."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes a strategy allocates besides the terms, during one of ``SPANS`` of a step.

    ``stream`` names the CUDA stream that allocates it: PyTorch's allocator never hands memory that was
    freed on one stream to another, so each stream's pool stays as large as it ever was.
    """

    name: str
    size: Quantity
    span: str = "passes"
    stream: str = "compute"


class Kept(NamedTuple):
    """What part of the gradients that stay on a GPU exists at three moments of a step."""

    forward: Quantity
    backward: Quantity  # from the start of it on; the rest arises layer by layer
    update: Quantity  # in the optimizer step


@dataclass(frozen=True)
class AbstractStrategy(ABC):
    """Four answers about terms. The defaults are those of a strategy that does nothing."""

    axis: ClassVar[str]
    """The group it works in: data, tensor, context, expert, pipeline; recompute and offload have but one."""
    label: ClassVar[str]
    """The column heading that ``planner explain`` gives it."""
    gradient_stream: ClassVar[str] = "compute"
    """The CUDA stream whose pool the gradients that stay lie in."""
    degree: Quantity = 1

    def share(self, term: Term) -> Quantity:
        """What part of this term does one GPU hold?"""
        return 1

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        """What do the GPUs send each other for this layer?"""
        return ()

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        """What more must one GPU allocate for these layers, in bytes?"""
        return ()

    def gathered(self, parameter: Term, size: Size) -> Quantity:
        """Bytes of a parameter that is kept gathered from its layer's forward to its backward.

        Part of the answer to ``workspace``.
        """
        return 0

    def arriving(self, gradient: Term, size: Size) -> Quantity | None:
        """Bytes of a layer's gradient from when it arises to the end of the layer's backward.

        Part of the answer to ``workspace``. None where it arises in the place where it stays.
        """
        return None

    def kept_gradients(self) -> Kept | None:
        """When are the gradients there that ``share`` says stay?

        Part of the answer to ``share``. None: they arise layer by layer, and are there until the end of
        the optimizer step.
        """
        return None

    def objections(self, layers: Sequence[Layer]) -> Iterable[str]:
        """Why can this degree not be used for these layers?"""
        return ()


@dataclass(frozen=True)
class DataStrategy(AbstractStrategy):
    """A strategy of the data-parallel group, which is larger or smaller for the weights of experts.

    Every GPU has other tokens for a routed expert, but for those that it shares experts with: what data
    parallelism does with a state, it does with that of an expert over the expert-data group, of
    ``expert_degree`` GPUs (Megatron Core's ``expert_data_parallel``, DeepSpeed's expert-data group).
    """

    axis: ClassVar[str] = "data"
    expert_degree: Quantity = field(default=0, kw_only=True)  # 0 stands for ``degree``

    def __post_init__(self) -> None:
        if isinstance(self.expert_degree, int) and not self.expert_degree:
            object.__setattr__(self, "expert_degree", self.degree)

    def ranks(self, term: Term) -> Quantity:
        """GPUs that hold, or share, a state between them."""
        return self.expert_degree if "experts" in term.dims else self.degree


def by_group(layer: Layer, axis: str, experts: str = "expert_data") -> Iterator[tuple[str, Layer]]:
    """A layer's states by the axis that they are reduced along: all but experts first, then experts."""
    expert = tuple(term for term in layer.terms if "experts" in term.dims)
    if not expert:
        yield axis, layer
        return
    yield axis, replace(layer, terms=tuple(term for term in layer.terms if "experts" not in term.dims))
    yield experts, replace(layer, terms=expert)


def held(term: Term, strategies: Iterable[AbstractStrategy]) -> Quantity:
    """Bytes (or FLOPs) of ``term`` on one GPU: its amount times every strategy's share."""
    amount = term.amount
    for strategy in strategies:
        share = strategy.share(term)
        if not (isinstance(share, int) and share == 1):  # most are, and arrays take their time
            amount = amount * share
    return amount


def size_seen_by(strategy: AbstractStrategy, strategies: Sequence[AbstractStrategy]) -> Size:
    """The ``size`` that ``strategy`` may see: what strategies on other axes leave, pipeline aside.

    Of three rules this is the one that does not depend on the order of the strategies and that
    gives the papers' message sizes. What is offloaded is sent all the same.
    """
    others = [s for s in strategies if s.axis not in (strategy.axis, "pipeline", "offload")]
    return lambda term: held(term, others)
