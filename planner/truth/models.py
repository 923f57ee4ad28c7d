"""Hugging Face causal language models on fake CUDA tensors, from a configuration that is data.

Only model types that transformers itself has are built; nothing is downloaded or executed from a
configuration (``auto_map`` is dropped).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from planner.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

DROPPED = ("auto_map", "quantization_config", "attn_implementation")
"""Keys of a configuration that would fetch code, or are chosen otherwise here."""
PER_LAYER_KEYS = ("layer_types", "mlp_layer_types")


def build_config(values: Mapping[str, Any], layers: int | None = None) -> Any:
    """A transformers configuration from a ``config.json``'s values, with that many blocks."""
    from transformers import CONFIG_MAPPING

    data = {key: value for key, value in values.items() if key not in DROPPED and key[:1] != "_"}
    kind = data.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise InputError(f"model_type={str(kind)[:50]!r} is not one that transformers itself has")
    kind_of_config = CONFIG_MAPPING[kind]
    if layers is not None:
        name = "num_hidden_layers"
        data.pop(name, None)
        data[kind_of_config.attribute_map.get(name, name)] = layers
        for key in PER_LAYER_KEYS:
            if isinstance(data.get(key), list) and data[key]:
                data[key] = (data[key] * layers)[:layers]
    try:
        config = kind_of_config(**data)
    except Exception as error:  # whatever a configuration class makes of wrong values
        raise InputError(f"transformers refuses this configuration: {_first_line(error)}") from None
    config.use_cache = False
    return config


def build_model(config: Any, attention: str = "sdpa", dtype: str = "bf16") -> Any:
    """The causal language model of a configuration, in training mode. Call it on fake tensors."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=DTYPES[dtype], trust_remote_code=False
            )
    except Exception as error:
        reason = _first_line(error)
        raise InputError(
            f"transformers cannot build this model with attention {attention}: {reason}"
        ) from None
    return model.train()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def blocks_of(model: Any) -> list[Any]:
    """The transformer blocks: the longest list of modules."""
    lists: list[Any] = [one for one in model.modules() if isinstance(one, torch.nn.ModuleList)]
    longest: Any = max(lists, key=len)
    return list(longest)


def final_norm_of(model: Any) -> Any:
    """The norm after the last block: the last one beside the list of blocks."""
    blocks = blocks_of(model)
    for parent in model.modules():
        children = list(parent.children())
        if any(isinstance(one, torch.nn.ModuleList) and list(one) == blocks for one in children):
            return [one for one in children if "norm" in type(one).__name__.lower()][-1]
    raise InputError("no final norm was found beside the blocks: use wrapping blocks")
