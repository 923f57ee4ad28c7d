"""What is wrong or wasteful in how weights, gradients, optimizer states and activations are kept.

Sources as in planner/export/megatron_findings.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.export.megatron_arguments import Arguments
from planner.export.shell_expand import shown
from planner.model import ModelSpec
from planner.units import human_bytes

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
REUSED = "--reuse-grad-buf-for-mxfp8-param-ag"
LARGE_MASK = 16 * 2**20
"""Bytes from which a mask of attention is worth a word."""
STATES = 12
"""Bytes of fp32 weights and Adam's moments of a parameter."""


def check_states(
    found: Arguments,
    degrees: Mapping[str, int],
    options: Mapping[str, Any],
    model: ModelSpec | None,
    env: Mapping[str, str] | None,
) -> None:
    """Adds what is wrong in precision, recomputation, optimizer and sharding."""
    _of_precision(found)
    _of_recompute(found, options)
    _of_optimizer(found, degrees, options, model)
    _of_fsdp(found, degrees, env)
    _of_memory(found, degrees, model)


def _of_precision(found: Arguments) -> None:
    half = [name for name in ("--fp16", "--bf16") if found.on(name)]
    low = [name for name in ("--fp8-format", "--fp4-format") if found.get(name)]
    if len(half) > 1:
        found.add("error", "--fp16, --bf16", "exclude each other", "keep --bf16")
    if not half and found.get("--num-layers"):
        found.add(
            "waste",
            "--bf16",
            "is not given: it trains in fp32, with twice the bytes of activations, without the tensor cores "
            "of half precision",
            "add --bf16",
        )
    if len(low) > 1:
        found.add("error", ", ".join(low), "exclude each other", "keep one")
    if low and found.get("--transformer-impl", "transformer_engine") == "local":
        text = "is Transformer Engine's: products of --transformer-impl local do not heed it"
        found.add("warning", low[0], text, "leave out --transformer-impl local")
    if not low and (recipe := found.get("--fp8-recipe")):
        text = f"{shown(recipe)} has no effect without --fp8-format"
        found.add("warning", "--fp8-recipe", text, "add --fp8-format hybrid")
    if found.on("--grad-reduce-in-bf16") and found.on("--accumulate-allreduce-grads-in-fp32"):
        text = "overrules --accumulate-allreduce-grads-in-fp32"
        found.add("warning", "--grad-reduce-in-bf16", text, "keep one")
    impl = found.get("--cross-entropy-fusion-impl")
    if found.on("--cross-entropy-loss-fusion") and impl == "te":
        found.add(
            "error",
            "--cross-entropy-fusion-impl",
            "te is refused by Megatron-LM 0.19, as not stable",
            "use native",
        )


def _of_recompute(found: Arguments, options: Mapping[str, Any]) -> None:
    kind, method = found.get("--recompute-granularity"), found.get("--recompute-method")
    number, modules = found.get("--recompute-num-layers"), found.get("--recompute-modules")
    if found.on("--recompute-activations") and kind == "full":
        text = "stands for selective, and overrules --recompute-granularity full"
        found.add("warning", "--recompute-activations", text, "leave it out for full")
        kind = "selective"
    elif found.on("--recompute-activations"):
        kind = "selective"
    if kind == "full":
        missing = [
            name
            for name, value in (("--recompute-method", method), ("--recompute-num-layers", number))
            if value is None and name not in found.open
        ]
        if missing:
            text = f"full takes {' and '.join(missing)} too"
            fix = "add --recompute-method uniform --recompute-num-layers 1"
            found.add("error", "--recompute-granularity", text, fix)
        if modules:
            text = "is of --recompute-granularity selective: with full it has no effect"
            found.add("warning", "--recompute-modules", text, "leave it out")
        _first_layers(found, method, number, options)
    elif kind == "selective":
        if method is not None:
            text = "is of --recompute-granularity full"
            found.add("error", "--recompute-method", text, "leave it out")
        if number is not None:
            text = "is of --recompute-granularity full"
            found.add("error", "--recompute-num-layers", text, "leave it out")
        if "core_attn" in (modules or ["core_attn"]) and "attention=flash" in options.get("option", ()):
            found.add(
                "waste",
                "--recompute-modules",
                "core_attn: fused attention keeps no scores, so that running it again saves next to nothing",
                "name other modules (layernorm, mlp, moe_act ...), or leave it out",
            )
        if modules and "moe_act" in modules and not found.on("--moe-grouped-gemm"):
            text = "moe_act takes --moe-grouped-gemm"
            found.add("error", "--recompute-modules", text, "add --moe-grouped-gemm")
        if modules and "mla_up_proj" in modules and not found.on("--multi-latent-attention"):
            text = "mla_up_proj is of latent attention"
            found.add("error", "--recompute-modules", text, "leave it out")
    else:
        alone = ("--recompute-method", "--recompute-num-layers", "--recompute-modules")
        if given := [name for name in alone if found.get(name) is not None]:
            text = "has no effect without --recompute-granularity: nothing is recomputed"
            found.add("warning", ", ".join(given), text, "add --recompute-granularity full or selective")
    if found.get("--cpu-offloading-num-layers") and options.get("pipeline_parallel", 1) > 1:
        text = "does not go with a pipeline"
        found.add("error", "--cpu-offloading-num-layers", text, "use --pipeline-model-parallel-size 1")
    if kind and found.get("--cpu-offloading-num-layers"):
        text = "does not go with recomputation"
        found.add("error", "--cpu-offloading-num-layers", text, "keep one")
    if found.on("--distribute-saved-activations"):
        if found.on("--sequence-parallel"):
            text = "is what --sequence-parallel does already: Megatron-LM refuses both"
            found.add("error", "--distribute-saved-activations", text, "leave it out")
        elif kind != "full":
            text = "takes --recompute-granularity full"
            found.add("error", "--distribute-saved-activations", text, "leave it out")


def _first_layers(
    found: Arguments, method: str | None, number: int | None, options: Mapping[str, Any]
) -> None:
    layers, pp = found.get("--num-layers"), options.get("pipeline_parallel", 1)
    if not (layers and number):
        return
    chunk = -(-layers // pp // options.get("chunks", 1))
    if number > chunk:
        what = "recomputes all of them" if method == "block" else "recomputes them as one"
        found.add(
            "warning",
            "--recompute-num-layers",
            f"{number} is more than the {chunk} layers of a chunk ({layers} over {pp} stages): Megatron-LM "
            f"{what}, and says nothing",
            f"use 1 to {chunk}",
        )


def _of_optimizer(
    found: Arguments, degrees: Mapping[str, int], options: Mapping[str, Any], model: ModelSpec | None
) -> None:
    sharded = found.on("--use-distributed-optimizer") or found.on("--use-megatron-fsdp")
    data = (options.get("data_parallel") or 1) * degrees["context_parallel"]
    if options.get("sharding") == "ddp" and data > 1 and options.get("optimizer") == "adamw":
        amount = ""
        if model is not None and options.get("precision") != "fp32":
            saved = per_gpu(model, degrees) * STATES * (1 - 1 / data)
            amount = f", about {human_bytes(int(saved))} a GPU more than shared out"
        found.add(
            "waste",
            "--use-distributed-optimizer",
            f"is off: each of {data} replicas keeps all optimizer states{amount}",
            "add --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        )
    if found.on("--overlap-param-gather"):
        if not sharded and found.get("--optimizer") != "dist_muon":
            text = "takes --use-distributed-optimizer"
            found.add("error", "--overlap-param-gather", text, "add --use-distributed-optimizer")
        elif not found.on("--overlap-grad-reduce"):
            text = "takes --overlap-grad-reduce"
            found.add("error", "--overlap-param-gather", text, "add --overlap-grad-reduce")
    elif found.on("--use-distributed-optimizer") and data > 1 and not found.on("--overlap-grad-reduce"):
        found.add(
            "waste",
            "--overlap-grad-reduce",
            "is off: gradients are sent when the backward is over, and parameters before the forward",
            "add --overlap-grad-reduce --overlap-param-gather",
        )
    aware = found.on("--use-precision-aware-optimizer")
    typed = [
        name
        for name in ("--exp-avg-dtype", "--exp-avg-sq-dtype", "--main-grads-dtype", "--main-params-dtype")
        if found.get(name, "fp32") != "fp32"
    ]
    if typed and not aware:
        text = "takes --use-precision-aware-optimizer"
        found.add("error", ", ".join(typed), text, "add --use-precision-aware-optimizer")
    if aware and not sharded:
        text = "takes --use-distributed-optimizer"
        found.add("error", "--use-precision-aware-optimizer", text, "add --use-distributed-optimizer")
    if found.on("--optimizer-cpu-offload") and not aware:
        text = "takes --use-precision-aware-optimizer"
        found.add("error", "--optimizer-cpu-offload", text, "add --use-precision-aware-optimizer")
    if found.on("--fp8-param-gather") and not (sharded or found.on("--use-torch-fsdp2")):
        text = "takes --use-distributed-optimizer"
        found.add("error", "--fp8-param-gather", text, "add --use-distributed-optimizer")
    if found.on("--fp8-param-gather") and not found.get("--fp8-format"):
        found.add("error", "--fp8-param-gather", "takes --fp8-format", "add --fp8-format hybrid")
    in_blocks = found.get("--fp8-recipe") == "mxfp8"
    if found.on("--fp8-param-gather") and in_blocks and not found.on(REUSED):
        text = f"weights in mxfp8 lie in no contiguous buffer: {REUSED} gathers them through the gradients'"
        found.add("error", "--fp8-param-gather", text, f"add {REUSED}")
    if found.on(REUSED) and not (found.on("--fp8-param-gather") and in_blocks):
        text = "takes --fp8-param-gather and --fp8-recipe mxfp8"
        found.add("error", REUSED, text, "add these, or leave it out")


def per_gpu(model: ModelSpec, degrees: Mapping[str, int]) -> float:
    """Parameters on a GPU, about: even over stages, experts and tensor-parallel ranks."""
    routed = 0.0
    if model.experts:
        of_one = (3 if model.gated_mlp else 2) * model.hidden_size * model.experts.intermediate_size
        blocks = sum(block.mlp == "experts" for block in model.blocks)
        routed = blocks * model.experts.num_experts * of_one
    pp = degrees["pipeline_parallel"]
    own = (model.num_parameters - routed) / (degrees["tensor_parallel"] * pp)
    return own + routed / (degrees["expert_parallel"] * degrees["expert_tensor_parallel"] * pp)


def _of_fsdp(found: Arguments, degrees: Mapping[str, int], env: Mapping[str, str] | None) -> None:
    pp, ep = degrees["pipeline_parallel"], degrees["expert_parallel"]
    torch, own = found.on("--use-torch-fsdp2"), found.on("--use-megatron-fsdp")
    name = "--use-torch-fsdp2" if torch else "--use-megatron-fsdp"
    if torch:
        refused = [
            (
                pp > 1,
                f"does not go with --pipeline-model-parallel-size {pp}",
                "use 1, or --use-megatron-fsdp",
            ),
            (ep > 1, f"does not go with --expert-model-parallel-size {ep}", "use 1, or --use-megatron-fsdp"),
            (
                found.on("--use-distributed-optimizer"),
                "does not go with --use-distributed-optimizer",
                "leave that out",
            ),
            (found.on("--fp16"), "does not go with --fp16", "use --bf16"),
            (
                not found.on("--untie-embeddings-and-output-weights"),
                "takes --untie-embeddings-and-output-weights",
                "add it",
            ),
            (
                found.values.get("gradient_accumulation_fusion") is not False,
                "takes --no-gradient-accumulation-fusion",
                "add it",
            ),
        ]
        for wrong, text, fix in refused:
            if wrong:
                found.add("error", name, text, fix)
    if own:
        if found.get("--ckpt-format", "torch_dist") != "fsdp_dtensor":
            found.add("error", name, "takes --ckpt-format fsdp_dtensor", "add --ckpt-format fsdp_dtensor")
        if found.get("--data-parallel-sharding-strategy", "no_shard") == "no_shard":
            found.add(
                "waste",
                "--data-parallel-sharding-strategy",
                "is not given: no_shard, which shares nothing out",
                "add --data-parallel-sharding-strategy optim_grads_params",
            )
        if pp > 1:
            text = f"with --pipeline-model-parallel-size {pp} is neither documented nor tested by Megatron-LM"
            found.add("warning", name, text, "use the distributed optimizer with a pipeline")
    elif found.get("--ckpt-format") == "fsdp_dtensor":
        text = "fsdp_dtensor is of --use-megatron-fsdp"
        found.add("error", "--ckpt-format", text, "use torch_dist, or add --use-megatron-fsdp")
    elif found.get("--data-parallel-sharding-strategy"):
        text = "has no effect without --use-megatron-fsdp"
        found.add("warning", "--data-parallel-sharding-strategy", text, "add --use-megatron-fsdp")
    if (torch or own) and env is not None and env.get(QUEUES) == "1":
        text = f"is 1, which {name} refuses: its messages need queues of their own"
        found.add("error", QUEUES, text, f"unset {QUEUES}, or export {QUEUES}=8")


def _of_memory(found: Arguments, degrees: Mapping[str, int], model: ModelSpec | None) -> None:
    length, micro = found.get("--seq-length"), found.get("--micro-batch-size") or 1
    if length and found.values.get("create_attention_mask_in_dataloader") is not False and model is not None:
        size = micro * length * length
        if size >= LARGE_MASK:
            found.add(
                "waste",
                "--no-create-attention-mask-in-dataloader",
                f"is not given: a mask of {length} x {length} bytes for each sequence goes to the GPU, "
                f"{human_bytes(size)}, which is in no plan and which causal kernels do not read",
                "add --no-create-attention-mask-in-dataloader",
            )
    multiple, own = found.get("--make-vocab-size-divisible-by", 128), found.get("--vocab-size")
    padded = found.get("--padded-vocab-size")
    if own and padded is None and multiple > 0:
        cut = multiple * degrees["tensor_parallel"]
        padded = -(-own // cut) * cut
    if own and padded and padded > 1.02 * own:
        found.add(
            "waste",
            "--make-vocab-size-divisible-by",
            f"{own:,} entries of the vocabulary become {padded:,}: {padded / own - 1:.0%} of the embedding "
            "and the head are never used",
            "use a smaller multiple",
        )
