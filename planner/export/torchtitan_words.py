"""What the planner and torchtitan call the same things: one table for what is written and what is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import NamedTuple

from planner.model import ModelSpec
from strategies.pipeline_parallel import FOLDED

SCHEDULES: Mapping[str, str] = {
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "gpipe": "GPipe",
    "zb-v": "ZBVZeroBubble",
}
"""Pipeline schedules: the planner's, and PyTorch's (torch 2.13, distributed/pipelining/schedules.py)."""
OTHER_SCHEDULES: Mapping[str, str] = {
    "LoopedBFS": "interleaved",
    "InterleavedZeroBubble": "interleaved",
    "DualPipeV": "zb-v",
}
"""PyTorch's schedules that are not planned, and the one that is nearest."""
SINGLE = ("1F1B", "GPipe")
"""Schedules of one stage on a rank; the others have two or more."""
CONTEXT: Mapping[str, str] = {"all-gather": "allgather", "ring": "alltoall"}
OPTIMIZERS: Mapping[str, str] = {"adamw": "AdamW", "adam": "Adam"}
FLOAT8, MX = "quantize.linear.float8", "quantize.linear.mx"


class Precision(NamedTuple):
    """``training.dtype``, ``training.mixed_precision_param``, the converter and its recipe."""

    dtype: str
    param: str
    converter: str = ""
    recipe: str = ""


PRECISIONS: Mapping[str, Precision] = {
    "bf16": Precision("float32", "bfloat16"),
    "fp32": Precision("float32", "float32"),
    "tf32": Precision("float32", "float32"),
    "pure-bf16": Precision("bfloat16", "bfloat16"),
    "fp8-tensorwise": Precision("float32", "bfloat16", FLOAT8, "tensorwise"),
    "fp8-rowwise": Precision("float32", "bfloat16", FLOAT8, "rowwise"),
    "mxfp8": Precision("float32", "bfloat16", MX, "mxfp8_cublas"),
}
TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
"""PyTorch's variable that makes fp32 products TF32 (aten/src/ATen/Context.cpp); torchtitan has no setting."""

FIXED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "0.2": {
        "qkv": ("separate",),
        "norm": ("fused",),
        "root": ("split",),
        "rotary_table": ("model",),
        "router": ("half",),
        "all_to_all": ("kept",),
        "loss": ("eager", "compiled"),
    },
    "0.3": {
        "qkv": ("fused",),
        "norm": ("fused",),
        "root": ("split",),
        "rotary_table": ("layers",),
        "router": ("fp32",),
        "all_to_all": ("kept",),
        "mixed_precision": ("fsdp",),
        "loss": ("eager", "compiled", "chunked"),
    },
}
"""The planner's options that a version decides for itself: the values that it runs. Read in 0.2.2
(models/llama3/model/model.py, infra/parallelize.py, models/moe/moe.py, components/loss.py) and 0.3.0
(models/common, distributed/fsdp.py, components/loss.py)."""


def concerns(option: str, model: ModelSpec, version: str) -> bool:
    """Does an option mean anything for a model? 0.3 makes latent attention's queries and keys apart too."""
    return not (option == "qkv" and model.latent and version == "0.3")


def own_split(layers: int, stages: int, first: int = 1, last: int = 1) -> list[int] | None:
    """Layers on each (virtual) stage as torchtitan splits them, or None where it refuses to.

    Embedding and head count as ``first`` and ``last`` layers, and what is left over goes to the first stages
    (0.2.2, distributed/pipeline_parallel.py, ``generate_llm_fqn_per_model_part``).

    >>> own_split(80, 4), own_split(32, 4, 0, 0), own_split(5, 8)
    ([20, 21, 20, 19], [8, 8, 8, 8], None)
    """
    if stages == 1:
        return [layers]
    each, more = divmod(layers + first + last, stages)
    if each < max(first, last, 1):
        return None
    counts = [each + (index < more) for index in range(stages)]
    counts[0] -= first
    counts[-1] -= last
    return counts


def per_stage(layers: int, stages: int, first: int, last: int) -> int | None:
    """The ``pipeline_parallel_layers_per_stage`` that gives so many stages, if there is one.

    >>> per_stage(80, 4, 1, 1), per_stage(5, 4, 0, 0)
    (21, None)
    """
    each = ceil((layers + first + last) / stages)
    return each if ceil((layers + first + last) / each) == stages else None


def virtual_stage(stage: int, chunk: int, depth: int, schedule: str) -> int:
    """Which of torchtitan's stages, counted over all ranks, a chunk of a stage is."""
    if schedule in FOLDED and chunk:
        return 2 * depth - 1 - stage
    return chunk * depth + stage


def module_names(layers: Sequence[Sequence[int]], head: str) -> list[list[str]]:
    """``module_fqns_per_model_part`` of the layers of each virtual stage; ``head`` is ``output`` or
    ``lm_head``."""
    parts = [[f"layers.{layer}" for layer in own] for own in layers]
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", head]
    return parts
