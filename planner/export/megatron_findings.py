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
from planner.export.megatron_findings_states import QUEUES, check_states
from planner.export.read_megatron_options import degrees_of, layout_layers
from planner.export.shell_expand import shown, unknown_in
from planner.model import ModelSpec

UNFUSED = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN")
"""Variables of Transformer Engine that switch its fused kernels of attention off."""
POSITIVE = (
    *("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"),
    *("--expert-model-parallel-size", "--expert-tensor-parallel-size", "--micro-batch-size"),
    *("--global-batch-size", "--seq-length", "--num-layers", "--hidden-size", "--num-attention-heads"),
    *("--num-query-groups", "--num-layers-per-virtual-pipeline-stage", "--recompute-num-layers"),
    "--num-virtual-stages-per-pipeline-rank",
)


def check(
    found: Arguments,
    model: ModelSpec | None,
    options: Mapping[str, Any],
    world_size: int | None,
    env: Mapping[str, str] | None,
) -> None:
    """Adds what is wrong to a command line's findings. ``env`` is None where no script says it."""
    degrees = degrees_of(found)
    _of_numbers(found)
    _of_world(found, degrees, world_size)
    _of_tensor(found, degrees)
    _of_pipeline(found, degrees, options)
    _of_context(found, degrees)
    _of_experts(found, degrees)
    _of_shape(found)
    _of_batch(found, options)
    _of_environment(found, degrees, env)
    check_states(found, degrees, options, model, env)
    _of_run(found)


def _of_numbers(found: Arguments) -> None:
    for name in POSITIVE:
        value = found.get(name)
        if value is not None and value < 1:
            found.add("error", name, f"{value} is less than 1", "use 1 or more")


def _of_world(found: Arguments, degrees: Mapping[str, int], world: int | None) -> None:
    if not world:
        return
    tp, pp, cp = (degrees[f"{name}_parallel"] for name in ("tensor", "pipeline", "context"))
    if world % (tp * pp * cp):
        found.add(
            "error",
            "world size",
            f"{world} processes are no multiple of {tp * pp * cp}: tensor {tp} x pipeline {pp} x context "
            f"{cp}",
            f"start a multiple of {tp * pp * cp} processes, or lower a degree",
        )
    etp, ep = degrees["expert_tensor_parallel"], degrees["expert_parallel"]
    if found.get("--num-experts") and world % (etp * ep * pp):
        found.add(
            "error",
            "--expert-model-parallel-size",
            f"{world} processes are no multiple of {etp * ep * pp}: expert tensor {etp} x expert {ep} x "
            f"pipeline {pp}",
            "add --expert-tensor-parallel-size 1"
            if etp > 1 and not world % (ep * pp)
            else f"start a multiple of {etp * ep * pp} processes, or lower a degree",
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
                f"is off with --tensor-model-parallel-size {tp}: each GPU keeps and norms whole sequences, "
                f"where {tp} could share them; as many bytes are sent either way",
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
    if text := found.get("--pipeline-model-parallel-layout"):
        _letters(found, text, layers, pp)
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
    group = found.get("--microbatch-group-size-per-virtual-pipeline-stage") or pp
    if virtual > 1 and (count < group or 0 < count % group < pp):
        found.add(
            "error",
            "--global-batch-size",
            f"{count} micro-batches are no multiple of {group} of the {pp} stages, which interleaving takes",
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


def _letters(found: Arguments, text: str, layers: int | None, pp: int) -> None:
    name = "--pipeline-model-parallel-layout"
    others = [
        flag
        for flag in ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")
        if found.get(flag) is not None
    ]
    others += [
        flag
        for flag in ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
        if found.on(flag)
    ]
    if others:
        found.add("error", name, f"says what {', '.join(others)} say", "keep one")
    parts = layout_layers(text)
    if parts is None or len(parts) % pp:
        count = "too many" if parts is None else len(parts)
        text = f"{count} parts between bars are no multiple of {pp} stages"
        found.add("error", name, text, f"use a multiple of {pp} parts")
    elif layers and sum(parts) != layers:
        text = f"{sum(parts)} letters t for {layers} layers"
        found.add("error", name, text, f"use {layers} letters t")


def _uneven(found: Arguments, layers: int, pp: int, first: int | None, last: int | None) -> None:
    others = pp - (first is not None) - (last is not None)
    left = layers - (first or 0) - (last or 0)
    if others < 0 or left < 0 or (others and left % others) or (not others and left):
        found.add(
            "error",
            "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers",
            f"leave {left} of {layers} layers for the {max(0, others)} stages between: they do not divide so",
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
            f"{length // cp} tokens of a GPU are no multiple of --tensor-model-parallel-size {tp}, over "
            "which --sequence-parallel cuts them",
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
    inner = degrees["tensor_parallel"] * degrees["context_parallel"]
    if found.on("--use-tp-pp-dp-mapping") and degrees["expert_tensor_parallel"] * ep != inner:
        found.add(
            "error",
            "--use-tp-pp-dp-mapping",
            f"takes expert tensor {degrees['expert_tensor_parallel']} x expert {ep} to be tensor x context, "
            f"{inner}: as many replicas of the experts as of the rest",
            "leave it out, or use other degrees",
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
    rotary = found.get("--position-embedding-type") == "rope" or found.on("--use-rotary-position-embeddings")
    if found.on("--no-position-embedding") and not rotary:
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
            f"{is_now}: with {' and '.join(cut)} Megatron-LM refuses all but 1 on GPUs before Blackwell, for "
            "the order in which messages and products start",
            f"export {QUEUES}=1",
        )
    off = [name for name in UNFUSED if env.get(name) == "0"]
    if len(off) == len(UNFUSED):
        found.add(
            "warning",
            ", ".join(off),
            "are 0: attention is unfused, and keeps the scores of all pairs of tokens",
            "leave one of them on",
        )


def _of_run(found: Arguments) -> None:
    if found.get("--train-iters") and found.get("--train-samples"):
        text = "are both given: Megatron-LM counts steps or sequences"
        found.add("error", "--train-iters, --train-samples", text, "keep one")
    if found.get("--save") and found.get("--save-interval") is None and "--save-interval" not in found.open:
        text = "takes --save-interval: Megatron-LM refuses it alone"
        found.add("error", "--save", text, "add --save-interval 1000")
