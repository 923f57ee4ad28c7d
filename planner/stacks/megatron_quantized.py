"""Products of 8 and 4 bits under Megatron Core: the copies that Transformer Engine makes of their operands.

The four products of a dense block, those of latent attention and of routed and shared experts take
quantized operands; the router, norms, attention, embedding and head stay in half precision. A copy is
``rowwise``, quantized along the length that the forward's product sums over, or ``columnwise``, for the
gradients' (Transformer Engine 2.20, pytorch/quantized_tensor.py, ``Quantizer.set_usage``); words
``quantized``, ``recipe:...`` and ``columnwise``, where that is a copy of its own
(planner/precision.py, ``words_of``). Bytes of an element are the recipe's ``cast`` and ``cast_weight``.

A product keeps for its backward the columnwise copy of its input, ``update_usage(rowwise_usage=False)`` in
pytorch/module/linear.py, layernorm_linear.py and grouped_linear.py. Some are made to keep their input as it
was, which something else keeps anyway (Megatron Core 0.16.1, ``set_save_original_input``), and cast it again:
not with delayed scaling, whose scales are gone by then.
"""

from __future__ import annotations

from planner.stacks import traffic
from planner.stacks.base import BESIDE, CAST, CAST_WEIGHT, COMPUTE, UNTIL_FULL, Row
from planner.stacks.megatron_experts import KR, QK, QR, UP, VO, H, S, X, Y, module
from strategies.base import Role

AD, KD, F = "batch seq heads head_dim", "batch seq kv_heads head_dim", "batch seq ffn"
TRANSIENT, BUFFER = Role.TRANSIENT, Role.BUFFER


def _weight(name: str, dims: str, count: float, when: str) -> tuple[Row, ...]:
    """A weight's copies, made in the first micro-batch of a step and kept for good beside the weight.

    pytorch/module/base.py, ``quantize_weight`` with ``cache``: rowwise and columnwise. With
    ``--fp8-param-gather`` the rowwise copy is the weight itself, and no other is kept; the columnwise one is
    made when the weights have been gathered (pytorch/tensor/utils.py, ``post_all_gather_processing``).
    """
    return tuple(
        Row(f"{name}, quantized{beside}", dims, count, CAST_WEIGHT, when=f"{word} {when}", role=BUFFER)
        for word, beside in ((BESIDE, ""), ("columnwise", " columnwise"))
    )


WEIGHTS = (
    *_weight("query weight", "hidden heads head_dim", 1, "!latent"),
    *_weight("key and value weights", "hidden kv_heads head_dim", 2, "!latent"),
    *_weight("attention output weight", "heads head_dim hidden", 1, "!latent"),
    *_weight("query down weight", "hidden q_rank", 1, "latent query_rank"),
    *_weight("query up weight", "q_rank heads qk_dim", 1, "latent query_rank"),
    *_weight("latent attention's query weight", "hidden heads qk_dim", 1, "latent !query_rank"),
    *_weight("key and value down weight", "hidden kv_rank", 1, "latent"),
    *_weight("key and value down weight, rotary part", "hidden rope_dim", 1, "latent"),
    *_weight("key and value up weight", "kv_rank heads kv_dim", 1, "latent"),
    *_weight("latent attention's output weight", "heads v_dim hidden", 1, "latent"),
    *_weight("gate and up weights", "hidden ffn", 2, "mlp:dense gated"),
    *_weight("up weight", "hidden ffn", 1, "mlp:dense !gated"),
    *_weight("down weight", "ffn hidden", 1, "mlp:dense"),
    *_weight("experts' gate and up weights", "experts hidden expert_ffn", 2, "mlp:experts gated"),
    *_weight("experts' up weight", "experts hidden expert_ffn", 1, "mlp:experts !gated"),
    *_weight("experts' down weight", "experts expert_ffn hidden", 1, "mlp:experts"),
    *_weight("shared experts' gate and up weights", "hidden shared_ffn", 2, "shared gated"),
    *_weight("shared experts' up weight", "hidden shared_ffn", 1, "shared !gated"),
    *_weight("shared experts' down weight", "shared_ffn hidden", 1, "shared"),
)


def _kept(name: str, dims: str, count: float, when: str, step: str) -> Row:
    """What a product keeps of its input."""
    return Row(f"{name}, quantized", dims, count, CAST, UNTIL_FULL, when, steps=step)


def _normed(name: str, dims: str, when: str, step: str) -> tuple[Row, ...]:
    """What a norm and the product behind it, in one module, keep of the norm's output.

    With sequence parallelism NVFP4 does not let go of the rowwise copy (layernorm_linear.py,
    ``ln_out_needs_gather``): counted wherever there is tensor parallelism.
    """
    return (
        _kept(name, dims, 1, f"quantized {when}", step),
        Row(
            f"{name}, quantized rowwise",
            f"{dims} tensor_group",
            1,
            CAST,
            UNTIL_FULL,
            f"recipe:nvfp4 {when}",
            steps=step,
        ),
    )


KEPT = (
    *_normed("attention input", H, "!latent", "qkv"),
    *_normed("MLP input", H, "mlp:dense", "up"),
    # The norm before latent attention is a module of its own, and each product behind it keeps its copy.
    _kept("inputs of latent attention's first products", H, 2, "quantized latent !norm:recomputed", "qkv"),
    *_normed("compressed query", QR, "latent query_rank", "qkv"),
    *_normed("compressed key and value", KR, "latent", "qkv"),
    _kept("attention output", AD, 1, "recipe:delayed !latent", "out"),
    _kept("output of latent attention", VO, 1, "recipe:delayed latent", "out"),
    *module("mlp", "down", [_kept("second product's input", F, 1, "", "down")], "quantized mlp:dense"),
    # The router keeps its input in half precision, and shared experts' first product the same.
    Row(
        "router's input (norm output)",
        H,
        1,
        COMPUTE,
        UNTIL_FULL,
        "quantized mlp:experts !norm:recomputed",
        steps="up",
    ),
    *module("moe", "down", [_kept("routed tokens, by expert", X, 1, "", "up")], "quantized mlp:experts"),
    *module(
        "moe",
        "down",
        module("moe_act", "down", [_kept("second product's input of experts", Y, 1, "", "down")]),
        "quantized mlp:experts",
    ),
    *module(
        "moe",
        "down",
        module(
            "shared_experts",
            "norm2",
            [
                _kept("input of shared experts", H, 1, "recipe:delayed", "norm2"),
                _kept("second product's input of shared experts", S, 1, "", "norm2"),
            ],
        ),
        "quantized shared",
    ),
)


def _transient(name: str, dims: str, count: float, when: str, steps: str, dtype: str = CAST) -> Row:
    return Row(name, dims, count, dtype, when=when, role=TRANSIENT, steps=steps)


# Gradients of outputs are cast for both products of the backward; inputs that were kept as they were, again.
GRADIENTS = tuple(
    _transient(f"{name}, quantized{beside}", dims, count, f"{word} {when}".strip(), step)
    for name, dims, count, step, when in (
        ("gradient of the block's output", H, 1, "down", "mlp:dense"),
        ("gradients of gate and up", F, 2, "up", "mlp:dense gated"),
        ("gradient of up", F, 1, "up", "mlp:dense !gated"),
        ("gradient of routed tokens", X, 1, "down", "mlp:experts"),
        ("gradients of the experts' gate and up", Y, 2, "up", "mlp:experts gated"),
        ("gradient of the experts' up", Y, 1, "up", "mlp:experts !gated"),
        ("gradients in shared experts", S, 2, "norm2", "shared gated"),
        ("gradient in shared experts", S, 1, "norm2", "shared !gated"),
        ("gradient of the attention product's output", H, 1, "out", ""),
        ("gradient of the query", AD, 1, "qkv", "!latent"),
        ("gradients of key and value", KD, 2, "qkv", "!latent"),
        # Latent attention's products run one after the other: the widest gradient of them.
        ("gradient of expanded key and value", UP, 1, "qkv", "latent"),
    )
    for word, beside in (("quantized", ""), ("columnwise", " columnwise"))
)
AGAIN = (
    _transient("attention output, quantized again", AD, 1, "quantized !recipe:delayed !latent", "out"),
    _transient(
        "output of latent attention, quantized again", VO, 1, "quantized !recipe:delayed latent", "out"
    ),
    _transient("input of shared experts, quantized again", H, 1, "quantized !recipe:delayed shared", "norm2"),
    _transient(
        "gated product of experts, recomputed for its cast",
        Y,
        1,
        "quantized mlp:experts moe_act:recomputed",
        "down",
        COMPUTE,
    ),
)
# Routed tokens are copied with padding (pytorch/module/fp8_padding.py), before the first product and back
# after the second. Sorted in half precision they live as long as MoELayer.forward's names do, and so does
# what the activation made as long as the experts' (moe_layer.py and experts.py, core 0.16.1).
PADDED = (
    _transient(
        "routed tokens, sorted and padded", X, 2, "quantized mlp:experts", steps="forward", dtype=COMPUTE
    ),
    _transient(
        "experts' second product's input", Y, 1, "quantized mlp:experts", steps="forward", dtype=COMPUTE
    ),
    _transient(
        "gradient of routed tokens, padded", X, 2, "quantized mlp:experts", steps="down up", dtype=COMPUTE
    ),
)

# A cast reads half precision and writes two copies, as wide together in 8 bits; in 4 bits less is written and
# more read, for a tensor's maximum.
TRAFFIC = (
    traffic.row("casts of attention's input and its output's gradient", H, 4, "quantized !latent"),
    traffic.row("casts of attention's output and the query's gradient", AD, 4, "quantized !latent"),
    traffic.row("casts of the gradients of key and value", KD, 4, "quantized !latent"),
    traffic.row("casts of latent attention's inputs and its output's gradient", H, 6, "quantized latent"),
    traffic.row("casts of the compressed query and its gradient", QR, 4, "quantized latent query_rank"),
    traffic.row("casts of compressed key and value and their gradient", KR, 4, "quantized latent"),
    traffic.row("casts of the gradient of latent attention's query", QK, 2, "quantized latent"),
    traffic.row("casts of the gradients of expanded key and value", UP, 2, "quantized latent"),
    traffic.row("casts of latent attention's output", VO, 2, "quantized latent"),
    traffic.row("casts of the MLP's input and its output's gradient", H, 4, "quantized mlp:dense"),
    traffic.row("casts of the MLP's inner activations", F, 4, "quantized mlp:dense"),
    traffic.row("casts of the gate's gradient", F, 2, "quantized mlp:dense gated"),
    traffic.row("casts of routed tokens and their gradient", X, 4, "quantized mlp:experts"),
    traffic.row("padding of routed tokens", X, 8, "quantized mlp:experts"),
    traffic.row("casts of experts' inner activations", Y, 4, "quantized mlp:experts"),
    traffic.row("casts of the gradient of experts' gate", Y, 2, "quantized mlp:experts gated"),
    traffic.row("casts of shared experts' input and its output's gradient", H, 4, "quantized shared"),
    traffic.row("casts of shared experts' inner activations", S, 4, "quantized shared"),
    traffic.row("casts of the gradient of shared experts' gate", S, 2, "quantized shared gated"),
)

QUANTIZED = (*KEPT, *WEIGHTS, *GRADIENTS, *AGAIN, *PADDED, *TRAFFIC)
"""All of a block."""
