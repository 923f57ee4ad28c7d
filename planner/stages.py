"""Prices layouts: bytes and seconds per layer, recompute policy and stage.

:func:`price` prices a whole family of layouts at once, per layer; :meth:`Prices.spread` spreads
one of them over its stages. Both only add up ``held(term)``: there is no second formula.

The peak of a stage is the maximum over the moments of a step, each linear in the layers it holds:

- ``loss`` (last stage): model states, activations in flight, the loss's own tensors;
- ``backward``: model states, activations in flight, the working set of one layer's backward
  (its gradients of activations, and what it recomputes);
- ``gradients complete``, where gradients arrive during the only backward of a step: model states
  with all gradients but the embedding's and one layer's working set, activations gone;
- ``optimizer step``: model states and the optimizer's buckets.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from planner.candidate import Candidate, Stage
from planner.defaults import Job
from planner.layers import Builder
from planner.network import Network
from strategies.base import (
    STATES,
    AbstractStrategy,
    Buffer,
    Layer,
    Quantity,
    Role,
    Term,
    held,
    size_seen_by,
)
from strategies.layout import Layout, strategies_of
from strategies.pipeline_parallel import PipelineParallel

MOMENTS = ("loss", "backward", "gradients complete", "optimizer step")


@dataclass(frozen=True)
class LayerPrice:
    """One layer on one GPU, pipeline aside: bytes by role, seconds of one micro-batch."""

    states: dict[Role, Quantity]
    update_bytes: Quantity  # moved by the optimizer step
    saved: Quantity
    working: Quantity  # bytes besides ``saved`` while its own backward runs
    seconds: Quantity
    per_step: tuple[tuple[str, Quantity], ...]  # (hidden behind, seconds) of once-a-step messages


def exists(buffer: Buffer, moment: str) -> bool:
    """Is a buffer there at a moment? ``gradients complete`` is within the backward."""
    if buffer.moment == "passes":
        return moment != "optimizer step"
    return buffer.moment == ("backward" if moment == "gradients complete" else moment)


def role_sum(layer: Layer, role: Role, strategies: Iterable[AbstractStrategy]) -> Quantity:
    """What one GPU holds of all of a layer's terms of a role."""
    return sum(held(term, strategies) for term in layer.by_role[role])


def overhead_bytes(job: Job, layout: Layout) -> Quantity:
    """Bytes outside tensors that do not grow with them: context, and buffers of each group."""
    return job.stack.context.value + job.stack.communicator.value * groups(layout)


def groups(layout: Layout) -> Quantity:
    """Kinds of groups that a GPU communicates in: tensor, pipeline, data (two of it if hybrid)."""
    hybrid = (layout.data_shards > 1) * (layout.data_shards < layout.data_parallel)
    degrees = (layout.data_parallel, layout.tensor_parallel, layout.pipeline_parallel)
    return sum((degree > 1) * 1 for degree in degrees) + hybrid * (layout.sharding == "fsdp")


def tensor_capacity(job: Job, layout: Layout) -> Quantity:
    """Bytes that tensors may fill: the budget less what lies outside them."""
    return (job.cluster.capacity_bytes * job.stretch - overhead_bytes(job, layout)) / (
        1 + job.stack.allocator.value
    )


def _pick(value: Any, selector: Any) -> Any:
    """The part of every array inside a value; numbers that hold for the whole family stay."""
    if isinstance(value, np.ndarray):
        return value[selector] if value.ndim else value
    if isinstance(value, dict):
        return {key: _pick(item, selector) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_pick(item, selector) for item in value)
    if isinstance(value, LayerPrice | Layout | PipelineParallel):
        parts = {f.name: _pick(getattr(value, f.name), selector) for f in fields(value)}
        return replace(value, **parts)
    return value


class Prices:
    """A family of layouts, priced per layer. Every number may be an array over the family."""

    def __init__(self, job: Job, layout: Layout, policies: Sequence[str]) -> None:
        self.job, self.layout, self.policies = job, layout, tuple(policies)
        self.network = Network.of(job.cluster)
        gpu = job.cluster.gpu
        peaks = gpu.peak_flops
        # A whole layer sustains a fraction of what its best product alone achieves.
        sustained = gpu.achievable["sustained"].value
        peak = peaks.get(job.recipe.unit, peaks["fp32"])
        self.flops = peak * gpu.achievable["matmul"].value * sustained
        self.bandwidth = gpu.hbm_bytes_per_s * gpu.achievable["memory"].value
        self.wire = job.stack.wire(job.recipe)
        self.layers = Builder(
            job.model,
            job.training,
            job.stack,
            job.recipe,
            batch=layout.micro_batch_size,
            tensor_parallel=layout.tensor_parallel,
            pipeline_parallel=layout.pipeline_parallel,
        ).layers()
        self.embedding, self.head = (self._price(self.layers[i], "none") for i in (0, 2))
        self.plain = self._price(self.layers[1], "none")
        self.blocks = [
            self.plain if policy == "none" else self._price(self.layers[1], policy)
            for policy in self.policies
        ]
        self.pipeline = self.pipeline_at(0)
        depth = job.model.num_hidden_layers
        self.short = (-depth) % layout.chunks
        self.rows = (depth + self.short) // layout.chunks
        # The part of the gradients' bytes that is there from the start: all of them in one buffer or
        # from the second micro-batch on, else what DDP's buckets take beside them.
        buckets = self.wire.bucket_fraction * (layout.sharding == "ddp") * (layout.data_parallel > 1)
        whole = np.maximum(layout.grad_accum > 1, job.stack.gradients_resident) * 1.0
        self.resident = np.maximum(whole, buckets / (1 + buckets))
        self.capacity = tensor_capacity(job, layout)
        self.send = self._send_seconds()
        self.step_seconds = self._step_seconds()
        ends = [(first, last) for first in (False, True) for last in (False, True)]
        self.buffer_bytes = {end: self._buffer_bytes(*end) for end in ends}

    def take(self, selector: Any) -> Prices:
        """The same prices for a part of the family: an index, or an index array and new axes."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if name != "layers":
                setattr(part, name, _pick(value, selector))
        return part

    def pipeline_at(self, stage: Quantity) -> PipelineParallel:
        """The pipeline strategy seen from a stage."""
        layout = self.layout
        return PipelineParallel(
            layout.pipeline_parallel, stage, layout.grad_accum, layout.chunks, layout.schedule
        )

    def _price(self, layer: Layer, policy: str) -> LayerPrice:
        *strategies, _ = strategies_of(self.layout, self.wire, 0, policy)
        saved = role_sum(layer, Role.ACTIVATION, strategies)
        working = role_sum(layer, Role.TRANSIENT, strategies)
        if policy != "none":
            # What is kept by no recompute but not by this policy is there again in the backward.
            plain = strategies_of(self.layout, self.wire, 0, "none")[:-1]
            freed = [t for t in layer.by_role[Role.ACTIVATION] if policy not in t.kept_by]
            working = working + sum(held(t, plain) for t in freed)
        compute = role_sum(layer, Role.FLOPS, strategies) / self.flops
        compute = compute + role_sum(layer, Role.TRAFFIC, strategies) / self.bandwidth
        hidden: Quantity = 0.0
        exposed: Quantity = 0.0
        per_step: list[tuple[str, Quantity]] = []
        for strategy in strategies:
            for message in strategy.collectives(layer, size_seen_by(strategy, strategies)):
                seconds = self.network.seconds(message, self.layout)
                if message.per == "step":
                    per_step.append((message.behind, seconds))
                elif message.behind == "layer":
                    hidden = hidden + seconds
                else:
                    exposed = exposed + seconds
        return LayerPrice(
            states={role: role_sum(layer, role, strategies) for role in STATES},
            update_bytes=self._update_bytes(layer, strategies),
            saved=saved,
            working=working,
            seconds=np.maximum(compute, hidden) + exposed,
            per_step=tuple(per_step),
        )

    def _update_bytes(self, layer: Layer, strategies: Sequence[AbstractStrategy]) -> Quantity:
        # States are read and written, the gradient read, the weight written, of this GPU's part.
        total: Quantity = 0.0
        recipe = self.job.recipe
        for term in layer.by_role[Role.OPTIMIZER]:
            one = Term(term.name, term.role, term.dims, 1.0)
            total = total + held(one, strategies) * (2 * term.unit + recipe.gradient + recipe.weight)
        return total

    @property
    def send_bytes(self) -> Quantity:
        """Bytes of one micro-batch's residual stream as a stage hands it on."""
        job, layout = self.job, self.layout
        sharded = layout.tensor_parallel if layout.sequence_parallel else 1
        whole = layout.micro_batch_size * job.seq_length * job.model.hidden_size * job.recipe.compute
        return whole / sharded

    def _send_seconds(self) -> Quantity:
        # A chunk's output goes on once forward and its gradient back once: exposed.
        once = self.network.send_seconds(self.send_bytes, self.layout)
        return 2 * once * self.layout.chunks * (self.layout.pipeline_parallel > 1)

    def _step_seconds(self) -> Quantity:
        # Once a step, on an average stage with embedding or head: what messages exceed
        # of the pass they hide behind (backward two thirds, forward one), and the update.
        depth = self.job.model.num_hidden_layers / self.layout.pipeline_parallel
        block = self.plain
        window = block.seconds * depth
        exposed: Quantity = 0.0
        for index, (behind, seconds) in enumerate(block.per_step):
            around = self._around(self.embedding.per_step[index][1], self.head.per_step[index][1])
            share = {"backward": 2 / 3, "forward": 1 / 3}[behind]
            exposed = exposed + np.maximum(0.0, seconds * depth + around - share * window)
        around = self._around(self.embedding.update_bytes, self.head.update_bytes)
        total = exposed + (block.update_bytes * depth + around) / self.bandwidth
        # PipeDream updates its weights after every micro-batch.
        return total * (self.layout.grad_accum if self.layout.schedule == "pipedream" else 1)

    def _around(self, embedding: Quantity, head: Quantity) -> Quantity:
        """Of embedding and head, both on a single stage, the larger on several."""
        return np.where(self.layout.pipeline_parallel == 1, embedding + head, np.maximum(embedding, head))

    def stage_layers(self, first: bool, last: bool) -> list[Layer]:
        """One layer of each kind that a stage holds."""
        embedding, block, head = self.layers
        return [*([embedding] if first else []), block, *([head] if last else [])]

    def _buffer_bytes(self, first: bool, last: bool) -> dict[str, Quantity]:
        buffers = self.buffers(first, last)
        return {m: sum(b.size for b in buffers if exists(b, m)) for m in MOMENTS}

    def buffers(self, first: bool, last: bool) -> list[Buffer]:
        """What the strategies allocate besides the terms on such a stage."""
        *strategies, _ = strategies_of(self.layout, self.wire)
        layers = self.stage_layers(first, last)
        return [
            buffer
            for strategy in strategies
            for buffer in strategy.workspace(layers, size_seen_by(strategy, strategies))
        ]

    def state_bytes(self, price: LayerPrice, pipeline: PipelineParallel, gradients: Quantity) -> Quantity:
        """Model states of a layer on a stage, with that fraction of its gradients."""
        total: Quantity = 0.0
        for role, size in price.states.items():
            share = pipeline.share(Term("", role, {}, 1.0))
            total = total + size * share * (gradients if role is Role.GRADIENT else 1)
        return total

    def moments(
        self, stage: Quantity, first: bool, last: bool
    ) -> dict[str, tuple[list[Quantity], Quantity, bool]]:
        """Every moment of a stage as numbers of the layers it holds; see :class:`Stage`."""
        pipeline = self.pipeline_at(stage)
        chunks, flight = self.layout.chunks, pipeline.in_flight
        sizes = self.buffer_bytes[first, last]
        around = [*([self.embedding] if first else []), *([self.head] if last else [])]

        def fixed(gradients: Quantity) -> Quantity:
            missing = (self.short >= 1) * last + (self.short == 2) * first
            states = sum(self.state_bytes(price, pipeline, gradients) for price in around)
            return states - missing * self.state_bytes(self.blocks[0], pipeline, gradients)

        def rows(gradients: Quantity) -> Quantity:
            return self.state_bytes(self.blocks[0], pipeline, gradients) * chunks

        # The embedding's activations are in flight like a first chunk's; the head's never wait,
        # unless the whole batch is sent forward first.
        kept: Quantity = 0.0
        if first:
            kept = kept + self.embedding.saved * pipeline.first_chunk_in_flight
        if last:
            waiting = self.layout.grad_accum if self.layout.schedule == "gpipe" else 1
            kept = kept + self.head.saved * waiting
        # The embedding's gradient comes last, when no block is at work any more.
        late = self.embedding.states[Role.GRADIENT] * (1.0 - self.resident) * first
        running = [rows(self.resident) + flight * price.saved for price in self.blocks]
        result = {
            "backward": (running, fixed(self.resident) + kept + sizes["backward"], True),
            "gradients complete": (
                [rows(1.0)] * len(self.blocks),
                fixed(1.0) - late + sizes["gradients complete"],
                True,
            ),
            "optimizer step": (
                [rows(1.0)] * len(self.blocks),
                fixed(1.0) + sizes["optimizer step"],
                False,
            ),
        }
        if last:
            loss = fixed(self.resident) + kept + sizes["loss"] + self.head.working
            result["loss"] = (running, loss, False)
        return result

    def fixed_seconds(self, first: bool, last: bool) -> Quantity:
        """Seconds of one micro-batch on a stage besides its rows of layers."""
        total = self.send + self.embedding.seconds * first + self.head.seconds * last
        missing = (self.short >= 1) * last + (self.short == 2) * first
        return total - missing * self.blocks[0].seconds

    def spread(self) -> Candidate:
        """The candidate of a single layout."""
        stages = []
        depth = self.layout.pipeline_parallel
        for j in range(depth):
            first, last = j == 0, j == depth - 1
            moments = {
                name: (tuple(float(x) for x in per_row), float(fixed), works)
                for name, (per_row, fixed, works) in self.moments(j, first, last).items()
            }
            stages.append(
                Stage(
                    moments=moments,
                    working=tuple(float(price.working) for price in self.blocks),
                    seconds=tuple(float(price.seconds * self.layout.chunks) for price in self.blocks),
                    fixed_seconds=float(self.fixed_seconds(first, last)),
                )
            )
        return Candidate(
            layout=self.layout.plain(),
            policies=self.policies,
            rows=int(self.rows),
            short=int(self.short),
            capacity=float(self.capacity),
            stages=tuple(stages),
            fill=float(self.pipeline.fill),
            repeat=float(self.pipeline.repeat),
            step_seconds=float(self.step_seconds),
        )


def price(job: Job, layout: Layout, policies: Sequence[str] | None = None) -> Prices:
    """Prices a family of layouts (or a single one) under the recompute policies."""
    return Prices(job, layout, policies or job.stack.policies)
