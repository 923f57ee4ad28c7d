"""Megatron-LM's flags as options of ``planner estimate``, with its own defaults where a flag is left out.

Values are those of the table that plans are written with (planner/export/megatron_flags.py); here are the
rules of flags that stand for several things at once. Sources: megatron-core 0.19.2, training/arguments.py
(``validate_args``), core/transformer/transformer_config.py and pipeline_parallel_layer_layout.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from planner.export.megatron_arguments import Arguments
from planner.export.megatron_flags import BY_NAME, MODULES, QUANTIZED
from planner.export.shell_expand import shown
from planner.model import ModelSpec

CONTEXT = {text: word for word, text in BY_NAME["--cp-comm-type"].values.items()}
STRATEGIES = {text: word for word, text in BY_NAME["--data-parallel-sharding-strategy"].values.items()}
RECIPES = {name.removeprefix("fp8-"): name for name in QUANTIZED}
PLAIN = {
    "tensor_parallel": "--tensor-model-parallel-size",
    "pipeline_parallel": "--pipeline-model-parallel-size",
    "context_parallel": "--context-parallel-size",
    "expert_parallel": "--expert-model-parallel-size",
}
MOST_STAGES = 10_000


def degrees_of(found: Arguments) -> dict[str, int]:
    """The degrees that divide the GPUs, each 1 or more."""
    made = {name: max(1, found.get(flag) or 1) for name, flag in PLAIN.items()}
    if found.get("--num-experts"):
        made["expert_tensor_parallel"] = found.get("--expert-tensor-parallel-size") or made["tensor_parallel"]
    else:
        made |= {"expert_tensor_parallel": 1, "expert_parallel": 1}
    return made


def options_of(found: Arguments, model: ModelSpec | None, world_size: int | None) -> dict[str, Any]:
    """Options by name; what cannot be said so goes to ``found`` as a finding."""
    made: dict[str, Any] = {"framework": "megatron", **degrees_of(found)}
    inner = made["tensor_parallel"] * made["pipeline_parallel"] * made["context_parallel"]
    data = world_size // inner if world_size and not world_size % inner else None
    micro = found.get("--micro-batch-size")
    made["micro_batch_size"] = micro or 1
    if data:
        made["data_parallel"] = data
    batch = found.get("--global-batch-size")
    if batch or data:
        made["global_batch_size"] = batch or (data or 1) * made["micro_batch_size"]
    if length := found.get("--seq-length") or found.get("--encoder-seq-length"):
        made["seq_length"] = length
    made["sequence_parallel"] = found.on("--sequence-parallel") and made["tensor_parallel"] > 1
    if found.on("--use-tp-pp-dp-mapping"):
        made["rank_order"] = "tp-pp-dp"
    for part in (_context, _sharding, _precision, _optimizer, _offload):
        made |= dict(part(found, made))
    made |= dict(_stages(found, model, made["pipeline_parallel"]))
    made |= _recompute(found, model, made)
    made["option"] = [f"{name}={value}" for name, value in _kernels(found, model, made)]
    if made.pop("again", None):
        made["option"] += [f"{name}=recomputed" for name in _again(found, model)]
    return made


def _context(found: Arguments, made: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if made["context_parallel"] == 1:
        return
    kinds = found.get("--cp-comm-type") or ["p2p"]
    if len(set(kinds)) > 1:
        found.add("warning", "--cp-comm-type", f"differs from layer to layer: planned as {kinds[0]} in all")
    yield "context_comm", CONTEXT.get(kinds[0], "ring")
    sizes = found.get("--hierarchical-context-parallel-sizes")
    if kinds[0] == "a2a+p2p" and sizes:
        yield "ulysses_degree", sizes[0]


def _sharding(found: Arguments, made: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    instances = found.get("--num-distributed-optimizer-instances") or 1
    if found.on("--use-megatron-fsdp"):
        kind = STRATEGIES.get(found.get("--data-parallel-sharding-strategy", "no_shard"), "ddp")
        yield "sharding", kind
        data = made.get("data_parallel")
        if kind == "fsdp" and instances > 1 and data and not data % instances:
            yield "data_shards", data // instances
    elif found.on("--use-torch-fsdp2"):
        found.add("warning", "--use-torch-fsdp2", "PyTorch's FSDP2 is planned as Megatron-FSDP of ZeRO-3")
        yield "sharding", "fsdp"
    else:
        yield "sharding", "zero1" if found.on("--use-distributed-optimizer") else "ddp"
        if instances > 1:
            text = f"{instances}: optimizer states are planned as shared out over all replicas"
            found.add("warning", "--num-distributed-optimizer-instances", text)


def _precision(found: Arguments, made: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    precision = "fp16" if found.on("--fp16") else "bf16" if found.on("--bf16") else "fp32"
    if found.get("--fp8-format") and precision == "bf16":
        recipe = found.get("--fp8-recipe", "delayed")
        precision = RECIPES.get(recipe, "fp8-delayed")
        if recipe not in RECIPES:
            found.add("warning", "--fp8-recipe", f"{shown(recipe)} is planned as delayed scaling")
    if found.get("--fp4-format") and precision == "bf16":
        precision = "nvfp4"
    yield "precision", precision
    main = found.get("--main-grads-dtype", "fp32")
    if made["sharding"] in ("zero2", "fsdp"):
        main = found.get("--megatron-fsdp-main-grads-dtype") or main
        if main == "auto":
            main = "bf16" if found.on("--bf16") else "fp16" if found.on("--fp16") else "fp32"
    if precision == "fp16":
        fsdp = made["sharding"] in ("zero2", "fsdp")
        if main == "fp16" if fsdp else not found.on("--accumulate-allreduce-grads-in-fp32"):
            yield "gradient_dtype", "fp16"
    elif precision != "fp32" and (main == "bf16" or found.on("--grad-reduce-in-bf16")):
        yield "gradient_dtype", "bf16"
    if found.get("--main-params-dtype", "fp32") != "fp32":
        found.add("warning", "--main-params-dtype", "main weights are planned in fp32")
    if found.on("--use-precision-aware-optimizer"):
        kinds = [found.get(flag, "fp32") for flag in ("--exp-avg-dtype", "--exp-avg-sq-dtype")]
        kind = max(kinds, key=("fp8", "bf16", "fp16", "fp32").index)
        if len(set(kinds)) > 1:
            text = f"{kinds[0]} and {kinds[1]}: both moments are planned in {kind}"
            found.add("warning", "--exp-avg-dtype, --exp-avg-sq-dtype", text)
        if kind in ("bf16", "fp8"):
            yield "optimizer_dtype", kind


def _optimizer(found: Arguments, made: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    name = found.get("--optimizer", "adam")
    if name == "sgd":
        yield "optimizer", "momentum" if found.get("--sgd-momentum", 0.9) else "sgd"
    elif name in ("muon", "dist_muon", "adaptive_muon"):
        yield "optimizer", "muon"
    else:
        yield "optimizer", {"adam": "adamw"}.get(name, name)


def _offload(found: Arguments, made: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    fraction = found.get("--optimizer-offload-fraction", 1.0)
    if found.on("--optimizer-cpu-offload"):
        if fraction >= 1:
            yield "offload", "optimizer"
        elif fraction > 0:
            text = f"{fraction:g} of the optimizer states lie on the host: planned as none"
            found.add("warning", "--optimizer-offload-fraction", text)
    for flag in ("--cpu-offloading-num-layers", "--fine-grained-activation-offloading"):
        if found.get(flag):
            found.add("warning", flag, "activations are planned on the GPU, all of them")


def _stages(found: Arguments, model: ModelSpec | None, stages: int) -> Iterator[tuple[str, Any]]:
    """Chunks and the layers of each stage."""
    layers = model.num_hidden_layers if model else found.get("--num-layers")
    chunks = found.get("--num-virtual-stages-per-pipeline-rank") or 1
    counts: list[int] | None = None
    extra = (
        found.on("--account-for-embedding-in-pipeline-split"),
        found.on("--account-for-loss-in-pipeline-split"),
    )
    each = found.get("--num-layers-per-virtual-pipeline-stage")
    if each and layers and each > 0 and not (layers + sum(extra)) % (stages * each):
        chunks = (layers + sum(extra)) // stages // each
    text = found.get("--pipeline-model-parallel-layout") or found.get("--hybrid-layer-pattern")
    if text and (parts := layout_layers(text, "|" in text and not found.get("--hybrid-layer-pattern"))):
        if len(parts) > 1 and not len(parts) % stages:
            chunks = len(parts) // stages
            counts = [sum(parts[stage::stages]) for stage in range(stages)]
    elif layers and stages > 1:
        counts = _uneven(found, layers, stages, extra)
    if stages > 1 and chunks > 1:
        yield "chunks", chunks
        yield "schedule", "interleaved"
    elif stages > 1:
        yield "schedule", "1f1b"
    if counts and layers and sum(counts) == layers and len(set(counts)) > 1 and min(counts) > 0:
        yield "layers_per_stage", ",".join(map(str, counts))


def _uneven(found: Arguments, layers: int, stages: int, extra: tuple[bool, bool]) -> list[int] | None:
    first = found.get("--decoder-first-pipeline-num-layers")
    last = found.get("--decoder-last-pipeline-num-layers")
    if first is not None or last is not None:
        others = stages - (first is not None) - (last is not None)
        left = layers - (first or 0) - (last or 0)
        if others < 0 or (others and left % others) or left < 0 or (not others and left):
            return None
        middle = [left // others] * others if others else []
        return [*([first] if first is not None else []), *middle, *([last] if last is not None else [])]
    if any(extra) and not (layers + sum(extra)) % stages:
        counts = [(layers + sum(extra)) // stages] * stages
        counts[0] -= extra[0]
        counts[-1] -= extra[1]
        return counts
    return None


def layout_layers(text: str, of_letters: bool = True) -> list[int] | None:
    """Layers of every part between bars of ``Et*3|(tt|)*4tL``; None where it is too long.

    >>> layout_layers("Et*3|(tt|)*2tL")
    [3, 2, 2, 1]
    """
    text = text.partition("/")[0].replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d{1,5})", r"(.)\*(\d{1,5})"):
        if not of_letters:
            break
        if sum(len(m[1]) * int(m[2]) for m in re.finditer(pattern, text)) > 100 * MOST_STAGES:
            return None
        text = re.sub(pattern, lambda m: m[1] * int(m[2]), text)
    parts = text.split("|")
    if len(parts) > MOST_STAGES:
        return None
    return [part.count("t") if of_letters else len(part) for part in parts]


def _recompute(found: Arguments, model: ModelSpec | None, made: dict[str, Any]) -> dict[str, Any]:
    kind = found.get("--recompute-granularity")
    if found.on("--recompute-activations"):
        kind = "selective"
    if kind == "full":
        number = found.get("--recompute-num-layers") or 1
        if found.get("--recompute-method") == "block":
            chunk = _largest_chunk(model, made)
            return {"recompute": "full" if chunk and number >= chunk else f"full:{number}"}
        if number > 1:
            text = f"{number} layers are recomputed together: planned as one at a time"
            found.add("warning", "--recompute-num-layers", text)
        return {"recompute": "full"}
    if kind == "selective":
        modules = found.get("--recompute-modules") or ["core_attn"]
        return {"recompute": "selective" if "core_attn" in modules else "none", "again": True}
    return {"recompute": "none", "again": found.on("--moe-layer-recompute")}


def _largest_chunk(model: ModelSpec | None, made: dict[str, Any]) -> int | None:
    if model is None:
        return None
    if text := made.get("layers_per_stage"):
        most = max(map(int, text.split(",")))
    else:
        most = -(-model.num_hidden_layers // made["pipeline_parallel"])
    return int(-(-most // made.get("chunks", 1)))


def _again(found: Arguments, model: ModelSpec | None) -> Iterator[str]:
    """Options of modules that are run again in the backward, where the model has them."""
    modules = [found.on("--moe-layer-recompute") and "moe"]
    if found.on("--recompute-activations") or found.get("--recompute-granularity") == "selective":
        modules += found.get("--recompute-modules") or []
    dense = model is None or any(block.mlp == "dense" for block in model.blocks)
    there = {
        "moe": model is None or bool(model.experts),
        "moe_act": model is None or bool(model.experts),
        "shared_experts": model is None or bool(model.experts and model.experts.shared_intermediate_size),
        "mla_up_proj": model is None or bool(model.latent),
        "mlp": dense,
    }
    for name in dict.fromkeys(modules):
        if name and name in MODULES and name != "core_attn" and there.get(name, True):
            yield MODULES[name][0]
        elif name and name not in MODULES:
            text = f"{shown(str(name))} is planned as kept"
            found.add("warning", "--recompute-modules", text)


def _kernels(found: Arguments, model: ModelSpec | None, made: dict[str, Any]) -> Iterator[tuple[str, str]]:
    backend = str(found.get("--attention-backend", "auto")).rpartition(".")[2]
    local = found.get("--transformer-impl", "transformer_engine") == "local"
    eager = (local and not found.on("--use-flash-attn")) or backend in ("unfused", "local")
    eager = eager or made["precision"] == "fp32"
    yield "attention", "eager" if eager else "flash"
    if model is None or model.gated_mlp:
        yield "swiglu", "unfused" if found.on("--no-bias-swiglu-fusion") else "fused"
    if found.on("--cross-entropy-loss-fusion") and found.get("--cross-entropy-fusion-impl") == "te":
        yield "loss", "fused"
    yield "overlap", "on" if found.on("--overlap-grad-reduce") else "off"
    if found.on("--tp-comm-overlap"):
        yield "tp_comm_overlap", "on"
    if found.on("--fp8-param-gather") and found.get("--fp8-format") and made["sharding"] == "zero1":
        if found.on("--optimizer-cpu-offload"):
            text = "with --optimizer-cpu-offload weights in bf16 are planned beside those in 8 bits"
            found.add("warning", "--fp8-param-gather", text)
        else:
            yield "fp8_param_gather", "on"
    if found.get("--mtp-num-layers") and (model is None or model.mtp_layers):
        yield "mtp", "on"
    if model is not None and model.experts:
        kind = found.get("--moe-token-dispatcher-type", "allgather")
        if kind != "alltoall":
            text = f"{shown(kind)} is planned as alltoall"
            found.add("warning", "--moe-token-dispatcher-type", text, "--moe-token-dispatcher-type alltoall")
