"""Bytes that memory-bound kernels move in transformers' families beside Llama's and GPT's.

What the blocks of planner/stacks/hf_families.py and planner/stacks/hf_experts.py move beyond the rows of
:mod:`planner.stacks.traffic`, an operation at a time, counted in transformers' modules on fake tensors in
half precision (tests/data/traced_traffic_families.json). Elements of half precision for each of the
dimensions; fp32 counts twice.
"""

from __future__ import annotations

from planner.stacks.traffic import given, row

H, AD, KD, F, SS = (
    "batch seq residual",
    "batch seq heads head_dim",
    "batch seq kv_heads head_dim",
    "batch seq ffn",
    "batch heads seq seq_k",
)
COPIES, INNER, SHARED = "batch seq routed width", "batch seq routed expert_ffn", "batch seq shared_ffn"
KEYS, VALUES = "batch seq heads qk_dim", "batch seq heads v_dim"

NORMS = (
    row("norms' products in fp32", H, 16, "norms_in_fp32"),
    row("norms of the parts' outputs", H, 148, "norms:sandwich"),
    row("query norm in fp32", AD, 8, "qk_norm norms_in_fp32 !norms_over_heads"),
    row("key norm in fp32", KD, 8, "qk_norm norms_in_fp32 !norms_over_heads"),
    row("query norm in fp32", AD, 29, "norms_in_fp32 norms_over_heads"),
    row("key norm in fp32", KD, 29, "norms_in_fp32 norms_over_heads"),
)
ATTENTION = (
    row("fused query, key and value, put together", AD, 10, "phi3"),
    row("fused query, key and value, put together", KD, 20, "phi3"),
    row("fused gate and up, put together", F, 4, "phi3"),
    row("fused query, key and value, picked apart", AD, 17, "falcon"),
    row("fused query, key and value, picked apart", KD, 34, "falcon"),
    row("keys and values spread over the queries' heads", AD, 26, "falcon grouped !one_key !eager"),
    row(
        "gradients of query, key and value products' input, added up",
        H,
        6,
        "!gated !fused_qkv !falcon !norms:shared !t5",
    ),
    # Unfused attention: scale, mask and softmax one by one, in fp32 but for those that stay in half.
    row("scores, an operation at a time", SS, 23, "eager !softmax_in_half"),
    row("scores, an operation at a time", SS, 6, "eager softmax_in_half !sinks"),
    row("scores with a sink, an operation at a time", SS, 22, "eager sinks"),
    row("capped scores", SS, 13, "eager capped_scores"),
    row("heads laid out for products", AD, 12, "eager !latent"),
)
EXPERTS = (
    row("tokens sent to experts and summed up", COPIES, 22.7, "!mixtral !latent"),
    row("tokens sent to experts and summed up, in fp32", COPIES, 42, "mixtral"),
    row("tokens sent to experts and summed up, in fp32", COPIES, 42, "latent"),
    row("sum in fp32", H, 6, "mixtral"),
    row("sum and router in fp32", H, 22, "latent"),
    row("experts' activation", INNER, 18, "!expert_biases"),
    row("experts' clamped activation", INNER, 71, "expert_biases"),
    row("experts' biases", COPIES, 6, "expert_biases"),
    row("shared experts' activation", SHARED, 14, "shared"),
)
LATENT = (
    row("norm of the latent", "batch seq kv_rank", 66),
    row("norm of the query latent", "batch seq q_rank", 66, "query_rank"),
    row("queries and keys, turned and put together", KEYS, 20),
    row("values and keys picked apart", VALUES, 6),
)
T5 = (
    row("dropout in the MLP", F, 5, "dropout"),
    row("position bias", "heads seq seq_k", 3),
)
CROSS = (
    row("norm, addition and dropout of cross attention", H, 80),
    row("scores of cross attention", SS, 18),
    row("heads of cross attention laid out", AD, 16),
)
BLOCK = (
    *NORMS,
    *ATTENTION,
    *given("mlp:experts", *EXPERTS),
    *given("latent", *LATENT),
    *given("t5", *T5),
    *given("mixer:cross", *CROSS),
)
