"""The software stacks that layers can be built for. A new stack is one file and one line here."""

from __future__ import annotations

from planner.errors import InputError, nearest_names
from planner.stacks.base import Stack
from planner.stacks.deepspeed import DEEPSPEED
from planner.stacks.fsdp import FSDP
from planner.stacks.hf import HF
from planner.stacks.megatron import MEGATRON
from planner.stacks.torchtitan import TORCHTITAN

STACKS: dict[str, Stack] = {stack.name: stack for stack in (MEGATRON, TORCHTITAN, FSDP, DEEPSPEED, HF)}


def stack_named(name: str) -> Stack:
    """The stack of that name. Raises InputError with the nearest names."""
    if name not in STACKS:
        raise InputError(f"unknown framework {name!r}: {nearest_names(name, STACKS)}")
    return STACKS[name]
