"""How a plan trains, in Megatron-LM's flags: batch, precision, recomputation, optimizer, kernels, offload.

Sources: megatron-core 0.17.0, 0.18.0 and 0.19.2, training/arguments.py, core/optimizer/optimizer_config.py,
core/transformer/transformer_config.py, core/transformer/transformer_block.py (``_checkpointed_forward``),
core/optimizer/cpu_offloading/hybrid_optimizer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

from planner.export.base import NotExpressible, Subject
from planner.export.megatron_flags import KERNELS, MODULES, QUANTIZED
from planner.ledger import held_layers, view
from planner.order import order_of
from planner.plan import priced_again
from strategies.base import Role
from strategies.offload import Way, places_of

OPTIMIZERS = {"adamw": 0.0, "adam": 0.0, "momentum": 0.9, "sgd": 0.0}
"""Optimizers that can be told, with the momentum of SGD."""


def training_values(subject: Subject, version: str) -> dict[str, Any]:
    """What every flag of the training is for a plan, by its name. Raises NotExpressible."""
    _check(subject)
    training, layout = subject.job.training, subject.layout
    capacity = training.expert_capacity_factor
    found: dict[str, Any] = {
        "--micro-batch-size": layout.micro_batch_size,
        "--global-batch-size": layout.global_batch_size,
        "--seq-length": subject.job.seq_length,
    }
    if capacity is not None:
        found |= {"--moe-expert-capacity-factor": capacity, "--moe-pad-expert-input-to-capacity": True}
    for part in (_precision, _recompute, _optimizer, _offload):
        found |= dict(part(subject))
    return found | dict(_kernels(subject, version))


def _check(subject: Subject) -> None:
    training = subject.plan.training
    if training.adapters or training.frozen != type(training.frozen)():
        raise NotExpressible(
            "adapters or frozen weights: pretrain_gpt.py trains all weights, and has no flags for others"
        )


def _precision(subject: Subject) -> Iterator[tuple[str, Any]]:
    job, training = subject.job, subject.plan.training
    precision = str(job.training.precision)
    half = {"fp16": "fp16"}.get(precision, "bf16")
    fsdp = subject.layout.sharding in ("zero2", "fsdp")
    if precision == "tf32":
        raise NotExpressible(
            "precision=tf32: Megatron-LM has no switch for TF32, which its kernels choose themselves",
            {"precision": "bf16"},
        )
    if precision == "fp32" and job.training.options["attention"] != "eager":
        raise NotExpressible(
            "precision=fp32 with attention=flash: no fused attention takes fp32",
            {"option": {"attention": "eager"}},
        )
    if precision != "fp32":
        yield f"--{half}", precision if half == "fp16" else True
    if precision in QUANTIZED:
        yield "--fp8-format", "hybrid"
        yield "--fp8-recipe", precision
        yield "--fp8-param-gather", subject.options()["fp8_param_gather"]
    if precision == "mxfp8":
        yield "--reuse-grad-buf-for-mxfp8-param-ag", subject.options()["fp8_param_gather"]
    if precision == "nvfp4":
        yield "--fp4-format", "e2m1"
        yield "--fp4-recipe", precision
    wide = job.recipe.gradient == 4
    given = training.gradient_dtype
    if (precision != "fp32" and given not in (None, "fp32", half)) or (precision == "fp32" and not wide):
        raise NotExpressible(
            f"gradient_dtype={given} with precision={precision}: Megatron-LM has gradients of fp32, or of "
            "the weights' type",
            {"gradient_dtype": "fp32"},
        )
    if fsdp:
        yield "--megatron-fsdp-main-grads-dtype", "fp32" if wide else half
    if half == "bf16" and not wide:
        yield "--grad-reduce-in-bf16", "bf16"
    if half == "fp16" and wide:
        yield "--accumulate-allreduce-grads-in-fp32", "fp32"
    if (job.recipe.master == 0) != (precision == "fp32"):
        raise NotExpressible(
            f"master_weights={training.master_weights} with precision={precision}: Megatron-LM keeps an fp32 "
            "copy of weights in half precision, and none of others",
            {"master_weights": ""} if precision != "fp32" else None,
        )
    if (moment := training.optimizer_dtype) not in (None, "fp32"):
        if subject.layout.sharding != "zero1" or training.optimizer not in ("adam", "adamw"):
            raise NotExpressible(
                f"optimizer_dtype={moment}: --use-precision-aware-optimizer is of Adam with the distributed "
                "optimizer",
                {"sharding": "zero1"},
            )
        yield "--use-precision-aware-optimizer", True
        yield "--exp-avg-dtype", moment
        yield "--exp-avg-sq-dtype", moment


def _recompute(subject: Subject) -> Iterator[tuple[str, Any]]:
    options = subject.options()
    if options.get("swiglu") == "recomputed" and subject.model.gated_mlp:
        raise NotExpressible(
            "swiglu=recomputed: Megatron-LM runs a dense MLP's activation again with the whole MLP only",
            {"option": {"mlp": "recomputed"}},
        )
    policy, count = subject.recompute("Megatron-LM")
    policy = Way.of(policy).recompute
    modules = [name for name, (option, value) in MODULES.items() if options.get(option) == value]
    if "moe_act" in modules and options["attention"] == "eager":
        raise NotExpressible(
            "moe_act=recomputed with attention=eager: it takes --moe-grouped-gemm, which is Transformer "
            "Engine's",
            {"option": {"attention": "flash"}},
        )
    if policy == "selective":
        if count is not None:
            raise NotExpressible(
                f"recompute=selective of {count} layers of a chunk: Megatron-LM does so for all or none",
                {"recompute": "selective"},
            )
        modules.insert(0, "core_attn")
    if policy == "full":
        if modules:
            raise NotExpressible(
                f"{', '.join(f'{MODULES[name][0]}=recomputed' for name in modules)} with recompute=full: "
                "--recompute-modules is of selective recomputation, and there is one granularity in all",
                {"recompute": "none"},
            )
        if count is not None:
            _check_first(subject, count)
        yield "--recompute-granularity", "full"
        yield "--recompute-method", "uniform" if count is None else "block"
        yield "--recompute-num-layers", 1 if count is None else count
    elif modules:
        yield "--recompute-granularity", "selective"
        yield "--recompute-modules", tuple(modules)


def _check_first(subject: Subject, count: int) -> None:
    """Raises NotExpressible unless it is the first ``count`` layers of each chunk that are recomputed.

    Of equal layers it does not matter which; of unlike ones it does.
    """
    order = order_of(subject.job.blocks, subject.layout)
    if len(order.rows) == 1:
        return
    start = 0
    for index, stage in enumerate(subject.plan.stages):
        own = {way.partition("+")[0]: rows for way, rows in stage.rows.items()}
        length = sum(map(sum, own.values()))
        first = order.sequence[start : start + min(count, length)]
        start += length
        wanted = tuple(first.count(kind) for kind in range(len(order.rows)))
        if own.get("full", (0,) * len(wanted)) != wanted:
            raise NotExpressible(
                f"recompute=full of chosen layers on stage {index}: Megatron-LM recomputes the first of "
                "every chunk, and the plan has unlike layers among them",
                {"recompute": f"full:{count}"},
            )


def _optimizer(subject: Subject) -> Iterator[tuple[str, Any]]:
    name = subject.plan.training.optimizer
    if name not in OPTIMIZERS:
        raise NotExpressible(
            f"optimizer={name} is not planned as Megatron-LM has it: use {', '.join(OPTIMIZERS)}",
            {"optimizer": "adamw"},
        )
    yield "--optimizer", name
    if name in ("momentum", "sgd"):
        yield "--sgd-momentum", OPTIMIZERS[name]


def _offload(subject: Subject) -> Iterator[tuple[str, Any]]:
    plan, layout = subject.plan, subject.layout
    whole = places_of(layout.offload)
    counted = {name for stage in plan.stages for name, count in stage.offload.items() if count}
    if other := sorted({*whole, *counted} - {"optimizer", "activations"}):
        raise NotExpressible(f"offload of {', '.join(other)}: Megatron-LM offloads optimizer and activations")
    if any(place != "host" for place in whole.values()):
        raise NotExpressible("offload to NVMe: Megatron-LM offloads to the host's memory")
    if "optimizer" in counted or "optimizer" in whole:
        if plan.training.optimizer not in ("adam", "adamw"):
            raise NotExpressible(
                f"offload of the states of optimizer={plan.training.optimizer}: --optimizer-cpu-offload is "
                "of Adam, as the precision-aware optimizer is that it needs",
                {"optimizer": "adamw"},
            )
        yield "--optimizer-cpu-offload", True
        yield "--use-precision-aware-optimizer", True
        if "optimizer" not in whole:
            yield "--optimizer-offload-fraction", offload_fraction(subject)
    if "activations" in counted:
        if layout.pipeline_parallel > 1 or dict(_recompute(subject)):
            raise NotExpressible(
                "offload of activations with a pipeline or recomputation: --cpu-offloading-num-layers takes "
                "neither",
                {"recompute": "none"},
            )
        yield "--cpu-offloading-num-layers", plan.stages[0].offload["activations"]


def offload_fraction(subject: Subject) -> float:
    """The part of a stage's parameters whose optimizer states lie on the host, of the stage with most of it.

    Megatron-LM takes one fraction for all ranks and offloads the first parameters up to it; rounded up to
    four digits, so that no GPU has more than planned.
    """
    prices, rows = priced_again(subject.job, subject.plan)
    most = 0.0
    for index in range(len(rows)):
        held, moved = 0.0, 0.0
        for layer, way, count in held_layers(prices, view(prices, rows, index)):
            size = count * sum(float(term.elements) for term in layer.by_role[Role.PARAMETER])
            held += size
            moved += size * ("optimizer" in Way.of(way).offload)
        most = max(most, moved / held)
    return ceil(most * 10_000) / 10_000


def _kernels(subject: Subject, version: str) -> Iterator[tuple[str, Any]]:
    options, layout, model = subject.options(), subject.layout, subject.model
    eager = options["attention"] == "eager"
    for flag in KERNELS:
        if not flag.rule and (value := options.get(flag.of.removeprefix("option."))) is not None:
            yield flag.name, value
    if not model.gated_mlp:
        yield "--no-bias-swiglu-fusion", "fused"
    if eager and model.norm == "rmsnorm":
        if layout.sequence_parallel:
            raise NotExpressible(
                "attention=eager with RMSNorm and sequence_parallel: PyTorch's norms, which Megatron-LM "
                "takes without Transformer Engine, refuse it (core/transformer/torch_norm.py)",
                {"option": {"attention": "flash"}},
            )
        yield "--no-persist-layer-norm", True
    if options.get("loss") == "fused":
        if version not in ("0.17", "0.18"):
            raise NotExpressible(
                f"loss=fused: Megatron-LM {version} refuses Transformer Engine's cross entropy",
                {"option": {"loss": "parallel"}},
            )
        yield "--cross-entropy-fusion-impl", "te"
    if options.get("overlap") == "on" and layout.sharding != "ddp":
        yield "--overlap-param-gather", True
    if layout.tensor_parallel == 1:  # nothing is sent that could overlap, and the flag wants some
        yield "--tp-comm-overlap", "off"
    elif options.get("tp_comm_overlap") == "on" and not layout.sequence_parallel:
        raise NotExpressible(
            "tp_comm_overlap=on without sequence_parallel: Megatron-LM overlaps the one with the other only",
            {"option": {"tp_comm_overlap": "off"}},
        )
    if model.experts:
        yield "--moe-grouped-gemm", not eager
        yield "--moe-permute-fusion", not eager
