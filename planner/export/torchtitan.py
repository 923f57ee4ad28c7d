"""Plans for torchtitan: TOML for the releases until 0.2.2, a Python recipe for 0.3.

Both have the same settings, of the same names; what a version cannot be told is refused. Facts are of
torchtitan 0.2.2 and 0.3.0 as released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from planner.export.base import Export, NotExpressible, Subject, setting_of
from planner.export.rendering import rendered
from planner.export.torchtitan_flavors import SHAPE, Flavor, flavor_of, in_llamas_blocks, pipelined
from planner.export.torchtitan_limits import check, half_moments, recomputed, stage_layers
from planner.export.torchtitan_words import (
    CONTEXT,
    MX,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    SINGLE,
    TF32,
    Precision,
    module_names,
    own_split,
    per_stage,
)
from planner.files import plain

VERSIONS = ("0.3", "0.2")
FRAMEWORKS = ("torchtitan",)
SETTINGS: Mapping[str, str] = {
    "hf_assets_path": "folder of the tokenizer, ./assets/hf by default",
    "dataset": "name of a data set that torchtitan knows, c4 by default",
    "dataset_path": "where it lies",
    "dump_folder": "where checkpoints and logs go, ./outputs by default",
    "steps": "steps to train; those of --tokens, or 1000",
    "lr": "learning rate, torchtitan's 8e-4 by default",
    "rope_theta": "base of the rotary angles of a model that is no flavor, 500000 by default",
}
MODULE, FUNCTION, OWN = "planner_recipes", "planned", "planned"


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
        program: tuple[str, ...] = ("-m", "torchtitan.train", "--job.config_file", "plan.toml")
    else:
        files = {f"{MODULE}.py": _recipe(subject, flavor, told, settings)}
        program = ("-m", "torchtitan.train", "--module", MODULE, "--config", FUNCTION)
    notes = tuple(_notes(subject, version, settings, told))
    return Export("torchtitan", version, files, env, program, notes=notes)


def _flavor(model: Any, subject: Subject, version: str) -> Flavor:
    """The flavor that the plan's model is. Raises NotExpressible with the nearest one."""
    found, nearest, differs = flavor_of(model, version)
    if found is None and version == "0.3" and in_llamas_blocks(model):
        return Flavor("llama3", OWN, model, (version,))
    if found is None:
        name = f"{nearest.model} {nearest.name}"
        what = ", ".join(f"{field} {own} there, {other} here" for field, (own, other) in differs.items())
        raise NotExpressible(
            f"torchtitan {version} has no flavor of {plain(model.name)}: the nearest, {name}, has "
            f"{plain(what, 400)}; 0.3 takes other shapes of Llama's blocks"
        )
    if subject.layout.pipeline_parallel > 1 and not pipelined(found.model, version):
        raise NotExpressible(
            f"torchtitan {version} has no pipeline for {found.model}: use pipeline_parallel 1",
            {"pipeline_parallel": 1},
        )
    return found


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
        told["optimizer"]["lr"] = _number("lr", lr, 1e3)
    if precision.converter:
        told["quantize"] = _quantized(precision)
    return told


def _parallelism(subject: Subject, head: str) -> dict[str, Any]:
    layout, options = subject.layout, subject.options()
    shards = layout.data_shards if layout.sharding == "fsdp" else 1
    comm = layout.context_comm if layout.context_parallel > 1 else ""
    told: dict[str, Any] = {
        "data_parallel_replicate_degree": layout.data_parallel // shards,
        "data_parallel_shard_degree": shards,
        "fsdp_reshard_after_forward": "always" if layout.reshard_after_forward else "never",
        "tensor_parallel_degree": layout.tensor_parallel,
        "enable_async_tensor_parallel": options.get("async_tp") == "on",
        "context_parallel_degree": layout.context_parallel,
        "context_parallel_rotate_method": CONTEXT.get(comm, "allgather"),
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
    """How layers are split: by numbers, where torchtitan's own way gives the plan's, else by modules."""
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


def _shape(subject: Subject, settings: Mapping[str, str]) -> dict[str, Any]:
    """What a recipe builds Llama's blocks of."""
    model = subject.model
    theta = setting_of(settings, "rope_theta", "500000")
    return model.model_dump(include=set(SHAPE)) | {
        "tied": model.tie_word_embeddings,
        "positions": max(model.max_position_embeddings, subject.job.seq_length),
        "rope_theta": _number("rope_theta", theta, 1e12),
    }


def _number(name: str, text: str, most: float) -> float:
    from planner.errors import InputError

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < most:
        raise InputError(f"--set {name}={plain(text)}: write a number above 0, as in 3e-4")
    return value


# The files --------------------------------------------------------------------------------------


def _header(subject: Subject) -> str:
    world = subject.plan.num_gpus
    return subject.header(also=(f"torchtitan does not say on how many GPUs: start {world} processes",))


def _toml(subject: Subject, told: Mapping[str, Any]) -> str:
    import tomli_w

    return _header(subject) + "\n" + tomli_w.dumps(told)


def _recipe(subject: Subject, flavor: Flavor, told: Mapping[str, Any], settings: Mapping[str, str]) -> str:
    """A Python module; everything that somebody wrote is in it as a literal."""
    precision = PRECISIONS[str(subject.job.training.precision)]
    parallelism = dict(told["parallelism"])
    for gone in ("expert_tensor_parallel_degree", "context_parallel_rotate_method"):
        parallelism.pop(gone)
    layout, options = subject.layout, subject.options()
    compiled = dict(told["compile"]) | {
        "enable_async_tensor_parallel": parallelism.pop("enable_async_tensor_parallel")
    }
    training = {k: v for k, v in told["training"].items() if not k.startswith("dataset")}
    half = half_moments(subject, "0.3")
    return rendered(
        "torchtitan_recipe.py.jinja",
        trim=True,
        header=_header(subject).rstrip("\n"),
        function=FUNCTION,
        flavor=flavor,
        shape=_shape(subject, settings) if flavor.name == OWN else None,
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
        if layout.schedule == "zb-v":
            yield (
                "with torch 2.13, losses of zb-v and weights put away after the forward were not those "
                "of one process: see that yours fall, or plan with --keep-gathered"
            )
    if told["model"]["flavor"] == OWN:
        theta = setting_of(settings, "rope_theta", "500000")
        yield f"the model is built in the recipe, rotary angles of base {theta}: --set rope_theta=NUMBER"
    if version == "0.3":
        yield "CUDA graphs are off: their pools are not planned, and 0.3.0 refuses them with a pipeline"
        yield f"{MODULE}.py is imported from where the job starts, or from PYTHONPATH: add its folder"
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
