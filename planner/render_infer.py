"""Placements for inference, and accelerate's table, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.accelerate_table import LEFT_OUT, ROTARY_CACHES, Row, as_printed, rotary_cache
from planner.inference import Inference, Placement
from planner.model import ModelSpec
from planner.render import grid
from planner.units import gib, human_bytes, human_count, human_seconds

COLUMNS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "working_set": "working set",
    "cuda_and_nccl": "CUDA, NCCL",
}


def show_inference(console: Console, found: Inference, quiet: bool = False) -> None:
    """The answer, the placements, the first one's ranks and what was assumed."""
    console.print(headline(found), soft_wrap=False)
    console.print()
    console.print(ranking(found))
    if quiet:
        return
    best = found.placements[0]
    if not found.fits:
        over = gib(best.total_bytes - best.capacity_bytes)
        console.print()
        console.print(Text(f"The nearest needs {over} GiB more. What would fit:", style="bold"))
        for change in found.changes or ("nothing that was tried: more GPUs, or larger ones",):
            console.print(Text(f"  {change}"))
    console.print()
    title = f"TP{best.tensor_parallel} PP{best.pipeline_parallel}: GiB of one GPU of each stage"
    console.print(Text(title, style="bold"))
    console.print(stages(best))
    console.print()
    console.print(Text(growth(found)))
    console.print()
    console.print(
        "tokens/s and prefill are of one replica, at best: reading weights and cache at the memory's"
    )
    console.print(
        "measured rate, and the products of the prompt alone at the GPU's. Real engines stay below."
    )
    console.print("First what fits on fewest GPUs, then what has most cache; - where it does not fit.")
    console.print()
    console.print("Assumed:")
    for line in found.assumptions:
        console.print(Text(f"  {line}"))
    if found.refused:
        console.print("Refused:")
        for line in found.refused:
            console.print(Text(f"  {line}"))


def headline(found: Inference) -> Text:
    """The answer in words."""
    best = found.placements[0]
    work = f"{found.batch:,} x {found.context:,} tokens"
    text = Text(
        f"{found.model} {'fits' if best.fits else 'does not fit'} for inference on ",
        style="bold" if best.fits else "bold red",
    )
    text.append(f"{found.num_gpus} x {found.gpu}", style="bold")
    text.append(f", {found.weights} weights, {found.kv} cache, {work}: ")
    shape = f"TP{best.tensor_parallel} PP{best.pipeline_parallel}"
    many = f"{best.replicas} replicas of " if best.replicas > 1 else ""
    size = f"{gib(best.total_bytes)} of {gib(best.capacity_bytes)} GiB on the fullest GPU"
    text.append(f"{many}{shape}, {size}; " if best.fits else f"nearest {shape}, {size}; ")
    text.append(
        f"room for {best.cache_tokens:,} tokens, {best.largest_batch:,} sequences at this context or one of "
        f"{best.largest_context:,}"
    )
    return text


def ranking(found: Inference) -> Table:
    """All placements, those that fit first, then by GPUs of a replica and cache."""
    names = ("TP", "PP", "GPUs", "replicas", "GiB", "cache tokens", "most batch", "most context")
    table = grid("#", *names, "tokens/s", "prefill", spare=("prefill", "tokens/s", "replicas"))
    for number, one in enumerate(found.placements, 1):
        shape = (one.tensor_parallel, one.pipeline_parallel, one.gpus, one.replicas)
        table.add_row(
            str(number),
            *map(str, shape),
            gib(one.total_bytes),
            f"{one.cache_tokens:,}",
            f"{one.largest_batch:,}",
            f"{one.largest_context:,}",
            f"<{found.batch / one.token_s:,.0f}" if one.fits else "-",
            f">{human_seconds(one.prefill_s)}" if one.fits and one.prefill_s else "-",
            style="" if one.fits else "red",
        )
    return table


def stages(one: Placement) -> Table:
    """The components of each stage's ranks; the fullest is marked."""
    table = grid("stage", "layers", *COLUMNS.values(), "total", "of")
    for number, (layers, sizes) in enumerate(zip(one.layers, one.stages, strict=True)):
        cells = [gib(sizes[name]) for name in COLUMNS] + [gib(sum(sizes.values())), gib(one.capacity_bytes)]
        mark = "*" if number == one.fullest and len(one.stages) > 1 else ""
        table.add_row(f"{number}{mark}", str(layers), *cells)
    return table


def growth(found: Inference) -> str:
    """What the whole model weighs, and what a token and a sequence add."""
    further = found.kv_bytes_per_further_token
    beyond = f" ({human_bytes(further)} beyond the windows)" if further < found.kv_bytes_per_token else ""
    return (
        f"The whole model: {human_count(found.num_parameters)} parameters, {human_bytes(found.weight_bytes)} "
        f"of weights; {human_bytes(found.kv_bytes_per_token)} of cache a token{beyond}, "
        f"{human_bytes(found.sequence_bytes)} for a sequence of {found.context:,}."
    )


def show_accelerate_table(
    console: Console, model: ModelSpec, rows: Sequence[Row], plain: Sequence[Row] = ()
) -> None:
    """accelerate's table, its training stages, and what it leaves out; ``plain`` is without rotary caches."""
    console.print(Text(f"accelerate estimate-memory: {model.name}", style="bold"))
    console.print(_accelerate_rows(rows))
    if plain:
        size, release = human_bytes(rotary_cache(model)), ROTARY_CACHES[model.model_type]
        console.print()
        console.print(
            f"With {size} of fp32 cosines and sines in every layer, as in transformers up to {release}."
        )
        console.print("Without them:")
        console.print(_accelerate_rows(plain))
    console.print()
    console.print("Training using Adam is the largest of:")
    names = ("model", "gradients", "optimizer", "step")
    table = grid("dtype", *names, left=("dtype",))
    for row in rows:
        if row.training:
            table.add_row(row.dtype, *(as_printed(row.training[name]) for name in names))
    console.print(table)
    console.print()
    console.print("MB and GB are 2^20 and 2^30 bytes, as accelerate prints them. The table leaves out:")
    for line in LEFT_OUT:
        console.print(Text(f"  {line}"))


def _accelerate_rows(rows: Sequence[Row]) -> Table:
    table = grid("dtype", "Largest Layer", "Total Size", "Training using Adam", left=("dtype",))
    for row in rows:
        training = row.training_using_adam
        sizes = (as_printed(row.largest_layer), as_printed(row.total))
        table.add_row(row.dtype, *sizes, as_printed(training) if training else "N/A")
    return table
