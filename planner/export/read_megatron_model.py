"""The model that Megatron-LM's flags make: a ``ModelSpec`` with its own defaults where a flag is left out.

Sources: megatron-core 0.19.2, training/arguments.py (``validate_args``: widths), training/argument_utils.py,
core/transformer/transformer_config.py, core/models/gpt/gpt_layer_specs.py, core/transformer/moe/router.py (a
bias of the router where products have one), core/transformer/utils.py (``is_layer_window_attention``),
core/models/hybrid/hybrid_layer_allocation.py (a hybrid's letters).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from planner.errors import InputError
from planner.export.megatron_arguments import Arguments
from planner.export.megatron_flags import BY_NAME
from planner.export.megatron_model import CLAMPED, SYMBOLS
from planner.export.shell_expand import shown
from planner.files import plain
from planner.model import ModelSpec
from planner.specs import first_problem

MOST_LAYERS = 10_000
NEEDED = ("--num-layers", "--hidden-size", "--num-attention-heads")
VOCABULARIES = {
    "GPT2BPETokenizer": 50257,
    "Llama2Tokenizer": 32000,
    "BertWordPieceLowerCase": 30522,
    "BertWordPieceCase": 28996,
}
"""Entries of tokenizers that come with one vocabulary."""
OTHER_SCRIPTS = ("bert", "t5", "retro", "ict", "vision", "vlm", "mimo", "multimodal", "inpaint", "dino")
"""Parts of the names of Megatron-LM's scripts that train no decoder."""


def model_of(found: Arguments, script: str = "") -> ModelSpec | None:
    """The model of a command line; None where it does not say enough. Findings go to ``found``."""
    base = script.rpartition("/")[2].lower()
    if other := next((one for one in OTHER_SCRIPTS if one in base), None):
        text = f"{shown(base)} trains another model than a decoder ({other}): its shape is not read"
        found.add("warning", "script", text, "give --model")
        return None
    pattern = found.get("--hybrid-layer-pattern") or found.get("--hybrid-override-pattern")
    missing = [name for name in NEEDED if found.get(name) is None and name not in found.open]
    if pattern and missing == ["--num-layers"]:
        missing = []
    if missing:
        if len(missing) < len(NEEDED):
            text = "is not given, and Megatron-LM takes no default for it"
            found.add("error", ", ".join(missing), text, "give it, or --model")
        return None
    if any(name in found.open for name in NEEDED):
        return None
    try:
        return ModelSpec(**_fields(found, pattern))
    except ValidationError as error:
        text = f"no model is made of its flags: {plain(first_problem(error), 200)}"
        found.add("error", "model", text, "correct them, or give --model")
    except InputError as error:
        found.add("error", "model", str(error), "correct it, or give --model")
    return None


def _fields(found: Arguments, pattern: str | None) -> dict[str, Any]:
    letters = _letters(pattern) if pattern else ""
    layers = len(letters) or found.get("--num-layers")
    hidden, heads = found.get("--hidden-size"), found.get("--num-attention-heads")
    for name, value in (
        ("--num-layers", layers),
        ("--hidden-size", hidden),
        ("--num-attention-heads", heads),
    ):
        if not 1 <= value <= 10**7 or (name == "--num-layers" and value > MOST_LAYERS):
            raise InputError(f"{name} {value}: no model is that large or small")
    latent = _latent(found)
    gated = found.on("--swiglu") or found.on("--quick-geglu")
    width = found.get("--ffn-hidden-size") or (int((4 * hidden * 2 / 3) / 64) * 64 if gated else 4 * hidden)
    biased = not found.on("--disable-bias-linear")
    grouped = found.on("--group-query-attention") and not latent
    if found.get("--kv-channels") is None and hidden % heads and not latent:
        raise InputError(f"--hidden-size {hidden} is no multiple of --num-attention-heads {heads}")
    head_dim = found.get("--kv-channels") or max(1, hidden // heads)
    clamped = all(
        found.on(flag) if value is True else found.get(flag) == value for flag, value in CLAMPED.items()
    )
    fields: dict[str, Any] = {
        "name": "Megatron-LM's flags",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": found.get("--num-query-groups", 1) if grouped else heads,
        "head_dim": latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"] if latent else head_dim,
        "intermediate_size": width,
        "vocab_size": _vocabulary(found),
        "max_position_embeddings": found.get("--max-position-embeddings")
        or found.get("--seq-length")
        or 2048,
        "tie_word_embeddings": not found.on("--untie-embeddings-and-output-weights"),
        "gated_mlp": gated,
        "hidden_act": "silu" if gated else "relu2" if found.on("--squared-relu") else "gelu",
        "norm": "rmsnorm" if found.get("--normalization") == "RMSNorm" else "layernorm",
        "position_embedding": _positions(found),
        "rotary_fraction": found.get("--rotary-percent", 1.0),
        "qkv_bias": biased or found.on("--add-qkv-bias"),
        "attention_output_bias": biased,
        "mlp_bias": biased,
        "qk_norm": found.on("--qk-layernorm") and not latent,
        "attention_gate": found.on("--attention-output-gate"),
        "attention_sinks": found.get("--softmax-type") == "learnable",
        "dropout": found.get("--hidden-dropout", 0.1),
        "attention_dropout": found.get("--attention-dropout", 0.1),
        "latent": latent,
        "mtp_layers": found.get("--mtp-num-layers") or 0,
        "source": "Megatron-LM's flags",
    }
    fields["experts"] = _experts(found, width, biased)
    fields |= _hybrid(found, letters) if letters else _blocks(found, layers, bool(fields["experts"]))
    fields["model_type"] = _type(fields, clamped, found)
    return fields


def _type(fields: Mapping[str, Any], clamped: bool, found: Arguments) -> str:
    """The family that comes nearest: of it only what no field says is taken."""
    if fields.get("state_space"):
        return "mamba2" if set(fields["mixers"]) == {"mamba"} else "nemotron_h"
    if fields.get("delta"):
        return "qwen3_next"
    if clamped:
        return "gpt_oss"
    if fields["latent"]:
        return "deepseek_v3"
    if fields["experts"]:
        return "mixtral"
    if found.on("--apply-layernorm-1p") and not fields["gated_mlp"]:
        return "nemotron"
    return "llama" if fields["gated_mlp"] or fields["position_embedding"] != "learned" else "gpt2"


def _latent(found: Arguments) -> dict[str, Any] | None:
    if not found.on("--multi-latent-attention"):
        return None
    names = {
        flag: BY_NAME[flag].of.rpartition(".")[2]
        for flag in ("--kv-lora-rank", "--qk-head-dim", "--qk-pos-emb-head-dim", "--v-head-dim")
    }
    made = {name: found.get(flag, BY_NAME[flag].default) for flag, name in names.items()}
    return {**made, "q_lora_rank": found.get("--q-lora-rank")}


def _experts(found: Arguments, width: int, biased: bool) -> dict[str, Any] | None:
    if not found.get("--num-experts"):
        return None
    return {
        "num_experts": found.get("--num-experts"),
        "num_experts_per_tok": found.get("--moe-router-topk", 2),
        "intermediate_size": found.get("--moe-ffn-hidden-size") or width,
        "shared_intermediate_size": found.get("--moe-shared-expert-intermediate-size") or 0,
        "shared_gate": found.on("--moe-shared-expert-gate"),
        "router_bias": biased,
        "biases": biased,
    }


def _positions(found: Arguments) -> str:
    kind = found.get("--position-embedding-type", "learned_absolute")
    if found.on("--use-rotary-position-embeddings"):
        kind = "rope"
    known = {"learned_absolute": "learned", "none": "none", "relative": "relative"}
    return known.get(kind, "rotary")


def _blocks(found: Arguments, layers: int, mixture: bool) -> dict[str, Any]:
    """Mixers and MLPs of each layer, where they are unlike."""
    fields: dict[str, Any] = {}
    if mixture and (which := found.get("--moe-layer-freq")) is not None:
        marks = layer_marks("--moe-layer-freq", str(which), layers, lambda n, i: i % n == 0)
        fields["mlps"] = ["experts" if mark else "dense" for mark in marks]
        if not any(marks):
            raise InputError("--moe-layer-freq: no layer has experts, though --num-experts is given")
        if all(marks):
            del fields["mlps"]
    window = re.match(r"\(?\s*(-?\d{1,9})", str(found.get("--window-size") or ""))
    if window and int(window[1]) >= 0:
        skipped = found.get("--window-attn-skip-freq")
        marks = [1] * layers
        if skipped is not None:
            marks = layer_marks(
                "--window-attn-skip-freq", str(skipped), layers, lambda n, i: (i + 1) % n != 0
            )
        if any(marks):
            fields["sliding_window"] = int(window[1]) + 1
        if any(marks) and not all(marks):
            fields["mixers"] = ["window" if mark else "full" for mark in marks]
    variant = found.get("--experimental-attention-variant")
    if variant == "gated_delta_net":
        marks = layer_marks(
            "--linear-attention-freq",
            str(found.get("--linear-attention-freq", 4)),
            layers,
            lambda n, i: (i + 1) % n != 0,
        )
        fields["mixers"] = ["delta" if mark else "full" for mark in marks]
        fields["delta"] = {
            BY_NAME[flag].of.rpartition(".")[2]: found.get(flag, BY_NAME[flag].default)
            for flag in (
                "--linear-num-key-heads",
                "--linear-num-value-heads",
                "--linear-key-head-dim",
                "--linear-value-head-dim",
                "--linear-conv-kernel-dim",
            )
        }
    elif variant:
        text = f"{shown(variant)} is not planned: its layers count as attention over all tokens"
        found.add("warning", "--experimental-attention-variant", text, "")
    return fields


def layer_marks(flag: str, text: str, layers: int, every: Any) -> list[int]:
    """One mark for each layer of ``([0]*3+[1])*4`` or of a number ``N``, where ``every(N, layer)`` holds.

    Raises InputError for what is no such list; it is not evaluated as Python would.
    """
    try:
        if "[" not in text:
            step = int(text)
            if step < 1:
                raise ValueError
            return [int(every(step, index)) for index in range(layers)]
        if len(text) > 100_000:
            raise ValueError
        marks = _list_of(ast.parse(text.strip(), mode="eval").body, 0)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise InputError(f"{flag} {plain(text)} is no list as [0]*3+[1]*58, and no number") from None
    if not isinstance(marks, list) or len(marks) != layers:
        count = len(marks) if isinstance(marks, list) else 0
        raise InputError(f"{flag} {plain(text)} is of {count} layers, --num-layers is {layers}")
    return marks


def _list_of(node: ast.expr, depth: int) -> list[int] | int:
    if depth > 50:
        raise ValueError
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= MOST_LAYERS:
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) <= MOST_LAYERS:
        inner = [_list_of(one, depth + 1) for one in node.elts]
        if all(isinstance(one, int) for one in inner):
            return [one for one in inner if isinstance(one, int)]
    if isinstance(node, ast.BinOp):
        left, right = _list_of(node.left, depth + 1), _list_of(node.right, depth + 1)
        many, times = (left, right) if isinstance(left, list) else (right, left)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            size, made = len(left) + len(right), left + right
        elif isinstance(node.op, ast.Mult) and isinstance(many, list) and isinstance(times, int):
            size = len(many) * times
            made = many * min(times, MOST_LAYERS)
        else:
            raise ValueError
        if size <= MOST_LAYERS:
            return made
    raise ValueError


def _letters(pattern: str) -> str:
    """The layers of a hybrid's pattern: without bars, and without what predicts further tokens."""
    known = {letter for letter in SYMBOLS.values()}
    letters = pattern.partition("/")[0].replace("|", "")
    if not letters or len(letters) > MOST_LAYERS or set(letters) - known:
        able = " ".join(sorted(known))
        raise InputError(f"--hybrid-layer-pattern {plain(pattern)}: planned are layers of {able}")
    return letters


def _hybrid(found: Arguments, letters: str) -> dict[str, Any]:
    kinds = {letter: block for block, letter in SYMBOLS.items()}
    hidden, head = found.get("--hidden-size"), found.get("--mamba-head-dim", 64)
    fields: dict[str, Any] = {
        "mixers": [kinds[letter][0] for letter in letters],
        "mlps": [kinds[letter][1] for letter in letters],
    }
    if "M" in letters:
        fields["state_space"] = {
            "num_heads": found.get("--mamba-num-heads") or max(1, 2 * hidden // head),
            "head_dim": head,
            "n_groups": found.get("--mamba-num-groups", 8),
            "state_size": found.get("--mamba-state-dim", 128),
        }
    if "E" not in letters:
        fields["experts"] = None
    return fields


def _vocabulary(found: Arguments) -> int:
    """Entries of the vocabulary; of a tokenizer that is not known here, what most of them have.

    The planner pads it up to a multiple of 128 times the tensor-parallel degree, as Megatron-LM does; another
    multiple is put in its place.
    """
    own: int | None = found.get("--vocab-size")
    padded: int | None = found.get("--padded-vocab-size")
    if own is None and padded is None:
        own = _of_tokenizer(found)
    if own is None:
        return padded or 0
    multiple: int = found.get("--make-vocab-size-divisible-by", 128)
    cut: int = multiple * (found.get("--tensor-model-parallel-size") or 1)
    if multiple != 128 and multiple > 0 and padded is None and cut > 0:
        return -(-own // cut) * cut
    return own


def _of_tokenizer(found: Arguments) -> int:
    kind = found.get("--tokenizer-type")
    if kind is None and found.get("--merge-file"):
        kind = "GPT2BPETokenizer"
    if kind in VOCABULARIES:
        return VOCABULARIES[kind]
    name = str(found.get("--tokenizer-model") or "").rstrip("/").rpartition("/")[2]
    if name and kind == "HuggingFaceTokenizer":
        from planner.catalog import load_model

        try:
            return int(load_model(name).vocab_size)
        except InputError:
            pass
    text = "is not given, and the tokenizer's own is not known here: planned with 128,256"
    found.add("warning", "--vocab-size", text, "say it with --set vocab-size=N")
    return 128256
