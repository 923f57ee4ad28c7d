"""A job with one thing changed, everything else as it is: what a review asks first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from planner.defaults import Job
from planner.specs import ClusterSpec, TrainingSpec
from strategies.layout import Layout


@dataclass(frozen=True)
class Case:
    """What was changed, and the whole job with it."""

    name: str
    cluster: ClusterSpec
    training: TrainingSpec
    layout: Layout


def cases(job: Job, layout: Layout) -> Iterator[Case]:
    """Half and twice of what a reviewer turns: sequence, batch, micro-batch, GPUs.

    Sequences are as many as before, so that twice the length is twice the tokens a step; twice the GPUs
    are twice the replicas, with half the micro-batches each.
    """
    seq, batch, accum = job.seq_length, job.global_batch_size, int(layout.grad_accum)
    data, micro, shards = int(layout.data_parallel), int(layout.micro_batch_size), int(layout.data_shards)

    def case(name: str, own: Layout = layout, cluster: ClusterSpec = job.cluster, **training: Any) -> Case:
        return Case(name, cluster, job.training.model_copy(update=training), own)

    def gpus(count: int, replicas: int, accumulated: int) -> Case:
        pool = job.cluster.model_copy(
            update={"num_gpus": count, "gpus_per_node": min(count, job.cluster.gpus_per_node)}
        )
        own = shards * replicas // data if shards == data else shards
        wider = replace(layout, data_parallel=replicas, data_shards=own, grad_accum=accumulated)
        return case(f"{count:,} GPUs", wider, pool)

    if seq % 2 == 0:
        yield case(f"sequences of {seq // 2:,}", seq_length=seq // 2)
    yield case(f"sequences of {seq * 2:,}", seq_length=seq * 2)
    if accum % 2 == 0:
        yield case(
            f"batch of {batch // 2:,}", replace(layout, grad_accum=accum // 2), global_batch_size=batch // 2
        )
    yield case(f"batch of {batch * 2:,}", replace(layout, grad_accum=accum * 2), global_batch_size=batch * 2)
    if accum % 2 == 0:
        twice = replace(layout, micro_batch_size=micro * 2, grad_accum=accum // 2)
        yield case(f"micro-batches of {micro * 2}", twice)
    if micro % 2 == 0:
        half = replace(layout, micro_batch_size=micro // 2, grad_accum=accum * 2)
        yield case(f"micro-batches of {micro // 2}", half)
    count = job.cluster.num_gpus
    if data % 2 == 0:
        yield gpus(count // 2, data // 2, accum * 2)
    if accum % 2 == 0:
        yield gpus(count * 2, data * 2, accum // 2)
