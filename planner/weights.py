"""A model's weights, listed once: parameters, gradients, optimizer states and FLOPs follow from the list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from planner.model import Block, ModelSpec
from strategies.base import Quantity


@dataclass(frozen=True, slots=True)
class Weight:
    """One kind of weight of a layer; a ``matrix`` is multiplied with every token.

    ``step`` is the step of the layer's backward in which its gradient arises; ``of`` names the products that
    it is an adapter of (planner/adapters.py).
    """

    name: str
    dims: dict[str, Quantity]
    step: str
    matrix: bool = False
    of: str = ""


def block_weights(model: ModelSpec, block: Block) -> Iterator[Weight]:
    """Weights of one transformer block."""
    hidden, ffn = {"hidden": model.hidden_size}, {"ffn": model.intermediate_size}
    queries = {"heads": model.num_attention_heads, "head_dim": model.head_dim}
    keys = {"kv_heads": model.num_key_value_heads, "head_dim": model.head_dim, "pair": 2}
    yield Weight("query weight", hidden | queries, "qkv", matrix=True)
    yield Weight("key and value weights", hidden | keys, "qkv", matrix=True)
    yield Weight("attention output weight", queries | hidden, "out", matrix=True)
    if model.qkv_bias:
        yield Weight("query bias", queries, "qkv")
        yield Weight("key and value biases", keys, "qkv")
    if model.attention_output_bias:
        yield Weight("attention output bias", hidden, "out")
    if model.gated_mlp:
        yield Weight("gate weight", hidden | ffn, "up", matrix=True)
    yield Weight("up weight", hidden | ffn, "up", matrix=True)
    yield Weight("down weight", ffn | hidden, "down", matrix=True)
    if model.mlp_bias:
        yield Weight("up bias", ffn | {"pair": 2 if model.gated_mlp else 1}, "up")
        yield Weight("down bias", hidden, "down")
    yield Weight("norm weights", hidden | {"pair": 2}, "norm1")
    if model.qk_norm:
        yield Weight("query and key norm weights", {"head_dim": model.head_dim, "pair": 2}, "core")
    if model.norm == "layernorm":
        yield Weight("norm biases", hidden | {"pair": 2}, "norm1")


def embedding_weights(model: ModelSpec, vocab: Quantity) -> Iterator[Weight]:
    """Weights before the first block."""
    hidden = {"hidden": model.hidden_size}
    yield Weight("word embedding", {"vocab": vocab} | hidden, "embedding")
    if model.position_embedding == "learned":
        rows = model.max_position_embeddings + model.position_offset
        yield Weight("position embedding", {"positions": rows} | hidden, "embedding")
    if model.embedding_norm:
        yield Weight("embedding norm", hidden | {"pair": 2}, "embedding")


def head_weights(model: ModelSpec, vocab: Quantity, copies: Quantity) -> Iterator[Weight]:
    """Weights after the last block; a tied head has ``copies`` of the embedding (0 or 1)."""
    hidden = {"hidden": model.hidden_size}
    yield Weight("final norm", hidden | {"pair": 2 if model.norm == "layernorm" else 1}, "norm")
    dims = {"vocab": vocab} | hidden
    yield Weight("head weight", dims | {"copies": copies} if model.tie_word_embeddings else dims, "head")


def elements(weights: Iterable[Weight], matrices_only: bool = False) -> int:
    """Parameters of those weights, or of the matrices among them."""
    total = 0
    for weight in weights:
        if weight.matrix or not matrices_only:
            size = 1
            for length in weight.dims.values():
                size *= length
            total += size
    return total


def count_parameters(model: ModelSpec) -> int:
    """Parameters of the whole model: ``L(12h^2 + 13h) + Vh`` and its relatives, exactly."""
    around = elements(embedding_weights(model, model.vocab_size))
    around += elements(head_weights(model, model.vocab_size, copies=0))
    return sum(n * elements(block_weights(model, block)) for block, n in model.runs) + around


def count_matrix_parameters(model: ModelSpec) -> int:
    """Parameters that every token is multiplied with: the blocks' matrices and the head."""
    blocks = sum(n * elements(block_weights(model, block), matrices_only=True) for block, n in model.runs)
    return blocks + model.vocab_size * model.hidden_size
