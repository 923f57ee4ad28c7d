"""Seconds of a layer's own work on a GPU: matrix products, attention, memory-bound kernels, launches.

A pass takes the sum of its kernels' times, as they run one after the other:

- a weight's product: FLOPs at the best rate of a product of its shape (:mod:`planner.products`);
- attention: FLOPs at the rate of its kernel, which grows with the sequence;
- memory-bound kernels: the bytes that they move (:mod:`planner.stacks.traffic`), at what such kernels
  reach of the bandwidth;

and never less than the host takes to launch them. Messages behind a pass take multiprocessors from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from planner.catalog import host
from planner.defaults import Job
from planner.layers import UNFUSED
from planner.products import passes
from strategies.base import AbstractStrategy, Layer, Quantity, Role, Term, held

ALIGNED = 8
"""Elements of half precision that tensor cores take at a time: products along a length that is no multiple
of it run without them (NVIDIA, Matrix Multiplication Background User's Guide, "Tensor Core Requirements";
cuBLAS before version 11 states it as a condition)."""
CHANNELS = 24
"""Multiprocessors that NCCL takes, one a channel: as many as it opens on eight A100 (NVIDIA/nccl-tests
issue 100, "Channel 23/24")."""
SCORES_MOVED = 6
"""How often unfused attention's products write or read the scores: twice forward, four times backward."""


TOKENS = ("batch", "seq", "routed")
"""Dimensions of a product that are not those of its weight."""
STATES = frozenset(("state", "key_dim"))
"""Dimensions of a scan's states: of a state space, of a delta net."""
NONE: Mapping[str, Quantity] = {"forward": 0.0, "backward": 0.0}
"""No messages."""


class Passes(NamedTuple):
    """Seconds of one micro-batch's passes through a layer: forward; again, what of it is recomputed;
    the gradient of its input; those of its weights."""

    forward: Quantity = 0.0
    again: Quantity = 0.0
    inputs: Quantity = 0.0
    weights: Quantity = 0.0

    @property
    def backward(self) -> Quantity:
        """Seconds of the backward, with what it runs again."""
        return self.again + self.inputs + self.weights


class Compute:
    """What a job's layers take on one of its GPUs."""

    def __init__(self, job: Job, own_length: Quantity | None = None) -> None:
        self.job = job
        self.own_length = job.seq_length if own_length is None else own_length
        gpu = job.cluster.gpu
        reach = {name: figure.value for name, figure in gpu.achievable.items()}
        self.peak = gpu.peak_flops.get(job.recipe.unit, gpu.peak_flops["fp32"])
        # Of an FP4 peak the fraction of FP8's is assumed.
        part = reach.get("fp8", reach["matmul"]) if job.recipe.quantized else reach["matmul"]
        self.products = self.peak * part * reach["sustained"]
        self.rest = gpu.peak_flops.get(job.recipe.rest, self.peak)  # of the head and of attention
        half = gpu.peak_flops.get("bf16", gpu.peak_flops.get("fp16", self.peak))
        self.half_products = half * reach["matmul"] * reach["sustained"]
        full = job.recipe.unit if job.recipe.unit in ("fp32", "tf32") else "fp32"
        self.full_products = (
            gpu.peak_flops.get(full, gpu.peak_flops["fp32"]) * reach["matmul"] * reach["sustained"]
        )
        self.head_products = self.half_products if job.recipe.rest else self.products
        self.unaligned = gpu.peak_flops["fp32"] * reach["matmul"]
        self.bandwidth = gpu.hbm_bytes_per_s * reach["memory"]
        self.kernels = self.bandwidth * reach["kernels"]
        self.in_step = reach["in_step"]
        self.multiprocessors = gpu.multiprocessors or 0
        self.channels = min(1.0, CHANNELS / self.multiprocessors) if self.multiprocessors else 0.0
        self.launch, self.blocked = host("launch_s").value, host("blocked_launch_s").value
        self.blocking = job.training.options.get("launch_blocking") == "on"
        self.attention = gpu.attention.get(job.stack.attention_kernel(job.training.attention, gpu.attention))
        self.memo: dict[tuple[str, str], tuple[Quantity, Quantity, Quantity]] = {}

    def products_of(self, width: float) -> float:
        """FLOPs a second of products of so many bytes an element, which no autocast narrows."""
        return self.full_products if width == 4 else self.half_products

    def passes(
        self,
        layer: Layer,
        plain: Sequence[AbstractStrategy],
        strategies: Sequence[AbstractStrategy],
        hidden: Mapping[str, Quantity] = NONE,
        exposed: Mapping[str, Quantity] = NONE,
        copied: Mapping[str, Quantity] = NONE,
    ) -> Passes:
        """Seconds of a layer's passes; ``plain`` are the strategies without recompute.

        Of the messages of the forward and of the backward, ``hidden`` seconds run behind the kernels,
        ``exposed`` ones between them, and ``copied`` bytes are moved around them.
        """
        forward: Quantity = 0.0
        rerun: Quantity = 0.0
        inputs: Quantity = 0.0
        weights: Quantity = 0.0
        for term in (*layer.by_role[Role.FLOPS], *layer.by_role[Role.TRAFFIC]):
            once, of_input, of_weight = self.seconds(layer, term, plain)
            forward = forward + once
            rerun = rerun + once * again(term, strategies)
            inputs, weights = inputs + of_input, weights + of_weight
        ways = zip(("forward", "backward"), (forward, rerun + inputs + weights), strict=True)
        ahead, back = (
            self.behind(work + copied[way] / self.kernels, hidden[way]) + exposed[way] for way, work in ways
        )
        if layer.is_block:
            ahead, back = self._launched(layer, strategies, ahead, back)
        return Passes(ahead, rerun, back - rerun - weights, weights)

    def _launched(
        self, layer: Layer, strategies: Sequence[AbstractStrategy], forward: Quantity, backward: Quantity
    ) -> tuple[Quantity, Quantity]:
        """Seconds of the passes with what the host takes to launch them: ahead of the GPU, or in turn."""
        work = layer.by_role[Role.FLOPS]
        part = sum(again(term, strategies) for term in work) / len(work)  # of the forward's kernels
        stack = self.job.stack
        counts = stack.family_launches.get(self.job.model.model_type, stack.launches)
        each = self.blocked if self.blocking else self.launch
        first, second = (count * each for count in counts)
        second = (second + part * first) * layer.backward
        if self.blocking:
            return forward + first, backward + second
        return np.maximum(forward, first), np.maximum(backward, second)

    def behind(self, work: Quantity, messages: Quantity) -> Quantity:
        """Seconds of work that messages run behind, on their part of the multiprocessors."""
        return np.maximum(work + self.channels * messages, messages)

    def seconds(
        self, layer: Layer, term: Term, plain: Sequence[AbstractStrategy]
    ) -> tuple[Quantity, Quantity, Quantity]:
        """Seconds of a term's forward, of its input's gradient and of its weight's, nothing recomputed.

        A layer that no gradient reaches makes neither.
        """
        if (key := (layer.kind, term.name)) not in self.memo:
            amount = held(term, plain)
            if term.role is Role.TRAFFIC:
                third = amount / self.kernels / 3
                self.memo[key] = third, 2 * third, 0.0
            elif "hidden" not in term.dims and not STATES.isdisjoint(term.dims):  # a scan, without weights
                third = amount / self.products / 3
                self.memo[key] = third, 2 * third, 0.0
            elif "seq_k" not in term.dims:
                rate = self.head_products if layer.kind == "head" else self.products
                self.memo[key] = self._product(term, amount, plain, rate)
            else:
                self.memo[key] = self._attention(term, amount)
            if not layer.backward:
                self.memo[key] = self.memo[key][0], 0.0, 0.0
        return self.memo[key]

    def behind_attention(
        self, layer: Layer, plain: Sequence[AbstractStrategy], seconds: Quantity, way: str
    ) -> tuple[Quantity, Quantity]:
        """Seconds of messages that run behind attention in a pass, and of those left between kernels."""
        cores = [term for term in layer.by_role[Role.FLOPS] if "seq_k" in term.dims]
        work = sum(self.seconds(layer, term, plain)[way == "backward"] for term in cores)
        hidden = np.minimum(seconds, work)
        return hidden, (seconds - hidden) / self.in_step

    def _product(
        self, term: Term, flops: Quantity, plain: Sequence[AbstractStrategy], rate: float
    ) -> tuple[Quantity, Quantity, Quantity]:
        """A weight's product with every token, its input's gradient and its own, if made: equal work."""
        trained, back_through = term.unit == 6, term.unit > 2  # FLOPs of each element, 2 for each product
        third = flops / rate / (term.unit / 2)
        if not self.multiprocessors:
            return third, third * back_through, third * trained
        rows = {name: n for name, n in term.dims.items() if name in TOKENS}
        tokens = held(Term("", Role.ACTIVATION, rows, 1.0), plain)
        weight = [name for name in term.dims if name not in TOKENS]
        back = weight[-1] in ("hidden", "rank")
        whole = term.dims[weight[-1 if back else 0]]  # one side of every weight is never cut
        other = flops / (term.unit * tokens * whole)
        groups: Quantity = 1
        if "routed" in rows and self.job.model.experts:  # each expert on the GPU has its part of them
            number = {"experts": self.job.model.experts.num_experts}
            groups = held(Term("", Role.FLOPS, number, 1.0), plain)
        sides = (other, whole) if back else (whole, other)
        forward, inputs, weights = passes(tokens / groups, *sides, self.multiprocessors, groups)
        return third * forward, third * inputs * back_through, third * weights * trained

    def _attention(self, term: Term, flops: Quantity) -> tuple[Quantity, Quantity, Quantity]:
        """The attention core: fused, at its kernel's rate; else products that move the scores."""
        width = term.dims["head_dim"]
        if self.attention is None or term.unit == UNFUSED:
            aligned = width % ALIGNED == 0 or self.job.recipe.compute == 4
            moved = flops / term.unit / width * SCORES_MOVED * self.job.recipe.compute
            rate = self.head_products if aligned else self.unaligned
            third = np.maximum(flops / rate, moved / self.kernels) / 3
            return third, 2 * third, 0.0
        forward, backward = self.attention.rates(width, self.own_length)
        # Two products forward, five backward (Dao 2023, arXiv:2307.08691, section 4.1).
        return flops * 2 / 7 / (self.rest * forward), flops * 5 / 7 / (self.rest * backward), 0.0


def again(term: Term, strategies: Sequence[AbstractStrategy]) -> float:
    """How often a term's forward is run again under the recompute policy.

    Its strategy counts a freed term of work, a third of it forward, 4/3, and a message, half of it, 3/2.
    """
    parts = 2 if term.role is Role.MESSAGE else 3
    return sum((round(parts * (one.share(term) - 1)) for one in strategies if one.axis == "recompute"), 0.0)
