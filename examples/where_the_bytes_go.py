"""The ten largest terms of one GPU's memory, with the share that each strategy leaves.

python examples/where_the_bytes_go.py
"""

from planner import ClusterSpec, Layout, ModelSpec, TrainingSpec, explain

plan, stage, moment, entries, messages = explain(
    ModelSpec.from_catalog("llama-65b"),
    ClusterSpec.parse("64x80G"),
    TrainingSpec(seq_length=2048, global_batch_size=512),
    Layout(
        data_parallel=4,
        tensor_parallel=8,
        pipeline_parallel=2,
        grad_accum=128,
        data_shards=4,
        sequence_parallel=True,
        sharding="zero1",
    ),
)
print(f"stage {stage} at {moment}: {plan.stages[stage].peak_bytes / 2**30:.2f} GiB")
for entry in sorted(entries, key=lambda one: -one.held)[:10]:
    shares = " x ".join(f"{share:g}" for share in entry.shares.values() if share != 1)
    print(f"{entry.held / 2**30:6.2f} GiB  {entry.layer:>9} {entry.name}: {entry.count:g} x {shares or 1}")
for message in messages:
    print(f"{message.count:4.0f} x {message.size / 2**20:7.1f} MiB {message.kind} per {message.per}")
