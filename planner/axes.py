"""Where context and expert parallelism can be: what a model, a layout and a framework say against them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from planner.defaults import Job
from planner.stacks.base import Stack
from strategies.base import Layer
from strategies.context_parallel import COMMS, ContextParallel
from strategies.expert_parallel import ExpertParallel
from strategies.layout import Layout

LEAST_TOKENS = 4096
"""Tokens of a sequence that every GPU keeps where the search itself chooses context parallelism. With fewer,
products and attention run on pieces too small for their rates while each layer sends more; tensor, pipeline
or data parallelism cut such sequences' activations as well. Llama 3, arXiv:2407.21783, table 4: parts of
8,192 of 131,072 tokens, and 8,192 whole."""
Context = tuple[int, str, int]
"""``context_parallel``, ``context_comm`` and ``ulysses_degree`` of a layout."""
WHOLE = ("full", "bidirectional", "none")
"""Mixers whose context parallelism is planned. A window needs its neighbour's tokens only, a state space
hands its state on."""


def context_problems(job: Job, layout: Layout, layers: list[Layer]) -> Iterator[str]:
    """Why a job cannot have the context parallelism of a layout."""
    c, comm, u = layout.context_parallel, layout.context_comm, layout.ulysses_degree
    if comm not in COMMS:
        yield f"context_comm={comm!r}: use one of {', '.join(COMMS)}"
    elif u > 1 and comm != "ulysses+ring":
        yield f"ulysses_degree={u} belongs to context_comm ulysses+ring, not to {comm}: leave it out"
    elif u > c:
        yield f"ulysses_degree={u} is of context_parallel ranks, of which there are {c}: use fewer"
    if c == 1:
        return
    model, stack, why = job.model, job.stack, f"context_parallel={c}: that of"
    for mixer in dict.fromkeys(block.mixer for block in model.blocks):
        if mixer not in WHOLE:
            yield f"{why} {mixer} layers is not planned: use context_parallel 1"
    if model.latent and "mcore" not in stack.words:  # Transformer Engine's takes values of another width
        yield f"{why} latent attention is not planned: use context_parallel 1"
    if model.sliding_window and job.seq_length > model.sliding_window:
        yield (
            f"{why} attention to a window of {model.sliding_window} tokens is not planned: use "
            f"seq_length {model.sliding_window} or less, or context_parallel 1"
        )
    if model.position_embedding == "alibi":
        yield f"{why} attention with ALiBi is not planned: use context_parallel 1"
    attention = str(job.training.attention)
    if stack.context_attention and attention not in stack.context_attention:
        able = " or ".join(stack.context_attention)
        yield f"context_parallel={c}: {stack.name} has it with attention {able}, not {attention}"
    yield from ContextParallel(
        c, comm, layout.tensor_parallel, layout.sequence_parallel, stack.rotated_bytes, u
    ).objections(layers)


def expert_problems(job: Job, layout: Layout, layers: list[Layer]) -> Iterator[str]:
    """Why a job cannot have the expert parallelism of a layout."""
    e, own = layout.expert_parallel, layout.expert_tensor_parallel
    if e * own > 1:
        yield from ExpertParallel(e, own).objections(layers)
    if not job.model.experts:
        return
    t, near = layout.tensor_parallel, layout.tensor_parallel * layout.context_parallel
    if t > 1 and not layout.sequence_parallel:
        yield (
            f"tensor_parallel={t} without sequence_parallel would route every token {t} times: use "
            "sequence_parallel, or tensor_parallel 1"
        )
    if t > 1 and e == 1 and job.stack.tensor_cuts_experts:
        yield (
            f"tensor_parallel={t}: {job.stack.name} cuts routed experts by it where expert_parallel is 1, "
            f"which is not planned: use expert_parallel {t}, or tensor_parallel 1"
        )
    ranks = layout.data_shards * near
    carved = f"expert_parallel={e} x expert_tensor_parallel={own}"
    if near % own or (near % (e * own) and (e * own) % near) or ranks % (e * own):
        fits = [n for n in range(1, ranks // own + 1) if _fits(n * own, near, ranks)]
        yield (
            f"{carved} cannot be carved out of tensor_parallel x context_parallel = {near} times "
            f"{layout.data_shards} that share states: use expert_parallel {', '.join(map(str, fits[:12]))}"
            if not near % own
            else f"expert_tensor_parallel={own} does not divide tensor_parallel x context_parallel = {near}"
        )
    elif out_of_order(job, layout):
        yield (
            f"rank order {layout.rank_order} needs {carved} to be tensor_parallel x context_parallel = "
            f"{near}, as Megatron's parallel_state.py has it: use rank order tp-dp-pp"
        )


def _fits(carved: int, near: int, ranks: int) -> bool:
    return ranks % carved == 0 and (near % carved == 0 or carved % near == 0)


def out_of_order(job: Job, layout: Layout) -> Any:
    """Do experts need other replicas than the rest of the model, in an order that has no place for them?

    Of a single layout, or of each of a family in one order.
    """
    inner = layout.expert_parallel * layout.expert_tensor_parallel
    apart = inner != layout.tensor_parallel * layout.context_parallel
    inside = (layout.rank_order != "tp-dp-pp") & (layout.pipeline_parallel != 1)
    return bool(job.model.experts) & apart & inside


def context_degrees(
    job: Job,
    layers: list[Layer],
    tensor: int,
    degrees: Iterable[int],
    ways: Mapping[str, Sequence[int]],
    asked: bool,
) -> Iterator[tuple[Context, str]]:
    """Context degrees with a way to exchange keys and values, and why not, empty if they can be.

    Those that nobody asked for leave every GPU ``LEAST_TOKENS`` of a sequence. ``ways`` are the ways to try,
    each with its Ulysses degrees, or none for all that make two levels.
    """
    for degree in degrees:
        if degree == 1:
            yield (1, COMMS[0], 1), ""
        elif not job.stack.context_comms and asked:
            yield (degree, COMMS[0], 1), f"{job.stack.name} is planned without context parallelism"
        elif asked or job.seq_length >= degree * LEAST_TOKENS:
            levels = [n for n in range(2, degree) if degree % n == 0] or [1]
            for comm, ulysses in [(comm, u) for comm, inner in ways.items() for u in inner or levels]:
                layout = Layout(
                    tensor_parallel=tensor,
                    context_parallel=degree,
                    context_comm=comm,
                    ulysses_degree=ulysses,
                    sequence_parallel=tensor > 1,
                )
                yield (degree, comm, ulysses), next(context_problems(job, layout, layers), "")


def unsupported_axes(stack: Stack, layout: Layout) -> Iterator[str]:
    """What of a layout's context and expert parallelism a framework is not known to run."""
    c, comm = layout.context_parallel, layout.context_comm
    if c > 1 and not stack.context_comms:
        yield f"{stack.name} is planned without context parallelism: use context_parallel 1"
    elif c > 1 and comm not in stack.context_comms:
        yield f"{stack.name} does not run context_comm {comm}: use {', '.join(stack.context_comms)}"
    if layout.expert_parallel > 1 and not stack.expert_parallel:
        yield f"{stack.name} is planned without expert parallelism: use expert_parallel 1"
    if c > 1 and layout.expert_parallel > 1 and layout.sharding == "zero3":  # DeepSpeed's engine.py says so
        yield "zero3 does not run with both context and expert parallelism: use zero2, or one of them"
    if layout.expert_tensor_parallel > 1 and not stack.expert_tensor_parallel:
        yield (
            f"{stack.name} is planned without tensor parallelism of single experts: use "
            "expert_tensor_parallel 1"
        )
