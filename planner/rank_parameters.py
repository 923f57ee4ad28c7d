"""Parameters that one GPU has: a number that a framework's own modules have too, to the last one.

Model states may be shared out over data parallelism besides; what a rank's modules are made of does not
depend on it. So it is what a framework can be asked before any GPU is there (docs/export/megatron.md).
"""

from __future__ import annotations

from dataclasses import replace

from planner.export.base import Subject
from planner.ledger import held_layers, view
from planner.plan import priced_again
from strategies.base import Role, held
from strategies.layout import strategies_of


def rank_parameters(subject: Subject, stage: int) -> int:
    """Parameters of every GPU of a pipeline stage, those that data parallelism shares out in full.

    Tensor, expert and pipeline parallelism cut them; padded vocabulary is counted, and a second copy of a
    tied embedding. Modules that predict further tokens count the product that joins their inputs in full,
    which Megatron-LM cuts by tensor parallelism.

    >>> from planner import ClusterSpec, ModelSpec, TrainingSpec
    >>> from planner.api import estimate
    >>> from strategies.layout import Layout
    >>> model, cluster = ModelSpec.from_catalog("llama-65b"), ClusterSpec.parse("64xH100")
    >>> layout = Layout(2, 8, 4, 4, 1, 256, sharding="zero1", sequence_parallel=True, schedule="interleaved")
    >>> training = TrainingSpec(seq_length=2048, global_batch_size=512)
    >>> plan = estimate(model, cluster, training, layout, recompute="none")
    >>> [rank_parameters(Subject(model, cluster, plan), stage) for stage in (2, 3)]
    [2024079360, 2057641984]
    """
    prices, rows = priced_again(subject.job, subject.plan)
    whole = replace(
        subject.layout,
        sharding="ddp",
        data_shards=subject.layout.data_parallel,
        reshard_after_forward=True,
        offload="",
    )
    cuts = [one for one in strategies_of(whole, prices.wire) if one.axis not in ("recompute", "pipeline")]
    return sum(
        count * round(float(held(replace(term, unit=1.0), cuts)))
        for layer, _, count in held_layers(prices, view(prices, rows, stage))
        for term in layer.by_role[Role.PARAMETER]
    )
