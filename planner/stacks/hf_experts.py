"""What transformers' mixtures of experts and multi-head latent attention keep.

Counted in transformers 5.23.0 under torch 2.13 in half precision without autocast, its experts as grouped
products (``experts_implementation="grouped_mm"``, the default on GPUs; tests/data/traced_families.json).
Every token is copied once for each of the ``routed`` experts that it is sent to; nothing is dropped.
"""

from __future__ import annotations

from planner.stacks.base import COMPUTE, FP32, INT64, UNTIL_FULL, Row
from strategies.base import Role

H = "batch seq residual"
COPIES, INNER, SENT = "batch seq routed width", "batch seq routed expert_ffn", "batch seq routed"
SHARED, ONE = "batch seq shared_ffn", "batch seq residual:1"
ROUTER = "batch seq router"
TRANSIENT = Role.TRANSIENT
# Families whose router runs in fp32 on a copy of the tokens, DeepSeek's.
DEEPSEEK = "latent"

EXPERTS = (
    Row("tokens in the order of the experts", COPIES, 1, COMPUTE, UNTIL_FULL, steps="up"),
    Row("experts' gate and up", INNER, 2, COMPUTE, UNTIL_FULL, steps="act"),
    Row("experts' activated gate", INNER, 1, COMPUTE, UNTIL_FULL, "!expert_biases", steps="act"),
    # gpt-oss: clamped gate and up, a sigmoid, and the gate times it.
    Row("experts' clamped gate", INNER, 4, COMPUTE, UNTIL_FULL, "expert_biases", steps="act"),
    Row("experts' down input", INNER, 1, COMPUTE, UNTIL_FULL, steps="down"),
    # Gone before their gradients are cast to half precision, where the block was run again.
    Row("experts' outputs", COPIES, 1, COMPUTE, UNTIL_FULL, steps="shared"),
    Row("chosen experts and places", SENT, 4, INT64, UNTIL_FULL, steps="up"),
    Row("weights of the experts", SENT, 1, COMPUTE, UNTIL_FULL, "!mixtral !latent", steps="combine"),
    Row("weights of the experts in fp32", SENT, 1, FP32, UNTIL_FULL, "mixtral", steps="combine"),
    Row("weights of the experts in fp32", SENT, 1, FP32, UNTIL_FULL, "latent", steps="combine"),
    Row("router's probabilities", ROUTER, 1, FP32, UNTIL_FULL, "!expert_biases", steps="up"),
    Row("router's input in fp32", H, 1, FP32, UNTIL_FULL, DEEPSEEK, steps="up"),
    Row("router's weight in fp32", "hidden router", 1, FP32, UNTIL_FULL, DEEPSEEK, steps="up"),
    Row(
        "shared experts' gate, activated, up and product",
        SHARED,
        4,
        COMPUTE,
        UNTIL_FULL,
        "shared",
        steps="shared",
    ),
)

# The sum over a token's experts runs in the precision of their weights.
EXPERTS_WORK = (
    Row(
        "gradients of the weighted outputs",
        COPIES,
        3,
        COMPUTE,
        when="!mixtral !latent",
        role=TRANSIENT,
        steps="combine",
    ),
    Row(
        "gradients of the weighted outputs", COPIES, 3, FP32, when="mixtral", role=TRANSIENT, steps="combine"
    ),
    Row("gradients of the weighted outputs", COPIES, 3, FP32, when="latent", role=TRANSIENT, steps="combine"),
    Row("gradient of the experts' outputs", COPIES, 2, role=TRANSIENT, steps="combine down"),
    Row("gradient of the experts' down input", INNER, 1, role=TRANSIENT, steps="down"),
    Row("gradients of the experts' activation", INNER, 3, role=TRANSIENT, steps="act"),
    Row("gradients of the experts' gate and up", INNER, 2, role=TRANSIENT, steps="up"),
    Row("gradient of the tokens sent", COPIES, 1, role=TRANSIENT, steps="up"),
    Row(
        "gradients of the shared experts' activation",
        SHARED,
        3,
        when="shared",
        role=TRANSIENT,
        steps="shared",
    ),
    Row(
        "gradient of the shared experts' input",
        H,
        4,
        when="shared",
        role=TRANSIENT,
        steps="combine down act up",
    ),
)

LATENT_KV, LATENT_Q = "batch seq kv_rank", "batch seq q_rank"
KEYS, VALUES = "batch seq heads qk_dim", "batch seq heads v_dim"
COPIED = "batch seq heads copied_v"

LATENT = (
    Row("latent of keys and values in fp32", LATENT_KV, 1, FP32, UNTIL_FULL, steps="core"),
    Row("latent of keys and values, normalised", LATENT_KV, 2, COMPUTE, UNTIL_FULL, steps="core"),
    Row("latent of queries in fp32", LATENT_Q, 1, FP32, UNTIL_FULL, "query_rank", steps="core"),
    Row("latent of queries, normalised", LATENT_Q, 2, COMPUTE, UNTIL_FULL, "query_rank", steps="core"),
    Row("statistics of the latent's norm", ONE, 1, FP32, UNTIL_FULL, steps="core"),
    Row("statistics of the query latent's norm", ONE, 1, FP32, UNTIL_FULL, "query_rank", steps="core"),
    Row("query and key", KEYS, 2, COMPUTE, UNTIL_FULL, steps="core"),
    # The value is a view of the product that expands the latent, unless it is copied for a product.
    Row("expanded keys and values", "batch seq heads kv_dim", 1, COMPUTE, UNTIL_FULL, "!eager", steps="core"),
    Row("value", COPIED, 1, COMPUTE, UNTIL_FULL, "eager", steps="core"),
    Row("attention output", VALUES, 1, COMPUTE, UNTIL_FULL, steps="core"),
    Row("gradient of the attention output", VALUES, 2, role=TRANSIENT, steps="out core"),
    Row("gradients of query, key and value", KEYS, 2, when="!eager", role=TRANSIENT, steps="core"),
    Row("gradient of the value", VALUES, 1, role=TRANSIENT, steps="core"),
    Row("gradient of the query", KEYS, 1, role=TRANSIENT, steps="qkv"),
    Row("gradient of the expanded keys and values", "batch seq heads kv_dim", 1, role=TRANSIENT, steps="qkv"),
)
