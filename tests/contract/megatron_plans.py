"""Random plans for Megatron-LM, the same for a seed: models, degrees, splits, precisions, recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from planner import ClusterSpec, ModelSpec, TrainingSpec
from planner.api import estimate
from planner.errors import InputError
from planner.export import Subject
from strategies.layout import Layout

DENSE = (
    *("llama-7b", "llama-2-70b", "llama-3.1-8b", "llama-3.2-1b", "mistral-7b", "mistral-nemo-12b"),
    *("qwen2.5-7b", "qwen2.5-0.5b", "qwen3-8b", "qwen3-0.6b", "gpt2-xl", "gpt-3-175b", "nemotron-4-340b"),
    *("starcoder2-3b", "phi-4", "stablelm-3b-4e1t", "tinyllama-1.1b", "llama-3.1-405b"),
)
SPARSE = (
    *("mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b", "qwen2-57b-a14b", "deepseek-v2-lite", "deepseek-v3"),
    *("glm-4.5-air", "gpt-oss-20b", "kimi-k2"),
)
OTHERS = ("pythia-1.4b", "gemma-7b", "opt-1.3b", "bloom-7b1", "nemotron-h-8b", "qwen3-next-80b-a3b")


def random_plans(seed: int, count: int) -> Iterator[Subject]:
    """As many plans, of layouts that the planner takes."""
    random = Random(seed)
    while count:
        try:
            yield _one(random)
        except InputError:
            continue
        count -= 1


def _one(random: Random) -> Subject:
    name = random.choice(random.choice((DENSE,) * 4 + (SPARSE,) * 6 + (OTHERS,)))
    model = ModelSpec.from_catalog(name)
    gpus = random.choice((1, 8, 16, 32, 64, 128))
    cluster = ClusterSpec.parse(f"{gpus}x{random.choice(('H100', 'H100', 'A100-80G', 'B200'))}")
    tensor, pipeline = random.choice((1, 1, 2, 4, 8)), random.choice((1, 1, 2, 4, 8))
    context = random.choice((1, 1, 1, 2, 4))
    if gpus % (tensor * pipeline * context):
        raise InputError("does not divide")
    data = gpus // (tensor * pipeline * context)
    chunks = random.choice((1, 1, 2, 4)) if pipeline > 1 else 1
    sharding = random.choice(("ddp", "zero1", "zero1", "zero1", "zero2", "fsdp"))
    comm = random.choice(("ring", "all-gather", "ulysses", "ulysses+ring")) if context > 1 else "ring"
    experts = bool(model.experts)
    layout = Layout(
        data_parallel=data,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        chunks=chunks,
        micro_batch_size=random.choice((1, 1, 2)),
        grad_accum=(waves := random.choice((1, 2, 4))) * pipeline,
        data_shards=random.choice([n for n in (data, data // 2) if n and not data % n])
        if sharding == "fsdp"
        else 0,
        sequence_parallel=tensor > 1 and (experts or random.random() < 0.8),
        sharding=sharding,
        schedule="interleaved" if chunks > 1 else random.choice(("1f1b",) * 19 + ("zb-h1",)),
        rank_order=random.choice(("tp-dp-pp",) * 16 + ("tp-pp-dp",) * 3 + ("pp-tp-dp",)),
        context_parallel=context,
        context_comm=comm,
        ulysses_degree=context // 2 if comm == "ulysses+ring" else 1,
        expert_parallel=random.choice((1, 2, 4, 8)) if experts else 1,
        expert_tensor_parallel=random.choice((1, 1, tensor)) if experts else 1,
        offload=random.choice(("",) * 9 + ("optimizer",)),
    )
    training, recompute = _training(random, model, layout, waves)
    layers = _split(random, model.num_hidden_layers, pipeline, chunks)
    plan = estimate(model, cluster, training, layout, recompute=recompute, layers=layers)
    return Subject(model, cluster, plan)


def _training(random: Random, model: ModelSpec, layout: Layout, waves: int) -> tuple[TrainingSpec, str]:
    precision = random.choice(
        ("bf16",) * 20
        + ("fp16",) * 3
        + ("mxfp8", "nvfp4", "fp8-delayed", "fp8-tensorwise") * 2
        + ("fp32", "tf32")
    )
    given: dict[str, Any] = {
        "seq_length": random.choice((512, 1024, 2048, 4096)),
        "global_batch_size": layout.global_batch_size,
        "precision": precision,
        "optimizer": random.choice(("adamw",) * 9 + ("sgd", "momentum", "adam")),
    }
    if random.random() < 0.1 and precision in ("bf16", "fp16"):
        given["gradient_dtype"] = precision
    if random.random() < 0.1:
        given["optimizer_dtype"] = random.choice(("bf16", "fp8"))
    if random.random() < 0.1:
        given["dropout"] = 0.1
    if model.experts and random.random() < 0.1:
        given["expert_capacity_factor"] = 1.25
    options: dict[str, str] = {}
    for name, value, often in (
        ("attention", "eager", 0.1),
        ("swiglu", "unfused", 0.1),
        ("swiglu", "recomputed", 0.03),
        ("norm", "recomputed", 0.1),
        ("mlp", "recomputed", 0.1),
        ("loss", "fused", 0.05),
        ("overlap", "off", 0.1),
        ("tp_comm_overlap", "on", 0.1),
        *((("fp8_param_gather", "on", 0.5),) if "fp8" in precision else ()),
        *((("moe_act", "recomputed", 0.2), ("moe", "recomputed", 0.1)) if model.experts else ()),
        *((("mla_up_proj", "recomputed", 0.2),) if model.latent else ()),
        *((("mtp", "on", 0.3),) if model.mtp_layers else ()),
    ):
        if random.random() < often:
            options[name] = value
    ways = ("none", "none", "selective", "full", "full:1", "full:2", "auto", "none+activations")
    return TrainingSpec(options=options, **given), random.choice(ways)


def _split(random: Random, depth: int, pipeline: int, chunks: int) -> list[int] | None:
    """As even as it goes; else with fewer layers at the ends, or anyhow."""
    if pipeline == 1 or random.random() < 0.5:
        return None
    layers = [depth // pipeline // chunks * chunks] * pipeline
    for _ in range((depth - sum(layers)) // chunks):
        layers[random.randrange(pipeline)] += chunks
    if random.random() < 0.5 and layers[0] > chunks:
        layers[0] -= chunks
        layers[pipeline // 2] += chunks
    return layers if sum(layers) == depth else None
