"""Precisions: which a stack and a GPU run, what 8-bit ones add to a stack's tables, and which are refused.

A precision is a :class:`~planner.stacks.base.Recipe` of its stack. Those in 8 bits keep the weights' master
copies, gradients and moments of bf16: only the blocks' matrix products take operands of a byte. Which copies
of weights and inputs these leave behind are rows of the stack's tables, selected by the words of
:func:`words_of`.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.errors import InputError, nearest_names
from planner.specs import Gpu
from planner.stacks.base import Stack

TRANSFORMER_ENGINE: Mapping[str, str] = {
    "fp8-delayed": "delayed",
    "fp8-tensorwise": "tensorwise",
    "fp8-blockwise": "blockwise",
    "mxfp8": "mxfp8",
}
"""Megatron-LM's ``--fp8-format hybrid`` with ``--fp8-recipe``: scales of a tensor from earlier steps' maxima,
from its own, of 1 x 128 and 128 x 128 blocks, of blocks of 32 with a scale of one byte."""

REFUSED: Mapping[str, str] = {
    "fp8": "name its scaling: fp8-delayed, fp8-tensorwise, fp8-blockwise or mxfp8 under megatron, "
    "fp8-tensorwise, fp8-rowwise or mxfp8 under torchtitan",
    "nvfp4": "which copies of 4-bit operands are kept is not known well enough; use mxfp8",
    "fp4": "which copies of 4-bit operands are kept is not known well enough; use mxfp8",
    "mxfp4": "no planned framework trains in it; use mxfp8",
    "int8": "no planned framework trains in it; use fp8-tensorwise",
}
"""Precisions that are known by name but not planned, and what to use."""

EIGHT_BITS = (
    "8-bit products: those of the blocks run at the FP8 peak, head and attention at bf16's; MFU is of "
    "the FP8 peak; step times are less sure: 19 published runs took 0.68 to 1.98 times as long "
    "(docs/precision.md)"
)
"""What to know of a plan in 8 bits."""

UNITS = {"tf32": "TF32", "fp8": "FP8"}


def precision_of(wanted: str | None, stack: Stack, gpu: Gpu) -> str:
    """The precision asked for, or the first that stack and GPU have. Raises InputError with the nearest."""
    # fp32 runs anywhere; all else needs a peak of its own.
    usable = [p for p, one in stack.recipes.items() if one.unit == "fp32" or one.unit in gpu.peak_flops]
    if wanted is None:
        return usable[0]
    if wanted in REFUSED:
        raise InputError(f"precision={wanted} is not planned: {REFUSED[wanted]}")
    if wanted not in stack.recipes:
        known, has = _known(), f"{stack.name} has {', '.join(stack.recipes)}"
        if wanted not in known:
            near = nearest_names(wanted, known)
            raise InputError(f"precision={wanted[:40]!r} is not known: {near} {has}")
        raise InputError(
            f"precision={wanted} has no recipe in {stack.name}: use {' or '.join(stack.recipes)}"
        )
    if wanted not in usable:
        unit = UNITS.get(stack.recipes[wanted].unit, wanted)
        raise InputError(f"precision={wanted}: {gpu.name} has no {unit} units: use {usable[0]}")
    capability = gpu.compute_capability
    if stack.recipes[wanted].unit == "fp8" and gpu.vendor != "NVIDIA":
        raise InputError(
            f"precision={wanted} is planned on NVIDIA's GPUs, not on {gpu.name}: use {usable[0]}"
        )
    if wanted == "mxfp8" and not (capability and capability >= 10):
        raise InputError(
            f"precision=mxfp8 is Blackwell's, {gpu.name} has no block scales: use fp8-tensorwise"
        )
    if wanted == "fp8-blockwise" and capability != 9.0:
        raise InputError(
            f"precision=fp8-blockwise is planned on Hopper, not on {gpu.name}: use fp8-tensorwise"
        )
    return wanted


def _known() -> set[str]:
    from planner.stacks import STACKS

    return {name for stack in STACKS.values() for name in stack.recipes}


def words_of(precision: str, stack: Stack, gpu: Gpu) -> tuple[str, ...]:
    """Feature words of an 8-bit precision, for rows of a stack that keeps 8-bit copies.

    ``fp8`` and ``fp8:delayed`` ...; ``fp8_transposed`` where a transposed copy lies beside the other: the
    8-bit products of Hopper and Ada take operands of one orientation only, and scales of blocks run along a
    direction (Transformer Engine, pytorch/utils.py, ``is_non_tn_fp8_gemm_supported``); ``fp8_scales`` where
    scales are so many that they count.
    """
    if stack.recipes[precision].unit != "fp8":
        return ()
    if "mcore" not in stack.words:  # torchao's products keep their operands as they were
        return "fp8", f"fp8:{precision.removeprefix('fp8-')}"
    recipe = TRANSFORMER_ENGINE[precision]
    of_blocks = recipe in ("blockwise", "mxfp8")
    capability = gpu.compute_capability or 0.0
    one_way = not (10.0 <= capability < 12.0 or capability >= 13.0)
    words = ["fp8", f"fp8:{recipe}"]
    if of_blocks or one_way:
        words.append("fp8_transposed")
    if of_blocks:
        words.append("fp8_scales")
    return tuple(words)


def check_options(precision: str, stack: Stack, options: Mapping[str, str]) -> None:
    """Raises InputError for options that an 8-bit precision is not planned with."""
    if stack.recipes[precision].unit != "fp8" or "mcore" not in stack.words:
        return
    for name, value in (("attention", "eager"), ("norm", "recomputed"), ("swiglu", "recomputed")):
        if options.get(name) == value:
            usual = stack.options[name][0]
            raise InputError(f"{name}={value} is not planned with precision={precision}: use {name}={usual}")
