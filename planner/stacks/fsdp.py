"""Plain PyTorch: Hugging Face models under FSDP2 (``fully_shard``) and its mixed precision.

The modules are those of :mod:`planner.stacks.hf`, run in half precision throughout: FSDP2 casts the
weights when it gathers them, so nothing runs under autocast. Every block is a unit, embedding, final
norm and head are the root's; with ``root=split``, as accelerate wraps them, units of their own.
"""

from __future__ import annotations

from planner.stacks.base import Offloading, Recipe, Saving, Stack
from planner.stacks.hf import HF
from strategies.offload import Staging

OFFLOADING = Offloading(
    whole={"optimizer,parameters": "CPUOffloadPolicy"},
    takes_gradients=True,
    gradients=None,
    staging=Staging(moving=4, units=True, fetched=True),
)
"""torch/distributed/fsdp/_fully_shard: shards, their gradients and all states are on the host; a unit's shard
is copied to the GPU before it is gathered, its reduced gradients to the host behind the next unit's backward;
the optimizer runs on the CPU."""

FSDP = Stack(
    recomputes="each",
    name="fsdp",
    version="torch 2.13 fully_shard, transformers 5.23 modules",
    rows=HF.rows,
    recipes={
        "bf16": Recipe(4, 4, 0, 4),
        "fp16": Recipe(4, 4, 0, 4, unit="fp16"),
        "fp32": Recipe(4, 4, 0, 4, compute=4, unit="fp32"),
        "tf32": Recipe(4, 4, 0, 4, compute=4, unit="tf32"),
        "pure-bf16": Recipe(2, 2, 0, 2),
        "bf16-kahan": Recipe(2, 2, 2, 2),
    },
    variants={
        "mixed_precision:autocast": {"autocast": ("bf16", "fp16"), "casts_weights": False},
        "version:1": {"context_comms": {}},
    },
    # accelerate's ParallelismConfig(cp_size=...), on torch's context parallelism of its own attention.
    context_comms={"all-gather": "cp_comm_strategy=allgather", "ring": "cp_comm_strategy=alltoall"},
    context_attention=("sdpa",),
    rotated_bytes=4.0,
    saving=Saving("torch 2.13, distributed/checkpoint/state_dict.py, get_state_dict"),
    gradients_as_weights=True,
    shardings={"fsdp": False},
    sharding_notes={"fsdp": "fully_shard, HSDP with a device mesh of two dimensions"},
    offloading={"fsdp": OFFLOADING},
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
