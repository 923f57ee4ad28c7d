"""Small plans for tests of exporters, and what an imported configuration is planned as."""

from __future__ import annotations

from typing import Any

from planner import api, reading
from planner.export import Subject
from planner.export.imported import Imported
from planner.plan import Plan
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout

SPEC = ModelSpec(
    name="small",
    model_type="llama",
    hidden_size=512,
    num_hidden_layers=16,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=1024,
    vocab_size=32000,
    max_position_embeddings=4096,
)
GIVEN: dict[str, Any] = {
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "data_parallel": None,
    "micro_batch_size": 1,
    "chunks": 1,
    "sharding": None,
    "data_shards": None,
    "reshard_after_forward": True,
    "schedule": None,
    "sequence_parallel": None,
    "rank_order": "tp-dp-pp",
    "context_parallel": 1,
    "context_comm": None,
    "ulysses_degree": 1,
    "expert_parallel": 1,
    "expert_tensor_parallel": 1,
    "offload": None,
    "recompute": "none",
    "layers_per_stage": None,
}
"""Options of ``planner estimate`` that were not given."""
OF_LAYOUT = set(Layout.__dataclass_fields__)


def planned(framework: str, gpus: str = "16xh100", name: str = "small", **given: Any) -> Subject:
    """A plan of a small model, in which fields of a layout and a training are as given."""
    cluster = ClusterSpec.parse(gpus).model_copy(update={"nvme_bytes": 10**13})
    recompute, layers = given.pop("recompute", "none"), given.pop("layers", None)
    fields = {name: given.pop(name) for name in list(given) if name in OF_LAYOUT}
    parts = 1
    for axis in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        parts *= fields.get(axis, 1)
    layout = Layout(
        **{"data_parallel": cluster.num_gpus // parts, "grad_accum": 4, "micro_batch_size": 2, **fields}
    )
    model = given.pop("model", SPEC.model_copy(update={"name": name}))
    batch = int(layout.global_batch_size)
    training = TrainingSpec(framework=framework, seq_length=512, global_batch_size=batch, **given)
    plan = api.estimate(model, cluster, training, layout, recompute=recompute, layers=layers)
    return Subject(model, cluster, plan)


def same(plan: Plan, subject: Subject) -> bool:
    """Have two plans the same layout, precision and recomputation?"""

    def told(one: Plan) -> tuple[object, ...]:
        layout, training = one.layout.to_layout(), one.training
        rows = [stage.rows for stage in one.stages]
        return (
            layout.describe(),
            layout.grad_accum,
            layout.schedule,
            training.precision,
            training.optimizer,
            rows,
        )

    return told(plan) == told(subject.plan)


def again(subject: Subject, found: Imported, **given: Any) -> Plan:
    """The plan of an imported configuration on the same model and GPUs, with what it cannot say as given."""
    layers = ",".join(map(str, subject.layers)) if len(set(subject.layers)) > 1 else None
    options = {
        **GIVEN,
        "layers_per_stage": layers,
        "seq_length": subject.job.seq_length,
        **found.options,
        **given,
    }
    training = reading.read_training(options)
    training, layout = reading.read_layout(subject.model, subject.cluster, training, options)
    way = reading.read_way(options["recompute"], options["offload"])
    return api.estimate(
        subject.model,
        subject.cluster,
        training,
        layout,
        recompute=way,
        layers=reading.numbers("--layers-per-stage", options["layers_per_stage"]),
    )
