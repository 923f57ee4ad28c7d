"""Hugging Face transformers: eager modules, one process per GPU, no pipeline.

Sums per block, counted in transformers 5.23.0 under torch 2.13, bf16, SDPA with its flash kernel:
Llama ``sb[16h + 2(a+2k)d + 2ad + 8f] + 4sba + 8sb`` (each RMSNorm keeps an fp32 copy, the
normalised values and its output); GPT-2 ``sb[18h + 10f] + 4sba + 16sb`` with dropout.
"""

from __future__ import annotations

from planner.stacks.base import (
    ALWAYS,
    BYTE,
    COMPUTE,
    FP32,
    INT64,
    UNTIL_FULL,
    Overhead,
    Recipe,
    Row,
    Stack,
)
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

BLOCK = (
    Row("block input", H, 1, COMPUTE, ("full",), "rmsnorm"),
    Row("norm inputs up-cast to fp32", H, 2, FP32, UNTIL_FULL, "rmsnorm"),
    Row("normalised values", H, 2, COMPUTE, UNTIL_FULL, "rmsnorm"),
    Row("norm statistics", "batch seq residual:1", 2, FP32, UNTIL_FULL, "rmsnorm"),
    Row("block input", H, 1, COMPUTE, ALWAYS, "layernorm"),
    Row("input of the second norm", H, 1, COMPUTE, UNTIL_FULL, "layernorm !parallel"),
    Row("norm statistics", "batch seq residual:1", 4, FP32, UNTIL_FULL, "layernorm"),
    Row("norm outputs", H, 2, COMPUTE, UNTIL_FULL),
    Row("query", AD, 1, COMPUTE, UNTIL_FULL, "!fused_qkv"),
    Row("key and value", KD, 2, COMPUTE, UNTIL_FULL, "!eager !fused_qkv"),
    Row("key and value, repeated", AD, 2, COMPUTE, UNTIL_FULL, "eager !fused_qkv"),
    Row("fused query, key and value", AD, 3, COMPUTE, UNTIL_FULL, "fused_qkv"),
    Row("rotated query and key", AD, 2, COMPUTE, UNTIL_FULL, "fused_qkv rotary !eager"),
    Row("attention output, merged", AD, 1, COMPUTE, UNTIL_FULL, "fused_qkv rotary !eager"),
    Row("attention output", AD, 1, COMPUTE, UNTIL_FULL),
    Row("log-sum-exp of the scores", A, 1, FP32, UNTIL_FULL, "!eager"),
    Row("softmax in fp32", SS, 1, FP32, UNTIL_FULL, "eager !gpt2"),
    Row("attention probabilities", SS, 1, COMPUTE, UNTIL_FULL, "eager"),
    Row("probabilities before dropout", SS, 1, COMPUTE, UNTIL_FULL, "eager gpt2 dropout"),
    Row("attention dropout mask", SS, 1, BYTE, UNTIL_FULL, "eager attention_dropout"),
    Row("dropout masks", H, 2, BYTE, UNTIL_FULL, "dropout"),
    Row("first product's output", F, 1, COMPUTE, UNTIL_FULL, "!act:relu"),
    Row("second product's input", F, 1, COMPUTE, UNTIL_FULL),
    Row("terms of the tanh approximation", F, 3, COMPUTE, UNTIL_FULL, "act:gelu_new"),
    Row("activated gate and up", F, 2, COMPUTE, UNTIL_FULL, "gated"),
    Row("gradients within the MLP", F, 2, role=Role.TRANSIENT),
    Row("gradient of the block's output", H, 1, role=Role.TRANSIENT),
    Row("gradient of the scores", SS, 1, when="eager", role=Role.TRANSIENT),
)

EMBEDDING = (
    Row("token ids", "batch seq", 1, INT64),
    Row("dropout mask of the embedding", H, 1, BYTE, when="embedding_dropout"),
    Row("input of the embedding norm", H, 1, when="embedding_norm"),
    Row("statistics of the embedding norm", "batch seq residual:1", 2, FP32, when="embedding_norm"),
)

HEAD = (
    Row("input of the final norm, up-cast", H, 1, FP32, when="rmsnorm"),
    Row("normalised values", H, 1, when="rmsnorm"),
    Row("input of the final norm", H, 1, when="layernorm"),
    Row("final norm statistics", "batch seq residual:1", 1, FP32, when="rmsnorm"),
    Row("final norm statistics", "batch seq residual:1", 2, FP32, when="layernorm"),
    Row("head input (norm output)", H, 1),
    Row("labels", "batch seq", 1, INT64),
    Row("log-probabilities", "batch seq vocab", 1, FP32),
    Row("gradients of the logits", "batch seq vocab", 2, FP32, role=Role.TRANSIENT),
)

HF = Stack(
    name="hf",
    version="transformers 5.23, accelerate with DDP or FSDP2",
    rows={"embedding": EMBEDDING, "block": BLOCK, "head": HEAD},
    recipes={
        # accelerate keeps fp32 weights under mixed precision; pure-bf16 is a model loaded in bf16.
        "bf16": Recipe(4, 4, 0, 4),
        "fp16": Recipe(4, 4, 0, 4, unit="fp16"),
        "fp32": Recipe(4, 4, 0, 4, compute=4, unit="tf32"),
        "pure-bf16": Recipe(2, 2, 0, 2),
    },
    notes={
        "bf16": "activations as under FSDP2's mixed precision; plain autocast keeps fp32 copies more",
        "fp16": "activations as under FSDP2's mixed precision; plain autocast keeps fp32 copies more",
    },
    shardings={"ddp": False, "fsdp": False},
    sharding_notes={"fsdp": "accelerate fsdp_version 2, HSDP with a device mesh of two dimensions"},
    schedules=("1f1b",),
    options={"attention": ("sdpa", "flash", "eager")},
    bucket_fraction=1.0,  # DDP's buckets, gradient_as_bucket_view off as in torch's default
    tensor_parallel=False,
    policies=("none", "full"),
    allocator=Overhead(
        "allocator: reserved over allocated",
        0.1,
        "assumed",
        "1.03-1.36 between reserved readings and what tensors need in eager PyTorch; under "
        "pressure cached blocks are returned before an allocation fails",
    ),
)
