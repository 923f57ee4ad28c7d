"""The first input: what is trained. A model's shape in Hugging Face's names, block by block.

A model is a row of blocks in a fixed order. A :class:`Block` is what one of them consists of: its mixer
(the part that looks at other tokens: an attention, a state space) and its MLP. Most models have one block,
repeated; mixtures, hybrids and models with local attention have several.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from os import PathLike

Length = Field(ge=1, le=10_000_000)
FROZEN = ConfigDict(frozen=True, extra="forbid")

Mixer = Literal["full", "window", "bidirectional", "cross", "mamba", "delta", "none"]
"""What mixes tokens: causal attention over all, or over a window; attention without a mask (encoders);
causal attention and then attention to an encoder's output; a Mamba-2 state space; a gated delta net;
nothing."""
Mlp = Literal["dense", "experts", "none"]
Trained = Literal["all", "lowest", "none"]
"""Of a job's blocks: one that gradients go through, the lowest that they reach, one that they do not."""


class Block(NamedTuple):
    """One kind of transformer block. A model's are all trained; a job's as it says (planner/frozen.py)."""

    mixer: Mixer = "full"
    mlp: Mlp = "dense"
    trained: Trained = "all"


def numbered(blocks: tuple[Block, ...]) -> tuple[int, ...]:
    """The number of every block's kind, in order: kinds are counted as they come first."""
    number = {block: index for index, block in enumerate(dict.fromkeys(blocks))}
    return tuple(number[block] for block in blocks)


class Experts(BaseModel):
    """The mixture of experts in place of an MLP. Widths are in elements.

    ``shared_intermediate_size`` is the width of all shared experts together, which every token passes;
    ``shared_gate`` scales their output by a learned gate.
    """

    model_config = FROZEN

    num_experts: int = Field(ge=1, le=100_000)
    num_experts_per_tok: int = Field(ge=1, le=10_000)
    intermediate_size: int = Length  # of one routed expert
    shared_intermediate_size: int = Field(0, ge=0, le=10_000_000)
    shared_gate: bool = False
    router_bias: bool = False  # one that is learned; DeepSeek-V3's correction is no parameter
    biases: bool = False  # of the experts' products

    @model_validator(mode="after")
    def _enough(self) -> Experts:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {self.num_experts} experts"
            )
        return self


class LatentAttention(BaseModel):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1), in elements.

    Keys and values are expanded from ``kv_lora_rank`` elements a token, besides ``qk_rope_head_dim`` that all
    heads share; queries from ``q_lora_rank``, or made at once where that is None.
    """

    model_config = FROZEN

    q_lora_rank: int | None = Field(None, ge=1, le=10_000_000)
    kv_lora_rank: int = Length
    qk_nope_head_dim: int = Length
    qk_rope_head_dim: int = Length
    v_head_dim: int = Length


class StateSpace(BaseModel):
    """A Mamba-2 mixer (Dao and Gu 2024, arXiv:2405.21060, section 7), in elements."""

    model_config = FROZEN

    num_heads: int = Length
    head_dim: int = Length
    n_groups: int = Length
    state_size: int = Length
    conv_kernel: int = Field(4, ge=1, le=1000)
    chunk_size: int = Field(256, ge=1, le=1_000_000)
    conv_bias: bool = True
    bias: bool = False  # of the products in and out


class DeltaNet(BaseModel):
    """A gated delta net (Yang et al. 2024, arXiv:2412.06464), as in Qwen3-Next, in elements."""

    model_config = FROZEN

    num_key_heads: int = Length
    num_value_heads: int = Length
    key_head_dim: int = Length
    value_head_dim: int = Length
    conv_kernel: int = Field(4, ge=1, le=1000)


class Patches(BaseModel):
    """An image cut into squares, each a token (Dosovitskiy et al. 2020, arXiv:2010.11929), in pixels."""

    model_config = FROZEN

    image_size: int = Length
    patch_size: int = Length
    channels: int = Field(3, ge=1, le=10_000)

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        return self.patch_size**2 * self.channels


class ModelSpec(BaseModel):
    """A model's shape, in Hugging Face's names. Every number is a length in elements.

    A model without attention has its state space's heads for ``num_attention_heads`` and ``head_dim``.
    ``norm_placement`` is where a block's norms are: before each part (``pre``), after the sum of its output
    and the residual (``post``), on its output before that sum (``output``), before it and on its output
    (``sandwich``), or one norm before both parts of a parallel block (``shared``). ``norm_vectors`` says how
    many vectors a norm learns, where that is not its kind's usual number. ``qk_norm_weights`` of a query and
    key norm are shared by all heads, per head, or none.
    """

    model_config = FROZEN

    name: str = Field(min_length=1, max_length=200)
    model_type: str = Field(max_length=50)
    hidden_size: int = Length
    num_hidden_layers: int = Field(ge=1, le=10_000)
    num_attention_heads: int = Length
    num_key_value_heads: int = Length
    head_dim: int = Length
    intermediate_size: int = Length
    vocab_size: int = Field(ge=0, le=10_000_000)  # 0 of images only
    max_position_embeddings: int = Field(ge=1, le=1_000_000_000)
    tie_word_embeddings: bool = False
    hidden_act: str = Field("silu", max_length=50)
    gated_mlp: bool = True
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_vectors: int | None = Field(None, ge=0, le=2)
    norm_placement: Literal["pre", "post", "output", "sandwich", "shared"] = "pre"
    position_embedding: Literal["rotary", "learned", "alibi", "relative", "none"] = "rotary"
    position_offset: int = Field(0, ge=0, le=1000)  # rows of the learned table before position 0
    relative_buckets: int = Field(0, ge=0, le=100_000)
    rotary_fraction: float = Field(1.0, ge=0, le=1)  # of a head's elements
    sliding_window: int | None = Field(None, ge=1, le=1_000_000_000)
    qkv_bias: bool = False
    qk_norm: bool = False  # queries and keys are normalised
    qk_norm_weights: Literal["shared", "per_head", "none"] = "shared"
    attention_gate: bool = False  # the attention's output is scaled by a gate as wide as the queries
    attention_sinks: bool = False  # a learned logit per head that takes part in the softmax
    attention_softcap: float | None = Field(None, gt=0)
    logits_softcap: float | None = Field(None, gt=0)
    attention_output_bias: bool = False
    mlp_bias: bool = False
    embedding_norm: bool = False
    parallel_residual: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    # What unlike blocks are made of, and where they are: a word for each, or none where all are alike.
    kind: Literal["decoder", "encoder", "encoder-decoder", "vision"] = "decoder"
    mixers: tuple[Mixer, ...] = Field((), max_length=10_000)
    mlps: tuple[Mlp, ...] = Field((), max_length=10_000)
    experts: Experts | None = None
    latent: LatentAttention | None = None
    state_space: StateSpace | None = None
    delta: DeltaNet | None = None
    mtp_layers: int = Field(0, ge=0, le=100)  # blocks that predict further tokens, after the last one
    # What is before the first block and after the last one.
    head: Literal["language", "masked", "none"] = "language"
    head_bias: bool = False
    pooler: bool = False  # a layer on the first token's output
    num_labels: int = Field(0, ge=0, le=10_000_000)  # classes of a classifier, with its bias
    type_vocab_size: int = Field(0, ge=0, le=100_000)
    patches: Patches | None = None
    source: str = Field("", max_length=2000)

    @model_validator(mode="after")
    def _heads(self) -> ModelSpec:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        return self

    @model_validator(mode="after")
    def _blocks(self) -> ModelSpec:
        for name in ("mixers", "mlps"):
            given = getattr(self, name)
            if given and len(given) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} names {len(given)} blocks, num_hidden_layers={self.num_hidden_layers}: "
                    "name each of them, or none"
                )
        if not self.vocab_size and self.patches is None:
            raise ValueError("vocab_size=0: only a model of images has no vocabulary")
        needs: dict[str, object] = {"experts": self.experts, "mamba": self.state_space, "delta": self.delta}
        needs["window"] = self.sliding_window
        for word, given in needs.items():
            if word in (*self.mixers, *self.mlps) and given is None:
                raise ValueError(f"a block has {word}, whose sizes are not given")
        return self

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every block of the model, in order."""
        depth = self.num_hidden_layers
        usual: Mixer = "bidirectional" if self.kind in ("encoder", "vision") else "full"
        mixers = self.mixers or ("window" if self.sliding_window else usual,) * depth
        mlps = self.mlps or ("experts" if self.experts else "dense",) * depth
        return tuple(Block(mixer, mlp) for mixer, mlp in zip(mixers, mlps, strict=True))

    @property
    def block_kinds(self) -> tuple[Block, ...]:
        """The different blocks, in the order in which they come first."""
        return tuple(dict.fromkeys(self.blocks))

    @property
    def kinds(self) -> tuple[int, ...]:
        """The number of every block's kind, in order."""
        return numbered(self.blocks)

    @property
    def runs(self) -> tuple[tuple[Block, int], ...]:
        """Stretches of equal blocks with their lengths."""
        return tuple((block, len(list(same))) for block, same in groupby(self.blocks))

    @staticmethod
    def from_catalog(name: str) -> ModelSpec:
        """The catalog's model of that name or alias. Raises InputError with the nearest names."""
        from planner.catalog import load_model

        return load_model(name)

    @staticmethod
    def from_hugging_face(path: str | PathLike[str]) -> ModelSpec:
        """A model from a ``config.json`` or its folder. Raises InputError; executes nothing."""
        from planner.families import read_config

        return read_config(path)

    @property
    def norm_width(self) -> int:
        """Vectors that a norm learns: a weight, in LayerNorm a bias too, unless said otherwise."""
        usual = 2 if self.norm == "layernorm" else 1
        return usual if self.norm_vectors is None else self.norm_vectors

    @property
    def num_parameters(self) -> int:
        """Parameters of the real implementation, to the last one; vocabulary unpadded.

        Blocks that predict further tokens (``mtp_layers``) are not among them.
        """
        from planner.weights import count_parameters

        return count_parameters(self)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token passes through: of ``n`` experts the ``k`` that it is sent to."""
        from planner.weights import count_parameters

        return count_parameters(self, active=True)

    def flops_per_token(self, seq_length: int) -> float:
        """Model FLOPs of one token, forward and backward: ``6 N + 12 L s a d``.

        ``N`` counts the matrices that a token is multiplied with (blocks and head, not the
        embedding look-up; of experts those it is sent to); attention is counted in full, as if
        not causal. Chowdhery et al. 2022, arXiv:2204.02311, appendix B, which is what most
        published MFU use. Of an encoder-decoder: one token of each, sequences equally long.
        """
        from planner.weights import count_matrix_parameters

        return 6.0 * count_matrix_parameters(self) + self.attention_flops_per_token(seq_length)

    def attention_flops_per_token(self, seq_length: int) -> float:
        """The part of :meth:`flops_per_token` that mixers have besides their matrices."""
        from planner.model_flops import mixer_flops

        return sum(n * mixer_flops(self, block.mixer, seq_length) for block, n in self.runs)
