"""Random models on random layouts, for tests of what must hold for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from hypothesis import strategies as st

from planner.candidate import Candidate
from planner.defaults import Job, resolve
from planner.order import Order
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from planner.stacks import STACKS
from strategies.layout import SHARDINGS, Layout
from strategies.pipeline_parallel import FOLDED, SCHEDULES, SPLIT, PipelineParallel

ONCE = tuple(name for name in SCHEDULES if name != "dualpipe")
"""Schedules that hold every layer on one stage."""


@st.composite
def models(draw: st.DrawFn, tied: bool | None = None) -> ModelSpec:
    """A small decoder, of LLaMA's or of GPT's kind."""
    gated = draw(st.booleans())
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([8, 16, 64]))
    bias = draw(st.booleans())
    learned = not gated and draw(st.booleans())
    depth = draw(st.integers(1, 13))
    unlike = draw(st.booleans())
    mixers = draw(st.lists(st.sampled_from(["full", "window"]), min_size=depth, max_size=depth))
    return ModelSpec(
        name="random",
        model_type=draw(st.sampled_from(["llama", "qwen2"] if gated else ["gpt2", "gpt_neox", "opt"])),
        hidden_size=heads * head_dim if draw(st.booleans()) else draw(st.sampled_from([40, 64, 96])),
        num_hidden_layers=depth,
        sliding_window=64 if unlike else None,
        mixers=tuple(mixers) if unlike else (),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=draw(st.sampled_from([24, 64, 136, 384])),
        vocab_size=draw(st.integers(17, 3000)),
        max_position_embeddings=draw(st.sampled_from([512, 1024])),
        tie_word_embeddings=draw(st.booleans()) if tied is None else tied,
        hidden_act="silu" if gated else draw(st.sampled_from(["relu", "gelu", "gelu_new"])),
        gated_mlp=gated,
        norm="rmsnorm" if gated else "layernorm",
        position_embedding="learned" if learned else "rotary",
        position_offset=draw(st.sampled_from([0, 2])) if learned else 0,
        qkv_bias=bias or draw(st.booleans()),
        qk_norm=gated and draw(st.booleans()),
        attention_output_bias=bias,
        mlp_bias=bias or draw(st.booleans()),
        embedding_norm=draw(st.booleans()),
        parallel_residual=draw(st.booleans()) and not gated,
        dropout=draw(st.sampled_from([0.0, 0.1])),
        attention_dropout=draw(st.sampled_from([0.0, 0.1])),
    )


def divisors(number: int, most: int = 8) -> list[int]:
    return [d for d in range(1, most + 1) if number % d == 0]


def chunks_of(layers: int, stages: int) -> list[int]:
    """Chunks per stage that leave at most the first and the last one short of a layer."""
    found = range(2, 5)
    return [v for v in found if -layers % v <= 2 and layers + -layers % v >= stages * v]


@st.composite
def layouts(
    draw: st.DrawFn, model: ModelSpec, tensor: int | None = None, schedules: tuple[str, ...] = SCHEDULES
) -> Layout:
    """A layout whose degrees divide what they cut."""
    cut = gcd(gcd(model.num_attention_heads, model.num_key_value_heads), model.intermediate_size)
    tensor = tensor or draw(st.sampled_from(divisors(cut)))
    depth = draw(st.integers(1, min(4, model.num_hidden_layers)))
    layers, chunks, schedule = model.num_hidden_layers, 1, draw(st.sampled_from(schedules))
    accum = draw(st.integers(1, 9))
    if schedule in SPLIT:
        folded = schedule in FOLDED
        depth = 2 * (depth // 2) or 1 if schedule == "dualpipe" else depth
        impossible = schedule == "dualpipe" and (depth % 2 or layers % 2)
        if impossible or (schedule == "zb-v" and layers + layers % 2 < 2 * depth):
            schedule = "1f1b"
        elif depth > 1:
            chunks = 1 + folded
            accum = PipelineParallel(depth, schedule=schedule).least_microbatches + 2 * draw(
                st.integers(0, 4)
            )
    if schedule == "interleaved":
        possible = chunks_of(model.num_hidden_layers, depth) if depth > 1 else []
        if possible:
            chunks, accum = draw(st.sampled_from(possible)), depth * draw(st.integers(1, 3))
        else:
            schedule = "1f1b"
    schedule = schedule if depth > 1 else "1f1b"
    sharding = draw(st.sampled_from(SHARDINGS))
    data = draw(st.sampled_from([1, 2, 3, 4, 8]))
    return Layout(
        data_parallel=data,
        tensor_parallel=tensor,
        pipeline_parallel=depth,
        chunks=chunks,
        micro_batch_size=draw(st.integers(1, 4)),
        grad_accum=accum,
        data_shards=draw(st.sampled_from(divisors(data))) if sharding == "fsdp" else data,
        sequence_parallel=tensor > 1 and draw(st.booleans()),
        sharding=sharding,
        reshard_after_forward=sharding != "fsdp" or draw(st.booleans()),
        schedule=schedule,
    )


@dataclass(frozen=True)
class Case:
    """A model, how it is trained and where it runs, before the planner sees any of it."""

    model: ModelSpec
    training: TrainingSpec
    layout: Layout

    @property
    def cluster(self) -> ClusterSpec:
        return ClusterSpec.parse(f"{self.layout.world_size}xA100")

    @property
    def job(self) -> Job:
        return resolve(self.model, self.cluster, self.training)


@st.composite
def cases(
    draw: st.DrawFn,
    frameworks: tuple[str, ...] = ("megatron", "torchtitan", "fsdp", "deepspeed", "hf"),
    tied: bool | None = None,
    tensor: int | None = None,
    schedules: tuple[str, ...] = SCHEDULES,
) -> Case:
    model = draw(models(tied))
    layout = draw(layouts(model, tensor, schedules))
    # torchtitan has no models of GPT's kind.
    framework = draw(
        st.sampled_from([name for name in frameworks if name != "torchtitan" or model.gated_mlp])
    )
    stack = STACKS[framework]
    kernels = draw(st.sampled_from(stack.options.get("kernels", ("its own",))))
    offered = stack.under({"kernels": kernels}).options
    bf16 = stack.recipes["bf16"]
    offered = {name: values for name, values in offered.items() if stack.concerned(name, model, bf16)}
    options = {name: draw(st.sampled_from(offered[name])) for name in sorted(offered)}
    if "kernels" in options:
        options["kernels"] = kernels
    if options.get("optimizer_step") == "in_backward":  # of one micro-batch on one GPU
        options["optimizer_step"] = "fused"
    if not model.gated_mlp:  # what compiled blocks keep is known of gated MLPs only
        options.pop("compile", None)
    precision, gradients = draw(st.sampled_from(["bf16", "fp32"])), None
    if framework == "deepspeed":  # buffers smaller than a layer, and far larger than the model
        for name in stack.sizes:
            options[name] = draw(st.sampled_from(["1e2", "1e4", "1e9"]))
        gradients = draw(st.sampled_from([None, "fp32"])) if precision == "bf16" else None
    training = TrainingSpec(
        gradient_dtype=gradients,
        seq_length=draw(st.sampled_from([24, 64, 512])),
        global_batch_size=layout.global_batch_size,
        framework=framework,
        precision=precision,
        optimizer=draw(st.sampled_from(["adamw", "momentum", "sgd"])),
        options=options,
    )
    return Case(model, training, layout)


@st.composite
def splits(draw: st.DrawFn, candidate: Candidate) -> tuple[tuple[int, ...], ...]:
    """A random split of a candidate's rows over its stages and policies, no stage empty."""
    stages = len(candidate.stages)
    if candidate.mirrored:
        half = replace(
            candidate,
            order=Order(candidate.order.rows, candidate.order.sequence[: candidate.rows // 2]),
            stages=candidate.stages[: stages // 2],
            mirrored=False,
        )
        drawn = draw(splits(half))
        return (*drawn, *reversed(drawn))
    left = candidate.rows - stages
    counts = []
    for stage in range(stages):
        more = left if stage == stages - 1 else draw(st.integers(0, left))
        left -= more
        counts.append(1 + more)
    several = len(candidate.policies)
    rows = []
    for kinds in candidate.order.split(counts):
        own = [0] * candidate.columns
        for kind, count in enumerate(kinds):
            for _ in range(count):
                own[kind * several + draw(st.integers(0, several - 1))] += 1
        rows.append(tuple(own))
    return tuple(rows)


def even_split(candidate: Candidate, policy: int) -> list[list[int]]:
    """All rows under one policy, in stages as equal as can be."""
    stages = len(candidate.stages)
    counts = [candidate.rows // stages + (j < candidate.rows % stages) for j in range(stages)]
    return [list(own) for own in candidate.under_one(counts, policy)]


def bytes_outside(job: Job, layout: Layout, bound: str = "value") -> float:
    """The CUDA context, and the buffers of every group that a GPU is in; HSDP's replicas are one more.

    ``bound`` is ``value``, ``least`` or ``most``.
    """
    shards, replicas = layout.data_parallel, 1
    if layout.sharding == "fsdp":
        shards, replicas = layout.data_shards, layout.data_parallel // layout.data_shards
    groups = sum(n > 1 for n in (shards, replicas, layout.tensor_parallel, layout.pipeline_parallel))
    return float(getattr(job.stack.context, bound) + groups * getattr(job.stack.communicator, bound))


def library_workspace(job: Job) -> int:
    """Before compute capability 9 PyTorch gives cuBLAS 4,096 KiB twice and 16 KiB 8 times, Transformer
    Engine 4 MiB."""
    torch = (2 * 4096 + 8 * 16) * 1024
    return torch + 4 * 2**20 * (job.stack.name == "megatron")
