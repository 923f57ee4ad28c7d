"""Plain PyTorch: Hugging Face models under FSDP2 (``fully_shard``) and its mixed precision.

The modules are those of :mod:`planner.stacks.hf`, run in half precision throughout: FSDP2 casts the
weights when it gathers them, so nothing runs under autocast. Every block is a unit, embedding, final
norm and head are the root's; with ``root=split``, as accelerate wraps them, units of their own.
"""

from __future__ import annotations

from planner.stacks.base import Recipe, Stack
from planner.stacks.hf import HF

FSDP = Stack(
    name="fsdp",
    version="torch 2.13 fully_shard, transformers 5.23 modules",
    rows=HF.rows,
    recipes={
        "bf16": Recipe(4, 4, 0, 4),
        "fp16": Recipe(4, 4, 0, 4, unit="fp16"),
        "fp32": Recipe(4, 4, 0, 4, compute=4, unit="tf32"),
        "pure-bf16": Recipe(2, 2, 0, 2),
    },
    variants={"mixed_precision:autocast": {"autocast": ("bf16", "fp16"), "casts_weights": False}},
    shardings={"fsdp": False},
    sharding_notes={"fsdp": "fully_shard, HSDP with a device mesh of two dimensions"},
    schedules=("1f1b",),
    options={
        "attention": ("sdpa", "flash", "flash1", "eager"),
        "loss": ("eager", "fused", "chunked"),
        "root": ("one", "split"),  # split: embedding, and norm and head, units of their own (accelerate)
        "compile": ("off", "on"),
        "mixed_precision": ("fsdp", "autocast"),
        "version": ("2", "1"),  # fully_shard, or FullyShardedDataParallel
        "reduce_dtype": ("fp32", "bf16"),
        "optimizer_step": ("fused", "foreach"),
    },
    casts_weights=True,
    reduces_as_weights=True,
    launches=(38, 71),
    separate_root=True,
    tensor_parallel=False,
    eager_alibi=True,
    traced=HF.traced,
    family_launches=HF.family_launches,
    policies=("none", "full"),
)
