"""Precisions: which a stack and a GPU run, what quantized ones add to a stack's tables, which are refused.

A precision is a :class:`~planner.stacks.base.Recipe` of its stack. Those in 8 and 4 bits keep the weights'
master copies, gradients and moments of bf16: only the blocks' matrix products take quantized operands. Which
copies of weights and inputs these leave behind are rows of the stack's tables, selected by the words of
:func:`words_of`.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.errors import InputError, nearest_names
from planner.model import ModelSpec
from planner.specs import Gpu
from planner.stacks.base import Stack

TRANSFORMER_ENGINE: Mapping[str, str] = {
    "fp8-delayed": "delayed",
    "fp8-tensorwise": "tensorwise",
    "fp8-blockwise": "blockwise",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}
"""Megatron-LM's ``--fp8-format hybrid`` with ``--fp8-recipe``: scales of a tensor from earlier steps' maxima,
from its own, of 1 x 128 and 128 x 128 blocks, of blocks of 32 with a scale of one byte; and ``--fp4-format
e2m1 --fp4-recipe nvfp4``: of blocks of 16 with a scale of one byte, and of the tensor."""

REFUSED: Mapping[str, str] = {
    "fp8": "name its scaling: fp8-delayed, fp8-tensorwise, fp8-blockwise or mxfp8 under megatron, "
    "fp8-tensorwise, fp8-rowwise or mxfp8 under torchtitan",
    "fp4": "name its scaling: nvfp4 under megatron",
    "mxfp4": "no planned framework trains in it; use nvfp4 or mxfp8",
    "int8": "no planned framework trains in it; use fp8-tensorwise",
}
"""Precisions that are known by name but not planned, and what to use."""

EIGHT_BITS = (
    "8-bit products: those of the blocks run at the FP8 peak, head and attention at bf16's; MFU is of "
    "the FP8 peak; step times are less sure: 19 published runs took 0.68 to 1.98 times as long "
    "(docs/precision.md)"
)
"""What to know of a plan in 8 bits."""
FOUR_BITS = (
    "4-bit products: all three of every block's weights run at the FP4 peak, head and attention at bf16's; "
    "that products reach as much of it as of FP8's is assumed; MFU is of the FP4 peak (docs/precision.md)"
)
"""What to know of a plan in 4 bits."""

UNITS = {"tf32": "TF32", "fp8": "FP8", "fp4": "FP4"}


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
    if stack.recipes[wanted].quantized and gpu.vendor != "NVIDIA":
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
    """Feature words of a quantized precision, for rows of a stack that keeps quantized copies.

    Under torchtitan ``fp8`` and ``fp8:tensorwise`` ...; under megatron ``quantized``, ``recipe:delayed`` ...
    and ``columnwise`` where the copy along the other direction lies beside the first: products of Hopper and
    Ada take 8-bit operands of one orientation only, and scales of blocks run along a direction (Transformer
    Engine, pytorch/utils.py, ``is_non_tn_fp8_gemm_supported``).
    """
    if not stack.recipes[precision].quantized:
        return ()
    if "mcore" not in stack.words:  # torchao's products keep their operands as they were
        return "fp8", f"fp8:{precision.removeprefix('fp8-')}"
    recipe = TRANSFORMER_ENGINE[precision]
    capability = gpu.compute_capability or 0.0
    one_way = not (10.0 <= capability < 12.0 or capability >= 13.0)
    beside = one_way or recipe in ("blockwise", "mxfp8", "nvfp4")
    return ("quantized", f"recipe:{recipe}", *(("columnwise",) if beside else ()))


def check_options(precision: str, stack: Stack, model: ModelSpec, options: Mapping[str, str]) -> None:
    """Raises InputError for options that a quantized precision is not planned with."""
    if not stack.recipes[precision].quantized or "mcore" not in stack.words:
        return
    unplanned = [("attention", "eager"), ("swiglu", "recomputed")]
    if precision == "fp8-delayed":  # transformer_config.py: delayed scaling and what is cast again
        unplanned += [("norm", "recomputed"), ("moe_act", "recomputed")]
    if model.latent is None:  # other norms are one module with the product behind them
        unplanned.append(("norm", "recomputed"))
    if precision == "nvfp4":  # multi_token_prediction.py: these modules run in bf16
        unplanned.append(("mtp", "on"))
    for name, value in unplanned:
        if options.get(name) == value:
            usual = stack.options[name][0]
            raise InputError(f"{name}={value} is not planned with precision={precision}: use {name}={usual}")
