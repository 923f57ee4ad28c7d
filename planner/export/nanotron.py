"""nanotron: its YAML, of plans made with Megatron's kernels, the nearest that are modelled.

Read in nanotron at 2411b022 of April 2026: config/config.py, config/parallelism_config.py,
config/models_config.py, models/base.py (build_model), parallel/context.py, optim/zero.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from planner.errors import InputError
from planner.export.base import Export, NotExpressible, Subject, setting_of
from planner.files import plain
from planner.model import ModelSpec

VERSIONS = ("2411b022",)
FRAMEWORKS = ("megatron",)
SETTINGS = {
    "project": "general.project",
    "train_steps": "steps of the training, 1000 if --tokens were not given",
    "lr": "the learning rate",
    "tokenizer": "tokenizer_name_or_path",
    "checkpoints_path": "a folder that all nodes see",
}
CONFIG = "nanotron.yaml"
ENGINES = {"1f1b": "1f1b", "gpipe": "afab"}
"""Schedules -> parallelism.pp_engine."""
RING = {"ring": "ring", "all-gather": "llama3_ring_attention"}
"""Ways of context parallelism -> _attn_implementation of Qwen2Config."""
USUAL = {
    "kind": "decoder",
    "gated_mlp": True,
    "hidden_act": "silu",
    "norm": "rmsnorm",
    "norm_placement": "pre",
    "position_embedding": "rotary",
    "rotary_fraction": 1.0,
    "qk_norm": False,
    "attention_gate": False,
    "attention_sinks": False,
    "attention_softcap": None,
    "logits_softcap": None,
    "attention_output_bias": False,
    "mlp_bias": False,
    "embedding_norm": False,
    "parallel_residual": False,
    "head": "language",
    "experts": None,
    "latent": None,
    "state_space": None,
    "delta": None,
}
"""What LlamaConfig and Qwen2Config are of: fields of a model with the one value that they can say."""


def export(subject: Subject, version: str, settings: Mapping[str, str]) -> Export:
    """``nanotron.yaml`` for ``run_train.py``. Raises NotExpressible for what nanotron cannot be told."""
    import yaml

    for message, instead in _refused(subject):
        raise NotExpressible(message, instead)
    found = {
        "general": {"project": setting_of(settings, "project", "planner"), "run": f"plan-{subject.digest}"},
        "parallelism": _parallelism(subject),
        "model": _model(subject),
        "tokenizer": {"tokenizer_name_or_path": setting_of(settings, "tokenizer") or None},
        "checkpoints": {
            "checkpoints_path": setting_of(settings, "checkpoints_path", "checkpoints"),
            "checkpoint_interval": _steps(subject, settings),
        },
        "tokens": {
            "sequence_length": subject.job.seq_length,
            "train_steps": _steps(subject, settings),
            "micro_batch_size": subject.layout.micro_batch_size,
            "batch_accumulation_per_replica": subject.layout.grad_accum,
        },
        "optimizer": _optimizer(subject, settings),
        "data_stages": [
            {"name": "training", "start_training_step": 1, "data": {"dataset": None, "seed": 42}},
        ],
    }
    text = subject.header(
        "# ", also=(f"for nanotron {version}; bytes and seconds are of Megatron's kernels",)
    )
    text += yaml.safe_dump(found, sort_keys=False, allow_unicode=False)
    return Export(
        "nanotron",
        version,
        {CONFIG: text},
        {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        ("run_train.py", "--config-file", CONFIG),
        notes=tuple(_notes(subject)),
    )


def _steps(subject: Subject, settings: Mapping[str, str]) -> int:
    text = setting_of(settings, "train_steps")
    if text:
        if not (text.isascii() and text.isdigit() and 0 < int(text[:12]) <= 10**10):
            raise InputError(f"--set train_steps={plain(text)}: use a whole number, 1 or more")
        return int(text)
    tokens = subject.job.training.tokens
    return max(1, round(tokens / subject.job.tokens_per_step)) if tokens else 1000


def _parallelism(subject: Subject) -> dict[str, Any]:
    layout = subject.layout
    return {
        "dp": layout.data_parallel,
        "pp": layout.pipeline_parallel,
        "tp": layout.tensor_parallel,
        "context_parallel_size": layout.context_parallel,
        "expert_parallel_size": 1,
        "pp_engine": ENGINES[layout.schedule],
        "tp_mode": "REDUCE_SCATTER" if layout.sequence_parallel else "ALL_REDUCE",
        "tp_linear_async_communication": subject.options().get("tp_comm_overlap") == "on",
        "recompute_layer": subject.recompute("nanotron")[0] == "full",
    }


def _model(subject: Subject) -> dict[str, Any]:
    model, layout = subject.model, subject.layout
    own: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": max(model.max_position_embeddings, subject.job.seq_length),
        "tie_word_embeddings": model.tie_word_embeddings,
        "hidden_act": model.hidden_act,
    }
    if _is_qwen(subject):
        own = {"is_qwen2_config": True, **own, "attention_bias": model.qkv_bias}
        if model.sliding_window:
            own["sliding_window_size"] = model.sliding_window
        if layout.context_parallel > 1:
            own["_attn_implementation"] = RING[layout.context_comm]
            if layout.context_comm == "all-gather":
                own["ring_attn_heads_k_stride"] = 1
    else:
        own = {"is_llama_config": True, **own}
    return {
        "dtype": "bfloat16",
        "make_vocab_size_divisible_by": subject.job.stack.vocabulary_multiple,
        "init_method": {"std": 0.02},
        "model_config": own,
    }


def _is_qwen(subject: Subject) -> bool:
    """Is it a Qwen2Config? LlamaConfig has no biases, no window and no context parallelism."""
    model = subject.model
    return model.qkv_bias or model.sliding_window is not None or subject.layout.context_parallel > 1


def _optimizer(subject: Subject, settings: Mapping[str, str]) -> dict[str, Any]:
    text = setting_of(settings, "lr", "3e-4")
    try:
        rate = float(text)
    except ValueError:
        raise InputError(f"--set lr={plain(text)}: use a number, as in lr=3e-4") from None
    adam = {
        "name": "adamW",
        "adam_eps": 1.0e-8,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "torch_adam_is_fused": True,
    }
    return {
        "optimizer_factory": {"name": "sgd"} if subject.job.training.optimizer == "sgd" else adam,
        "zero_stage": int(subject.layout.sharding == "zero1"),
        "weight_decay": 0.01,
        "clip_grad": 1.0,
        "accumulate_grad_in_fp32": True,
        "learning_rate_scheduler": {
            "learning_rate": rate,
            "lr_warmup_steps": 0,
            "lr_warmup_style": "linear",
            "lr_decay_style": "cosine",
            "min_decay_lr": float(f"{rate / 10:g}"),
        },
    }


def split_of(model: ModelSpec, stages: int) -> tuple[int, ...]:
    """Layers on each stage as nanotron's build_model balances the products of layers and head.

    A block goes to the stage that is being filled, which is full once it holds more than its part.

    >>> from planner.model import ModelSpec
    >>> split_of(ModelSpec.from_catalog("llama-65b"), 4)
    (21, 20, 20, 19)
    """
    width = model.hidden_size // model.num_attention_heads * model.num_attention_heads
    layer = 4 * width * model.hidden_size + 3 * model.intermediate_size * model.hidden_size
    depth = model.num_hidden_layers
    costs = [0, *[layer] * depth, 0, model.vocab_size * model.hidden_size]
    sums = list(accumulate(costs))
    counts, stage = [0] * stages, 0
    for index, done in enumerate(sums):
        counts[stage] += 1 <= index <= depth
        if done > sums[-1] * (stage + 1) / stages and stage < stages - 1:
            stage += 1
    return tuple(counts)


def _refused(subject: Subject) -> Iterator[tuple[str, dict[str, Any]]]:
    """What nanotron cannot be told, and what to ask the planner for in its place."""
    yield from _of_model(subject.model)
    layout, training, options = subject.layout, subject.job.training, subject.options()
    tensor, stages = layout.tensor_parallel, layout.pipeline_parallel
    if stages > 1 and (layout.chunks > 1 or layout.schedule not in ENGINES):
        yield (
            f"schedule={layout.schedule} with {layout.chunks} chunks: nanotron has no virtual stages",
            {"schedule": "1f1b", "chunks": 1},
        )
    if layout.sharding not in ("ddp", "zero1"):
        yield (
            f"sharding={layout.sharding}: nanotron has zero_stage 0 and 1; others parse and do nothing",
            {"sharding": "zero1"},
        )
    if tensor > subject.model.num_key_value_heads:
        yield (
            f"tensor_parallel={tensor}: nanotron wants at most num_key_value_heads="
            f"{subject.model.num_key_value_heads}",
            {"tensor_parallel": subject.model.num_key_value_heads},
        )
    if layout.expert_parallel > 1 or layout.expert_tensor_parallel > 1:
        yield ("expert parallelism: nanotron's groups have no place for it", {"expert_parallel": 1})
    if layout.context_parallel > 1 and layout.context_comm not in RING:
        yield (
            f"context_comm={layout.context_comm}: nanotron has ring and all-gather: use ring",
            {"context_comm": "ring"},
        )
    if layout.rank_order != "tp-dp-pp":
        yield (
            f"rank_order={layout.rank_order}: nanotron's is tp-dp-pp, cp right outside tp",
            {"rank_order": "tp-dp-pp"},
        )
    if layout.offload or any(stage.offload for stage in subject.plan.stages):
        yield (f"offload {layout.offload or 'of layers'}: nanotron offloads nothing: leave it out", {})
    policy, count = subject.recompute("nanotron")
    if policy not in ("none", "full") or count is not None:
        yield (
            f"recompute={policy}{f':{count}' if count is not None else ''}: nanotron recomputes all layers "
            "(recompute_layer) or none",
            {"recompute": "full"},
        )
    if training.precision != "bf16" or training.gradient_dtype not in (None, "fp32"):
        yield (
            f"precision={training.precision}, gradient_dtype={training.gradient_dtype}: nanotron's fp32 "
            "accumulator belongs to bf16 weights: use precision bf16",
            {"precision": "bf16", "gradient_dtype": "fp32"},
        )
    if training.optimizer_dtype not in (None, "fp32") or training.master_weights is False:
        yield ("moments and master weights are fp32 in nanotron", {"optimizer_dtype": "fp32"})
    if training.optimizer not in ("adamw", "sgd"):
        yield (f"optimizer={training.optimizer}: nanotron has adamw and sgd", {"optimizer": "adamw"})
    if training.adapters or training.frozen.embeddings:
        yield ("adapters and frozen weights are not nanotron's: leave --lora and --freeze out", {})
    if training.dropout:
        yield (f"dropout={training.dropout:g}: nanotron's Llama and Qwen2 have none", {"dropout": 0.0})
    for name, value in (
        ("attention", "flash"),
        ("norm", "kept"),
        ("loss", "parallel"),
    ):
        if options.get(name, value) != value:
            yield (
                f"{name}={options[name]} is not nanotron's: use {name}={value}",
                {"option": {name: value}},
            )
    if options.get("swiglu") == "recomputed":
        yield ("swiglu=recomputed is not nanotron's: use swiglu=fused", {"swiglu": "fused"})
    own = split_of(subject.model, stages)
    if subject.layers != own:
        able = ", ".join(map(str, own))
        yield (
            f"layers on the stages {', '.join(map(str, subject.layers))}: nanotron splits them by the work "
            f"of layers and head, as {able}",
            {"layers_per_stage": ",".join(map(str, own))} if min(own) else {"pipeline_parallel": 1},
        )


def _of_model(model: ModelSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    what = "nanotron's LlamaConfig and Qwen2Config are of dense decoders of Llama's kind"
    for name, value in USUAL.items():
        if getattr(model, name) != value:
            has = plain(str(getattr(model, name)))
            yield (f"{plain(model.name)} has {name}={has}: {what}, with {name}={value}", {})
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        yield (
            f"{plain(model.name)} has head_dim={model.head_dim}: nanotron's is hidden_size over the "
            f"heads, {model.hidden_size // model.num_attention_heads}",
            {},
        )
    if len(model.block_kinds) > 1:
        yield (f"{plain(model.name)} has unlike blocks: {what}", {})


def _notes(subject: Subject) -> Iterator[str]:
    yield "predicted bytes and seconds are of Megatron's kernels: nanotron's own are not modelled"
    yield "rope_theta, rms_norm_eps and token ids are nanotron's defaults: take them from your checkpoint"
    yield "data_stages has nanotron's dummy data: name a dataset; the optimizer's numbers are yours too"
    if subject.layout.context_parallel > 1:
        yield f"context parallelism by {subject.layout.context_comm} needs nanotron's ring-flash-attn kernels"
    if subject.layout.pipeline_parallel > 1:
        layers = ", ".join(map(str, subject.layers))
        yield f"nanotron splits layers over stages by itself; it comes to {layers}, as planned"
