"""Words that rows of a stack are selected by, made of what a model's fields say of its parts."""

from __future__ import annotations

from collections.abc import Iterator

from planner.model import ModelSpec
from strategies.base import Quantity

NORMS_IN_FP32 = ("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "gpt_oss")
"""Families whose RMSNorm multiplies with its weight before it casts back, and so keeps what it normalised in
fp32 (transformers, ``modeling_<family>.py``: ``(self.weight * hidden_states).to(input_dtype)``)."""
SOFTMAX_IN_HALF = ("gpt2", "falcon", "gpt_oss", "bert", "t5")
"""Families whose unfused attention takes the softmax of the scores as they are, not of an fp32 copy."""
TURNED_IN_PARTS = ("phi", "phi3")
"""Families that put turned and unturned parts of queries and keys together, which lays the heads out apart:
the attention's output is copied to lie token by token."""
ALWAYS_MASKED = ("falcon",)
"""Families that hand scaled dot product attention a mask even where it is plainly causal."""


def model_words(model: ModelSpec) -> Iterator[str]:
    """The words of a model's norms, attention and experts."""
    yield f"norms:{model.norm_placement}"
    yield f"head:{model.head}"
    chosen = {
        "norms_in_fp32": model.model_type in NORMS_IN_FP32,
        "softmax_in_half": model.model_type in SOFTMAX_IN_HALF,
        "turned_in_parts": model.model_type in TURNED_IN_PARTS,
        "one_key": model.num_key_value_heads == 1 and model.model_type not in ALWAYS_MASKED,
        "grouped": model.num_key_value_heads < model.num_attention_heads,
        "half_loss": model.kind != "decoder",
        "sinks": model.attention_sinks,
        "attention_gate": model.attention_gate,
        "spread_keys": bool(model.delta and model.delta.num_value_heads > model.delta.num_key_heads),
        "capped_scores": model.attention_softcap is not None,
        "capped_logits": model.logits_softcap is not None,
        "norms_over_heads": model.qk_norm and model.qk_norm_weights == "per_head",
    }
    if model.experts is not None:
        chosen["expert_biases"] = model.experts.biases
    yield from (word for word, holds in chosen.items() if holds)


def part_lengths(model: ModelSpec, batch: Quantity) -> dict[str, Quantity]:
    """Lengths of parts that only some models have, by the names of planner/weights.py.

    ``width`` is the residual stream of a token that was sent to an expert, ``chosen`` how many experts a
    token is sent to, ``joined`` what a module for a further token takes. A product of one sequence takes
    views where that of several copies: of one key and value head for all queries (``copied_heads``), of
    values that lie beside keys (``copied_v``).
    """
    alone = (batch == 1) * 1
    heads = model.num_attention_heads
    found: dict[str, Quantity] = {"copied_heads": heads, "joined": 2 * model.hidden_size}
    if model.num_key_value_heads == 1:
        found["copied_heads"] = heads - (heads - 1) * alone
    if experts := model.experts:
        found |= {
            "experts": experts.num_experts,
            "chosen": experts.num_experts_per_tok,
            "router": experts.num_experts,
            "expert_ffn": experts.intermediate_size,
            "width": model.hidden_size,
            "shared_ffn": experts.shared_intermediate_size,
        }
    if latent := model.latent:
        found |= {
            "q_rank": latent.q_lora_rank or 0,
            "kv_rank": latent.kv_lora_rank,
            "rope_dim": latent.qk_rope_head_dim,
            "qk_dim": latent.qk_nope_head_dim + latent.qk_rope_head_dim,
            "kv_dim": latent.qk_nope_head_dim + latent.v_head_dim,
            "v_dim": latent.v_head_dim,
            "copied_v": latent.v_head_dim + latent.qk_nope_head_dim * alone,
        }
    if space := model.state_space:
        found |= {
            "ssm_heads": space.num_heads,
            "ssm_head_dim": space.head_dim,
            "ssm_groups": space.n_groups,
            "state": space.state_size,
        }
    if net := model.delta:
        found |= {
            "delta_heads": net.num_value_heads,
            "value_dim": net.value_head_dim,
            "delta_key_heads": net.num_key_heads,
            "key_dim": net.key_head_dim,
        }
    return found
