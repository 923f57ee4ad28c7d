"""A model's weights, listed once: parameters, gradients, optimizer states and FLOPs follow from the list.

Tensor parallelism cuts the dimensions ``heads``, ``kv_heads``, ``ffn`` and ``vocab``, of a state space
``ssm_heads`` and ``ssm_groups``, of a gated delta net ``delta_heads`` and ``delta_key_heads``, nothing else.
Experts have ``experts`` and ``expert_ffn``, their router ``router``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from planner.model import Block, DeltaNet, Experts, LatentAttention, ModelSpec, StateSpace
from strategies.base import Quantity

Dims = dict[str, Quantity]


@dataclass(frozen=True, slots=True)
class Weight:
    """One kind of weight of a layer; a ``matrix`` is multiplied with every token.

    ``step`` is the step of the layer's backward in which its gradient arises. ``active`` is the fraction of
    it that one token is multiplied with: of ``n`` experts that send a token to ``k``, ``k / n``.
    ``of`` names the products that it is an adapter of (planner/adapters.py).
    """

    name: str
    dims: Dims
    step: str
    matrix: bool = False
    active: float = 1.0
    of: str = ""

    @property
    def quantized(self) -> bool:
        """Is it of the products that take operands of 8 or 4 bits, where any do?

        Those of blocks, but for a router's and a gate's of one value a token: Megatron Core has these, the
        embedding and the head in half precision (transformer_layer.py and router.py; fp8_utils.py,
        ``get_fp8_context``, is around blocks).
        """
        outside = self.step in ("embedding", "head") or "router" in self.dims
        return self.matrix and len(self.dims) > 1 and not outside


def block_weights(model: ModelSpec, block: Block) -> Iterator[Weight]:
    """Weights of one transformer block."""
    if block.mixer == "mamba":
        assert model.state_space is not None
        yield from _state_space(model, model.state_space)
    elif block.mixer == "delta":
        assert model.delta is not None
        yield from _delta_net(model, model.delta)
    elif block.mixer != "none":
        yield from _latent(model, model.latent) if model.latent else _attention(model)
        if block.mixer == "cross":
            for weight in _attention(model):
                yield Weight(f"cross {weight.name}", weight.dims, weight.step, weight.matrix)
    if block.mlp == "dense":
        yield from _mlp(model)
    elif block.mlp == "experts":
        assert model.experts is not None
        yield from _mixture(model, model.experts)
    yield from _norms(model, block)


def _attention(model: ModelSpec) -> Iterator[Weight]:
    hidden: Dims = {"hidden": model.hidden_size}
    queries: Dims = {"heads": model.num_attention_heads, "head_dim": model.head_dim}
    keys: Dims = {"kv_heads": model.num_key_value_heads, "head_dim": model.head_dim, "pair": 2}
    yield Weight("query weight", hidden | queries, "qkv", matrix=True)
    if model.attention_gate:
        yield Weight("attention gate weight", hidden | queries, "qkv", matrix=True)
    yield Weight("key and value weights", hidden | keys, "qkv", matrix=True)
    yield Weight("attention output weight", queries | hidden, "out", matrix=True)
    if model.qkv_bias:
        yield Weight("query bias", queries, "qkv")
        if model.attention_gate:
            yield Weight("attention gate bias", queries, "qkv")
        yield Weight("key and value biases", keys, "qkv")
    if model.attention_output_bias:
        yield Weight("attention output bias", hidden, "out")
    if model.attention_sinks:
        yield Weight("attention sinks", {"heads": model.num_attention_heads}, "core")
    if model.qk_norm and model.qk_norm_weights == "shared":
        yield Weight("query and key norm weights", {"head_dim": model.head_dim, "pair": 2}, "core")
    if model.qk_norm and model.qk_norm_weights == "per_head":
        yield Weight("query norm weight", queries, "core")
        yield Weight("key norm weight", keys | {"pair": 1}, "core")


def _latent(model: ModelSpec, latent: LatentAttention) -> Iterator[Weight]:
    """Multi-head latent attention: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1 and appendix C."""
    hidden: Dims = {"hidden": model.hidden_size}
    heads: Dims = {"heads": model.num_attention_heads}
    qk_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    if latent.q_lora_rank is None:
        yield Weight("query weight", hidden | heads | {"qk_dim": qk_dim}, "qkv", matrix=True)
    else:
        rank: Dims = {"q_rank": latent.q_lora_rank}
        yield Weight("query down weight", hidden | rank, "qkv", matrix=True)
        yield Weight("query latent norm", rank, "qkv")
        yield Weight("query up weight", rank | heads | {"qk_dim": qk_dim}, "qkv", matrix=True)
    rank, down = {"kv_rank": latent.kv_lora_rank}, latent.kv_lora_rank + latent.qk_rope_head_dim
    yield Weight("key and value down weight", hidden | {"kv_rank": down}, "qkv", matrix=True)
    yield Weight("key and value latent norm", rank, "qkv")
    kv_dim = latent.qk_nope_head_dim + latent.v_head_dim
    yield Weight("key and value up weight", rank | heads | {"kv_dim": kv_dim}, "qkv", matrix=True)
    yield Weight("attention output weight", heads | {"v_dim": latent.v_head_dim} | hidden, "out", matrix=True)


def _state_space(model: ModelSpec, space: StateSpace) -> Iterator[Weight]:
    """A Mamba-2 mixer: gate and input, keys and queries (B and C) and time steps from one product, a
    convolution over all but gate and steps, a gated norm. Dao and Gu 2024, arXiv:2405.21060, section 7.
    """
    hidden: Dims = {"hidden": model.hidden_size}
    inner: Dims = {"ssm_heads": space.num_heads, "ssm_head_dim": space.head_dim}
    states: Dims = {"ssm_groups": space.n_groups, "state": space.state_size, "pair": 2}
    heads: Dims = {"ssm_heads": space.num_heads}
    kernel: Dims = {"kernel": space.conv_kernel}
    yield Weight("gate and input weights", hidden | inner | {"pair": 2}, "qkv", matrix=True)
    yield Weight("B and C weights", hidden | states, "qkv", matrix=True)
    yield Weight("time step weight", hidden | heads, "qkv", matrix=True)
    if space.bias:
        yield Weight("gate and input biases", inner | {"pair": 2}, "qkv")
        yield Weight("B and C biases", states, "qkv")
        yield Weight("time step bias of the product", heads, "qkv")
        yield Weight("state space output bias", hidden, "out")
    yield Weight("input convolution", inner | kernel, "core")
    yield Weight("B and C convolutions", states | kernel, "core")
    if space.conv_bias:
        yield Weight("input convolution bias", inner, "core")
        yield Weight("B and C convolution biases", states, "core")
    yield Weight("A, D and time step bias", heads | {"vectors": 3}, "core")
    yield Weight("gated norm weight", inner, "core")
    yield Weight("state space output weight", inner | hidden, "out", matrix=True)


def _delta_net(model: ModelSpec, net: DeltaNet) -> Iterator[Weight]:
    """A gated delta net: Yang et al. 2024, arXiv:2412.06464, section 3.4, with an output gate."""
    hidden: Dims = {"hidden": model.hidden_size}
    keys: Dims = {"delta_key_heads": net.num_key_heads, "key_dim": net.key_head_dim, "pair": 2}
    values: Dims = {"delta_heads": net.num_value_heads, "value_dim": net.value_head_dim}
    heads: Dims = {"delta_heads": net.num_value_heads}
    kernel: Dims = {"kernel": net.conv_kernel}
    yield Weight("query and key weights", hidden | keys, "qkv", matrix=True)
    yield Weight("value and gate weights", hidden | values | {"pair": 2}, "qkv", matrix=True)
    yield Weight("beta and decay weights", hidden | heads | {"pair": 2}, "qkv", matrix=True)
    yield Weight("query and key convolutions", keys | kernel, "core")
    yield Weight("value convolution", values | kernel, "core")
    yield Weight("A and time step bias", heads | {"vectors": 2}, "core")
    yield Weight("gated norm weight", {"value_dim": net.value_head_dim}, "core")
    yield Weight("delta output weight", values | hidden, "out", matrix=True)


def _mlp(model: ModelSpec) -> Iterator[Weight]:
    hidden: Dims = {"hidden": model.hidden_size}
    ffn: Dims = {"ffn": model.intermediate_size}
    if model.gated_mlp:
        yield Weight("gate weight", hidden | ffn, "up", matrix=True)
    yield Weight("up weight", hidden | ffn, "up", matrix=True)
    yield Weight("down weight", ffn | hidden, "down", matrix=True)
    if model.mlp_bias:
        yield Weight("up bias", ffn | {"pair": 2 if model.gated_mlp else 1}, "up")
        yield Weight("down bias", hidden, "down")


def _mixture(model: ModelSpec, experts: Experts) -> Iterator[Weight]:
    """Router, routed experts and the shared ones, which every token passes."""
    hidden: Dims = {"hidden": model.hidden_size}
    number: Dims = {"experts": experts.num_experts}
    ffn: Dims = {"expert_ffn": experts.intermediate_size}
    router: Dims = {"router": experts.num_experts}
    active = experts.num_experts_per_tok / experts.num_experts
    yield Weight("router weight", hidden | router, "up", matrix=True)
    if experts.router_bias:
        yield Weight("router bias", router, "up")
    if model.gated_mlp:
        yield Weight("expert gate weight", number | hidden | ffn, "up", True, active)
    yield Weight("expert up weight", number | hidden | ffn, "up", True, active)
    yield Weight("expert down weight", number | ffn | hidden, "down", True, active)
    if experts.biases:
        pair: Dims = {"pair": 2 if model.gated_mlp else 1}
        yield Weight("expert up bias", number | ffn | pair, "up", active=active)
        yield Weight("expert down bias", number | hidden, "down", active=active)
    if width := experts.shared_intermediate_size:
        shared: Dims = {"ffn": width}
        if model.gated_mlp:
            yield Weight("shared gate weight", hidden | shared, "shared", matrix=True)
        yield Weight("shared up weight", hidden | shared, "shared", matrix=True)
        yield Weight("shared down weight", shared | hidden, "shared", matrix=True)
    if experts.shared_gate:
        yield Weight("shared expert's gate", hidden, "up", matrix=True)


def _norms(model: ModelSpec, block: Block) -> Iterator[Weight]:
    """A norm for each part of the block, two in a sandwich; all of them count to ``norm1``."""
    parts = (block.mixer != "none") + (block.mlp != "none") + (block.mixer == "cross")
    count = {"shared": 1, "sandwich": 2 * parts}.get(model.norm_placement, parts)
    if model.norm_width >= 1:
        yield Weight("norm weights", {"hidden": model.hidden_size, "pair": count}, "norm1")
    if model.norm_width == 2:
        yield Weight("norm biases", {"hidden": model.hidden_size, "pair": count}, "norm1")


def embedding_weights(model: ModelSpec, vocab: Quantity) -> Iterator[Weight]:
    """Weights before the first block.

    Tables of relative positions are in the first blocks of encoder and decoder; they are listed here.
    """
    hidden: Dims = {"hidden": model.hidden_size}
    if model.patches is None:
        yield Weight("word embedding", {"vocab": vocab} | hidden, "embedding")
    else:
        yield Weight("patch embedding", {"patch": model.patches.values} | hidden, "embedding", matrix=True)
        yield Weight("patch embedding bias", hidden, "embedding")
        yield Weight("class token", hidden, "embedding")
    if model.position_embedding == "learned":
        rows = model.max_position_embeddings + model.position_offset
        yield Weight("position embedding", {"positions": rows} | hidden, "embedding")
    if model.position_embedding == "relative":
        stacks = 2 if model.kind == "encoder-decoder" else 1
        dims = {"buckets": model.relative_buckets, "heads": model.num_attention_heads, "stacks": stacks}
        yield Weight("relative positions", dims, "embedding")
    if model.type_vocab_size:
        yield Weight("token type embedding", {"types": model.type_vocab_size} | hidden, "embedding")
    if model.embedding_norm:
        yield Weight("embedding norm", hidden | {"pair": 2}, "embedding")


def head_weights(model: ModelSpec, vocab: Quantity, copies: Quantity) -> Iterator[Weight]:
    """Weights after the last block; a tied head has ``copies`` of the embedding (0 or 1).

    Blocks whose norms come after the sum need no norm behind the last one; encoder and decoder have one
    each. The head of a masked language model has a layer with a norm of its own before the vocabulary.
    """
    hidden: Dims = {"hidden": model.hidden_size}
    wide: Dims = hidden | {"out": model.hidden_size}
    norms = 0 if model.norm_placement == "post" else 2 if model.kind == "encoder-decoder" else 1
    if model.norm_width and norms:
        yield Weight("final norm", hidden | {"pair": model.norm_width * norms}, "norm")
    if model.pooler:
        yield Weight("pooler weight", wide, "head")
        yield Weight("pooler bias", hidden, "head")
    if model.num_labels:
        yield Weight("classifier weight", {"labels": model.num_labels} | hidden, "head")
        yield Weight("classifier bias", {"labels": model.num_labels}, "head")
    if model.head == "none":
        return
    if model.head == "masked":
        yield Weight("masked head weight", wide, "head", matrix=True)
        yield Weight("masked head bias and norm", hidden | {"vectors": 3}, "head")
    dims: Dims = {"vocab": vocab} | hidden
    yield Weight("head weight", dims | {"copies": copies} if model.tie_word_embeddings else dims, "head")
    if model.head_bias:
        yield Weight("head bias", {"vocab": vocab}, "head")


def mtp_weights(model: ModelSpec) -> Iterator[Weight]:
    """Weights of one module that predicts a further token: norms of both inputs and the output, the product
    that joins the inputs, and a block like the last one; embedding and head are the model's own.

    DeepSeek-AI 2024, arXiv:2412.19437, section 2.2.
    """
    hidden: Dims = {"hidden": model.hidden_size}
    yield Weight("joining weight", hidden | {"joined": 2 * model.hidden_size}, "qkv", matrix=True)
    yield Weight("joining norms", hidden | {"pair": 3 * model.norm_width}, "norm1")
    yield from block_weights(model, model.blocks[-1])


def elements(weights: Iterable[Weight], matrices_only: bool = False, active: bool = False) -> int:
    """Parameters of those weights, or of the matrices among them; of experts, if ``active``, one token's."""
    total = 0
    for weight in weights:
        if weight.matrix or not matrices_only:
            size = 1
            for length in weight.dims.values():
                size *= length
            total += round(size * weight.active) if active else size
    return total


def _around(model: ModelSpec) -> list[Weight]:
    return [*embedding_weights(model, model.vocab_size), *head_weights(model, model.vocab_size, copies=0)]


def count_parameters(model: ModelSpec, active: bool = False) -> int:
    """Parameters of the whole model: ``L(12h^2 + 13h) + Vh`` and its relatives, exactly.

    ``active``: of experts, only those that a token is sent to.
    """
    blocks = sum(n * elements(block_weights(model, block), active=active) for block, n in model.runs)
    return blocks + elements(_around(model))


def count_matrix_parameters(model: ModelSpec) -> int:
    """Parameters that every token is multiplied with: the blocks' matrices and the head."""
    blocks = sum(n * elements(block_weights(model, block), True, True) for block, n in model.runs)
    head = model.vocab_size * model.hidden_size if model.head != "none" else 0
    return blocks + head + elements(_around(model), matrices_only=True)
