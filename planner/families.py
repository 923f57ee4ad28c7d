"""Hugging Face ``config.json`` to ModelSpec, one small reader per family.

A configuration is data: it is size-bounded, parsed as JSON and looked up by key. Nothing in it is
executed; ``auto_map`` (remote code) is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from os.path import abspath
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planner.errors import InputError
from planner.files import content, plain
from planner.specs import ModelSpec, first_problem

MAX_BYTES = 1_000_000


class _Config:
    """Key look-ups that say what is missing."""

    def __init__(self, data: Mapping[str, Any], origin: str) -> None:
        self.data, self.origin = data, origin

    def need(self, *keys: str) -> Any:
        for key in keys:
            if self.data.get(key) is not None:
                return self.data[key]
        raise InputError(
            f"{self.origin}: {' or '.join(keys)} is missing, which {self.data['model_type']} needs"
        )

    def integer(self, *keys: str) -> int:
        value = self.need(*keys)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9:
            shown = plain(json.dumps(value, default=str), 50)
            raise InputError(f"{self.origin}: {keys[0]}={shown} must be a whole number from 1 to 10^9")
        return value

    def get(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        return default if value is None else value

    def refuse_unless(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        if (value := self.get(key, default)) not in allowed:
            raise InputError(f"{self.origin}: {key}={value!r} is not modelled; {key} must be {allowed[0]!r}")


def _shared(config: _Config, hidden: int, heads: int) -> dict[str, Any]:
    head_dim = config.get("head_dim", None)
    if head_dim is None and hidden % heads:
        raise InputError(
            f"{config.origin}: {heads} heads do not divide hidden size {hidden}, and head_dim is missing"
        )
    return {
        "model_type": config.data["model_type"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim if head_dim is not None else hidden // heads,
        "vocab_size": config.integer("vocab_size"),
    }


def _llama(config: _Config) -> dict[str, Any]:
    heads = config.integer("num_attention_heads")
    config.refuse_unless("hidden_act", ("silu",), "silu")
    attention_bias = bool(config.get("attention_bias", False))
    family = config.data["model_type"]
    qwen = family == "qwen2"
    positions = {"mistral": 131072, "qwen2": 32768, "qwen3": 32768}.get(
        family, 2048
    )  # the config classes' defaults
    return _shared(config, config.integer("hidden_size"), heads) | {
        "num_hidden_layers": config.integer("num_hidden_layers"),
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "intermediate_size": config.integer("intermediate_size"),
        "max_position_embeddings": config.get("max_position_embeddings", positions),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "qkv_bias": qwen or attention_bias,
        "qk_norm": family == "qwen3",
        "sliding_window": config.data.get("sliding_window", 4096) if family == "mistral" else None,
        "attention_output_bias": attention_bias and not qwen,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


_GPT = {
    "gated_mlp": False,
    "norm": "layernorm",
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}


def _gpt2(config: _Config) -> dict[str, Any]:
    hidden = config.integer("n_embd", "hidden_size")
    return (
        _shared(config, hidden, config.integer("n_head", "num_attention_heads"))
        | _GPT
        | {
            "num_hidden_layers": config.integer("n_layer", "num_hidden_layers"),
            "intermediate_size": config.get("n_inner", 4 * hidden),
            "max_position_embeddings": config.integer("n_positions", "max_position_embeddings"),
            "tie_word_embeddings": config.get("tie_word_embeddings", True),
            "hidden_act": config.get("activation_function", "gelu_new"),
            "position_embedding": "learned",
            "dropout": config.get("resid_pdrop", 0.1),
            "attention_dropout": config.get("attn_pdrop", 0.1),
        }
    )


def _gpt_neox(config: _Config) -> dict[str, Any]:
    hidden = config.integer("hidden_size")
    bias = bool(config.get("attention_bias", True))
    return (
        _shared(config, hidden, config.integer("num_attention_heads"))
        | _GPT
        | {
            "num_hidden_layers": config.integer("num_hidden_layers"),
            "intermediate_size": config.integer("intermediate_size"),
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            "hidden_act": config.get("hidden_act", "gelu"),
            "parallel_residual": config.get("use_parallel_residual", True),
            "dropout": config.get("hidden_dropout", 0.0),
            "attention_dropout": config.get("attention_dropout", 0.0),
            "qkv_bias": bias,
            "attention_output_bias": bias,
        }
    )


def _opt(config: _Config) -> dict[str, Any]:
    hidden = config.integer("hidden_size")
    config.refuse_unless("word_embed_proj_dim", (hidden,), hidden)
    config.refuse_unless("do_layer_norm_before", (True,), True)
    config.refuse_unless("enable_bias", (True,), True)
    return (
        _shared(config, hidden, config.integer("num_attention_heads"))
        | _GPT
        | {
            "num_hidden_layers": config.integer("num_hidden_layers"),
            "intermediate_size": config.integer("ffn_dim"),
            "max_position_embeddings": config.integer("max_position_embeddings"),
            "tie_word_embeddings": config.get("tie_word_embeddings", True),
            "hidden_act": config.get("activation_function", "relu"),
            "position_embedding": "learned",
            "position_offset": 2,
            "dropout": config.get("dropout", 0.1),
            "attention_dropout": config.get("attention_dropout", 0.0),
        }
    )


def _bloom(config: _Config) -> dict[str, Any]:
    hidden = config.integer("hidden_size", "n_embed")
    return (
        _shared(config, hidden, config.integer("n_head", "num_attention_heads"))
        | _GPT
        | {
            "num_hidden_layers": config.integer("n_layer", "num_hidden_layers"),
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": config.get("seq_length", 2048),
            "tie_word_embeddings": config.get("tie_word_embeddings", True),
            "hidden_act": "gelu",
            "position_embedding": "alibi",
            "embedding_norm": True,
            "dropout": config.get("hidden_dropout", 0.0),
            "attention_dropout": config.get("attention_dropout", 0.0),
        }
    )


FAMILIES: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bloom": _bloom,
}

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys that only a mixture of experts has, or has above zero."""


def model_from_config(data: Any, origin: str, name: str = "", source: str = "") -> ModelSpec:
    """A ModelSpec from a configuration's keys. Raises InputError; ``origin`` is named in it."""
    if not isinstance(data, dict):
        raise InputError(f"{origin}: a model configuration is a JSON object, not {type(data).__name__}")
    family = data.get("model_type")
    if any(data.get(key) for key in EXPERTS) or str(family).endswith("_moe"):
        kind = f"model_type={str(family)[:60]!r}"
        raise InputError(f"{origin}: {kind}: mixtures of experts are not planned (yet)")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{origin}: model_type={str(family)[:60]!r} is not modelled; known are {', '.join(FAMILIES)}"
        )
    if data.get("quantization_config"):
        raise InputError(f"{origin}: quantized weights are not planned (yet): leave out quantization_config")
    reader = FAMILIES[family](_Config(data, origin))
    label = name or str(data.get("_name_or_path") or "").strip() or _file_name(origin) or family
    try:
        return ModelSpec(name=plain(label, 100) or family, source=source, **reader)
    except ValidationError as error:
        raise InputError(f"{origin}: {first_problem(error)}") from None


def _file_name(origin: str) -> str:
    """What a file calls its model: a ``config.json`` has its folder's name, another file its own."""
    path = Path(abspath(origin))
    return path.parent.name if path.name == "config.json" else path.stem if path.suffix else ""


def read_json(path: Path, what: str) -> Any:
    """A JSON file of at most 1 MB. Raises InputError for all that can be wrong with it."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give a {what}, its folder, or a catalog name")
    data = content(path, MAX_BYTES, what)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise InputError(f"{path}: not JSON: {reason}") from None


def read_config(path: str | PathLike[str]) -> ModelSpec:
    """A ModelSpec from a Hugging Face ``config.json`` or the folder that holds one."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    return model_from_config(read_json(file, "config.json"), str(file))
