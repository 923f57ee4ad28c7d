"""Inference: which tensor- and pipeline-parallel placements hold a model's weights and its cache.

What one GPU holds while it serves a model:

    weights + batch x cache of a sequence + working set of the heaviest moment + CUDA context and NCCL

and that has to stay within ``utilization`` of the GPU, the convention of vLLM (``--gpu-memory-utilization``,
0.9); the rest is the reserve for what is not derived here: CUDA graphs and fragmentation. Kwon et al. 2023,
arXiv:2309.06180, figure 1. What a rank holds of a term is :func:`strategies.base.held`, as in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import ceil, lcm
from typing import Literal

from pydantic import BaseModel, Field

from planner.errors import InputError
from planner.model import FROZEN, ModelSpec
from planner.serving import (
    FORMATS,
    HALF,
    KV_BYTES,
    WIDTH,
    cache_terms,
    mixer_of,
    product_terms,
    refusals,
    sampling_terms,
    weight_terms,
    working_terms,
)
from planner.specs import ClusterSpec
from planner.stacks.base import COMMUNICATOR, CONTEXT
from planner.weights import Weight, block_weights, embedding_weights, head_weights
from strategies.base import Layer, Term, held
from strategies.pipeline_parallel import PipelineParallel
from strategies.tensor_parallel import TensorParallel

VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to it: DEFAULT_VOCAB_PADDING_SIZE of layers/vocab_parallel_embedding.py."""
MOST_SEQUENCES = 2**20
"""Where the largest batch is looked for."""


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
    tensor_parallel: tuple[int, ...] | None = None
    pipeline_parallel: tuple[int, ...] | None = None
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


def layers_of(depth: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage as vLLM deals them out: what is left over goes to the stages before the last.

    get_pp_indices of vllm/distributed/utils.py.

    >>> layers_of(7, 3), layers_of(22, 4)
    ((2, 3, 2), (5, 6, 6, 5))
    """
    counts = [depth // stages] * stages
    for place in range(2, depth % stages + 2):
        counts[-place] += 1
    return tuple(counts)


class Rank:
    """One GPU of a pipeline stage: its terms, and bytes of them."""

    def __init__(self, model: ModelSpec, spec: InferenceSpec, tensor: int, pipeline: int, stage: int) -> None:
        self.model, self.spec, self.tensor, self.pipeline = model, spec, tensor, pipeline
        self.strategies = (TensorParallel(tensor), PipelineParallel(pipeline, stage=stage))
        self.first, self.last = self.strategies[1].ends
        counts = layers_of(model.num_hidden_layers, pipeline)
        start = sum(counts[:stage])
        self.blocks = Counter(model.blocks[start : start + counts[stage]])
        self.windows = [block for block in self.blocks if mixer_of(model, block) == "window"]
        self.weights = sum(self.held(self.weight_terms()))

    def held(self, terms: Iterable[Term]) -> Iterator[float]:
        """Bytes of each term on this GPU."""
        return (float(held(term, self.strategies)) for term in terms)

    def blocks_weights(self, active: bool = False) -> Iterator[Term]:
        """Weights of the stage's blocks; ``active``: those that one token passes through."""
        for block, count in self.blocks.items():
            for term in weight_terms(self.model, block, self.spec.weights, self.tensor, active):
                yield Term(term.name, term.role, {**term.dims, "layers": count}, term.unit)

    def ends(self, read: bool = False) -> Iterator[Term]:
        """Embedding and head, in half precision; ``read``: only what a step reads, so the head's matrix."""
        multiple = lcm(VOCABULARY_MULTIPLE, self.tensor)
        vocab = ceil(self.model.vocab_size / multiple) * multiple
        weights: list[Weight] = []
        if self.first and not read:
            weights += embedding_weights(self.model, vocab)
        if self.last:
            weights += head_weights(self.model, vocab, copies=1 if read or not self.first else 0)
        return (HALF.term(weight) for weight in weights)

    def weight_terms(self) -> Iterator[Term]:
        """Everything that is there before the first request."""
        yield from self.blocks_weights()
        yield from self.ends()
        if self.model.position_embedding == "rotary":
            latent = self.model.latent
            width = latent.qk_rope_head_dim if latent else self.model.head_dim
            yield HALF.of(
                "rotary cache", {"positions": self.model.max_position_embeddings, "head_dim": width}
            )

    def cache(self, context: int, block_size: int | None = None) -> float:
        """Cache of one sequence, in whole blocks of tokens."""
        size = self.spec.block_size if block_size is None else block_size
        width = KV_BYTES[self.spec.kv]
        return sum(
            count * sum(self.held(cache_terms(self.model, block, context, size, width, self.tensor)))
            for block, count in self.blocks.items()
        )

    def ahead(self, context: int) -> float:
        """Cache that the tokens of a chunk need besides the windows, before those move on to them."""
        if not self.windows or self.model.sliding_window is None:
            return 0.0
        tokens = min(self.spec.chunk_tokens, max(0, context - self.model.sliding_window))
        width = KV_BYTES[self.spec.kv]
        size = self.spec.block_size
        return sum(
            self.blocks[block]
            * sum(self.held(cache_terms(self.model, block, tokens, size, width, self.tensor)))
            for block in self.windows
        )

    def working(self, batch: int, context: int) -> float:
        """The larger of a block's forward over a chunk of prompt and of sampling a token per sequence."""
        tokens = min(self.spec.chunk_tokens, batch * context)
        sets = [
            sum(self.held(terms))
            for block in self.blocks
            for terms in working_terms(self.model, block, tokens, self.tensor)
        ]
        if self.last:
            sets.append(sum(self.held(sampling_terms(self.model, batch))))
        return max(sets)

    def components(self, batch: int, context: int) -> dict[str, float]:
        """Bytes of this GPU by component."""
        groups = (self.tensor > 1) + (self.pipeline > 1)
        return {
            "weights": self.weights,
            "kv_cache": batch * self.cache(context) + self.ahead(context),
            "working_set": self.working(batch, context),
            "cuda_and_nccl": CONTEXT.most + COMMUNICATOR.most * groups,
        }

    def total(self, batch: int, context: int) -> float:
        """Bytes of this GPU."""
        return sum(self.components(batch, context).values())


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
    """What would fit on the same GPUs: a smaller batch or context, fewer bytes a weight or a cached element."""
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
        terms = tuple(weight_terms(model, block, spec.weights, tensor))
        yield from TensorParallel(tensor).objections([Layer("block", terms)])
        yield from FORMATS[spec.weights].objections(block_weights(model, block), tensor)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, if all smaller ones do too; 0 if none."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def token_bytes(rank: Rank) -> float:
    """Bytes of cache for one more token within all windows."""
    return rank.cache(2, 1) - rank.cache(1, 1)


def further_bytes(rank: Rank) -> float:
    """Bytes of cache for one more token beyond all windows: what keeps growing."""
    far = (rank.model.sliding_window or 0) + 1
    return rank.cache(far + 1, 1) - rank.cache(far, 1)


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


def token_seconds(cluster: ClusterSpec, ranks: list[Rank], batch: int, context: int) -> float:
    """The least seconds between two tokens of a sequence: reading weights and cache, at the memory's best.

    Each stage reads its weights once for each of at most p groups of sequences, and the cache of the group;
    of a mixture, only the experts of one token. Pope et al. 2022, arXiv:2211.05102, section 2.
    """
    rate = cluster.gpu.hbm_bytes_per_s * cluster.gpu.achievable["memory"].value
    groups = min(len(ranks), batch)
    read = 0.0
    for rank in ranks:
        read += sum(rank.held(rank.blocks_weights(active=True))) + sum(rank.held(rank.ends(read=True)))
        read += rank.cache(context, 1) * batch / groups
    return read / rate


def prefill_seconds(cluster: ClusterSpec, ranks: list[Rank], context: int) -> float | None:
    """The least seconds for a prompt of ``context`` tokens: the blocks' products alone, 2 FLOPs a weight.

    Stages work at once on different chunks of the prompt, if it has several.
    """
    spec, gpu = ranks[0].spec, cluster.gpu
    unit = "fp8" if spec.weights == "fp8" and "fp8" in gpu.peak_flops else "bf16"
    unit = unit if unit in gpu.peak_flops else "fp16"
    if spec.weights == "int8" or unit not in gpu.peak_flops:
        return None  # the catalog has no peak of int8
    flops = sum(
        count * sum(rank.held(product_terms(rank.model, block, context)))
        for rank in ranks
        for block, count in rank.blocks.items()
    )
    at_once = min(len(ranks), ceil(context / spec.chunk_tokens))
    return flops / at_once / (gpu.peak_flops[unit] * gpu.achievable["matmul"].value)


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
