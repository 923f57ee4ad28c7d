"""torchtitan's mixtures of experts and latent attention: what their blocks keep, besides what all blocks do.

Counted in torchtitan 0.3.0 under torch 2.13 (models/common/moe.py and token_dispatcher.py,
models/deepseek_v3/model.py). Without recompute the mixture keeps ``sb[4h + 4E + k(6h + 8F + 28)]`` for ``k``
of ``E`` experts of width ``F`` to a token: the router's input in fp32 and its scores; the tokens as they were
sorted and the results in fp32, both products, the activation and the gated product, and indices. Latent
attention keeps ``sb[4a d_qk + 2a(d_kv + d_v) + 4a + 4r + 6d_rope + 4]``, and with latent queries ``4q + 4``.

Selective checkpointing runs the grouped products again (they are none of PyTorch's costly operators) and
keeps what the two all-to-alls deliver, ``4hk``. The groups of experts that DeepSeek-V3's router chooses from
are left out: 240 bytes of a token under ``selective``.
"""

from __future__ import annotations

from dataclasses import replace

from planner.stacks import traffic
from planner.stacks.base import COMPUTE, FP32, INT64, NONE, UNTIL_FULL, Row
from strategies.base import Role

TRANSIENT, LATER = Role.TRANSIENT, Role.OUTPUT_GRADIENT
SELECTIVE = ("selective",)
H, W, TOKEN, COPY = (
    "batch seq residual",
    "batch seq hidden",
    "batch seq residual:1",
    "batch seq residual:1 chosen",
)
AQK, AKV, AV = "batch seq heads qk_dim", "batch seq heads kv_dim", "batch seq heads v_dim"
QR, KR, RD = "batch seq q_rank", "batch seq kv_rank", "batch seq rope_dim"
SF, SENT = "batch seq shared_ffn", "batch seq residual chosen"
"""Copies of tokens where they come from; ``routed`` ones are where their experts are."""
RH, RF = "batch seq routed width", "batch seq routed expert_ffn"


def apart(*rows: Row) -> tuple[Row, ...]:
    """Rows with heads and with the MLP's width, where a block has neither latent attention nor experts."""

    def conditions(row: Row) -> str:
        names = row.dims.split()
        latent = " !latent" * ("heads" in names or "kv_heads" in names)
        return row.when + latent + " !mlp:experts" * ("ffn" in names)

    return tuple(replace(row, when=conditions(row).strip()) for row in rows)


# What selective checkpointing alone keeps is used when the block is run again, before its down product.
# Of the block's products selective checkpointing keeps every second one's output, the first one's too: with
# a product for the queries those of queries, expansions and gate, with two for them the other ones.
LATENT = traffic.given(
    "latent",
    Row("latent of the query", QR, 1, COMPUTE, UNTIL_FULL, "query_rank", steps="qkv"),
    Row("latent of the query, normalised", QR, 1, COMPUTE, NONE, "query_rank", steps="qkv"),
    Row("statistics of the query latent's norm", "batch seq", 1, FP32, NONE, "query_rank", steps="qkv"),
    Row("latent of keys and values", KR, 1, COMPUTE, UNTIL_FULL, "query_rank", steps="qkv"),
    Row("rotary part of the keys", RD, 1, COMPUTE, UNTIL_FULL, "query_rank", steps="qkv"),
    Row("latent of keys and values", KR, 1, COMPUTE, NONE, "!query_rank", steps="qkv"),
    Row("rotary part of the keys", RD, 1, COMPUTE, NONE, "!query_rank", steps="qkv"),
    Row("latent of keys and values, normalised", KR, 1, COMPUTE, NONE, steps="qkv"),
    Row("statistics of the key and value latent's norm", "batch seq", 1, FP32, NONE, steps="qkv"),
    Row("rotary angles", RD, 1, FP32, NONE, "rotary", steps="core"),
    Row("query", AQK, 1, COMPUTE, NONE, "query_rank", steps="core"),
    Row("query", AQK, 1, COMPUTE, UNTIL_FULL, "!query_rank", steps="core"),
    Row("key, put together", AQK, 1, COMPUTE, NONE, steps="core"),
    # The value is a view of it.
    Row("expanded keys and values", AKV, 1, COMPUTE, NONE, "query_rank", steps="core"),
    Row("expanded keys and values", AKV, 1, COMPUTE, UNTIL_FULL, "!query_rank", steps="core"),
    Row("attention output", AV, 1, COMPUTE, UNTIL_FULL, steps="core"),
    Row("log-sum-exp of the scores", "batch seq heads", 1, FP32, UNTIL_FULL, steps="core"),
    Row("output of the attention output product", W, 1, COMPUTE, SELECTIVE, "query_rank", steps="down"),
    Row("gradient of the attention output", AV, 2, role=TRANSIENT, steps="out core"),
    Row("gradients of query and key", AQK, 2, role=TRANSIENT, steps="core"),
    Row("gradient of the value", AV, 1, role=TRANSIENT, steps="core"),
    Row("gradient of the query", AQK, 1, role=TRANSIENT, steps="qkv"),
    Row("gradient of the expanded keys and values", AKV, 1, role=TRANSIENT, steps="qkv"),
    Row("gradient of the query product", AQK, 1, role=LATER),
    Row("gradient of the query's latent", QR, 2, when="query_rank", role=LATER),
    Row("gradient of the expanded keys and values, kept", AKV, 1, role=LATER),
    Row("gradients of the latent of keys and values", KR, 2, role=LATER),
    Row("gradient of the rotary part of the keys", RD, 1, role=LATER),
    Row("rotary table", "seq_k rope_dim", 1, FP32, when="rotary !rotary_table:model", role=Role.BUFFER),
)

MIXTURE = traffic.given(
    "mlp:experts",
    Row("MLP input (norm output)", W, 1, COMPUTE, NONE, "shared", steps="up"),
    Row("router's input, in fp32", H, 1, FP32, NONE, "router:fp32", steps="up"),
    Row("router's input", W, 1, COMPUTE, NONE, "router:half !shared", steps="up"),
    Row("router's weight, in fp32", "hidden router", 1, FP32, NONE, "router:fp32", steps="up"),
    Row("scores of the experts", "batch seq router", 1, FP32, NONE, steps="up"),
    Row("numbers of the chosen experts", COPY, 1, INT64, UNTIL_FULL, "!all_to_all:rerun", steps="up"),
    Row("numbers of the chosen experts", COPY, 1, INT64, NONE, "all_to_all:rerun", steps="up"),
    Row("scores of the chosen experts", COPY, 1, FP32, SELECTIVE, "!all_to_all:rerun", steps="down"),
    Row("scores of the chosen experts, to be normalised", COPY, 1, FP32, NONE, "!deepseek_v2", steps="up"),
    Row("sum of the chosen experts' scores", TOKEN, 1, FP32, NONE, "!deepseek_v2", steps="up"),
    Row("order of the tokens by experts", COPY, 2, INT64, NONE, steps="act"),
    Row("scores by experts", COPY, 1, FP32, NONE, steps="act"),
    Row(
        "order of the tokens by experts of this GPU",
        "batch seq routed expert_group",
        1,
        INT64,
        NONE,
        steps="up",
    ),
    Row("tokens sent to experts", RH, 1, COMPUTE, NONE, steps="up"),
    Row("experts' gate and up", RF, 2, COMPUTE, NONE, "!gpt_oss", steps="up"),
    Row("experts' activated gate", RF, 1, COMPUTE, NONE, "!gpt_oss", steps="up"),
    Row("experts' gated product", RF, 1, COMPUTE, NONE, "!gpt_oss", steps="up"),
    Row("experts' results, in fp32", SENT, 1, FP32, NONE, steps="act"),
    Row("tokens received", f"{RH} expert_group", 1, COMPUTE, SELECTIVE, "!all_to_all:rerun", steps="down"),
    Row("results received", f"{SENT} expert_group", 1, COMPUTE, SELECTIVE, "!all_to_all:rerun", steps="down"),
    # Backward, the shared experts come first (here the step of the down product), then the results' scores.
    Row("gradients of results and scores, in fp32", SENT, 3, FP32, role=TRANSIENT, steps="act"),
    Row("gradient of the experts' results", RH, 1, role=TRANSIENT, steps="up"),
    Row("gradients of the experts' width", RF, 3, role=TRANSIENT, steps="up"),
    Row("gradients of the tokens sent", RH, 3, role=TRANSIENT, steps="norm2"),
    Row("gradients of gate and up of the experts", RF, 2, role=LATER),
    Row("gradient of the experts' results, kept", RH, 1, role=LATER),
    Row("gradient of the scores", "batch seq router", 1, FP32, role=LATER),
    *traffic.given(
        "shared",
        Row("shared experts' gate", SF, 1, COMPUTE, UNTIL_FULL, steps="down"),
        Row("shared experts' up, activated gate and their product", SF, 3, COMPUTE, NONE, steps="down"),
        Row("shared experts' output", W, 1, COMPUTE, SELECTIVE, "!query_rank", steps="down"),
        Row("gradients of the shared experts' width", SF, 3, role=TRANSIENT, steps="down"),
        Row("gradients of the shared experts' gate and up", SF, 2, role=LATER),
    ),
)

# GPT-OSS: biases of every product, its gated activation clamped and written out, attention's output scaled by
# what its sinks leave. Products with biases are all kept by selective checkpointing, not every second one.
AD = "batch seq heads head_dim"
SINKS = traffic.given(
    "gpt_oss",
    Row("experts' gate and up, with biases", RF, 2, COMPUTE, NONE, steps="up"),
    Row("experts' gate and up, clamped", RF, 2, COMPUTE, NONE, steps="up"),
    Row("experts' gate, through the sigmoid and times it", RF, 2, COMPUTE, NONE, steps="up"),
    Row("experts' gated product", RF, 1, COMPUTE, NONE, steps="up"),
    Row("experts of the tokens, for both biases", "batch seq routed", 2, INT64, NONE, steps="up"),
    Row("attention output, scaled", AD, 1, COMPUTE, NONE, steps="out"),
    Row("what the sinks leave, in fp32", "batch seq heads", 1, FP32, NONE, steps="core"),
    Row("what the sinks leave", "batch seq heads", 1, COMPUTE, NONE, steps="core"),
    Row("output of the attention output product", W, 1, COMPUTE, SELECTIVE, steps="down"),
    Row("products of the router", "batch seq router", 1, FP32, SELECTIVE, steps="down"),
)

# Elements that kernels move, read off the same files, a copy of a token counted where it is sent from or to.
MOVED = traffic.always_rerun(
    *traffic.given(
        "latent",
        traffic.row("norm of the latent of the query", QR, 5, "query_rank"),
        traffic.row("norm of the latent of keys and values", KR, 5),
        traffic.row("queries and keys put together", AQK, 7),
        traffic.row("gradients of keys and values put together", AKV, 2),
        traffic.row("rotary embedding of queries", "batch seq heads rope_dim", 20, "rotary"),
        traffic.row("rotary embedding of the key", RD, 20, "rotary"),
    ),
    *traffic.given(
        "mlp:experts",
        # In fp32: the router's input and its gradient; results, times their scores, and three gradients.
        traffic.row("casts for the router", H, 9, "router:fp32"),
        traffic.row("scores of the experts", "batch seq router", 6, dtype=FP32),
        traffic.row("tokens gathered, results scored and added up", SENT, 35),
        traffic.row("tokens in the order of this GPU's experts and back", f"{RH} expert_group", 12),
        traffic.row("gradients of the tokens sent, added up", RH, 3),
        traffic.row("experts' gated activation", RF, 14),
        traffic.row("shared experts' gated activation", SF, 14, "shared"),
        traffic.row("sum with the shared experts' output", H, 6, "shared"),
    ),
)

ROWS = LATENT + MIXTURE + SINKS + MOVED
RERUN = dict.fromkeys(
    (
        "query up weight",
        "router weight",
        "expert gate weight",
        "expert up weight",
        "expert down weight",
        "shared up weight",
    ),
    NONE,
)
"""Products that selective checkpointing runs again, besides those of other blocks."""
