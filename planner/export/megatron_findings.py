"""What is wrong or wasteful in a command line of Megatron-LM, before a GPU is there to say so.

Each rule reads the flags as they were given, so that it holds too where no model or plan can be made of them.
Sources, of megatron-core 0.19.2: training/arguments.py (``validate_args``), core/transformer/
transformer_config.py, core/model_parallel_config.py and core/optimizer/optimizer_config.py (their
``__post_init__``), core/parallel_state.py, core/pipeline_parallel/schedules.py, core/transformer/moe/
moe_layer.py. Common ones are listed in NVIDIA/Megatron-LM pull request 5768.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.export.megatron_arguments import Arguments
from planner.export.read_megatron_options import degrees_of
from planner.export.shell_expand import shown, unknown_in
from planner.model import ModelSpec
from planner.units import human_bytes

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
LARGE_MASK = 16 * 2**20
"""Bytes from which a mask of attention is worth a word."""
STATES = 12
"""Bytes of fp32 weights and Adam's moments of a parameter."""


def check(
    found: Arguments,
    model: ModelSpec | None,
    options: Mapping[str, Any],
    world_size: int | None,
    env: Mapping[str, str] | None,
) -> None:
    """Adds what is wrong to a command line's findings. ``env`` is None where no script says it."""
    degrees = degrees_of(found)
    _of_world(found, degrees, world_size)
    _of_tensor(found, degrees)
    _of_pipeline(found, degrees, options)
    _of_context(found, degrees)
    _of_experts(found, degrees)
    _of_shape(found)
    _of_batch(found, options)
    _of_precision(found)
    _of_recompute(found, options)
    _of_optimizer(found, degrees, options, model)
    _of_fsdp(found, degrees, env)
    _of_environment(found, degrees, env)
    _of_memory(found, degrees, model)
    _of_run(found)


def _of_world(found: Arguments, degrees: Mapping[str, int], world: int | None) -> None:
    if not world:
        return
    tp, pp, cp = (degrees[f"{name}_parallel"] for name in ("tensor", "pipeline", "context"))
    if world % (tp * pp * cp):
        found.add(
            "error",
            "world size",
            f"{world} processes are no multiple of {tp * pp * cp}: tensor {tp} x pipeline {pp} x context {cp}",
            f"start a multiple of {tp * pp * cp} processes, or lower a degree",
        )
    etp, ep = degrees["expert_tensor_parallel"], degrees["expert_parallel"]
    if found.get("--num-experts") and world % (etp * ep * pp):
        found.add(
            "error",
            "--expert-model-parallel-size",
            f"{world} processes are no multiple of {etp * ep * pp}: expert tensor {etp} x expert {ep} x "
            f"pipeline {pp}",
            f"start a multiple of {etp * ep * pp} processes, or lower a degree",
        )


def _of_tensor(found: Arguments, degrees: Mapping[str, int]) -> None:
    tp = degrees["tensor_parallel"]
    heads, hidden = found.get("--num-attention-heads"), found.get("--hidden-size")
    groups = found.get("--num-query-groups")
    if heads and heads % tp:
        found.add(
            "error",
            "--tensor-model-parallel-size",
            f"{heads} attention heads are no multiple of {tp}",
            f"use a divisor of {heads}",
        )
    if groups and not found.on("--group-query-attention") and groups != heads:
        found.add(
            "warning",
            "--num-query-groups",
            f"{groups} groups count with --group-query-attention only: every head has keys and values of its "
            "own",
            "add --group-query-attention, or leave it out",
        )
    if found.on("--group-query-attention"):
        groups = groups or 1
        if found.on("--multi-latent-attention"):
            found.add(
                "error",
                "--group-query-attention",
                "latent attention has no groups: Megatron-LM refuses both",
                "leave it out",
            )
        elif heads and heads % groups:
            text = f"{groups} groups do not divide {heads} heads"
            found.add("error", "--num-query-groups", text, f"use a divisor of {heads}")
        elif groups % tp and tp % groups:
            found.add(
                "error",
                "--num-query-groups",
                f"{groups} groups are neither a multiple nor a divisor of --tensor-model-parallel-size {tp}",
                f"use a tensor-parallel degree that divides {groups}",
            )
        elif groups < tp:
            found.add(
                "waste",
                "--tensor-model-parallel-size",
                f"{groups} groups of keys and values over {tp} GPUs: each is kept {tp // groups} times",
                f"use {groups} or less",
            )
    if hidden and heads and found.get("--kv-channels") is None and hidden % heads:
        text = f"{hidden} is no multiple of {heads} attention heads"
        found.add("error", "--hidden-size", text, "give --kv-channels, or another number of heads")
    if found.on("--sequence-parallel") and tp == 1:
        found.add(
            "warning",
            "--sequence-parallel",
            "has no effect with --tensor-model-parallel-size 1: Megatron-LM switches it off",
            "leave it out",
        )
    if not found.on("--sequence-parallel") and tp > 1:
        if found.get("--num-experts"):
            found.add(
                "error",
                "--sequence-parallel",
                f"experts with --tensor-model-parallel-size {tp} train with it only",
                "add --sequence-parallel",
            )
        else:
            found.add(
                "waste",
                "--sequence-parallel",
                f"is off with --tensor-model-parallel-size {tp}: each GPU keeps and norms the whole sequence, "
                f"where {tp} could share it; as many bytes are sent either way",
                "add --sequence-parallel",
            )
        if found.on("--tp-comm-overlap"):
            text = "overlaps messages with products with --sequence-parallel only"
            found.add("error", "--tp-comm-overlap", text, "add --sequence-parallel, or leave it out")


def _of_pipeline(found: Arguments, degrees: Mapping[str, int], options: Mapping[str, Any]) -> None:
    pp, layers = degrees["pipeline_parallel"], found.get("--num-layers")
    each = found.get("--num-layers-per-virtual-pipeline-stage")
    ways = (
        "--num-layers-per-virtual-pipeline-stage",
        "--num-virtual-stages-per-pipeline-rank",
        "--pipeline-model-parallel-layout",
    )
    given = [name for name in ways if found.get(name) is not None]
    if len(given) > 1:
        found.add("error", ", ".join(given), "say the same: Megatron-LM takes one of them", "keep one")
    virtual = found.get("--num-virtual-stages-per-pipeline-rank") or 1
    first = found.get("--decoder-first-pipeline-num-layers")
    last = found.get("--decoder-last-pipeline-num-layers")
    extra = found.on("--account-for-embedding-in-pipeline-split") + found.on(
        "--account-for-loss-in-pipeline-split"
    )
    free = "--pipeline-model-parallel-layout" in given or found.get("--hybrid-layer-pattern")
    if layers and not free:
        total = layers + extra
        if first is None and last is None and total % pp:
            near = pp * round(layers / pp) or pp
            found.add(
                "error",
                "--pipeline-model-parallel-size",
                f"{layers} layers{' and what counts as one' if extra else ''} are no multiple of {pp} stages",
                f"use {near} layers or a degree that divides them, --decoder-first-pipeline-num-layers, or "
                "--pipeline-model-parallel-layout",
            )
        elif first is not None or last is not None:
            _uneven(found, layers, pp, first, last)
        elif each and each > 0:
            if (total // pp) % each:
                found.add(
                    "error",
                    "--num-layers-per-virtual-pipeline-stage",
                    f"{each} layers do not divide the {total // pp} of a stage ({layers} over {pp} stages)",
                    f"use a divisor of {total // pp}",
                )
            virtual = total // pp // each
        if virtual > 1 and not each and not (total % pp) and first is None and (total // pp) % virtual:
            found.add(
                "error",
                "--num-virtual-stages-per-pipeline-rank",
                f"{virtual} chunks do not divide the {total // pp} layers of a stage",
                f"use a divisor of {total // pp}",
            )
    if each and (first is not None or last is not None):
        found.add(
            "error",
            "--num-layers-per-virtual-pipeline-stage",
            "does not go with layers of the first or last stage",
            "use --num-virtual-stages-per-pipeline-rank",
        )
    if virtual > 1 and pp == 1:
        found.add(
            "error",
            given[0] if given else "--num-virtual-stages-per-pipeline-rank",
            f"{virtual} chunks of one stage: interleaving takes --pipeline-model-parallel-size 2 or more",
            "leave it out, or use a pipeline",
        )
    elif virtual > 1 and pp == 2 and found.values.get("overlap_p2p_comm") is False:
        found.add(
            "error",
            "--no-overlap-p2p-communication",
            "interleaving over 2 stages takes overlapped messages",
            "leave it out, or use 3 stages or more",
        )
    batch, micro, data = (
        found.get("--global-batch-size"),
        found.get("--micro-batch-size"),
        options.get("data_parallel"),
    )
    if not (batch and micro and data and pp > 1) or batch % (micro * data):
        return
    count = batch // (micro * data)
    if virtual > 1 and count % pp:
        found.add(
            "error",
            "--global-batch-size",
            f"{count} micro-batches are no multiple of {pp} stages, which interleaving takes",
            f"use a batch of a multiple of {micro * data * pp}",
        )
    elif count < pp:
        idle = (pp - 1) / (count + pp - 1)
        found.add(
            "waste",
            "--global-batch-size",
            f"{count} micro-batches for {pp} stages: the GPUs idle {idle:.0%} of a step",
            f"use a batch of {micro * data * pp} or more, smaller micro-batches or fewer stages",
        )


def _uneven(found: Arguments, layers: int, pp: int, first: int | None, last: int | None) -> None:
    others = pp - (first is not None) - (last is not None)
    left = layers - (first or 0) - (last or 0)
    if others < 0 or left < 0 or (others and left % others) or (not others and left):
        found.add(
            "error",
            "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers",
            f"leave {left} of {layers} layers for the {max(0, others)} stages between, which they do not divide",
            "give others, or --pipeline-model-parallel-layout",
        )


def _of_context(found: Arguments, degrees: Mapping[str, int]) -> None:
    cp, tp, length = degrees["context_parallel"], degrees["tensor_parallel"], found.get("--seq-length")
    positions = found.get("--max-position-embeddings")
    if length and cp > 1 and length % (2 * cp):
        found.add(
            "error",
            "--seq-length",
            f"{length} tokens are no multiple of {2 * cp}, twice --context-parallel-size {cp}",
            f"use {-(-length // (2 * cp)) * 2 * cp}",
        )
    elif length and found.on("--sequence-parallel") and (length // cp) % tp:
        found.add(
            "error",
            "--seq-length",
            f"{length // cp} tokens of a GPU are no multiple of --tensor-model-parallel-size {tp}, over which "
            "--sequence-parallel cuts them",
            f"use {-(-length // (cp * tp)) * cp * tp}",
        )
    if length and positions and length > positions:
        found.add(
            "error",
            "--seq-length",
            f"{length} tokens are more than --max-position-embeddings {positions}",
            f"use --max-position-embeddings {length}",
        )
    elif positions is None and found.get("--num-layers"):
        text = "is not given, and Megatron-LM takes no default for it"
        found.add("error", "--max-position-embeddings", text, f"use {length or 'the sequence length'}")


def _of_experts(found: Arguments, degrees: Mapping[str, int]) -> None:
    count, ep = found.get("--num-experts"), found.get("--expert-model-parallel-size") or 1
    if ep > 1 and not count:
        found.add(
            "error",
            "--expert-model-parallel-size",
            f"{ep} without experts: --num-experts is not given",
            "leave it out, or give --num-experts",
        )
    if not count:
        moe = [name for dest, name in found.names.items() if dest.startswith("moe_")]
        if moe:
            found.add("warning", ", ".join(moe[:6]), "have no effect without --num-experts", "leave them out")
        return
    if count % ep:
        found.add(
            "error",
            "--num-experts",
            f"{count} experts are no multiple of --expert-model-parallel-size {ep}",
            f"use a divisor of {count}",
        )
    topk = found.get("--moe-router-topk", 2)
    if topk > count:
        text = f"{topk} experts a token of {count}"
        found.add("error", "--moe-router-topk", text, f"use {count} or less")
    if not found.on("--moe-grouped-gemm") and count // max(1, ep) > 1:
        found.add(
            "waste",
            "--moe-grouped-gemm",
            f"is off: the {count // max(1, ep)} experts of a GPU run one after the other",
            "add --moe-grouped-gemm",
        )
    if found.get("--moe-token-dispatcher-type", "allgather") == "allgather" and ep > 1:
        found.add(
            "waste",
            "--moe-token-dispatcher-type",
            f"allgather sends every token to all {ep} GPUs of the experts",
            "use --moe-token-dispatcher-type alltoall",
        )


def _of_shape(found: Arguments) -> None:
    if found.on("--no-position-embedding") and found.get("--position-embedding-type") != "rope":
        if not found.on("--use-rotary-position-embeddings"):
            text = "is refused where positions are not rotary"
            found.add("error", "--no-position-embedding", text, "use --position-embedding-type none or rope")
    if found.on("--swiglu") and found.on("--squared-relu"):
        found.add("error", "--squared-relu", "is another activation than --swiglu", "keep one")
    if found.on("--swiglu") and found.get("--ffn-hidden-size") is None and found.get("--hidden-size"):
        width = int((4 * found.get("--hidden-size") * 2 / 3) / 64) * 64
        text = f"is not given: with --swiglu it is {width:,}, 8/3 of the hidden size"
        found.add("warning", "--ffn-hidden-size", text, "give the model's own")
    if found.on("--swiglu") and found.get("--hidden-dropout") is None:
        text = "is not given, and 0.1 is its default: models with --swiglu are mostly trained without"
        found.add("warning", "--hidden-dropout", text, "add --hidden-dropout 0.0 --attention-dropout 0.0")


def _of_batch(found: Arguments, options: Mapping[str, Any]) -> None:
    micro, batch = found.get("--micro-batch-size"), found.get("--global-batch-size")
    data = options.get("data_parallel")
    if micro is None and "--micro-batch-size" not in found.open and found.get("--num-layers"):
        text = "is not given, and Megatron-LM takes no default for it"
        found.add("error", "--micro-batch-size", text, "add --micro-batch-size 1")
    if batch and micro and data and batch % (micro * data):
        found.add(
            "error",
            "--global-batch-size",
            f"{batch} sequences are no multiple of {micro * data}: --micro-batch-size {micro} x {data} "
            "data-parallel replicas",
            f"use {max(1, round(batch / (micro * data))) * micro * data}",
        )
    if batch and found.get("--step-batch-size-schedule") is not None:
        text = "says the batch, as --global-batch-size does: Megatron-LM refuses both"
        found.add("error", "--step-batch-size-schedule", text, "keep one")


def _of_precision(found: Arguments) -> None:
    half = [name for name in ("--fp16", "--bf16") if found.on(name)]
    low = [name for name in ("--fp8-format", "--fp4-format") if found.get(name)]
    if len(half) > 1:
        found.add("error", "--fp16, --bf16", "exclude each other", "keep --bf16")
    if not half and found.get("--num-layers"):
        found.add(
            "waste",
            "--bf16",
            "is not given: it trains in fp32, with twice the bytes of activations and without tensor cores of "
            "half precision",
            "add --bf16",
        )
    if len(low) > 1:
        found.add("error", ", ".join(low), "exclude each other", "keep one")
    if low and found.get("--transformer-impl", "transformer_engine") == "local":
        text = "is Transformer Engine's: --transformer-impl local has none"
        found.add("error", low[0], text, "leave out --transformer-impl local")
    if not low and (recipe := found.get("--fp8-recipe")):
        text = f"{shown(recipe)} has no effect without --fp8-format"
        found.add("warning", "--fp8-recipe", text, "add --fp8-format hybrid")
    if found.on("--grad-reduce-in-bf16") and found.on("--accumulate-allreduce-grads-in-fp32"):
        text = "overrules --accumulate-allreduce-grads-in-fp32"
        found.add("warning", "--grad-reduce-in-bf16", text, "keep one")
    impl = found.get("--cross-entropy-fusion-impl")
    if found.on("--cross-entropy-loss-fusion") and impl == "te":
        found.add(
            "error",
            "--cross-entropy-fusion-impl",
            "te is refused by Megatron-LM 0.19, as not stable",
            "use native",
        )


def _of_recompute(found: Arguments, options: Mapping[str, Any]) -> None:
    kind, method = found.get("--recompute-granularity"), found.get("--recompute-method")
    number, modules = found.get("--recompute-num-layers"), found.get("--recompute-modules")
    if found.on("--recompute-activations") and kind == "full":
        text = "stands for selective, and overrules --recompute-granularity full"
        found.add("warning", "--recompute-activations", text, "leave it out for full")
        kind = "selective"
    elif found.on("--recompute-activations"):
        kind = "selective"
    if kind == "full":
        missing = [
            name
            for name, value in (("--recompute-method", method), ("--recompute-num-layers", number))
            if value is None and name not in found.open
        ]
        if missing:
            text = f"full takes {' and '.join(missing)} too"
            fix = "add --recompute-method uniform --recompute-num-layers 1"
            found.add("error", "--recompute-granularity", text, fix)
        if modules:
            text = "is of --recompute-granularity selective: with full it has no effect"
            found.add("warning", "--recompute-modules", text, "leave it out")
        _first_layers(found, method, number, options)
    elif kind == "selective":
        if method is not None:
            text = "is of --recompute-granularity full"
            found.add("error", "--recompute-method", text, "leave it out")
        if number is not None:
            text = "is of --recompute-granularity full"
            found.add("error", "--recompute-num-layers", text, "leave it out")
        if "core_attn" in (modules or ["core_attn"]) and "attention=flash" in options.get("option", ()):
            found.add(
                "waste",
                "--recompute-modules",
                "core_attn: fused attention keeps no scores, so that running it again saves next to nothing",
                "name other modules (layernorm, mlp, moe_act ...), or leave it out",
            )
        if modules and "moe_act" in modules and not found.on("--moe-grouped-gemm"):
            text = "moe_act takes --moe-grouped-gemm"
            found.add("error", "--recompute-modules", text, "add --moe-grouped-gemm")
        if modules and "mla_up_proj" in modules and not found.on("--multi-latent-attention"):
            text = "mla_up_proj is of latent attention"
            found.add("error", "--recompute-modules", text, "leave it out")
    else:
        alone = ("--recompute-method", "--recompute-num-layers", "--recompute-modules")
        if given := [name for name in alone if found.get(name) is not None]:
            text = "has no effect without --recompute-granularity: nothing is recomputed"
            found.add("warning", ", ".join(given), text, "add --recompute-granularity full or selective")
    if kind and found.get("--cpu-offloading-num-layers"):
        text = "does not go with recomputation"
        found.add("error", "--cpu-offloading-num-layers", text, "keep one")
    if found.on("--distribute-saved-activations"):
        if found.on("--sequence-parallel"):
            text = "is what --sequence-parallel does already: Megatron-LM refuses both"
            found.add("error", "--distribute-saved-activations", text, "leave it out")
        elif kind != "full":
            text = "takes --recompute-granularity full"
            found.add("error", "--distribute-saved-activations", text, "leave it out")


def _first_layers(
    found: Arguments, method: str | None, number: int | None, options: Mapping[str, Any]
) -> None:
    layers, pp = found.get("--num-layers"), options.get("pipeline_parallel", 1)
    if not (layers and number):
        return
    chunk = -(-layers // pp // options.get("chunks", 1))
    if number > chunk:
        what = "recomputes all of them" if method == "block" else "recomputes them as one"
        found.add(
            "warning",
            "--recompute-num-layers",
            f"{number} is more than the {chunk} layers of a chunk ({layers} over {pp} stages): Megatron-LM "
            f"{what}, and says nothing",
            f"use 1 to {chunk}",
        )


def _of_optimizer(
    found: Arguments, degrees: Mapping[str, int], options: Mapping[str, Any], model: ModelSpec | None
) -> None:
    sharded = found.on("--use-distributed-optimizer") or found.on("--use-megatron-fsdp")
    data = (options.get("data_parallel") or 1) * degrees["context_parallel"]
    if options.get("sharding") == "ddp" and data > 1 and options.get("optimizer") == "adamw":
        amount = ""
        if model is not None and options.get("precision") != "fp32":
            saved = per_gpu(model, degrees) * STATES * (1 - 1 / data)
            amount = f", about {human_bytes(int(saved))} a GPU more than shared out"
        found.add(
            "waste",
            "--use-distributed-optimizer",
            f"is off: each of {data} replicas keeps all optimizer states{amount}",
            "add --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        )
    if found.on("--overlap-param-gather"):
        if not sharded and found.get("--optimizer") != "dist_muon":
            text = "takes --use-distributed-optimizer"
            found.add("error", "--overlap-param-gather", text, "add --use-distributed-optimizer")
        elif not found.on("--overlap-grad-reduce"):
            text = "takes --overlap-grad-reduce"
            found.add("error", "--overlap-param-gather", text, "add --overlap-grad-reduce")
    elif found.on("--use-distributed-optimizer") and data > 1 and not found.on("--overlap-grad-reduce"):
        found.add(
            "waste",
            "--overlap-grad-reduce",
            "is off: gradients are sent when the backward is over, and parameters before the forward",
            "add --overlap-grad-reduce --overlap-param-gather",
        )
    aware = found.on("--use-precision-aware-optimizer")
    typed = [
        name
        for name in ("--exp-avg-dtype", "--exp-avg-sq-dtype", "--main-grads-dtype", "--main-params-dtype")
        if found.get(name, "fp32") != "fp32"
    ]
    if typed and not aware:
        text = "takes --use-precision-aware-optimizer"
        found.add("error", ", ".join(typed), text, "add --use-precision-aware-optimizer")
    if aware and not sharded:
        text = "takes --use-distributed-optimizer"
        found.add("error", "--use-precision-aware-optimizer", text, "add --use-distributed-optimizer")
    if found.on("--optimizer-cpu-offload") and not aware:
        text = "takes --use-precision-aware-optimizer"
        found.add("error", "--optimizer-cpu-offload", text, "add --use-precision-aware-optimizer")
    if found.on("--fp8-param-gather") and not (sharded or found.on("--use-torch-fsdp2")):
        text = "takes --use-distributed-optimizer"
        found.add("error", "--fp8-param-gather", text, "add --use-distributed-optimizer")


def per_gpu(model: ModelSpec, degrees: Mapping[str, int]) -> float:
    """Parameters on a GPU, about: even over stages, experts and tensor-parallel ranks."""
    routed = 0.0
    if model.experts:
        of_one = (3 if model.gated_mlp else 2) * model.hidden_size * model.experts.intermediate_size
        blocks = sum(block.mlp == "experts" for block in model.blocks)
        routed = blocks * model.experts.num_experts * of_one
    pp = degrees["pipeline_parallel"]
    own = (model.num_parameters - routed) / (degrees["tensor_parallel"] * pp)
    return own + routed / (degrees["expert_parallel"] * degrees["expert_tensor_parallel"] * pp)


def _of_fsdp(found: Arguments, degrees: Mapping[str, int], env: Mapping[str, str] | None) -> None:
    pp, ep = degrees["pipeline_parallel"], degrees["expert_parallel"]
    torch, own = found.on("--use-torch-fsdp2"), found.on("--use-megatron-fsdp")
    name = "--use-torch-fsdp2" if torch else "--use-megatron-fsdp"
    if torch:
        refused = [
            (pp > 1, f"does not go with --pipeline-model-parallel-size {pp}", "use 1, or --use-megatron-fsdp"),
            (ep > 1, f"does not go with --expert-model-parallel-size {ep}", "use 1, or --use-megatron-fsdp"),
            (
                found.on("--use-distributed-optimizer"),
                "does not go with --use-distributed-optimizer",
                "leave that out",
            ),
            (found.on("--fp16"), "does not go with --fp16", "use --bf16"),
            (
                not found.on("--untie-embeddings-and-output-weights"),
                "takes --untie-embeddings-and-output-weights",
                "add it",
            ),
            (
                found.values.get("gradient_accumulation_fusion") is not False,
                "takes --no-gradient-accumulation-fusion",
                "add it",
            ),
        ]
        for wrong, text, fix in refused:
            if wrong:
                found.add("error", name, text, fix)
    if own:
        if found.get("--ckpt-format", "torch_dist") != "fsdp_dtensor":
            found.add("error", name, "takes --ckpt-format fsdp_dtensor", "add --ckpt-format fsdp_dtensor")
        if found.get("--data-parallel-sharding-strategy", "no_shard") == "no_shard":
            found.add(
                "waste",
                "--data-parallel-sharding-strategy",
                "is not given: no_shard, which shares nothing out",
                "add --data-parallel-sharding-strategy optim_grads_params",
            )
        if pp > 1:
            text = f"with --pipeline-model-parallel-size {pp} is neither documented nor tested by Megatron-LM"
            found.add("warning", name, text, "use the distributed optimizer with a pipeline")
    elif found.get("--data-parallel-sharding-strategy"):
        text = "has no effect without --use-megatron-fsdp"
        found.add("warning", "--data-parallel-sharding-strategy", text, "add --use-megatron-fsdp")
    if (torch or own) and env is not None and env.get(QUEUES) == "1":
        text = f"is 1, which {name} refuses: its messages need queues of their own"
        found.add("error", QUEUES, text, f"unset {QUEUES}, or export {QUEUES}=8")


def _of_environment(found: Arguments, degrees: Mapping[str, int], env: Mapping[str, str] | None) -> None:
    if env is None:
        return
    cut = [
        f"--{flag} {degrees[name]}"
        for name, flag in (
            ("tensor_parallel", "tensor-model-parallel-size"),
            ("context_parallel", "context-parallel-size"),
        )
        if degrees[name] > 1
    ]
    value = env.get(QUEUES)
    sharded = found.on("--use-torch-fsdp2") or found.on("--use-megatron-fsdp")
    if cut and not sharded and value != "1" and not (value and unknown_in(value)):
        is_now = f"is {shown(value)}" if value else "is not set by the script"
        found.add(
            "warning",
            QUEUES,
            f"{is_now}: with {' and '.join(cut)} Megatron-LM refuses all but 1 on GPUs before Blackwell, for the "
            "order in which messages and products start",
            f"export {QUEUES}=1",
        )
    off = [name for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN") if env.get(name) == "0"]
    if len(off) == 2:
        found.add(
            "warning",
            ", ".join(off),
            "are 0: attention is unfused, and keeps the scores of all pairs of tokens",
            "leave one of them on",
        )


def _of_memory(found: Arguments, degrees: Mapping[str, int], model: ModelSpec | None) -> None:
    length, micro = found.get("--seq-length"), found.get("--micro-batch-size") or 1
    if length and found.values.get("create_attention_mask_in_dataloader") is not False and model is not None:
        size = micro * length * length
        if size >= LARGE_MASK:
            found.add(
                "waste",
                "--no-create-attention-mask-in-dataloader",
                f"is not given: a mask of {length} x {length} bytes for each sequence goes to the GPU, "
                f"{human_bytes(size)}, which is in no plan and which causal kernels do not read",
                "add --no-create-attention-mask-in-dataloader",
            )
    multiple, own = found.get("--make-vocab-size-divisible-by", 128), found.get("--vocab-size")
    padded = found.get("--padded-vocab-size")
    if own and padded is None and multiple > 0:
        cut = multiple * degrees["tensor_parallel"]
        padded = -(-own // cut) * cut
    if own and padded and padded > 1.02 * own:
        found.add(
            "waste",
            "--make-vocab-size-divisible-by",
            f"{own:,} entries of the vocabulary become {padded:,}: {padded / own - 1:.0%} of the embedding and "
            "the head are never used",
            "use a smaller multiple",
        )


def _of_run(found: Arguments) -> None:
    if found.get("--train-iters") and found.get("--train-samples"):
        text = "are both given: Megatron-LM counts steps or sequences"
        found.add("error", "--train-iters, --train-samples", text, "keep one")
    if found.get("--save") and found.get("--save-interval") is None and "--save-interval" not in found.open:
        text = "takes --save-interval: Megatron-LM refuses it alone"
        found.add("error", "--save", text, "add --save-interval 1000")
