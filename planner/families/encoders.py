"""Encoders, of text and of images, and encoder-decoders. ``architectures`` says which head there is."""

from __future__ import annotations

from planner.families.config import Config, Fields, sizes
from planner.families.gpt import BIASED

TEXT_HEADS: dict[str, Fields] = {
    "Model": {"head": "none", "pooler": True},
    "ForMaskedLM": {"head": "masked", "head_bias": True},
    "ForPreTraining": {"head": "masked", "head_bias": True, "pooler": True, "num_labels": 2},
    "ForSequenceClassification": {"head": "none", "pooler": True},
}


def _head(config: Config, prefix: str, heads: dict[str, Fields], usual: str) -> tuple[str, Fields]:
    """The head of the first of ``architectures``, or the usual one, with its name."""
    listed = config.get("architectures", None) or [prefix + usual]
    name = str(listed[0])[:60] if isinstance(listed, list) else str(listed)[:60]
    kind = name.removeprefix(prefix)
    if not name.startswith(prefix) or kind not in heads:
        known = ", ".join(prefix + one for one in heads)
        raise config.error(f"architectures: {name!r} is not modelled; known are {known}")
    return kind, heads[kind]


def _labels(config: Config) -> int:
    """Classes of a classifier: 2, unless their names or their number is given."""
    names = config.get("id2label", None)
    return len(names) if isinstance(names, dict) else config.integer("num_labels", default=2)


def _text(config: Config, prefix: str, heads: dict[str, Fields], padding: int) -> Fields:
    config.refuse_unless("is_decoder", (False,), False)
    config.refuse_unless("add_cross_attention", (False,), False)
    config.refuse_unless("position_embedding_type", ("absolute",), "absolute")
    kind, head = _head(config, prefix, heads, "Model")
    if kind == "ForSequenceClassification":
        head = head | {"num_labels": _labels(config)}
    rows = config.integer("max_position_embeddings", default=512)
    return (
        sizes(config, config.integer("hidden_size"), config.integer("num_attention_heads"))
        | BIASED
        | {
            "kind": "encoder",
            "num_hidden_layers": config.blocks(),
            "intermediate_size": config.integer("intermediate_size"),
            "max_position_embeddings": rows - padding,
            "position_offset": padding,
            "position_embedding": "learned",
            "type_vocab_size": config.get("type_vocab_size", 2),
            "embedding_norm": True,
            "norm_placement": "post",
            "tie_word_embeddings": config.flag("tie_word_embeddings", True),
            "hidden_act": config.get("hidden_act", "gelu"),
            "dropout": config.get("hidden_dropout_prob", 0.1),
            "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
        }
        | head
    )


def bert(config: Config) -> Fields:
    """``bert``: the model with its pooler, with the head that it is trained with, or a classifier."""
    return _text(config, "Bert", TEXT_HEADS, 0)


def roberta(config: Config) -> Fields:
    """``roberta``: the first positions belong to padding."""
    heads = {name: TEXT_HEADS[name] for name in ("Model", "ForMaskedLM")}
    return _text(config, "Roberta", heads, config.integer("pad_token_id", default=1, least=0) + 1)


def t5(config: Config) -> Fields:
    """``t5``: encoder blocks, then decoder blocks, which attend to the encoder's output too.

    ``tie_word_embeddings`` false, as in T5 1.1 (Shazeer 2020, arXiv:2002.05202), is a head of its own.
    """
    _head(config, "T5", {"ForConditionalGeneration": {}, "WithLMHeadModel": {}}, "ForConditionalGeneration")
    hidden, heads = (
        config.integer("d_model", "hidden_size"),
        config.integer("num_heads", "num_attention_heads"),
    )
    layers = config.blocks("num_layers", "num_hidden_layers")
    decoders = config.integer("num_decoder_layers", default=layers, most=10_000)
    gate, _, act = str(config.get("feed_forward_proj", "relu")).rpartition("-")
    if gate not in ("", "gated"):
        config.refuse_unless("feed_forward_proj", ("relu", "gated-gelu"), "relu")
    return {
        "model_type": config.family,
        "kind": "encoder-decoder",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": config.integer("d_kv", "head_dim", default=64),
        "vocab_size": config.integer("vocab_size"),
        "num_hidden_layers": layers + decoders,
        "mixers": ("bidirectional",) * layers + ("cross",) * decoders,
        "intermediate_size": config.integer("d_ff"),
        "max_position_embeddings": config.integer("n_positions", default=512),
        "position_embedding": "relative",
        "relative_buckets": config.integer("relative_attention_num_buckets", default=32),
        "tie_word_embeddings": config.flag("tie_word_embeddings", True),
        "gated_mlp": bool(gate),
        "hidden_act": "gelu_new" if gate and act == "gelu" else act,
        "dropout": config.get("dropout_rate", 0.1),
        "attention_dropout": config.get("dropout_rate", 0.1),
    }


def vit(config: Config) -> Fields:
    """``vit``: an image classifier, or the model with its pooler. Tokens: patches, and a class."""
    heads: dict[str, Fields] = {
        "ForImageClassification": {"num_labels": _labels(config)},
        "Model": {"pooler": True},
    }
    _, head = _head(config, "ViT", heads, "ForImageClassification")
    hidden = config.integer("hidden_size")
    config.refuse_unless("pooler_output_size", (hidden,), hidden)
    image = config.integer("image_size", default=224)
    patch = config.integer("patch_size", default=16)
    if patch > image:
        raise config.error(f"patch_size={patch} is more than image_size={image}")
    bias = config.flag("qkv_bias", True)
    return (
        sizes(
            Config({**config.data, "vocab_size": 1}, config.origin),
            hidden,
            config.integer("num_attention_heads"),
        )
        | BIASED
        | {
            "kind": "vision",
            "vocab_size": 0,
            "qkv_bias": bias,
            "num_hidden_layers": config.blocks(),
            "intermediate_size": config.integer("intermediate_size"),
            "max_position_embeddings": (image // patch) ** 2 + 1,
            "position_embedding": "learned",
            "patches": {
                "image_size": image,
                "patch_size": patch,
                "channels": config.integer("num_channels", default=3),
            },
            "hidden_act": config.get("hidden_act", "gelu"),
            "head": "none",
            "dropout": config.get("hidden_dropout_prob", 0.0),
            "attention_dropout": config.get("attention_probs_dropout_prob", 0.0),
        }
        | head
    )
