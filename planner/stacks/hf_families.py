"""What transformers' modules keep in families beside Llama's and GPT's: norms, attention, logits.

Counted in transformers 5.23.0 under torch 2.13 in half precision without autocast
(tests/data/traced_families.json). Steps are those of planner/layers.py: a norm on a part's output runs
backward before the part's last product.
"""

from __future__ import annotations

from planner.stacks.base import ALWAYS, BYTE, COMPUTE, FP32, INT64, UNTIL_FULL, Row
from planner.stacks.traffic import given
from strategies.base import Role

H, A, AD, KD, SS = (
    "batch seq residual",
    "batch seq heads",
    "batch seq heads head_dim",
    "batch seq kv_heads head_dim",
    "batch heads seq seq_k",
)
F, ONE = "batch seq ffn", "batch seq residual:1"
ALL = "shared combine down act up norm2 cross out core qkv norm1"
TRANSIENT = Role.TRANSIENT

TRACED = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi",
    "falcon",
    "starcoder2",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "bert",
    "vit",
    "t5",
)
"""The families whose blocks these rows, and those of planner/stacks/hf_experts.py, were tested against."""

LAUNCHES: dict[str, tuple[float, float]] = {
    "gemma": (42, 73),
    "gemma2": (75, 121),
    "gemma3_text": (82, 141),
    "phi3": (38, 72),
    "phi": (31, 57),
    "falcon": (31, 42),
    "starcoder2": (22, 42),
    "olmo2": (56, 113),
    "mixtral": (57, 95),
    "qwen3_moe": (70, 119),
    "olmoe": (70, 119),
    "deepseek_v2": (69, 121),
    "deepseek_v3": (101, 157),
    "gpt_oss": (75, 128),
    "bert": (14, 28),
    "vit": (12, 26),
    "t5": (51, 87),  # of an encoder's block and a decoder's, the mean
}
"""Kernels of a block's forward and backward (tests/data/traced_traffic_families.json)."""

NORMS = (
    # A norm that multiplies with its weight in fp32 keeps what it normalised in fp32.
    Row("normalised values in fp32", H, 2, FP32, UNTIL_FULL, "norms_in_fp32 !norms:output", steps="qkv up"),
    Row(
        "normalised values in fp32",
        H,
        2,
        FP32,
        UNTIL_FULL,
        "norms_in_fp32 norms:output",
        steps="combine norm2",
    ),
    Row("parts' outputs in fp32", H, 2, FP32, UNTIL_FULL, "norms:output", steps="combine norm2"),
    # Norms on the parts' outputs alone: the products read the residual stream itself.
    Row("block input", H, 1, COMPUTE, ALWAYS, "norms:output", steps="norm1"),
    Row("MLP input", H, 1, COMPUTE, UNTIL_FULL, "norms:output", steps="up"),
    # A sandwich has them besides the others.
    Row("parts' outputs in fp32", H, 2, FP32, UNTIL_FULL, "norms:sandwich", steps="combine norm2"),
    Row("parts' outputs, normalised", H, 2, FP32, UNTIL_FULL, "norms:sandwich", steps="combine norm2"),
    Row(
        "statistics of the outputs' norms", ONE, 2, FP32, UNTIL_FULL, "norms:sandwich", steps="combine norm2"
    ),
    Row(
        "temporaries of the outputs' norms",
        H,
        8,
        FP32,
        when="norms:output",
        role=TRANSIENT,
        steps="combine norm2",
    ),
    Row(
        "temporaries of the output's norm", H, 4, FP32, when="norms:sandwich", role=TRANSIENT, steps="combine"
    ),
    # One norm for both parts of a parallel block.
    Row("norm output", H, 1, COMPUTE, UNTIL_FULL, "norms:shared", steps="qkv"),
    Row("norm statistics", ONE, 2, FP32, UNTIL_FULL, "layernorm norms:shared", steps="norm1"),
)

ATTENTION = (
    Row("query, normalised in fp32", AD, 1, FP32, UNTIL_FULL, "qk_norm norms_in_fp32", steps="core"),
    Row("key, normalised in fp32", KD, 1, FP32, UNTIL_FULL, "qk_norm norms_in_fp32", steps="core"),
    Row("statistics of query and key norm", ONE, 2, FP32, UNTIL_FULL, "norms_over_heads", steps="core"),
    # Phi-3's value is a view of the product that makes query, key and value.
    Row("query before its turn", AD, 1, COMPUTE, UNTIL_FULL, "phi3 !eager !masked", steps="core"),
    Row("key before its turn", KD, 1, COMPUTE, UNTIL_FULL, "phi3 !eager !masked", steps="core"),
    Row("query before its turn", AD, 1, COMPUTE, UNTIL_FULL, "phi3 !eager masked !grouped", steps="core"),
    Row("key before its turn", KD, 1, COMPUTE, UNTIL_FULL, "phi3 !eager masked !grouped", steps="core"),
    Row(
        "attention output, merged", AD, 1, COMPUTE, UNTIL_FULL, "turned_in_parts !eager !masked", steps="core"
    ),
    Row("tanh of the scores", SS, 1, COMPUTE, UNTIL_FULL, "capped_scores eager", steps="core"),
    Row("place of the highest score", A, 1, INT64, UNTIL_FULL, "sinks", steps="core"),
)

# T5's norm keeps its input as it came, too; it drops out within the MLP.
T5 = (
    Row("norm inputs", H, 2, COMPUTE, UNTIL_FULL, steps="norm1 norm2"),
    Row("first product's output, dropped out", F, 1, COMPUTE, UNTIL_FULL, "dropout", steps="down"),
    Row("dropout mask of the MLP", F, 1, BYTE, UNTIL_FULL, "dropout", steps="down"),
    Row("gradient of the position bias", "heads seq seq_k", 11, role=TRANSIENT, steps=ALL),
)
# Attention to the encoder's output, with a norm and a dropout of its own.
CROSS = (
    Row("norm input in fp32", H, 1, FP32, UNTIL_FULL, steps="cross"),
    Row("norm input, normalised values and output", H, 3, COMPUTE, UNTIL_FULL, steps="cross"),
    Row("norm statistics", ONE, 1, FP32, UNTIL_FULL, steps="cross"),
    Row("dropout mask", H, 1, BYTE, UNTIL_FULL, "dropout", steps="cross"),
    Row("query, key, value and attention output", AD, 4, COMPUTE, UNTIL_FULL, steps="cross"),
    Row("attention probabilities", SS, 1, COMPUTE, UNTIL_FULL, steps="cross"),
    Row("probabilities before dropout", SS, 1, COMPUTE, UNTIL_FULL, "attention_dropout", steps="cross"),
    Row("attention dropout mask", SS, 1, BYTE, UNTIL_FULL, "attention_dropout", steps="cross"),
    # By then what dropout kept is freed, and value and output, but not the value's gradient.
    Row("gradients of the scores", SS, 2, when="!attention_dropout", role=TRANSIENT, steps="cross"),
    Row("gradient of the scores", SS, 1, when="attention_dropout", role=TRANSIENT, steps="cross"),
    # The encoder's output waits for the gradients that all blocks of the decoder send it.
    Row("gradient of the encoder's output", H, 11, role=TRANSIENT, steps=ALL),
)

BLOCK = (*NORMS, *ATTENTION, *given("t5", *T5), *given("mixer:cross", *CROSS))
EMBEDDING = (
    Row("distances of positions, in buckets", "seq seq_k", 2, INT64, when="relative"),
    Row("dropout masks", H, 2, BYTE, when="t5 dropout"),
)

V = "batch seq vocab"
UNFUSED = "half_loss !loss:fused !loss:chunked"

HEAD = (
    # A masked language model has a layer with an activation and a norm before the vocabulary.
    Row("last block's output, and the layer's own", H, 2, when="head:masked", steps="norm"),
    # Encoder and decoder end in a norm each, which keep their input as it came.
    Row("input of the encoder's norm in fp32", H, 1, FP32, when="t5", steps="norm"),
    Row("normalised values and inputs of both norms", H, 4, when="t5", steps="norm"),
    Row("statistics of the encoder's norm", ONE, 1, FP32, when="t5", steps="norm"),
    Row("dropout masks", H, 2, BYTE, when="t5 dropout", steps="norm"),
    # Encoders and T5 take the loss of the logits as they are.
    Row("log-probabilities", V, 1, when=UNFUSED, steps="loss"),
    Row("gradients of the logits", V, 2, when=UNFUSED, role=TRANSIENT, steps="loss"),
    Row("normalised values in fp32", H, 1, FP32, when="norms_in_fp32 rmsnorm", steps="norm"),
    Row("tanh of the logits", "batch seq vocab", 1, when="capped_logits", steps="loss"),
)
