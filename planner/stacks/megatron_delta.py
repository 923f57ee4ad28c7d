"""Megatron-LM's mixers of Qwen3-Next, as rows of its stack: gated delta nets, and attention behind a gate.

A gated delta net (Yang et al. 2024, arXiv:2412.06464) runs operation by operation in Megatron Core 0.16.1
(core/ssm/gated_delta_net.py), with causal-conv1d 1.5 and flash-linear-attention 0.4; ``torch.compile`` has
only what follows the output's norm, and keeps its two inputs. It keeps what each autograd function saves: the
convolution its input; the L2 norm of queries and keys its outputs; the delta rule
(``ChunkGatedDeltaRuleFunction``) queries and keys, repeated to the values' heads, values, the decays summed
over a chunk, the gates beta and the inverse of each chunk's products of keys; the output's norm what it
takes; the output gate what it multiplies. All else is made again in the backward and lives only there.
In bytes per token of half precision, of ``c`` key heads with ``k`` elements in all, ``m`` value heads with
``v``, ``r`` elements of a key head for each value head (``m > c``) and width ``h``:
``4h + 4 + 8k + 8c + 4r + 12v + 146m``. Vectors with one element per head are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.stacks import traffic
from planner.stacks.base import BYTE, FP32, UNTIL_FULL, Row
from strategies.base import Role

H, K, KEYS, R, V, M, INVERSE, STATES, AD, KD = (
    "batch seq residual",
    "batch seq delta_key_heads key_dim",
    "batch seq delta_key_heads",
    "batch seq delta_heads key_dim",
    "batch seq delta_heads value_dim",
    "batch seq delta_heads",
    "batch seq delta_heads chunk:64",
    "batch seq delta_heads value_dim key_dim",
    "batch seq heads head_dim",
    "batch seq kv_heads head_dim",
)
BESIDE = " key_head_alone"
"""Where a GPU has one key head, the gate is a view of the product's whole output, and keeps that."""
CHUNK = 64
"""Tokens of a chunk (fla/ops/gated_delta_rule/chunk.py, ``chunk_size``), one state for each."""

KEPT = (
    Row("delta net input (norm output)", H, 1, steps="qkv"),
    Row("convolution's input: queries and keys", K, 2, steps="core"),
    Row("convolution's input: values", V, 1, steps="core"),
    Row("normed queries and keys", K, 2, steps="core"),
    Row("norms of queries and keys, statistics", KEYS, 2, FP32, steps="core"),
    Row("queries and keys, for every value head", R, 2, when="spread_keys", steps="scan"),
    Row("values", V, 1, steps="scan"),
    Row("gates beta", M, 1, steps="core"),
    # What softplus takes and makes, and the sum over a chunk.
    Row("decays", M, 3, FP32, steps="core"),
    Row("inverse of a chunk's products of keys", INVERSE, 1, steps="scan"),
    Row("delta rule's output", V, 1, steps="out"),
    Row("output norm's statistics", M, 1, FP32, steps="out"),
    Row("output norm's output", V, 1, steps="out"),
    Row("output gate", V, 1, steps="out"),
    Row("gated output", V, 1, steps="out"),
    Row("dropout mask after the delta net", H, 1, BYTE, when="dropout", steps="out"),
)
# chunk_gated_delta_rule_bwd holds to its end what it makes (the step "scan", most of all in
# prepare_wy_repr_bwd); then come the convolution's inputs and outputs (the step "core"), and what the product
# in gets in one piece, with the batch first and turned (the step "qkv").
BACKWARD = (
    Row("gradients of the gated and the normed output", V, 2, steps="out"),
    Row("gradient of the output gate", V, 4, steps="out scan core qkv"),
    Row("gradient of the block's output, during the rule's", H, 1, steps="scan"),
    Row("gradient of the rule's output", V, 1, steps="scan"),
    Row("keys with the inverse, again", R, 1, steps="scan"),
    Row("values with the inverse and less what was known, again", V, 2, steps="scan"),
    Row("states of the chunks, again, and their gradients", STATES, 2 / CHUNK, steps="scan"),
    Row("gradients of queries and keys, of keys twice more", R, 4, steps="scan"),
    Row("gradients of values, of both kinds", V, 2, steps="scan"),
    Row("gradients of the decays, of both kinds", M, 2, FP32, steps="scan"),
    Row("gradients of the gates beta", M, 1, steps="scan"),
    Row("gradients around the convolution: queries and keys", K, 6, steps="core"),
    Row("gradients around the convolution: values", V, 3, steps="core"),
    Row("gradients of the product in: queries and keys", K, 4, steps="qkv"),
    Row("gradients of the product in: values and gate", V, 3, steps="qkv"),
    Row("gradients of the product in: beta and decays", M, 4, steps="qkv"),
)
# Kernels read their inputs and write their outputs once. Of queries and keys together: turned for the
# convolution (4, backward 12), convolved (4, 6), copied (4), normed (4, 6). For each value head: the products
# of keys (1), keys and the inverse (2, again 2, backward 3), states (2, again 2, backward 3), the output (2,
# backward 2 + 5), sums (3). Values: turned, convolved and copied (8, backward 11), in the rule (6, again 4,
# backward 11), normed and gated (5, backward 8).
MOVED = (
    traffic.row("turns, convolution and norms of queries and keys", K, 40),
    traffic.row("queries and keys, for every value head", K, 4, "spread_keys"),
    traffic.row("queries and keys, for every value head", R, 4, "spread_keys"),
    traffic.row("delta rule: queries and keys", R, 27),
    traffic.row("convolution, delta rule, norm and gate: values", V, 53),
    traffic.row("states of the chunks", STATES, 6 / CHUNK),
    traffic.row("inverse of a chunk's products of keys", INVERSE, 5),
    traffic.row("products of keys of a chunk", INVERSE, 2, dtype=FP32),
    traffic.row("gates beta and decays", M, 30, dtype=FP32),
)
DELTA = (
    *traffic.given("mixer:delta", *(replace(row, kept_by=UNTIL_FULL) for row in KEPT)),
    *traffic.given("mixer:delta", *(replace(row, role=Role.TRANSIENT) for row in BACKWARD)),
    *traffic.given("mixer:delta", *MOVED),
)

# core/transformer/attention.py, ``_apply_output_gate``, compiled: attention's output and the gate are kept.
GATE_KEPT = (
    Row("attention gate", AD, 1, steps="out"),
    Row("query beside the gate", AD + BESIDE, 1, steps="out"),
    Row("key and value beside the gate", KD + BESIDE, 2, steps="out"),
    Row("gated attention output", AD, 1, steps="out"),
)
GATE_BACKWARD = (
    Row("gradient of the gated attention output", AD, 1, steps="out"),
    Row("gradient of the attention gate", AD, 3, steps="out core qkv"),
)
GATED_ATTENTION = traffic.given(
    "attention_gate attends",
    *(replace(row, kept_by=UNTIL_FULL) for row in GATE_KEPT),
    *(replace(row, role=Role.TRANSIENT) for row in GATE_BACKWARD),
    traffic.row("attention gate", AD, 8),
)


def _stand_ins() -> Iterator[Row]:
    """Transformer Engine's empty gradients (get_dummy_wgrad) of the products in and out, by their parts."""
    for name, dims, count, when in (
        ("delta net: queries and keys", "hidden delta_key_heads key_dim", 2, "mixer:delta"),
        ("delta net: values and gate", "hidden delta_heads value_dim", 2, "mixer:delta"),
        ("delta net: beta and decays", "hidden delta_heads", 2, "mixer:delta"),
        ("delta net: output", "delta_heads value_dim hidden", 1, "mixer:delta"),
        ("query, key, value: gate", "hidden heads head_dim", 1, "attends attention_gate !eager"),
    ):
        yield Row(f"stand-in gradient, {name}", dims, count, when=f"mcore {when}", role=Role.BUFFER)


DELTA_STAGE = tuple(_stand_ins())
