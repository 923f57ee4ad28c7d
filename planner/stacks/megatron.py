"""Megatron-LM / megatron-core: contiguous gradient buffers, fused kernels, flash attention.

Sums: a GPT block in half precision with dropout keeps ``sbh(34 + 5as/h)`` (Korthikanti et al.
2022, arXiv:2205.05198, equation 1) plus 16 sb of norm statistics; a LLaMA block with flash
attention keeps ``sbh(12 + 4k/a + 6f/h)`` plus log-sum-exp and statistics.
"""

from __future__ import annotations

from planner.stacks.base import (
    ALWAYS,
    BYTE,
    COMPUTE,
    FP32,
    INT64,
    NONE,
    UNTIL_FULL,
    Recipe,
    Row,
    Stack,
)
from strategies.base import Role

BLOCK = (
    Row("block input", "batch seq residual", 1, COMPUTE, ALWAYS),
    Row("norm statistics", "batch seq residual:1", 2, FP32, UNTIL_FULL, "rmsnorm"),
    Row("norm statistics", "batch seq residual:1", 4, FP32, UNTIL_FULL, "layernorm"),
    Row("attention input (norm output)", "batch seq residual", 1, COMPUTE, UNTIL_FULL),
    Row("query", "batch seq heads head_dim", 1, COMPUTE, UNTIL_FULL),
    Row("key and value", "batch seq kv_heads head_dim", 2, COMPUTE, UNTIL_FULL),
    # Without Transformer Engine's fused rotary embedding both versions of q and k are kept.
    Row("rotated query", "batch seq heads head_dim", 1, COMPUTE, UNTIL_FULL, "rotary eager"),
    Row("rotated key", "batch seq kv_heads head_dim", 1, COMPUTE, UNTIL_FULL, "rotary eager"),
    Row("rotary angles", "seq head_dim", 2, FP32, UNTIL_FULL, "rotary eager"),
    Row("attention probabilities", "batch heads seq seq_k", 1, COMPUTE, NONE, "eager"),
    Row("attention dropout mask", "batch heads seq seq_k", 1, BYTE, NONE, "eager attention_dropout"),
    Row("attention after dropout", "batch heads seq seq_k", 1, COMPUTE, NONE, "eager attention_dropout"),
    Row("log-sum-exp of the scores", "batch seq heads", 1, FP32, NONE, "!eager"),
    Row("attention output", "batch seq heads head_dim", 1, COMPUTE, UNTIL_FULL),
    Row("dropout mask after attention", "batch seq residual", 1, BYTE, UNTIL_FULL, "dropout"),
    Row("input of the second norm", "batch seq residual", 1, COMPUTE, UNTIL_FULL, "!parallel"),
    Row("MLP input (norm output)", "batch seq residual", 1, COMPUTE, UNTIL_FULL),
    Row("activation's input", "batch seq ffn", 1, COMPUTE, UNTIL_FULL, "!gated"),
    Row("second product's input", "batch seq ffn", 1, COMPUTE, UNTIL_FULL, "!gated"),
    Row("gate and up", "batch seq ffn", 2, COMPUTE, UNTIL_FULL, "gated"),
    Row("activated gate", "batch seq ffn", 1, COMPUTE, UNTIL_FULL, "gated swiglu:unfused"),
    Row("gated product", "batch seq ffn", 1, COMPUTE, UNTIL_FULL, "gated !swiglu:recomputed"),
    Row("dropout mask after MLP", "batch seq residual", 1, BYTE, UNTIL_FULL, "dropout"),
    # Backward of the MLP: gradients of the product and of what it was made from.
    Row("gradients within the MLP", "batch seq ffn", 2, role=Role.TRANSIENT),
    Row("gradient of the block's output", "batch seq residual", 1, role=Role.TRANSIENT),
    Row("gradient of the scores", "batch heads seq seq_k", 1, when="eager", role=Role.TRANSIENT),
)

EMBEDDING = (
    Row("token ids", "batch seq", 1, INT64),
    Row("dropout mask of the embedding", "batch seq residual", 1, BYTE, when="dropout"),
    Row("input of the embedding norm", "batch seq residual", 1, when="embedding_norm"),
)

HEAD = (
    Row("input of the final norm", "batch seq residual", 1),
    Row("final norm statistics", "batch seq residual:1", 1, FP32, when="rmsnorm"),
    Row("final norm statistics", "batch seq residual:1", 2, FP32, when="layernorm"),
    Row("head input (norm output)", "batch seq residual", 1),
    # Vocabulary-parallel cross entropy keeps the probabilities, in fp32.
    Row("probabilities of the loss", "batch seq vocab", 1, FP32),
    Row("logits", "batch seq vocab", 1, role=Role.TRANSIENT),
)

MEGATRON = Stack(
    name="megatron",
    version="Megatron-LM core 0.16, Transformer Engine kernels",
    rows={"embedding": EMBEDDING, "block": BLOCK, "head": HEAD},
    recipes={
        "bf16": Recipe(2, 4, 4, 4),
        "fp16": Recipe(2, 4, 4, 4, unit="fp16"),
        "fp32": Recipe(4, 4, 0, 4, compute=4, unit="tf32"),
    },
    shardings={"ddp": True, "zero1": True, "zero2": False, "fsdp": False},
    sharding_notes={
        "zero1": "--use-distributed-optimizer",
        # Pipelines pass Megatron-FSDP's argument checks but are neither documented nor tested.
        "zero2": "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads",
        "fsdp": "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params",
    },
    schedules=("1f1b", "interleaved"),
    options={"attention": ("flash", "eager"), "swiglu": ("fused", "unfused", "recomputed")},
    rerun={"attention core": NONE},
    vocabulary_multiple=128,
    gradients_resident=True,
    gradient_copies=True,
    hidden_transfers="--overlap-grad-reduce --overlap-param-gather",
)
