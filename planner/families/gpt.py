"""GPT's relatives: LayerNorm and MLPs without a gate."""

from __future__ import annotations

from planner.families.config import Config, Fields, decoder, sizes

BIASED: Fields = {
    "gated_mlp": False,
    "norm": "layernorm",
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}


def gpt2(config: Config) -> Fields:
    """``gpt2``: learned positions."""
    config.refuse_unless("add_cross_attention", (False,), False)
    hidden = config.integer("n_embd", "hidden_size")
    return (
        sizes(config, hidden, config.integer("n_head", "num_attention_heads"))
        | BIASED
        | {
            "num_hidden_layers": config.blocks("n_layer", "num_hidden_layers"),
            "intermediate_size": config.get("n_inner", 4 * hidden),
            "max_position_embeddings": config.integer("n_positions", "max_position_embeddings"),
            "tie_word_embeddings": config.flag("tie_word_embeddings", True),
            "hidden_act": config.get("activation_function", "gelu_new"),
            "position_embedding": "learned",
            "dropout": config.get("resid_pdrop", 0.1),
            "attention_dropout": config.get("attn_pdrop", 0.1),
        }
    )


def gpt_bigcode(config: Config) -> Fields:
    """``gpt_bigcode``: GPT-2 with one key and value head, unless it says otherwise."""
    one = config.flag("multi_query", True)
    fields = gpt2(config) | {"hidden_act": config.get("activation_function", "gelu_pytorch_tanh")}
    return fields | ({"num_key_value_heads": 1} if one else {})


def gptj(config: Config) -> Fields:
    """``gptj``: parallel residuals behind one norm, biases of MLP and head only."""
    hidden = config.integer("n_embd", "hidden_size")
    heads = config.integer("n_head", "num_attention_heads")
    return sizes(config, hidden, heads) | {
        "num_hidden_layers": config.blocks("n_layer", "num_hidden_layers"),
        "intermediate_size": config.get("n_inner", 4 * hidden),
        "max_position_embeddings": config.integer("n_positions", "max_position_embeddings", default=2048),
        "tie_word_embeddings": config.flag("tie_word_embeddings"),
        "hidden_act": config.get("activation_function", "gelu_new"),
        "rotary_fraction": min(1.0, config.integer("rotary_dim", default=64) / max(1, hidden // heads)),
        "dropout": config.get("resid_pdrop", 0.0),
        "attention_dropout": config.get("attn_pdrop", 0.0),
        "gated_mlp": False,
        "mlp_bias": True,
        "norm": "layernorm",
        "norm_placement": "shared",
        "parallel_residual": True,
        "head_bias": True,
    }


def gpt_neo(config: Config) -> Fields:
    """``gpt_neo``: ``local`` blocks see a window; no biases of queries, keys and values."""
    hidden = config.integer("hidden_size")
    layers = config.blocks("num_layers", "num_hidden_layers")
    mixers: list[str] = []
    pattern = config.get("attention_types", [[["global", "local"], 12]])
    try:
        for kinds, times in pattern[:layers]:
            mixers += [{"global": "full", "local": "window"}[kind] for kind in kinds] * min(times, layers)
    except (KeyError, TypeError, ValueError):
        raise config.error("attention_types is not modelled; write [[['global', 'local'], 12]]") from None
    return (
        sizes(config, hidden, config.integer("num_heads", "num_attention_heads"))
        | BIASED
        | {
            "num_hidden_layers": layers,
            "intermediate_size": config.get("intermediate_size", 4 * hidden),
            "max_position_embeddings": config.integer("max_position_embeddings", default=2048),
            "tie_word_embeddings": config.flag("tie_word_embeddings", True),
            "hidden_act": config.get("activation_function", "gelu_new"),
            "position_embedding": "learned",
            "qkv_bias": False,
            "mixers": mixers,
            "sliding_window": config.integer("window_size", default=256),
            "dropout": config.get("resid_dropout", 0.0),
            "attention_dropout": config.get("attention_dropout", 0.0),
        }
    )


def gpt_neox(config: Config) -> Fields:
    """``gpt_neox``: parallel residuals, a norm for each part."""
    hidden, bias = config.integer("hidden_size"), config.flag("attention_bias", True)
    return (
        sizes(config, hidden, config.integer("num_attention_heads"))
        | BIASED
        | {
            "num_hidden_layers": config.blocks(),
            "intermediate_size": config.integer("intermediate_size"),
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "tie_word_embeddings": config.flag("tie_word_embeddings"),
            "hidden_act": config.get("hidden_act", "gelu"),
            "parallel_residual": config.flag("use_parallel_residual", True),
            "rotary_fraction": config.get("rotary_pct", 0.25),
            "dropout": config.get("hidden_dropout", 0.0),
            "attention_dropout": config.get("attention_dropout", 0.0),
            "qkv_bias": bias,
            "attention_output_bias": bias,
        }
    )


def opt(config: Config) -> Fields:
    """``opt``: learned positions from the third row on; opt-350m, with norms after the sum, is refused."""
    hidden = config.integer("hidden_size")
    config.refuse_unless("word_embed_proj_dim", (hidden,), hidden)
    config.refuse_unless("do_layer_norm_before", (True,), True)
    config.refuse_unless("enable_bias", (True,), True)
    config.refuse_unless("layer_norm_elementwise_affine", (True,), True)
    config.refuse_unless("_remove_final_layer_norm", (False,), False)
    return (
        sizes(config, hidden, config.integer("num_attention_heads"))
        | BIASED
        | {
            "num_hidden_layers": config.blocks(),
            "intermediate_size": config.integer("ffn_dim"),
            "max_position_embeddings": config.integer("max_position_embeddings"),
            "tie_word_embeddings": config.flag("tie_word_embeddings", True),
            "hidden_act": config.get("activation_function", "relu"),
            "position_embedding": "learned",
            "position_offset": 2,
            "dropout": config.get("dropout", 0.1),
            "attention_dropout": config.get("attention_dropout", 0.0),
        }
    )


def bloom(config: Config) -> Fields:
    """``bloom``: ALiBi, and a norm behind the embedding."""
    hidden = config.integer("hidden_size", "n_embed")
    return (
        sizes(config, hidden, config.integer("n_head", "num_attention_heads"))
        | BIASED
        | {
            "num_hidden_layers": config.blocks("n_layer", "num_hidden_layers"),
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": config.get("seq_length", 2048),
            "tie_word_embeddings": config.flag("tie_word_embeddings", True),
            "hidden_act": "gelu",
            "position_embedding": "alibi",
            "embedding_norm": True,
            "dropout": config.get("hidden_dropout", 0.0),
            "attention_dropout": config.get("attention_dropout", 0.0),
        }
    )


def falcon(config: Config) -> Fields:
    """``falcon``: the 7B's blocks have one key and value head and one norm for both parts, the 40B's (the
    "new decoder architecture") groups of heads and two norms, the first ones (``falcon-rw``) parts in
    turn. Norms have biases, products where ``bias`` says so.
    """
    hidden = config.integer("hidden_size", "n_embed")
    heads = config.integer("num_attention_heads", "n_head")
    new, bias = config.flag("new_decoder_architecture"), config.flag("bias")
    parallel = config.flag("parallel_attn", True)
    norms = config.get("num_ln_in_parallel_attn", 2 if new else 1)
    config.refuse_unless("num_ln_in_parallel_attn", (2, 1) if new else (1,), norms)
    if new:
        config.refuse_unless("parallel_attn", (True,), True)
    if new:
        kv = config.integer("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv = 1 if config.flag("multi_query", True) else heads
    return sizes(config, hidden, heads) | {
        "num_hidden_layers": config.blocks("num_hidden_layers", "n_layer"),
        "num_key_value_heads": kv,
        "head_dim": hidden // heads,
        "intermediate_size": config.get("ffn_hidden_size", 4 * hidden),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "tie_word_embeddings": config.flag("tie_word_embeddings", True),
        "hidden_act": config.get("activation", "gelu"),
        "position_embedding": "alibi" if config.flag("alibi") else "rotary",
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_placement": "shared" if parallel and norms == 1 else "pre",
        "parallel_residual": parallel,
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bias,
        "dropout": config.get("hidden_dropout", 0.0),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def phi(config: Config) -> Fields:
    """``phi``: parallel residuals behind one norm, biases everywhere, of the head too."""
    config.refuse_unless("qk_layernorm", (False,), False)
    return (
        decoder(config, positions=2048, act="gelu_new", rotary=0.5)
        | BIASED
        | {
            "norm_placement": "shared",
            "parallel_residual": True,
            "head_bias": True,
            "dropout": config.get("resid_pdrop", 0.0),
        }
    )


def mpt(config: Config) -> Fields:
    """``mpt``: ALiBi, and no biases, of norms neither."""
    config.refuse_unless("no_bias", (True,), True)
    config.refuse_unless("expansion_ratio", (4,), 4)
    attention = config.get("attn_config", {})
    if not isinstance(attention, dict):
        raise config.error("attn_config must be an object")
    inner = Config({"model_type": "mpt"} | attention, config.origin)
    inner.refuse_unless("attn_type", ("multihead_attention",), "multihead_attention")
    inner.refuse_unless("qk_ln", (False,), False)
    inner.refuse_unless("alibi", (True,), True)
    hidden = config.integer("d_model", "hidden_size")
    heads = config.integer("n_heads", "num_attention_heads")
    return sizes(config, hidden, heads) | {
        "num_hidden_layers": config.blocks("n_layers", "num_hidden_layers"),
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": config.integer("max_seq_len", default=2048),
        "tie_word_embeddings": config.flag("tie_word_embeddings", True),
        "hidden_act": "gelu",
        "position_embedding": "alibi",
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_vectors": 1,
        "dropout": config.get("resid_pdrop", 0.0),
        "attention_dropout": inner.get("attn_pdrop", 0.0),
    }


def starcoder2(config: Config) -> Fields:
    """``starcoder2``: rotary positions, all blocks see the window if there is one."""
    bias = config.flag("use_bias", True)
    fields = decoder(config, positions=4096, kv_heads=2, act="gelu_pytorch_tanh", tied=True) | BIASED
    return (
        fields
        | dict.fromkeys(("qkv_bias", "attention_output_bias", "mlp_bias"), bias)
        | {
            "sliding_window": config.get("sliding_window", None),
            "dropout": config.get("residual_dropout", 0.0),
        }
    )
