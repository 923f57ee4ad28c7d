"""The layer graph: a decoder, built for a stack, as bills of terms.

Kinds of layer in a row, each a node of a :class:`networkx.DiGraph`: the embedding, the transformer
block (or blocks, where a model has unlike ones; each with its count) and the head with the final norm and
the loss. Their weights are
listed in :mod:`planner.weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from planner import frozen, mtp
from planner.adapter_rows import adapter_rows
from planner.adapters import Tuning
from planner.model import Block, Experts, Mixer, ModelSpec, Trained
from planner.optimizers import in_backward, optimizer_named, resident, tensor_of
from planner.specs import TrainingSpec
from planner.stacks.base import (
    ALWAYS,
    BYTE,
    CAST,
    CAST_WEIGHT,
    COMPUTE,
    FP32,
    GRADIENT,
    INT64,
    UNTIL_FULL,
    Recipe,
    Row,
    Stack,
)
from planner.steps import STEPS
from planner.weights import Weight, block_weights, embedding_weights, head_weights
from planner.words import ALWAYS_MASKED, model_words, part_lengths
from strategies.base import Layer, Quantity, Role, Term

if TYPE_CHECKING:
    import networkx as nx


def features(
    model: ModelSpec, training: TrainingSpec, stack: Stack, block: Block | None = None
) -> frozenset[str]:
    """The words that rows of a stack are selected by, for one kind of block or what lies around them."""
    words = {*stack.words, *stack.precision_words} | {
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
        # Under adapters the frozen weights are in half precision, and autocast has nothing to cast.
        "autocast": training.precision in stack.autocast and not training.adapters,
        "fp32": training.precision in ("fp32", "tf32"),
        "traced": model.model_type in stack.traced,
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
        chosen |= {"attends": block.mixer in ATTENTION, "mixes": block.mixer != "none"}
        chosen["feeds"] = block.mlp != "none"
        chosen["gated"] = model.gated_mlp and block.mlp != "none"
        chosen["latent"] = model.latent is not None and block.mixer in ("full", "window")
        chosen["query_rank"] = bool(chosen["latent"] and model.latent and model.latent.q_lora_rank)
        shared = bool(model.experts and model.experts.shared_intermediate_size)
        chosen["shared"] = block.mlp == "experts" and shared
        chosen["shared_gate"] = bool(chosen["shared"] and model.experts and model.experts.shared_gate)
    return frozenset(words | {word for word, holds in chosen.items() if holds})


ATTENTION: tuple[Mixer, ...] = ("full", "window", "bidirectional", "cross")
UNFUSED = 12.0
ATTENTION_FLOPS = {"eager": UNFUSED, "sdpa": 7.0, "flash": 7.0, "flash1": 7.0}
"""FLOPs per batch x seq x seq_k x head x head_dim, forward and backward: two products of 2 FLOPs
forward, four backward; flash skips the causal half and runs five products backward, which is
half of 4 + 10 (Dao 2023, arXiv:2307.08691, section 4.1)."""


def pairs_per_query(kind: Block, seq_length: float, window: int | None) -> float:
    """Keys that a fused kernel has for a query, in units of those that a causal one has: ``s / 2`` of ``s``.

    A window of ``w`` leaves ``s w - w^2 / 2`` pairs of ``s^2 / 2``; without a mask there are twice as many,
    and attention to an encoder's output, as long, comes on top of a decoder's own.
    """
    if kind.mixer == "cross":
        return 3 * seq_length
    if kind.mixer == "bidirectional":
        return 2 * seq_length
    if kind.mixer == "window" and window and window < seq_length:
        return 2 * window - window**2 / seq_length
    return seq_length


def routed(experts: Experts, training: TrainingSpec, expert_parallel: Quantity) -> Quantity:
    """How many copies of a token the experts of the fullest GPU have, over the tokens that it sends.

    Padded to a capacity (``expert_capacity_factor``) all experts have equally many; else, where they lie on
    several GPUs, the fullest has ``expert_imbalance`` times the average.
    """
    copies = experts.num_experts_per_tok
    if training.expert_capacity_factor:
        return copies * training.expert_capacity_factor
    return copies * (1 + (training.expert_imbalance - 1) * (expert_parallel > 1))


def there(flags: Any) -> Quantity:
    """Which of a family of layouts has something: 1 or 0 each, or a plain 0 if none has."""
    return flags * 1 if np.any(flags) else 0


def nothing(length: Quantity) -> bool:
    """Is a length zero for a whole family of layouts?"""
    return isinstance(length, int) and length == 0


class Builder:
    """Turns weights and a stack's rows into terms, for given micro-batches and degrees.

    ``batch``, ``tensor_parallel``, ``pipeline_parallel``, ``context_heads`` (does context parallelism hand
    out heads? 0 or 1) and ``expert_parallel`` may be arrays: one bill for a family of layouts. The vocabulary
    is padded to the stack's multiple times ``tensor_parallel``.
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
        context_heads: Quantity = 0,
        expert_parallel: Quantity = 1,
        data_shards: Quantity = 1,
    ) -> None:
        self.model, self.training, self.stack, self.recipe = model, training, stack, recipe
        multiple = stack.vocabulary_multiple * tensor_parallel
        self.vocab = -(-model.vocab_size // multiple) * multiple
        self.copies = (pipeline_parallel > 1) * 1
        self.context_heads = context_heads
        self.dims: dict[str, Quantity] = {
            "batch": batch,
            "seq": training.seq_length,
            "seq_k": training.seq_length,
            "residual": model.hidden_size,
            "hidden": model.hidden_size,
            "heads": model.num_attention_heads,
            "kv_heads": self.key_heads(tensor_parallel),
            "gathered_heads": model.num_attention_heads + 2 * model.num_key_value_heads,
            "key_head_alone": there(tensor_parallel >= model.num_key_value_heads),
            "repeats": int(stack.repeats_heads) and there(tensor_parallel > model.num_key_value_heads),
            "head_dim": model.head_dim,
            "ffn": model.intermediate_size,
            "vocab": self.vocab,
            "tensor_group": (tensor_parallel > 1) * 1,
            "expert_group": (expert_parallel > 1) * 1,
            "tied": model.tie_word_embeddings * (1 - self.copies),
            **part_lengths(model, batch),
        }
        if model.experts:
            self.dims["routed"] = routed(model.experts, training, expert_parallel)
        self.width = {COMPUTE: recipe.compute, GRADIENT: stack.autograd_bytes(recipe), FP32: 4.0, BYTE: 1.0}
        self.width |= {INT64: 8.0, CAST: recipe.cast, CAST_WEIGHT: recipe.cast_weight}
        self.blocks = frozen.blocks_of(model, training)
        self.kinds = tuple(dict.fromkeys(self.blocks))
        self.features = features(model, training, stack)
        self.optimizer, self.shards = optimizer_named(training.optimizer), data_shards
        self.in_backward = in_backward(training.optimizer, training.options)
        self.tuning = Tuning(model, training, stack, recipe)
        if training.adapters or training.frozen.embeddings:
            self.dims["tied"] = 0  # whose head has no gradient

    def key_heads(self, tensor_parallel: Quantity) -> Quantity:
        """Key and value heads of all ranks of a tensor-parallel group together: one each, at least."""
        heads = self.model.num_key_value_heads
        more = there(tensor_parallel > heads) if self.stack.repeats_heads else 0
        return heads if nothing(more) else heads + more * (tensor_parallel - heads)

    def states(self, weight: Weight, trained: Trained = "all") -> Iterator[Term]:
        """Parameter, gradient and optimizer states of one weight."""
        if trained == "none" or self.tuning.freezes(weight):
            yield Term(weight.name, Role.PARAMETER, weight.dims, self.tuning.frozen_bytes(weight))
            return
        recipe = self.tuning.trained_recipe
        yield Term(weight.name, Role.PARAMETER, weight.dims, recipe.weight_of(weight))
        if not self.in_backward:
            yield Term(weight.name, Role.GRADIENT, weight.dims, recipe.gradient, steps=(weight.step,))
        states = resident(self.optimizer, tensor_of(weight, self.model), recipe, self.shards)
        yield Term(weight.name, Role.OPTIMIZER, weight.dims, recipe.master + states)

    def passing_gradients(self, weights: Sequence[Weight]) -> Iterator[Term]:
        """Where each is used and freed as it arises: the largest gradient of every step."""
        weights = [weight for weight in weights if not self.tuning.freezes(weight)]
        if not self.in_backward:
            return
        for step in dict.fromkeys(weight.step for weight in weights):
            largest = max(
                (
                    {name: n for name, n in w.dims.items() if name != "pair"}
                    for w in weights
                    if w.step == step
                ),
                key=lambda dims: float(np.max(prod(dims.values()))),
            )
            yield Term(
                "gradient, until its update", Role.TRANSIENT, largest, self.recipe.gradient, steps=(step,)
            )

    def product(self, weight: Weight, kept_by: tuple[str, ...], trained: Trained = "all") -> Term:
        """FLOPs of a matrix product with every token: 2 forward, 2 for each of two gradients.

        That of its input is not made where nothing below is trained. An expert's product is with the tokens
        sent to it: all together have each token ``routed`` times.
        """
        flops = 4.0 if trained == "none" or self.tuning.freezes(weight) else 6.0
        if trained == "none" or (trained == "lowest" and self.tuning.ends_at(weight)):
            flops -= 2.0
        tokens, dims = {"batch": self.dims["batch"], "seq": self.dims["seq"]}, weight.dims
        if "experts" in dims:
            tokens["routed"] = self.dims["routed"]
            dims = {name: length for name, length in dims.items() if name != "experts"}
        return Term(weight.name, Role.FLOPS, tokens | dims, flops, kept_by)

    def attention(self, kind: Block) -> Iterator[Term]:
        """FLOPs of the attention core, and what context parallelism sends of it."""
        names = ("batch", "seq", "heads", "head_dim")
        core = {name: self.dims[name] for name in names}
        core["head_dim"] = self.attention_width
        per_pair = ATTENTION_FLOPS[str(self.training.attention)]
        kept = self.stack.rerun.get("attention core", UNTIL_FULL)
        keys: float = self.training.seq_length or 0
        if per_pair == UNFUSED:
            keys *= 2 if kind.mixer == "cross" else 1
        else:
            keys = pairs_per_query(kind, keys, self.model.sliding_window)
        yield Term("attention core", Role.FLOPS, core | {"seq_k": keys}, per_pair, kept)
        if not nothing(self.dims["repeats"]):
            sent = ("batch", "seq", "gathered_heads", "head_dim", "repeats")
            gathered = {name: self.dims[name] for name in sent}
            yield Term("query, key and value", Role.MESSAGE, gathered, self.recipe.compute, UNTIL_FULL)
        yield from self.sent_by_attention(kept)

    def scan(self, kind: Block) -> Term:
        """FLOPs of a state space's scan or of a delta net's rule, as :mod:`planner.model_flops` counts."""
        names, per_state = (
            (("ssm_heads", "ssm_head_dim", "state"), 21.0)
            if kind.mixer == "mamba"
            else (("delta_heads", "value_dim", "key_dim"), 24.0)
        )
        dims = {name: self.dims[name] for name in ("batch", "seq", *names)}
        return Term("scan", Role.FLOPS, dims, per_state, self.stack.rerun.get("scan", UNTIL_FULL))

    def crossings(self, kind: Block) -> int:
        """How often a block's residual stream goes into and out of a tensor-parallel region.

        Routed experts are no such region: tokens are sent to them.
        """
        shared = kind.mlp == "experts" and self.dims["shared_ffn"] > 0
        return 2 * (kind.mixer != "none") + 2 * (kind.mlp == "dense" or shared)

    def rows(self, rows: Iterable[Row], words: frozenset[str] | None = None) -> Iterator[Term]:
        """The rows that apply, with lengths in place of names."""
        for row in rows:
            if row.applies(self.features if words is None else words):
                dims: dict[str, Quantity] = {}
                for word in row.dims.split():
                    name, _, length = word.partition(":")
                    dims[name] = int(length) if length else self.dims[name]
                if any(nothing(length) for length in dims.values()):
                    continue
                unit = row.count * self.width[row.dtype]
                yield Term(row.name, row.role, dims, unit, row.kept_by, tuple(row.steps.split()))

    def regions(self, crossings: int, kept_by: tuple[str, ...] = ALWAYS) -> Term:
        """The residual stream as it crosses tensor-parallel regions, forward and backward."""
        dims = {name: self.dims[name] for name in ("batch", "seq", "residual")}
        name = "residual stream across regions"
        return Term(name, Role.MESSAGE, dims | {"crossings": crossings}, self.recipe.compute, kept_by)

    @property
    def attention_width(self) -> Quantity:
        """Elements of a head: of latent attention, whose values are narrower than its keys, the average."""
        if latent := self.model.latent:
            return (latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim) / 2
        return self.dims["head_dim"]

    def sent_by_attention(self, kept_by: tuple[str, ...]) -> Iterator[Term]:
        """Keys and values, queries and output, as context parallelism sends them; and what that keeps."""
        for name, heads in (("keys and values", "kv_heads"), ("queries and attention output", "heads")):
            dims = {name: self.dims[name] for name in ("batch", "seq", heads)}
            dims |= {"head_dim": self.attention_width, "pair": 2}
            yield Term(name, Role.MESSAGE, dims, self.recipe.compute, kept_by)
        if not (isinstance(self.context_heads, int) and self.context_heads == 0):
            # Attention keeps the output of its heads, the next product that of its tokens.
            width = self.model.latent.v_head_dim if self.model.latent else self.dims["head_dim"]
            dims = {name: self.dims[name] for name in ("batch", "seq", "heads")} | {"head_dim": width}
            dims["handed_out"] = self.context_heads
            yield Term(
                "attention output, by heads", Role.ACTIVATION, dims, self.recipe.compute, kept_by, ("core",)
            )

    def words(self, kind: Block) -> frozenset[str]:
        """The words of one kind of block."""
        return features(self.model, self.training, self.stack, kind)

    def block(self, kind: Block | None = None) -> Layer:
        """A block of a kind; the model's first one, trained in full, if not said."""
        kind = kind or self.model.blocks[0]
        weights = [*block_weights(self.model, kind), *self.tuning.weights()]
        terms: list[Term] = [*self.passing_gradients(weights)]
        for weight in weights:
            terms += self.states(weight, kind.trained)
            if weight.matrix:
                kept = self.stack.rerun.get(weight.name, UNTIL_FULL)
                terms.append(self.product(weight, kept, kind.trained))
        if kind.mixer in ATTENTION:
            terms += self.attention(kind)
        elif kind.mixer in ("mamba", "delta"):
            terms.append(self.scan(kind))
        words = self.words(kind)
        rows = [*self.tuning.rows("block", self.stack.rows["block"])]
        if self.training.adapters:
            rows += adapter_rows(self.tuning)
        terms += self.rows(
            frozen.above(rows, self.tuning.lowest) if kind.trained == "lowest" else rows, words
        )
        terms.append(self.regions(self.crossings(kind), UNTIL_FULL))
        if self.tuning.crossings:
            terms.append(self.regions(self.tuning.crossings, UNTIL_FULL))
        if kind.mlp == "experts":
            dims = {name: self.dims[name] for name in ("batch", "seq", "routed", "width")}
            sent, kept = "tokens sent to experts", self.stack.rerun.get("tokens sent to experts", UNTIL_FULL)
            terms.append(Term(sent, Role.MESSAGE, dims, self.recipe.compute, kept))
        name = "block" if len(self.model.block_kinds) == 1 else f"{kind.mixer} {kind.mlp} block"
        if kind.trained == "none":
            return self.resting(f"frozen {name}", kind, terms)
        name = f"lowest trained {name}" if kind.trained == "lowest" else name
        steps = STEPS["scan" if kind.mixer in ("mamba", "delta") else "block"]
        return Layer(name, tuple(terms), self.blocks.count(kind), steps)

    def resting(self, name: str, kind: Block, terms: Iterable[Term]) -> Layer:
        """A block that no gradient reaches: its weights, and a forward that is never run again."""
        kept = (Role.PARAMETER, Role.FLOPS, Role.TRAFFIC, Role.MESSAGE)
        of = tuple(replace(term, kept_by=ALWAYS) for term in terms if term.role in kept)
        return Layer(name, of, self.blocks.count(kind), STEPS["block"], backward=False)

    def embedding(self) -> Layer:
        """Word and position embedding."""
        weights = list(embedding_weights(self.model, self.vocab))
        terms = [*self.passing_gradients(weights), *(t for w in weights for t in self.states(w))]
        terms += self.rows(self.tuning.rows("embedding", self.stack.rows["embedding"]))
        return Layer("embedding", (*terms, self.regions(1)), steps=STEPS["embedding"])

    def head(self) -> Layer:
        """Final norm, head and loss."""
        weights = list(head_weights(self.model, self.vocab, self.copies))
        terms = [*self.passing_gradients(weights), *(t for w in weights for t in self.states(w))]
        dims = {"vocab": self.vocab, "hidden": self.model.hidden_size}
        if self.model.head != "none":
            terms.append(self.product(Weight("head weight", dims, "head"), ALWAYS))
        terms += self.rows(self.tuning.rows("head", self.stack.rows["head"]))
        steps = STEPS["head"]
        if mtp.wanted(self):
            terms += mtp.terms(self)
            steps = mtp.steps(steps, STEPS["block"])
        return Layer("head", (*terms, self.regions(1)), steps=steps)

    def stage(self) -> Layer:
        """What a stage holds once, however many layers it has, for all kinds of block together."""
        words = self.features.union(*(self.words(kind) for kind in self.kinds))
        rows = self.tuning.rows("stage", self.stack.rows.get("stage", ()))
        return Layer("stage", tuple(self.rows(rows, words)))

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
