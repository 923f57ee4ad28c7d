"""``planner infer``: does a model fit for inference, on which placement, with how much cache?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from planner import options as o
from planner.options import option

if TYPE_CHECKING:
    from planner.inference import InferenceSpec
    from planner.model import ModelSpec

EXAMPLE = "Example: planner infer --model llama-3.1-70b --gpus 8xH100 --context 8192 --batch 16 --weights fp8"

Cluster = Annotated[
    str | None, option("--gpus", "-g", help="8xH100, 2x80G or 2x8xH100 (nodes x GPUs per node x kind).")
]
Context = Annotated[
    int | None,
    option("--context", "-c", help="Tokens per sequence, prompt and answer; all positions if left out."),
]
Sequences = Annotated[int, option("--batch", "-b", help="Sequences at once, on each replica.")]
Weights = Annotated[str, option("--weights", help="bf16, fp16, fp8, int8, int4 (AWQ, groups of 128) or nf4.")]
Cache = Annotated[str, option("--kv", help="Of the cache: bf16, fp16, fp8 or int8.")]
Tensor = Annotated[str | None, option("--tensor-parallel", "-tp", help="Only these degrees, as in 1,2,4.")]
Pipeline = Annotated[str | None, option("--pipeline-parallel", "-pp", help="Only these numbers of stages.")]
Page = Annotated[int, option("--block-size", help="Tokens of a block of cache.")]
Chunk = Annotated[
    int, option("--chunk-tokens", help="Tokens of a forward pass at most: vLLM's --max-num-batched-tokens.")
]
Part = Annotated[
    str, option("--utilization", help="Part of each GPU to fill: vLLM's --gpu-memory-utilization.")
]
Accelerate = Annotated[
    bool, option("--accelerate", help="The table of Hugging Face's accelerate estimate-memory instead.")
]


def infer(
    model: o.Model,
    gpus: Cluster = None,
    context: Context = None,
    batch: Sequences = 1,
    weights: Weights = "bf16",
    kv: Cache = "bf16",
    tensor_parallel: Tensor = None,
    pipeline_parallel: Pipeline = None,
    block_size: Page = 16,
    chunk_tokens: Chunk = 8192,
    utilization: Part = "0.9",
    accelerate: Accelerate = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Will it fit for inference, on which TP x PP, with which batch and context? Exit status 1 if not."""
    given = locals()
    from planner.cli import print_json, reported

    with reported(as_json):
        from planner import reading
        from planner.errors import InputError

        spec = reading.read_model(model)
        if accelerate:
            return show_accelerate(spec, as_json)
        if gpus is None:
            raise InputError("--gpus is missing: write count x kind, as in 8xH100 (or ask for --accelerate)")
        from planner.inference import infer as run

        found = run(spec, reading.read_cluster(gpus), read_spec(given))
        if as_json:
            from dataclasses import asdict

            document = {"schema": "planner.infer/1", "fits": found.fits, **asdict(found)}
            print_json(document)
        else:
            from planner.render import console_for
            from planner.render_infer import show_inference

            show_inference(console_for(), found, quiet)
        if not found.fits:
            raise SystemExit(1)


def read_spec(given: dict[str, Any]) -> InferenceSpec:
    """An InferenceSpec of a command's options. Raises InputError, naming the option."""
    from pydantic import ValidationError

    from planner import reading
    from planner.errors import InputError
    from planner.inference import InferenceSpec
    from planner.specs import first_problem
    from planner.units import parse_fraction

    names = ("context", "batch", "block_size", "chunk_tokens")
    values: dict[str, Any] = {name: given[name] for name in names}
    values |= {name: given[name].strip().lower() for name in ("weights", "kv")}
    for name in ("tensor_parallel", "pipeline_parallel"):
        values[name] = reading.numbers(f"--{name.replace('_', '-')}", given[name])
    values["utilization"] = parse_fraction(given["utilization"], "--utilization ")
    try:
        return InferenceSpec(**values)
    except ValidationError as error:
        field, _, rest = first_problem(error).partition("=")
        raise InputError(f"--{field.replace('_', '-')} {rest}") from None


def show_accelerate(model: ModelSpec, as_json: bool) -> None:
    """The table of accelerate, as text or JSON."""
    from planner.accelerate_table import LEFT_OUT, accelerate_table, rotary_cache
    from planner.cli import print_json

    tables = {"rows": accelerate_table(model)}
    if rotary_cache(model):
        tables["rows_without_rotary_caches"] = accelerate_table(model, rotary_caches=False)
    if as_json:
        from dataclasses import asdict

        document: dict[str, Any] = {"schema": "planner.accelerate/1", "model": model.name}
        for name, rows in tables.items():
            document[name] = [asdict(row) | {"training_using_adam": row.training_using_adam} for row in rows]
        return print_json(document | {"left_out": LEFT_OUT})
    from planner.render import console_for
    from planner.render_infer import show_accelerate_table

    show_accelerate_table(console_for(), model, *tables.values())
