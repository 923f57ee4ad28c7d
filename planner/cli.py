"""The command line. Only this module imports typer; everything heavy is imported where it is used.

Exit status: 0 fits, 1 does not fit, 2 bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from planner.specs import ClusterSpec, ModelSpec, TrainingSpec

app = typer.Typer(
    name="planner",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts twice as fast
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Will this model fit on these GPUs, on which layout, and how fast?\n\n"
    "Example: planner search --model llama-65b --gpus 64x80G",
)

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A catalog name, a config.json, or its folder.", rich_help_panel="Job"
    ),
]
Gpus = Annotated[
    str,
    typer.Option(
        "--gpus",
        "-g",
        help="64x80G, 64xH100 or 8x8xH100 (nodes x GPUs per node x kind).",
        rich_help_panel="Job",
    ),
]
Seq = Annotated[
    int | None, typer.Option("--seq-length", "-s", help="Tokens per sequence.", rich_help_panel="Job")
]
Batch = Annotated[
    int | None, typer.Option("--global-batch-size", "-b", help="Sequences per step.", rich_help_panel="Job")
]
Tokens = Annotated[
    str | None,
    typer.Option("--tokens", help="Tokens of the whole training, as in 1.4T.", rich_help_panel="Job"),
]
Framework = Annotated[
    str, typer.Option("--framework", help="megatron, torchtitan or hf.", rich_help_panel="Stack")
]
Precision = Annotated[
    str | None, typer.Option("--precision", help="bf16, fp16 or fp32.", rich_help_panel="Stack")
]
Optimizer = Annotated[
    str, typer.Option("--optimizer", help="adamw, adam, momentum or sgd.", rich_help_panel="Stack")
]
Attention = Annotated[
    str | None, typer.Option("--attention", help="flash, sdpa or eager.", rich_help_panel="Stack")
]
Swiglu = Annotated[
    str | None, typer.Option("--swiglu", help="fused, unfused or recomputed.", rich_help_panel="Stack")
]
Dropout = Annotated[
    float | None, typer.Option("--dropout", help="Dropout, if not the model's own.", rich_help_panel="Stack")
]
GradientType = Annotated[
    str | None, typer.Option("--gradient-dtype", help="fp32, bf16 or fp16.", rich_help_panel="Stack")
]
OptimizerType = Annotated[
    str | None, typer.Option("--optimizer-dtype", help="fp32 or bf16.", rich_help_panel="Stack")
]
Master = Annotated[
    bool | None,
    typer.Option(
        "--master-weights/--no-master-weights", help="An fp32 copy of the weights.", rich_help_panel="Stack"
    ),
]
Budget = Annotated[
    str | None,
    typer.Option("--memory-budget", help="Bytes per GPU to plan for, as in 72GiB.", rich_help_panel="Job"),
]
Headroom = Annotated[
    str | None,
    typer.Option("--headroom", help="Fraction of each GPU to leave free, as in 10%.", rich_help_panel="Job"),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="JSON on standard output, and nothing else there.", rich_help_panel="Output"),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Sources and refusals too.", rich_help_panel="Output")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="The answer and the ranking only.", rich_help_panel="Output")
]
TP = Annotated[
    int, typer.Option("--tensor-parallel", "-tp", help="Tensor-parallel degree.", rich_help_panel="Layout")
]
PP = Annotated[
    int, typer.Option("--pipeline-parallel", "-pp", help="Pipeline stages.", rich_help_panel="Layout")
]
DP = Annotated[
    int | None,
    typer.Option(
        "--data-parallel", "-dp", help="Replicas; the rest of the GPUs by default.", rich_help_panel="Layout"
    ),
]
Micro = Annotated[
    int,
    typer.Option("--micro-batch-size", "-mb", help="Sequences per forward pass.", rich_help_panel="Layout"),
]
Chunks = Annotated[
    int, typer.Option("--chunks", help="Model chunks per stage (interleaving).", rich_help_panel="Layout")
]
Sharding = Annotated[
    str, typer.Option("--sharding", help="ddp, zero1, zero2, zero3 or fsdp.", rich_help_panel="Layout")
]
Shards = Annotated[
    int | None,
    typer.Option("--data-shards", help="FSDP's group, if hybrid (HSDP).", rich_help_panel="Layout"),
]
Reshard = Annotated[
    bool,
    typer.Option(
        "--reshard-after-forward/--keep-gathered",
        help="FSDP frees gathered units after the forward.",
        rich_help_panel="Layout",
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option("--schedule", help="1f1b, interleaved, gpipe or pipedream.", rich_help_panel="Layout"),
]
SequenceParallel = Annotated[
    bool | None,
    typer.Option(
        "--sequence-parallel/--no-sequence-parallel",
        help="Cut the residual stream too; on with tensor parallelism.",
        rich_help_panel="Layout",
    ),
]
Recompute = Annotated[
    str,
    typer.Option(
        "--recompute", help="none, selective, full, or auto: as memory forces.", rich_help_panel="Layout"
    ),
]


@app.callback()
def main() -> None:
    """Distributed-training memory planner."""


def fail(message: str, status: int, as_json: bool = False, **more: Any) -> NoReturn:
    """Says what is wrong on standard error (and as JSON, if asked) and exits."""
    if as_json:
        _print_json({"error": message, **more})
    else:
        typer.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(message, err=True)
    raise typer.Exit(status)


@contextmanager
def reported(as_json: bool = False) -> Iterator[None]:
    """Turns the planner's errors into a message and an exit status."""
    from planner.errors import InfeasibleError, PlannerError

    try:
        yield
    except InfeasibleError as error:
        _report_infeasible(error, as_json)
    except PlannerError as error:
        fail(str(error), 2, as_json)
    except BrokenPipeError:
        raise typer.Exit(0) from None


def _report_infeasible(error: Any, as_json: bool) -> NoReturn:
    from dataclasses import asdict

    if as_json:
        nearest = error.nearest.model_dump(mode="json") if error.nearest else None
        fail(str(error), 1, True, nearest=nearest, changes=[asdict(change) for change in error.changes])
    from planner.render import console_for, show_changes, show_stages

    console = console_for()
    console.print(f"Does not fit: {error}", style="bold red", markup=False)
    if error.nearest:
        console.print()
        show_stages(console, error.nearest, title="The nearest layout, GiB per GPU")
        console.print()
        show_changes(console, error.changes)
    raise typer.Exit(1)


def _print_json(value: Any) -> None:
    import json

    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def read_model(text: str) -> ModelSpec:
    """A model from the catalog, or from a path if there is one or the text looks like one."""
    from pathlib import Path

    from planner.errors import InputError
    from planner.specs import ModelSpec

    try:
        is_path = text.endswith(".json") or Path(text).exists()
    except (OSError, ValueError):
        raise InputError(f"--model {text[:60]!r}... is neither a path nor a catalog name") from None
    if is_path:
        return ModelSpec.from_hugging_face(text)
    return ModelSpec.from_catalog(text)


def read_cluster(gpus: str, budget: str | None, headroom: str | None) -> ClusterSpec:
    """A cluster with its memory budget."""
    from planner.errors import InputError
    from planner.specs import ClusterSpec
    from planner.units import gib, parse_bytes, parse_fraction

    cluster = ClusterSpec.parse(gpus)
    update: dict[str, Any] = {}
    if budget is not None:
        update["budget_bytes"] = parse_bytes(budget)
        if update["budget_bytes"] < 2**30:
            raise InputError(f"--memory-budget {budget}: less than 1 GiB holds no training job")
        if update["budget_bytes"] > cluster.gpu.memory_bytes:
            have = gib(cluster.gpu.usable_bytes)
            raise InputError(
                f"--memory-budget {budget} is more than {cluster.gpu.name} has: {have} GiB usable"
            )
    if headroom is not None:
        update["headroom"] = parse_fraction(headroom)
    return cluster.model_copy(update=update)


def read_training(**given: Any) -> TrainingSpec:
    """A TrainingSpec of what was given, with the option's name in any error."""
    from pydantic import ValidationError

    from planner.errors import InputError
    from planner.specs import TrainingSpec, first_problem

    tokens = given.pop("tokens", None)
    if tokens is not None:
        given["tokens"] = read_count(tokens)
    try:
        return TrainingSpec(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise InputError(f"--{first_problem(error).replace('_', '-', 2)}") from None


def read_count(text: str) -> float:
    """1.4e12 of ``1.4T``. Raises InputError."""
    from planner.errors import InputError

    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e18:
        raise InputError(f"--tokens {text[:40]!r} is not a number of tokens: write 300B or 1.4T")
    return value


def numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Degrees of ``2,4,8``. Raises InputError."""
    from planner.errors import InputError

    if text is None:
        return None
    parts = text.split(",")
    if (
        not all(part.strip().isdigit() and 0 < int(part) <= 10**7 for part in parts if len(part) < 20)
        or len(text) > 200
    ):
        raise InputError(f"{option} {text[:40]!r}: write whole numbers, 1 or more, as in 4 or 2,4,8")
    return tuple(int(part) for part in parts)


def words(text: str | None) -> tuple[str, ...] | None:
    """Names of ``ddp,zero1``."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A spinner on standard error, once a search has taken a second; nothing when piped."""
    import time

    if quiet or not sys.stderr.isatty():
        yield lambda done, left: None
        return
    start, shown = time.monotonic(), False

    def report(done: int, left: int) -> None:
        nonlocal shown
        if time.monotonic() - start > 1:
            shown = True
            sys.stderr.write(f"\r\x1b[Ksearching: {done} solved, {left:,} layouts left")
            sys.stderr.flush()

    try:
        yield report
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")


@app.command(
    epilog="Example: planner search --model llama-2-70b --gpus 8x8xH100 --seq-length 4096 --headroom 10%"
)
def search(
    model: Model,
    gpus: Gpus,
    seq_length: Seq = None,
    global_batch_size: Batch = None,
    tokens: Tokens = None,
    memory_budget: Budget = None,
    headroom: Headroom = None,
    framework: Framework = "megatron",
    precision: Precision = None,
    optimizer: Optimizer = "adamw",
    attention: Attention = None,
    swiglu: Swiglu = None,
    dropout: Dropout = None,
    gradient_dtype: GradientType = None,
    optimizer_dtype: OptimizerType = None,
    master_weights: Master = None,
    tensor_parallel: Annotated[
        str | None,
        typer.Option(
            "--tensor-parallel",
            "-tp",
            help="Only these degrees, as in 4,8.",
            rich_help_panel="Layouts to search",
        ),
    ] = None,
    pipeline_parallel: Annotated[
        str | None,
        typer.Option(
            "--pipeline-parallel", "-pp", help="Only these degrees.", rich_help_panel="Layouts to search"
        ),
    ] = None,
    data_parallel: Annotated[
        str | None,
        typer.Option(
            "--data-parallel", "-dp", help="Only these degrees.", rich_help_panel="Layouts to search"
        ),
    ] = None,
    micro_batch_size: Annotated[
        str | None,
        typer.Option(
            "--micro-batch-size", "-mb", help="Only these sizes.", rich_help_panel="Layouts to search"
        ),
    ] = None,
    chunks: Annotated[
        str | None,
        typer.Option(
            "--chunks", help="Only these numbers of model chunks.", rich_help_panel="Layouts to search"
        ),
    ] = None,
    sharding: Annotated[
        str | None,
        typer.Option(
            "--sharding",
            help="Only these: ddp, zero1, zero2, zero3, fsdp.",
            rich_help_panel="Layouts to search",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            help="Only these: 1f1b, interleaved, gpipe, pipedream.",
            rich_help_panel="Layouts to search",
        ),
    ] = None,
    recompute: Annotated[
        str | None,
        typer.Option(
            "--recompute",
            help="Only these policies: none, selective, full.",
            rich_help_panel="Layouts to search",
        ),
    ] = None,
    sequence_parallel: Annotated[
        bool,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel",
            help="With tensor parallelism.",
            rich_help_panel="Layouts to search",
        ),
    ] = True,
    across_nodes: Annotated[
        bool,
        typer.Option(
            "--across-nodes",
            help="Tensor-parallel groups may leave their node.",
            rich_help_panel="Layouts to search",
        ),
    ] = False,
    objective: Annotated[
        str, typer.Option("--objective", help="time or headroom.", rich_help_panel="Output")
    ] = "time",
    top: Annotated[int, typer.Option("--top", "-n", help="Layouts to show.", rich_help_panel="Output")] = 5,
    time_limit: Annotated[
        float,
        typer.Option("--time-limit", help="Seconds to search at most.", min=0.0, rich_help_panel="Output"),
    ] = 60.0,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Rank the layouts that fit, best first, with proof that no better one was missed."""
    with reported(as_json):
        from planner import api
        from planner.layouts import Choices

        choices = Choices(
            tensor_parallel=numbers("--tensor-parallel", tensor_parallel),
            pipeline_parallel=numbers("--pipeline-parallel", pipeline_parallel),
            data_parallel=numbers("--data-parallel", data_parallel),
            micro_batch_size=numbers("--micro-batch-size", micro_batch_size),
            chunks=numbers("--chunks", chunks),
            sharding=words(sharding),
            schedule=words(schedule),
            recompute=words(recompute),
            sequence_parallel=sequence_parallel,
            across_nodes=across_nodes,
        )
        training = read_training(
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            tokens=tokens,
            framework=framework,
            precision=precision,
            optimizer=optimizer,
            attention=attention,
            swiglu=swiglu,
            dropout=dropout,
            gradient_dtype=gradient_dtype,
            optimizer_dtype=optimizer_dtype,
            master_weights=master_weights,
        )
        spec, cluster = read_model(model), read_cluster(gpus, memory_budget, headroom)
        with progress(quiet or as_json) as report:
            plans = api.search(
                spec,
                cluster,
                training,
                top=top,
                objective=objective,
                choices=choices,
                time_limit=time_limit,
                progress=report,
            )
        if as_json:
            return _print_json(as_document(spec, cluster, plans))
        from planner.render import console_for, show_search

        show_search(console_for(), plans, verbose, quiet)


def as_document(model: ModelSpec, cluster: ClusterSpec, plans: list[Any]) -> dict[str, Any]:
    """The JSON of a command that answers with plans."""
    gpu = cluster.gpu
    dumped = [plan.model_dump(mode="json") for plan in plans]
    return {
        "schema": "planner.search/1",
        "model": {"num_parameters": model.num_parameters, **model.model_dump(mode="json")},
        "cluster": {
            "gpu": gpu.name,
            "num_gpus": cluster.num_gpus,
            "gpus_per_node": cluster.gpus_per_node,
            "usable_bytes": gpu.usable_bytes,
            "capacity_bytes": cluster.capacity_bytes,
        },
        "training": dumped[0]["training"],
        "assumptions": dumped[0]["assumptions"],
        "plans": dumped,
        "proof": dumped[0]["proof"],
    }


def given_layout(
    cluster: ClusterSpec, training: TrainingSpec, model: ModelSpec, **given: Any
) -> tuple[Any, TrainingSpec]:
    """A Layout from options, the rest of the GPUs being data parallel, and the filled training."""
    from planner.defaults import resolve
    from planner.errors import InputError
    from strategies.layout import Layout

    for name, value in given.items():
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= 10**7:
            raise InputError(f"--{name.replace('_', '-')} {value}: use a whole number, 1 or more")
    job = resolve(model, cluster, training)
    tensor, pipeline = given["tensor_parallel"], given["pipeline_parallel"]
    data = given["data_parallel"] or max(1, cluster.num_gpus // (tensor * pipeline))
    micro = given["micro_batch_size"]
    sp = given["sequence_parallel"]
    chunks = given["chunks"]
    layout = Layout(
        data_parallel=data,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        chunks=chunks,
        micro_batch_size=micro,
        grad_accum=max(1, job.global_batch_size // (data * micro)),
        data_shards=given["data_shards"] or data,
        sequence_parallel=tensor > 1 if sp is None else sp,
        sharding=given["sharding"],
        reshard_after_forward=given["reshard_after_forward"],
        schedule=given["schedule"] or ("interleaved" if chunks > 1 else "1f1b"),
    )
    return layout, job.training


@app.command(
    epilog="Example: planner estimate --model llama-65b --gpus 64x80G -tp 8 -pp 2 --global-batch-size 512"
)
def estimate(
    model: Model,
    gpus: Gpus,
    tensor_parallel: TP = 1,
    pipeline_parallel: PP = 1,
    data_parallel: DP = None,
    micro_batch_size: Micro = 1,
    chunks: Chunks = 1,
    sharding: Sharding = "zero1",
    data_shards: Shards = None,
    reshard_after_forward: Reshard = True,
    schedule: Schedule = None,
    sequence_parallel: SequenceParallel = None,
    recompute: Recompute = "none",
    seq_length: Seq = None,
    global_batch_size: Batch = None,
    tokens: Tokens = None,
    memory_budget: Budget = None,
    headroom: Headroom = None,
    framework: Framework = "megatron",
    precision: Precision = None,
    optimizer: Optimizer = "adamw",
    attention: Attention = None,
    swiglu: Swiglu = None,
    dropout: Dropout = None,
    gradient_dtype: GradientType = None,
    optimizer_dtype: OptimizerType = None,
    master_weights: Master = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """One given layout, per stage, per component and per moment. Exit status 1 if it does not fit."""
    with reported(as_json):
        spec, cluster, training, layout = _one_layout(locals())
        from planner import api

        plan = api.estimate(spec, cluster, training, layout, recompute=recompute)
        if as_json:
            _print_json(as_document(spec, cluster, [plan]))
        else:
            from planner.render import console_for, show_plan

            show_plan(console_for(), plan, verbose)
        if not plan.fits:
            raise typer.Exit(1)


@app.command(
    epilog="Example: planner explain --model llama-65b --gpus 64x80G -tp 8 -pp 2 --stage 0 --moment backward"
)
def explain(
    model: Model,
    gpus: Gpus,
    tensor_parallel: TP = 1,
    pipeline_parallel: PP = 1,
    data_parallel: DP = None,
    micro_batch_size: Micro = 1,
    chunks: Chunks = 1,
    sharding: Sharding = "zero1",
    data_shards: Shards = None,
    reshard_after_forward: Reshard = True,
    schedule: Schedule = None,
    sequence_parallel: SequenceParallel = None,
    recompute: Recompute = "none",
    stage: Annotated[
        int | None,
        typer.Option("--stage", help="Which stage; the fullest by default.", rich_help_panel="Output"),
    ] = None,
    moment: Annotated[
        str | None,
        typer.Option(
            "--moment",
            help="forward end, loss, backward, gradients complete or optimizer step; the peak by default.",
            rich_help_panel="Output",
        ),
    ] = None,
    seq_length: Seq = None,
    global_batch_size: Batch = None,
    memory_budget: Budget = None,
    headroom: Headroom = None,
    framework: Framework = "megatron",
    precision: Precision = None,
    optimizer: Optimizer = "adamw",
    attention: Attention = None,
    swiglu: Swiglu = None,
    dropout: Dropout = None,
    gradient_dtype: GradientType = None,
    optimizer_dtype: OptimizerType = None,
    master_weights: Master = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Where every byte of a stage comes from: each term, each strategy's share, the sum."""
    with reported(as_json):
        spec, cluster, training, layout = _one_layout(locals())
        from planner import api

        plan, index, when, items = api.explain(
            spec, cluster, training, layout, recompute=recompute, stage=stage, moment=moment
        )
        if as_json:
            from dataclasses import asdict

            document = {
                "schema": "planner.explain/1",
                "plan": plan.model_dump(mode="json"),
                "stage": index,
                "moment": when,
                "entries": [asdict(entry) for entry in items],
            }
            return _print_json(document)
        from planner.render import console_for, show_entries

        show_entries(console_for(), plan, index, when, items, unfold=verbose)


LAYOUT_OPTIONS = (
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "micro_batch_size",
    "chunks",
    "sharding",
    "data_shards",
    "reshard_after_forward",
    "schedule",
    "sequence_parallel",
)
TRAINING_OPTIONS = (
    "seq_length",
    "global_batch_size",
    "tokens",
    "framework",
    "precision",
    "optimizer",
    "attention",
    "swiglu",
    "dropout",
    "gradient_dtype",
    "optimizer_dtype",
    "master_weights",
)


def _one_layout(given: dict[str, Any]) -> tuple[ModelSpec, ClusterSpec, TrainingSpec, Any]:
    """Model, cluster, training and layout of a command that plans one given layout."""
    spec = read_model(given["model"])
    cluster = read_cluster(given["gpus"], given["memory_budget"], given["headroom"])
    training = read_training(**{name: given.get(name) for name in TRAINING_OPTIONS})
    layout, _ = given_layout(cluster, training, spec, **{name: given[name] for name in LAYOUT_OPTIONS})
    return spec, cluster, training, layout


@app.command(epilog="Example: planner compare --model llama-2-7b --gpus 8x80G")
def compare(
    model: Model,
    gpus: Gpus,
    micro_batch_size: Micro = 1,
    recompute: Recompute = "auto",
    seq_length: Seq = None,
    global_batch_size: Batch = None,
    memory_budget: Budget = None,
    headroom: Headroom = None,
    framework: Framework = "megatron",
    precision: Precision = None,
    optimizer: Optimizer = "adamw",
    attention: Attention = None,
    swiglu: Swiglu = None,
    as_json: Json = False,
) -> None:
    """DDP, ZeRO-1/2/3, FSDP, TP and PP side by side for one model on the same GPUs."""
    with reported(as_json):
        given = locals()
        from planner import api
        from planner.errors import InputError

        if not 1 <= micro_batch_size <= 10**6:
            raise InputError(f"--micro-batch-size {micro_batch_size}: use a whole number, 1 or more")
        training = read_training(**{name: given.get(name) for name in TRAINING_OPTIONS})
        spec, cluster = read_model(model), read_cluster(gpus, memory_budget, headroom)
        rows = api.compare(spec, cluster, training, micro_batch_size=micro_batch_size, recompute=recompute)
        if as_json:
            plans = [
                {
                    "strategy": name,
                    **({"reason": plan} if isinstance(plan, str) else {"plan": plan.model_dump(mode="json")}),
                }
                for name, plan in rows
            ]
            return _print_json({"schema": "planner.compare/1", "rows": plans})
        from planner.render import console_for, show_compare

        show_compare(console_for(), rows)


@app.command(epilog="Example: planner catalog models")
def catalog(
    what: Annotated[str, typer.Argument(help="models or gpus")],
    name: Annotated[str | None, typer.Argument(help="One entry, with its sources.")] = None,
    as_json: Json = False,
) -> None:
    """The models and GPUs that are known by name, and their sources."""
    with reported(as_json):
        from planner.catalog import load_gpu, load_model, names
        from planner.errors import InputError

        if what not in ("models", "gpus"):
            raise InputError(f"catalog {what[:40]!r}: ask for models or gpus")
        load: Any = load_model if what == "models" else load_gpu
        entries = [load(stem) for stem in ([name] if name else names(what))]
        if as_json or name:
            dumped = [entry.model_dump(mode="json") for entry in entries]
            for entry, values in zip(entries, dumped, strict=True):
                if what == "models":
                    values["num_parameters"] = entry.num_parameters
            return _print_json({"schema": "planner.catalog/1", what: dumped})
        from planner.render import console_for, show_gpus, show_models

        show: Any = show_models if what == "models" else show_gpus
        show(console_for(), entries)
