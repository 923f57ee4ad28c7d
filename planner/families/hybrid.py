"""State spaces and delta nets, by themselves or between attention."""

from __future__ import annotations

from planner.families.config import ATTENTIONS, Config, Fields, attention_biases, decoder, every
from planner.families.moe import sparse_steps

UNLIMITED = 1_000_000_000
"""Positions of a model without any."""


def qwen3_next(config: Config) -> Fields:
    """``qwen3_next``: three of four blocks have a delta net, the others attention behind a gate."""
    count = config.blocks()
    full = config.integer("full_attention_interval", default=4)
    usual = tuple("delta" if every(full)(block) else "full" for block in range(count))
    known = {word: ATTENTIONS[word] for word in ("linear_attention", "full_attention")}
    shared = config.integer("shared_expert_intermediate_size", default=512)
    return (
        decoder(config, positions=32768, kv_heads=2, head_dim=256, rotary=0.25)
        | attention_biases(config)
        | {
            "mixers": config.words("layer_types", known, count) or usual,
            "attention_gate": True,
            "qk_norm": True,
            "delta": {
                "num_key_heads": config.integer("linear_num_key_heads", default=16),
                "num_value_heads": config.integer("linear_num_value_heads", default=32),
                "key_head_dim": config.integer("linear_key_head_dim", default=128),
                "value_head_dim": config.integer("linear_value_head_dim", default=128),
                "conv_kernel": config.integer("linear_conv_kernel_dim", default=4),
            },
            "mlps": sparse_steps(config),
            "experts": {
                "num_experts": config.integer("num_experts", default=512),
                "num_experts_per_tok": config.integer("num_experts_per_tok", default=10),
                "intermediate_size": config.integer("moe_intermediate_size", default=512),
                "shared_intermediate_size": shared,
                "shared_gate": True,
            },
        }
    )


def mamba2(config: Config) -> Fields:
    """``mamba2``: state spaces only, one part and one norm a block."""
    heads, width = config.integer("num_heads", default=128), config.integer("head_dim", default=64)
    hidden, count = config.integer("hidden_size"), config.blocks()
    if hidden * config.integer("expand", default=2) != heads * width:
        raise config.error("expand x hidden_size must be num_heads x head_dim")
    return {
        "model_type": config.family,
        "hidden_size": hidden,
        "num_hidden_layers": count,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width,
        "intermediate_size": heads * width,
        "vocab_size": config.integer("vocab_size"),
        "max_position_embeddings": UNLIMITED,
        "position_embedding": "none",
        "tie_word_embeddings": config.flag("tie_word_embeddings"),
        "hidden_act": config.get("hidden_act", "silu"),
        "mixers": ("mamba",) * count,
        "mlps": ("none",) * count,
        "state_space": {
            "num_heads": heads,
            "head_dim": width,
            "n_groups": config.integer("n_groups", default=8),
            "state_size": config.integer("state_size", default=128),
            "conv_kernel": config.integer("conv_kernel", default=4),
            "chunk_size": config.integer("chunk_size", default=256),
            "conv_bias": config.flag("use_conv_bias", True),
            "bias": config.flag("use_bias"),
        },
    }


def nemotron_h(config: Config) -> Fields:
    """``nemotron_h``: blocks of one part each, as ``hybrid_override_pattern`` says: ``M`` a state space,
    ``*`` attention without positions, ``-`` an MLP of squared ReLU, ``E`` experts.
    """
    config.refuse_unless("moe_latent_size", (None,), None)
    config.refuse_unless("attention_bias", (False,), False)
    config.refuse_unless("tie_word_embeddings", (False,), False)
    parts = {"M": ("mamba", "none"), "*": ("full", "none"), "-": ("none", "dense"), "E": ("none", "experts")}
    letters = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-"}
    letters["moe"] = "E"
    pattern = config.data.get("hybrid_override_pattern")
    if pattern is None:
        listed = config.need("layers_block_type", "layer_types", "hybrid_override_pattern")
        key = "layers_block_type" if config.get("layers_block_type", None) else "layer_types"
        count = len(listed) if isinstance(listed, list) else 0
        pattern = "".join(config.words(key, letters, count) or ())
    if not isinstance(pattern, str) or not pattern or set(pattern) - set(parts):
        raise config.error("hybrid_override_pattern must consist of M, *, - and E")
    if "E" in pattern:  # biases of shared experts, not of routed ones
        config.refuse_unless("mlp_bias", (False,), False)
    config = Config({**config.data, "num_hidden_layers": len(pattern)}, config.origin)
    heads, width = (
        config.integer("mamba_num_heads", default=128),
        config.integer("mamba_head_dim", default=64),
    )
    experts = config.integer("moe_intermediate_size", default=7688)
    shared = config.integer("moe_shared_expert_intermediate_size", default=7688)
    return (
        decoder(config, positions=4096, kv_heads=8, head_dim=config.get("attention_head_dim", 128))
        | {
            "hidden_act": config.get("mlp_hidden_act", "relu2"),
            "gated_mlp": False,
            "mlp_bias": config.flag("mlp_bias"),
            "position_embedding": "none",
            "mixers": tuple(parts[letter][0] for letter in pattern),
            "mlps": tuple(parts[letter][1] for letter in pattern),
            "state_space": {
                "num_heads": heads,
                "head_dim": width,
                "n_groups": config.integer("n_groups", "mamba_n_groups", default=8),
                "state_size": config.integer("ssm_state_size", default=128),
                "conv_kernel": config.integer("conv_kernel", "mamba_d_conv", default=4),
                "chunk_size": config.integer("chunk_size", "mamba_chunk_size", default=128),
                "conv_bias": config.flag("use_conv_bias", config.flag("mamba_conv_bias", True)),
                "bias": config.flag("use_bias"),
            },
        }
        | (
            {
                "experts": {
                    "num_experts": config.integer("n_routed_experts", default=8),
                    "num_experts_per_tok": config.integer("num_experts_per_tok", default=2),
                    "intermediate_size": experts,
                    "shared_intermediate_size": shared,
                }
            }
            if "E" in pattern
            else {}
        )
    )


def bamba(config: Config) -> Fields:
    """``bamba``: state spaces, attention in the blocks of ``attn_layer_indices``, an MLP in all."""
    fields = decoder(config, positions=262144, kv_heads=8, rotary=0.5) | attention_biases(config)
    attention, count = config.indices("attn_layer_indices"), fields["num_hidden_layers"]
    heads = config.integer("mamba_n_heads", default=128)
    inner = config.integer("mamba_expand", default=2) * fields["hidden_size"]
    width = config.get("mamba_d_head", "auto")
    return fields | {
        "mlp_bias": config.flag("mlp_bias"),
        "mixers": tuple("full" if block in attention else "mamba" for block in range(count)),
        "state_space": {
            "num_heads": heads,
            "head_dim": inner // heads if width == "auto" else width,
            "n_groups": config.integer("mamba_n_groups", default=1),
            "state_size": config.integer("mamba_d_state", default=256),
            "conv_kernel": config.integer("mamba_d_conv", default=4),
            "chunk_size": config.integer("mamba_chunk_size", default=256),
            "conv_bias": config.flag("mamba_conv_bias", True),
            "bias": config.flag("mamba_proj_bias"),
        },
    }
