"""Plans for tests of what is made of them: small to make, of any degrees."""

from __future__ import annotations

from functools import cache
from typing import Any

from planner import api
from planner.export.base import Subject
from planner.reading import read_cluster
from planner.specs import ModelSpec, TrainingSpec
from strategies.layout import Layout


@cache
def subject_of(
    gpus: str,
    *,
    model: str = "llama-65b",
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    leaf: int | None = None,
    framework: str = "megatron",
    accum: int = 4,
    **more: Any,
) -> Subject:
    """A given layout of a model on GPUs, data parallelism the rest; whether it fits is no matter here."""
    cluster = read_cluster(gpus, nodes_per_leaf=leaf)
    replicas = cluster.num_gpus // (tp * pp * cp)
    layout = Layout(
        data_parallel=replicas,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        context_parallel=cp,
        grad_accum=accum,
        **more,
    )
    spec = ModelSpec.from_catalog(model)
    training = TrainingSpec(framework=framework, global_batch_size=replicas * accum)
    return Subject(spec, cluster, api.estimate(spec, cluster, training, layout, recompute="full"))
