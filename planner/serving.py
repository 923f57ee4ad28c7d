"""What a model that answers requests is made of, as terms: weights at a precision, cache, working sets.

Stated of vLLM, whose cache is the one most engines follow; TensorRT-LLM repeats key and value heads alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod

from planner.model import Block, ModelSpec
from planner.weights import Weight, block_weights
from strategies.base import Quantity, Role, Term
from strategies.tensor_parallel import CUT

WIDTH = 2.0
"""Bytes of an element of activations, and of what is not quantised: bf16 or fp16."""
KV_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0}
"""Bytes of a cached element. An 8-bit cache has one fp32 scale for keys and one for values in each layer."""
SAMPLING = 38.0
"""Bytes per sequence and word while tokens are drawn with top-k and top-p: logits in half precision (2) and
in fp32 (4), sorted values (4) with their int64 places (8), the sort's second buffers for both (12),
probabilities (4) and their running sum (4). apply_top_k_top_p and softmax as in vLLM 0.6 to 0.8; kernels that
do not sort (FlashInfer's) need less."""
SERVED = {
    "expert_ffn": "ffn",
    "ssm_heads": "heads",
    "ssm_groups": "kv_heads",
    "delta_heads": "heads",
    "delta_key_heads": "kv_heads",
}
"""Dimensions that tensor parallelism cuts in serving under the names that it knows: of experts every rank
has a part of each, and the heads of state spaces and delta nets are shared out like those of attention."""
REPEATED = ("kv_heads", "ssm_groups")
"""Dimensions of which every rank has at least one."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a product's weight is stored: ``element`` bytes each, and ``scale`` bytes beside every ``group``.

    A group is of elements along the product's input; ``column`` bytes go with every output, ``tensor``
    bytes with the whole weight.
    """

    element: float
    group: int = 0
    scale: float = 0.0
    column: float = 0.0
    tensor: float = 0.0
    aligned: bool = False  # a rank's inputs have to be whole groups
    note: str = ""

    def of(self, name: str, dims: Mapping[str, Quantity]) -> Term:
        """The stored elements with the scales of their groups."""
        unit = self.element + (self.scale / self.group if self.group else 0.0)
        return Term(name, Role.PARAMETER, dims, unit)

    def term(self, weight: Weight) -> Term:
        """The stored elements of a weight."""
        return self.of(weight.name, weight.dims)

    def terms(self, weight: Weight) -> Iterator[Term]:
        """All that is stored of a weight."""
        yield self.term(weight)
        if self.column:
            outputs = {name: n for name, n in weight.dims.items() if name not in inputs(weight.dims)}
            yield Term(f"{weight.name} scales", Role.PARAMETER, outputs, self.column)
        if self.tensor:
            yield Term(f"{weight.name} scales", Role.PARAMETER, {}, self.tensor)

    def objections(self, weights: Iterable[Weight], tensor: int) -> Iterator[str]:
        """Why a tensor-parallel degree cannot be: groups are not cut."""
        for weight in weights if self.aligned else ():
            names = inputs(weight.dims)
            length = prod(weight.dims[name] for name in names)
            cut = 1 if CUT.isdisjoint(names) else tensor
            if is_product(weight) and length % (cut * self.group):
                yield (
                    f"tensor_parallel={tensor} leaves a rank {length / cut:g} inputs of the {weight.name}, "
                    f"not whole groups of {self.group}: use a smaller degree or other weights"
                )


FORMATS = {
    "bf16": Format(2.0, note="all weights in bf16"),
    "fp16": Format(2.0, note="all weights in fp16"),
    "fp8": Format(1.0, tensor=8.0, note="one fp32 scale for each weight and one for its inputs"),
    "int8": Format(1.0, column=4.0, note="one fp32 scale for each output (W8A8)"),
    "int4": Format(
        0.5,
        128,
        2.5,
        aligned=True,
        note="groups of 128 with an fp16 scale and a 4-bit zero point (AWQ, GPTQ)",
    ),
    "nf4": Format(
        0.5, 64, 1 + 4 / 256, note="blocks of 64 with an 8-bit scale, those with an fp32 one for 256 blocks"
    ),
}
"""Precisions of the weights. int4: Lin et al. 2023, arXiv:2306.00978, section 5.1, stored as AutoAWQ does;
nf4: double quantisation, Dettmers et al. 2023, arXiv:2305.14314, section 3: 0.127 bits a parameter."""
HALF = FORMATS["bf16"]


def inputs(dims: Mapping[str, Quantity]) -> tuple[str, ...]:
    """The dimensions of a product's weight that it sums over: they come first, after the experts."""
    names = [name for name in dims if name != "experts"]
    return tuple(names[:2]) if names[0] == "heads" else tuple(names[:1])


def is_product(weight: Weight) -> bool:
    """Is this the matrix of a block's product, which quantisation stores in fewer bits? A router is not."""
    return weight.matrix and "router" not in weight.dims and len(weight.dims.keys() - {"pair"}) > 1


def served(model: ModelSpec, block: Block, tensor: int) -> Iterator[Weight]:
    """A block's weights, in the dimensions that tensor parallelism cuts, with the heads that are repeated."""
    for weight in block_weights(model, block):
        dims = {
            SERVED.get(name, name): repeated(length, tensor) if name in REPEATED else length
            for name, length in weight.dims.items()
        }
        yield replace(weight, dims=dims)


def refusals(model: ModelSpec) -> Iterator[str]:
    """Why a model cannot be served token by token here."""
    if model.kind != "decoder":
        yield (
            f"{model.name} is of kind {model.kind}: it does not answer token by token from a cache; "
            "only decoders are planned for inference"
        )
    for mixer in dict.fromkeys(block.mixer for block in model.blocks):
        if mixer in ("bidirectional", "cross"):
            yield f"{model.name} has {mixer} attention, whose cache is not modelled: only decoders are"


def repeated(heads: int, tensor: int) -> int:
    """Key and value heads of all ranks together: each rank has at least one.

    get_num_kv_heads of vllm/config.py. A degree that is no multiple stays, and is refused.
    """
    return tensor if tensor > heads and tensor % heads == 0 else heads


def weight_terms(
    model: ModelSpec, block: Block, precision: str, tensor: int, active: bool = False
) -> Iterator[Term]:
    """A block's weights: its products in the precision, biases, norms and routers in half precision.

    ``active``: of a mixture, only the experts that one token goes to.
    """
    for weight in served(model, block, tensor):
        stored = FORMATS[precision] if is_product(weight) else HALF
        yield from stored.terms(routed(model, weight) if active else weight)
    latent = model.latent
    if latent and FORMATS[precision].element < WIDTH and block.mixer in ("full", "window"):
        # Absorbed attention multiplies with the expansions in half precision.
        width = {"kv_rank": latent.kv_lora_rank, "width": latent.qk_nope_head_dim + latent.v_head_dim}
        yield HALF.of("expansions, not quantised", {"heads": model.num_attention_heads, **width})


def routed(model: ModelSpec, weight: Weight) -> Weight:
    """The part of a weight that one token is multiplied with: of a mixture, the experts that it goes to."""
    if "experts" not in weight.dims or model.experts is None:
        return weight
    return replace(weight, dims={**weight.dims, "experts": model.experts.num_experts_per_tok})


def product_terms(model: ModelSpec, block: Block, tokens: int) -> Iterator[Term]:
    """FLOPs of the block's products with so many tokens: 2 for each weight that a token passes."""
    for weight in served(model, block, tensor=1):
        if is_product(weight):
            yield Term(weight.name, Role.FLOPS, {**routed(model, weight).dims, "tokens": tokens}, 2.0)


def cache_terms(
    model: ModelSpec, block: Block, context: int, block_size: int, width: float, tensor: int
) -> Iterator[Term]:
    """What one sequence of ``context`` tokens leaves in the cache of a block.

    Attention: keys and values, ``2 k d`` elements a token (Kwon et al. 2023, arXiv:2309.06180, section 3).
    Latent attention: ``d_c + d_h^R`` a token, whole on every tensor-parallel rank (DeepSeek-AI 2024,
    arXiv:2405.04434, section 2.1.4 and table 1). In a window only the blocks that it lies in, however it
    lies. A state space or delta net: a state whose size does not depend on the tokens, in half precision
    (vLLM's mamba_cache_dtype auto; vllm/model_executor/layers/mamba/mamba_utils.py).
    """
    mixer = block.mixer
    role = Role.BUFFER
    if mixer in ("full", "window"):
        pages = ceil(context / block_size)
        if mixer == "window" and model.sliding_window:
            pages = min(pages, ceil((model.sliding_window - 1) / block_size) + 1)
        tokens = {"tokens": pages * block_size}
        if latent := model.latent:
            rank = latent.kv_lora_rank + latent.qk_rope_head_dim
            yield Term("latents and rotary keys", role, {**tokens, "kv_rank": rank}, width)
        else:
            heads = {"kv_heads": repeated(model.num_key_value_heads, tensor), "head_dim": model.head_dim}
            yield Term("keys and values", role, {**tokens, **heads, "pair": 2}, width)
    elif mixer == "mamba" and (space := model.state_space):
        heads = {"heads": space.num_heads, "head_dim": space.head_dim}
        groups = {"kv_heads": repeated(space.n_groups, tensor), "state": space.state_size}
        yield Term("states", role, {**heads, "state": space.state_size}, WIDTH)
        yield Term("last inputs of the convolution", role, {**heads, "taps": space.conv_kernel - 1}, WIDTH)
        taps = {"pair": 2, "taps": space.conv_kernel - 1}
        yield Term("last groups of the convolution", role, {**groups, **taps}, WIDTH)
    elif mixer == "delta" and (delta := model.delta):
        values = {"heads": delta.num_value_heads, "value_head_dim": delta.value_head_dim}
        keys = {"heads": delta.num_key_heads, "key_head_dim": delta.key_head_dim}
        taps = {"taps": delta.conv_kernel - 1}
        yield Term("states", role, {**values, "key_head_dim": delta.key_head_dim}, WIDTH)
        yield Term("last values of the convolution", role, {**values, **taps}, WIDTH)
        yield Term("last queries and keys of the convolution", role, {**keys, "pair": 2, **taps}, WIDTH)


def working_terms(model: ModelSpec, block: Block, tokens: int, tensor: int) -> Iterator[list[Term]]:
    """Tensors that are alive at once in a block's forward over a chunk: in its mixer, then in its MLP.

    Eagerly run, all results of the part live until it returns, beside the residual stream and the part's
    input. Flash attention's own scratch is left out; compiled code frees some of these sooner.
    """

    def part(**named: dict[str, int]) -> list[Term]:
        stream = {
            "residual stream": {"residual": model.hidden_size},
            "input": {"residual": model.hidden_size},
        }
        stream |= {"output": {"residual": model.hidden_size}} | named
        return [Term(n, Role.TRANSIENT, {"tokens": tokens, **dims}, WIDTH) for n, dims in stream.items()]

    yield part(**mixer_results(model, block, tensor))
    yield part(**mlp_results(model, block))


def mixer_results(model: ModelSpec, block: Block, tensor: int) -> dict[str, dict[str, int]]:
    """Results within a mixer, by name: their elements per token."""
    heads = {"heads": model.num_attention_heads}
    if block.mixer == "mamba" and (space := model.state_space):
        inner = {"heads": space.num_heads, "head_dim": space.head_dim}
        groups = {"kv_heads": repeated(space.n_groups, tensor), "state": space.state_size, "pair": 2}
        # Gate and inputs, convolved inputs, outputs; groups before and after the convolution; the states
        # at the chunks' ends, in fp32.
        states = {**inner, "state": ceil(2 * space.state_size / space.chunk_size)}
        return {"inner": {**inner, "copies": 4}, "groups": {**groups, "copies": 2}, "states": states}
    if block.mixer == "delta" and (delta := model.delta):
        values = {"heads": delta.num_value_heads, "value_head_dim": delta.value_head_dim, "copies": 4}
        keys = {"heads": delta.num_key_heads, "key_head_dim": delta.key_head_dim, "pair": 2, "copies": 2}
        return {"values": values, "keys": keys}
    if block.mixer == "none":
        return {}
    if latent := model.latent:
        key = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        expanded = latent.qk_nope_head_dim + latent.v_head_dim
        ranks = latent.kv_lora_rank + latent.qk_rope_head_dim + (latent.q_lora_rank or 0)
        wide = {"width": 2 * key + expanded + latent.v_head_dim}  # queries, keys; expansions; outputs
        return {"latents": {"kv_rank": ranks}, "heads": heads | wide}
    keys = {"kv_heads": repeated(model.num_key_value_heads, tensor), "head_dim": model.head_dim, "pair": 2}
    own = heads | {"head_dim": model.head_dim}
    return {"queries": own, "keys and values": keys, "attention output": own}


def mlp_results(model: ModelSpec, block: Block) -> dict[str, dict[str, int]]:
    """Results within an MLP, by name: their elements per token."""
    up = 2 if model.gated_mlp else 1
    if block.mlp == "dense":
        return {
            "up": {"ffn": model.intermediate_size, "pair": up},
            "activated": {"ffn": model.intermediate_size},
        }
    if block.mlp == "experts" and (experts := model.experts):
        routed = {"top_k": experts.num_experts_per_tok}
        found = {
            "routed up": {**routed, "ffn": experts.intermediate_size, "pair": up},
            "routed activated": {**routed, "ffn": experts.intermediate_size},
            "routed outputs": {**routed, "residual": model.hidden_size},
        }
        if shared := experts.shared_intermediate_size:
            found |= {"shared up": {"ffn": shared, "pair": up}, "shared activated": {"ffn": shared}}
        return found
    return {}


def sampling_terms(model: ModelSpec, batch: int) -> Iterator[Term]:
    """Logits of all sequences, of the whole vocabulary on every rank, and what sampling makes of them."""
    yield Term("logits and sampling", Role.TRANSIENT, {"batch": batch, "words": model.vocab_size}, SAMPLING)
