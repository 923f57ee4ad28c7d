"""A model in Megatron-LM's flags, or which part of it its scripts have none for.

Sources: megatron-core 0.17.0, 0.18.0 and 0.19.2, training/arguments.py, training/argument_utils.py
(core_transformer_config_from_args) and core/transformer/transformer_config.py; what single families need is
Megatron-Bridge 0.6.2's, models/*/*_bridge.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from planner.export.base import NotExpressible, Subject
from planner.export.megatron_flags import MODEL
from planner.files import plain
from planner.model import Block, ModelSpec

REFUSED: Mapping[str, tuple[Any, str]] = {
    "kind": ("decoder", "pretrain_gpt.py trains decoders"),
    "norm_placement": ("pre", "its blocks have a norm before each part"),
    "norm_vectors": (None, "its norms learn a weight, LayerNorm a bias too"),
    "parallel_residual": (False, "its blocks add up one part after the other"),
    "embedding_norm": (False, "it has no norm behind the embedding"),
    "position_offset": (0, "its table of positions starts with the first one"),
    "attention_softcap": (None, "it does not cap scores"),
    "logits_softcap": (None, "it does not cap logits"),
    "head": ("language", "its head predicts tokens"),
    "head_bias": (False, "its head has no bias"),
    "pooler": (False, "it has no pooler"),
    "num_labels": (0, "it has no classifier"),
    "type_vocab_size": (0, "it has no types of tokens"),
    "patches": (None, "it takes no images"),
}
"""Fields of a model, the one value that can be stated, and why no other can."""
GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""Without a gate all of them are Megatron-LM's fused bias and GELU, which is the approximation by tanh."""
OFFSET_NORMS = ("nemotron", "qwen3_next")
"""Families whose norms' weights are counted from 1 (nemotron_bridge.py, qwen3_next_bridge.py)."""
CLAMPED = {"--quick-geglu": True, "--glu-linear-offset": 1.0, "--activation-func-clamp-value": 7.0}
"""gpt_oss (gpt_oss_bridge.py): its gated activation, for which ``hidden_act`` has no word."""
SYMBOLS = {
    ("mamba", "none"): "M",
    ("full", "none"): "*",
    ("none", "dense"): "-",
    ("none", "experts"): "E",
}
"""Layers of ``--hybrid-layer-pattern`` (core/models/hybrid/hybrid_layer_allocation.py)."""
LEFT = (
    "the base of rotary positions, norms' epsilon, initialisation and how a router scores and balances are "
    "not in a plan: give --set rotary-base and norm-epsilon, add flags for the rest; Megatron-LM's defaults "
    "hold else, and no memory depends on them"
)


def is_hybrid(model: ModelSpec) -> bool:
    """Is it one of layers of one part, which another script trains?"""
    return any("none" in (block.mixer, block.mlp) for block in model.blocks)


def model_values(subject: Subject, version: str) -> dict[str, Any]:
    """What every flag of the model is for a plan, by its name. Raises NotExpressible."""
    model, latent, experts = subject.model, subject.model.latent, subject.model.experts
    check_model(model)
    if latent and latent.q_lora_rank is None and version not in ("0.17", "0.18"):
        raise NotExpressible(
            f"q_lora_rank=None: the latent attention of megatron-core {version} has a norm of queries then, "
            "which the model has not (core/transformer/mla_qk_norm_config.py): use --framework-version 0.18"
        )
    found: dict[str, Any] = {}
    for flag in MODEL:
        if not flag.rule and (value := _of(subject, flag.of)) is not None:
            found[flag.name] = value
    found["--kv-channels"] = latent.v_head_dim if latent else model.head_dim
    found["--max-position-embeddings"] = model.max_position_embeddings
    if model.position_embedding != "learned":  # there they are parameters, and no sequence is longer
        found["--max-position-embeddings"] = max(model.max_position_embeddings, subject.job.seq_length)
    multiple = subject.job.stack.vocabulary_multiple * subject.layout.tensor_parallel
    found["--vocab-size"] = model.vocab_size - (version == "0.17")
    found["--padded-vocab-size"] = -(-model.vocab_size // multiple) * multiple
    if not latent and model.num_key_value_heads != model.num_attention_heads:
        found |= {"--group-query-attention": True, "--num-query-groups": model.num_key_value_heads}
    if latent:
        found |= {"--multi-latent-attention": True, "--qk-layernorm": True}
    else:
        found["--qk-layernorm"] = model.qk_norm
    if model.gated_mlp:
        found |= CLAMPED if model.model_type == "gpt_oss" else {"--swiglu": True}
    found["--disable-bias-linear"] = model.mlp_bias or bool(experts and experts.biases)
    found["--add-qkv-bias"] = model.qkv_bias and not found["--disable-bias-linear"]
    found["--apply-layernorm-1p"] = model.model_type in OFFSET_NORMS
    dropouts = {"--hidden-dropout": model.dropout, "--attention-dropout": model.attention_dropout}
    given = subject.plan.training.dropout
    found |= dropouts if given is None else dict.fromkeys(dropouts, given)
    if subject.options().get("mtp") == "on":
        found["--mtp-num-layers"] = model.mtp_layers
    return found | dict(_patterns(model))


def _of(subject: Subject, path: str) -> Any:
    """A field of a model or of one of its parts; None where there is no such part."""
    value: Any = {"model": subject.model, "stack": subject.job.stack}[path.split(".")[0]]
    for name in path.split(".")[1:]:
        value = getattr(value, name) if value is not None else None
    return value


def _patterns(model: ModelSpec) -> Iterator[tuple[str, Any]]:
    """Which of its layers are of which kind, where they are unlike."""
    if is_hybrid(model):
        return  # the pattern says it, cut into stages (planner/export/megatron_layout.py)
    windows = [int(block.mixer == "window") for block in model.blocks]
    if any(windows):
        assert model.sliding_window is not None
        yield "--window-size", f"{model.sliding_window - 1},0"
        if not all(windows):
            yield "--window-attn-skip-freq", _listed(windows)
    experts = [int(block.mlp == "experts") for block in model.blocks]
    if any(experts) and not all(experts):
        yield "--moe-layer-freq", _listed(experts)
    if model.experts and model.experts.num_experts_per_tok == 1:
        yield "--moe-router-pre-softmax", True
    deltas = [int(block.mixer == "delta") for block in model.blocks]
    if any(deltas):
        yield "--experimental-attention-variant", "gated_delta_net"
        yield "--linear-attention-freq", _listed(deltas)


def _listed(which: list[int]) -> str:
    return f"[{','.join(map(str, which))}]"


def symbol_of(block: Block) -> str:
    """A layer's letter in a hybrid's pattern. Raises NotExpressible."""
    if (block.mixer, block.mlp) not in SYMBOLS:
        raise NotExpressible(
            f"a hybrid's layer of {block.mixer} and {block.mlp}: --hybrid-layer-pattern has such of one part"
        )
    return SYMBOLS[block.mixer, block.mlp]


def check_model(model: ModelSpec) -> None:
    """Raises NotExpressible for the first part of a model that Megatron-LM's scripts cannot be told."""
    for problem in _problems(model):
        raise NotExpressible(
            f"{plain(model.name, 100)}: {problem}: Megatron-LM's scripts have no such model, "
            "only code of one's own has"
        )


def _problems(model: ModelSpec) -> Iterator[str]:
    for name, (able, why) in REFUSED.items():
        if (value := getattr(model, name)) != able:
            yield f"{name}={value}, and {why}"
    if model.position_embedding not in ("rotary", "learned", "none"):
        yield f"position_embedding={model.position_embedding} has no --position-embedding-type"
    if model.position_embedding == "none" and not is_hybrid(model):
        yield "position_embedding=none is of hybrids"
    if model.qk_norm and model.qk_norm_weights != "shared":
        yield f"qk_norm_weights={model.qk_norm_weights}, and --qk-layernorm has one weight for all heads"
    yield from _of_activation(model)
    yield from _of_biases(model)
    mixers = {block.mixer for block in model.blocks}
    if other := mixers - {"full", "window", "delta", *(("mamba", "none") if is_hybrid(model) else ())}:
        yield f"its mixers are {', '.join(sorted(other))}"
    if is_hybrid(model) and (model.latent or mixers & {"window", "delta"}):
        yield "a hybrid's attention is full and has keys and values of its own"
    if model.state_space and model.state_space.conv_kernel != 4:
        yield f"conv_kernel={model.state_space.conv_kernel}, and a state space's convolution takes 4 tokens"


def _of_activation(model: ModelSpec) -> Iterator[str]:
    act = model.hidden_act
    if model.gated_mlp and act not in ("silu", "swish"):
        yield f"hidden_act={act} behind a gate, for which --swiglu has silu"
    if not model.gated_mlp and act not in (*GELU, "relu2"):
        yield f"hidden_act={act} without a gate, for which there are GELU and --squared-relu"
    if act == "relu2" and (model.mlp_bias or (model.experts and model.experts.biases)):
        yield "hidden_act=relu2 with biases, which its fused kernels do not take"


def _of_biases(model: ModelSpec) -> Iterator[str]:
    """All products of a block have a bias, or none but that of queries, keys and values."""
    experts = model.experts
    given = {"attention_output_bias": model.attention_output_bias, "mlp_bias": model.mlp_bias}
    if experts:
        given |= {"experts.biases": experts.biases, "experts.router_bias": experts.router_bias}
        if "dense" not in model.mlps:
            del given["mlp_bias"]
    if not any(given.values()):
        return
    given["qkv_bias"] = model.qkv_bias
    if not all(given.values()):
        without = ", ".join(name for name, there in given.items() if not there)
        yield f"biases but not {without}: there all products have one, or none (--disable-bias-linear)"
    if model.attention_gate or model.latent:
        yield "biases of gated or latent attention"
