"""ModelSpec to the ``config.json`` that transformers builds the model from: planner/families the other way.

What a ModelSpec does not have (the base of rotary positions, the norms' epsilon, ids of special tokens) is
left to the family's configuration class. Every configuration is read back before it is given out: one that
would be another model is refused. Keys are those of transformers 5.23, models/*/configuration_*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.errors import InputError
from planner.files import plain
from planner.model import ModelSpec

Values = dict[str, Any]

DECODER = {
    name: name
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
        "hidden_act",
        "attention_dropout",
    )
}
"""Keys that most decoders have, and the fields of a ModelSpec that they are."""
GPT2 = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
    "resid_pdrop": "dropout",
    "embd_pdrop": "dropout",
    "attn_pdrop": "attention_dropout",
}
BLOOM = {
    "hidden_size": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "seq_length": "max_position_embeddings",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
}
OPT = {
    "hidden_size": "hidden_size",
    "word_embed_proj_dim": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "activation_function": "hidden_act",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
}
FALCON = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "activation": "hidden_act",
    "bias": "qkv_bias",
    "parallel_attn": "parallel_residual",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
}
WORDS = {"full": "full_attention", "window": "sliding_attention"}


def _windows(spec: ModelSpec) -> Values:
    """Which blocks see a window; none, if they are not told apart."""
    window = {"sliding_window": spec.sliding_window}
    return window | ({"layer_types": [WORDS.get(one, one) for one in spec.mixers]} if spec.mixers else {})


def _qwen_windows(spec: ModelSpec) -> Values:
    some = spec.sliding_window is not None
    return {"use_sliding_window": some} | (_windows(spec) if some else {})


def _attention_bias(spec: ModelSpec) -> Values:
    return {"attention_bias": spec.attention_output_bias}


def _routed(spec: ModelSpec, number: str, width: str = "intermediate_size") -> Values:
    assert spec.experts is not None
    per_token = {"num_experts_per_tok": spec.experts.num_experts_per_tok}
    return {number: spec.experts.num_experts, width: spec.experts.intermediate_size} | per_token


def _qwen3_moe(spec: ModelSpec) -> Values:
    dense = [index for index, mlp in enumerate(spec.mlps) if mlp == "dense"]
    return (
        {"intermediate_size": spec.intermediate_size, "decoder_sparse_step": 1, "mlp_only_layers": dense}
        | _routed(spec, "num_experts", "moe_intermediate_size")
        | _attention_bias(spec)
        | _qwen_windows(spec)
    )


def _deepseek(spec: ModelSpec) -> Values:
    assert spec.experts is not None
    assert spec.latent is not None
    one = spec.experts.intermediate_size
    return (
        _routed(spec, "n_routed_experts", "moe_intermediate_size")
        | spec.latent.model_dump()
        | {
            "n_shared_experts": spec.experts.shared_intermediate_size // one,
            "first_k_dense_replace": spec.mlps.count("dense"),
            "num_nextn_predict_layers": spec.mtp_layers,
            "attention_bias": False,
        }
        # The usual eight groups of experts, as in the published models, take two experts each at least.
        | ({"n_group": 1, "topk_group": 1} if spec.experts.num_experts % 16 else {})
    )


def _falcon(spec: ModelSpec) -> Values:
    grouped = spec.num_key_value_heads not in (1, spec.num_attention_heads)
    new = grouped or (spec.parallel_residual and spec.norm_placement == "pre")
    return {
        "new_decoder_architecture": new,
        "multi_query": spec.num_key_value_heads == 1,
        "alibi": spec.position_embedding == "alibi",
        "num_ln_in_parallel_attn": 2 if new and spec.norm_placement == "pre" else 1,
    }


def _gemma_later(spec: ModelSpec) -> Values:
    caps = {"attn_logit_softcapping": spec.attention_softcap, "final_logit_softcapping": spec.logits_softcap}
    return {"hidden_activation": spec.hidden_act} | caps | _attention_bias(spec) | _windows(spec)


Writer = Callable[[ModelSpec], Values]
WRITERS: Mapping[str, tuple[Mapping[str, str], Writer]] = {
    "llama": (DECODER, lambda s: _attention_bias(s) | {"mlp_bias": s.mlp_bias}),
    "mistral": (DECODER, lambda s: {"sliding_window": s.sliding_window}),
    "qwen2": (DECODER, _qwen_windows),
    "qwen3": (DECODER, lambda s: _attention_bias(s) | _qwen_windows(s)),
    "phi3": (
        DECODER,
        lambda s: {
            "sliding_window": s.sliding_window,
            "resid_pdrop": s.dropout,
            "partial_rotary_factor": s.rotary_fraction,
        },
    ),
    "olmo2": (DECODER, _attention_bias),
    "gemma": (DECODER, _attention_bias),
    "gemma2": (DECODER, _gemma_later),
    "gemma3_text": (DECODER, _gemma_later),
    "phi": (
        DECODER,
        lambda s: {"resid_pdrop": s.dropout, "partial_rotary_factor": s.rotary_fraction},
    ),
    "starcoder2": (
        DECODER,
        lambda s: {
            "use_bias": s.qkv_bias,
            "sliding_window": s.sliding_window,
            "residual_dropout": s.dropout,
            "embedding_dropout": s.dropout,
        },
    ),
    "gpt2": (GPT2, lambda s: {}),
    "gpt_neox": (
        DECODER,
        lambda s: {
            "rotary_pct": s.rotary_fraction,
            "use_parallel_residual": s.parallel_residual,
            "attention_bias": s.qkv_bias,
            "hidden_dropout": s.dropout,
        },
    ),
    "opt": (OPT, lambda s: {}),
    "bloom": (BLOOM, lambda s: {}),
    "falcon": (FALCON, _falcon),
    "mixtral": (
        DECODER,
        lambda s: {"sliding_window": s.sliding_window} | _routed(s, "num_local_experts"),
    ),
    "olmoe": (DECODER, lambda s: _attention_bias(s) | _routed(s, "num_experts")),
    "qwen3_moe": (DECODER, _qwen3_moe),
    "deepseek_v2": (DECODER, _deepseek),
    "deepseek_v3": (DECODER, _deepseek),
    "gpt_oss": (
        DECODER,
        lambda s: _attention_bias(s) | _windows(s) | _routed(s, "num_local_experts"),
    ),
}
"""Families that can be written: keys that are fields of a ModelSpec, and what the others follow from."""
NO_HEAD_DIM = ("deepseek_v2", "deepseek_v3", "gpt_neox")
"""Families that use the key otherwise, or take it from other lengths."""
UNSAID = ("name", "source")
"""Fields that no key says."""


def config_of(spec: ModelSpec) -> Values:
    """The values of a ``config.json`` of the same model. Raises InputError for one that cannot be said so.

    >>> config_of(ModelSpec.from_catalog("llama-2-7b"))["num_hidden_layers"]
    32
    """
    from planner.families import model_from_config

    shown = plain(spec.name, 60)
    if spec.model_type not in WRITERS:
        raise InputError(
            f"{shown}: model_type={plain(spec.model_type, 50)} cannot be built from a ModelSpec: give its "
            f"config.json instead; written are {', '.join(WRITERS)}"
        )
    keys, others = WRITERS[spec.model_type]
    values: Values = {"model_type": spec.model_type}
    values |= {key: getattr(spec, field) for key, field in keys.items()}
    values |= {"vocab_size": spec.vocab_size, "tie_word_embeddings": spec.tie_word_embeddings}
    # The usual ids of special tokens may lie beyond a small vocabulary; nothing is padded or generated.
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | others(spec)
    if spec.model_type in NO_HEAD_DIM:
        del values["head_dim"]
    read = model_from_config(values, shown, name=spec.name)
    for field in ModelSpec.model_fields:
        if field not in UNSAID and getattr(read, field) != getattr(spec, field):
            have, get = (plain(str(getattr(one, field)), 60) for one in (spec, read))
            raise InputError(
                f"{shown}: {field}={have} is no {spec.model_type} model's, which has {get}: give a model "
                "whose config.json transformers reads"
            )
    return values
