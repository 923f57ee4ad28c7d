"""Modules that predict further tokens, as part of the head's bill: multi-token prediction.

DeepSeek-AI 2024, arXiv:2412.19437, section 2.2. Module k joins what the model makes of a token with the
embedding of a later one by a product, runs a block like the last one, and goes through a final norm, head and
loss of its own; embedding and head are the model's. Megatron Core has them on the last stage
(multi_token_prediction.py, ``--mtp-num-layers``), where a pipeline needs a second copy of the embedding
(gpt_model.py), and keeps what their forward makes from before the model's own logits to after them. The
block is counted as under no recomputation; the joining product as whole on every tensor-parallel rank, which
Megatron cuts: no less than there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.stacks.base import ALWAYS, BESIDE, CAST, CAST_WEIGHT, COMPUTE, FP32, Row
from planner.weights import Weight, mtp_weights
from strategies.base import Role, Term

if TYPE_CHECKING:
    from planner.layers import Builder

H = "batch seq residual"
RENAMED = {step: f"further {step}" for step in ("loss", "head", "norm")}
JOINING = (
    # What the model made of the token is the head's input too; the embedding looks the other one up again.
    Row("embedding of the further token", H, 1, COMPUTE, ALWAYS, steps="joining"),
    Row("statistics of the joining norms", "batch seq residual:1", 2, FP32, ALWAYS, steps="joining"),
    Row("joined inputs", H, 2, COMPUTE, ALWAYS, "!quantized", steps="joining"),
    Row("joined inputs, quantized", H, 2, CAST, ALWAYS, "quantized", steps="joining"),
    Row("joining weight, quantized", "hidden joined", 1, CAST_WEIGHT, when=BESIDE, role=Role.BUFFER),
    Row(
        "joining weight, quantized columnwise",
        "hidden joined",
        1,
        CAST_WEIGHT,
        when="columnwise",
        role=Role.BUFFER,
    ),
    Row("gradient of the joined inputs", H, 4, role=Role.TRANSIENT, steps="joining"),
)


def steps(head: tuple[str, ...], block: tuple[str, ...]) -> tuple[str, ...]:
    """Steps of the head's backward with modules: the model's own loss and product come first.

    >>> steps(("loss", "head", "norm"), ("down", "up"))
    ('loss', 'head', 'further loss', 'further head', 'further norm', 'down', 'up', 'joining', 'norm')
    """
    return (*head[:-1], *(RENAMED[step] for step in head), *block, "joining", head[-1])


def wanted(builder: Builder) -> int:
    """How many modules are planned."""
    return builder.model.mtp_layers * (builder.training.options.get("mtp") == "on")


def terms(builder: Builder) -> Iterator[Term]:
    """Everything that the modules add to the head."""
    hidden = {"hidden": builder.model.hidden_size}
    copy = {"vocab": builder.vocab} | hidden | {"copies": builder.copies}
    yield from builder.states(Weight("embedding of further tokens", copy, "joining"))
    for number in range(1, wanted(builder) + 1):
        for term in _module(builder):
            yield replace(term, name=f"further token {number}: {term.name}")


def _module(builder: Builder) -> Iterator[Term]:
    yield from builder.block(builder.model.blocks[-1]).terms
    for weight in mtp_weights(builder.model):
        if weight.name.startswith("joining"):
            yield from builder.states(replace(weight, step="joining"))
        if weight.name == "joining weight":
            yield builder.product(weight, ALWAYS)
    dims = {"vocab": builder.vocab, "hidden": builder.model.hidden_size}
    yield builder.product(Weight("head weight", dims, "head"), ALWAYS)
    yield from _renamed(builder.rows(builder.stack.rows["head"]))
    yield from builder.rows(JOINING)


def _renamed(rows: Iterable[Term]) -> Iterator[Term]:
    for term in rows:
        yield replace(term, steps=tuple(RENAMED.get(step, step) for step in term.steps))
