"""DeepSpeed: its ZeRO engine, under Hugging Face's modules or Megatron-DeepSpeed's kernels.

The model runs in half precision throughout. An fp16 or bf16 engine keeps half-precision weights and
gradients and cuts, from stage 1 on, everything that is fp32: master weights, both moments and, in the
optimizer step, a copy of the gradients. The copy is one piece, which fits in nothing that the passes leave
free: PyTorch's allocator merges blocks only within what one call gave it, and for more than 10 MiB it asks
for just so much (c10/cuda/CUDACachingAllocator.cpp). bf16 with fp32 accumulation (``--gradient-dtype fp32``,
runtime/bf16_optimizer.py) keeps fp32 gradients besides the half-precision ones, whole. When buckets and
copies exist was traced in DeepSpeed 0.19.8's engine (tests/data/traced_engines.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from planner.stacks.base import ALLOCATOR, FP32, Offloading, Overhead, Recipe, Row, Saving, Stack
from planner.stacks.hf import HF
from planner.stacks.megatron import MEGATRON
from strategies.offload import Staging

# Megatron-DeepSpeed casts the logits to fp32 before the loss and its engine holds on to them.
KEPT_LOGITS = (Row("logits in fp32", "batch seq vocab", 1, FP32, when="!loss:fused", steps="loss"),)


def _takes(shardings: Mapping[str, bool], recipe: Recipe) -> Mapping[str, bool]:
    """What the engine takes a recipe under (runtime/engine.py: _do_optimizer_sanity_check).

    fp32 gradients beside bf16 weights need ZeRO; so, here, does fp32 throughout, which keeps a master copy
    under ZeRO-1 and 2, none without ZeRO, and another one under ZeRO-3. Without ZeRO a pipeline in bf16
    gets an optimizer that shares states out.
    """
    if recipe.compute == 4 or recipe.gradient > 4:
        return {name: pipelined for name, pipelined in shardings.items() if name in ("zero1", "zero2")}
    return {**shardings, "ddp": shardings["ddp"] and recipe.unit != "bf16"}


# runtime/zero/stage_1_and_2.py and stage3.py: fp32 weights, gradients and moments of the own part are on the
# host, half-precision gradients too where stage 2 accumulates micro-batches, and always in stage 3
# (grad_partitions_flat_buffer). Stage 2 has a buffer of the largest weight on the GPU, casts a weight's
# gradient to fp32 there, and brings the whole fp32 part back before it casts it.
OFFLOADING = {
    "zero2": Offloading(
        whole={"optimizer": "offload_optimizer with device cpu"},
        takes_gradients=True,
        halves=2.0,
        accumulated=True,
        staging=Staging(kept=2, moving=4, updated=4),
        returned=4.0,
    ),
    "zero3": Offloading(
        whole={
            "optimizer": "offload_optimizer with device cpu",
            "optimizer,parameters": "offload_optimizer and offload_param with device cpu",
            "optimizer:nvme": "offload_optimizer with device nvme",
            "optimizer:nvme,parameters": "offload_optimizer with device nvme, offload_param with device cpu",
            "optimizer:nvme,parameters:nvme": "offload_optimizer and offload_param with device nvme",
        },
        takes_gradients=True,
        halves=2.0,
        staging=Staging(moving=6),
        returned=2.0,
    ),
}
# runtime/activation_checkpointing: what layers keep under it goes to the host and back by blocking copies.
CHECKPOINTS = {"activations": "cpu_checkpointing"}
ENGINE_CHECKPOINTS = {
    name: replace(OFFLOADING.get(name, Offloading()), layers=CHECKPOINTS, checkpoints=True)
    for name in ("ddp", "zero1", "zero2", "zero3")
}

DEEPSPEED = Stack(
    name="deepspeed",
    version="DeepSpeed 0.19 engine",
    rows=HF.rows,
    variants={
        "kernels:megatron": {
            "rows": {**MEGATRON.rows, "head": MEGATRON.rows["head"] + KEPT_LOGITS},
            "rerun": MEGATRON.rerun,
            "traced": MEGATRON.traced,
            "family_launches": MEGATRON.family_launches,
            "launches": MEGATRON.launches,
            "policies": MEGATRON.policies,
            "vocabulary_multiple": MEGATRON.vocabulary_multiple,
            "shardings": {"zero1": True, "zero2": False, "zero3": False, "ddp": True},
            "tensor_parallel": True,
            "context_comms": {},
            "offloading": ENGINE_CHECKPOINTS,
            "options": {
                "kernels": ("hf", "megatron"),
                "attention": ("flash", "eager"),
                "loss": ("parallel", "fused"),
                "swiglu": ("unfused", "fused"),
                "optimizer_step": ("fused", "foreach"),
                "overlap": ("off", "on"),
                "launch_blocking": ("off", "on"),  # CUDA_LAUNCH_BLOCKING=1
                "offload_copy": ("whole", "tiled"),
            },
        }
    },
    recipes={
        "bf16": Recipe(2, 2, 4, 4),
        "fp16": Recipe(2, 2, 4, 4, unit="fp16"),
        "fp32": Recipe(4, 4, 4, 4, compute=4, unit="fp32"),
        "tf32": Recipe(4, 4, 4, 4, compute=4, unit="tf32"),
    },
    shardings={"zero1": False, "zero2": False, "zero3": False, "ddp": False},
    sharding_notes={
        "zero1": "zero_optimization stage 1",
        "zero2": "zero_optimization stage 2",
        "zero3": "zero_optimization stage 3",
        "ddp": "zero_optimization stage 0",
    },
    schedules=("1f1b",),
    # runtime/pipe/topology.py: PipeModelDataParallelTopology has the axes pipe, data, model.
    rank_orders={"tp-dp-pp": ""},
    options={
        "kernels": ("hf", "megatron"),
        "attention": ("sdpa", "flash", "eager"),
        "loss": ("eager", "fused", "chunked"),
        "optimizer_step": ("fused", "foreach"),
        "overlap": ("on", "off"),  # overlap_comm
        "offload_copy": ("whole", "tiled"),  # tiled: weights return as CPU-Adam goes (Ren et al. 2021, 5.1)
    },
    offloading=OFFLOADING,
    # runtime/sequence_parallel/ulysses_sp.py, of Hugging Face's modules.
    context_comms={"ulysses": "sequence_parallel_size, as in UlyssesSPAttentionHF"},
    context_attention=("sdpa", "flash"),
    expert_parallel=True,
    launches=(38, 71),
    tensor_parallel=False,
    policies=("none", "full"),
    gradient_copies=True,
    flat_copies=True,
    both_gradients=True,
    takes=_takes,
    sizes={
        "reduce_bucket_size": 5e8,
        "stage3_max_live_parameters": 1e9,
        "stage3_prefetch_bucket_size": 5e7,
        "sub_group_size": 1e9,
    },
    # Of parameters that ZeRO-3 has cut the model's state is empty.
    saving=Saving(
        "DeepSpeed 0.19, runtime/engine.py, _save_checkpoint and _save_zero_checkpoint",
        without_weights=("zero3",),
    ),
    eager_alibi=True,
    traced=HF.traced,
    family_launches=HF.family_launches,
    allocator=Overhead(
        ALLOCATOR.name,
        0.16,
        0.0,
        0.46,
        "measured",
        "the usual: median of 53 nvidia-smi readings of BLOOM's fp16 runs with Megatron-DeepSpeed (17 with "
        "fp32 gradients, not looked at for it: 0.15); the most: 19 in 20 of all 90 readings lie within",
        fraction=True,
    ),
)
