"""The layer graph: a decoder, built for a stack, as bills of terms.

Kinds of layer in a row, each a node of a :class:`networkx.DiGraph`: the embedding, the transformer
block (or blocks, where a model has unlike ones; each with its count) and the head with the final norm and
the loss. Their weights are
listed in :mod:`planner.weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.model import Block, ModelSpec
from planner.specs import TrainingSpec
from planner.stacks.base import (
    ALWAYS,
    BYTE,
    COMPUTE,
    FP32,
    GRADIENT,
    INT64,
    UNTIL_FULL,
    Recipe,
    Row,
    Stack,
)
from planner.weights import Weight, block_weights, embedding_weights, head_weights
from planner.words import ALWAYS_MASKED, model_words, part_lengths
from strategies.base import Layer, Quantity, Role, Term

if TYPE_CHECKING:
    import networkx as nx

STEPS = {
    "embedding": ("norm", "embedding"),
    "block": ("shared", "combine", "down", "act", "up", "norm2", "cross", "out", "core", "qkv", "norm1"),
    "head": ("loss", "head", "norm"),
}
"""The steps of a layer's backward, in order: of a block the shared experts, what follows its last product (a
norm on the MLP's output, the sum over a token's experts), the down product, the activation function, the
up (and gate) products, the second norm, the attention to an encoder's output, the attention output product,
the attention core, the query, key and value products, the first norm. A block with parallel residuals runs
the same steps."""
MOMENTS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}
"""Optimizer states per parameter, besides a master copy."""


def features(
    model: ModelSpec, training: TrainingSpec, stack: Stack, block: Block | None = None
) -> frozenset[str]:
    """The words that rows of a stack are selected by, for one kind of block or what lies around them."""
    words = set(stack.words) | {
        model.norm,
        model.model_type,
        f"act:{model.hidden_act}",
        model.position_embedding,
    }
    words |= set(model_words(model))
    words |= {str(training.attention)} | {f"{name}:{value}" for name, value in training.options.items()}
    dropout = model.dropout if training.dropout is None else training.dropout
    attention_dropout = model.attention_dropout if training.dropout is None else training.dropout
    local = block is None or not model.mixers or block.mixer == "window"
    windowed = model.sliding_window if local else None
    chosen = {
        "autocast": training.precision in stack.autocast,
        "traced": model.model_type in stack.traced,
        "fp32": training.precision == "fp32",
        "qk_norm": model.qk_norm,
        "gated": model.gated_mlp,
        "biases": model.mlp_bias,
        "parallel": model.parallel_residual,
        "embedding_norm": model.embedding_norm,
        # A mask of its own leaves the flash kernel, in transformers from a full window on.
        "masked": bool(windowed and (training.seq_length or 0) >= windowed)
        or model.model_type in ALWAYS_MASKED,
        "gathers": stack.casts_weights,
        "qkv_together": model.model_type in ("gpt2", "gpt_neox", "bloom"),
        "fused_qkv": model.model_type in ("gpt2", "gpt_neox"),
        "embedding_dropout": model.model_type in ("gpt2", "gpt_neox", "bert", "vit") and dropout > 0,
        "dropout": dropout > 0,
        "attention_dropout": attention_dropout > 0,
    }
    if block:
        words |= {f"mixer:{block.mixer}", f"mlp:{block.mlp}"}
    return frozenset(words | {word for word, holds in chosen.items() if holds})


UNFUSED = 12.0
ATTENTION_FLOPS = {"eager": UNFUSED, "sdpa": 7.0, "flash": 7.0, "flash1": 7.0}
"""FLOPs per batch x seq x seq_k x head x head_dim, forward and backward: two products of 2 FLOPs
forward, four backward; flash skips the causal half and runs five products backward, which is
half of 4 + 10 (Dao 2023, arXiv:2307.08691, section 4.1)."""
WHOLE = {"bidirectional": 2.0}
"""How much more than causal attention's fused kernels run where all see all."""


class Builder:
    """Turns weights and a stack's rows into terms, for given micro-batches and degrees.

    ``batch``, ``tensor_parallel`` and ``pipeline_parallel`` may be arrays: one bill for a family
    of layouts. The vocabulary is padded to the stack's multiple times ``tensor_parallel``.
    """

    def __init__(
        self,
        model: ModelSpec,
        training: TrainingSpec,
        stack: Stack,
        recipe: Recipe,
        batch: Quantity = 1,
        tensor_parallel: Quantity = 1,
        pipeline_parallel: Quantity = 1,
    ) -> None:
        self.model, self.training, self.stack, self.recipe = model, training, stack, recipe
        multiple = stack.vocabulary_multiple * tensor_parallel
        self.vocab = -(-model.vocab_size // multiple) * multiple
        self.copies = (pipeline_parallel > 1) * 1
        self.dims: dict[str, Quantity] = {
            "batch": batch,
            "seq": training.seq_length,
            "seq_k": training.seq_length,
            "residual": model.hidden_size,
            "hidden": model.hidden_size,
            "heads": model.num_attention_heads,
            "kv_heads": model.num_key_value_heads,
            "head_dim": model.head_dim,
            "ffn": model.intermediate_size,
            "vocab": self.vocab,
            "tensor_group": (tensor_parallel > 1) * 1,
            "tied": model.tie_word_embeddings * (1 - self.copies),
            **part_lengths(model, batch),
        }
        self.width = {COMPUTE: recipe.compute, GRADIENT: stack.autograd_bytes(recipe), FP32: 4.0, BYTE: 1.0}
        self.width[INT64] = 8.0
        self.kinds = model.block_kinds
        self.features = features(model, training, stack)

    def states(self, weight: Weight) -> Iterator[Term]:
        """Parameter, gradient and optimizer states of one weight."""
        recipe = self.recipe
        yield Term(weight.name, Role.PARAMETER, weight.dims, recipe.weight)
        yield Term(weight.name, Role.GRADIENT, weight.dims, recipe.gradient, steps=(weight.step,))
        states = recipe.master + recipe.moment * MOMENTS[self.training.optimizer]
        yield Term(weight.name, Role.OPTIMIZER, weight.dims, states)

    def product(
        self, name: str, dims: dict[str, Quantity], kept_by: tuple[str, ...], active: float = 1.0
    ) -> Term:
        """FLOPs of a matrix product with every token: 2 forward, 4 backward; ``active`` is Weight's."""
        tokens = {"batch": self.dims["batch"], "seq": self.dims["seq"]}
        return Term(name, Role.FLOPS, tokens | dims, 6.0 * active, kept_by)

    def rows(self, rows: tuple[Row, ...], words: frozenset[str] | None = None) -> Iterator[Term]:
        """The rows that apply, with lengths in place of names."""
        for row in rows:
            if row.applies(self.features if words is None else words):
                dims: dict[str, Quantity] = {}
                for word in row.dims.split():
                    name, _, length = word.partition(":")
                    dims[name] = int(length) if length else self.dims[name]
                unit = row.count * self.width[row.dtype]
                yield Term(row.name, row.role, dims, unit, row.kept_by, tuple(row.steps.split()))

    def regions(self, crossings: int, kept_by: tuple[str, ...] = ALWAYS) -> Term:
        """The residual stream as it crosses tensor-parallel regions, forward and backward."""
        dims = {name: self.dims[name] for name in ("batch", "seq", "residual")}
        name = "residual stream across regions"
        return Term(name, Role.MESSAGE, dims | {"crossings": crossings}, self.recipe.compute, kept_by)

    def block(self, kind: Block | None = None) -> Layer:
        """One transformer block of a kind, the first if not said."""
        kind = kind or self.kinds[0]
        terms: list[Term] = []
        for weight in block_weights(self.model, kind):
            terms += self.states(weight)
            if weight.matrix:
                kept = self.stack.rerun.get(weight.name, UNTIL_FULL)
                terms.append(self.product(weight.name, weight.dims, kept, weight.active))
        names = ("batch", "seq", "seq_k", "heads", "head_dim")
        core = {name: self.dims[name] for name in names}
        per_pair = ATTENTION_FLOPS[str(self.training.attention)]
        if per_pair != UNFUSED and kind.mixer in WHOLE:
            per_pair *= WHOLE[kind.mixer]  # nothing is skipped where attention is not causal
        kept = self.stack.rerun.get("attention core", UNTIL_FULL)
        terms.append(Term("attention core", Role.FLOPS, core, per_pair, kept))
        terms += self.rows(self.stack.rows["block"], features(self.model, self.training, self.stack, kind))
        terms.append(self.regions(4, UNTIL_FULL))
        name = "block" if len(self.kinds) == 1 else f"{kind.mixer} {kind.mlp} block"
        return Layer(name, tuple(terms), self.model.blocks.count(kind), STEPS["block"])

    def embedding(self) -> Layer:
        """Word and position embedding."""
        terms = [t for w in embedding_weights(self.model, self.vocab) for t in self.states(w)]
        terms += self.rows(self.stack.rows["embedding"])
        return Layer("embedding", (*terms, self.regions(1)), steps=STEPS["embedding"])

    def head(self) -> Layer:
        """Final norm, head and loss."""
        weights = head_weights(self.model, self.vocab, self.copies)
        terms = [t for w in weights for t in self.states(w)]
        dims = {"vocab": self.vocab, "hidden": self.model.hidden_size}
        if self.model.head != "none":
            terms.append(self.product("head weight", dims, ALWAYS))
        terms += self.rows(self.stack.rows["head"])
        return Layer("head", (*terms, self.regions(1)), steps=STEPS["head"])

    def stage(self) -> Layer:
        """What a stage holds once, however many layers it has."""
        return Layer("stage", tuple(self.rows(self.stack.rows.get("stage", ()))))

    def graph(self) -> nx.DiGraph[str]:
        """The kinds of layer in the order in which a token first meets them."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        layers = (self.embedding(), *map(self.block, self.kinds), self.head())
        for layer in layers:
            graph.add_node(layer.kind, layer=layer)
        nx.add_path(graph, [layer.kind for layer in layers])
        return graph

    def layers(self) -> list[Layer]:
        """The graph's layers, in topological order."""
        import networkx as nx

        graph = self.graph()
        return [graph.nodes[node]["layer"] for node in nx.topological_sort(graph)]
