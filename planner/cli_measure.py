"""``planner measure``: PyTorch runs the model on tensors without storage, beside the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from planner import options as o
from planner.options import option

if TYPE_CHECKING:
    from strategies.layout import Layout

EXAMPLE = "Example: planner measure --model tinyllama-1.1b --framework fsdp --gpus 8 --seq-length 2048"

Built = Annotated[
    str, option("--framework", help="hf: one GPU, or DDP over several; fsdp: FSDP2's fully_shard.")
]
Count = Annotated[int, option("--gpus", "-g", help="GPUs in all; one of them is run.")]
Tensor = Annotated[
    int, option("--tensor-parallel", "-tp", help="Under fsdp: tensor and sequence parallelism over so many.")
]
Depth = Annotated[int | None, option("--layers", help="Measure so many layers instead of the model's.")]
Policy = Annotated[str, option("--recompute", help="none, or full: every block is checkpointed.")]
Kernel = Annotated[str, option("--attention", help="sdpa or eager.")]
Keep = Annotated[
    bool,
    option(
        "--reshard-after-forward/--no-reshard-after-forward",
        help="FSDP frees gathered units after the forward.",
    ),
]


def measure(
    model: o.Model,
    framework: Built = "hf",
    gpus: Count = 1,
    tensor_parallel: Tensor = 1,
    layers: Depth = None,
    seq_length: o.Seq = None,
    micro_batch_size: o.Micro = 1,
    recompute: Policy = "none",
    attention: Kernel = "sdpa",
    precision: o.Precision = None,
    dropout: o.Dropout = None,
    option: o.Choice = None,
    reshard_after_forward: Keep = True,
    as_json: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Run the model in PyTorch without a GPU and put every byte beside the planner's. Needs torch."""
    given = locals()
    from planner.cli import print_json, reported

    with reported(as_json):
        from planner import reading
        from planner.measure import measure as run

        layout = layout_of(given)
        training = reading.read_training(given)
        reading.read_model(model)  # a wrong model is refused before torch is loaded
        source: Any = Path(model) if Path(model).exists() else model
        found = run(
            source,
            training,
            layout,
            recompute=recompute,
            layers=layers,
        )
        if as_json:
            return print_json(found.as_dict())
        from planner.render import console_for
        from planner.render_measure import show_comparison

        show_comparison(console_for(), found, verbose)


def layout_of(given: dict[str, Any]) -> Layout:
    """One GPU, or DDP or FSDP over all GPUs that tensor parallelism leaves."""
    from planner.errors import InputError
    from strategies.layout import Layout

    framework, gpus, tensor = given["framework"], given["gpus"], given["tensor_parallel"]
    for name in ("gpus", "tensor_parallel", "micro_batch_size"):
        if not 1 <= given[name] <= 100_000:
            raise InputError(f"--{name.replace('_', '-')} {given[name]}: use a whole number, 1 or more")
    if tensor > 1 and (framework != "fsdp" or gpus % tensor or gpus == tensor):
        raise InputError(
            f"--tensor-parallel {tensor} is measured together with FSDP: use --framework fsdp and --gpus "
            f"{2 * tensor} or another multiple of {tensor}"
        )
    return Layout(
        data_parallel=gpus // tensor,
        tensor_parallel=tensor,
        sequence_parallel=tensor > 1,
        sharding="fsdp" if framework == "fsdp" else "ddp",
        micro_batch_size=given["micro_batch_size"],
        reshard_after_forward=given["reshard_after_forward"],
    )
