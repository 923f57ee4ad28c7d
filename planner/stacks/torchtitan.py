"""torchtitan: FSDP2 with fp32 shards, bf16 compute, op-level selective checkpointing.

Sums per Llama block, counted in torchtitan 0.3.0 under torch 2.13: without recompute
``sb[8h + 2(a+2k)d + 2ad + 8f] + 4sba + 4sbd + 8sb``; ``selective`` keeps the block's input and
the outputs of every second product and of attention; ``full`` keeps ``2sbh``. Compiled block by block
(inductor's min-cut partitioner, torch 2.13): ``sb[8h + 4ad + 4kd + 6f + 4a + 8]`` without recompute,
``sb[2h + 4ad + 2kd + 2f + 4a]`` under ``selective`` with three separate products.
"""

from __future__ import annotations

from dataclasses import replace

from planner.stacks import torchtitan_experts as mixtures
from planner.stacks import traffic
from planner.stacks.base import (
    ALWAYS,
    COMPUTE,
    FP32,
    INT64,
    NONE,
    UNTIL_FULL,
    Recipe,
    Row,
    Saving,
    Stack,
)
from planner.stacks.fsdp import OFFLOADING
from strategies.base import Role

H, W, A, AD, KD, F, V = (
    "batch seq residual",
    "batch seq hidden",
    "batch seq heads",
    "batch seq heads head_dim",
    "batch seq kv_heads head_dim",
    "batch seq ffn",
    "batch seq vocab",
)
TRANSIENT = Role.TRANSIENT
ALL = "down act up norm2 out core qkv norm1"
AUTOCAST = "mixed_precision:autocast"
ALTERNATE = "!query_rank !mlp:experts"  # elsewhere the last product is none of those that are kept

BLOCK = (
    Row("block input", H, 1, COMPUTE, ALWAYS, "!norm:eager", steps="norm1"),
    # Until 2025 the norm was written out: in fp32, its inputs and results kept, unless compiled.
    Row("block input", H, 1, COMPUTE, ("selective", "full"), "norm:eager", steps="norm1"),
    Row("norm inputs in fp32", H, 2, FP32, NONE, "norm:eager", steps="norm1 norm2"),
    Row("normalised values", H, 2, COMPUTE, NONE, "norm:eager", steps="qkv up"),
    Row("norm statistics", "batch seq residual:1", 2, FP32, NONE, "rmsnorm", steps="norm1 norm2"),
    Row("norm statistics", "batch seq residual:1", 4, FP32, NONE, "layernorm", steps="norm1 norm2"),
    # DTensor keeps a column-parallel product's input as gathered: whole, not cut by the sequence.
    Row("attention input (norm output)", W, 1, COMPUTE, NONE, steps="qkv"),
    Row("query before its norm", AD, 1, COMPUTE, NONE, "qk_norm", steps="core"),
    Row("key before its norm", KD, 1, COMPUTE, NONE, "qk_norm", steps="core"),
    Row("statistics of the query's norm", A, 1, FP32, NONE, "qk_norm", steps="core"),
    Row("statistics of the key's norm", "batch seq kv_heads", 1, FP32, NONE, "qk_norm", steps="core"),
    Row("query", AD, 1, COMPUTE, UNTIL_FULL, steps="core"),
    Row("value", KD, 1, COMPUTE, UNTIL_FULL, steps="core"),
    # Of three separate products, every second one is run again under selective checkpointing: the key's.
    Row("key", KD, 1, COMPUTE, UNTIL_FULL, "!qkv:separate", steps="core"),
    Row("key", KD, 1, COMPUTE, NONE, "qkv:separate", steps="core"),
    Row("rotary angles", "batch seq head_dim", 1, FP32, NONE, "rotary !compile:on !latent", steps="core"),
    # Its mixtures have cosines and sines, each as wide as a head.
    Row("rotary angles, the other half", "batch seq head_dim", 1, FP32, NONE, "qwen3_moe", steps="core"),
    Row("rotary angles, the other half", "batch seq head_dim", 1, FP32, NONE, "gpt_oss", steps="core"),
    Row("attention output", AD, 1, COMPUTE, UNTIL_FULL, steps="core"),
    Row("log-sum-exp of the scores", A, 1, FP32, UNTIL_FULL, steps="core"),
    Row("input of the second norm", H, 1, COMPUTE, NONE, "!norm:eager", steps="norm2"),
    Row("MLP input (norm output)", W, 1, COMPUTE, NONE, "!mlp:experts", steps="up"),
    Row("gate (first product's output)", F, 1, COMPUTE, UNTIL_FULL, steps="act"),
    Row("up", F, 1, COMPUTE, NONE, "gated", steps="act"),
    Row("activated gate", F, 1, COMPUTE, NONE, "!compile:on", steps="act"),
    Row("gated product", F, 1, COMPUTE, NONE, "gated", steps="down"),
    # Without FSDP fp32 weights run under autocast: the residual stream is fp32, casts of it and of the
    # weights are kept; compiled, one cast for all products of an input.
    Row("block input, fp32", H, 1, COMPUTE, ALWAYS, AUTOCAST, steps="norm1"),
    Row("input of the second norm, fp32", H, 1, COMPUTE, NONE, f"{AUTOCAST} !compile:on", steps="norm2"),
    Row(
        "further casts of the norms' outputs", H, 3, COMPUTE, NONE, f"{AUTOCAST} !compile:on", steps="qkv up"
    ),
    Row("query weight, cast", "hidden heads head_dim", 1, COMPUTE, UNTIL_FULL, AUTOCAST, steps="qkv"),
    Row(
        "key and value weights, cast",
        "hidden kv_heads head_dim",
        2,
        COMPUTE,
        UNTIL_FULL,
        AUTOCAST,
        steps="qkv",
    ),
    Row(
        "attention output weight, cast",
        "hidden heads head_dim",
        1,
        COMPUTE,
        UNTIL_FULL,
        AUTOCAST,
        steps="out",
    ),
    Row("gate and up weights, cast", "hidden ffn", 2, COMPUTE, UNTIL_FULL, AUTOCAST, steps="up"),
    Row("down weight, cast", "hidden ffn", 1, COMPUTE, UNTIL_FULL, AUTOCAST, steps="down"),
    # Kept only because op-level selective checkpointing keeps every second product's output.
    Row("MLP output", W, 1, COMPUTE, ("selective",), f"!compile:on {ALTERNATE}", steps="norm1"),
    Row("reduce-scattered outputs", f"{H} tensor_group", 2, COMPUTE, ("selective",), steps="norm1"),
    Row("gradient of the block's output", H, 8, role=TRANSIENT, steps=ALL),
    Row("gradient of the second product's input", F, 2, role=TRANSIENT, steps="down act"),
    Row("gradients of activated gate and up", F, 2, when="gated !compile:on", role=TRANSIENT, steps="act"),
    Row(
        "gradient of gate or up, the other in place",
        F,
        1,
        when="gated compile:on",
        role=TRANSIENT,
        steps="act",
    ),
    Row("gradient of the activation's input", F, 2, when="!gated", role=TRANSIENT, steps="act up"),
    Row("gradient of gate or up", F, 1, when="gated", role=TRANSIENT, steps="up"),
    Row("gradients of the norms' outputs", W, 4, role=TRANSIENT, steps="up qkv"),
    Row("gradients of the norms' inputs", H, 4, when="!norm:eager", role=TRANSIENT, steps="norm2 norm1"),
    Row(
        "temporaries of the norms' backward",
        H,
        10,
        FP32,
        when="norm:eager",
        role=TRANSIENT,
        steps="norm2 norm1",
    ),
    Row("gradient of the attention output", AD, 2, role=TRANSIENT, steps="out core"),
    Row("gradients of query, key and value", AD, 3, role=TRANSIENT, steps="core"),
    Row("gradient of the query", AD, 1, role=TRANSIENT, steps="qkv"),
    # torch's input-gradient pass keeps these besides the graph (distributed/pipelining/_backward.py):
    # of each product of weights, and of each norm, for the pass that makes the weights' gradients.
    Row("gradients of the query product", AD, 1, role=Role.OUTPUT_GRADIENT),
    Row("gradients of the key and value products", KD, 2, role=Role.OUTPUT_GRADIENT),
    Row("gradients of gate and up", F, 2, when="gated", role=Role.OUTPUT_GRADIENT),
    Row("gradient of up", F, 1, when="!gated", role=Role.OUTPUT_GRADIENT),
    Row("gradients of the attention output and down products", W, 2, role=Role.OUTPUT_GRADIENT),
    Row("gradients of the norms", H, 2, role=Role.OUTPUT_GRADIENT),
    # The table of rotary angles, a copy in every layer, of all positions.
    Row(
        "rotary table", "seq_k head_dim", 1, FP32, when="rotary !rotary_table:model !latent", role=Role.BUFFER
    ),
)

EMBEDDING = (
    Row("token ids", "batch seq", 1, INT64),
    Row("gradient of the embedding's output", H, 1, role=TRANSIENT, steps="embedding"),
    Row("gradients of the tied weight", "vocab hidden tied", 2, role=TRANSIENT, steps="embedding"),
)

# Norms are kernels of their own; the rotary embedding is a product of complex numbers in fp32.
TRAFFIC = traffic.always_rerun(
    *traffic.given("compile:on", *traffic.FUSED),
    *traffic.given(
        "!compile:on",
        traffic.row("norms", H, 10, "!norm:eager"),
        traffic.row("norms, written out", H, 2 * traffic.WRITTEN_OUT, "norm:eager"),
        traffic.row("norm of the queries", AD, 5, "qk_norm"),
        traffic.row("norm of the keys", KD, 5, "qk_norm"),
        *traffic.ADDITIONS,
        traffic.row("gradients of the first norm's output, added up", H, 6, "qkv:separate"),
        traffic.row("gradients of the second norm's output, added up", H, 3, "gated"),
        traffic.row("rotary embedding of queries", AD, 20, "rotary"),
        traffic.row("rotary embedding of keys", KD, 20, "rotary"),
        traffic.row("gated activation", F, 14, "gated"),
        traffic.row("activation", F, 5, "!gated"),
    ),
)

# Casts of a product's operands: read for the maximum, read again, written in a byte; of inputs and weights
# once forward and once backward, of outputs' gradients once (torchao, float8/float8_linear.py). All products
# of an input share a cast.
FP8_TRAFFIC = tuple(
    traffic.row(f"casts to fp8: {name}", dims, 2.5 * count, f"fp8 {when}".strip())
    for name, dims, count, when in (
        ("inputs of the block's two parts, gradients of their outputs", H, 6, ""),
        ("attention's output, the query's gradient", AD, 3, ""),
        ("gradients of key and value", KD, 2, ""),
        ("the MLP's inner input, the gradient of up", F, 3, ""),
        ("the gradient of the gate", F, 1, "gated"),
        ("query and output weights", "hidden heads head_dim", 4, ""),
        ("key and value weights", "hidden kv_heads head_dim", 4, ""),
        ("up and down weights", "hidden ffn", 4, ""),
        ("gate weight", "hidden ffn", 2, "gated"),
    )
)

EAGER = "!loss:compiled !loss:chunked !loss:eager-chunked"

HEAD = (
    Row("input of the final norm", H, 1, steps="norm"),
    Row("final norm statistics", "batch seq residual:1", 1, FP32, steps="norm"),
    Row("head input (norm output)", H, 1, steps="head"),
    Row("head weight, cast", "vocab hidden", 1, when=AUTOCAST, steps="head"),
    Row("log-probabilities", V, 1, FP32, when="!loss:compiled !loss:chunked", steps="loss"),
    # Until June 2024 the trainer held on to the logits while it ran backward.
    Row("logits in fp32", V, 1, FP32, when="loss:eager-kept", steps="loss"),
    Row("gradients of the logits", V, 2, FP32, when=EAGER, role=TRANSIENT, steps="loss"),
    Row("copy in loss parallel", f"{V} tensor_group", 1, FP32, when=EAGER, role=TRANSIENT, steps="loss"),
    # The cross entropy alone in eight chunks of the sequence: the logits stay whole.
    Row("logits", V, 1, when="loss:eager-chunked", steps="loss"),
    Row(
        "gradients of a chunk's logits",
        V,
        2 / 8,
        FP32,
        when="loss:eager-chunked",
        role=TRANSIENT,
        steps="loss",
    ),
    # Compiled, the loss reads the logits and writes their gradient, both in half precision.
    Row("logits", V, 1, when="loss:compiled", steps="loss"),
    Row("gradient of the logits", V, 1, when="loss:compiled", role=TRANSIENT, steps="loss"),
    # Head and loss together in chunks: nothing of the vocabulary's width is ever whole.
    Row("logits of a chunk, in fp32", V, 3 / 8, FP32, when="loss:chunked", role=TRANSIENT, steps="loss"),
    Row("gradient of the logits, cast", V, 1, when="!loss:chunked", role=TRANSIENT, steps="head"),
    Row("gradient of the head's input", H, 2, role=TRANSIENT, steps="head norm"),
    Row("gradient of the logits, kept", V, 1, when="!loss:chunked", role=Role.OUTPUT_GRADIENT),
    Row("gradient of the final norm", H, 1, role=Role.OUTPUT_GRADIENT),
)

# The one table for all layers was cut with the sequence.
STAGE = (Row("rotary table", "seq head_dim", 1, FP32, when="rotary rotary_table:model", role=Role.BUFFER),)

TORCHTITAN = Stack(
    name="torchtitan",
    version="torchtitan 0.3.0, torch 2.13, eager",
    rows={
        "embedding": EMBEDDING + traffic.EMBEDDING,
        "block": mixtures.apart(*BLOCK, *TRAFFIC, *FP8_TRAFFIC) + mixtures.ROWS,
        "head": HEAD + traffic.HEAD,
        "stage": STAGE,
    },
    recipes={
        "bf16": Recipe(4, 4, 0, 4),
        "fp32": Recipe(4, 4, 0, 4, compute=4, unit="fp32"),
        "tf32": Recipe(4, 4, 0, 4, compute=4, unit="tf32"),
        # torchao casts the operands of each product and saves them as they were (float8/float8_linear.py,
        # prototype/mx_formats/mx_linear.py); the head is left out (filter_fqns=["output"]).
        **dict.fromkeys(
            ("fp8-tensorwise", "fp8-rowwise", "mxfp8"), Recipe(4, 4, 0, 4, unit="fp8", rest="bf16")
        ),
        "pure-bf16": Recipe(
            2, 2, 0, 2
        ),  # --training.dtype=bfloat16; gradients are reduced in fp32 all the same
    },
    saving=Saving("torchtitan 0.3.0, components/checkpointer/dcp.py: model and optimizer"),
    gradients_as_weights=True,
    shardings={"fsdp": True},
    sharding_notes={
        "fsdp": "data_parallel_shard_degree, HSDP with data_parallel_replicate_degree",
    },
    offloading={"fsdp": replace(OFFLOADING, whole={"optimizer,parameters": "training.enable_cpu_offload"})},
    schedules=("1f1b", "interleaved", "gpipe", "zb-v"),
    # distributed/parallel_dims.py: a mesh of pp, dp_replicate, dp_shard, tp, outermost first.
    rank_orders={"tp-dp-pp": ""},
    # pipelining refuses to split the backward of a compiled stage (_check_torch_compile_compatibility).
    variants={
        "compile:on": {
            "schedules": ("1f1b", "interleaved", "gpipe"),
            "version": "torchtitan 0.3.0, torch 2.13, compiled",
        }
    },
    # A checkpointed block is run again for each of its products' weight gradients (torch 2.13).
    split_policies=("none",),
    # torch.distributed.tensor.experimental: all-gathers keys and values unless told otherwise, and sends
    # their gradients round in fp32.
    context_comms={
        "all-gather": "context_parallel_rotate_method=allgather, the only one from 0.3 on",
        "ring": "context_parallel_rotate_method=alltoall, before 0.3",
    },
    context_attention=("flash",),
    rotated_bytes=4.0,
    expert_parallel=True,
    tensor_cuts_experts=True,  # models/common/moe_sharding.py
    options={
        "attention": ("flash",),
        "loss": ("eager", "eager-kept", "eager-chunked", "compiled", "chunked"),
        "qkv": ("fused", "separate"),
        "norm": ("fused", "eager"),
        "root": ("split", "one"),
        "compile": ("off", "on"),
        "mixed_precision": ("fsdp", "autocast"),
        "reduce_dtype": ("fp32", "bf16"),
        "optimizer_step": ("fused", "foreach"),
        "async_tp": ("off", "on"),
        "rotary_table": ("layers", "model"),  # a copy in every layer; until 2025 one for all
        "router": ("fp32", "half"),  # of a mixture; half until March 2026
        "all_to_all": ("kept", "rerun"),  # by selective checkpointing; run again until September 2025
    },
    alone={"mixed_precision": "autocast"},
    block_policies=("selective", "full"),
    rerun={"attention output weight": NONE, "up weight": NONE, **mixtures.RERUN},
    casts_weights=True,
    receives_ahead=True,
    families=("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"),
    concerns={"router": "experts", "all_to_all": "experts"},
    parts=dict.fromkeys(
        ("experts", "latent", "attention_sinks"), ("compile:on", "fp8", AUTOCAST, "norm:eager")
    ),
    separate_root=True,
    keeps_last=True,
)
