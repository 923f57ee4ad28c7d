"""Blocks that are not trained, at the bottom of a model, and the lowest block that gradients reach.

``requires_grad_(False)`` on the embeddings and the first ``n`` blocks leaves autograd nothing to do below
the lowest trained weight: what lies there runs forward, keeps nothing and sends no gradients (PyTorch,
*Autograd mechanics*, "Locally disabling gradient computation"). In the block above, gradients stop at its
lowest trained step: at the first norm's weight, or at the lowest product with an adapter, whose input needs
none. Both were traced (tests/data/traced_frozen.json, traced_adapters.json).

torch 2.13's FSDP2 gathers a unit once for its forward, and again only when a gradient of its output
arises (``_fsdp_state.py``, ``_register_pre_backward_hook``), which none does of a frozen block; the uppermost
of them is still gathered ahead of its turn (``_fsdp_param_group.py``, ``_backward_prefetch``): once a
micro-batch, not counted. DeepSpeed 0.19.8's flat buffers have the parameters that require gradients
(``runtime/zero/stage_1_and_2.py``, ``stage3.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.errors import InputError
from planner.model import Block, ModelSpec
from planner.model_flops import mixer_flops
from planner.steps import STEPS
from strategies.base import POLICIES, Role

if TYPE_CHECKING:
    from planner.specs import TrainingSpec
    from planner.stacks.base import Row, Stack

FRAMEWORKS = ("hf", "fsdp", "deepspeed")
"""Those that run Hugging Face's modules: what they keep beside frozen weights was traced."""
KEPT_BELOW = {"down": "act", "out": "core"}
"""Products whose input a table may list with the step below."""


def blocks_of(model: ModelSpec, training: TrainingSpec) -> tuple[Block, ...]:
    """A job's row of blocks: the model's, the first of them frozen as ``training`` says.

    The next one is the lowest that gradients reach, if that makes a difference: with LayerNorms it does
    under adapters alone, as the kernel keeps its input for the gradient of its weight in any case.
    """
    blocks, frozen = model.blocks, training.frozen.blocks
    options = training.options
    untraced = options.get("compile") == "on" or options.get("kernels") == "megatron"
    fused = model.norm == "layernorm" or untraced
    stops = training.adapters or (training.frozen.embeddings and not fused)
    if not stops and not frozen:
        return blocks
    row = [block._replace(trained="none") for block in blocks[:frozen]]
    row += blocks[frozen:]
    if stops and training.framework in FRAMEWORKS:
        row[frozen] = blocks[frozen]._replace(trained="lowest")
    return tuple(row)


def above(rows: Iterable[Row], lowest: str) -> Iterator[Row]:
    """What of its rows the lowest block keeps, where ``lowest`` is its lowest trained step.

    The steps below it do not run, and it makes no gradient of its input: of a norm with a trained weight what
    the gradient of the weight reads is left. A checkpoint keeps the block's input, and all the rest is made
    again with it (:func:`no_recompute`): it is counted while the block is at work, checkpointed or not.
    """
    every = STEPS["block"]
    run = every[: every.index(lowest) + 1]
    for row in rows:
        steps, there = row.steps.split(), run
        if row.role != "activation" or row.kept_by == ("full",):
            yield row
            continue
        if row.read_by == "input" or (lowest == "norm1" and "norms" not in row.read_by.split()):
            there = run[:-1]
        elif lowest in KEPT_BELOW:
            there = (*run, KEPT_BELOW[lowest])
        left = [step for step in steps if step in there]
        if left == steps:
            yield row
            continue
        each = row.count / len(steps)
        if left:
            yield replace(row, count=each * len(left), steps=" ".join(left))
        if "full" in row.kept_by:
            yield replace(row, kept_by=("full",))
        again = each * (len(steps) - len(left)) * len(every)
        yield replace(row, role=Role.TRANSIENT, count=again, kept_by=POLICIES, steps=" ".join(every))


def no_recompute(training: TrainingSpec) -> str:
    """Why blocks are not run again above frozen ones, as the end of a sentence; empty where none are frozen.

    transformers 5.23's ``gradient_checkpointing_enable`` has the embeddings' output require a gradient
    (``modeling_utils.py``, ``enable_input_require_grads``): all blocks are then run again and backward.
    """
    if not training.frozen.blocks:
        return ""
    return "; checkpointing in transformers sends gradients through frozen blocks too, which is not modelled"


def unmade_by_mixers(model: ModelSpec, training: TrainingSpec) -> float:
    """Model FLOPs of a token that the mixers of frozen blocks do not have: two thirds of theirs."""
    frozen = model.blocks[: training.frozen.blocks]
    return sum(mixer_flops(model, block.mixer, training.seq_length or 1) for block in frozen) * 2 / 3


def check(model: ModelSpec, training: TrainingSpec, stack: Stack) -> None:
    """Raises InputError where what is frozen, and how, is not modelled."""
    frozen, adapters = training.frozen, training.adapters
    what = f"frozen blocks={frozen.blocks}" if frozen.blocks else "frozen embeddings"
    if (frozen.blocks or (frozen.embeddings and not adapters)) and stack.name not in FRAMEWORKS:
        raise InputError(
            f"{what}: {stack.name} trains all weights or adapters: use --framework hf, fsdp or deepspeed"
        )
    if (frozen.blocks or frozen.embeddings) and model.model_type in stack.traced:
        raise InputError(
            f"{what}: what {model.model_type} keeps above them has not been traced: leave --freeze out"
        )
    if not frozen.blocks:
        return
    if adapters:
        raise InputError(f"{what}: adapters stand in all blocks, beside frozen weights: leave --freeze out")
    if not frozen.embeddings:
        raise InputError(
            f"{what}: gradients of the embeddings go through all blocks: freeze them too, "
            f"--freeze blocks={frozen.blocks}"
        )
    if frozen.blocks >= model.num_hidden_layers:
        raise InputError(
            f"{what}: {model.name} has {model.num_hidden_layers}, of which one at least must be trained: use "
            f"{model.num_hidden_layers - 1} or less"
        )
    if training.options.get("kernels") == "megatron":
        raise InputError(f"{what}: of Megatron-DeepSpeed's kernels not known: use kernels=hf")
    if training.options.get("compile") == "on":
        raise InputError(f"{what}: what compiled blocks keep above them is not known: use compile=off")


def read(text: str) -> dict[str, int]:
    """What is frozen of ``embeddings`` or ``blocks=8``, which takes the embeddings with it.

    Raises InputError for what is neither.

    >>> read("blocks=8")
    {'embeddings': True, 'blocks': 8}
    """
    name, _, number = text.strip().lower().partition("=")
    if text.strip().isdigit():
        name, number = "blocks", text.strip()
    if name == "embeddings" and not number:
        return {"embeddings": True}
    if name != "blocks" or not number.isdigit():
        raise InputError(
            f"--freeze {text[:40]}: use --freeze embeddings, or blocks=8 for the first 8 blocks too"
        )
    return {"embeddings": True, "blocks": int(number)}
