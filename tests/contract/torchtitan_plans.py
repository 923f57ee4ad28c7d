"""Random plans of framework torchtitan, the same every time, for its exporter and its reader."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

from planner import api, reading
from planner.errors import PlannerError
from planner.export import Subject
from planner.export.torchtitan_flavors import flavors
from planner.specs import ClusterSpec, ModelSpec

OLDER = ["qkv=separate", "rotary_table=model"]
"""Options that 0.2.2 runs, where the planner's own are 0.3.0's."""
USUAL: dict[str, Any] = {
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "data_parallel": None,
    "context_parallel": 1,
    "context_comm": None,
    "ulysses_degree": 1,
    "expert_parallel": 1,
    "expert_tensor_parallel": 1,
    "micro_batch_size": 1,
    "chunks": 1,
    "sharding": "fsdp",
    "data_shards": None,
    "reshard_after_forward": True,
    "schedule": None,
    "sequence_parallel": None,
    "rank_order": "tp-dp-pp",
    "offload": None,
}
MODELS = ("llama-3.1-8b", "llama-3-70b", "qwen3-0.6b", "qwen3-8b", "qwen3-14b", "qwen3-30b-a3b")
MORE = ("deepseek-v2-lite", "gpt-oss-20b", "llama-3.2-1b", "llama-2-7b")


def planned(
    model: ModelSpec,
    gpus: str,
    given: dict[str, Any],
    recompute: str = "none",
    layers: tuple[int, ...] | None = None,
) -> Subject:
    """A plan of options as ``planner estimate`` has them. Raises PlannerError for what cannot be."""
    whole = USUAL | {"framework": "torchtitan"} | given
    cluster = ClusterSpec.parse(gpus)
    training = reading.read_training(whole)
    training, layout = reading.read_layout(model, cluster, training, whole)
    plan = api.estimate(model, cluster, training, layout, recompute=recompute, layers=layers)
    return Subject(model, cluster, plan)


def small() -> list[ModelSpec]:
    """The flavors for tests, whose plans are quick."""
    return [one.spec for one in flavors() if one.name.startswith("debugmodel")]


def drawn(random: Random, version: str) -> dict[str, Any]:
    """One draw: keyword arguments of :func:`planned`."""
    pick = random.choice
    if random.random() < 0.6:
        model = pick(small())
    else:
        model = ModelSpec.from_catalog(pick(MODELS if random.random() < 0.85 else MORE))
    tensor, pipeline, context = pick([1, 1, 2, 4]), pick([1, 1, 2, 2, 4]), pick([1, 1, 1, 2])
    if version == "0.2" and model.model_type.startswith(("qwen", "gpt")) and random.random() < 0.8:
        pipeline = 1  # 0.2.2 has none for these
    data = pick([1, 2, 2, 4, 8])
    gpus = tensor * pipeline * context * data
    experts = pick([1, tensor, tensor * context, tensor * context * 2]) if model.experts else 1
    schedule = pick(["1f1b", "1f1b", "interleaved", "gpipe", "zb-v"]) if pipeline > 1 else None
    chunks = pick([2, 2, 3]) if schedule == "interleaved" else 1
    micro = pick([1, 1, 2])
    options = list(OLDER) if version == "0.2" and random.random() < 0.95 else []
    if version == "0.2" and model.experts and options:
        options.append("router=half")
    dense = not (model.experts or model.latent)
    compiled = dense and schedule != "zb-v" and random.random() < 0.3
    options += ["compile=on"] * compiled
    options += [f"loss={pick(['eager', 'compiled', *(['chunked'] if version == '0.3' else [])])}"]
    options += [f"optimizer_step={pick(['fused', 'foreach'])}"]
    options += ["async_tp=on"] * (compiled and tensor > 1 and random.random() < 0.5)
    precision = pick(["bf16", "bf16", "bf16", "pure-bf16", "fp32", "tf32"])
    if dense and random.random() < 0.15:
        precision = pick(["fp8-rowwise", "fp8-tensorwise"] if version == "0.2" else ["fp8-rowwise"])
    shards = pick([n for n in (1, 2, 4, 8) if data % n == 0 and n > 1] or [1])
    alone = version == "0.2" and shards * context == 1
    given: dict[str, Any] = {
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
        "context_parallel": context,
        "context_comm": pick(["all-gather", "ring"]) if context > 1 and version == "0.2" else None,
        "expert_parallel": experts,
        "micro_batch_size": micro,
        "chunks": chunks,
        "schedule": schedule,
        "sharding": "ddp" if alone and gpus > 1 else "fsdp",
        "data_shards": shards,
        "reshard_after_forward": random.random() < 0.7 or (alone and gpus > 1),
        "sequence_parallel": False if tensor > 1 and dense and random.random() < 0.1 else None,
        "offload": "optimizer,parameters" if random.random() < 0.1 and not alone else None,
        "precision": precision if not alone or gpus == 1 else pick(["pure-bf16", "fp32"]),
        "optimizer": pick(["adamw", "adamw", "adam"]),
        "seq_length": pick([512, 2048, 4096]),
        "global_batch_size": data * micro * pipeline * pick([1, 2, 4]),
        "option": options,
    }
    recompute = pick(["none", "selective", "full"]) if schedule != "zb-v" else "none"
    layers = None
    depth = model.num_hidden_layers
    if pipeline > 1 and chunks == 1 and schedule != "zb-v" and depth > pipeline and random.random() < 0.4:
        cuts = sorted(random.sample(range(1, depth), pipeline - 1))
        layers = tuple(b - a for a, b in zip([0, *cuts], [*cuts, depth], strict=True))
    if recompute == "full" and version == "0.2" and not layers and random.random() < 0.4:
        recompute = f"full:{depth // pipeline // chunks // 2}" if depth // pipeline // chunks > 3 else "full"
    return {
        "model": model,
        "gpus": f"{gpus}xh100",
        "given": given,
        "recompute": recompute,
        "layers": layers,
    }


@cache
def plans(version: str, count: int, seed: int = 11) -> tuple[tuple[dict[str, Any], Subject], ...]:
    """So many plans that the planner accepts, with what was drawn for each."""
    random = Random(f"{version} {seed}")
    found: list[tuple[dict[str, Any], Subject]] = []
    while len(found) < count:
        draw = drawn(random, version)
        try:
            found.append((draw, planned(**draw)))
        except PlannerError:
            continue
    return tuple(found)
