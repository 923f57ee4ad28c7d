"""One GPU of a model that answers requests: what it holds, and how fast it can be at best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from math import ceil, lcm
from typing import TYPE_CHECKING

from planner.serving import (
    HALF,
    KV_BYTES,
    cache_terms,
    product_terms,
    sampling_terms,
    weight_terms,
    working_terms,
)
from planner.stacks.base import COMMUNICATOR, CONTEXT
from planner.weights import Weight, embedding_weights, head_weights
from strategies.base import Term, held
from strategies.pipeline_parallel import PipelineParallel
from strategies.tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from planner.inference import InferenceSpec
    from planner.specs import ClusterSpec, ModelSpec

VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to it: DEFAULT_VOCAB_PADDING_SIZE of layers/vocab_parallel_embedding.py."""


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
        self.windows = [block for block in self.blocks if block.mixer == "window"]
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
            width = latent.qk_rope_head_dim if latent else self.model.head_dim * self.model.rotary_fraction
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
        size, width = self.spec.block_size, KV_BYTES[self.spec.kv]
        tokens = min(self.spec.chunk_tokens, max(0, context - self.model.sliding_window))
        token = sum(
            self.blocks[block] * sum(self.held(cache_terms(self.model, block, 1, 1, width, self.tensor)))
            for block in self.windows
        )
        return ceil(tokens / size) * size * token

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


def token_bytes(rank: Rank) -> float:
    """Bytes of cache for one more token within all windows."""
    return rank.cache(2, 1) - rank.cache(1, 1)


def further_bytes(rank: Rank) -> float:
    """Bytes of cache for one more token beyond all windows: what keeps growing."""
    far = (rank.model.sliding_window or 0) + 1
    return rank.cache(far + 1, 1) - rank.cache(far, 1)


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
