"""Prices layouts: bytes and seconds per layer, recompute policy and stage.

:func:`price` prices a whole family of layouts at once, per layer; :meth:`Prices.spread` spreads
one of them over its stages. Both only add up ``held(term)``: there is no second formula.

The bytes of a stage follow in :mod:`planner.moments`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from planner.candidate import Candidate, Stage
from planner.collectives import Messages
from planner.compute import Compute
from planner.defaults import Job
from planner.layer_price import LayerPrice, StepPrice, average, heaviest, role_sum, working_set
from planner.layers import Builder
from planner.model import numbered
from planner.moments import stage_moments
from planner.offload import (
    HostShare,
    Traffic,
    elsewhere,
    host_buffers,
    moves,
    offloading_of,
    traffic,
    wire_of,
)
from planner.optimizers import copies, moved, step_buffers, step_flops, unscaled
from planner.order import order_of
from planner.overheads import tensor_capacity
from planner.places import with_places
from planner.residence import Residence, residence_of
from planner.spans import SPANS_OF
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
    smaller,
)
from strategies.layout import Layout, collectives_of, strategies_of
from strategies.offload import Way
from strategies.pipeline_parallel import PipelineParallel


def _pick(value: Any, selector: Any, picked: dict[int, Any]) -> Any:
    """The part of every array inside a value; numbers that hold for the whole family stay.

    ``picked`` are prices that were picked already, by identity: several lists share them.
    """
    if isinstance(value, np.ndarray):
        return value[selector] if value.ndim else value
    if isinstance(value, dict):
        if id(value) not in picked:
            picked[id(value)] = {key: _pick(item, selector, picked) for key, item in value.items()}
        return picked[id(value)]
    if isinstance(value, list | tuple):
        return type(value)(_pick(item, selector, picked) for item in value)
    if isinstance(value, LayerPrice | StepPrice | Residence | PipelineParallel):
        if id(value) not in picked:
            picked[id(value)] = part = object.__new__(type(value))
            vars(part).update({key: _pick(item, selector, picked) for key, item in vars(value).items()})
        return picked[id(value)]
    if isinstance(value, Layout):
        parts = {f.name: _pick(getattr(value, f.name), selector, picked) for f in fields(value)}
        return replace(value, **parts)
    return value


class Prices:
    """A family of layouts, priced per layer. Every number may be an array over the family."""

    def __init__(self, job: Job, layout: Layout, policies: Sequence[str]) -> None:
        self.job, self.layout, self.policies = job, layout, tuple(policies)
        self._messages = Messages.of(job.cluster, layout)
        self.compute = Compute(job, job.seq_length / layout.attention_cut)
        self.bandwidth = self.compute.bandwidth
        chosen = job.training.options
        self.overlap = chosen.get("overlap", "on") == "on"
        self.tensor_overlap = "on" in (chosen.get("tp_comm_overlap"), chosen.get("async_tp"))
        self.forward_share = self.weight_share = 1 / 3  # until a layer's price says
        self.wire = wire_of(job, layout)
        self.offloads = bool(layout.offload) or any("+" in policy for policy in self.policies)
        self.host = HostShare.of(job.cluster)
        builder = Builder(
            job.model,
            job.training,
            job.stack,
            job.recipe,
            batch=layout.micro_batch_size,
            tensor_parallel=layout.tensor_parallel,
            pipeline_parallel=layout.pipeline_parallel,
            expert_parallel=layout.expert_parallel,
            context_heads=layout.hands_out_heads,
            data_shards=layout.data_shards if layout.sharding == "fsdp" else 1,
        )
        self.optimizer = builder.optimizer
        self.layers, self.once = builder.layers(), builder.stage()
        self.pipeline = self.pipeline_at(0)
        self.resident = residence_of(job, layout, self.wire)
        self.pipelined = (layout.pipeline_parallel > 1) * 1
        self.copied = job.stack.gradient_copies and job.recipe.master > 0 and job.recipe.gradient < 4
        flattened = self.resident.engine and job.recipe.gradient == 4  # fp32 gradients, as they are
        self.flat_copies = job.stack.flat_copies and (self.copied or flattened)
        # Gradients in a pool of their own take its room at every moment, whether they are there or not.
        self.streams = not job.stack.allocator.of_tensors
        self.apart = (self.streams and self.flat_copies) * 1  # which fit in no piece that passes leave free
        self.own_pool = self.streams and strategies_of(layout, self.wire)[0].gradient_stream != "compute"
        self.waiting_room, self.held_room = (
            np.maximum(there, self.own_pool * 1.0)
            for there in (self.resident.forward, self.resident.backward)
        )
        self.embedding, self.head = (self._price(self.layers[i], "none") for i in (0, -1))
        plain = [self._price(layer, "none") for layer in self.layers[1:-1]]
        self.plain = average(plain, [layer.count for layer in self.layers[1:-1]])
        self.forward_share = self.plain.forward / self.plain.seconds
        self.weight_share = self.plain.weights / self.plain.seconds
        self.pipeline = self.pipeline_at(0)
        self.blocks = [
            own if policy == "none" else self._under(own, layer, policy)
            for own, layer in zip(plain, self.layers[1:-1], strict=True)
            for policy in self.policies
        ]
        depth = job.model.num_hidden_layers
        self.short = (-depth) % layout.chunks
        self.rows = (depth + self.short) * self.pipeline.copies // layout.chunks
        self.order = order_of(job.blocks, layout)
        self.kinds = numbered(job.blocks)
        self.counts = list(self.order.counts) or [self.rows]
        of_rows = [
            [self.blocks[kind * len(self.policies) + policy] for kind in row]
            for row in self.order.rows
            for policy in range(len(self.policies))
        ]
        self.columns, self.heaviest = list(map(average, of_rows)), list(map(heaviest, of_rows))
        self.capacity = tensor_capacity(job, layout)
        self.send = self._send_seconds()
        self.step_seconds = self._step_seconds()
        ends = [(first, last) for first in (False, True) for last in (False, True)]
        self.buffer_bytes = {end: self._buffer_bytes(*end) for end in ends}
        self.gather_bytes = {end: self._buffer_bytes(*end, stream="gather") for end in ends}
        *shared, _ = strategies_of(layout, self.wire)
        self.host_bytes = {end: self._host_bytes(*end, shared) for end in ends if self.offloads}
        self.once_bytes = role_sum(self.once, Role.BUFFER, shared)

    @property
    def brought_back(self) -> int:
        """Layers whose offloaded activations are on the GPU while one of them runs backward."""
        return 1 if offloading_of(self.job.stack, self.layout).checkpoints else 2

    def take(self, selector: Any) -> Prices:
        """The same prices for a part of the family: an index, or an index array and new axes."""
        part, picked = copy.copy(self), dict[int, Any]()
        for name, value in vars(self).items():
            if name not in ("layers", "compute", "order", "kinds"):
                setattr(part, name, _pick(value, selector, picked))
        return part

    def policy_of(self, block: int) -> str:
        """The policy of one of ``blocks``: every kind of block has all policies, one after the other."""
        return self.policies[block % len(self.policies)]

    def block_layer(self, block: int) -> Layer:
        """The bill of one of ``blocks``."""
        return self.layers[1 + block // len(self.policies)]

    def pipeline_at(self, stage: Quantity) -> PipelineParallel:
        """The pipeline strategy seen from a stage."""
        layout = self.layout
        return PipelineParallel(
            layout.pipeline_parallel,
            stage,
            layout.grad_accum,
            layout.chunks,
            layout.schedule,
            self.forward_share,
            self.weight_share,
        )

    def _walk(self, layer: Layer, policy: str) -> tuple[Quantity, Quantity, tuple[StepPrice, ...]]:
        """Transients when a layer's forward ends, what its backward makes again, and its steps."""
        *strategies, _ = strategies_of(self.layout, self.wire, 0, policy)
        *plain, _ = strategies_of(self.layout, self.wire, 0, "none")
        way, policy = Way.of(policy), Way.of(policy).recompute
        data = plain[0]
        size = size_seen_by(data, plain)
        freed, again, whole, final, passing = (dict.fromkeys(layer.steps, 0.0) for _ in range(5))
        # What a split backward has made or made again stays until the weights' gradients are made.
        split = self.pipeline.split
        at_start = split or policy in self.job.stack.block_policies
        ahead: Quantity = 0.0
        recomputed: Quantity = role_sum(layer, Role.OUTPUT_GRADIENT, plain) if split else 0.0

        def add(to: dict[str, Any], term: Term, amount: Quantity) -> None:
            for step in term.steps:
                to[step] = to[step] + amount / len(term.steps)

        for term in layer.by_role[Role.ACTIVATION]:
            if policy in term.kept_by:
                add(freed, term, held(term, strategies) * (1 - split))
                if "activations" in way.offload:
                    # They come back before the backward; copies that run ahead bring the next layer's too.
                    made = held(term, plain)
                    add(freed, term, made)
                    recomputed = recomputed + made * self.brought_back
            elif "none" in term.kept_by:
                made = held(term, plain)
                add(again, term, made)
                if at_start:
                    add(freed, term, made * (1 - split))
                    recomputed = recomputed + made
        for term in layer.by_role[Role.TRANSIENT]:
            if term.steps == ("logits",):
                ahead = ahead + held(term, plain)
            else:
                add(passing, term, held(term, plain))
        for term in layer.by_role[Role.GRADIENT]:
            arriving = data.arriving(term, size)
            if arriving is not None:
                add(whole, term, arriving)
            # Else, or in a group of one, it arises where it stays, or is added to what is there.
            stays = 1.0 if arriving is None else np.where(np.equal(arriving, 0), 1.0, 0.0)
            add(final, term, held(term, plain) * (1 - self.resident.backward) * stays)
            if not self.job.stack.fused_accumulation:
                fresh = size(term) * (1 - self.wire.lasting)
                add(passing, term, fresh * np.where(np.equal(self.resident.backward, 1), stays, 0.0))
        if not at_start:
            passing = {step: passing[step] + again[step] for step in layer.steps}
        steps = [StepPrice(freed[k], whole[k], final[k], passing[k]) for k in layer.steps]
        return ahead, recomputed, tuple(steps)

    def _under(self, plain: LayerPrice, layer: Layer, policy: str) -> LayerPrice:
        """A layer under a policy; where nothing is offloaded, with the states that it has without."""
        price = self._price(layer, policy)
        return price if Way.of(policy).offload else replace(price, states=plain.states)

    def _price(self, layer: Layer, policy: str) -> LayerPrice:
        *strategies, _ = strategies_of(self.layout, self.wire, 0, policy)
        saved = role_sum(layer, Role.ACTIVATION, strategies)
        ahead, recomputed, walk = self._walk(layer, policy)
        data, size = strategies[0], size_seen_by(strategies[0], strategies)
        hidden, exposed, copied = ({"forward": 0.0, "backward": 0.0} for _ in range(3))
        *plain, _ = strategies_of(self.layout, self.wire, 0, "none")
        per_step: dict[str, Quantity] = {}
        for message in collectives_of(layer, strategies):
            seconds, way = self._messages.seconds(message), message.way
            copied[way] = copied[way] + message.times * message.copied
            if message.per == "step":
                behind = message.behind if self.overlap else ""
                per_step[behind] = per_step.get(behind, 0.0) + seconds
            elif message.behind == "layer" and self.overlap:
                hidden[way] = hidden[way] + seconds
            elif message.behind == "attention":
                behind, beyond = self.compute.behind_attention(layer, plain, seconds, way)
                hidden[way], exposed[way] = hidden[way] + behind, exposed[way] + beyond
            else:  # between kernels a message waits for the slowest of its group, overlapped or not
                waiting = seconds / self.compute.in_step
                sent = seconds * (message.axis == "tensor" and self.tensor_overlap)
                hidden[way], exposed[way] = hidden[way] + sent, exposed[way] + waiting - sent
        passes = self.compute.passes(layer, plain, strategies, hidden, exposed, copied)
        moved, there = Traffic(), {}
        forward, inputs = passes.forward, passes.inputs + passes.again
        if self.offloads:
            moved = traffic(self.job, self.layout, layer, policy, strategies, self.host)
            there = elsewhere(layer, moves(self.job, self.layout, policy), strategies)
            if not self.overlap and self.wire.takes_gradients:  # DeepSpeed copies on the stream of its passes
                moved = moved.in_the_open()
            forward = np.maximum(forward, moved.forward) + moved.opened / 2
            late = np.maximum(0.0, moved.backward - passes.backward) + moved.opened / 2
            inputs = inputs + late
        return LayerPrice(
            states={role: role_sum(layer, role, strategies) for role in (*STATES, Role.BUFFER)},
            gathered=sum(data.gathered(term, size) for term in layer.by_role[Role.PARAMETER]),
            update_bytes=self._update_bytes(layer, strategies),
            update_room=self._update_room(layer, strategies),
            saved=saved,
            ahead=ahead,
            recomputed=recomputed,
            walk=walk,
            working=working_set(recomputed, walk),
            forward=forward,
            inputs=inputs,
            weights=passes.weights,
            exposed=exposed,
            per_step=per_step,
            elsewhere=there,
            update_seconds=moved.update,
        )

    def _update_bytes(self, layer: Layer, strategies: Sequence[AbstractStrategy]) -> Quantity:
        # States are read and written, the gradient read, the weight written, of this GPU's part.
        total: Quantity = 0.0
        recipe = self.job.recipe
        for term in layer.by_role[Role.OPTIMIZER]:
            one = Term(term.name, term.role, term.dims, 1.0)
            step = self.job.training.options.get("optimizer_step")
            total = total + held(one, strategies) * moved(self.optimizer, recipe, step, term.unit)
        return total

    def _update_room(self, layer: Layer, strategies: Sequence[AbstractStrategy]) -> Quantity:
        # Copies of half-precision gradients in fp32; where these lie in one piece, a ZeRO engine makes it of
        # half-precision gradients in one piece, DeepSpeed's stage 0 of a list of copies. Then torch's foreach
        # optimizers make one update of every parameter at a time, fused ones none.
        recipe = self.job.recipe
        foreach = copies(self.optimizer, self.job.training.options.get("optimizer_step"))
        beside = (recipe.gradient if self.resident.engine else 4) * self.flat_copies
        unit = 4 * self.copied + max(beside, recipe.moment * foreach) + unscaled(recipe)
        if not unit:
            return 0.0
        one = [Term(t.name, t.role, t.dims, unit) for t in layer.by_role[Role.OPTIMIZER]]
        room = sum(held(term, strategies) for term in one)
        if self.wire.sub_group and self.layout.sharding == "zero3":
            own = self.job.trained_parameters / self.layout.data_ranks / self.layout.tensor_parallel
            room = room * smaller(1.0, self.wire.sub_group / own)
        return room

    @property
    def send_bytes(self) -> Quantity:
        """Bytes of one micro-batch's residual stream as a stage hands it on."""
        job, layout = self.job, self.layout
        sharded = (layout.tensor_parallel if layout.sequence_parallel else 1) * layout.context_parallel
        whole = layout.micro_batch_size * job.seq_length * job.model.hidden_size * job.recipe.compute
        return whole / sharded

    def _send_seconds(self) -> Quantity:
        # A chunk's output goes on once forward and its gradient back once: exposed.
        once = self._messages.send_seconds(self.send_bytes)
        return 2 * once * self.pipeline.passes * (self.layout.pipeline_parallel > 1)

    @property
    def one_send(self) -> float:
        """Seconds of one of a chunk's two sends, of its output or of the gradient of its input."""
        return float(self.send / self.pipeline.passes) / 2

    def _step_seconds(self) -> Quantity:
        # Once a step, on an average stage with embedding or head: what messages exceed
        # of the pass they hide behind (backward two thirds, forward one), and the update.
        depth = self.job.model.num_hidden_layers * self.pipeline.copies / self.layout.pipeline_parallel
        block = self.plain
        window = block.seconds * depth
        # Blocks that no gradient reaches are not there in the backward.
        own = zip(self.layers[1:-1], self.blocks[:: len(self.policies)], strict=True)
        resting = sum(layer.count * price.seconds for layer, price in own if not layer.backward)
        behind_of = {"forward": window, "backward": window - resting * depth / len(self.kinds), "": window}
        exposed: Quantity = 0.0
        for behind, seconds in block.per_step.items():
            around = self._around(*(end.per_step.get(behind, 0.0) for end in (self.embedding, self.head)))
            share = {"backward": 2 / 3, "forward": 1 / 3, "": 0.0}[behind]
            exposed = exposed + np.maximum(0.0, seconds * depth + around - share * behind_of[behind])
        around = self._around(self.embedding.update_bytes, self.head.update_bytes)
        total = exposed + (block.update_bytes * depth + around) / self.bandwidth
        job, embeddings = self.job, not self.job.training.frozen.embeddings
        flops = step_flops(job.training.optimizer, job.model, job.blocks, embeddings)
        total = total + flops / self.compute.products_of(self.optimizer.product_bytes or job.recipe.weight)
        if self.pipeline.copies > 1:  # the two stages that hold a layer add up its gradients
            around = self._around(*(end.states[Role.GRADIENT] for end in (self.embedding, self.head)))
            total = total + self._messages.send_seconds(block.states[Role.GRADIENT] * depth + around)
        # PipeDream updates its weights after every micro-batch.
        return total * (self.layout.grad_accum if self.layout.schedule == "pipedream" else 1)

    def _around(self, embedding: Quantity, head: Quantity) -> Quantity:
        """Of embedding and head: both, where one stage holds both, else the larger."""
        first, last = self.pipeline.ends
        return np.where(first & last, embedding + head, np.maximum(embedding, head))

    def stage_layers(self, first: bool, last: bool) -> list[Layer]:
        """A layer of each kind that a stage holds, with its count on an average stage."""
        embedding, *blocks, head = self.layers
        part = self.pipeline.copies / self.layout.pipeline_parallel
        blocks = [replace(block, count=block.count * part) for block in blocks]
        return [*([embedding] if first else []), *blocks, *([head] if last else [])]

    def _buffer_bytes(self, first: bool, last: bool, stream: str = "compute") -> dict[str, Quantity]:
        buffers = [
            buffer
            for buffer in self.buffers(first, last)
            if (buffer.stream if self.streams else "compute") == stream
        ]
        return {
            place: sum((b.size for b in buffers if b.span in spans), 0.0) for place, spans in SPANS_OF.items()
        }

    def _host_bytes(self, first: bool, last: bool, strategies: Sequence[AbstractStrategy]) -> Quantity:
        layers = self.stage_layers(first, last)
        return sum(size for _, size in host_buffers(self.job, self.layout, layers, strategies))

    def buffers(self, first: bool, last: bool) -> list[Buffer]:
        """What the strategies and the pipeline allocate besides the terms on such a stage."""
        *strategies, _ = strategies_of(self.layout, self.wire)
        layers = self.stage_layers(first, last)
        found = [
            buffer
            for strategy in strategies
            for buffer in strategy.workspace(layers, size_seen_by(strategy, strategies))
        ]
        if self.job.stack.receives_ahead:
            # torch.distributed.pipelining has a buffer for every micro-batch that it will receive, forward
            # and backward, and its last stage keeps every output.
            sides = 2 * self.layout.chunks - first
            size = sides * self.layout.grad_accum * self.send_bytes * self.pipelined
            found.append(Buffer("what the pipeline receives, all micro-batches", size))
        embeddings = not self.job.training.frozen.embeddings
        found += step_buffers(self.optimizer, self.job.model, self.job.recipe, embeddings)
        return found

    def state_bytes(self, price: LayerPrice, pipeline: PipelineParallel, gradients: Quantity) -> Quantity:
        """Model states of a layer on a stage, with that fraction of its gradients."""
        total: Quantity = 0.0
        for role, size in price.states.items():
            share = pipeline.share(Term("", role, {}, 1.0))
            total = total + size * share * (gradients if role is Role.GRADIENT else 1)
        return total

    def fixed_seconds(self, first: bool, last: bool) -> Quantity:
        """Seconds of one micro-batch on a stage besides its rows of layers."""
        ends = self.embedding.seconds * first + self.head.seconds * last
        lacking = sum(n * price.seconds for n, price in self.missing(first, last))
        return self.send + ends / self.pipeline.copies - lacking

    def missing(self, first: bool, last: bool) -> list[tuple[Quantity, LayerPrice]]:
        """Layers that the chunks at the model's ends lack on such a stage: how many, of which price."""
        at_end, at_start = self.order.ends
        behind, ahead = 1 * (self.short >= 1) * last, 1 * (self.short == 2) * first
        ends = [(behind + ahead, at_end)] if at_end == at_start else [(behind, at_end), (ahead, at_start)]
        return [(n, self.blocks[kind * len(self.policies)]) for n, kind in ends]

    @property
    def row_seconds(self) -> list[Quantity]:
        """Seconds of one micro-batch through a row, of each kind under each policy."""
        return [price.seconds * self.pipeline.passes for price in self.columns]

    def spread(self) -> Candidate:
        """The candidate of a single layout."""
        stages = []
        for j in range(self.layout.pipeline_parallel):
            first, last = map(bool, self.pipeline_at(j).ends)
            moments = {
                name: (tuple(map(float, per_row)), float(fixed), tuple(map(float, working)))
                for name, (per_row, fixed, working) in stage_moments(self, j, first, last).items()
            }
            stage = Stage(
                moments=moments,
                seconds=tuple(map(float, self.row_seconds)),
                fixed_seconds=float(self.fixed_seconds(first, last)),
            )
            stages.append(with_places(self, stage, first, last) if self.offloads else stage)
        return Candidate(
            layout=self.layout.plain(),
            policies=self.policies,
            order=self.order.whole(int(self.rows)),
            short=int(self.short),
            capacity=float(self.capacity),
            stages=tuple(stages),
            fill=float(self.pipeline.fill),
            repeat=float(self.pipeline.repeat),
            step_seconds=float(self.step_seconds),
            mirrored=self.pipeline.copies > 1,
            rooms={place: size * self.job.stretch for place, size in self.host.capacity.items()},
            not_all=tuple(
                "activations" in Way.of(way).offload and self.brought_back > 1 for way in self.policies
            ),
        )


def price(job: Job, layout: Layout, policies: Sequence[str] | None = None) -> Prices:
    """Prices a family of layouts (or a single one) under the recompute policies."""
    return Prices(job, layout, job.stack.policies_with(layout.schedule, policies))
