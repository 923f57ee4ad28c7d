"""What of a model is counted and not planned yet: one place to take a refusal out when its rows arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from planner.hybrids import hybrid_reasons
from planner.model import Block, ModelSpec
from planner.stacks.base import Stack

NO_OPTIONS: Mapping[str, str] = {}

TRACED = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "bloom")
"""Families whose blocks the stacks' rows were tested against."""
COUNTED = (
    *("ministral", "phi3", "granite", "smollm3", "seed_oss", "arcee", "stablelm", "nemotron", "gemma"),
    *("gpt_bigcode", "gpt_neo", "starcoder2", "falcon"),
)
"""Others that have blocks of the same parts: what their modules keep was not traced."""
PARTS = {"latent": "latent attention's products", "delta": "gated delta nets"}
"""Parts of a model whose fields have other names."""
PLANNED_MIXERS = {"full", "window", "mamba", "delta", "none"}
"""Mixers that unlike blocks of one model may have."""

MEGATRON = ("ministral", "phi3", "stablelm", "nemotron", "gemma", "starcoder2")
"""Others of ``COUNTED`` whose blocks Megatron Core runs as its usual parts: its flags choose norm, activation
and biases (arguments.py: --normalization, --squared-relu, --swiglu, --rotary-percent, --window-size). It has
no multipliers of Granite's kind, no parallel residuals of Falcon's, no alternating windows of GPT-Neo's."""

OTHER_MIXTURES = ("granitemoe", "phimoe", "llama4_text")
"""Mixtures that are not Megatron Core's: multipliers, a router without softmax, attention in chunks."""


def unfused(model: ModelSpec) -> str:
    """What of a model's attention no fused kernel of PyTorch computes; empty where one does."""
    if model.position_embedding == "alibi":
        return "linear biases of the scores"
    if model.attention_softcap:
        return "capped scores"
    if model.attention_sinks:
        return "attention sinks"
    if model.position_embedding == "relative":
        return "learned biases of the scores"
    if model.model_type == "falcon" and model.num_key_value_heads == 1 < model.num_attention_heads:
        # ATen/native/transformers/sdp_utils_cpp.h: check_batch_size_and_num_heads_dense.
        return "one key head that is spread over the queries'"
    return ""


def unplanned(
    model: ModelSpec, stack: Stack, precision: str = "", options: Mapping[str, str] = NO_OPTIONS
) -> str:
    """Why no memory can be said of a model in a framework, with what is missing; empty where it can be."""
    if model.model_type in stack.traced:
        return next(_of_traced(model, stack, precision, options), "")
    return next(chain(hybrid_reasons(model, stack.name), _reasons(model, stack)), "")


def uncounted(model: ModelSpec, stack: Stack, options: Mapping[str, str]) -> str:
    """Which choice a stack's rows of a model's parts were not counted with; empty where none."""
    words = {*stack.precision_words, *(f"{name}:{value}" for name, value in options.items())}
    for part, without in stack.parts.items():
        for word in without:
            if getattr(model, part) and word in words:
                choice = word.replace(":", "=")
                fix = f"leave out {choice.partition('=')[0]}"
                if word in stack.precision_words:
                    choice, fix = "precision in 8 bits", "use --precision bf16"
                part = PARTS.get(part, part.replace("_", " "))
                return (
                    f"{choice}: framework {stack.name} is planned without it for {model.model_type}, whose "
                    f"{part} were traced in no such run: {fix}"
                )
    return ""


def _of_traced(model: ModelSpec, stack: Stack, precision: str, options: Mapping[str, str]) -> Iterator[str]:
    """Of a family that the stack's rows were traced for: what of it was not."""
    kind = f"{model.name}: what {model.model_type} models keep is known"
    if precision in stack.autocast or precision == "fp32":
        yield f"{kind} in half precision without autocast, not with precision={precision}: use pure-bf16"
    if options.get("compile") == "on":
        yield f"{kind} of modules as they are, not compiled: use compile=off"
    if (part := unfused(model)) and options.get("attention") != "eager":
        yield f"{kind} with attention=eager: no fused kernel computes {part}"
    if model.model_type == "falcon" and model.position_embedding == "alibi":
        yield f"{kind} with rotary positions, not with linear biases"
    if model.model_type == "bert" and (model.head != "masked" or model.pooler):
        yield f"{kind} with the head of a masked language model: give architectures ['BertForMaskedLM']"
    if model.model_type == "t5" and model.gated_mlp:
        yield f"{kind} with feed_forward_proj=relu, not with a gate"
    if model.model_type == "vit" and (model.pooler or not model.num_labels):
        yield f"{kind} of image classifiers: give architectures ['ViTForImageClassification']"


def _reasons(model: ModelSpec, stack: Stack) -> Iterator[str]:
    needed = (
        f"is counted (planner catalog models), but what its layers keep is not planned in {stack.name} (yet)"
    )
    in_megatron = stack.name == "megatron"
    if model.kind != "decoder":
        yield f"{model.name}: an {model.kind} model {needed}"
    parts = stack.parts if not stack.families or model.model_type in stack.families else {}
    if model.experts is not None and (
        "experts" not in parts or (in_megatron and model.model_type in OTHER_MIXTURES)
    ):
        yield (
            f"{model.name}: mixtures of experts of {model.model_type}'s kind are not planned in {stack.name} "
            "(yet): they are counted only"
        )
    if model.latent is not None and "latent" not in parts:
        yield f"{model.name}: multi-head latent attention {needed} in {stack.name}"
    if len(model.block_kinds) > 1 and not {block.mixer for block in model.block_kinds} <= PLANNED_MIXERS:
        kinds = " and ".join(_name(block) for block in model.block_kinds)
        yield f"{model.name}: a model of unlike blocks ({kinds}) {needed}"
    if model.norm_placement != "pre" or model.norm_vectors is not None:
        yield f"{model.name}: norms of {model.model_type}'s kind and place: a block of them {needed}"
    unplaced = model.position_embedding == "none" and model.state_space is None
    if unplaced or model.position_embedding == "relative" or model.head != "language" or model.head_bias:
        yield f"{model.name}: positions or a head of {model.model_type}'s kind: such a model {needed}"
    sinks = model.attention_sinks and "attention_sinks" not in parts
    gates = model.attention_gate and "attention_gate" not in parts
    if gates or sinks or model.attention_softcap or model.logits_softcap:
        yield f"{model.name}: attention with gates, sinks or capped scores {needed}"
    if model.qk_norm and model.qk_norm_weights != "shared":
        yield f"{model.name}: query and key norms of {model.model_type}'s kind: a block of them {needed}"
    if model.model_type in COUNTED and not (in_megatron and model.model_type in MEGATRON):
        yield f"{model.name}: model_type={model.model_type!r} {needed}; planned are {', '.join(TRACED)}"


def _name(block: Block) -> str:
    return f"{block.mixer} attention" if block.mixer in ("full", "window") else block.mixer
