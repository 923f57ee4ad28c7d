"""Megatron-LM / megatron-core: contiguous gradient buffers, fused kernels, flash attention.

Sums: a GPT block in half precision with dropout keeps ``sbh(34 + 5as/h)`` (Korthikanti et al.
2022, arXiv:2205.05198, equation 1) plus 16 sb of norm statistics; a LLaMA block with flash
attention keeps ``sbh(12 + 4k/a + 6f/h)`` plus log-sum-exp and statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.stacks import megatron_experts as parts
from planner.stacks import traffic
from planner.stacks.base import (
    ALLOCATOR,
    ALWAYS,
    BYTE,
    COMPUTE,
    FP32,
    INT64,
    NONE,
    UNTIL_FULL,
    Offloading,
    Overhead,
    Recipe,
    Row,
    Saving,
    Stack,
)
from planner.stacks.megatron_delta import DELTA, DELTA_STAGE, GATED_ATTENTION
from planner.stacks.megatron_hybrid import MAMBA, by_parts, of_stage
from planner.stacks.megatron_quantized import QUANTIZED
from strategies.base import Role

H, A, AD, KD, F, SS, V = (
    "batch seq residual",
    "batch seq heads",
    "batch seq heads head_dim",
    "batch seq kv_heads head_dim",
    "batch seq ffn",
    "batch heads seq seq_k",
    "batch seq vocab",
)
TRANSIENT, BUFFER = Role.TRANSIENT, Role.BUFFER

BLOCK = (
    Row("block input", H, 1, COMPUTE, ALWAYS, steps="norm1"),
    Row("norm statistics", "batch seq residual:1", 2, FP32, UNTIL_FULL, "rmsnorm", steps="norm1 norm2"),
    Row("norm statistics", "batch seq residual:1", 4, FP32, UNTIL_FULL, "layernorm", steps="norm1 norm2"),
    Row(
        "attention input (norm output)",
        H,
        1,
        COMPUTE,
        UNTIL_FULL,
        "!norm:recomputed !quantized",
        steps="qkv",
        read_by="qkv",
    ),
    Row("query", AD, 1, COMPUTE, UNTIL_FULL, steps="core"),
    Row("key and value", KD, 2, COMPUTE, UNTIL_FULL, steps="core"),
    # The norms of queries and keys keep their inputs.
    Row("query before its norm", AD, 1, COMPUTE, UNTIL_FULL, "qk_norm", steps="qkv"),
    Row("key before its norm", KD, 1, COMPUTE, UNTIL_FULL, "qk_norm", steps="qkv"),
    # Without Transformer Engine's fused rotary embedding both versions of q and k are kept.
    Row("rotated query", AD, 1, COMPUTE, UNTIL_FULL, "rotary eager", steps="core"),
    Row("rotated key", KD, 1, COMPUTE, UNTIL_FULL, "rotary eager", steps="core"),
    Row("rotary angles", "seq head_dim", 2, FP32, UNTIL_FULL, "rotary eager", steps="core"),
    Row("attention probabilities", SS, 1, COMPUTE, NONE, "eager", steps="core"),
    Row("attention dropout mask", SS, 1, BYTE, NONE, "eager attention_dropout", steps="core"),
    Row("attention after dropout", SS, 1, COMPUTE, NONE, "eager attention_dropout", steps="core"),
    Row("log-sum-exp of the scores", A, 1, FP32, NONE, "!eager", steps="core"),
    Row("attention output", AD, 1, COMPUTE, UNTIL_FULL, steps="core"),
    Row("dropout mask after attention", H, 1, BYTE, UNTIL_FULL, "dropout", steps="out"),
    Row("input of the second norm", H, 1, COMPUTE, UNTIL_FULL, "!parallel", steps="norm2"),
    Row(
        "MLP input (norm output)",
        H,
        1,
        COMPUTE,
        UNTIL_FULL,
        "!norm:recomputed !quantized",
        steps="up",
        read_by="up",
    ),
    Row("activation's input", F, 1, COMPUTE, UNTIL_FULL, "!gated", steps="act"),
    Row(
        "second product's input", F, 1, COMPUTE, UNTIL_FULL, "!gated !quantized", steps="down", read_by="down"
    ),
    Row("gate and up", F, 2, COMPUTE, UNTIL_FULL, "gated", steps="act"),
    Row("activated gate", F, 1, COMPUTE, UNTIL_FULL, "gated swiglu:unfused", steps="act"),
    Row(
        "gated product",
        F,
        1,
        COMPUTE,
        UNTIL_FULL,
        "gated !swiglu:recomputed !quantized",
        steps="down",
        read_by="down",
    ),
    Row("dropout mask after MLP", H, 1, BYTE, UNTIL_FULL, "dropout", steps="down"),
    Row("gradient of the block's output", H, 8, role=TRANSIENT, steps="down act up norm2 out core qkv norm1"),
    Row("gradient of the second product's input", F, 2, role=TRANSIENT, steps="down act"),
    Row("gradients of gate and up", F, 4, when="gated", role=TRANSIENT, steps="act up"),
    Row("gradient of the activation's input", F, 2, when="!gated", role=TRANSIENT, steps="act up"),
    Row("gradient of a norm's output", H, 4, role=TRANSIENT, steps="up norm2 qkv norm1"),
    Row("gradient of the attention output", AD, 2, role=TRANSIENT, steps="out core"),
    Row("gradient of the query", AD, 2, role=TRANSIENT, steps="core qkv"),
    Row("gradients of key and value", KD, 4, role=TRANSIENT, steps="core qkv"),
    Row(
        "gradient of the gathered query, key and value",
        "batch seq gathered_heads head_dim repeats",
        2,
        role=TRANSIENT,
        steps="core qkv",
    ),
    Row("gradient of the scores", SS, 1, when="eager", role=TRANSIENT, steps="core"),
    Row("norm outputs, recomputed", H, 2, when="norm:recomputed", role=TRANSIENT, steps="qkv up"),
    Row("gated product, recomputed", F, 1, when="gated swiglu:recomputed", role=TRANSIENT, steps="down"),
)

EMBEDDING = (
    Row("token ids", "batch seq", 1, INT64),
    Row("dropout mask of the embedding", H, 1, BYTE, when="dropout"),
    Row("input of the embedding norm", H, 1, when="embedding_norm"),
    Row("gradient of the embedding's output", H, 1, role=TRANSIENT, steps="embedding"),
    # The look-up's backward makes a dense gradient, which is then added to the main one.
    Row("dense gradient of the look-up", "vocab hidden", 1, when="mcore", role=TRANSIENT, steps="embedding"),
)

HEAD = (
    Row("input of the final norm", H, 1, steps="norm"),
    Row("final norm statistics", "batch seq residual:1", 1, FP32, when="rmsnorm", steps="norm"),
    Row("final norm statistics", "batch seq residual:1", 2, FP32, when="layernorm", steps="norm"),
    Row("head input (norm output)", H, 1, steps="head", read_by="head"),
    # Vocabulary-parallel cross entropy keeps the probabilities, in fp32; Transformer Engine's fused one
    # the logits, which its backward turns into their gradients in place.
    Row("probabilities of the loss", V, 1, FP32, when="!loss:fused", steps="loss"),
    Row("logits", V, 1, when="loss:fused", steps="head"),
    Row("logits", V, 1, when="!loss:fused", role=TRANSIENT, steps="loss"),
    Row("gradient of the logits", V, 1, when="!loss:fused", role=TRANSIENT, steps="head"),
    Row("gradient of the head's input", H, 2, role=TRANSIENT, steps="head norm"),
    # Fused accumulation adds to the main gradient; autograd is handed an empty one of the weight's shape.
    Row(
        "stand-in gradient of the head weight",
        "vocab hidden",
        1,
        when="mcore",
        role=TRANSIENT,
        steps="head",
        read_by="head",
    ),
)

# Transformer Engine keeps one stand-in for each shape of weight, for good (get_dummy_wgrad).
STAGE = (
    Row(
        "stand-in gradient, query, key, value: query",
        "hidden heads head_dim",
        1,
        when="mcore !eager",
        role=BUFFER,
        read_by="qkv",
    ),
    Row(
        "stand-in gradient, query, key, value: key and value",
        "hidden kv_heads head_dim",
        2,
        when="mcore !eager",
        role=BUFFER,
        read_by="qkv",
    ),
    Row(
        "stand-in gradient, attention output",
        "heads head_dim hidden",
        1,
        when="mcore !eager",
        role=BUFFER,
        read_by="out",
    ),
    Row(
        "stand-in gradient, gate and up",
        "hidden ffn",
        2,
        when="mcore !eager gated",
        role=BUFFER,
        read_by="up",
    ),
    Row("stand-in gradient, up", "hidden ffn", 1, when="mcore !eager !gated", role=BUFFER, read_by="up"),
    Row("stand-in gradient, down", "ffn hidden", 1, when="mcore !eager", role=BUFFER, read_by="down"),
    # The scores of unfused attention go into one buffer that all layers share.
    Row("attention scores, shared", SS, 1, when="mcore eager", role=BUFFER),
)


def _takes(shardings: Mapping[str, bool], recipe: Recipe) -> Mapping[str, bool]:
    """Quantized products are planned without Megatron-FSDP; 8-bit moments are the distributed optimizer's.

    core/optimizer/optimizer_config.py: ``--use-precision-aware-optimizer``.
    """
    if recipe.moment == 1:
        return {name: pipelined for name, pipelined in shardings.items() if name == "zero1"}
    if recipe.quantized:
        return {name: pipelined for name, pipelined in shardings.items() if name in ("ddp", "zero1")}
    return shardings


# core/optimizer/cpu_offloading/hybrid_optimizer.py: fp32 weights, gradients and moments on the host, pinned;
# gradients stay in their buffer on the GPU and are copied in the step, the weights come back.
# transformer_config.py takes no pipeline and no recomputation with cpu_offloading, of fewer than all layers.
ACTIVATIONS = {"activations": "--cpu-offloading-num-layers"}
OFFLOADING = {
    "ddp": Offloading(layers=ACTIVATIONS),
    "zero1": Offloading(
        whole={"optimizer": "--optimizer-cpu-offload --use-precision-aware-optimizer"},
        layers={"optimizer": "--optimizer-offload-fraction", **ACTIVATIONS},
        returned=2.0,
    ),
}


def _quantized(unit: str, cast: float, cast_weight: float, gathered: float = 0.0) -> Recipe:
    """A recipe of bf16 whose blocks' products take operands of that many bytes an element, with scales."""
    bf16 = Recipe(2, 4, 4, 4, unit=unit, rest="bf16")
    return replace(bf16, cast=cast, cast_weight=cast_weight, cast_gathered=gathered)


RECIPES = {
    "bf16": Recipe(2, 4, 4, 4),
    "fp16": Recipe(2, 4, 4, 4, unit="fp16"),
    "fp32": Recipe(4, 4, 0, 4, compute=4, unit="fp32"),
    "tf32": Recipe(4, 4, 0, 4, compute=4, unit="tf32"),
    # --fp8-format hybrid --fp8-recipe ...; weights, gradients and moments stay those of bf16. Scales are
    # one of a tensor; fp32 of 1 x 128, of weights too few to count; a byte of 1 x 32; of 1 x 16 elements.
    # Kept in 8 bits alone they are gathered so; those of mxfp8, which no contiguous buffer holds, in bf16
    # through the gradients' (Transformer Engine, pytorch/tensor/utils.py, ``replace_raw_data``).
    "fp8-delayed": _quantized("fp8", 1, 1, gathered=1),
    "fp8-tensorwise": _quantized("fp8", 1, 1, gathered=1),
    "fp8-blockwise": _quantized("fp8", 1 + 4 / 128, 1, gathered=1),
    "mxfp8": _quantized("fp8", 1 + 1 / 32, 1 + 1 / 32, gathered=2),
    # --fp4-format e2m1 --fp4-recipe nvfp4 (pytorch/tensor/nvfp4_tensor.py, inner_tensor_specs).
    "nvfp4": _quantized("fp4", 1 / 2 + 1 / 16, 1 / 2 + 1 / 16),
}
# training/arguments.py: --fp8-param-gather is the distributed optimizer's, and with --optimizer-cpu-offload
# of delayed scaling only: planned without.
ALONE: dict[str, Any] = {
    "recipes": {name: replace(one, cast_alone=one.quantized_weights) for name, one in RECIPES.items()},
    "shardings": {"zero1": True},
    "replicates": False,
    "offloading": {"zero1": Offloading(layers=ACTIVATIONS)},
}


MEGATRON = Stack(
    recomputes="first",
    name="megatron",
    version="Megatron-LM core 0.16, Transformer Engine kernels",
    rows={
        "embedding": EMBEDDING + traffic.EMBEDDING,
        "block": (
            *parts.usual(by_parts(*BLOCK, *traffic.FUSED)),
            *parts.MIXTURE,
            *parts.LATENT,
            *MAMBA,
            *QUANTIZED,
            *DELTA,
            *GATED_ATTENTION,
        ),
        "head": HEAD + traffic.HEAD,
        "stage": (*parts.usual(of_stage(*STAGE)), *parts.STAND_INS, *DELTA_STAGE),
    },
    recipes=RECIPES,
    variants={"fp8_param_gather:on": ALONE},
    takes=_takes,
    moment_types=("fp32", "bf16", "fp8"),
    shardings={"ddp": True, "zero1": True, "zero2": False, "fsdp": False},
    sharding_notes={
        "zero1": "--use-distributed-optimizer",
        # Pipelines pass Megatron-FSDP's argument checks but are neither documented nor tested.
        "zero2": "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads",
        "fsdp": "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params",
    },
    schedules=("1f1b", "interleaved"),
    rank_orders={"tp-dp-pp": "", "tp-pp-dp": "--use-tp-pp-dp-mapping"},  # tp-cp-ep-dp-pp, tp-cp-ep-pp-dp
    options={
        "attention": ("flash", "eager"),
        "swiglu": ("fused", "unfused", "recomputed"),
        "norm": ("kept", "recomputed"),
        "loss": ("parallel", "fused"),
        "overlap": ("on", "off"),  # --overlap-grad-reduce, --overlap-param-gather
        "tp_comm_overlap": ("off", "on"),
        "fp8_param_gather": ("off", "on"),  # --fp8-param-gather: no weights in bf16 beside those in 8 bits
        **parts.OPTIONS,
    },
    concerns={**parts.CONCERNS, "fp8_param_gather": "quantized_weights"},
    # Attention sinks by --softmax-type learnable.
    parts={
        "experts": (),
        "latent": ("attention:eager",),
        "attention_sinks": (),
        "delta": ("quantized", "attention:eager"),  # experimental_attention_variant_module_specs.py
        "attention_gate": ("quantized",),
    },
    reruns=parts.RERUNS,
    # transformer_config.py: cp_comm_type; Transformer Engine's attention has them.
    context_comms={
        "ring": "--cp-comm-type p2p",
        "all-gather": "--cp-comm-type all_gather",
        "ulysses": "--cp-comm-type a2a",
        "ulysses+ring": "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes {heads} {ring}",
    },
    context_attention=("flash",),
    expert_parallel=True,
    expert_tensor_parallel=True,
    rerun={"attention core": NONE},
    # core/optimizer/distrib_optimizer.py, _get_main_param_and_optimizer_states: a "param" besides the model's
    # and moments of Transformer Engine's get_unscaled_state. Megatron-FSDP's modules have main weights for
    # parameters (megatron_fsdp.py, _replace_param_with_distributed_if_needed).
    saving=Saving(
        "Megatron-LM core 0.16, training/checkpointing.py, generate_state_dict",
        without_weights=("zero2", "fsdp"),
        in_fp32=("zero1",),
    ),
    offloading=OFFLOADING,
    vocabulary_multiple=128,
    gradients_resident=True,
    fused_accumulation=True,
    words=("mcore",),
    gradient_copies=True,
    allocator=Overhead(
        ALLOCATOR.name,
        0.03,
        0.0,
        0.09,
        "measured",
        "1.01-1.09 in SimuMax's per-rank readings of Megatron-LM on B200, 1.03 in most",
        fraction=True,
    ),
    repeats_heads=True,
    overlaps_regions=True,
    attention_kernels=("cudnn", "flash"),  # as Transformer Engine prefers them
    hidden_transfers="--overlap-grad-reduce --overlap-param-gather",
)
