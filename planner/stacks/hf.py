"""Hugging Face transformers: eager modules, one process per GPU, no pipeline.

Sums per block, counted in transformers 5.23.0 under torch 2.13, bf16, SDPA with its flash kernel:
Llama ``sb[16h + 2(a+2k)d + 2ad + 8f] + 4sba + 8sb`` (each RMSNorm keeps an fp32 copy, the
normalised values and its output); GPT-2 ``sb[18h + 10f] + 4sba + 16sb`` with dropout.
"""

from __future__ import annotations

from planner.stacks import hf_experts, hf_families, traffic, traffic_families
from planner.stacks.base import (
    ALWAYS,
    BYTE,
    COMPUTE,
    FP32,
    GRADIENT,
    INT64,
    UNTIL_FULL,
    Recipe,
    Row,
    Saving,
    Stack,
)
from planner.stacks.traffic import given
from strategies.base import Role

# Checkpointing is per block: what ``full`` frees, nothing milder does.
H, A, AD, KD, F, SS = (
    "batch seq residual",
    "batch seq heads",
    "batch seq heads head_dim",
    "batch seq kv_heads head_dim",
    "batch seq ffn",
    "batch heads seq seq_k",
)

V = "batch seq vocab"
QW, KW, FW = "hidden heads head_dim", "hidden kv_heads head_dim", "hidden ffn"
CD = "batch seq copied_heads head_dim"
REPEATED = "masked !one_key !fp32 !eager !fused_qkv"
KV = "batch seq kv_heads"
QK = "qk_norm !norms_in_fp32"
IN_FP32 = "rmsnorm !norms:output !compile:on"
HALF_SOFTMAX = "eager softmax_in_half !attention_dropout"
HALF_DROPPED = "eager softmax_in_half attention_dropout"
TRANSIENT = Role.TRANSIENT
ALL = "shared combine down act up norm2 cross out core qkv norm1"

NORMS = (
    Row(
        "block input",
        H,
        1,
        COMPUTE,
        ("full",),
        "rmsnorm !norms:output !autocast !compile:on",
        steps="norm1",
    ),
    Row("block input", H, 1, FP32, ("full",), "rmsnorm autocast !compile:on", steps="norm1"),
    # Compiled, a block keeps its input, its products' inputs and outputs, and what attention needs.
    Row("block input", H, 1, COMPUTE, ALWAYS, "compile:on !autocast", steps="norm1"),
    Row("block input", H, 1, FP32, ALWAYS, "compile:on autocast", steps="norm1"),
    Row("attention product's output", H, 1, COMPUTE, UNTIL_FULL, "compile:on", steps="norm2"),
    Row("norm outputs", H, 2, COMPUTE, UNTIL_FULL, "compile:on autocast", steps="qkv up"),
    Row("norm inputs in fp32", H, 2, FP32, UNTIL_FULL, IN_FP32, steps="norm1 norm2"),
    # Freed before the norm's own temporaries arise, so with the step before.
    Row(
        "normalised values",
        H,
        2,
        COMPUTE,
        UNTIL_FULL,
        "rmsnorm !norms_in_fp32 !autocast !compile:on",
        steps="qkv up",
        read_by="norms",
    ),
    Row(
        "normalised values",
        H,
        2,
        FP32,
        UNTIL_FULL,
        "rmsnorm autocast !compile:on",
        steps="qkv up",
        read_by="norms",
    ),
    Row("norm statistics", "batch seq residual:1", 2, FP32, UNTIL_FULL, "rmsnorm", steps="norm1 norm2"),
    Row("block input", H, 1, COMPUTE, ALWAYS, "layernorm !autocast", steps="norm1"),
    Row("block input", H, 1, FP32, ALWAYS, "layernorm autocast", steps="norm1"),
    Row(
        "input of the second norm", H, 1, COMPUTE, UNTIL_FULL, "layernorm !parallel !autocast", steps="norm2"
    ),
    Row("input of the second norm", H, 1, FP32, UNTIL_FULL, "layernorm !parallel autocast", steps="norm2"),
    Row(
        "norm statistics",
        "batch seq residual:1",
        4,
        FP32,
        UNTIL_FULL,
        "layernorm !norms:shared",
        steps="norm1 norm2",
    ),
    Row(
        "norm outputs",
        H,
        2,
        COMPUTE,
        UNTIL_FULL,
        "!autocast !norms:output !norms:shared",
        steps="qkv up",
        read_by="qkv up",
    ),
    # Autocast casts the input of every product by itself.
    Row("first norm's output, cast", H, 1, COMPUTE, UNTIL_FULL, "autocast qkv_together", steps="qkv"),
    Row(
        "first norm's output, cast for q, k and v",
        H,
        3,
        COMPUTE,
        UNTIL_FULL,
        "autocast !qkv_together !compile:on",
        steps="qkv",
    ),
    Row("second norm's output, cast", H, 1, COMPUTE, UNTIL_FULL, "autocast !gated", steps="up"),
    Row(
        "second norm's output, cast for gate and up",
        H,
        2,
        COMPUTE,
        UNTIL_FULL,
        "autocast gated !compile:on",
        steps="up",
    ),
)
ATTENTION = (
    Row("query in fp32, for its norm", AD, 1, FP32, UNTIL_FULL, "qk_norm !compile:on", steps="core"),
    Row("key in fp32, for its norm", KD, 1, FP32, UNTIL_FULL, "qk_norm !compile:on", steps="core"),
    Row(
        "query before its norm, or normalised",
        AD,
        1,
        COMPUTE,
        UNTIL_FULL,
        QK,
        steps="core",
        read_by="norms",
    ),
    Row(
        "key before its norm, or normalised",
        KD,
        1,
        COMPUTE,
        UNTIL_FULL,
        QK,
        steps="core",
        read_by="norms",
    ),
    Row("statistics of the query's norm", A, 1, FP32, UNTIL_FULL, "qk_norm !norms_over_heads", steps="core"),
    Row("statistics of the key's norm", KV, 1, FP32, UNTIL_FULL, "qk_norm !norms_over_heads", steps="core"),
    Row("query", AD, 1, COMPUTE, UNTIL_FULL, "!fused_qkv", steps="core"),
    Row("key and value", KD, 2, COMPUTE, UNTIL_FULL, "!eager !fused_qkv !fp32 !masked", steps="core"),
    Row("key and value, repeated", CD, 2, COMPUTE, UNTIL_FULL, "eager !fused_qkv", steps="out core"),
    # The flash kernel knows no fp32; the one that does takes as many keys as queries.
    Row("key and value, repeated", AD, 2, COMPUTE, UNTIL_FULL, "fp32 !eager !fused_qkv", steps="core"),
    # Nor does it take a mask.
    Row("repeated key and value", AD, 2, COMPUTE, UNTIL_FULL, REPEATED, steps="core"),
    # One head for all is seen by each, not copied.
    Row("key and value", KD, 2, COMPUTE, UNTIL_FULL, "masked one_key !fp32 !eager !fused_qkv", steps="core"),
    Row("attention mask", "batch seq seq_k", 1, COMPUTE, UNTIL_FULL, "masked !eager", steps="core"),
    Row("fused query, key and value", AD, 3, COMPUTE, UNTIL_FULL, "fused_qkv", steps="core"),
    Row("rotated query and key", AD, 2, COMPUTE, UNTIL_FULL, "fused_qkv rotary !eager", steps="core"),
    Row(
        "attention output, merged",
        AD,
        1,
        COMPUTE,
        UNTIL_FULL,
        "fused_qkv rotary !eager !fp32",
        steps="core",
        read_by="out",
    ),
    Row("attention output", AD, 1, COMPUTE, UNTIL_FULL, "!eager", steps="core"),
    Row("attention output", AD, 1, COMPUTE, UNTIL_FULL, "eager", steps="out", read_by="out"),
    Row("gradient of the attention output", AD, 1, role=TRANSIENT, steps="out"),
    Row("gradient of the attention output", AD, 1, when="!eager", role=TRANSIENT, steps="core"),
    Row("gradients of query, key and value", AD, 3, when="!eager", role=TRANSIENT, steps="core"),
    # While the scores' gradients are there, of these only the value's.
    Row("gradient of the value", AD, 1, when="eager", role=TRANSIENT, steps="core"),
    Row("gradient of the query", AD, 1, role=TRANSIENT, steps="qkv"),
)
SCORES = (
    Row("log-sum-exp of the scores", A, 1, FP32, UNTIL_FULL, "!eager", steps="core"),
    Row("softmax in fp32", SS, 1, FP32, UNTIL_FULL, "eager !softmax_in_half !fp32", steps="core"),
    Row("softmax in fp32", SS, 1, FP32, UNTIL_FULL, "eager softmax_in_half autocast", steps="core"),
    # Freed before the softmax's own gradients arise, so with the step before.
    Row("attention probabilities", SS, 1, COMPUTE, UNTIL_FULL, "eager !softmax_in_half", steps="out"),
    Row("attention probabilities", SS, 1, COMPUTE, UNTIL_FULL, "eager softmax_in_half", steps="core"),
    Row(
        "probabilities before dropout",
        SS,
        1,
        COMPUTE,
        UNTIL_FULL,
        "eager softmax_in_half attention_dropout !autocast",
        steps="core",
    ),
    Row("attention dropout mask", SS, 1, BYTE, UNTIL_FULL, "eager attention_dropout", steps="core"),
    # Where dropout kept probabilities too, they are freed by then.
    Row("gradients of the scores", SS, 2, when=HALF_SOFTMAX, role=TRANSIENT, steps="core"),
    Row("gradient of the scores", SS, 1, when=HALF_DROPPED, role=TRANSIENT, steps="core"),
    Row(
        "gradients of the scores in fp32",
        SS,
        2,
        FP32,
        when="eager !softmax_in_half",
        role=TRANSIENT,
        steps="core",
    ),
)
MLP = (
    Row("first product's output", F, 1, COMPUTE, UNTIL_FULL, "!act:relu !act:gelu_new", steps="act"),
    Row("first product's output", F, 1, COMPUTE, UNTIL_FULL, "act:gelu_new !autocast", steps="act"),
    Row("second product's input", F, 1, COMPUTE, UNTIL_FULL, "!act:relu", steps="down", read_by="down"),
    Row("second product's input", F, 1, COMPUTE, UNTIL_FULL, "act:relu", steps="act"),
    Row("terms of the tanh approximation", F, 3, COMPUTE, UNTIL_FULL, "act:gelu_new !autocast", steps="act"),
    Row("terms of the tanh approximation", F, 3, FP32, UNTIL_FULL, "act:gelu_new autocast", steps="act"),
    Row("half the first product's output", F, 1, COMPUTE, UNTIL_FULL, "act:gelu_new autocast", steps="act"),
    Row("activated gate and up", F, 2, COMPUTE, UNTIL_FULL, "gated !compile:on", steps="act"),
    Row("up", F, 1, COMPUTE, UNTIL_FULL, "compile:on", steps="act"),
    Row("gradient of the second product's input", F, 2, role=TRANSIENT, steps="down act"),
    Row("gradients of activated gate and up", F, 2, when="gated !compile:on", role=TRANSIENT, steps="act"),
    Row("gradient of gate or up, the other in place", F, 1, when="compile:on", role=TRANSIENT, steps="act"),
    Row("gradient of the activation's input", F, 2, when="!gated", role=TRANSIENT, steps="act up"),
    Row(
        "gradient within the tanh approximation",
        F,
        1,
        when="act:gelu_new !autocast",
        role=TRANSIENT,
        steps="act",
    ),
    Row(
        "gradients within the tanh approximation",
        F,
        2,
        FP32,
        when="act:gelu_new autocast",
        role=TRANSIENT,
        steps="act",
    ),
    Row("gradient of gate or up", F, 1, when="gated", role=TRANSIENT, steps="up"),
)
CASTS = (
    # Autocast keeps the half-precision copies of the weights while the graph lives.
    Row("query weight, cast", QW, 1, COMPUTE, UNTIL_FULL, "autocast", steps="qkv"),
    Row("key and value weights, cast", KW, 2, COMPUTE, UNTIL_FULL, "autocast", steps="qkv"),
    Row("attention output weight, cast", QW, 1, COMPUTE, UNTIL_FULL, "autocast", steps="out"),
    Row("gate weight, cast", FW, 1, COMPUTE, UNTIL_FULL, "autocast gated", steps="up"),
    Row("up weight, cast", FW, 1, COMPUTE, UNTIL_FULL, "autocast", steps="up"),
    Row("down weight, cast", FW, 1, COMPUTE, UNTIL_FULL, "autocast", steps="down"),
)
WORK = (
    Row("dropout masks", H, 2, BYTE, UNTIL_FULL, "dropout", steps="out down"),
    Row("gradient of the block's output", H, 11, role=TRANSIENT, steps=ALL),
    # A tied head's gradient waits for the look-up's, which comes last.
    Row(
        "gradient of the tied head",
        "vocab hidden tied",
        11,
        GRADIENT,
        when="!gathers",
        role=TRANSIENT,
        steps=ALL,
    ),
    Row("gradients of the norm's output", H, 2, when="mlp:dense", role=TRANSIENT, steps="up"),
    Row("gradients of the norm's output", H, 2, role=TRANSIENT, steps="qkv"),
    Row(
        "temporaries of the norms' backward",
        H,
        10,
        FP32,
        when="rmsnorm !norms:output !compile:on",
        role=TRANSIENT,
        steps="norm2 norm1",
    ),
    Row("gradients of the norms' inputs", H, 4, when="layernorm", role=TRANSIENT, steps="norm2 norm1"),
    Row("gradients of the norms' inputs", H, 4, when="compile:on", role=TRANSIENT, steps="norm2 norm1"),
)

BLOCK = (
    *NORMS,
    *given("!latent", *ATTENTION),
    *SCORES,
    *given("mlp:dense", *MLP),
    *CASTS,
    *WORK,
    *hf_families.BLOCK,
    *given("latent", *hf_experts.LATENT),
    *given("mlp:experts", *hf_experts.EXPERTS, *hf_experts.EXPERTS_WORK),
)

EMBEDDING = (
    Row("token ids", "batch seq", 1, INT64),
    Row("dropout mask of the embedding", H, 1, BYTE, when="embedding_dropout", steps="norm"),
    Row("input of the embedding norm", H, 1, when="embedding_norm", steps="norm"),
    Row(
        "statistics of the embedding norm",
        "batch seq residual:1",
        2,
        FP32,
        when="embedding_norm",
        steps="norm",
    ),
    Row("gradient of the embedding's output", H, 1, role=TRANSIENT, steps="embedding"),
    Row("gradients of the tied weight", "vocab hidden tied", 2, GRADIENT, role=TRANSIENT, steps="embedding"),
)

HEAD = (
    Row("input of the final norm in fp32", H, 1, FP32, when="rmsnorm", steps="norm"),
    Row("normalised values", H, 1, when="rmsnorm !norms_in_fp32 !autocast", steps="norm", read_by="norms"),
    Row("normalised values", H, 1, FP32, when="rmsnorm autocast", steps="norm", read_by="norms"),
    Row("input of the final norm", H, 1, when="layernorm !autocast", steps="norm"),
    Row("input of the final norm", H, 1, FP32, when="layernorm autocast", steps="norm"),
    Row("final norm statistics", "batch seq residual:1", 1, FP32, when="rmsnorm", steps="norm"),
    Row("final norm statistics", "batch seq residual:1", 2, FP32, when="layernorm", steps="norm"),
    Row("head input (norm output)", H, 1, steps="head", read_by="head"),
    Row("head weight, cast", "vocab hidden", 1, when="autocast", steps="head"),
    Row("labels", "batch seq", 1, INT64),
    Row("log-probabilities", V, 1, FP32, when="!half_loss !loss:fused !loss:chunked", steps="loss"),
    Row("logits", V, 1, when="!loss:fused !loss:chunked", role=TRANSIENT, steps="logits"),
    Row(
        "logits in fp32",
        V,
        1,
        FP32,
        when="!half_loss !loss:fused !loss:chunked",
        role=TRANSIENT,
        steps="logits",
    ),
    Row(
        "gradients of the logits",
        V,
        2,
        FP32,
        when="!half_loss !loss:fused !loss:chunked",
        role=TRANSIENT,
        steps="loss",
    ),
    # A fused loss keeps the logits and writes their gradient; a chunked one makes an eighth of all at a time.
    Row("logits", V, 1, when="loss:fused", steps="loss"),
    Row("gradient of the logits", V, 1, when="loss:fused", role=TRANSIENT, steps="loss"),
    Row("logits of a chunk, in fp32", V, 3 / 8, FP32, when="loss:chunked", role=TRANSIENT, steps="loss"),
    Row("gradient of the logits, cast", V, 1, when="!loss:chunked", role=TRANSIENT, steps="head"),
    Row("gradient of the head's input", H, 2, role=TRANSIENT, steps="head norm"),
    Row("temporaries of the final norm's backward", H, 5, FP32, when="rmsnorm", role=TRANSIENT, steps="norm"),
    Row("gradient of the tied head", "vocab hidden tied", 2, GRADIENT, role=TRANSIENT, steps="head norm"),
)

HF = Stack(
    name="hf",
    version="transformers 5.23, one GPU or DDP",
    rows={
        "embedding": EMBEDDING + hf_families.EMBEDDING + traffic.EMBEDDING,
        "block": BLOCK
        + given("!compile:on", *traffic.EAGER)
        + given("traced", *traffic_families.BLOCK)
        + given("compile:on", *traffic.FUSED),
        "head": HEAD + hf_families.HEAD + traffic.HEAD,
    },
    recipes={
        # accelerate keeps fp32 weights under mixed precision; pure-bf16 is a model loaded in bf16.
        "bf16": Recipe(4, 4, 0, 4),
        "fp16": Recipe(4, 4, 0, 4, unit="fp16"),
        "fp32": Recipe(4, 4, 0, 4, compute=4, unit="fp32"),
        "tf32": Recipe(4, 4, 0, 4, compute=4, unit="tf32"),
        "pure-bf16": Recipe(2, 2, 0, 2),
        # What rounding lost of each weight is kept in bf16: optimi's kahan_sum, in place of a master copy.
        "bf16-kahan": Recipe(2, 2, 2, 2),
    },
    saving=Saving("transformers 5.23, trainer.py, save_model and _save_optimizer_and_scheduler"),
    autocast=("bf16", "fp16"),
    shardings={"ddp": False},
    sharding_notes={"ddp": "DistributedDataParallel"},
    schedules=("1f1b",),
    options={
        "attention": ("sdpa", "flash", "eager"),
        "loss": ("eager", "fused", "chunked"),
        "compile": ("off", "on"),
        # in_backward: register_post_accumulate_grad_hook, as torchtune's optimizer_in_bwd
        "optimizer_step": ("fused", "foreach", "in_backward"),
        "gradient_view": ("off", "on"),
    },
    launches=(48, 87),  # under autocast (tests/data/traced_traffic.json)
    bucket_fraction=1.0,  # DDP's buckets, gradient_as_bucket_view off as in torch's default
    tensor_parallel=False,
    eager_alibi=True,
    traced=hf_families.TRACED,
    family_launches=hf_families.LAUNCHES,
    policies=("none", "full"),
)
