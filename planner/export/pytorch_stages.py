"""Plans of framework torchtitan with tensor or pipeline parallelism, as the plain PyTorch script has them.

The script cuts transformers' own modules with torch.distributed.tensor.parallel and
torch.distributed.pipelining (torch 2.13.0, transformers 5.23.0: models/llama, mistral, qwen2, qwen3, whose
modules have the same names). What the planner calls the options of torchtitan's blocks is held against what
these modules do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.export.base import NotExpressible, Subject
from planner.export.torchtitan_limits import stage_layers
from planner.export.torchtitan_words import virtual_stage
from planner.files import plain
from planner.plan import priced_again
from planner.replay import chunk_blocks
from strategies.base import POLICIES

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose modules the script names."""
SCHEDULES = {
    "1f1b": "Schedule1F1B",
    "gpipe": "ScheduleGPipe",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb-v": "ScheduleZBVZeroBubble",
}
"""Schedules of torch.distributed.pipelining, by the planner's names."""
SINGLE = ("1f1b", "gpipe")
"""Those that take one stage on a GPU; the others take a list."""
OWN = {"qkv": ("separate",), "norm": ("eager",), "rotary_table": ("model",), "loss": ("eager", "chunked")}
"""Options of torchtitan's blocks as transformers' modules can be, the nearest first."""
OWN_STAGES = OWN | {"loss": ("eager",), "compile": ("off",), "async_tp": ("off",)}
"""The same where the model is cut."""
NOTE = (
    "activations, peaks and times are predicted of torchtitan's blocks, transformers' keep others; "
    "parameters and optimizer states are the same to the byte"
)
SINCE = 10
"""The minor of torch 2 whose schedules need not keep the logits of all micro-batches: ``return_outputs``
(pytorch/pytorch#165822)."""


def staged(subject: Subject) -> bool:
    """Is the model cut by tensor or pipeline parallelism?"""
    return bool(subject.layout.tensor_parallel > 1 or subject.layout.pipeline_parallel > 1)


def problems(subject: Subject) -> Iterator[NotExpressible]:
    """What of a plan of torchtitan the script would not do as planned."""
    if subject.model.model_type not in FAMILIES:
        yield NotExpressible(
            f"model_type={plain(subject.model.model_type, 40)}: in torchtitan's place the script knows the "
            f"modules of {', '.join(FAMILIES)}; --to torchtitan has its own"
        )
        return
    yield from _of_options(subject)
    yield from _of_layout(subject)
    yield from _of_pipeline(subject)


def _of_options(subject: Subject) -> Iterator[NotExpressible]:
    options, training = subject.options(), subject.plan.training
    able = OWN_STAGES if staged(subject) else OWN
    wrong = {name: one[0] for name, one in able.items() if options.get(name, one[0]) not in one}
    if wrong:
        planned = ", ".join(f"{name}={plain(options[name], 40)}" for name in wrong)
        runs = ", ".join(f"{name}={value}" for name, value in wrong.items())
        yield NotExpressible(f"{planned}: transformers' modules run {runs}", {"option": wrong})
    if subject.job.recipe.unit in ("fp8", "fp4"):
        yield NotExpressible(
            f"precision={training.precision}: the script has torch's products alone, of bf16, fp32 and tf32",
            {"precision": "bf16"},
        )
    mixed = subject.job.recipe.weight > subject.job.recipe.compute
    if mixed and subject.layout.data_shards == 1:
        yield NotExpressible(
            f"precision={training.precision} without shards: weights are cast where FSDP gathers them: use "
            "precision fp32, or data_shards 2 or more",
            {"precision": "fp32"},
        )
    if mixed and options.get("mixed_precision") == "autocast" and subject.layout.data_shards > 1:
        yield NotExpressible(
            "mixed_precision=autocast: FSDP casts the weights that it gathers: use mixed_precision=fsdp",
            {"option": {"mixed_precision": "fsdp"}},
        )
    if not staged(subject):
        return
    if training.frozen.model_dump(exclude_defaults=True):
        yield NotExpressible("frozen weights: a model that is cut is trained as a whole: leave --freeze out")
    if subject.layout.offload:
        yield NotExpressible(
            f"offload={plain(subject.layout.offload, 40)}: not run with tensor or pipeline parallelism: "
            "leave it out"
        )


def _of_layout(subject: Subject) -> Iterator[NotExpressible]:
    layout, model = subject.layout, subject.model
    window = model.sliding_window
    if staged(subject) and window and window < subject.job.seq_length:
        yield NotExpressible(
            f"sliding_window={window}: the script's attention sees whole sequences, of seq_length "
            f"{subject.job.seq_length}: use at most {window}",
            {"seq_length": window},
        )
    if layout.sharding == "fsdp" and layout.data_parallel == 1:
        yield NotExpressible(
            "sharding=fsdp of one shard: the script wraps nothing with FSDP that is not cut by it: use ddp",
            {"sharding": "ddp"},
        )
    if layout.rank_order != "tp-dp-pp":
        yield NotExpressible(
            f"rank_order={layout.rank_order}: the script's mesh is pp, dp, tp, the outermost first",
            {"rank_order": "tp-dp-pp"},
        )
    tensor = int(layout.tensor_parallel)
    lengths = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
    }
    for name, length in lengths.items():
        if length % tensor:
            yield NotExpressible(
                f"tensor_parallel={tensor} does not divide {name}={length}: every GPU has as many",
                {"tensor_parallel": 1},
            )
    if layout.sequence_parallel and subject.job.seq_length % tensor:
        fits = max(1, subject.job.seq_length // tensor) * tensor
        yield NotExpressible(
            f"seq_length={subject.job.seq_length} is not cut into {tensor} equal parts: use {fits}",
            {"seq_length": fits},
        )
    if tensor > 1 and layout.data_shards == 1 and subject.plan.training.optimizer == "momentum":
        yield NotExpressible(
            "optimizer=momentum without shards: the momentum is the gradient's copy, and that of a cut "
            "embedding is whole on every GPU (torch 2.13.0, aten.embedding_dense_backward of DTensors): "
            "use adamw, or data_shards 2 or more",
            {"optimizer": "adamw"},
        )
    ways = {way.partition("+")[0] for stage in subject.plan.stages for way in stage.recompute}
    if ways - {"none", "full"}:
        yield NotExpressible(
            f"recompute={plain(', '.join(sorted(ways)), 80)}: which products torchtitan keeps is its own: "
            "use full",
            {"recompute": "full"},
        )


def _of_pipeline(subject: Subject) -> Iterator[NotExpressible]:
    layout = subject.layout
    pipeline, micro = int(layout.pipeline_parallel), int(layout.grad_accum)
    if pipeline == 1:
        return
    if layout.schedule not in SCHEDULES:
        yield NotExpressible(
            f"schedule={plain(layout.schedule, 40)}: torch.distributed.pipelining has {', '.join(SCHEDULES)}",
            {"schedule": "1f1b"},
        )
        return
    if subject.model.tie_word_embeddings:
        yield NotExpressible(
            "tied embeddings: no stage has both ends of the model: use pipeline_parallel 1",
            {"pipeline_parallel": 1},
        )
    if layout.schedule == "1f1b" and micro < pipeline:
        yield NotExpressible(
            f"grad_accum={micro}: Schedule1F1B takes as many micro-batches as stages or more, "
            f"{pipeline}: use gpipe",
            {"schedule": "gpipe"},
        )
    if layout.schedule == "interleaved" and micro % max(1, micro // pipeline):
        yield NotExpressible(
            f"grad_accum={micro}: ScheduleInterleaved1F1B goes in {micro // pipeline} rounds of as many: "
            f"use a multiple of {pipeline}"
        )
    if layout.schedule == "zb-v" and layout.data_shards > 1 and layout.reshard_after_forward:
        yield NotExpressible(
            "reshard_after_forward with zb-v: torch looks for the weights of a split backward where FSDP has "
            "put them away, and loses their gradients (torch 2.13.0, pipelining/_backward.py, "
            "stage_backward_input): keep them gathered",
            {"reshard_after_forward": False},
        )
    if not all(stage_layers(subject)):
        yield NotExpressible("a stage would have no layers: use fewer stages", {"pipeline_parallel": 1})


def too_old(subject: Subject, version: str) -> NotExpressible | None:
    """Why a release cannot run the plan as planned."""
    if subject.layout.pipeline_parallel > 1 and int(version.split(".")[1]) < SINCE:
        return NotExpressible(
            f"torch {version} keeps the logits of all micro-batches on the last stage: use "
            f"--version 2.{SINCE} or newer"
        )
    return None


def plan_of(subject: Subject) -> dict[str, Any]:
    """What the script goes by, besides what every script does: degrees, and the layers of each stage.

    ``layers`` are the first layer and the one after the last of every stage, in the model's order; ``held``
    the stages of each rank of the pipeline; ``mesh`` the axes of more than one process, the outermost first.
    """
    layout = subject.layout
    pipeline, chunks = int(layout.pipeline_parallel), int(layout.chunks)
    axes = {
        "pp": pipeline,
        "dp_replicate": layout.data_parallel // layout.data_shards,
        "dp_shard": layout.data_shards,
        "tp": layout.tensor_parallel,
    }
    found: dict[str, Any] = {"mesh": {name: size for name, size in axes.items() if size > 1}}
    found |= {"tensor_parallel": layout.tensor_parallel}
    if pipeline > 1:
        found |= {
            "pipeline_parallel": pipeline,
            "schedule": SCHEDULES[layout.schedule],
            "held": [
                [virtual_stage(rank, chunk, pipeline, layout.schedule) for chunk in range(chunks)]
                for rank in range(pipeline)
            ],
        }
    layers = stage_layers(subject) if pipeline > 1 else [range(subject.model.num_hidden_layers)]
    return found | {"layers": [[own[0], own[-1] + 1] for own in layers]}


def recomputed(subject: Subject) -> list[int]:
    """The blocks of all stages that are run again in the backward, by their number."""
    layout = subject.layout
    prices, rows = priced_again(subject.job, subject.plan)
    pipeline, depth = int(layout.pipeline_parallel), subject.model.num_hidden_layers
    layers = stage_layers(subject) if pipeline > 1 else [list(range(depth))]
    found = []
    for stage in range(pipeline):
        for chunk, blocks in enumerate(chunk_blocks(prices, rows, stage)):
            own = layers[virtual_stage(stage, chunk, pipeline, layout.schedule)]
            ways = [prices.policies[block % len(prices.policies)].partition("+")[0] for block in blocks]
            found += [layer for layer, way in zip(own, ways, strict=True) if way != POLICIES[0]]
    return sorted(found)
