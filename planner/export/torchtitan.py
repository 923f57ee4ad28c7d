"""Plans for torchtitan: TOML for the releases until 0.2.2, a Python recipe for 0.3.

Both have the same settings, of the same names; what a version cannot be told is refused. Facts are of
torchtitan 0.2.2 and 0.3.0 as released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from planner.export.base import Export, NotExpressible, Subject, setting_of
from planner.export.torchtitan_flavors import Flavor, flavor_of, pipelined
from planner.export.torchtitan_words import (
    CONTEXT,
    FIXED,
    MX,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    SINGLE,
    TF32,
    Precision,
    concerns,
    module_names,
    own_split,
    per_stage,
    virtual_stage,
)
from planner.files import plain
from planner.order import layer_at

VERSIONS = ("0.3", "0.2")
FRAMEWORKS = ("torchtitan",)
SETTINGS: Mapping[str, str] = {
    "hf_assets_path": "folder of the tokenizer, ./assets/hf by default",
    "dataset": "name of a data set that torchtitan knows, c4 by default",
    "dataset_path": "where it lies",
    "dump_folder": "where checkpoints and logs go, ./outputs by default",
    "steps": "steps to train; those of --tokens, or 1000",
    "lr": "learning rate, torchtitan's 8e-4 by default",
}
MODULE, FUNCTION = "planner_recipes", "planned"
CHUNKS = 8
"""Pieces of the sequence that 0.3's chunked loss takes (components/loss.py)."""


def export(subject: Subject, version: str, settings: Mapping[str, str]) -> Export:
    """The plan as ``plan.toml``, or as ``planner_recipes.py`` with a function ``planned``.

    Raises NotExpressible for what the version cannot be told, InputError for a setting that cannot be.
    """
    check(subject, version)
    flavor = _flavor(subject.model, subject, version)
    told = _told(subject, flavor, version, settings)
    env = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    if subject.job.training.precision == "tf32":
        env[TF32] = "1"
    if version == "0.2":
        files = {"plan.toml": _toml(subject, told)}
        program = ("-m", "torchtitan.train", "--job.config_file", "plan.toml")
    else:
        files = {f"{MODULE}.py": _recipe(subject, flavor, told)}
        program = ("-m", "torchtitan.train", "--module", MODULE, "--config", FUNCTION)
        env["PYTHONPATH"] = "."
    notes = tuple(_notes(subject, version, settings, told))
    return Export("torchtitan", version, files, env, program, notes=notes)


# What a version cannot be told ------------------------------------------------------------------


def check(subject: Subject, version: str) -> None:
    """Raises NotExpressible for the first thing of a plan that torchtitan cannot be told."""
    for problem, instead in _problems(subject, version):
        raise NotExpressible(f"torchtitan {version}: {problem}", instead)


def _problems(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from _of_options(subject, version)
    yield from _of_training(subject, version)
    yield from _of_sharding(subject, version)
    yield from _of_axes(subject, version)
    yield from _of_pipeline(subject, version)


def _of_options(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Options that a version decides for itself, all of them in one refusal."""
    options, wrong = subject.options(), dict[str, str]()
    for name, able in FIXED[version].items():
        value = options.get(name)
        if value is not None and value not in able and concerns(name, subject.model):
            wrong[name] = able[0]
    if wrong:
        has = ", ".join(f"{name}={value}" for name, value in wrong.items())
        planned = ", ".join(f"{name}={options[name]}" for name in wrong)
        yield f"it runs {has}, not the plan's {planned}", {"option": wrong}
    if options.get("async_tp") == "on" and options.get("compile") != "on":
        yield "async_tp=on is of compiled blocks: use compile=on", {"option": {"compile": "on"}}


def _of_training(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    training, recipe, layout = subject.job.training, subject.job.recipe, subject.layout
    precision = str(training.precision)
    if precision not in PRECISIONS:
        yield f"precision {precision}: it has {', '.join(PRECISIONS)}", {"precision": "bf16"}
    if version == "0.3" and precision == "fp8-tensorwise":
        yield "float8 is scaled by rows alone: use precision fp8-rowwise", {"precision": "fp8-rowwise"}
    compiled = subject.options().get("compile") == "on"
    if version == "0.2" and precision == "mxfp8" and compiled and layout.tensor_parallel > 1:
        yield "mxfp8 with tensor parallelism is not compiled: use compile=off", {"option": {"compile": "off"}}
    usual = subject.job.stack.recipes.get(precision)
    if usual and recipe != usual:
        changed = {
            name for name in ("weight", "gradient", "master", "moment") if _differ(recipe, usual, name)
        }
        if changed - {"moment"} or not _half_moments(subject, version):
            what = "gradient_dtype, optimizer_dtype and master_weights are the precision's own"
            yield f"{what}, but for bf16 moments of 0.3's fused AdamW: leave them out", {}
    if training.optimizer not in OPTIMIZERS:
        yield f"optimizer {training.optimizer}: it has {' and '.join(OPTIMIZERS)}", {"optimizer": "adamw"}
    if subject.options().get("reduce_dtype", "fp32") != "fp32":
        yield "gradients are reduced in fp32: use reduce_dtype=fp32", {"option": {"reduce_dtype": "fp32"}}
    if training.dropout:
        yield f"dropout {training.dropout:g}: its models have none: use dropout 0", {"dropout": 0}
    if training.adapters or training.frozen.model_dump(exclude_defaults=True):
        yield "adapters and frozen weights are not told yet: train all weights", {}
    if training.expert_capacity_factor:
        yield "expert_capacity_factor: it drops no tokens and pads none: leave it out", {}


def _differ(one: Any, other: Any, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))


def _half_moments(subject: Subject, version: str) -> bool:
    """Are the moments in bf16, where 0.3 has ``fused_opt_states_bf16``?"""
    fused = subject.options().get("optimizer_step") == "fused" and not subject.layout.offload
    return version == "0.3" and fused and subject.job.training.optimizer_dtype == "bf16"


def _of_sharding(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    layout, options = subject.layout, subject.options()
    shards = layout.data_shards * layout.context_parallel
    if layout.sharding not in ("fsdp", "ddp") or (layout.sharding == "ddp" and layout.data_ranks > 1):
        yield f"sharding {layout.sharding}: it shards with FSDP2 alone", {"sharding": "fsdp"}
    if version == "0.3":
        if layout.sharding != "fsdp":
            yield "it wraps everything with FSDP2: use sharding fsdp", {"sharding": "fsdp"}
        return
    autocast = options.get("mixed_precision") == "autocast"
    if shards > 1:
        if autocast:
            fix = {"option": {"mixed_precision": "fsdp"}}
            yield "FSDP has its own mixed precision: use mixed_precision=fsdp", fix
        return
    if layout.data_parallel > 1:
        data = layout.data_parallel
        yield (
            f"data_shards 1 of {data} replicas is DDP, which is not planned: share them",
            {"data_shards": data},
        )
    if layout.sharding == "fsdp" and layout.world_size > 1:
        yield "one shard is not wrapped with FSDP2: use sharding ddp", {"sharding": "ddp"}
    mixed = PRECISIONS[str(subject.job.training.precision)].param != "float32"
    whole = subject.job.training.precision == "pure-bf16"
    if mixed and not whole and (layout.world_size > 1 or not autocast):
        if layout.world_size == 1:
            fix = {"option": {"mixed_precision": "autocast"}}
            yield "a GPU alone runs under autocast: use mixed_precision=autocast", fix
        why = "without FSDP or context parallelism, tensor and pipeline parallelism run in fp32"
        yield f"{why}: use precision fp32, or data_shards 2 or more", {"precision": "fp32"}
    if layout.expert_parallel > 1:
        yield "expert parallelism needs data_shards or context_parallel beyond 1", {}


def _of_axes(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    layout, job = subject.layout, subject.job
    if layout.rank_order != "tp-dp-pp":
        yield f"rank order {layout.rank_order}: it has tp-dp-pp alone", {"rank_order": "tp-dp-pp"}
    tensor, context = layout.tensor_parallel, layout.context_parallel
    if tensor > 1 and not layout.sequence_parallel and version == "0.2":
        yield "tensor parallelism comes with sequence parallelism", {"sequence_parallel": True}
    if context > 1 and layout.context_comm not in CONTEXT:
        known = ", ".join(CONTEXT)
        yield f"context_comm {layout.context_comm}: it has {known}", {"context_comm": "all-gather"}
    if version == "0.3" and context > 1 and layout.context_comm != "all-gather":
        yield "keys and values are gathered: use context_comm all-gather", {"context_comm": "all-gather"}
    own = layout.expert_tensor_parallel
    if own not in (1, layout.tensor_parallel) or (own > 1 and version == "0.3"):
        able = "1" if version == "0.3" else "1 or tensor_parallel"
        yield f"expert_tensor_parallel {own}: use {able}", {"expert_tensor_parallel": 1}
    if layout.offload not in ("", "optimizer,parameters"):
        yield (
            f"offload {layout.offload}: it offloads optimizer,parameters together",
            {"offload": "optimizer,parameters"},
        )
    unit = _sequence_unit(subject, version)
    if job.seq_length % unit:
        fits = max(1, job.seq_length // unit) * unit
        yield f"sequence length {job.seq_length} is no multiple of {unit}: use {fits}", {"seq_length": fits}


def _sequence_unit(subject: Subject, version: str) -> int:
    """Tokens that a sequence has a multiple of.

    0.2.2, parallel_dims.py, ``seq_len_divisor``; 0.3.0, trainer.py, and loss.py where it takes chunks.
    """
    layout = subject.layout
    tensor, context = layout.tensor_parallel, layout.context_parallel
    if version == "0.2":
        return int(tensor * context * 2)
    unit = (tensor if layout.sequence_parallel else 1) * (2 * context if context > 1 else 1)
    if subject.options().get("loss") == "chunked":
        from math import lcm

        return lcm(int(unit), int(context * CHUNKS))
    return int(unit)


def _of_pipeline(subject: Subject, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    layout = subject.layout
    recompute = recomputed(subject)
    if recompute is None or (recompute[1] and version == "0.3"):
        has = ", ".join(
            " and ".join(f"{sum(own)} {way}" for way, own in stage.rows.items() if sum(own))
            for stage in subject.plan.stages
        )
        told = "every k-th layer of each stage, or all of them" if version == "0.2" else "all layers or none"
        ways = {way.partition("+")[0] for stage in subject.plan.stages for way in stage.rows} - {"none"}
        near = "full" if "full" in ways or not ways else next(iter(ways))
        yield plain(f"it recomputes {told}; the plan's stages have {has}", 400), {"recompute": near}
    if layout.pipeline_parallel == 1:
        return
    if layout.schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        yield f"schedule {layout.schedule}: of those planned it runs {known}", {"schedule": "1f1b"}
    if subject.model.tie_word_embeddings:
        yield "tied embeddings are not split over stages: use pipeline_parallel 1", {"pipeline_parallel": 1}
    if _empty(subject):
        yield "a stage would have no layers: use fewer stages", {"pipeline_parallel": 1}


def _empty(subject: Subject) -> bool:
    return subject.layout.schedule in SCHEDULES and not all(stage_layers(subject))


def _flavor(model: Any, subject: Subject, version: str) -> Flavor:
    """The flavor that the plan's model is. Raises NotExpressible with the nearest one."""
    found, nearest, differs = flavor_of(model, version)
    if found is None:
        name = f"{nearest.model} {nearest.name}"
        what = ", ".join(f"{field} {own} there, {other} here" for field, (own, other) in differs.items())
        raise NotExpressible(
            f"torchtitan {version} has no flavor of {plain(model.name)}: the nearest, {name}, has "
            f"{plain(what, 400)}; others are registered in Python"
        )
    if subject.layout.pipeline_parallel > 1 and not pipelined(found.model, version):
        raise NotExpressible(
            f"torchtitan {version} has no pipeline for {found.model}: use pipeline_parallel 1",
            {"pipeline_parallel": 1},
        )
    return found


# What it is told ----------------------------------------------------------------------------------


def stage_layers(subject: Subject) -> list[list[int]]:
    """The layers of every virtual stage, in torchtitan's order."""
    layout, depth = subject.layout, subject.model.num_hidden_layers
    chunks, pipeline = int(layout.chunks), int(layout.pipeline_parallel)
    parts: list[list[int]] = [[] for _ in range(chunks * pipeline)]
    start = 0
    for j, stage in enumerate(subject.plan.stages):
        count = sum(map(sum, stage.rows.values()))
        for chunk in range(chunks):
            rows = range(start, start + count)
            placed = sorted(layer_at(chunk, row, depth, chunks, layout.schedule) for row in rows)
            part = virtual_stage(j, chunk, pipeline, layout.schedule)
            parts[part] = [layer for layer in placed if 0 <= layer < depth]
        start += count
    return parts


def recomputed(subject: Subject) -> tuple[str, int] | None:
    """``none``, ``selective`` or ``full``, and of which layers: 0 for all, or every k-th of a stage's.

    None where no ``k`` gives the plan's numbers on all stages.
    """
    stages = [{way: sum(own) for way, own in stage.rows.items()} for stage in subject.plan.stages]
    ways = {way for own in stages for way, count in own.items() if count}
    if len(ways) == 1:
        return (found, 0) if (found := ways.pop()) in ("none", "selective", "full") else None
    if ways != {"none", "full"}:
        return None
    counts = [(own.get("full", 0), sum(own.values())) for own in stages]
    every = [k for k in range(2, max(whole for _, whole in counts) + 1) if _every(counts, k)]
    return ("full", every[0]) if every else None


def _every(counts: list[tuple[int, int]], k: int) -> bool:
    return all(full == whole // k for full, whole in counts)


def _told(
    subject: Subject, flavor: Flavor, version: str, settings: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Sections of settings, in 0.2's names; 0.3 has the same but for what its template places elsewhere."""
    job, layout, options = subject.job, subject.layout, subject.options()
    precision = PRECISIONS[str(job.training.precision)]
    piped = layout.pipeline_parallel > 1
    way = recomputed(subject)
    assert way is not None
    data: dict[str, Any] = {"dataset": setting_of(settings, "dataset", "c4")}
    if path := setting_of(settings, "dataset_path"):
        data["dataset_path"] = path
    told: dict[str, dict[str, Any]] = {
        "job": {
            "description": plain(f"planner: {subject.model.name}", 200),
            "dump_folder": setting_of(settings, "dump_folder", "./outputs"),
        },
        "model": {
            "name": flavor.model,
            "flavor": flavor.name,
            "hf_assets_path": setting_of(settings, "hf_assets_path", "./assets/hf"),
            "converters": [precision.converter] if precision.converter else [],
        },
        "optimizer": {
            "name": OPTIMIZERS[job.training.optimizer],
            "implementation": options.get("optimizer_step", "fused"),
        },
        "training": {
            **data,
            "local_batch_size": layout.micro_batch_size * (layout.grad_accum if piped else 1),
            "global_batch_size": job.global_batch_size,
            "seq_len": job.seq_length,
            "steps": _steps(subject, settings),
            "dtype": precision.dtype,
            "mixed_precision_param": precision.param,
            "mixed_precision_reduce": "float32",
            "enable_cpu_offload": bool(layout.offload),
        },
        "parallelism": _parallelism(subject, "output" if version == "0.2" else "lm_head"),
        "activation_checkpoint": _checkpointing(*way),
        "compile": _compile(options),
    }
    if lr := setting_of(settings, "lr"):
        told["optimizer"]["lr"] = _number(lr)
    if precision.converter:
        told["quantize"] = _quantized(precision)
    return told


def _parallelism(subject: Subject, head: str) -> dict[str, Any]:
    layout, options = subject.layout, subject.options()
    shards = layout.data_shards if layout.sharding == "fsdp" else 1
    told: dict[str, Any] = {
        "data_parallel_replicate_degree": layout.data_parallel // shards,
        "data_parallel_shard_degree": shards,
        "fsdp_reshard_after_forward": "always" if layout.reshard_after_forward else "never",
        "tensor_parallel_degree": layout.tensor_parallel,
        "enable_async_tensor_parallel": options.get("async_tp") == "on",
        "context_parallel_degree": layout.context_parallel,
        "context_parallel_rotate_method": CONTEXT.get(layout.context_comm, "allgather"),
        "expert_parallel_degree": layout.expert_parallel,
        "expert_tensor_parallel_degree": layout.expert_tensor_parallel,
        "pipeline_parallel_degree": layout.pipeline_parallel,
    }
    if layout.pipeline_parallel > 1:
        told |= {
            "pipeline_parallel_schedule": SCHEDULES[layout.schedule],
            "pipeline_parallel_microbatch_size": layout.micro_batch_size,
            **_split(stage_layers(subject), head),
        }
    return told


def _split(layers: list[list[int]], head: str) -> dict[str, Any]:
    """How layers are split: by numbers, where torchtitan's own way gives the plan's, else module by module."""
    counts, depth = [len(own) for own in layers], sum(map(len, layers))
    for first, last in ((1, 1), (0, 0), (1, 0), (0, 1), (2, 2), (2, 1), (1, 2)):
        each = per_stage(depth, len(counts), first, last)
        if each and own_split(depth, len(counts), first, last) == counts:
            return {
                "pipeline_parallel_layers_per_stage": each,
                "pipeline_parallel_first_stage_less_layers": first,
                "pipeline_parallel_last_stage_less_layers": last,
            }
    return {"module_fqns_per_model_part": module_names(layers, head)}


def _checkpointing(policy: str, every: int) -> dict[str, Any]:
    if policy == "none":
        return {"mode": "none"}
    if policy == "full" and not every:
        return {"mode": "full"}
    return {"mode": "selective", "selective_ac_option": str(every) if every else "op"}


def _compile(options: Mapping[str, str]) -> dict[str, Any]:
    parts = ["model"] * (options.get("compile") == "on") + ["loss"] * (options.get("loss") == "compiled")
    return {"enable": bool(parts), "components": parts or ["model", "loss"]}


def _quantized(precision: Precision) -> dict[str, Any]:
    name = precision.converter.rpartition(".")[2]
    return {"linear": {name: {"recipe_name": precision.recipe, "filter_fqns": ["output"]}}}


def _steps(subject: Subject, settings: Mapping[str, str]) -> int:
    tokens = subject.job.training.tokens
    usual = ceil(tokens / subject.job.tokens_per_step) if tokens else 1000
    text = setting_of(settings, "steps", str(usual))
    if not (text.isascii() and text.isdigit() and 0 < int(text[:12]) < 10**10):
        from planner.errors import InputError

        raise InputError(f"--set steps={plain(text)}: write a whole number, 1 or more")
    return int(text)


def _number(text: str) -> float:
    from planner.errors import InputError

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e3:
        raise InputError(f"--set lr={plain(text)}: write a number above 0, as in 3e-4")
    return value


# The files --------------------------------------------------------------------------------------


def _header(subject: Subject) -> str:
    world = subject.plan.num_gpus
    return subject.header(also=(f"torchtitan does not say on how many GPUs: start {world} processes",))


def _toml(subject: Subject, told: Mapping[str, Any]) -> str:
    import tomli_w

    return _header(subject) + "\n" + tomli_w.dumps(told)


def _recipe(subject: Subject, flavor: Flavor, told: Mapping[str, Any]) -> str:
    """A Python module; everything that somebody wrote is in it as a literal."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    precision = PRECISIONS[str(subject.job.training.precision)]
    parallelism = dict(told["parallelism"])
    for gone in ("expert_tensor_parallel_degree", "context_parallel_rotate_method"):
        parallelism.pop(gone)
    layout, options = subject.layout, subject.options()
    compiled = dict(told["compile"]) | {
        "enable_async_tensor_parallel": parallelism.pop("enable_async_tensor_parallel")
    }
    training = {k: v for k, v in told["training"].items() if not k.startswith("dataset")}
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["literal"] = ascii
    text = files("planner.export").joinpath("torchtitan_recipe.py.j2").read_text()
    half = _half_moments(subject, "0.3")
    return environment.from_string(text).render(
        header=_header(subject).rstrip("\n"),
        function=FUNCTION,
        flavor=flavor,
        model=told["model"],
        dump_folder=told["job"]["dump_folder"],
        loss=options.get("loss", "eager"),
        checkpointing={"none": "", "full": "FullAC", "selective": "SelectiveAC"}[
            told["activation_checkpoint"]["mode"]
        ],
        converter={"": "", MX: "MXFP8LinearConverter"}.get(precision.converter, "Float8LinearConverter"),
        blocks_compiled=options.get("compile") == "on",
        optimizer=told["optimizer"],
        implementation="fused_opt_states_bf16" if half else told["optimizer"]["implementation"],
        training=training | {"disable_cuda_graphs": True},
        parallelism=parallelism | {"enable_sequence_parallel": bool(layout.sequence_parallel)},
        compile=compiled,
        data={k: v for k, v in told["training"].items() if k.startswith("dataset")},
    )


def _notes(
    subject: Subject, version: str, settings: Mapping[str, str], told: Mapping[str, Any]
) -> Iterator[str]:
    layout = subject.layout
    if version == "0.2" and told["activation_checkpoint"].get("selective_ac_option", "op") != "op":
        every = told["activation_checkpoint"]["selective_ac_option"]
        yield f"torchtitan recomputes every {every}th layer of a stage, the plan the first ones: as many"
    if layout.reshard_after_forward and layout.data_ranks > 1:
        yield (
            "fsdp_reshard_after_forward is always: the head's unit is resharded too, which the plan keeps "
            "gathered through the loss"
        )
    if version == "0.3":
        yield "CUDA graphs are off: their pools are not planned, and 0.3.0 refuses them with a pipeline"
        yield f"{MODULE}.py must be importable: start it from its folder, or add that to PYTHONPATH"
    if subject.plan.training.expert_imbalance != 1:
        yield (
            f"expert_imbalance {subject.plan.training.expert_imbalance:g} is what the plan expects of the "
            "router: nothing enforces it"
        )
    if layout.pipeline_parallel > 1 and layout.grad_accum < layout.pipeline_parallel * _stages(subject):
        yield (
            f"{layout.grad_accum} micro-batches are fewer than the "
            f"{layout.pipeline_parallel * _stages(subject)} stages: torchtitan warns of the bubble"
        )
    left = [name for name in ("hf_assets_path", "dataset", "lr") if name not in settings]
    if left:
        yield f"left at their usual values: {', '.join(left)}; set them with --set NAME=VALUE"


def _stages(subject: Subject) -> int:
    single = SCHEDULES[subject.layout.schedule] in SINGLE
    return 1 if single else int(subject.layout.chunks)
