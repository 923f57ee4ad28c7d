"""Shapes and shortcuts that several tests use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner import ClusterSpec, ModelSpec, TrainingSpec
from planner.defaults import Job, resolve
from planner.layers import Builder
from strategies.base import Layer, Role, held
from strategies.layout import Layout, Wire, strategies_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1000,
}
"""A small config.json, as its reader takes it."""


def gpt(layers: int, hidden: int, heads: int, vocab: int = 51200, seq: int = 2048, **more: Any) -> ModelSpec:
    """A GPT as the papers have it: 4h MLP, GELU, LayerNorm, learned positions, tied head, dropout."""
    shape: dict[str, Any] = {
        "name": f"gpt-{hidden}",
        "model_type": "gpt",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocab,
        "max_position_embeddings": seq,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "gated_mlp": False,
        "norm": "layernorm",
        "position_embedding": "learned",
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "dropout": 0.1,
        "attention_dropout": 0.1,
    }
    return ModelSpec(**(shape | more))


def llama(layers: int = 4, hidden: int = 256, heads: int = 8, kv: int = 4, **more: Any) -> ModelSpec:
    """A small LLaMA."""
    shape: dict[str, Any] = {
        "name": f"llama-{hidden}",
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": hidden // heads,
        "intermediate_size": 3 * hidden,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
    }
    return ModelSpec(**(shape | more))


def job_of(model: ModelSpec, gpus: str = "8xA100", **training: Any) -> Job:
    """A resolved job."""
    return resolve(model, ClusterSpec.parse(gpus), TrainingSpec(**training))


def block_of(job: Job, micro_batch_size: int = 1, tensor_parallel: int = 1) -> Layer:
    """The bill of one transformer block."""
    builder = Builder(job.model, job.training, job.stack, job.recipe, micro_batch_size, tensor_parallel)
    return builder.block()


def saved(
    layer: Layer, layout: Layout = Layout(), policy: str = "none", without: tuple[str, ...] = ()
) -> float:
    """Activation bytes that one GPU keeps of one layer and micro-batch, some rows left out."""
    *strategies, _ = strategies_of(layout, Wire(), 0, policy)
    terms = layer.by_role[Role.ACTIVATION]
    return float(sum(held(t, strategies) for t in terms if not any(word in t.name for word in without)))


def states(layer: Layer, layout: Layout = Layout(), matrices: bool = False) -> dict[Role, float]:
    """Model-state bytes of one layer on one GPU; only of its matrices if asked."""
    *strategies, _ = strategies_of(layout, Wire(), 0)
    roles = (Role.PARAMETER, Role.GRADIENT, Role.OPTIMIZER)
    return {
        role: float(sum(held(t, strategies) for t in layer.by_role[role] if not matrices or len(t.dims) > 1))
        for role in roles
    }


# --- What users' files may have ---------------------------------------------------------------------

ANYTHING: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**20, "", "1", "x", "\u202e"),
    *([], [None], [1], ["x"], [[]], [{}], {}, {"x": 1}),
)
"""A value of every kind that JSON has."""


def places(value: Any, *before: Any) -> Iterator[tuple[Any, ...]]:
    """Every place in a document."""
    yield before
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], *before, key)


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A document with another value in a place."""
    if not place:
        return new
    changed = value.copy()
    changed[place[0]] = replaced(value[place[0]], place[1:], new)
    return changed
