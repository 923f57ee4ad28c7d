"""Parameters that FSDP2 leaves on one GPU: torchtitan's own modules have as many, to the last one."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from planner.export.base import Subject
from planner.ledger import held_layers, view
from planner.plan import priced_again
from strategies.base import Role, Term, held
from strategies.layout import Layout, strategies_of

INPUTS = ("hidden", "q_rank", "kv_rank")
"""Dimensions that a matrix begins with where its inputs are as wide; its outputs are the rest."""


def local_parameters(subject: Subject, rank: int) -> int:
    """Parameters of one GPU, cut by tensor, expert and pipeline parallelism, and by FSDP2.

    FSDP2 cuts the first dimension of each tensor and gives its ranks as many rows as ``torch.chunk`` does:
    the last ones may have fewer, or none. Routed experts are cut along their second dimension where there
    are more GPUs than experts (torchtitan 0.2.2, models/llama4/infra/parallelize.py, ``apply_fsdp``). Tied
    embeddings are counted once. Ranks are counted as torchtitan does, of the mesh ``pp, dp_replicate,
    dp_shard, cp, tp``, and for experts ``pp, dp_replicate, efsdp, ep``.

    >>> from planner import ClusterSpec, ModelSpec, TrainingSpec
    >>> from planner.api import estimate
    >>> model, cluster = ModelSpec.from_catalog("llama-3-70b"), ClusterSpec.parse("64xH100")
    >>> training = TrainingSpec(seq_length=8192, global_batch_size=64, framework="torchtitan")
    >>> layout = Layout(8, 4, 2, 1, 1, 8, sharding="fsdp", sequence_parallel=True)
    >>> plan = estimate(model, cluster, training, layout, recompute="full")
    >>> [local_parameters(Subject(model, cluster, plan), rank) for rank in (0, 32)]
    [1102462976, 1102464000]
    """
    prices, rows = priced_again(subject.job, subject.plan)
    layout = subject.layout
    each = subject.plan.num_gpus // layout.pipeline_parallel
    whole = replace(layout, sharding="ddp", data_shards=layout.data_parallel, reshard_after_forward=True)
    cuts = [
        one
        for one in strategies_of(replace(whole, offload=""), prices.wire)
        if one.axis not in ("recompute", "pipeline")
    ]
    return sum(
        count
        * _local(replace(term, unit=1.0), round(float(held(replace(term, unit=1.0), cuts))), layout, rank)
        for layer, _, count in held_layers(prices, view(prices, rows, rank // each))
        for term in layer.by_role[Role.PARAMETER]
    )


def _local(term: Term, size: int, layout: Layout, rank: int) -> int:
    """What FSDP2 leaves a rank of a term's tensors, which have ``size`` elements together before that."""
    if not size:
        return 0
    tensors = int(term.dims.get("pair", 1))
    cut = {"heads", "kv_heads", "ffn", "vocab"}
    names = _rows(term)
    rows = int(prod(float(term.dims[name]) for name in names))
    rows //= layout.tensor_parallel if cut & set(names) else 1
    shards, index = layout.data_shards * layout.context_parallel, rank // layout.tensor_parallel
    if "experts" in term.dims:
        experts = int(term.dims["experts"]) // layout.expert_parallel
        shards, index = layout.expert_shards, rank // layout.expert_parallel
        rows = experts
        if layout.expert_parallel > 1 and shards > experts:
            rows = int(term.dims[[name for name in term.dims if name != "pair"][-1]])
    if layout.sharding != "fsdp":
        shards = 1
    length = -(-rows // shards)
    mine = max(0, min(length, rows - (index % shards) * length))
    return int(tensors * (size // tensors // rows * mine))


def _rows(term: Term) -> list[str]:
    """The dimensions that are a weight's first one, as PyTorch has it: outputs before inputs."""
    names = [name for name in term.dims if name not in ("pair", "copies")]
    if "vocab" in names:
        return ["vocab"]
    if names[0] in INPUTS and len(names) > 1:
        return names[1:]
    return ["hidden"] if "hidden" in names else names
