"""State spaces and delta nets, alone or between attention and MLPs: which are planned, and under what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from planner.errors import InputError
from planner.model import DeltaNet, ModelSpec, StateSpace
from planner.stacks.base import Recipe, Stack

HYBRIDS = ("mamba2", "nemotron_h")
"""Families whose blocks have one part each, as the layers of Megatron-LM's ``HybridStack``."""
SHARDED = ("ddp", "zero1")
"""What shares out a hybrid's states. FSDP's units would be of unlike sizes."""


def hybrid_reasons(model: ModelSpec, stack: str) -> Iterator[str]:
    """Why no memory can be said of a model's scans, or of blocks of one part, under a stack."""
    mixers = {block.mixer for block in model.blocks}
    if mixers & {"mamba", "none", "delta"} and stack != "megatron":
        part = "a gated delta net" if "delta" in mixers else "a state space"
        yield f"{model.name}: {part} is planned with Megatron-LM's kernels only, not under {stack}"
    if mixers & {"mamba", "none"} and model.model_type not in HYBRIDS:
        yield (
            f"{model.name}: Megatron-LM makes two layers of a block of {model.model_type}, a state space and "
            f"an MLP, which is not planned (yet): planned are {', '.join(HYBRIDS)}"
        )
    if model.state_space:
        yield from _of_space(model.name, model.state_space)
    if model.delta:
        yield from _of_delta(model.name, model.delta)


def _of_space(name: str, space: StateSpace) -> Iterator[str]:
    if space.bias or not space.conv_bias:
        # megatron/core/ssm/mamba_mixer.py: assert not bias, assert conv_bias
        yield f"{name}: in Megatron-LM a state space's convolution has a bias, its products none"
    if space.num_heads % space.n_groups:
        yield f"{name}: n_groups={space.n_groups} does not divide the {space.num_heads} heads"


def _of_delta(name: str, net: DeltaNet) -> Iterator[str]:
    if net.num_value_heads % net.num_key_heads:  # megatron/core/transformer/transformer_config.py
        heads = f"linear_num_key_heads={net.num_key_heads}"
        yield f"{name}: {heads} does not divide linear_num_value_heads={net.num_value_heads}"


def for_hybrids(stack: Stack, model: ModelSpec, recipe: Recipe, options: Mapping[str, str]) -> Stack:
    """The stack with what shares out a hybrid's states. Raises InputError for what is not planned of one.

    A model of attention alone has the stack as it is; behind a gate, without key heads of several GPUs.
    """
    if model.attention_gate:
        # Core 0.16.1 cuts the gathered queries for each GPU and not their gate (attention.py); 0.17.1 does.
        stack = replace(stack, repeats_heads=False)
    if model.state_space is None and model.delta is None:
        return stack
    if recipe.quantized:
        raise InputError(f"{model.name}: state spaces with 8- or 4-bit products are not planned: use bf16")
    if options.get("norm") == "recomputed" and model.state_space:
        raise InputError(
            "norm=recomputed: Megatron-LM's state spaces keep their norms' output: use norm=kept"
        )
    shardings = {name: pipelined for name, pipelined in stack.shardings.items() if name in SHARDED}
    return replace(stack, shardings=shardings)


def notes_of(model: ModelSpec) -> list[str]:
    """What is assumed of a model's state spaces and delta nets."""
    if model.state_space is None and model.delta is None:
        return []
    return ["a scan takes its FLOPs at the rate of matrix products and then its kernels' bytes (assumed)"]


def uneven_chunks(model: ModelSpec, schedule: str) -> str:
    """Why the search leaves a schedule out: chunks hold unlike numbers of micro-batches, of unlike layers.

    Its closed form takes the average of a row. Layouts given by hand are replayed layer by layer.
    """
    scans = model.state_space or model.delta
    if schedule == "interleaved" and scans and len(model.block_kinds) > 1:
        return "interleaved: unlike blocks with state spaces are planned in layouts given by hand only"
    return ""
