"""Google's Gemma: wide heads, tied embeddings, from the second on a sandwich of norms and windows."""

from __future__ import annotations

from planner.families.config import Config, Fields, attention_biases, decoder, every, windows

GELU = "gelu_pytorch_tanh"


def gemma(config: Config) -> Fields:
    """``gemma``: an activation written ``gelu`` means its tanh approximation."""
    config.refuse_unless("use_bidirectional_attention", (False,), False)
    kv_heads = config.integer("num_key_value_heads", default=16)
    fields = decoder(config, positions=8192, kv_heads=kv_heads, head_dim=256, act=GELU, tied=True)
    if fields["hidden_act"] == "gelu":
        fields["hidden_act"] = GELU
    return fields | attention_biases(config)


def _later(config: Config, positions: int) -> Fields:
    config.refuse_unless("use_bidirectional_attention", (False,), False)
    fields = decoder(config, positions=positions, kv_heads=4, head_dim=256, tied=True)
    return (
        fields
        | attention_biases(config)
        | {"hidden_act": config.get("hidden_activation", GELU), "norm_placement": "sandwich"}
    )


def gemma2(config: Config) -> Fields:
    """``gemma2``: every second block sees a window; scores and logits are capped."""
    return (
        _later(config, 8192)
        | windows(config, every(2), config.data.get("sliding_window", 4096))
        | {
            "attention_softcap": config.data.get("attn_logit_softcapping", 50.0),
            "logits_softcap": config.data.get("final_logit_softcapping", 30.0),
        }
    )


def gemma3(config: Config) -> Fields:
    """``gemma3_text``: five blocks of six see a window; queries and keys are normalised head by head."""
    usual = {"vocab_size": 262208, "num_attention_heads": 8}  # left out in the published files of 4B
    given = {key: value for key, value in config.data.items() if value is not None}
    config = Config(usual | given, config.origin)
    pattern = every(config.integer("sliding_window_pattern", default=6))
    return (
        _later(config, 131072)
        | windows(config, pattern, config.data.get("sliding_window", 4096))
        | {
            "qk_norm": True,
            "attention_softcap": config.get("attn_logit_softcapping", None),
            "logits_softcap": config.get("final_logit_softcapping", None),
        }
    )
