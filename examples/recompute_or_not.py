"""One layout under each recompute policy, and with as much of it as memory forces on each stage.

python examples/recompute_or_not.py
"""

from planner import ClusterSpec, Layout, ModelSpec, TrainingSpec, estimate

model = ModelSpec.from_catalog("gpt-3-175b")
cluster = ClusterSpec.parse("64xA100-80")
training = TrainingSpec(seq_length=2048, global_batch_size=64)
layout = Layout(
    tensor_parallel=8,
    pipeline_parallel=8,
    grad_accum=64,
    sequence_parallel=True,
    sharding="zero1",
)

for policy in ("none", "selective", "full", "auto"):
    plan = estimate(model, cluster, training, layout, recompute=policy)
    verdict = "fits" if plan.fits else "does not fit"
    stages = [stage.recompute for stage in plan.stages]
    print(f"{policy:<10}{plan.peak_bytes / 2**30:6.1f} GiB  {plan.step_time_s:5.1f} s  {verdict:<13}{stages}")
