"""A plan's degrees in Megatron-LM's flags: how its layers lie on the stages, who shares out what.

Sources: megatron-core 0.17.0, 0.18.0 and 0.19.2, training/arguments.py,
core/transformer/pipeline_parallel_layer_layout.py, core/transformer/transformer_block.py
(get_num_layers_to_build), core/parallel_state.py.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from planner.errors import InputError
from planner.export.base import NotExpressible, Subject
from planner.export.megatron_flags import PARALLELISM
from planner.export.megatron_model import is_hybrid, symbol_of


def layout_values(subject: Subject) -> dict[str, Any]:
    """What every flag of the layout is for a plan, by its name. Raises NotExpressible."""
    layout = subject.layout
    _check(subject)
    found: dict[str, Any] = {
        flag.name: getattr(layout, flag.of.removeprefix("layout."))
        for flag in PARALLELISM
        if not flag.rule and flag.of.startswith("layout.")
    }
    found |= _stages(subject)
    if layout.pipeline_parallel == 1:  # both orders are one, and Megatron-FSDP takes the usual only
        found["--use-tp-pp-dp-mapping"] = "tp-dp-pp"
    if layout.context_parallel > 1:
        found["--cp-comm-type"] = layout.context_comm
        if layout.context_comm == "ulysses+ring":
            found["--hierarchical-context-parallel-sizes"] = (layout.head_ranks, layout.attention_cut)
    if subject.model.experts:
        found["--expert-tensor-parallel-size"] = layout.expert_tensor_parallel
    if layout.sharding in ("zero2", "fsdp"):
        found |= {
            "--use-megatron-fsdp": True,
            "--use-distributed-optimizer": "zero1",  # its optimizer; 0.17 does not say so itself
            "--data-parallel-sharding-strategy": layout.sharding,
            "--ckpt-format": "fsdp_dtensor",
        }
        if layout.data_shards != layout.data_parallel:
            found["--num-distributed-optimizer-instances"] = layout.data_parallel // layout.data_shards
    return found


def _check(subject: Subject) -> None:
    layout, stack = subject.layout, subject.job.stack
    if layout.pipeline_parallel > 1 and layout.schedule not in stack.schedules:
        raise NotExpressible(
            f"schedule={layout.schedule}: Megatron-LM runs 1F1B, and interleaved with several chunks",
            {"schedule": "interleaved" if layout.chunks > 1 else "1f1b"},
        )
    if layout.rank_order not in stack.rank_orders:
        raise NotExpressible(
            f"rank_order={layout.rank_order}: Megatron-LM runs {' and '.join(stack.rank_orders)}",
            {"rank_order": next(iter(stack.rank_orders))},
        )
    # Groups of experts that nobody has are made as well, as wide as tensor parallelism.
    cut = layout.expert_tensor_parallel if subject.model.experts else layout.tensor_parallel
    if (
        layout.rank_order == "tp-pp-dp"
        and layout.pipeline_parallel > 1
        and cut * layout.expert_parallel != layout.tensor_parallel * layout.context_parallel
    ):
        raise NotExpressible(
            f"rank_order=tp-pp-dp with expert tensor {cut} x expert {layout.expert_parallel} and tensor "
            f"{layout.tensor_parallel} x context {layout.context_parallel}: Megatron-LM takes it where these "
            "products are equal (parallel_state.py)",
            {"rank_order": "tp-dp-pp"},
        )
    if layout.sharding not in (*stack.shardings, "ddp"):
        raise NotExpressible(
            f"sharding={layout.sharding}: Megatron-LM runs {', '.join(stack.shardings)}",
            {"sharding": "fsdp" if layout.sharding == "zero3" else "zero1"},
        )
    if not layout.reshard_after_forward:
        raise NotExpressible(
            "reshard_after_forward=False: Megatron-FSDP that keeps parameters gathered is its optim_grads, "
            "ZeRO-2, whose weights lie in one piece",
            {"sharding": "zero2"},
        )
    if layout.expert_tensor_parallel > 1 and subject.model.experts and subject.model.experts.biases:
        raise NotExpressible(
            f"expert_tensor_parallel={layout.expert_tensor_parallel} of experts with biases: Megatron-LM "
            "cuts those without only",
            {"expert_tensor_parallel": 1},
        )
    if layout.tensor_parallel == 1 and layout.sequence_parallel:
        raise NotExpressible(
            "sequence_parallel with tensor_parallel=1: Megatron-LM switches it off",
            {"no_sequence_parallel": ""},
        )


def chunk_layers(subject: Subject) -> list[list[int]]:
    """Layers of every chunk on each stage: ``[[5, 5], [6, 6]]`` has two stages of two chunks."""
    layout, stages = subject.layout, subject.plan.stages
    rows = [sum(sum(own) for own in stage.rows.values()) for stage in stages]
    chunks = [[count] * layout.chunks for count in rows]
    short = layout.chunks * sum(rows) - subject.model.num_hidden_layers
    chunks[0][0] -= short == 2  # planner/order.py: where short chunks lack a layer
    chunks[-1][-1] -= short >= 1
    if tuple(map(sum, chunks)) != subject.layers:
        raise InputError("the plan's stages have other layers than their rows: it was changed, plan it again")
    return chunks


def _stages(subject: Subject) -> dict[str, Any]:
    """The flags that cut the layers into stages: the plainest that say it."""
    layout, chunks = subject.layout, chunk_layers(subject)
    if is_hybrid(subject.model):
        return {"--hybrid-layer-pattern": _pattern(subject, chunks)}
    if layout.pipeline_parallel == 1:
        return {}
    level = all(len(set(own)) == 1 for own in chunks)
    first, *middle, last = (sum(own) for own in chunks)
    if not level or len(set(middle)) > 1:
        return {"--pipeline-model-parallel-layout": _letters(subject, chunks)}
    found: dict[str, Any] = {"--num-virtual-stages-per-pipeline-rank": layout.chunks}
    if len({first, *middle, last}) > 1:
        found["--decoder-first-pipeline-num-layers"] = first
        found["--decoder-last-pipeline-num-layers"] = last
    return found


def _letters(subject: Subject, chunks: list[list[int]]) -> str:
    """The layout in Megatron-LM's letters: all stages' first chunks, then all second ones.

    >>> _runs("Ettt"), _runs("ttL"), _runs("")
    ('Et*3', 't*2L', '')
    """
    ahead = subject.model.mtp_layers if subject.options().get("mtp") == "on" else 0
    parts = ["t" * own[chunk] for chunk in range(subject.layout.chunks) for own in chunks]
    parts[0], parts[-1] = f"E{parts[0]}", f"{parts[-1]}{'m' * ahead}L"
    return "|".join(map(_runs, parts))


def _runs(letters: str) -> str:
    """Letters that follow themselves, with their number."""
    runs = ((letter, len(list(same))) for letter, same in groupby(letters))
    return "".join(letter if count == 1 else f"{letter}*{count}" for letter, count in runs)


def _pattern(subject: Subject, chunks: list[list[int]]) -> str:
    """A hybrid's layers as letters, with a bar between chunks in the order of the layers."""
    letters, parts, start = "".join(map(symbol_of, subject.model.blocks)), [], 0
    for chunk in range(subject.layout.chunks):
        for own in chunks:
            parts.append(letters[start : start + own[chunk]])
            start += own[chunk]
    return "|".join(parts)
