"""DeepSpeed: ``ds_config.json``, and the words that start a script with it.

Keys and rules were read in DeepSpeed 0.19.8 and 0.16.9 (runtime/config.py, runtime/zero/config.py,
runtime/engine.py, runtime/pipe/engine.py) and in Megatron-DeepSpeed 4efb479 (megatron/arguments.py). The
tables here serve :mod:`planner.export.read_deepspeed` as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from planner.errors import InputError
from planner.export import huggingface
from planner.export.base import Export, NotExpressible, Subject, setting_of
from planner.export.huggingface import script_of, text_of
from planner.export.structured import HEADER
from planner.files import plain
from planner.offload import MOST_IN_HOST, OPTIMIZER_BUFFERS, PARAMETER_BUFFERS
from planner.splits import near_even
from planner.stacks.base import WIDTHS
from strategies.offload import Way, places_of

VERSIONS = ("0.19", "0.16")
FRAMEWORKS = ("deepspeed",)
SETTINGS = {
    "script": "your training script, train.py or Megatron-DeepSpeed's pretrain_gpt.py",
    "batch": "auto: batch keys and the optimizer's numbers come from Hugging Face's TrainingArguments",
    "nvme_path": "a folder on every node's NVMe, for what is offloaded there",
    "lr": "the learning rate, if not the optimizer's own default",
}
CONFIG = "ds_config.json"
STAGES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
"""Shardings -> zero_optimization.stage."""
SIZES = ("reduce_bucket_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size", "sub_group_size")
"""Options that are keys of zero_optimization; the last three are of stage 3."""
PARAMETERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "adam": ("Adam", {"adam_w_mode": False}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "sgd": ("SGD", {}),
    "lion": ("Lion", {}),
}
"""Optimizers -> optimizer.type and its params (runtime/engine.py, _configure_basic_optimizer)."""
OF_HUGGING_FACE = ("adam", "lion")
"""Optimizers that Megatron-DeepSpeed does not make: its adam is AdamW."""
DEVICES = {"host": "cpu", "nvme": "nvme"}
PRESETS = {
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
}
"""Model types -> expert_parallel.preset_model (module_inject/auto_ep_presets)."""
BUFFER_COUNT = 5
"""Of offload_param: zero/offload_config.py."""
SCRIPT = "train.py"
MEGATRON_SCRIPT = "pretrain_gpt.py"


def export(subject: Subject, version: str, settings: Mapping[str, str]) -> Export:
    """``ds_config.json`` of a plan of DeepSpeed's, and how a script is started with it.

    Raises NotExpressible for what DeepSpeed cannot be told, InputError for a setting that cannot be.
    """
    _check_layout(subject, version)
    _check_types(subject)
    batch = setting_of(settings, "batch", "numbers")
    if batch not in ("auto", "numbers"):
        raise InputError(f"--set batch={plain(batch)}: use auto, for Hugging Face's Trainer, or numbers")
    megatron = subject.options().get("kernels") == "megatron"
    if megatron and batch == "auto":
        raise NotExpressible(
            "batch=auto is for Hugging Face's Trainer, this plan runs Megatron's kernels: leave it out"
        )
    script = script_of(settings, MEGATRON_SCRIPT if megatron else SCRIPT)
    found = configuration(subject, version, settings)
    env, notes = {}, [*_notes(subject, megatron, batch == "auto", settings.get("lr", ""))]
    if megatron:
        words = _megatron_words(subject)
        if subject.options().get("launch_blocking") == "on":
            env["CUDA_LAUNCH_BLOCKING"] = "1"
    elif batch == "auto":
        arguments = arguments_of(subject)
        words = ("--deepspeed", CONFIG, *huggingface.words_of(arguments))
    else:
        words = ("--deepspeed", "--deepspeed_config", CONFIG)
    files = {CONFIG: text_of(found)}
    if not megatron:
        files |= huggingface.peft_of(subject, flat=subject.layout.sharding == "zero3")
    return Export("deepspeed", version, files, env, (script, *words), notes=tuple(notes))


def arguments_of(subject: Subject) -> dict[str, Any]:
    """TrainingArguments that go with a configuration whose batch is ``auto``."""
    found = huggingface.training_arguments(subject)
    if huggingface.recomputed(subject, "Hugging Face's Trainer"):
        if _moved(subject):
            raise NotExpressible(
                "offload activations is of DeepSpeed's own checkpointing, which Hugging Face's Trainer does "
                "not use: leave batch=auto out, or the activations on the GPU"
            )
        found["gradient_checkpointing"] = True
    return found


def configuration(subject: Subject, version: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """The configuration as JSON values."""
    layout, options = subject.layout, subject.options()
    auto = settings.get("batch") == "auto"
    megatron = options.get("kernels") == "megatron"
    found: dict[str, Any] = {
        HEADER: subject.header("", also=(f"for DeepSpeed {version}",)).splitlines(),
        "train_batch_size": "auto" if auto else layout.global_batch_size,
        "train_micro_batch_size_per_gpu": "auto" if auto else layout.micro_batch_size,
        "gradient_accumulation_steps": "auto" if auto else layout.grad_accum,
    }
    precision = subject.job.training.precision
    if precision in ("bf16", "fp16"):
        found[precision] = {"enabled": True}
    found["data_types"] = {"grad_accum_dtype": accumulated(subject)}
    found["zero_optimization"] = _zero(subject, settings)
    if not megatron:
        found |= _optimizer(subject, settings, auto)
    if layout.context_parallel > 1:
        found["sequence_parallel_size"] = layout.context_parallel
    if layout.expert_parallel > 1:
        found["expert_parallel"] = {
            "enabled": True,
            "autoep_size": layout.expert_parallel,
            "preset_model": PRESETS[subject.model.model_type],
        }
    if layout.pipeline_parallel > 1:
        found["pipeline"] = {"stages": layout.pipeline_parallel}
    policy, count = subject.recompute("DeepSpeed")
    if policy == "full":
        layers = subject.model.num_hidden_layers if count is None else count
        moved = _moved(subject)
        found["activation_checkpointing"] = {"number_checkpoints": layers, "cpu_checkpointing": moved}
    return found


def accumulated(subject: Subject) -> str:
    """The type that gradients are accumulated in: data_types.grad_accum_dtype."""
    training = subject.job.training
    own = {"bf16": "bf16", "fp16": "fp16"}.get(str(training.precision), "fp32")
    return training.gradient_dtype or own


def _zero(subject: Subject, settings: Mapping[str, str]) -> dict[str, Any]:
    layout, options = subject.layout, subject.options()
    stage = STAGES[layout.sharding]
    found: dict[str, Any] = {"stage": stage}
    if stage:
        found |= {
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": options.get("overlap") == "on",
            "reduce_bucket_size": int(float(options["reduce_bucket_size"])),
        }
    if stage == 3:
        found |= {name: int(float(options[name])) for name in SIZES[1:]}
    places = places_of(layout.offload)
    path = {"nvme_path": setting_of(settings, "nvme_path", "/local_nvme")}
    if place := places.get("optimizer"):
        nvme = {**path, "buffer_count": OPTIMIZER_BUFFERS} if place == "nvme" else {}
        found["offload_optimizer"] = {"device": DEVICES[place], "pin_memory": True, **nvme}
    if place := places.get("parameters"):
        sizes = {"buffer_size": int(PARAMETER_BUFFERS / BUFFER_COUNT), "max_in_cpu": int(MOST_IN_HOST)}
        nvme = {**path, "buffer_count": BUFFER_COUNT, **sizes} if place == "nvme" else {}
        found["offload_param"] = {"device": DEVICES[place], "pin_memory": True, **nvme}
    return found


def _optimizer(subject: Subject, settings: Mapping[str, str], auto: bool) -> dict[str, Any]:
    training, stage = subject.job.training, STAGES[subject.layout.sharding]
    kind, own = PARAMETERS[training.optimizer]
    params: dict[str, Any] = dict(own)
    if kind.startswith("Adam") and subject.options().get("optimizer_step") == "foreach":
        params["torch_adam"] = True
    if lr := setting_of(settings, "lr"):
        try:
            params["lr"] = float(lr)
        except ValueError:
            raise InputError(f"--set lr={plain(lr)}: use a number, as in lr=1e-4") from None
    elif auto:
        params["lr"] = "auto"
    if auto and kind != "SGD":
        params |= {"betas": "auto", "weight_decay": "auto"} | ({} if kind == "Lion" else {"eps": "auto"})
    found: dict[str, Any] = {"optimizer": {"type": kind, "params": params}}
    if kind == "SGD" and stage:  # zero/utils.py: ZERO_SUPPORTED_OPTIMIZERS
        found["zero_allow_untested_optimizer"] = True
    return found


def _check_layout(subject: Subject, version: str) -> None:
    """Raises NotExpressible for degrees, schedules and splits that DeepSpeed cannot be told."""
    layout, job = subject.layout, subject.job
    megatron = subject.options().get("kernels") == "megatron"
    stages = layout.pipeline_parallel
    if stages > 1 and (layout.schedule != "1f1b" or layout.chunks > 1):
        raise NotExpressible(
            f"schedule={layout.schedule} with {layout.chunks} chunks: DeepSpeed's PipelineEngine runs 1F1B",
            {"schedule": "1f1b", "chunks": 1},
        )
    if stages > 1 and STAGES[layout.sharding] > 1:
        raise NotExpressible(
            f"sharding={layout.sharding} with {stages} stages: PipelineEngine takes ZeRO-1 at most",
            {"sharding": "zero1"},
        )
    if layout.rank_order not in job.stack.rank_orders:
        order = next(iter(job.stack.rank_orders))
        raise NotExpressible(
            f"rank_order={layout.rank_order}: DeepSpeed has the axes pipe, data, model: use {order}",
            {"rank_order": order},
        )
    if (layout.tensor_parallel > 1 or stages > 1) and not megatron:
        raise NotExpressible("tensor and pipeline parallelism are planned with option kernels=megatron")
    if layout.context_parallel > 1 and version == "0.16":
        raise NotExpressible(
            f"context_parallel={layout.context_parallel}: sequence_parallel_size is not of DeepSpeed 0.16: "
            "use --framework-version 0.19",
            {"context_parallel": 1},
        )
    if layout.expert_parallel > 1 and (version == "0.16" or subject.model.model_type not in PRESETS):
        raise NotExpressible(
            f"expert_parallel={layout.expert_parallel} of {subject.model.model_type}: the section "
            f"expert_parallel is DeepSpeed 0.19's, with presets for {', '.join(PRESETS)}",
            {"expert_parallel": 1},
        )
    if layout.expert_parallel > 1 and megatron:
        raise NotExpressible(
            f"expert_parallel={layout.expert_parallel} with Megatron's kernels is not to be said in "
            f"{CONFIG}: use kernels=hf",
            {"expert_parallel": 1},
        )
    even = balanced(subject.model.num_hidden_layers, stages)
    if subject.layers != even:
        near = tuple(near_even(subject.model.num_hidden_layers, stages))
        why = "planner's even split puts more layers on inner stages; " if subject.layers == near else ""
        raise NotExpressible(
            f"layers on the stages {', '.join(map(str, subject.layers))}: {why}PipelineModule's "
            f"partition_method type:transformer balances them as {', '.join(map(str, even))}",
            {"layers_per_stage": ",".join(map(str, even))},
        )


def balanced(layers: int, stages: int) -> tuple[int, ...]:
    """Layers on each stage as PipelineModule balances them: those left over go to the first stages.

    runtime/utils.py, partition_balanced, of layers that weigh the same.

    >>> balanced(32, 6)
    (6, 6, 5, 5, 5, 5)
    """
    least, more = divmod(layers, stages)
    return tuple(least + (index < more) for index in range(stages))


def _check_types(subject: Subject) -> None:
    """Raises NotExpressible for types, optimizers, options and policies that DeepSpeed cannot be told."""
    training, options, recipe = subject.job.training, subject.options(), subject.job.recipe
    megatron = options.get("kernels") == "megatron"
    compute = {2.0: (str(training.precision), "fp32"), 4.0: ("fp32",)}[recipe.compute]
    gradient = training.gradient_dtype
    if gradient and (gradient not in compute or WIDTHS[gradient] < recipe.compute):
        raise NotExpressible(
            f"gradient_dtype={gradient} with precision={training.precision}: DeepSpeed accumulates in the "
            f"weights' type or fp32: use {' or '.join(compute)}",
            {"gradient_dtype": compute[0]},
        )
    if training.optimizer_dtype not in (None, "fp32"):
        raise NotExpressible(
            f"optimizer_dtype={training.optimizer_dtype}: bf16_optimizer_states goes together with master "
            "weights in bf16, which are not planned: leave it out",
            {"optimizer_dtype": "fp32"},
        )
    if training.master_weights is False and recipe.compute < 4:
        raise NotExpressible(
            "master_weights off: DeepSpeed's optimizers of half precision keep fp32 master weights",
        )
    apart = OF_HUGGING_FACE if megatron else ()
    if training.optimizer not in PARAMETERS or training.optimizer in apart:
        able = ", ".join(name for name in PARAMETERS if name not in apart)
        raise NotExpressible(
            f"optimizer={training.optimizer} is not {'Megatron-' * megatron}DeepSpeed's: it has {able}",
            {"optimizer": "adamw"},
        )
    if options.get("offload_copy") == "tiled":
        raise NotExpressible(
            "offload_copy=tiled: DeepSpeed brings updated weights back as a whole",
            {"option": {"offload_copy": "whole"}},
        )
    for name, only in (("loss", "parallel"), ("swiglu", "unfused"), ("optimizer_step", "fused")):
        if megatron and options.get(name, only) != only:
            raise NotExpressible(
                f"{name}={options[name]}: Megatron-DeepSpeed's {name} is {only}", {"option": {name: only}}
            )
    if not megatron:
        huggingface.recomputed(subject, "DeepSpeed")
    _check_ways(subject)


def _check_ways(subject: Subject) -> None:
    policy, count = subject.recompute("DeepSpeed")
    rows = {way: own for stage in subject.plan.stages for way, own in stage.rows.items() if sum(own)}
    moved = {Way.of(way).recompute for way in rows if Way.of(way).offload}
    kept = {Way.of(way).recompute for way in rows if not Way.of(way).offload}
    if "optimizer" in {name for way in rows for name in Way.of(way).offload} or moved & kept:
        raise NotExpressible(
            "some layers offload what others do not: DeepSpeed offloads for all layers or none",
            {"offload": subject.layout.offload or "optimizer"},
        )
    if policy == "selective" and count is not None:
        raise NotExpressible(
            "selective recomputation of some layers: Megatron-DeepSpeed's is of all",
            {"recompute": "selective"},
        )


def _moved(subject: Subject) -> bool:
    return any(stage.offload.get("activations") for stage in subject.plan.stages)


def _megatron_words(subject: Subject) -> tuple[str, ...]:
    """Words of Megatron-DeepSpeed that the JSON has no place for."""
    layout, training, options = subject.layout, subject.job.training, subject.options()
    policy, count = subject.recompute("Megatron-DeepSpeed")
    words: list[Any] = ["--deepspeed", "--deepspeed_config", CONFIG]
    words += ["--zero-stage", STAGES[layout.sharding]]
    words += ["--tensor-model-parallel-size", layout.tensor_parallel]
    words += ["--pipeline-model-parallel-size", layout.pipeline_parallel]
    words += ["--no-pipeline-parallel"] * (layout.pipeline_parallel == 1)
    words += ["--sequence-parallel"] * layout.sequence_parallel
    words += ["--micro-batch-size", layout.micro_batch_size, "--global-batch-size", layout.global_batch_size]
    words += ["--seq-length", training.seq_length, "--max-position-embeddings", training.seq_length]
    words += [f"--{training.precision}"] if training.precision in ("bf16", "fp16") else []
    words += ["--use-flash-attn-v2"] * (options.get("attention") == "flash")
    words += ["--optimizer", "adam" if training.optimizer == "adamw" else "sgd"]
    if training.optimizer in ("momentum", "sgd"):
        words += ["--sgd-momentum", 0.9 if training.optimizer == "momentum" else 0.0]
    model, own = subject.model, training.dropout  # Megatron-DeepSpeed's own default is 0.1
    words += ["--hidden-dropout", model.dropout if own is None else own]
    words += ["--attention-dropout", model.attention_dropout if own is None else own]
    words += ["--cpu-optimizer"] * ("optimizer" in places_of(layout.offload))
    if policy == "full":
        method = "uniform" if count is None else "block"
        words += ["--recompute-granularity", "full", "--recompute-method", method]
        words += ["--recompute-num-layers", 1 if count is None else count]
    elif policy == "selective":
        words += ["--recompute-granularity", "selective"]
    words += ["--deepspeed-activation-checkpointing"] * _moved(subject)
    return tuple(map(str, words))


def _notes(subject: Subject, megatron: bool, auto: bool, lr: str) -> Iterator[str]:
    layout, training = subject.layout, subject.job.training
    if megatron:
        yield (
            "the model's sizes, its tokenizer and its data are arguments of Megatron-DeepSpeed that are left "
            "to you; tensor and pipeline parallelism are its words, not the JSON's"
        )
        if layout.pipeline_parallel > 1:
            parts = ", ".join(map(str, subject.layers))
            yield (
                f"PipelineModule(num_stages={layout.pipeline_parallel}, partition_method='type:transformer') "
                f"is in the model's code: layers on the stages {parts}"
            )
    else:
        yield from huggingface.notes_of(subject)
        if subject.recompute("DeepSpeed")[0] == "full" and not auto:
            how = "deepspeed.checkpointing.checkpoint for every layer"
            how = f"call {how if _moved(subject) else 'gradient_checkpointing_enable()'}"
            yield f"recomputation is asked for in code: {how}"
        if layout.context_parallel > 1:
            yield (
                f"Ulysses: UlyssesSPAttentionHF.register_with_transformers(sequence_parallel_size="
                f"{layout.context_parallel}) in your code gives the mpu of deepspeed.initialize"
            )
    if training.precision == "tf32":
        yield "TF32 is torch.backends.cuda.matmul.allow_tf32 = True"
    if "nvme" in layout.offload:
        yield "nvme_path must be a folder on the NVMe of every node"
    yield "gradient_clipping is left to DeepSpeed's default"
    if not (lr or auto):
        yield "the learning rate is DeepSpeed's own, 1e-3 for Adam: give --set lr=..."
