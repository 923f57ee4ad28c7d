"""torchtitan: FSDP2 with fp32 shards, bf16 compute, op-level selective checkpointing.

Sums per Llama block, counted in torchtitan 0.3.0 under torch 2.13: without recompute
``sb[8h + 2(a+2k)d + 2ad + 8f] + 4sba + 4sbd + 8sb``; ``selective`` keeps the block's input and
the outputs of every second product and of attention; ``full`` keeps ``2sbh``.
"""

from __future__ import annotations

from planner.stacks.base import (
    ALWAYS,
    COMPUTE,
    FP32,
    INT64,
    NONE,
    UNTIL_FULL,
    Overhead,
    Recipe,
    Row,
    Stack,
)
from strategies.base import Role

BLOCK = (
    Row("block input", "batch seq residual", 1, COMPUTE, ALWAYS),
    Row("norm statistics", "batch seq residual:1", 2, FP32, NONE, "rmsnorm"),
    Row("norm statistics", "batch seq residual:1", 4, FP32, NONE, "layernorm"),
    # DTensor keeps a column-parallel product's input as gathered: whole, not cut by the sequence.
    Row("attention input (norm output)", "batch seq hidden", 1, COMPUTE, NONE),
    Row("query", "batch seq heads head_dim", 1, COMPUTE, UNTIL_FULL),
    Row("key and value", "batch seq kv_heads head_dim", 2, COMPUTE, UNTIL_FULL),
    Row("rotary angles", "batch seq head_dim", 1, FP32, NONE, "rotary"),
    Row("attention output", "batch seq heads head_dim", 1, COMPUTE, UNTIL_FULL),
    Row("log-sum-exp of the scores", "batch seq heads", 1, FP32, UNTIL_FULL),
    Row("input of the second norm", "batch seq residual", 1, COMPUTE, NONE),
    Row("MLP input (norm output)", "batch seq hidden", 1, COMPUTE, NONE),
    Row("gate (first product's output)", "batch seq ffn", 1, COMPUTE, UNTIL_FULL),
    Row("up", "batch seq ffn", 1, COMPUTE, NONE, "gated"),
    Row("activated gate", "batch seq ffn", 1, COMPUTE, NONE),
    Row("gated product", "batch seq ffn", 1, COMPUTE, NONE, "gated"),
    # Kept only because op-level selective checkpointing keeps every second product's output.
    Row("MLP output", "batch seq hidden", 1, COMPUTE, ("selective",)),
    Row("reduce-scattered outputs", "batch seq residual tensor_group", 2, COMPUTE, ("selective",)),
    Row("gradients within the MLP", "batch seq ffn", 2, role=Role.TRANSIENT),
    Row("gradient of the block's output", "batch seq residual", 1, role=Role.TRANSIENT),
)

EMBEDDING = (Row("token ids", "batch seq", 1, INT64),)

HEAD = (
    Row("input of the final norm", "batch seq residual", 1),
    Row("final norm statistics", "batch seq residual:1", 1, FP32),
    Row("head input (norm output)", "batch seq residual", 1),
    Row("log-probabilities", "batch seq vocab", 1, FP32),
    Row("gradients of the logits", "batch seq vocab", 2, FP32, role=Role.TRANSIENT),
    Row("copy in loss parallel", "batch seq vocab tensor_group", 1, FP32, role=Role.TRANSIENT),
)

TORCHTITAN = Stack(
    name="torchtitan",
    version="torchtitan 0.3.0, torch 2.13, eager",
    rows={"embedding": EMBEDDING, "block": BLOCK, "head": HEAD},
    recipes={"bf16": Recipe(4, 4, 0, 4), "fp32": Recipe(4, 4, 0, 4, compute=4, unit="tf32")},
    shardings={"ddp": True, "fsdp": True},
    sharding_notes={
        "ddp": "data_parallel_replicate_degree",
        "fsdp": "data_parallel_shard_degree, HSDP with data_parallel_replicate_degree",
    },
    schedules=("1f1b", "interleaved", "gpipe"),
    options={"attention": ("flash",)},
    rerun={"attention output weight": NONE, "up weight": NONE},
    reduce_bytes=4,
    families=("llama", "mistral", "qwen2"),
    separate_root=True,
    bucket_fraction=1.0,
    allocator=Overhead(
        "allocator: reserved over allocated",
        0.1,
        "assumed",
        "1.03-1.36 between torchtitan's reserved readings and what tensors need; under pressure "
        "the allocator returns cached blocks before it fails, so the lower part is taken",
    ),
)
