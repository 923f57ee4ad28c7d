"""Megatron-LM / megatron-core: contiguous gradient buffers, fused kernels, flash attention.

Sums: a GPT block in half precision with dropout keeps ``sbh(34 + 5as/h)`` (Korthikanti et al.
2022, arXiv:2205.05198, equation 1) plus 16 sb of norm statistics; a LLaMA block with flash
attention keeps ``sbh(12 + 4k/a + 6f/h)`` plus log-sum-exp and statistics.
"""

from __future__ import annotations

from collections.abc import Mapping

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
from planner.stacks.megatron_hybrid import MAMBA, by_parts, of_stage
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


def _fp8_copies(name: str, dims: str, count: float, when: str = "") -> tuple[Row, ...]:
    """A weight's copies in 8 bits, made in the first micro-batch of a step and kept for good.

    Transformer Engine, module/base.py, ``_fp8_workspaces``: beside the bf16 weight one as it is and,
    where the products need it, one transposed; scales of 128 x 128 blocks are too few to count.
    """
    weight = f"{name} in fp8"
    return (
        Row(weight, dims, count, BYTE, when=f"fp8 {when}", role=BUFFER),
        Row(f"{weight}, transposed", dims, count, BYTE, when=f"fp8_transposed {when}", role=BUFFER),
        Row(f"{weight}, scales", dims, count * 2 / 32, BYTE, when=f"fp8:mxfp8 {when}", role=BUFFER),
    )


FP8_WEIGHTS = (
    *_fp8_copies("query weight", "hidden heads head_dim", 1),
    *_fp8_copies("key and value weights", "hidden kv_heads head_dim", 2),
    *_fp8_copies("attention output weight", "heads head_dim hidden", 1),
    *_fp8_copies("gate and up weights", "hidden ffn", 2, "gated"),
    *_fp8_copies("up weight", "hidden ffn", 1, "!gated"),
    *_fp8_copies("down weight", "ffn hidden", 1),
)

# Gradients are cast for both products of the backward.
FP8_GRADIENTS = tuple(
    Row(f"{name}{beside}", dims, count, BYTE, when=f"{word} {when}", role=TRANSIENT, steps=step)
    for name, dims, count, step, when in (
        ("gradient of the block's output in fp8", H, 1, "down", ""),
        ("gradients of gate and up in fp8", F, 2, "up", "gated"),
        ("gradient of up in fp8", F, 1, "up", "!gated"),
        ("gradient of the attention product's output in fp8", H, 1, "out", ""),
        ("gradient of the query in fp8", AD, 1, "qkv", ""),
        ("gradients of key and value in fp8", KD, 2, "qkv", ""),
    )
    for word, beside in (("fp8", ""), ("fp8_transposed", ", transposed"))
)

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
        "!norm:recomputed !fp8",
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
        "!norm:recomputed !fp8",
        steps="up",
        read_by="up",
    ),
    Row("activation's input", F, 1, COMPUTE, UNTIL_FULL, "!gated", steps="act"),
    Row("second product's input", F, 1, COMPUTE, UNTIL_FULL, "!gated !fp8", steps="down", read_by="down"),
    Row("gate and up", F, 2, COMPUTE, UNTIL_FULL, "gated", steps="act"),
    Row("activated gate", F, 1, COMPUTE, UNTIL_FULL, "gated swiglu:unfused", steps="act"),
    Row(
        "gated product",
        F,
        1,
        COMPUTE,
        UNTIL_FULL,
        "gated !swiglu:recomputed !fp8",
        steps="down",
        read_by="down",
    ),
    Row("dropout mask after MLP", H, 1, BYTE, UNTIL_FULL, "dropout", steps="down"),
    # In 8 bits a product keeps its input as it multiplies it with the gradients: one byte, of one orientation
    # (Transformer Engine, module/linear.py and layernorm_linear.py, update_usage). Attention keeps its output
    # all the same, and the product after it a copy, but for scales of the current tensor, which Megatron-LM
    # makes it cast again (core/transformer/attention.py, set_save_original_input).
    Row("attention input in fp8", H, 1, BYTE, UNTIL_FULL, "fp8", steps="qkv"),
    Row("attention output in fp8", AD, 1, BYTE, UNTIL_FULL, "fp8:delayed", steps="out"),
    Row("MLP input in fp8", H, 1, BYTE, UNTIL_FULL, "fp8", steps="up"),
    Row("second product's input in fp8", F, 1, BYTE, UNTIL_FULL, "fp8", steps="down"),
    Row("scales of the norms' outputs in fp8", H, 2 / 32, BYTE, UNTIL_FULL, "fp8_scales", steps="qkv up"),
    Row("scales of the second product's input", F, 1 / 32, BYTE, UNTIL_FULL, "fp8_scales", steps="down"),
    *FP8_WEIGHTS,
    *FP8_GRADIENTS,
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

# Casts of the products' inputs and of the gradients: read in half precision, written twice in a byte.
FP8_TRAFFIC = (
    traffic.row("casts of inputs and gradients to fp8", H, 8, "fp8"),
    traffic.row("casts of attention's output and the query's gradient to fp8", AD, 4, "fp8"),
    traffic.row("casts of the gradients of key and value to fp8", KD, 4, "fp8"),
    traffic.row("casts of the MLP's inner activations to fp8", F, 4, "fp8"),
    traffic.row("casts of the gate's gradient to fp8", F, 2, "fp8 gated"),
)


def _takes(shardings: Mapping[str, bool], recipe: Recipe) -> Mapping[str, bool]:
    """8-bit products are planned without Megatron-FSDP; 8-bit moments are the distributed optimizer's.

    core/optimizer/optimizer_config.py: ``--use-precision-aware-optimizer``.
    """
    if recipe.moment == 1:
        return {name: pipelined for name, pipelined in shardings.items() if name == "zero1"}
    if recipe.unit == "fp8":
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

MEGATRON = Stack(
    name="megatron",
    version="Megatron-LM core 0.16, Transformer Engine kernels",
    rows={
        "embedding": EMBEDDING + traffic.EMBEDDING,
        "block": (
            *parts.usual(by_parts(*BLOCK, *traffic.FUSED, *FP8_TRAFFIC)),
            *parts.MIXTURE,
            *parts.LATENT,
            *MAMBA,
        ),
        "head": HEAD + traffic.HEAD,
        "stage": (*parts.usual(of_stage(*STAGE)), *parts.STAND_INS),
    },
    recipes={
        "bf16": Recipe(2, 4, 4, 4),
        "fp16": Recipe(2, 4, 4, 4, unit="fp16"),
        "fp32": Recipe(4, 4, 0, 4, compute=4, unit="fp32"),
        "tf32": Recipe(4, 4, 0, 4, compute=4, unit="tf32"),
        # --fp8-format hybrid --fp8-recipe ...; weights, gradients and moments stay those of bf16.
        **dict.fromkeys(
            ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8"),
            Recipe(2, 4, 4, 4, unit="fp8", rest="bf16"),
        ),
    },
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
        **parts.OPTIONS,
    },
    concerns=parts.CONCERNS,
    # Attention sinks by --softmax-type learnable.
    parts={"experts": ("fp8",), "latent": ("fp8", "attention:eager"), "attention_sinks": ()},
    reruns=parts.RERUNS,
    # transformer_config.py: cp_comm_type; Transformer Engine's attention has them.
    context_comms={
        "ring": "--cp-comm-type p2p",
        "all-gather": "--cp-comm-type all_gather",
        "ulysses": "--cp-comm-type a2a",
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
