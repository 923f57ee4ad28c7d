"""The table of Hugging Face's ``accelerate estimate-memory``, from a model's shape.

src/accelerate/commands/estimate.py (1.15 and before): the model without its head is built in fp32 on the
meta device; parameters and buffers are summed, for the whole and for the largest layer, and divided by 2, 4
and 8. Training is a multiple of the fp32 size. Sizes are in binary units that it prints as MB and GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from planner.errors import InputError
from planner.model import ModelSpec
from planner.weights import Weight, block_weights, embedding_weights, head_weights

FP32 = 4
DIVIDE = {"float32": 1, "float16": 2, "int8": 4, "int4": 8}
"""What the fp32 sizes are divided by, per dtype."""
STAGES: dict[str, dict[str, float]] = {
    "float32": {"model": 1.0, "gradients": 1.0, "optimizer": 2.0, "step": 4.0},
    "float16": {"model": 1.0, "gradients": 1.5, "optimizer": 2.0, "step": 2.0},
}
"""estimate_training_usage: multiples of the fp32 size. The largest of them is "Training using Adam"."""
ROTARY_CACHES = {"llama": "4.40", "mistral": "4.41", "qwen2": "4.41"}
"""Families whose attention kept cosines and sines of all positions in fp32 in every layer, as buffers that
the table counts, and a release of transformers that still did (none of 4.47 does). GPT-NeoX did too, of a
part of each head that a ModelSpec does not say."""
LEFT_OUT = (
    "the head, where it is not the embedding: AutoModel builds the model without it",
    "activations, logits and the cache: it is the size of what is loaded",
    "CUDA context, communicators, the allocator",
    "sharding: data, tensor and pipeline parallelism",
    "scales of quantised weights, and what stays in half precision beside them",
    "training: the largest of four moments, each without the states of the others",
)


@dataclass(frozen=True)
class Row:
    """A line of the table, in bytes; ``training`` by moment, None where accelerate has no figure."""

    dtype: str
    largest_layer: float
    total: float
    training: dict[str, float] | None

    @property
    def training_using_adam(self) -> float | None:
        """The column of that name."""
        return max(self.training.values()) if self.training else None


def accelerate_table(model: ModelSpec, rotary_caches: bool = True) -> list[Row]:
    """The four rows; with ``rotary_caches``, as with those releases of transformers that kept them.

    The largest layer is a whole block or one table of the embedding. Raises InputError where AutoModel
    builds more than a ModelSpec says.
    """
    if model.kind != "decoder":
        raise InputError(
            f"{model.name} is of kind {model.kind}, to which AutoModel adds a pooler that is not described "
            "here: the table is made of decoders"
        )
    cache = rotary_cache(model) if rotary_caches else 0
    blocks = [_elements(block_weights(model, block)) * FP32 + cache for block in model.blocks]
    tables = [_elements([weight]) * FP32 for weight in embedding_weights(model, model.vocab_size)]
    around = head_weights(model, model.vocab_size, copies=0)
    norms = [weight for weight in around if weight.name == "final norm"]
    total = sum(blocks) + sum(tables) + _elements(norms) * FP32
    return list(_rows(max(blocks + tables), total))


def rotary_cache(model: ModelSpec) -> int:
    """Bytes of one layer's cosines and sines of all positions, in the families that kept them."""
    if model.model_type not in ROTARY_CACHES:
        return 0
    return 2 * model.max_position_embeddings * model.head_dim * FP32


def _rows(largest: int, total: int) -> Iterator[Row]:
    for dtype, divide in DIVIDE.items():
        stages = STAGES.get(dtype)
        training = {name: times * total for name, times in stages.items()} if stages else None
        yield Row(dtype, largest / divide, total / divide, training)


def _elements(weights: Iterable[Weight]) -> int:
    return sum(prod(weight.dims.values()) for weight in weights)


def as_printed(size: float) -> str:
    """A size as accelerate prints it: binary units under decimal names.

    >>> as_printed(388.02 * 2**20)
    '388.02 MB'
    """
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1024:
            return f"{round(size, 2)} {unit}"
        size /= 1024
    return f"{round(size, 2)} TB"
