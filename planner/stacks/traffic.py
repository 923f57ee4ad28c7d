"""Bytes that memory-bound kernels move: rows of elements read and written, forward and backward.

Each kernel reads its inputs and writes its outputs once. ``FUSED`` kernels are hand-written or compiled:
a whole norm, rotary embedding or activation at a time. ``EAGER`` ones are PyTorch's, an operation at a
time, as counted in transformers' modules on fake tensors (tests/data/traced_traffic.json).
"""

from __future__ import annotations

from dataclasses import replace

from planner.stacks.base import COMPUTE, FP32, NONE, UNTIL_FULL, Row
from strategies.base import Role

H, AD, KD, F, V, SS = (
    "batch seq residual",
    "batch seq heads head_dim",
    "batch seq kv_heads head_dim",
    "batch seq ffn",
    "batch seq vocab",
    "batch heads seq seq_k",
)
QW, KW, FW = "hidden heads head_dim", "hidden kv_heads head_dim", "hidden ffn"


def row(name: str, dims: str, count: float, when: str = "", dtype: str = COMPUTE) -> Row:
    """A row of traffic: ``count`` elements moved for each element of ``dims``."""
    return Row(name, dims, count, dtype, UNTIL_FULL, when, Role.TRAFFIC)


def given(word: str, *rows: Row) -> tuple[Row, ...]:
    """The rows under one more condition."""
    return tuple(replace(one, when=f"{one.when} {word}".strip()) for one in rows)


def always_rerun(*rows: Row) -> tuple[Row, ...]:
    """The rows where every recompute policy runs what is not a product again."""
    return tuple(replace(one, kept_by=NONE) for one in rows)


# The scores of unfused attention: scale, mask and softmax in one kernel, dropout in another.
SCORES = (
    row("softmax of the scores", SS, 5, "eager"),
    row("dropout of the scores", SS, 4, "eager attention_dropout"),
)
ADDITIONS = (row("residual additions", H, 12), row("dropout", H, 8, "dropout"))  # two in, one out
# A norm: x in, y out; backward x and dy in, dx out.
FUSED = (
    row("norms", H, 10),
    *ADDITIONS,
    row("rotary embedding of queries", AD, 4, "rotary"),
    row("rotary embedding of keys", KD, 4, "rotary"),
    row("gated activation", F, 8, "gated !swiglu:unfused"),
    row("gated activation, unfused", F, 13, "gated swiglu:unfused"),
    row("activation", F, 5, "!gated"),
    *SCORES,
)
# The norm as transformers writes it: to fp32, square, mean, root, two products, and back.
WRITTEN_OUT = 66
EAGER = (
    row("norms", H, 10, "layernorm"),
    row("norms, written out", H, 2 * WRITTEN_OUT, "rmsnorm"),
    row("norm of the queries, written out", AD, WRITTEN_OUT, "qk_norm"),
    row("norm of the keys, written out", KD, WRITTEN_OUT, "qk_norm"),
    *ADDITIONS,
    # Products of one input that run apart: the gradients of the input are added up.
    row("gradients of the norms' outputs, added up", H, 9, "gated"),
    row("rotary embedding of queries", AD, 26, "rotary !latent"),
    row("rotary embedding of keys", KD, 26, "rotary !latent"),
    row("gated activation", F, 14, "gated !mlp:experts"),
    row("activation", F, 5, "!gated !act:gelu_new !mlp:experts"),
    row("activation, the tanh approximation written out", F, 45, "act:gelu_new"),
    row("gradients of the biases", H, 2, "biases"),
    row("gradients of the query, key and value biases", AD, 3, "biases"),
    row("gradient of the up bias", F, 1, "biases"),
    row("gradients of query, key and value, put together", AD, 6, "fused_qkv"),
    *SCORES,
    # Under autocast the residual stream is fp32, and weights and their gradients are cast.
    row("fp32 residual stream, and casts of it", H, 89, "autocast"),
    row("tanh approximation, in fp32", F, 38, "autocast act:gelu_new"),
    row("casts of query and output weights", QW, 12, "autocast"),
    row("casts of key and value weights", KW, 12, "autocast"),
    row("casts of up and down weights", FW, 12, "autocast"),
    row("casts of gate weights", FW, 6, "autocast gated"),
)
EMBEDDING = (row("look-up", H, 4),)
# Log-softmax in fp32 of half-precision logits; fused, the logits are read twice, their gradient written.
HEAD = (
    row("final norm", H, 5),
    row("loss", V, 9, "!loss:fused !loss:compiled", FP32),
    row("loss, fused", V, 3, "loss:fused"),
    row("loss, fused", V, 3, "loss:compiled"),
)
