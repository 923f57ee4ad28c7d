"""Hugging Face ``config.json`` to ModelSpec, one small reader per family.

A configuration is data: it is size-bounded, parsed as JSON and looked up by key. Nothing in it is
executed; ``auto_map`` (remote code) is ignored. A key that is left out has the default of the family's
configuration class in transformers, but for a model's main lengths, which must be there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from os.path import abspath
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planner.errors import InputError
from planner.families import encoders, gemma, gpt, hybrid, llama, moe
from planner.families.config import Config, Fields
from planner.files import content, plain
from planner.specs import ModelSpec, first_problem

MAX_BYTES = 1_000_000

FAMILIES: dict[str, Callable[[Config], Fields]] = {
    "llama": llama.llama,
    "mistral": llama.mistral,
    "ministral": llama.ministral,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "phi3": llama.phi3,
    "granite": llama.granite,
    "smollm3": llama.smollm3,
    "seed_oss": llama.seed_oss,
    "arcee": llama.arcee,
    "olmo": llama.olmo,
    "olmo2": llama.olmo2,
    "olmo3": llama.olmo3,
    "stablelm": llama.stablelm,
    "glm4": llama.glm4,
    "cohere": llama.cohere,
    "cohere2": llama.cohere2,
    "nemotron": llama.nemotron,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3,
    "gpt2": gpt.gpt2,
    "gpt_bigcode": gpt.gpt_bigcode,
    "gptj": gpt.gptj,
    "gpt_neo": gpt.gpt_neo,
    "gpt_neox": gpt.gpt_neox,
    "opt": gpt.opt,
    "bloom": gpt.bloom,
    "falcon": gpt.falcon,
    "phi": gpt.phi,
    "mpt": gpt.mpt,
    "starcoder2": gpt.starcoder2,
    "mixtral": moe.mixtral,
    "granitemoe": moe.granitemoe,
    "phimoe": moe.phimoe,
    "olmoe": moe.olmoe,
    "qwen2_moe": moe.qwen2_moe,
    "qwen3_moe": moe.qwen3_moe,
    "gpt_oss": moe.gpt_oss,
    "deepseek_v2": moe.deepseek_v2,
    "deepseek_v3": moe.deepseek_v3,
    "kimi_k2": moe.deepseek_v3,
    "glm4_moe": moe.glm4_moe,
    "llama4_text": moe.llama4,
    "qwen3_next": hybrid.qwen3_next,
    "mamba2": hybrid.mamba2,
    "nemotron_h": hybrid.nemotron_h,
    "bamba": hybrid.bamba,
    "bert": encoders.bert,
    "roberta": encoders.roberta,
    "t5": encoders.t5,
    "vit": encoders.vit,
}

TEXT_PARTS = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
"""Models of text and images, of which ``text_config`` is read, and its family."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys that only a mixture of experts has, or has above zero: in a dense family they would be ignored."""
DENSE = tuple(module.__name__ for module in (llama, gemma, gpt, encoders))
"""Modules of families without experts."""
NATIVE = ("fp8", "mxfp4")
"""Ways in which models are published that were trained in higher precision: their shape is read."""


def model_from_config(data: Any, origin: str, name: str = "", source: str = "") -> ModelSpec:
    """A ModelSpec from a configuration's keys. Raises InputError; ``origin`` is named in it."""
    if not isinstance(data, dict):
        raise InputError(f"{origin}: a model configuration is a JSON object, not {type(data).__name__}")
    label = name or str(data.get("_name_or_path") or "").strip() or _file_name(origin)
    quantized = data.get("quantization_config")
    family = data.get("model_type")
    if isinstance(family, str) and family in TEXT_PARTS and isinstance(data.get("text_config"), dict):
        data = {"model_type": TEXT_PARTS[family]} | data["text_config"]
        source = source or f"the text part of a {family} model; its image part is left out"
        family = data["model_type"]
    if family is None:
        raise InputError(f"{origin}: no model_type in it: give a model's config.json")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{origin}: model_type={str(family)[:60]!r} is not modelled; known are {', '.join(FAMILIES)}. "
            "A model of their kinds can be given by its shape: --model layers=32,hidden=4096,heads=32,..."
        )
    reader = FAMILIES[family]
    if (found := next((key for key in EXPERTS if data.get(key)), None)) and reader.__module__ in DENSE:
        raise InputError(
            f"{origin}: {found}={str(data[found])[:20]}: {family} models are no mixtures of experts"
        )
    if quantized and not (isinstance(quantized, dict) and quantized.get("quant_method") in NATIVE):
        raise InputError(f"{origin}: quantized weights are not planned (yet): leave out quantization_config")
    fields = reader(Config(data, origin))
    try:
        return ModelSpec(name=plain(label or family, 100) or family, source=source, **fields)
    except ValidationError as error:
        raise InputError(f"{origin}: {first_problem(error)}") from None


def _file_name(origin: str) -> str:
    """What a file calls its model: a ``config.json`` has its folder's name, another file its own."""
    path = Path(abspath(origin))
    return path.parent.name if path.name == "config.json" else path.stem if path.suffix else ""


def read_json(path: Path, what: str) -> Any:
    """A JSON file of at most 1 MB. Raises InputError for all that can be wrong with it."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give a {what}, its folder, or a catalog name")
    data = content(path, MAX_BYTES, what)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise InputError(f"{path}: not JSON: {reason}") from None


def read_config(path: str | PathLike[str]) -> ModelSpec:
    """A ModelSpec from a Hugging Face ``config.json`` or the folder that holds one."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    return model_from_config(read_json(file, "config.json"), str(file))
