"""Ask whether a job fits, and print where the memory of the best layout goes.

python examples/fits_or_not.py
"""

from planner import ClusterSpec, InfeasibleError, ModelSpec, TrainingSpec, search

model = ModelSpec.from_catalog("llama-2-13b")
training = TrainingSpec(seq_length=4096, global_batch_size=256, tokens=2e12)

for gpus in ("8xA100-40", "8xA100-80", "32xH100"):
    try:
        best = search(model, ClusterSpec.parse(gpus), training, top=1)[0]
    except InfeasibleError as error:
        print(f"{gpus}: {error}")
        for change in error.changes:
            print(f"    would fit: {change.what} ({change.option})")
        continue
    layout = best.layout.to_layout().describe()
    print(f"{gpus}: {layout}, {best.peak_bytes / 2**30:.1f} GiB, {best.days:,.0f} days, MFU {best.mfu:.0%}")
    for component, size in best.stages[best.fullest].components.items():
        print(f"    {component:<22}{size / 2**30:7.2f} GiB")
