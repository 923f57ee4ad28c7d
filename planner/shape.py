"""A model given by its lengths alone: ``layers=80,hidden=8192,heads=64,kv_heads=8,ffn=28672,vocab=128256``.

Its blocks are LLaMA's (RMSNorm, gated MLP, rotary positions, no biases), or with ``experts`` Mixtral's.
"""

from __future__ import annotations

from typing import Any

from planner.errors import InputError, nearest_names
from planner.model import ModelSpec

NEEDED = ("layers", "hidden", "heads", "ffn", "vocab")
MORE = ("kv_heads", "head_dim", "positions", "experts", "top_k", "expert_ffn", "shared_ffn", "window", "tied")
"""Left out: a key and value head per head, hidden / heads, 2^20 positions, no experts, two of them to a
token, as wide as ``ffn``, none shared, no window, a head of its own (``tied=1`` shares the embedding)."""


def model_from_shape(text: str) -> ModelSpec:
    """The model of a text of lengths. Raises InputError.

    >>> model_from_shape("layers=80,hidden=8192,heads=64,kv_heads=8,ffn=28672,vocab=128256").num_parameters
    70553706496
    """
    from planner.families import model_from_config

    given = _lengths(text)
    missing = [name for name in NEEDED if name not in given]
    if missing:
        raise InputError(
            f"--model {text[:60]!r}: {', '.join(missing)} missing: a shape needs {', '.join(NEEDED)}"
        )
    config: dict[str, Any] = {
        "model_type": "mixtral" if "experts" in given else "llama",
        "num_hidden_layers": given["layers"],
        "hidden_size": given["hidden"],
        "num_attention_heads": given["heads"],
        "num_key_value_heads": given.get("kv_heads", given["heads"]),
        "head_dim": given.get("head_dim"),
        "intermediate_size": given["ffn"],
        "vocab_size": given["vocab"],
        "max_position_embeddings": given.get("positions", 2**20),
        "tie_word_embeddings": bool(given.get("tied", 0)),
    }
    if "experts" in given:
        config |= {"num_local_experts": given["experts"], "num_experts_per_tok": given.get("top_k", 2)}
        config["intermediate_size"] = given.get("expert_ffn", given["ffn"])
    elif alone := [name for name in ("top_k", "expert_ffn", "shared_ffn") if name in given]:
        raise InputError(f"--model: {alone[0]} goes with experts: give experts=8")
    model = model_from_config(
        config, "--model", name=f"shape-{given['layers']}x{given['hidden']}", source=text
    )
    changes: dict[str, Any] = {"intermediate_size": given["ffn"], "sliding_window": given.get("window")}
    if model.experts is not None:
        shared = {"shared_intermediate_size": given.get("shared_ffn", 0)}
        changes["experts"] = model.experts.model_copy(update=shared)
    return model.model_copy(update=changes)


def _lengths(text: str) -> dict[str, int]:
    given: dict[str, int] = {}
    for part in text[:1000].split(","):
        name, equals, value = (piece.strip() for piece in part.lower().partition("="))
        name = name.replace("-", "_")
        if name not in (*NEEDED, *MORE):
            raise InputError(
                f"--model: {name[:40]!r} is no length of a shape: {nearest_names(name, NEEDED + MORE)}"
            )
        if name in given:
            raise InputError(f"--model: {name} is given twice")
        least = 0 if name == "tied" else 1
        digits = value.replace("_", "")
        if not (equals and digits.isascii() and digits.isdigit() and least <= int(digits[:20]) <= 10**9):
            raise InputError(f"--model: {name}={value[:40]!r}: write a whole number, {least} or more")
        given[name] = int(digits)
    return given
