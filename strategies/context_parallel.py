"""Context parallelism: the sequence is cut, and attention sends keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

from strategies.base import AbstractStrategy, Buffer, Collective, Layer, Quantity, Role, Size, Term, larger

CUT = (
    Role.ACTIVATION,
    Role.OUTPUT_GRADIENT,
    Role.TRANSIENT,
    Role.BUFFER,
    Role.MESSAGE,
    Role.FLOPS,
    Role.TRAFFIC,
)
"""Roles whose terms are of a part of the sequence: all but model states."""
COMMS = ("ring", "all-gather", "ulysses", "ulysses+ring")
"""How attention gets at the keys and values of the other parts."""


def head_ranks(comm: str, context: Quantity, ulysses: Quantity) -> Quantity:
    """GPUs of the ``context`` of a sequence that hand out heads to each other: 1, all, or ``ulysses``."""
    return {"ulysses": context, "ulysses+ring": ulysses}.get(comm, 1)


@dataclass(frozen=True)
class ContextParallel(AbstractStrategy):
    """1/c of all that has a place in the sequence. The length that is attended to, ``seq_k``, stays whole.

    So 1/c of attention's work too, if every GPU has as much of the causal triangle as the others: a first
    and a last of 2c chunks each (zig-zag; Llama 3, arXiv:2407.21783, section 3.3.2). What is sent is the
    layer's message of keys and values, ``KV = 2 b s k d`` elements for k heads, forward and backward:

    - ``ring``: parts of KV/c go round in c - 1 sends, backward together with their gradients, behind the
      work of attention. Liu et al. 2023, arXiv:2310.01889, section 3. Two buffers, for the part in use and
      for the one that arrives: in the backward each of keys, values and their gradients (Transformer
      Engine's ``AttnFuncWithCPAndKVP2P``).
    - ``all-gather``: KV is gathered before attention, in the backward gathered again and its gradient
      reduce-scattered, all of it exposed; both exist whole. Llama 3, section 3.3.2, and
      Transformer Engine's ``AttnFuncWithCPAndKVAllGather``.
    - ``ulysses``: all-to-alls give every GPU the whole sequence of 1/c of the heads: of queries, keys, values
      and the output, and backward of their gradients, exposed. Jacobs et al. 2023, arXiv:2309.14509, section
      3: 4 N h / P elements of every GPU, where keys are as wide as queries.
    - ``ulysses+ring``: u neighbours (``ulysses_degree``) hand out heads to each other; each then has u/c of
      the sequence for 1/u of the heads, and keys and values, still KV/c, go round c/u GPUs. Fang and Zhao
      2024, arXiv:2405.07719; Transformer Engine's ``AttnFuncWithCPAndKVP2P`` with a group for each level. A
      ring is this with u = 1, Ulysses with u = c.

    ``rotated_bytes``: PyTorch's own (torch.distributed.tensor.experimental) sends the gradients of keys and
    values round even where these are gathered, in fp32: 4 bytes an element. 0 stands for their message's way
    and width.
    """

    axis: ClassVar[str] = "context"
    label: ClassVar[str] = "CP"
    comm: str = COMMS[0]
    tensor: Quantity = 1  # by which heads are cut already
    sequence_parallel: bool = False  # as is the sequence
    rotated_bytes: float = 0.0
    ulysses_degree: Quantity = 1  # of ulysses+ring

    @property
    def head_ranks(self) -> Quantity:
        """GPUs that hand out heads to each other, u."""
        return head_ranks(self.comm, self.degree, self.ulysses_degree)

    def share(self, term: Term) -> Quantity:
        return 1 / self.degree if term.role in CUT and "seq" in term.dims else 1

    def collectives(self, layer: Layer, size: Size) -> Iterable[Collective]:
        c = self.degree
        for term in sent(layer, "heads", "kv_heads") if "ulysses" in self.comm else ():
            each = size(term) / term.dims["pair"] / c
            for way, of in (("forward", term), ("backward", None)):
                yield Collective("all_to_all", self._level("heads"), each, term.dims["pair"], way=way, of=of)
        for term in sent(layer, "kv_heads") if self.comm != "ulysses" else ():
            whole, gradients = size(term), self._gradients(term, size)
            if self.comm == "all-gather":
                yield Collective("all_gather", self.axis, whole, way="forward", of=term)
                yield Collective("all_gather", self.axis, whole)
                if not self.rotated_bytes:
                    yield Collective("reduce_scatter", self.axis, gradients)
                    continue
                back = gradients / c
            else:
                yield self._round(whole / c, way="forward", of=term)
                back = (whole + gradients) / c
            yield self._round(back)

    def _round(self, part: Quantity, way: str = "backward", of: Term | None = None) -> Collective:
        sends = self.degree // self.head_ranks - 1
        return Collective("send", self._level("ring"), part, sends, behind="attention", way=way, of=of)

    def _level(self, name: str) -> str:
        return f"{self.axis}_{name}" if self.comm == "ulysses+ring" else self.axis

    def _gradients(self, term: Term, size: Size) -> Quantity:
        return size(term) / term.unit * (self.rotated_bytes or term.unit)

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        c, u = self.degree, self.head_ranks  # a group of one sends nothing
        found = [(size(t), self._gradients(t, size)) for layer in layers for t in sent(layer, "kv_heads")]
        wide = [size(t) / t.dims["pair"] for layer in layers for t in sent(layer, "heads", "kv_heads")]
        if not found:
            return
        whole, gradients = (reduce(larger, sizes) for sizes in zip(*found, strict=True))
        if "ulysses" in self.comm:
            arriving = reduce(larger, wide) / c
            yield Buffer("heads of other parts, arriving", arriving * (u > 1), "block")
        if self.comm == "all-gather":
            yield Buffer("keys and values, gathered", whole * (c > 1), "block")
            part = 2 / c if self.rotated_bytes else 1
            yield Buffer("gradients of keys and values", gradients * part * (c > 1), "block")
        if "ring" in self.comm:  # there until the gradients have arrived where their tokens are
            both = 2 * (whole + gradients) / c
            yield Buffer("keys and values going round, two buffers", both * (c // u > 1), "block")

    def objections(self, layers: Sequence[Layer]) -> Iterable[str]:
        c, t, u = self.degree, self.tensor, self.head_ranks
        if self.comm == "ulysses+ring" and (c % u or u in (1, c)):
            fits = ", ".join(str(n) for n in range(2, c // 2 + 1) if c % n == 0)
            fix = f"ulysses_degree {fits}, or " * bool(fits)
            fix += f"context_comm {'ring' if u == 1 else 'ulysses' if u == c else 'ring or ulysses'}"
            yield f"ulysses_degree={u} does not make two levels of context_parallel={c}: use {fix}"
        for term in [term for layer in layers for term in sent(layer, "kv_heads")][:1]:
            # A first and a last chunk for every GPU, each of which sequence parallelism cuts.
            chunks = (1 if self.comm == "ulysses" else 2) * c
            length = term.dims["seq"]
            if length % chunks:
                yield (
                    f"context_parallel={c} with {self.comm} cuts sequences in {chunks}, which does not "
                    f"divide seq_length={length}: use a multiple of {chunks}"
                )
            elif self.sequence_parallel and length % (t * c):
                yield (
                    f"tensor_parallel={t} x context_parallel={c} does not divide seq_length={length}, which "
                    f"sequence_parallel cuts: use a multiple of {t * c}, or leave sequence_parallel off"
                )
        if "ulysses" not in self.comm:
            return
        cut = "context_parallel" if self.comm == "ulysses" else "ulysses_degree"
        heads = [(n, t.dims[n]) for layer in layers for n in ("heads", "kv_heads") for t in sent(layer, n)]
        for name, length in dict.fromkeys(heads):
            if length % (u * t):
                by = f"tensor_parallel={t} x {cut}={u}" if t > 1 else f"{cut}={u}"
                yield (
                    f"{by} does not divide {name}={length}, which ulysses hands out: use a {cut} "
                    f"that does, or context_comm ring"
                )


def sent(layer: Layer, *names: str) -> list[Term]:
    """What attention sends: messages of ``kv_heads``, keys and values, or ``heads``, queries and output."""
    return [
        t for t in layer.by_role[Role.MESSAGE] if "head_dim" in t.dims and any(n in t.dims for n in names)
    ]
