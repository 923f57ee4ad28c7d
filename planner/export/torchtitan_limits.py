"""What torchtitan cannot be told, by release: refused with the nearest that it can.

Facts are of torchtitan 0.2.2 and 0.3.0 as released.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.export.base import NotExpressible, Subject
from planner.export.torchtitan_words import (
    CONTEXT,
    FIXED,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    concerns,
    virtual_stage,
)
from planner.files import plain
from planner.order import layer_at

CHUNKS = 8
"""Pieces of the sequence that 0.3's chunked loss takes (components/loss.py)."""


def check(subject: Subject, version: str) -> None:
    """Raises NotExpressible for the first thing of a plan that torchtitan cannot be told."""
    for problem, instead in _problems(subject, version):
        raise NotExpressible(f"torchtitan {version}: {problem}", instead)


def _problems(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from _of_options(subject, version)
    yield from _of_training(subject, version)
    yield from _of_sharding(subject, version)
    yield from _of_axes(subject, version)
    yield from _of_pipeline(subject, version)


def _of_options(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Options that a version decides for itself, all of them in one refusal."""
    options, wrong = subject.options(), dict[str, str]()
    for name, able in FIXED[version].items():
        value = options.get(name)
        if value is not None and value not in able and concerns(name, subject.model, version):
            wrong[name] = able[0]
    if wrong:
        has = ", ".join(f"{name}={value}" for name, value in wrong.items())
        planned = ", ".join(f"{name}={options[name]}" for name in wrong)
        yield f"it runs {has}, not the plan's {planned}: use the former", {"option": wrong}
    if options.get("async_tp") == "on" and options.get("compile") != "on":
        yield "async_tp=on is of compiled blocks: use compile=on", {"option": {"compile": "on"}}


def _of_training(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    training, recipe, layout = subject.job.training, subject.job.recipe, subject.layout
    precision = str(training.precision)
    if precision not in PRECISIONS:
        yield f"precision {precision}: use {', '.join(PRECISIONS)}", {"precision": "bf16"}
    if version == "0.3" and precision == "fp8-tensorwise":
        yield "float8 is scaled by rows alone: use precision fp8-rowwise", {"precision": "fp8-rowwise"}
    compiled = subject.options().get("compile") == "on"
    if version == "0.2" and precision == "mxfp8" and compiled and layout.tensor_parallel > 1:
        yield "mxfp8 with tensor parallelism is not compiled: use compile=off", {"option": {"compile": "off"}}
    usual = subject.job.stack.recipes.get(precision)
    if usual and recipe != usual:
        changed = {
            name for name in ("weight", "gradient", "master", "moment") if _differ(recipe, usual, name)
        }
        if changed - {"moment"} or not half_moments(subject, version):
            what = "gradient_dtype, optimizer_dtype and master_weights are the precision's own"
            yield f"{what}, but for bf16 moments of 0.3's fused AdamW: leave them out", {}
    if training.optimizer not in OPTIMIZERS:
        yield f"optimizer {training.optimizer}: use {' or '.join(OPTIMIZERS)}", {"optimizer": "adamw"}
    if subject.options().get("reduce_dtype", "fp32") != "fp32":
        yield "gradients are reduced in fp32: use reduce_dtype=fp32", {"option": {"reduce_dtype": "fp32"}}
    if training.dropout:
        yield f"dropout {training.dropout:g}: its models have none: use dropout 0", {"dropout": 0}
    if training.adapters or training.frozen.model_dump(exclude_defaults=True):
        yield "adapters and frozen weights are not written: use neither", {}
    if training.expert_capacity_factor:
        yield "expert_capacity_factor: it drops no tokens and pads none: leave it out", {}


def _differ(one: Any, other: Any, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))


def half_moments(subject: Subject, version: str) -> bool:
    """Are the moments in bf16, where 0.3 has ``fused_opt_states_bf16``?"""
    fused = subject.options().get("optimizer_step") == "fused" and not subject.layout.offload
    return version == "0.3" and fused and subject.job.training.optimizer_dtype == "bf16"


def _of_sharding(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    layout, options = subject.layout, subject.options()
    shards = layout.data_shards * layout.context_parallel
    if layout.sharding not in ("fsdp", "ddp") or (layout.sharding == "ddp" and layout.data_ranks > 1):
        yield f"sharding {layout.sharding}: use fsdp, FSDP2", {"sharding": "fsdp"}
    if version == "0.3":
        if layout.sharding != "fsdp":
            yield "it wraps everything with FSDP2: use sharding fsdp", {"sharding": "fsdp"}
        return
    autocast = options.get("mixed_precision") == "autocast"
    if shards > 1:
        if autocast:
            fix = {"option": {"mixed_precision": "fsdp"}}
            yield "FSDP has its own mixed precision: use mixed_precision=fsdp", fix
        return
    if layout.data_parallel > 1:
        data = layout.data_parallel
        yield (
            f"data_shards 1 of {data} replicas is DDP, which is not planned: use data_shards {data}",
            {"data_shards": data},
        )
    if layout.sharding == "fsdp" and (layout.world_size > 1 or layout.offload):
        yield "one shard is not wrapped with FSDP2: use sharding ddp, and no offload", {"sharding": "ddp"}
    if not layout.reshard_after_forward:
        yield (
            "one shard has nothing to keep gathered: use reshard_after_forward",
            {"reshard_after_forward": True},
        )
    mixed = PRECISIONS[str(subject.job.training.precision)].param != "float32"
    whole = subject.job.training.precision == "pure-bf16"
    if mixed and not whole and (layout.world_size > 1 or not autocast):
        if layout.world_size == 1:
            fix = {"option": {"mixed_precision": "autocast"}}
            yield "a GPU alone runs under autocast: use mixed_precision=autocast", fix
        why = "without FSDP or context parallelism, tensor and pipeline parallelism run in fp32"
        yield f"{why}: use precision fp32, or data_shards 2 or more", {"precision": "fp32"}
    if layout.expert_parallel > 1:
        yield "experts are handed out among data_shards or context_parallel: use 2 or more of one", {}


def _of_axes(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    layout, job = subject.layout, subject.job
    if layout.rank_order != "tp-dp-pp":
        yield f"rank order {layout.rank_order}: use tp-dp-pp", {"rank_order": "tp-dp-pp"}
    tensor, context = layout.tensor_parallel, layout.context_parallel
    if tensor > 1 and not layout.sequence_parallel and version == "0.2":
        yield "tensor parallelism comes with sequence parallelism: use it", {"sequence_parallel": True}
    if context > 1 and layout.context_comm not in CONTEXT:
        known = ", ".join(CONTEXT)
        yield f"context_comm {layout.context_comm}: use {known}", {"context_comm": "all-gather"}
    if version == "0.3" and context > 1 and layout.context_comm != "all-gather":
        yield "keys and values are gathered: use context_comm all-gather", {"context_comm": "all-gather"}
    own = layout.expert_tensor_parallel
    if own not in (1, layout.tensor_parallel) or (own > 1 and version == "0.3"):
        able = "1" if version == "0.3" else "1 or tensor_parallel"
        yield f"expert_tensor_parallel {own}: use {able}", {"expert_tensor_parallel": 1}
    if layout.offload not in ("", "optimizer,parameters"):
        yield (
            f"offload {layout.offload}: use optimizer,parameters, both",
            {"offload": "optimizer,parameters"},
        )
    unit = _sequence_unit(subject, version)
    if job.seq_length % unit:
        fits = max(1, job.seq_length // unit) * unit
        yield f"sequence length {job.seq_length} is no multiple of {unit}: use {fits}", {"seq_length": fits}


def _sequence_unit(subject: Subject, version: str) -> int:
    """Tokens that a sequence has a multiple of.

    0.2.2, parallel_dims.py, ``seq_len_divisor``; 0.3.0, trainer.py, and loss.py where it takes chunks.
    """
    layout = subject.layout
    tensor, context = layout.tensor_parallel, layout.context_parallel
    if version == "0.2":
        return int(tensor * context * 2)
    unit = (tensor if layout.sequence_parallel else 1) * (2 * context if context > 1 else 1)
    if subject.options().get("loss") == "chunked":
        from math import lcm

        return lcm(int(unit), int(context * CHUNKS))
    return int(unit)


def _of_pipeline(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    layout = subject.layout
    recompute = recomputed(subject)
    if recompute is None or (recompute[1] and version == "0.3"):
        has = ", ".join(
            " and ".join(f"{sum(own)} {way}" for way, own in stage.rows.items() if sum(own))
            for stage in subject.plan.stages
        )
        told = "every k-th layer of each stage, or all of them" if version == "0.2" else "all layers or none"
        ways = {way.partition("+")[0] for stage in subject.plan.stages for way in stage.rows} - {"none"}
        near = "full" if "full" in ways or not ways else next(iter(ways))
        yield (
            plain(f"it recomputes {told}; the plan's stages have {has}: use recompute {near}", 400),
            {"recompute": near},
        )
    if layout.pipeline_parallel == 1:
        return
    if layout.schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        yield f"schedule {layout.schedule}: use {known}", {"schedule": "1f1b"}
    if subject.model.tie_word_embeddings:
        yield "tied embeddings are not split over stages: use pipeline_parallel 1", {"pipeline_parallel": 1}
    if _empty(subject):
        yield "a stage would have no layers: use fewer stages", {"pipeline_parallel": 1}


def _empty(subject: Subject) -> bool:
    return subject.layout.schedule in SCHEDULES and not all(stage_layers(subject))


def stage_layers(subject: Subject) -> list[list[int]]:
    """The layers of every virtual stage, in torchtitan's order."""
    layout, depth = subject.layout, subject.model.num_hidden_layers
    chunks, pipeline = int(layout.chunks), int(layout.pipeline_parallel)
    parts: list[list[int]] = [[] for _ in range(chunks * pipeline)]
    start = 0
    for j, stage in enumerate(subject.plan.stages):
        count = sum(map(sum, stage.rows.values()))
        for chunk in range(chunks):
            rows = range(start, start + count)
            placed = sorted(layer_at(chunk, row, depth, chunks, layout.schedule) for row in rows)
            part = virtual_stage(j, chunk, pipeline, layout.schedule)
            parts[part] = [layer for layer in placed if 0 <= layer < depth]
        start += count
    return parts


def recomputed(subject: Subject) -> tuple[str, int] | None:
    """``none``, ``selective`` or ``full``, and of which layers: 0 for all, or every k-th of a stage's.

    None where no ``k`` gives the plan's numbers on all stages.
    """
    stages = [{way: sum(own) for way, own in stage.rows.items()} for stage in subject.plan.stages]
    ways = {way for own in stages for way, count in own.items() if count}
    if len(ways) == 1:
        return (found, 0) if (found := ways.pop()) in ("none", "selective", "full") else None
    if ways != {"none", "full"}:
        return None
    counts = [(own.get("full", 0), sum(own.values())) for own in stages]
    every = [k for k in range(2, max(whole for _, whole in counts) + 1) if _every(counts, k)]
    return ("full", every[0]) if every else None


def _every(counts: list[tuple[int, int]], k: int) -> bool:
    return all(full == whole // k for full, whole in counts)
