"""The command line's options, a line each, shared by its commands."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer


def option(*flags: str, help: str, **more: Any) -> Any:
    """An option with its flags and its help."""
    return typer.Option(*flags, help=help, **more)


SP = "--sequence-parallel/--no-sequence-parallel"
OUTPUT = ("job", "save_job", "as_json", "help", "quiet", "verbose", "trace")
"""Parameters that say where from and where to, not what."""


def _use_job(context: typer.Context, value: str | None) -> str | None:
    """Makes the options of a job file the command's defaults."""
    if value:
        from pathlib import Path

        from planner.errors import InputError
        from planner.jobs import read_job

        named = [one for one in context.command.params if one.name not in OUTPUT]
        known = {str(one.name): bool(getattr(one, "multiple", False)) for one in named}
        try:
            context.default_map = read_job(Path(value), known)
        except InputError as error:
            raise typer.BadParameter(str(error)) from None
    return value


# The job.
Model = Annotated[
    str,
    option("--model", "-m", help="A catalog name, a config.json, its folder, or layers=32,hidden=4096,..."),
]
Gpus = Annotated[
    str,
    option(
        "--gpus",
        "-g",
        help="64x80G, 64xH100, 8x8xH100 (nodes x GPUs per node x kind), or from-slurm, from-k8s, from-ray.",
    ),
]
PoolName = Annotated[
    str | None, option("--pool", help="Of from-slurm and others: a pool, its kind of GPU or a partition.")
]
Fits = Annotated[
    str | None, option("--fits", help="Of those, GPUs that are there: total, healthy (the default) or now.")
]
GpuType = Annotated[
    list[str] | None, option("--gpu-type", help="What GPUs there are, as in a100=a100-80gb; repeatable.")
]
Seq = Annotated[int | None, option("--seq-length", "-s", help="Tokens per sequence.")]
Batch = Annotated[int | None, option("--global-batch-size", "-b", help="Sequences per step.")]
Tokens = Annotated[str | None, option("--tokens", help="Tokens of the whole training, as in 1.4T.")]
Budget = Annotated[str | None, option("--memory-budget", help="Bytes per GPU to plan for, as in 72GiB.")]
Headroom = Annotated[str | None, option("--headroom", help="Fraction of each GPU to leave free, as in 10%.")]
Leaf = Annotated[int | None, option("--nodes-per-leaf", help="Nodes that share leaf switches.")]
Oversubscription = Annotated[
    float | None, option("--oversubscription", help="Of leaf switches: bandwidth down to nodes over that up.")
]
HostMemory = Annotated[
    str | None, option("--host-memory", help="Of a node, for what is offloaded, as in 1TiB.")
]
HostBandwidth = Annotated[str | None, option("--host-bandwidth", help="Of its memory, a second: 400GB.")]
Nvme = Annotated[str | None, option("--nvme", help="Of a node, for what is offloaded there, as in 10TB.")]
NvmeBandwidth = Annotated[str | None, option("--nvme-bandwidth", help="Of a node's NVMe, a second: 20GB.")]

JobFile = Annotated[
    str | None,
    typer.Option(
        "--job", help="Options from a YAML file; those given here win.", is_eager=True, callback=_use_job
    ),
]
SaveJob = Annotated[str | None, option("--save-job", help="Write the options given to this YAML file.")]

# What a whole training takes.
Price = Annotated[str | None, option("--price", help="Of a GPU-hour, as in 2.5 or 2.5USD.")]
GpuMtbf = Annotated[
    str | None, option("--gpu-mtbf", help="Mean time between failures, per GPU, as in 50000h.")
]
JobMtbf = Annotated[
    str | None, option("--job-mtbf", help="The same of the whole job, in place of it, as in 8h.")
]
CheckpointBandwidth = Annotated[
    str | None, option("--checkpoint-bandwidth", help="Of all GPUs writing a checkpoint, a second: 50GB.")
]
RestartTime = Annotated[
    str | None, option("--restart-time", help="From a failure until training goes on, as in 10min.")
]
Pue = Annotated[
    float | None, option("--pue", help="Power of the data centre over that of its machines, as in 1.1.")
]

# The stack.
Framework = Annotated[str, option("--framework", help="megatron, torchtitan, fsdp, deepspeed or hf.")]
Choice = Annotated[
    list[str] | None,
    option("--option", "-o", help="A kernel or buffer of the framework, as in loss=fused; repeatable."),
]
Profile = Annotated[
    str | None, option("--profile", help="Measured overheads: a file that planner calibrate wrote.")
]
Precision = Annotated[
    str | None, option("--precision", help="bf16, fp16, fp32, tf32, pure-bf16 ...: docs/precision.md.")
]
Optimizer = Annotated[
    str, option("--optimizer", help="adamw, muon, adamw8bit, lion ...: docs/optimizers.md.")
]
Attention = Annotated[str | None, option("--attention", help="flash, sdpa or eager.")]
Swiglu = Annotated[str | None, option("--swiglu", help="fused, unfused or recomputed.")]
Dropout = Annotated[float | None, option("--dropout", help="Dropout, if not the model's own.")]
Imbalance = Annotated[
    float | None, option("--expert-imbalance", help="Tokens of the fullest GPU's experts over the average.")
]
Capacity = Annotated[
    float | None, option("--expert-capacity-factor", help="Experts padded to so many times the average.")
]
GradientType = Annotated[str | None, option("--gradient-dtype", help="fp32, bf16 or fp16.")]
OptimizerType = Annotated[str | None, option("--optimizer-dtype", help="fp32, bf16, or fp8 (megatron).")]
Master = Annotated[
    bool | None, option("--master-weights/--no-master-weights", help="An fp32 copy of the weights.")
]
Lora = Annotated[
    str | None, option("--lora", help="Adapters: 16, or rank=16,targets=q+v,dropout=0.05,dtype=fp32,double.")
]
Quantize = Annotated[str | None, option("--quantize", help="nf4: the frozen matrices in 4 bits (QLoRA).")]
Freeze = Annotated[
    str | None,
    option("--freeze", help="embeddings, or blocks=8: they and the first 8 blocks are not trained."),
]

# One layout.
TP = Annotated[int, option("--tensor-parallel", "-tp", help="Tensor-parallel degree.")]
PP = Annotated[int, option("--pipeline-parallel", "-pp", help="Pipeline stages.")]
CP = Annotated[int, option("--context-parallel", "-cp", help="GPUs that share a sequence.")]
CPComm = Annotated[
    str | None,
    option("--context-comm", help="How they exchange keys, values: ring, all-gather, ulysses, ulysses+ring."),
]
Ulysses = Annotated[
    int, option("--ulysses-degree", help="Of ulysses+ring: neighbours that hand out heads to each other.")
]
EP = Annotated[int, option("--expert-parallel", "-ep", help="GPUs that share a mixture's experts.")]
ETP = Annotated[
    int, option("--expert-tensor-parallel", "-etp", help="GPUs that share the width of an expert.")
]
DP = Annotated[
    int | None, option("--data-parallel", "-dp", help="Replicas; the rest of the GPUs by default.")
]
Micro = Annotated[int, option("--micro-batch-size", "-mb", help="Sequences per forward pass.")]
Chunks = Annotated[int, option("--chunks", help="Model chunks per stage (interleaving).")]
Sharding = Annotated[str | None, option("--sharding", help="ddp, zero1, zero2, zero3 or fsdp.")]
Shards = Annotated[int | None, option("--data-shards", help="FSDP's group, if hybrid (HSDP).")]
Reshard = Annotated[
    bool,
    option("--reshard-after-forward/--keep-gathered", help="FSDP frees gathered units after the forward."),
]
Schedule = Annotated[
    str | None,
    option("--schedule", help="1f1b, interleaved, gpipe, pipedream, zb-h1, zb-h2, zb-v or dualpipe."),
]
SequenceParallel = Annotated[bool | None, option(SP, help="Cut the residual stream too; on with TP.")]
RankOrder = Annotated[str, option("--rank-order", help="Axes, innermost first, as in tp-dp-pp.")]
Offload = Annotated[
    str | None,
    option("--offload", help="optimizer, parameters, activations, as in optimizer:nvme,parameters."),
]
Recompute = Annotated[str, option("--recompute", help="none, selective, full, or auto: as memory forces.")]
Layers = Annotated[
    str | None, option("--layers-per-stage", help="As in 20,20,20,20; as even as they go by default.")
]

# The layouts to search.
OnlyTP = Annotated[str | None, option("--tensor-parallel", "-tp", help="Only these degrees, as in 4,8.")]
OnlyPP = Annotated[str | None, option("--pipeline-parallel", "-pp", help="Only these degrees.")]
OnlyDP = Annotated[str | None, option("--data-parallel", "-dp", help="Only these degrees.")]
OnlyCP = Annotated[str | None, option("--context-parallel", "-cp", help="Only these degrees.")]
OnlyCPComm = Annotated[
    str | None,
    option(
        "--context-comm", help="Only these: ring, all-gather, ulysses, ulysses+ring; its default's alone."
    ),
]
OnlyUlysses = Annotated[str | None, option("--ulysses-degree", help="Of ulysses+ring only these degrees.")]
OnlyEP = Annotated[str | None, option("--expert-parallel", "-ep", help="Only these degrees.")]
OnlyETP = Annotated[str | None, option("--expert-tensor-parallel", "-etp", help="Only these degrees.")]
OnlyMicro = Annotated[str | None, option("--micro-batch-size", "-mb", help="Only these sizes.")]
OnlyChunks = Annotated[str | None, option("--chunks", help="Only these numbers of model chunks.")]
OnlySharding = Annotated[str | None, option("--sharding", help="Only these, if the framework has them.")]
OnlySchedule = Annotated[
    str | None,
    option(
        "--schedule",
        help="Only these, as in 1f1b,zb-v: interleaved, gpipe, pipedream, zb-h1, zb-h2, dualpipe.",
    ),
]
OnlyRankOrder = Annotated[
    str | None, option("--rank-order", help="Only these, innermost axis first, as in tp-dp-pp,tp-pp-dp.")
]
OnlyRecompute = Annotated[str | None, option("--recompute", help="Only these: none, selective, full.")]
MayOffload = Annotated[
    str | None,
    option("--offload", help="What may be offloaded: optimizer,parameters,activations; :nvme behind it."),
]
WithSP = Annotated[bool, option(SP, help="Sequence parallelism wherever there is TP.")]
AcrossNodes = Annotated[bool, option("--across-nodes", help="Tensor-parallel groups may leave their node.")]
Launchable = Annotated[
    bool, option("--launchable", help="Only what the framework can be told as it is (docs/export.md).")
]
Objective = Annotated[str, option("--objective", help="time or headroom.")]
Top = Annotated[int, option("--top", "-n", help="Layouts to show.")]
TimeLimit = Annotated[float, option("--time-limit", help="Seconds to search at most.")]

# The output.
Json = Annotated[bool, option("--json", help="JSON on standard output, and nothing else there.")]
Trace = Annotated[
    str | None, option("--trace", help="Write the step's timeline here, for Perfetto or chrome://tracing.")
]
Verbose = Annotated[bool, option("--verbose", "-v", help="Sources and refusals too.")]
Quiet = Annotated[bool, option("--quiet", "-q", help="The answer and the ranking only.")]
Stage = Annotated[int | None, option("--stage", help="Which stage; the fullest by default.")]
Moment = Annotated[
    str | None, option("--moment", help="As estimate lists them, or host, nvme; the peak by default.")
]

Term = Annotated[
    str | None, option("--term", help="Take apart the terms with this in their name: formula and source.")
]

PlanFile = Annotated[str | None, typer.Argument(help="What planner search or estimate --json wrote.")]

# The catalog.
What = Annotated[str, typer.Argument(help="models or gpus")]
Entry = Annotated[str | None, typer.Argument(help="One entry, with its sources.")]

Options = dict[str, tuple[Any, ...]]
"""Options of a command by name, each with its default; one without must be given."""
JOB: Options = {
    "job": (JobFile, None),
    "model": (Model,),
    "gpus": (Gpus,),
}
"""What is trained, and on what."""
INVENTORY: Options = {"pool": (PoolName, None), "fits": (Fits, None), "gpu_type": (GpuType, None)}
"""Which GPUs of a scheduler's inventory."""
TRAINING: Options = {
    "seq_length": (Seq, None),
    "global_batch_size": (Batch, None),
    "tokens": (Tokens, None),
    "memory_budget": (Budget, None),
    "headroom": (Headroom, None),
    "nodes_per_leaf": (Leaf, None),
    "oversubscription": (Oversubscription, None),
    "host_memory": (HostMemory, None),
    "host_bandwidth": (HostBandwidth, None),
    "nvme": (Nvme, None),
    "nvme_bandwidth": (NvmeBandwidth, None),
    "framework": (Framework, "megatron"),
    "precision": (Precision, None),
    "optimizer": (Optimizer, "adamw"),
    "attention": (Attention, None),
    "swiglu": (Swiglu, None),
    "option": (Choice, None),
    "profile": (Profile, None),
    "dropout": (Dropout, None),
    "expert_imbalance": (Imbalance, None),
    "expert_capacity_factor": (Capacity, None),
    "gradient_dtype": (GradientType, None),
    "optimizer_dtype": (OptimizerType, None),
    "master_weights": (Master, None),
    "lora": (Lora, None),
    "quantize": (Quantize, None),
    "freeze": (Freeze, None),
}
"""How it is trained, and what of the GPUs it may use."""
COST: Options = {
    "price": (Price, None),
    "gpu_mtbf": (GpuMtbf, None),
    "job_mtbf": (JobMtbf, None),
    "checkpoint_bandwidth": (CheckpointBandwidth, None),
    "restart_time": (RestartTime, None),
    "pue": (Pue, None),
}
"""What a whole training takes, of the cluster."""
LAYOUT: Options = {
    "tensor_parallel": (TP, 1),
    "pipeline_parallel": (PP, 1),
    "data_parallel": (DP, None),
    "context_parallel": (CP, 1),
    "context_comm": (CPComm, None),
    "ulysses_degree": (Ulysses, 1),
    "expert_parallel": (EP, 1),
    "expert_tensor_parallel": (ETP, 1),
    "micro_batch_size": (Micro, 1),
    "chunks": (Chunks, 1),
    "sharding": (Sharding, None),
    "data_shards": (Shards, None),
    "reshard_after_forward": (Reshard, True),
    "schedule": (Schedule, None),
    "sequence_parallel": (SequenceParallel, None),
    "rank_order": (RankOrder, "tp-dp-pp"),
    "recompute": (Recompute, "none"),
    "offload": (Offload, None),
    "layers_per_stage": (Layers, None),
}
"""One layout."""
CHOICES: Options = {
    "tensor_parallel": (OnlyTP, None),
    "pipeline_parallel": (OnlyPP, None),
    "data_parallel": (OnlyDP, None),
    "context_parallel": (OnlyCP, None),
    "context_comm": (OnlyCPComm, None),
    "ulysses_degree": (OnlyUlysses, None),
    "expert_parallel": (OnlyEP, None),
    "expert_tensor_parallel": (OnlyETP, None),
    "micro_batch_size": (OnlyMicro, None),
    "chunks": (OnlyChunks, None),
    "sharding": (OnlySharding, None),
    "schedule": (OnlySchedule, None),
    "recompute": (OnlyRecompute, None),
    "offload": (MayOffload, None),
    "rank_order": (OnlyRankOrder, None),
    "sequence_parallel": (WithSP, True),
    "across_nodes": (AcrossNodes, False),
    "launchable": (Launchable, False),
}
"""What a search may choose from."""


def takes(*groups: Options) -> Callable[[Callable[[dict[str, Any]], None]], Callable[..., None]]:
    """Gives a command the options of some groups: it is called with their values by name.

    Under ``asked`` are those that were given, in a job file or on the command line, and under ``command``
    the command that gives them.
    """

    def decorate(command: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        @wraps(command)
        def run(context: typer.Context, **given: Any) -> None:
            command(given | _asked(context))

        options = {name: option for group in groups for name, option in group.items()}
        parameters = [
            Parameter(
                name, Parameter.KEYWORD_ONLY, default=next(iter(default), Parameter.empty), annotation=kind
            )
            for name, (kind, *default) in options.items()
        ]
        own = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        run.__signature__ = Signature([own, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {"context": typer.Context} | {
            name: kind for name, (kind, *_) in options.items()
        }
        return run

    return decorate


def _asked(context: typer.Context) -> dict[str, Any]:
    """What was given, and the command that gives it."""
    flags: dict[str, tuple[str, str]] = {}
    asked: dict[str, Any] = {}
    for one in context.command.params:
        name, source = str(one.name), context.get_parameter_source(str(one.name))
        if name in OUTPUT or source is None or source.name == "DEFAULT":
            continue
        asked[name] = context.params[name]
        long = [flag for flag in one.opts if flag.startswith("--")]
        flags[name] = (*long, "")[0], next(iter(one.secondary_opts), "")
    return {"asked": asked, "command": lambda: _command_line(str(context.info_name), asked, flags)}


def _command_line(command: str, asked: dict[str, Any], flags: dict[str, tuple[str, str]]) -> str:
    from planner.jobs import command_line

    return command_line(command, asked, flags)


def _version(wanted: bool) -> None:
    if wanted:
        from planner import __version__

        typer.echo(f"planner {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="The planner's version.", callback=_version, is_eager=True)
]
