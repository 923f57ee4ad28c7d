"""Plans for Megatron-Bridge: overrides of its plainest recipe, and a script that trains with them.

The recipe is ``vanilla_gpt_pretrain_config``, whose model has no shape of its own: all of the plan's is in
``overrides.yaml``. Keys are the fields of ``ConfigContainer`` (megatron-bridge 0.6.2,
training/config.py, models/gpt_provider.py), most of them those that Megatron-LM's flags set: so the plan is
put in flags first (planner/export/megatron.py), with what that refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from planner.export.base import Export, NotExpressible, Subject
from planner.export.megatron import environment, values_of
from planner.export.megatron import notes as notes_of
from planner.export.megatron_flags import BY_NAME, GROUPS, Flag
from planner.export.megatron_model import is_hybrid
from planner.export.rendering import rendered

VERSIONS = ("0.6",)
FRAMEWORKS = ("megatron",)
SETTINGS = {
    "data-path": "prefixes of tokenized data with their weights; else Megatron-LM makes data up",
    "tokenizer-type": "HuggingFaceTokenizer ...; else NullTokenizer, with the model's vocabulary",
    "tokenizer-model": "its file or name",
    "save": "a folder for checkpoints",
    "save-interval": "steps between them, 1000 unless given",
    "load": "a folder of checkpoints to go on from",
    "lr": "the learning rate, 1e-4 unless given",
    "train-iters": "steps; else those of the plan's tokens, or 100",
    "log-interval": "steps between lines of the log, 1 unless given",
    "eval-interval": "steps between evaluations, 1000 unless given",
    "eval-iters": "batches of an evaluation, 0 unless given: none is made",
    "rotary-base": "of rotary positions, 10000 unless given",
    "norm-epsilon": "of norms, 1e-5 unless given",
}
CORE = "0.19"
"""The megatron-core that it runs on."""
OVERRIDES, SCRIPT = "overrides.yaml", "train.py"
OF_GROUP = {"model": "model", "parallelism": "model", "recompute": "model", "kernels": "model"}
PATHS: Mapping[str, str] = {
    "--padded-vocab-size": "model.vocab_size",
    "--vocab-size": "tokenizer.vocab_size",
    "--untie-embeddings-and-output-weights": "model.share_embeddings_and_output_weights",
    "--num-experts": "model.num_moe_experts",
    "--num-virtual-stages-per-pipeline-rank": "model.virtual_pipeline_model_parallel_size",
    "--decoder-first-pipeline-num-layers": "model.num_layers_in_first_pipeline_stage",
    "--decoder-last-pipeline-num-layers": "model.num_layers_in_last_pipeline_stage",
    "--use-distributed-optimizer": "ddp.use_distributed_optimizer",
    "--use-megatron-fsdp": "ddp.use_megatron_fsdp",
    "--data-parallel-sharding-strategy": "ddp.data_parallel_sharding_strategy",
    "--num-distributed-optimizer-instances": "ddp.num_distributed_optimizer_instances",
    "--ckpt-format": "checkpoint.ckpt_format",
    "--use-tp-pp-dp-mapping": "dist.use_tp_pp_dp_mapping",
    "--micro-batch-size": "train.micro_batch_size",
    "--global-batch-size": "train.global_batch_size",
    "--seq-length": "model.seq_length",
    "--moe-expert-capacity-factor": "model.moe_expert_capacity_factor",
    "--moe-pad-expert-input-to-capacity": "model.moe_pad_expert_input_to_capacity",
    "--fp8-format": "mixed_precision.fp8",
    "--fp8-recipe": "mixed_precision.fp8_recipe",
    "--fp8-param-gather": "mixed_precision.fp8_param_gather",
    "--reuse-grad-buf-for-mxfp8-param-ag": "mixed_precision.reuse_grad_buf_for_mxfp8_param_ag",
    "--fp4-format": "mixed_precision.fp4",
    "--fp4-recipe": "mixed_precision.fp4_recipe",
    "--use-precision-aware-optimizer": "optimizer.use_precision_aware_optimizer",
    "--exp-avg-dtype": "optimizer.exp_avg_dtype",
    "--exp-avg-sq-dtype": "optimizer.exp_avg_sq_dtype",
    "--optimizer": "optimizer.optimizer",
    "--sgd-momentum": "optimizer.sgd_momentum",
    "--no-bias-swiglu-fusion": "model.bias_activation_fusion",
    "--overlap-grad-reduce": "ddp.overlap_grad_reduce",
    "--overlap-param-gather": "ddp.overlap_param_gather",
    "--optimizer-cpu-offload": "optimizer.optimizer_cpu_offload",
    "--optimizer-offload-fraction": "optimizer.optimizer_offload_fraction",
    "--cpu-offloading-num-layers": "model.cpu_offloading_num_layers",
    "--train-iters": "train.train_iters",
    "--lr": "optimizer.lr",
    "--tokenizer-type": "tokenizer.tokenizer_type",
    "--tokenizer-model": "tokenizer.tokenizer_model",
    "--data-path": "dataset.data_path",
    "--log-interval": "logger.log_interval",
    "--eval-interval": "validation.eval_interval",
    "--eval-iters": "validation.eval_iters",
    "--save": "checkpoint.save",
    "--save-interval": "checkpoint.save_interval",
    "--load": "checkpoint.load",
    "--rotary-base": "model.rotary_base",
    "--norm-epsilon": "model.layernorm_epsilon",
}
"""Flags whose field is not ``model.`` and the name in Megatron-LM's parser."""
APART = (
    *("--group-query-attention", "--max-position-embeddings", "--make-vocab-size-divisible-by", "--swiglu"),
    *("--quick-geglu", "--squared-relu", "--bf16", "--fp16", "--grad-reduce-in-bf16", "--mock-data"),
    *("--accumulate-allreduce-grads-in-fp32", "--megatron-fsdp-main-grads-dtype", "--transformer-impl"),
    *("--no-rope-fusion", "--no-create-attention-mask-in-dataloader", "--use-megatron-fsdp"),
)
"""Flags that are several fields here, or none as the recipe has it so: :func:`_apart`."""
DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16", "fp8": "torch.uint8"}
LISTS = ("--moe-layer-freq", "--window-attn-skip-freq", "--window-size")
USUAL: Mapping[str, Mapping[str, Any]] = {
    "model": {
        # Defaults of Megatron-LM's flags that the recipe does not have.
        "apply_rope_fusion": True,
        "bias_dropout_fusion": True,
        "persist_layer_norm": True,
        "should_pad_vocab": False,
        "cross_entropy_loss_fusion": False,
    },
    "checkpoint": {"save": None, "load": None},
    "scheduler": {"lr_warmup_iters": 0},
    "optimizer": {"min_lr": 0.0},
}


def export(subject: Subject, version: str, settings: Mapping[str, str]) -> Export:
    """A plan as ``overrides.yaml`` and ``train.py``. Raises NotExpressible for what cannot be told."""
    import yaml

    values = values_of(subject, CORE, settings)
    _check(subject)
    header = subject.header(also=(f"for Megatron-Bridge {version}, megatron-core {CORE}",))
    return Export(
        target="megatron-bridge",
        version=version,
        files={
            OVERRIDES: header + yaml.safe_dump(overrides(subject, values), sort_keys=False),
            SCRIPT: rendered(
                "megatron_bridge_train.py.jinja",
                header=header,
                overrides=OVERRIDES,
                types=dict(_types(values)),
            ),
        },
        env=environment(subject),
        program=(SCRIPT,),
        notes=tuple(notes_of(subject, settings)),
    )


def _types(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Types that YAML cannot state: of fields that are None, or that its words have no name for."""
    if (gradient := values.get("--megatron-fsdp-main-grads-dtype")) is not None:
        yield "ddp.megatron_fsdp_main_grads_dtype", DTYPES[gradient]
    if values.get("--exp-avg-dtype") == "fp8":
        yield "optimizer.exp_avg_dtype", DTYPES["fp8"]
        yield "optimizer.exp_avg_sq_dtype", DTYPES["fp8"]


def _check(subject: Subject) -> None:
    model = subject.model
    if model.latent or model.delta or is_hybrid(model):
        part = "latent attention" if model.latent else "state spaces or delta nets"
        raise NotExpressible(
            f"{part}: the recipe vanilla_gpt_pretrain_config has plain attention only: use --to megatron"
        )
    if model.position_embedding == "learned" and model.max_position_embeddings != subject.job.seq_length:
        raise NotExpressible(
            f"{model.max_position_embeddings} learned positions with sequences of {subject.job.seq_length}: "
            "Megatron-Bridge has as many as a sequence has tokens: use --to megatron",
            {"seq_length": model.max_position_embeddings},
        )
    if subject.options()["attention"] == "eager":
        raise NotExpressible(
            "attention=eager: Megatron-Bridge's models are Transformer Engine's",
            {"option": {"attention": "flash"}},
        )


def overrides(subject: Subject, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The recipe's fields that the plan changes, by their part."""
    found: dict[str, dict[str, Any]] = {part: dict(fields) for part, fields in USUAL.items()}
    stated = [
        (path_of(flag, group), _value(flag, values[flag.name]))
        for group, flags in GROUPS.items()
        for flag in flags
        if flag.name in values and flag.name not in APART
    ]
    for path, value in (*stated, *_apart(subject, values)):
        part, _, name = path.partition(".")
        if value is not None:
            found.setdefault(part, {})[name] = value
    return found


def path_of(flag: Flag, group: str) -> str:
    """The field that a flag is, as in ``model.tensor_model_parallel_size``."""
    return PATHS.get(flag.name) or f"{OF_GROUP[group]}.{flag.dest}"


def _value(flag: Flag, value: Any) -> Any:
    """A flag's value as YAML has it; None where the recipe's own holds."""
    if flag.kind == "switch":
        stands = value == flag.when
        return stands if not flag.name.startswith(("--no-", "--disable-", "--untie-")) else not stands
    if not (words := flag.written(value)):
        return None
    if flag.name in LISTS:
        return [int(word) for word in words[1].strip("[]").split(",")]
    if flag.name in ("--exp-avg-dtype", "--exp-avg-sq-dtype"):
        return DTYPES[words[1]] if words[1] != "fp8" else None  # _types
    if flag.kind == "integer":
        return int(words[1])
    if flag.kind == "number":
        return float(words[1])
    if flag.kind == "words" and flag.name != "--cp-comm-type":
        return [int(word) if word.isdigit() else _literal(word) for word in words[1:]]
    return _literal(words[1])


def _literal(word: str) -> str:
    """A text that OmegaConf, which reads the file, takes as it is: without interpolation.

    >>> _literal("run${oc.env:HOME}")
    'run\\\\${oc.env:HOME}'
    """
    return word.replace("${", "\\${")


def _apart(subject: Subject, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    job, model = subject.job, subject.model
    half = "fp16" if "--fp16" in values else "bf16" if "--bf16" in values else "fp32"
    yield "mixed_precision.bf16", half == "bf16"
    yield "mixed_precision.fp16", half == "fp16"
    yield "mixed_precision.params_dtype", DTYPES[half]
    yield "mixed_precision.pipeline_dtype", DTYPES[half]
    yield "mixed_precision.grad_reduce_in_fp32", job.recipe.gradient == 4
    yield "model.gated_linear_unit", model.gated_mlp
    if model.gated_mlp or model.hidden_act == "relu2":
        act = "squared_relu" if not model.gated_mlp else "quick_gelu" if "--quick-geglu" in values else "silu"
        yield "model.activation_func", act
    fused = job.training.options.get("swiglu") != "unfused" and model.hidden_act != "relu2"
    yield "model.bias_activation_fusion", fused and (model.gated_mlp or model.mlp_bias)
    yield "dataset.seq_length", job.seq_length
    for part in ("ddp", "dist"):
        yield f"{part}.use_megatron_fsdp", "--use-megatron-fsdp" in values
    shares = subject.layout.sharding in ("zero1", "zero2", "fsdp")
    for part in ("ddp", "optimizer"):
        yield f"{part}.use_distributed_optimizer", shares
    if "--cpu-offloading-num-layers" in values:
        yield "model.cpu_offloading", True
    if BY_NAME["--cp-comm-type"].name not in values:
        yield "model.cp_comm_type", "p2p"
