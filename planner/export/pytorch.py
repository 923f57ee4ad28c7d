"""A plan as a training script in plain PyTorch: FSDP2, DDP, tensor and pipeline parallelism of transformers'
modules.

The script is made from templates/pytorch_train.py.jinja. What somebody wrote of a plan goes into it
as a literal that ``repr`` made, or into comments in printable characters: none of it becomes code. The calls
are public ones of torch 2.6 and later: torch.distributed.fsdp, torch.distributed.device_mesh,
torch.nn.parallel, torch.utils.checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pprint import pformat
from typing import Any

from planner import __version__
from planner.errors import InputError
from planner.export import pytorch_stages as stages
from planner.export.base import Export, NotExpressible, Subject, setting_of
from planner.export.hf_config import config_of
from planner.export.rendering import rendered
from planner.files import plain
from planner.plan import StagePlan

VERSIONS = tuple(f"2.{minor}" for minor in range(13, 5, -1))
FRAMEWORKS = ("fsdp", "hf", "torchtitan")
SETTINGS = {
    "data": "a file of token ids, one after the other; random tokens without it",
    "data-dtype": "of these ids: uint16 (where they fit), uint32, int32 or int64",
    "model-path": "a folder with a model's weights; random weights without it",
    "steps": "how many steps are run",
    "lr": "the learning rate",
}
TEMPLATE, SCRIPT = "pytorch_train.py.jinja", "train.py"

ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
"""Option ``attention`` as transformers' ``attn_implementation``."""
REFUSED = {
    ("attention", "flash1"): ("flash", "transformers 5 has no FlashAttention 1"),
    ("loss", "fused"): ("chunked", "transformers' models compute the loss of whole logits"),
    ("version", "1"): ("2", "the script shards with fully_shard; --to accelerate has both versions"),
    ("optimizer_step", "in_backward"): ("fused", "the script has one optimizer, which steps at the end"),
}
"""Values of options that are not written, with the nearest that is, and why."""
OPTIMIZERS = {
    "adamw": "torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, {step}=True)",
    "adam": "torch.optim.Adam(trained, lr=rate, betas=(0.9, 0.95), {step}=True)",
    "momentum": "torch.optim.SGD(trained, lr=rate, momentum=0.9, {step}=True)",
    "sgd": "torch.optim.SGD(trained, lr=rate, {step}=True)",
    "adafactor": "torch.optim.Adafactor(trained, lr=rate)",
}
"""Optimizers as expressions of the script, by the planner's names."""
CUTS = ("tensor_parallel", "pipeline_parallel")
AXES = {
    **dict.fromkeys(CUTS, "plans of --framework torchtitan do"),
    "context_parallel": "--to accelerate has it for plans of --framework fsdp",
    "expert_parallel": "--to torchtitan has it",
}
"""Degrees that not every plan's script has, and where they are had."""
TYPES = {4.0: "fp32", 2.0: "bf16"}
"""Types of weights, by their bytes."""


def export(subject: Subject, version: str, settings: Mapping[str, str]) -> Export:
    """The script of a plan. Raises NotExpressible for what it cannot do as planned."""
    for problem in problems(subject):
        raise problem
    if old := stages.too_old(subject, version):
        raise old
    plan, layout = _plan(subject), subject.layout
    several = layout.data_parallel > 1
    script = rendered(
        TEMPLATE,
        header=subject.header(also=_also(subject)),
        plan=_literal(plan),
        model=_literal(_model(subject)),
        ids="uint16" if subject.model.vocab_size <= 2**16 else "uint32",
        world=layout.world_size,
        nodes=subject.nodes,
        per_node=subject.per_node,
        fsdp=several and layout.sharding == "fsdp",
        ddp=several and layout.sharding == "ddp",
        hybrid=layout.data_shards != layout.data_parallel,
        split_root=subject.options().get("root") == "split",
        offload=bool(layout.offload),
        compile=subject.options().get("compile") == "on",
        recompute=bool(plan["recompute"]),
        chunked=subject.options()["loss"] == "chunked",
        frozen=subject.plan.training.frozen.embeddings,
        autocast=plan["autocast"],
        scaler=plan["compute"] == "fp16",
        tf32=subject.job.recipe.unit == "tf32",
        since=f"2.{stages.SINCE}" if layout.pipeline_parallel > 1 else VERSIONS[-1],
        staged=stages.staged(subject),
        tensor=layout.tensor_parallel > 1,
        pipeline=plan.get("schedule", ""),
        single=layout.schedule in stages.SINGLE,
        sequence=bool(layout.sequence_parallel) and layout.tensor_parallel > 1,
        tied=subject.model.tie_word_embeddings,
        head_norms=subject.model.qk_norm,
        optimizer=OPTIMIZERS[subject.plan.training.optimizer].format(
            step=subject.options().get("optimizer_step", "fused")
        ),
    )
    return Export(
        target="pytorch",
        version=version,
        files={SCRIPT: script},
        program=(SCRIPT, *_arguments(settings)),
        notes=tuple(_notes(subject, settings)),
    )


def problems(subject: Subject) -> list[NotExpressible]:
    """What of a plan the script would not do as planned, each with what would be in its place."""
    layout, training, found = subject.layout, subject.plan.training, []
    titan = training.framework == "torchtitan"
    for name, how in AXES.items():
        if (degree := getattr(layout, name)) > 1 and not (titan and name in CUTS):
            found.append(NotExpressible(f"{name}={degree}: the script does not have it; {how}", {name: 1}))
    if titan:
        found += stages.problems(subject)
    if layout.sharding not in ("ddp", "fsdp"):
        found.append(NotExpressible(f"sharding={plain(layout.sharding, 20)}: the script has ddp and fsdp"))
    for name, value in subject.options().items():
        if (name, value) in REFUSED:
            other, why = REFUSED[name, value]
            found.append(NotExpressible(f"{name}={value}: {why}", {"option": {name: other}}))
    found += _of_loss(subject)
    if training.optimizer not in OPTIMIZERS:
        found.append(
            NotExpressible(
                f"optimizer={training.optimizer}: the script has torch's own, {', '.join(OPTIMIZERS)}",
                {"optimizer": "adamw"},
            )
        )
    step = subject.options().get("optimizer_step")
    sharded = layout.sharding == "fsdp" or layout.tensor_parallel > 1
    if training.optimizer in ("sgd", "momentum") and step == "fused" and sharded:
        found.append(
            NotExpressible(
                f"optimizer={training.optimizer}, optimizer_step=fused: torch 2.13 has no fused SGD of "
                "sharded tensors (NotImplementedError: aten._fused_sgd_)",
                {"option": {"optimizer_step": "foreach"}},
            )
        )
    if training.adapters:
        found.append(
            NotExpressible("lora: the script trains the model's own weights: leave --lora out, or use peft")
        )
    if training.expert_capacity_factor:
        found.append(
            NotExpressible(
                "expert_capacity_factor: transformers' experts drop and pad no tokens: leave it out"
            )
        )
    found += _of_precision(subject)
    if layout.sharding == "fsdp" and layout.data_shards == 1 < layout.data_parallel:
        found.append(
            NotExpressible(
                "data_shards=1: every GPU has the whole model, which FSDP gathers all the same: use DDP",
                {"data_shards": layout.data_parallel} if titan else {"framework": "hf"},
            )
        )
    try:
        _model(subject)
    except InputError as error:
        found.append(NotExpressible(str(error)))
    return found


def _of_loss(subject: Subject) -> list[NotExpressible]:
    """Why the loss cannot be computed in parts."""
    options, why = subject.options(), ""
    if subject.model.logits_softcap:
        why = "the logits are capped, which the script leaves to transformers: use loss=eager"
    if options.get("root") == "split":
        why = (
            "a head that is a unit of its own would be reduced after every part: use root=one, or loss=eager"
        )
    if options["loss"] != "chunked" or not why:
        return []
    return [NotExpressible(f"loss=chunked: {why}", {"option": {"loss": "eager"}})]


def _of_precision(subject: Subject) -> list[NotExpressible]:
    job, training = subject.job, subject.plan.training
    name = str(training.precision)
    usual = job.stack.recipes.get(name)
    if name == "bf16-kahan":
        return [
            NotExpressible(
                "precision=bf16-kahan: torch's optimizers keep no compensation", {"precision": "pure-bf16"}
            )
        ]
    if job.recipe.unit == "fp16" and subject.layout.offload:
        return [
            NotExpressible(
                "precision=fp16 with offload: gradients on the host, of losses that were scaled on the GPU, "
                "were not run",
                {"precision": "bf16"},
            )
        ]
    if job.recipe != usual:
        return [
            NotExpressible(
                f"gradient_dtype, optimizer_dtype or master_weights change precision {name}: torch's "
                "optimizers have states of the weights' type: leave them out"
            )
        ]
    if (
        subject.layout.data_parallel == 1
        and training.framework == "fsdp"
        and job.stack.casts_weights
        and job.recipe.weight > job.recipe.compute
    ):
        return [
            NotExpressible(
                f"precision={name} on one GPU: under fsdp weights are cast where they are gathered, and "
                "nothing is gathered on one: use --framework hf",
                {"framework": "hf"},
            )
        ]
    return []


def _also(subject: Subject) -> list[str]:
    """Lines of the header that only this script has."""
    started = f"started by: torchrun ... {SCRIPT}, {subject.layout.world_size} processes"
    titan = subject.plan.training.framework == "torchtitan"
    return [started, *([f"assumed: {stages.NOTE}"] if titan else [])]


def _model(subject: Subject) -> dict[str, Any]:
    """The configuration of the model, with the dropout of the plan."""
    model, dropout = subject.model, subject.plan.training.dropout
    if dropout is not None:
        model = model.model_copy(update={"dropout": dropout, "attention_dropout": dropout})
    return config_of(model)


def _plan(subject: Subject) -> dict[str, Any]:
    """What the script goes by, as plain values."""
    plan, layout, job, options = subject.plan, subject.layout, subject.job, subject.options()
    recipe, training = job.recipe, plan.training
    titan = training.framework == "torchtitan"
    half = "fp16" if recipe.unit == "fp16" else "bf16"
    autocast = training.precision in job.stack.autocast
    return {
        "planner": __version__,
        "plan": subject.digest,
        "name": plan.model,
        "layout": layout.describe(),
        "world_size": layout.world_size,
        "data_parallel": layout.data_parallel,
        "data_shards": layout.data_shards,
        "reshard_after_forward": layout.reshard_after_forward,
        "micro_batch_size": layout.micro_batch_size,
        "grad_accum": layout.grad_accum,
        "global_batch_size": layout.global_batch_size,
        "seq_length": job.seq_length,
        "num_layers": subject.model.num_hidden_layers,
        "recompute": stages.recomputed(subject),
        "frozen_blocks": training.frozen.blocks,
        "attention": "sdpa" if titan else ATTENTION[options["attention"]],
        "precision": training.precision,
        "weights": TYPES[recipe.weight],
        "compute": half if recipe.compute == 2 else "fp32",
        "reduce": options.get("reduce_dtype", "fp32"),
        "casts_weights": job.stack.casts_weights and recipe.weight > recipe.compute,
        "autocast": autocast,
        "gradient_as_bucket_view": options.get("gradient_view") == "on",
        "num_parameters": plan.num_parameters,
        **(stages.plan_of(subject) if stages.staged(subject) else {}),
        "predicted": [predicted(one) for one in plan.stages]
        if layout.pipeline_parallel > 1
        else predicted(plan.stages[0]),
        "step_time_s": plan.step_time_s,
    }


def predicted(stage: StagePlan) -> dict[str, int]:
    """What the script measures too, in bytes of one process."""

    def everywhere(name: str) -> int:
        return stage.components[name] + sum(one.components.get(name, 0) for one in stage.elsewhere.values())

    return {
        "parameter_bytes": everywhere("parameters"),
        "optimizer_bytes": everywhere("optimizer_states"),
        "allocated_bytes": stage.tensor_bytes,
        "reserved_bytes": stage.reserved_bytes,
        "used_bytes": stage.peak_bytes,
    }


def _literal(value: Mapping[str, Any]) -> str:
    """A Python expression of plain values, whatever their strings hold."""
    return pformat(dict(value), width=100, sort_dicts=False, underscore_numbers=True)


def _arguments(settings: Mapping[str, str]) -> list[str]:
    """What was set as the script's arguments; each one word, so that no value is taken for an option."""
    words = []
    for name in SETTINGS:
        value = setting_of(settings, name)
        if not value:
            continue
        if name == "steps" and not (value.isascii() and value.isdigit() and 0 < int(value[:10]) <= 10**9):
            raise InputError(f"--set steps={plain(value, 40)}: use a whole number, 1 or more")
        if name == "lr":
            _check_rate(value)
        if name == "data-dtype" and value not in ("uint16", "uint32", "int32", "int64"):
            raise InputError(f"--set data-dtype={plain(value, 40)}: use uint16, uint32, int32 or int64")
        words.append(f"--{name}={value}")
    return words


def _check_rate(value: str) -> None:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1e3:
        raise InputError(f"--set lr={plain(value, 40)}: use a number above 0, as in 1e-4")


def _notes(subject: Subject, settings: Mapping[str, str]) -> list[str]:
    """What the script takes for granted."""
    notes = [
        "weights, and tokens unless --set data= gives a file, are random: to try the plan's memory and time"
    ]
    if "model-path" in settings:
        notes = ["every process loads the whole model into its node's memory before it is sharded"]
    else:
        notes.append(
            "the base of rotary positions and norms' epsilon are transformers' own: no bytes depend on them"
        )
    if subject.plan.training.framework == "torchtitan":
        notes.append(stages.NOTE)
    elif subject.options()["attention"] == "flash":
        notes.append("attention=flash needs the flash-attn package; on a CPU the script takes sdpa")
    if subject.plan.training.optimizer in ("adamw", "adam"):
        notes.append(
            "assumed: betas 0.9 and 0.95, weight decay 0.1 of adamw, a constant learning rate, no clipping"
        )
    return notes
