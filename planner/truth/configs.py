"""A planner's ModelSpec back to the configuration that transformers builds it from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planner.errors import InputError
from planner.specs import ModelSpec


def _llama(spec: ModelSpec) -> dict[str, Any]:
    biased = spec.attention_output_bias or (spec.qkv_bias and spec.model_type != "qwen2")
    return {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "hidden_act": spec.hidden_act,
        "attention_bias": biased,
        "mlp_bias": spec.mlp_bias,
        "attention_dropout": spec.attention_dropout,
        **({"sliding_window": spec.sliding_window} if spec.model_type == "mistral" else {}),
    }


def _gpt2(spec: ModelSpec) -> dict[str, Any]:
    return {
        "n_embd": spec.hidden_size,
        "n_layer": spec.num_hidden_layers,
        "n_head": spec.num_attention_heads,
        "n_inner": spec.intermediate_size,
        "n_positions": spec.max_position_embeddings,
        "activation_function": spec.hidden_act,
        "resid_pdrop": spec.dropout,
        "embd_pdrop": spec.dropout,
        "attn_pdrop": spec.attention_dropout,
    }


def _gpt_neox(spec: ModelSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "hidden_act": spec.hidden_act,
        "use_parallel_residual": spec.parallel_residual,
        "attention_bias": spec.qkv_bias,
        "hidden_dropout": spec.dropout,
        "attention_dropout": spec.attention_dropout,
    }


def _opt(spec: ModelSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "word_embed_proj_dim": spec.hidden_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "ffn_dim": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "activation_function": spec.hidden_act,
        "dropout": spec.dropout,
        "attention_dropout": spec.attention_dropout,
    }


def _bloom(spec: ModelSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.hidden_size,
        "n_layer": spec.num_hidden_layers,
        "n_head": spec.num_attention_heads,
        "hidden_dropout": spec.dropout,
        "attention_dropout": spec.attention_dropout,
    }


_WRITERS: dict[str, Callable[[ModelSpec], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bloom": _bloom,
} | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _llama)


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """The values of a ``config.json`` that describe the same model."""
    writer = _WRITERS.get(spec.model_type)
    if writer is None:
        raise InputError(
            f"model_type={spec.model_type} cannot be built from a ModelSpec: give its config.json instead"
        )
    shared = {
        "model_type": spec.model_type,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
    }
    return shared | writer(spec)
