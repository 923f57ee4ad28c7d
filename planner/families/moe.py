"""Mixtures of experts, and multi-head latent attention, which came with some of them."""

from __future__ import annotations

from planner.families.config import (
    Config,
    Fields,
    attention_biases,
    decoder,
    every,
    mixed,
    windows,
)


def mixtral(config: Config) -> Fields:
    """``mixtral``: experts in all blocks."""
    fields = decoder(config, positions=131072, kv_heads=8)
    fields["sliding_window"] = config.get("sliding_window", None)
    return fields | {"experts": _experts(config, "num_local_experts", 8, 2, fields["intermediate_size"])}


def _experts(config: Config, key: str, number: int, per_token: int, width: int) -> Fields:
    return {
        "num_experts": config.integer(key, "num_experts", "num_local_experts", default=number),
        "num_experts_per_tok": config.integer("num_experts_per_tok", default=per_token),
        "intermediate_size": width,
    }


def granitemoe(config: Config) -> Fields:
    """``granitemoe``: experts in all blocks."""
    fields = decoder(config, positions=2048) | attention_biases(config)
    return fields | {"experts": _experts(config, "num_local_experts", 8, 2, fields["intermediate_size"])}


def phimoe(config: Config) -> Fields:
    """``phimoe``: Mixtral with LayerNorm, with biases where it says so."""
    fields = decoder(config, positions=131072, kv_heads=8) | attention_biases(config)
    return fields | {
        "norm": "layernorm",
        "head_bias": config.flag("lm_head_bias"),
        "sliding_window": config.get("sliding_window", None),
        "experts": _experts(config, "num_local_experts", 16, 2, fields["intermediate_size"]),
    }


def olmoe(config: Config) -> Fields:
    """``olmoe``: experts in all blocks; queries and keys are normalised over all heads."""
    fields = decoder(config, positions=4096) | attention_biases(config)
    return fields | {
        "experts": _experts(config, "num_experts", 64, 8, fields["intermediate_size"]),
        "qk_norm": True,
        "qk_norm_weights": "per_head",
    }


def sparse_steps(config: Config) -> tuple[str, ...]:
    """Experts in every ``decoder_sparse_step``-th block but those of ``mlp_only_layers``."""
    count, step = config.blocks(), config.integer("decoder_sparse_step", default=1)
    dense = config.indices("mlp_only_layers")
    return mixed(count, (i for i in range(count) if (i + 1) % step == 0 and i not in dense))


def qwen2_moe(config: Config) -> Fields:
    """``qwen2_moe``: a shared expert behind a gate of its own."""
    experts = _experts(config, "num_experts", 60, 4, config.integer("moe_intermediate_size", default=1408))
    shared = config.integer("shared_expert_intermediate_size", default=5632)
    window = config.get("sliding_window", 4096) if config.flag("use_sliding_window") else None
    first = config.integer("max_window_layers", default=28, least=0)
    return (
        decoder(config, positions=32768, kv_heads=16)
        | windows(config, lambda block: block % 2 == 0 and block < first, window)
        | {
            "qkv_bias": config.flag("qkv_bias", True),
            "mlps": sparse_steps(config),
            "experts": experts | {"shared_intermediate_size": shared, "shared_gate": True},
        }
    )


def qwen3_moe(config: Config) -> Fields:
    """``qwen3_moe``: queries and keys are normalised head by head; a window, if any, is in all blocks."""
    window = config.get("sliding_window", 4096) if config.flag("use_sliding_window") else None
    width = config.integer("moe_intermediate_size", default=768)
    return (
        decoder(config, positions=32768, kv_heads=4)
        | attention_biases(config)
        | {
            "sliding_window": window,
            "qk_norm": True,
            "mlps": sparse_steps(config),
            "experts": _experts(config, "num_experts", 128, 8, width),
        }
    )


def gpt_oss(config: Config) -> Fields:
    """``gpt_oss``: biases everywhere, attention sinks, every second block sees a window."""
    fields = decoder(config, positions=131072, kv_heads=8, head_dim=64)
    experts = _experts(config, "num_local_experts", 128, 4, fields["intermediate_size"])
    return (
        fields
        | attention_biases(config, default=True)
        | windows(config, every(2), config.data.get("sliding_window", 128))
        | {"attention_sinks": True, "experts": experts | {"router_bias": True, "biases": True}}
    )


def _first_dense(
    config: Config, fields: Fields, number: int, per_token: int, width: int, dense: int
) -> Fields:
    """Experts in all blocks but the first few; the shared ones as one MLP of their joint width."""
    config.refuse_unless("moe_layer_freq", (1,), 1)
    first = config.integer("first_k_dense_replace", default=dense, least=0)
    one = config.integer("moe_intermediate_size", default=width)
    usual = 2 if config.family == "deepseek_v2" else 1
    shared = config.integer("n_shared_experts", default=usual, least=0)
    experts = _experts(config, "n_routed_experts", number, per_token, one)
    count = fields["num_hidden_layers"]
    further = config.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0)
    return {
        "experts": experts | {"shared_intermediate_size": shared * one},
        "mlps": mixed(count, range(first, count)),
        "mtp_layers": further,
    }


def _latent(config: Config) -> Fields:
    config.refuse_unless("attention_bias", (False,), False)
    q_rank = config.data.get("q_lora_rank", 1536)
    latent = {
        "q_lora_rank": q_rank,
        "kv_lora_rank": config.integer("kv_lora_rank", default=512),
        "qk_nope_head_dim": config.integer("qk_nope_head_dim", default=128),
        "qk_rope_head_dim": config.integer("qk_rope_head_dim", default=64),
        "v_head_dim": config.integer("v_head_dim", default=128),
    }
    heads = config.integer("num_attention_heads")
    width = latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"]
    return {"latent": latent, "num_key_value_heads": heads, "head_dim": width}


def deepseek_v2(config: Config) -> Fields:
    """``deepseek_v2``: latent attention; the first blocks are dense."""
    config.refuse_unless("mlp_bias", (False,), False)
    fields = decoder(config, positions=2048) | _latent(config)
    per_token = config.integer("num_experts_per_tok")
    return fields | _first_dense(config, fields, 64, per_token, 1407, dense=0)


def deepseek_v3(config: Config) -> Fields:
    """``deepseek_v3``, and ``kimi_k2``, which is of its shape."""
    fields = decoder(config, positions=4096) | _latent(config)
    return fields | _first_dense(config, fields, 256, 8, 2048, dense=3)


def glm4_moe(config: Config) -> Fields:
    """``glm4_moe``: biases of queries, keys and values if any; the first block is dense."""
    fields = decoder(config, positions=131072, kv_heads=8, rotary=0.5)
    return (
        fields
        | _first_dense(config, fields, 128, 8, 1408, dense=1)
        | {"qkv_bias": config.flag("attention_bias"), "qk_norm": config.flag("use_qk_norm")}
    )


def llama4(config: Config) -> Fields:
    """``llama4_text``: experts and a shared one as wide in every ``interleave_moe_layer_step``-th block, a
    wider MLP in the others. Three of four blocks attend within chunks, which are taken as windows;
    queries and keys are normalised without weights.
    """
    count = config.blocks()
    step = config.integer("interleave_moe_layer_step", default=1)
    given = config.data.get("moe_layers")
    chosen = range(step - 1, count, step) if given is None else config.indices("moe_layers")
    width = config.integer("intermediate_size")
    spared = config.integer("no_rope_layer_interval", default=4)
    local = config.get("no_rope_layers", []) or [int((block + 1) % spared != 0) for block in range(count)]
    if not isinstance(local, list) or len(local) < count:
        raise config.error(f"no_rope_layers must have a number for each of the {count} blocks")
    return (
        decoder(config, positions=131072, kv_heads=8, head_dim=128)
        | attention_biases(config)
        | windows(config, lambda block: bool(local[block]), config.data.get("attention_chunk_size", 8192))
        | {
            "intermediate_size": config.integer("intermediate_size_mlp", default=16384),
            "mlps": mixed(count, chosen),
            "experts": _experts(config, "num_local_experts", 16, 1, width)
            | {"shared_intermediate_size": width},
            "qk_norm": config.flag("use_qk_norm", True),
            "qk_norm_weights": "none",
        }
    )
