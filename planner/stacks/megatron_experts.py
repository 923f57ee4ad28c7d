"""Megatron Core's mixtures of experts and multi-head latent attention, as rows of the ``megatron`` stack.

Routed tokens go through the ``alltoall`` dispatcher: permuted, sent, sorted by expert, and back; the
probabilities weight the activation's output, so nothing of what comes back is kept (megatron/core/
transformer/moe: token_dispatcher.py, experts.py, moe_utils.py, router.py; core 0.16.1). With flash attention
experts are Transformer Engine's grouped products and permutations are fused (``--moe-grouped-gemm
--moe-permute-fusion``); with eager attention the local spec's ``SequentialMLP``. Latent attention
(multi_latent_attention.py) keeps what its norms take and make, and queries, keys and values as the attention
kernel takes them: the expanded keys and values are copied apart, the rotary part of a key once for each head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from planner.stacks.base import BYTE, COMPUTE, FP32, INT64, UNTIL_FULL, Row
from planner.stacks.traffic import row as traffic_row
from strategies.base import Role

X, Y, T, R, S, H = (
    "batch seq routed width",
    "batch seq routed expert_ffn",
    "batch seq routed",
    "batch seq router",
    "batch seq shared_ffn",
    "batch seq residual",
)
QR, KR, PE = "batch seq residual:1 q_rank", "batch seq residual:1 kv_rank", "batch seq rope_dim"
QK, UP, VO = "batch seq heads qk_dim", "batch seq heads kv_dim", "batch seq heads v_dim"
TRANSIENT, BUFFER, TRAFFIC = Role.TRANSIENT, Role.BUFFER, Role.TRAFFIC
BACKWARD = ("down", "act", "up", "norm2", "out", "core", "qkv", "norm1")


def module(option: str, start: str, rows: Iterable[Row], word: str = "") -> Iterator[Row]:
    """Rows of a module of ``--recompute-modules``: kept; or, with ``option:recomputed``, made again.

    What its backward makes again as it comes to the step ``start`` is there until the step that frees it.
    ``word`` is one that selects the module.
    """
    for one in rows:
        when = f"{word} {one.when}".strip()
        if one.role is not Role.ACTIVATION:
            yield replace(one, when=when)
            continue
        yield replace(one, when=f"{when} !{option}:recomputed")
        ends = max(BACKWARD.index(step) for step in one.steps.split())
        steps = BACKWARD[BACKWARD.index(start) : ends + 1]
        yield replace(
            one,
            name=f"{one.name}, recomputed",
            count=one.count * len(steps),
            when=f"{when} {option}:recomputed",
            role=TRANSIENT,
            steps=" ".join(steps),
        )


def usual(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of a block with the dense MLP's and the usual attention's where there are such.

    A dense MLP's have its width, ``ffn``; those of attention ``head_dim``.
    """
    for one in rows:
        names = one.dims.split()
        if "ffn" in names:
            one = replace(one, when=f"{one.when} mlp:dense".strip())
            in_step = one.steps and one.role is Role.ACTIVATION
            yield from module("mlp", "down", [one]) if in_step else [one]
        else:
            latent = " !latent" if "head_dim" in names else ""
            yield replace(one, when=(one.when + latent).strip())


ROUTER = (
    # Scores of all experts, for the choice and for the loss that balances them; who was chosen.
    Row("router's scores", R, 2, FP32, UNTIL_FULL, "!eager", steps="up"),
    Row("experts that have a token's place", R, 1, BYTE, UNTIL_FULL, steps="up"),
    Row("place of every token among the routed", R, 2, FP32, UNTIL_FULL, "!eager", steps="up"),
    Row("indices of chosen experts", T, 1, INT64, UNTIL_FULL, steps="up"),
    Row("indices of routed tokens and their probabilities", T, 2, INT64, UNTIL_FULL, "eager", steps="up"),
    Row("scores of chosen experts", T, 1, FP32, UNTIL_FULL, "eager", steps="up"),
)
ACTIVATED = (Row("gated product of experts", Y, 1, COMPUTE, UNTIL_FULL, "gated !quantized", steps="down"),)
EXPERTS = (
    *ROUTER,
    Row("probabilities of routed tokens", T, 1, COMPUTE, UNTIL_FULL, steps="act"),
    Row("routed tokens, by expert", X, 1, COMPUTE, UNTIL_FULL, "!quantized", steps="up"),
    Row("gate and up of experts", Y, 2, COMPUTE, UNTIL_FULL, "gated", steps="act"),
    Row("activated gate of experts", Y, 1, COMPUTE, UNTIL_FULL, "gated swiglu:unfused", steps="act"),
    Row("unweighted product of experts", Y, 1, COMPUTE, UNTIL_FULL, "gated swiglu:unfused", steps="act"),
    Row("activation's input of experts", Y, 1, COMPUTE, UNTIL_FULL, "!gated", steps="act"),
    Row("second product's input of experts", Y, 1, COMPUTE, UNTIL_FULL, "!gated !quantized", steps="down"),
)
# Their backward runs after that of the routed experts, which come later in the forward.
SHARED = (
    Row("gate and up of shared experts", S, 2, COMPUTE, UNTIL_FULL, "gated", steps="norm2"),
    Row("activated gate of shared experts", S, 1, COMPUTE, UNTIL_FULL, "gated swiglu:unfused", steps="norm2"),
    Row("gated product of shared experts", S, 1, COMPUTE, UNTIL_FULL, "gated !quantized", steps="norm2"),
    Row("activation's input of shared experts", S, 1, COMPUTE, UNTIL_FULL, "!gated", steps="norm2"),
    Row(
        "second product's input of shared experts",
        S,
        1,
        COMPUTE,
        UNTIL_FULL,
        "!gated !quantized",
        steps="norm2",
    ),
    Row("output of shared experts, ungated", H, 1, COMPUTE, UNTIL_FULL, "shared_gate", steps="norm2"),
)
# MoELayer.forward holds what it sends and what arrives to its end, beside the experts' output, sorted back,
# and what comes back of it; another one is the message's other side. Where nothing is sent there is one less.
FORWARD = (
    Row("routed tokens, on their way", X, 3, role=TRANSIENT, steps="forward"),
    Row("output of shared experts", H, 1, when="shared", role=TRANSIENT, steps="forward"),
)
GRADIENTS = (
    # As they come back from the others, beside the message's other side; in the order of the experts; and
    # on their way out again.
    Row("gradient of routed tokens", X, 2, role=TRANSIENT, steps="down up"),
    Row("gradient of the experts' second product's input", Y, 2, role=TRANSIENT, steps="down act"),
    Row("gradients of the experts' gate and up", Y, 4, when="gated", role=TRANSIENT, steps="act up"),
    Row("gradient of the experts' activation's input", Y, 2, when="!gated", role=TRANSIENT, steps="act up"),
    Row("gradients in shared experts", S, 3, when="shared gated", role=TRANSIENT, steps="norm2"),
    Row("gradients in shared experts", S, 2, when="shared !gated", role=TRANSIENT, steps="norm2"),
)
MOVED = (
    # Permuted, sorted by expert, and back, each a read and a write, forward and backward.
    traffic_row("routed tokens, permuted and sorted", X, 16, "mlp:experts"),
    traffic_row("experts' gated activation", Y, 8, "mlp:experts gated"),
    traffic_row("experts' activation", Y, 5, "mlp:experts !gated"),
    traffic_row("shared experts' gated activation", S, 8, "shared gated"),
    traffic_row("shared experts' activation", S, 5, "shared !gated"),
    traffic_row("router", R, 20, "mlp:experts", FP32),
)
MIXTURE = (
    *module("moe", "down", EXPERTS, "mlp:experts"),
    *module("moe", "down", module("moe_act", "down", ACTIVATED), "mlp:experts"),
    *module("moe", "down", module("shared_experts", "norm2", SHARED), "shared"),
    *(replace(one, when=f"mlp:experts {one.when}".strip()) for one in FORWARD + GRADIENTS),
    *MOVED,
)
"""Everything but the norm before it, which stays where a dense MLP has it."""

EXPANDED = (
    Row("query, of latent attention", QK, 1, COMPUTE, UNTIL_FULL, steps="core"),
    Row("key, with its rotary part", QK, 1, COMPUTE, UNTIL_FULL, steps="core"),
    Row("value, of latent attention", VO, 1, COMPUTE, UNTIL_FULL, steps="core"),
)
LATENT = (
    Row("compressed query", QR, 1, COMPUTE, UNTIL_FULL, "latent query_rank", steps="qkv"),
    Row("compressed query, normed", QR, 1, COMPUTE, UNTIL_FULL, "latent query_rank !quantized", steps="qkv"),
    Row("compressed key and value", KR, 1, COMPUTE, UNTIL_FULL, "latent", steps="qkv"),
    Row("compressed key and value, normed", KR, 1, COMPUTE, UNTIL_FULL, "latent !quantized", steps="qkv"),
    Row("rotary part of the key", PE, 1, COMPUTE, UNTIL_FULL, "latent", steps="qkv"),
    Row("statistics of latent norms", "batch seq residual:1", 2, FP32, UNTIL_FULL, "latent", steps="qkv"),
    *module("mla_up_proj", "core", EXPANDED, "latent"),
    Row("output of latent attention", VO, 1, COMPUTE, UNTIL_FULL, "latent", steps="out"),
    Row("gradient of latent attention's output", VO, 2, when="latent", role=TRANSIENT, steps="out core"),
    Row("gradients of query and key", QK, 4, when="latent", role=TRANSIENT, steps="core qkv"),
    Row("gradient of the value", VO, 2, when="latent", role=TRANSIENT, steps="core qkv"),
    Row("gradient of expanded key and value", UP, 1, when="latent", role=TRANSIENT, steps="qkv"),
    # Rotation of queries in place; keys and values copied apart (fused_mla_yarn_rope_apply.py).
    traffic_row("rotary embedding of latent queries", "batch seq heads rope_dim", 4, "latent"),
    traffic_row("keys and values put together", UP, 2, "latent"),
    traffic_row("keys with their rotary part", QK, 2, "latent"),
    traffic_row("values put apart", VO, 2, "latent"),
    traffic_row("norms of compressed queries", QR, 5, "latent query_rank"),
    traffic_row("norms of compressed keys and values", KR, 5, "latent"),
)


def stand_in(name: str, dims: str, when: str, count: int = 1) -> Row:
    """Transformer Engine's empty gradient of one shape of weight."""
    return Row(f"stand-in gradient, {name}", dims, count, when=f"mcore !eager {when}", role=BUFFER)


# One for each shape, of single experts, kept for good (get_dummy_wgrad); those of a latent attention's.
STAND_INS = (
    stand_in("experts' gate and up", "hidden expert_ffn", "mlp:experts gated", 2),
    stand_in("experts' up", "hidden expert_ffn", "mlp:experts !gated"),
    stand_in("experts' down", "expert_ffn hidden", "mlp:experts"),
    stand_in("shared experts' gate and up", "hidden shared_ffn", "shared gated", 2),
    stand_in("shared experts' up", "hidden shared_ffn", "shared !gated"),
    stand_in("shared experts' down", "shared_ffn hidden", "shared"),
    stand_in("query down", "hidden q_rank", "latent query_rank"),
    stand_in("query up", "q_rank heads qk_dim", "latent query_rank"),
    stand_in("latent attention's query", "hidden heads qk_dim", "latent !query_rank"),
    stand_in("key and value down", "hidden kv_rank", "latent"),
    stand_in("key and value down, rotary part", "hidden rope_dim", "latent"),
    stand_in("key and value up", "kv_rank heads kv_dim", "latent"),
    stand_in("latent attention's output", "heads v_dim hidden", "latent"),
)

OPTIONS = {
    # --recompute-modules; with layernorm as norm=recomputed, core_attn as --recompute selective.
    **dict.fromkeys(("mlp", "moe", "moe_act", "shared_experts", "mla_up_proj"), ("kept", "recomputed")),
    "dispatcher": ("alltoall",),  # --moe-token-dispatcher-type
    "mtp": ("off", "on"),  # --mtp-num-layers
}
CONCERNS = {
    **dict.fromkeys(("moe", "moe_act", "shared_experts", "dispatcher"), "experts"),
    "mla_up_proj": "latent",
    "mtp": "mtp_layers",
}
RERUNS = {
    "mla_up_proj:recomputed": ("query up weight", "key and value up weight"),
    "moe:recomputed": (
        "router weight",
        "expert gate weight",
        "expert up weight",
        "expert down weight",
        "shared gate weight",
        "shared up weight",
        "shared down weight",
        "shared expert's gate",
        "tokens sent to experts",
    ),
    "shared_experts:recomputed": ("shared gate weight", "shared up weight", "shared down weight"),
    "mlp:recomputed": ("gate weight", "up weight", "down weight"),
}
"""Products, and messages, that an option runs once more in the backward."""
