"""Inference: which tensor- and pipeline-parallel placements hold a model's weights and its cache.

What one GPU holds while it serves a model:

    weights + batch x cache of a sequence + working set of the heaviest moment + CUDA context and NCCL

and that has to stay within ``utilization`` of the GPU, the convention of vLLM (``--gpu-memory-utilization``,
0.9); the rest is the reserve for what is not derived here: CUDA graphs and fragmentation. Kwon et al. 2023,
arXiv:2309.06180, figure 1. What a rank holds of a term is :func:`strategies.base.held`, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from planner.errors import InputError
from planner.model import FROZEN, ModelSpec
from planner.serving import FORMATS, KV_BYTES, WIDTH, refusals, served, weight_terms
from planner.serving_rank import Rank, further_bytes, layers_of, prefill_seconds, token_bytes, token_seconds
from planner.specs import ClusterSpec
from planner.stacks.base import COMMUNICATOR, CONTEXT
from strategies.base import Layer
from strategies.tensor_parallel import TensorParallel

MOST_SEQUENCES = 2**20
"""Where the largest batch is looked for."""
Degree = Annotated[int, Field(ge=1)]


class InferenceSpec(BaseModel):
    """How a model is served. None means: the usual value, or all degrees.

    ``context`` is in tokens, prompt and answer together, of each of ``batch`` sequences; ``chunk_tokens`` is
    how many tokens one forward pass takes at most (vLLM's ``--max-num-batched-tokens``), ``block_size`` the
    tokens of a block of cache, ``utilization`` the part of the GPU that may be filled.
    """

    model_config = FROZEN

    context: int | None = Field(None, ge=1, le=100_000_000)
    batch: int = Field(1, ge=1, le=MOST_SEQUENCES)
    weights: Literal["bf16", "fp16", "fp8", "int8", "int4", "nf4"] = "bf16"
    kv: Literal["bf16", "fp16", "fp8", "int8"] = "bf16"
    tensor_parallel: tuple[Degree, ...] | None = None
    pipeline_parallel: tuple[Degree, ...] | None = None
    block_size: int = Field(16, ge=1, le=4096)
    chunk_tokens: int = Field(8192, ge=1, le=10_000_000)
    utilization: float = Field(0.9, gt=0, le=1)


@dataclass(frozen=True)
class Placement:
    """One tensor x pipeline placement: its fullest rank, and what would still fit. Bytes, tokens, seconds.

    ``stages`` has the components of a rank of each pipeline stage; ``token_s`` and ``prefill_s`` are lower
    bounds (None where the catalog lacks the peak that would bound them).
    """

    tensor_parallel: int
    pipeline_parallel: int
    replicas: int
    layers: tuple[int, ...]
    stages: tuple[dict[str, float], ...]
    fullest: int
    total_bytes: float
    capacity_bytes: float
    fits: bool
    kv_bytes_per_token: float
    cache_tokens: int
    largest_batch: int
    largest_context: int
    token_s: float
    prefill_s: float | None

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True)
class Inference:
    """The answer: placements, the best first, and why others cannot be."""

    model: str
    num_parameters: int
    gpu: str
    num_gpus: int
    context: int
    batch: int
    weights: str
    kv: str
    weight_bytes: float
    kv_bytes_per_token: float
    kv_bytes_per_further_token: float
    sequence_bytes: float
    placements: tuple[Placement, ...]
    refused: tuple[str, ...]
    changes: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Does any placement hold the batch at the context?"""
        return any(placement.fits for placement in self.placements)


def infer(model: ModelSpec, cluster: ClusterSpec, spec: InferenceSpec | None = None) -> Inference:
    """Which placements hold the batch at the context, the best first.

    The best: those that fit before the others, then the fewest GPUs a replica, then the most cache. Raises
    InputError for what is not modelled and where no degree that was asked for can be.
    """
    spec = spec or InferenceSpec()
    for reason in refusals(model):
        raise InputError(reason)
    refused: dict[str, None] = {}
    context, placements = ranked(model, cluster, spec, refused)
    whole = Rank(model, spec, 1, 1, 0)
    return Inference(
        model=model.name,
        num_parameters=model.num_parameters,
        gpu=cluster.gpu.name,
        num_gpus=cluster.num_gpus,
        context=context,
        batch=spec.batch,
        weights=spec.weights,
        kv=spec.kv,
        weight_bytes=whole.weights,
        kv_bytes_per_token=token_bytes(whole),
        kv_bytes_per_further_token=further_bytes(whole),
        sequence_bytes=whole.cache(context),
        placements=tuple(placements),
        refused=tuple(refused),
        changes=() if placements[0].fits else tuple(changes(model, cluster, spec, placements)),
        assumptions=tuple(assumptions(model, cluster, spec, context)),
    )


def ranked(
    model: ModelSpec, cluster: ClusterSpec, spec: InferenceSpec, refused: dict[str, None]
) -> tuple[int, list[Placement]]:
    """The context, and all placements, the best first. Raises InputError where there are none."""
    context = spec.context or model.max_position_embeddings
    if model.position_embedding == "learned" and context > model.max_position_embeddings:
        raise InputError(
            f"context {context} is more than the {model.max_position_embeddings} positions that {model.name} "
            f"has learned: use {model.max_position_embeddings} or less"
        )
    placements = [
        placement(model, cluster, spec, tensor, pipeline, context)
        for tensor, pipeline in shapes(model, cluster, spec, refused)
    ]
    if not placements:
        raise InputError(f"no placement on {cluster.num_gpus} GPUs: {'; '.join(refused)}")
    placements.sort(
        key=lambda one: (
            (0, one.gpus, -one.cache_tokens, one.pipeline_parallel)
            if one.fits
            else (1, one.total_bytes, 0, 0)
        )
    )
    return context, placements


def changes(
    model: ModelSpec, cluster: ClusterSpec, spec: InferenceSpec, placements: list[Placement]
) -> Iterator[str]:
    """What would fit on the same GPUs: a smaller batch or context, narrower weights or cache."""
    if spec.batch > 1 and (batch := max(one.largest_batch for one in placements)):
        yield f"--batch {batch}"
    if context := max(one.largest_context for one in placements):
        yield f"--batch 1 --context {context}"
    tries: list[dict[str, str]] = [{"kv": "fp8"}, {"weights": "fp8"}, {"weights": "int4"}]
    tries += [{"weights": "int4", "kv": "fp8"}]
    for change in tries:
        if all(getattr(spec, name) != value for name, value in change.items()):
            try:
                _, found = ranked(model, cluster, spec.model_copy(update=change), {})
            except InputError:
                continue
            if found[0].fits:
                yield " ".join(f"--{name} {value}" for name, value in change.items())
                return


def shapes(
    model: ModelSpec, cluster: ClusterSpec, spec: InferenceSpec, refused: dict[str, None]
) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline degrees that can be; why the others cannot goes into ``refused``."""
    gpus, depth = cluster.num_gpus, model.num_hidden_layers
    for tensor in spec.tensor_parallel or divisors(gpus, cluster.domain):
        for why in tensor_objections(model, cluster, spec, tensor):
            refused[why] = None
            break
        else:
            for pipeline in spec.pipeline_parallel or divisors(gpus // tensor, depth):
                if tensor * pipeline > gpus:
                    refused[f"TP{tensor} PP{pipeline} needs {tensor * pipeline} GPUs, there are {gpus}"] = (
                        None
                    )
                elif pipeline > depth:
                    refused[f"pipeline_parallel={pipeline} is more than the {depth} layers"] = None
                else:
                    yield tensor, pipeline


def divisors(number: int, most: int) -> list[int]:
    """Divisors of a number up to ``most``."""
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def tensor_objections(
    model: ModelSpec, cluster: ClusterSpec, spec: InferenceSpec, tensor: int
) -> Iterator[str]:
    """Why a tensor-parallel degree cannot be used."""
    if tensor > cluster.num_gpus:
        yield f"tensor_parallel={tensor} is more than the {cluster.num_gpus} GPUs"
    if tensor > cluster.domain:
        yield f"tensor_parallel={tensor} would leave its node of {cluster.domain} GPUs"
    for block in model.block_kinds:
        for term in weight_terms(model, block, spec.weights, tensor):
            yield from TensorParallel(tensor).objections([Layer("block", (term,))])
        yield from FORMATS[spec.weights].objections(served(model, block, tensor), tensor)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, if all smaller ones do too; 0 if none."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def placement(
    model: ModelSpec, cluster: ClusterSpec, spec: InferenceSpec, tensor: int, pipeline: int, context: int
) -> Placement:
    """Prices one placement."""
    ranks = [Rank(model, spec, tensor, pipeline, stage) for stage in range(pipeline)]
    capacity = cluster.capacity_bytes * spec.utilization
    stages = [rank.components(spec.batch, context) for rank in ranks]
    totals = [sum(stage.values()) for stage in stages]

    def fits(batch: int, length: int) -> bool:
        return all(rank.total(batch, length) <= capacity for rank in ranks)

    rooms = []
    for rank, stage in zip(ranks, stages, strict=True):
        room = capacity - (sum(stage.values()) - stage["kv_cache"]) - rank.ahead(context)
        sequence = rank.cache(context)
        if sequence:
            rooms.append(max(0.0, room / sequence) * context)
    tokens = int(min(rooms, default=0.0)) // spec.block_size * spec.block_size
    return Placement(
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        replicas=cluster.num_gpus // (tensor * pipeline),
        layers=layers_of(model.num_hidden_layers, pipeline),
        stages=tuple(stages),
        fullest=totals.index(max(totals)),
        total_bytes=max(totals),
        capacity_bytes=capacity,
        fits=max(totals) <= capacity,
        kv_bytes_per_token=max(token_bytes(rank) for rank in ranks),
        cache_tokens=tokens,
        largest_batch=largest(lambda batch: fits(batch, context), MOST_SEQUENCES),
        largest_context=largest(lambda length: fits(1, length), model.max_position_embeddings),
        token_s=token_seconds(cluster, ranks, spec.batch, context),
        prefill_s=prefill_seconds(cluster, ranks, context),
    )


def assumptions(model: ModelSpec, cluster: ClusterSpec, spec: InferenceSpec, context: int) -> Iterator[str]:
    """Everything that was taken for granted, one line each."""
    yield from cluster.assumptions
    if spec.context is None:
        yield f"context {context}: all positions of the model"
    elif context > model.max_position_embeddings:
        yield f"context {context} is beyond the model's {model.max_position_embeddings} positions"
    yield f"weights {spec.weights}: {FORMATS[spec.weights].note}"
    if FORMATS[spec.weights].element < WIDTH:
        yield "embedding, head, norms, biases and routers stay in half precision"
    if model.latent:
        yield "attention is absorbed: latents and rotary keys are cached, whole on every tensor-parallel rank"
        if FORMATS[spec.weights].element < WIDTH:
            yield "a copy of the latents' expansions in half precision, as absorbed attention needs"
    elif any(block.mixer in ("full", "window") for block in model.block_kinds):
        yield "fewer key and value heads than tensor-parallel ranks are repeated on them"
    if any(block.mixer in ("mamba", "delta") for block in model.block_kinds):
        yield "states of state spaces and delta nets in half precision, no growth with the context"
    if KV_BYTES[spec.kv] < WIDTH:
        yield f"cache {spec.kv}: the scales, 8 bytes in each layer, are not counted"
    yield f"cache in blocks of {spec.block_size} tokens; no sharing of prefixes between sequences"
    yield (
        f"at most {spec.chunk_tokens} tokens a forward pass; results of one part of a block alive at once; "
        "tokens drawn with top-k and top-p by sorting"
    )
    yield f"{CONTEXT.name}: {CONTEXT.most / 2**30:.1f} GiB ({CONTEXT.tag}, the most that is usual)"
    yield f"{COMMUNICATOR.name}: {COMMUNICATOR.most / 2**30:.1f} GiB ({COMMUNICATOR.tag}, likewise)"
    yield (
        f"{1 - spec.utilization:.0%} of the GPU is left free for CUDA graphs, whose size is not known here, "
        "and fragmentation"
    )
    if model.mtp_layers:
        yield f"the {model.mtp_layers} blocks that predict further tokens are not loaded"
