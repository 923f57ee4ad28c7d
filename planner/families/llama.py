"""LLaMA's relatives: gated MLPs and rotary positions, one dense MLP in each block."""

from __future__ import annotations

from planner.families.config import Config, Fields, attention_biases, decoder, every, windows


def llama(config: Config) -> Fields:
    """``llama``."""
    config.refuse_unless("hidden_act", ("silu",), "silu")
    fields = decoder(config, positions=2048) | attention_biases(config)
    return fields | {"mlp_bias": config.flag("mlp_bias")}


def mistral(config: Config) -> Fields:
    """``mistral``: all blocks see a window, 4,096 tokens unless it says null."""
    config.refuse_unless("hidden_act", ("silu",), "silu")
    window = config.data.get("sliding_window", 4096)
    return decoder(config, positions=131072, kv_heads=8) | {"sliding_window": window}


def ministral(config: Config) -> Fields:
    """``ministral``: windows block by block."""
    window = config.data.get("sliding_window", 4096)
    return decoder(config, positions=131072, kv_heads=8) | windows(config, lambda block: True, window)


def qwen_windows(config: Config) -> Fields:
    """Windows of the Qwen family: switched off unless it says otherwise, then from some block on."""
    window = config.get("sliding_window", 4096) if config.flag("use_sliding_window") else None
    first = config.integer("max_window_layers", default=28, least=0)
    return windows(config, lambda block: block >= first, window)


def qwen2(config: Config) -> Fields:
    """``qwen2``: biases of queries, keys and values."""
    config.refuse_unless("hidden_act", ("silu",), "silu")
    return decoder(config, positions=32768, kv_heads=32) | qwen_windows(config) | {"qkv_bias": True}


def qwen3(config: Config) -> Fields:
    """``qwen3``: queries and keys are normalised head by head."""
    config.refuse_unless("hidden_act", ("silu",), "silu")
    fields = decoder(config, positions=32768, kv_heads=32, head_dim=128) | attention_biases(config)
    return fields | qwen_windows(config) | {"qk_norm": True}


def phi3(config: Config) -> Fields:
    """``phi3``: phi-4 too."""
    fields = decoder(config, positions=4096)
    window, dropout = config.get("sliding_window", None), config.get("resid_pdrop", 0.0)
    return fields | {"sliding_window": window, "dropout": dropout}


def granite(config: Config) -> Fields:
    """``granite``: its multipliers change no shape."""
    return decoder(config, positions=2048) | attention_biases(config) | {"mlp_bias": config.flag("mlp_bias")}


def smollm3(config: Config) -> Fields:
    """``smollm3``: every fourth block has no positions, which changes no shape."""
    config.refuse_unless("use_sliding_window", (False,), False)
    fields = decoder(config, positions=32768, kv_heads=4, tied=True) | attention_biases(config)
    return fields | {"mlp_bias": config.flag("mlp_bias")}


def seed_oss(config: Config) -> Fields:
    """``seed_oss``: biases of queries, keys and values unless it says otherwise."""
    fields = decoder(config, positions=524288, kv_heads=8, head_dim=128)
    return fields | {
        "qkv_bias": config.flag("attention_bias", True),
        "attention_output_bias": config.flag("attention_out_bias"),
        "mlp_bias": config.flag("mlp_bias"),
        "attention_dropout": config.get("attention_dropout", 0.1),
        "dropout": config.get("residual_dropout", 0.1),
    }


def arcee(config: Config) -> Fields:
    """``arcee``: squared ReLU without a gate."""
    fields = decoder(config, positions=4096, act="relu2") | attention_biases(config)
    return fields | {"gated_mlp": False, "mlp_bias": config.flag("mlp_bias")}


def olmo(config: Config) -> Fields:
    """``olmo``: LayerNorm that learns nothing."""
    fields = decoder(config, positions=2048) | attention_biases(config)
    return fields | {"norm": "layernorm", "norm_vectors": 0}


def olmo2(config: Config) -> Fields:
    """``olmo2``: norms on the parts' outputs; queries and keys are normalised over all heads."""
    fields = decoder(config, positions=2048) | attention_biases(config)
    return fields | {"norm_placement": "output", "qk_norm": True, "qk_norm_weights": "per_head"}


def olmo3(config: Config) -> Fields:
    """``olmo3``: ``olmo2`` with windows in three of four blocks."""
    return olmo2(config) | windows(config, every(4), config.data.get("sliding_window", 4096))


def stablelm(config: Config) -> Fields:
    """``stablelm``: LayerNorm; with parallel residuals one for both parts."""
    parallel = config.flag("use_parallel_residual")
    return decoder(config, positions=4096, kv_heads=32, rotary=0.25) | {
        "norm": "layernorm",
        "norm_placement": "shared" if parallel else "pre",
        "parallel_residual": parallel,
        "qkv_bias": config.flag("use_qkv_bias"),
        "qk_norm": config.flag("qk_layernorm"),
        "qk_norm_weights": "per_head",
        "dropout": config.get("hidden_dropout", 0.0),
    }


def glm4(config: Config) -> Fields:
    """``glm4``: norms before the parts and on their outputs."""
    fields = decoder(config, positions=131072, kv_heads=2, head_dim=128, rotary=0.5)
    return fields | {"norm_placement": "sandwich", "qkv_bias": config.flag("attention_bias", True)}


def cohere(config: Config) -> Fields:
    """``cohere``: one LayerNorm without bias before both parts of a parallel block."""
    return (
        decoder(config, positions=8192, tied=True)
        | attention_biases(config)
        | {
            "norm": "layernorm",
            "norm_vectors": 1,
            "norm_placement": "shared",
            "parallel_residual": True,
            "qk_norm": config.flag("use_qk_norm") and config.family == "cohere",
            "qk_norm_weights": "per_head",
        }
    )


def cohere2(config: Config) -> Fields:
    """``cohere2``: ``cohere`` with windows in three of four blocks; queries and keys as they are."""
    pattern = every(config.integer("sliding_window_pattern", default=4))
    return cohere(config) | windows(config, pattern, config.data.get("sliding_window", 4096))


def nemotron(config: Config) -> Fields:
    """``nemotron``: squared ReLU without a gate, LayerNorm."""
    fields = decoder(config, positions=4096, act="relu2", rotary=0.5) | attention_biases(config)
    return fields | {"norm": "layernorm", "gated_mlp": False, "mlp_bias": config.flag("mlp_bias")}
