"""What an optimizer keeps of one tensor, as a function of its shape, and what its step makes and multiplies.

Factored moments keep rows and columns, block-wise ones a scale a block and small tensors unquantised, Muon
one moment of a block's matrices and AdamW's two of everything else, SOAP and Shampoo square matrices of a
tensor's lengths. The table of optimizers is :data:`planner.optimizers.OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from planner.stacks.base import Recipe
from strategies.base import Quantity

LEAST_8BIT = 4096
"""Elements below which a tensor's moments are not quantised (bitsandbytes 0.50.2, optim/optimizer.py,
``min_8bit_size``; torchao 0.18, optim/adam.py, ``_new_buffer``)."""
BLOCK = 256
"""Elements that share a scale: bitsandbytes ``init_state``, ``blocksize``; torchao ``block_size`` of Adam8bit
and AdamFp8. torchao's 4-bit Adam has blocks of 128."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of parameters as the modules have it: its lengths, and is it a matrix of a block, or an
    embedding's?"""

    shape: tuple[Quantity, ...]
    hidden: bool = False
    embedding: bool = False

    @property
    def elements(self) -> Quantity:
        """Its number of elements."""
        return prod(self.shape)


PER_ELEMENT = Callable[[Tensor, Recipe, Quantity], Quantity]
"""Bytes of state per element of a tensor that is cut over a number of GPUs."""
ROOM = Callable[[Sequence[Tensor], Recipe], float]
"""Bytes that a step needs besides, from a model's tensors, one of each kind of block."""


def moments(count: int) -> PER_ELEMENT:
    """``count`` moments of the recipe's type for each element: momentum 1, Adam 2."""
    return lambda tensor, recipe, shards: recipe.moment * count


def whole_precision(count: int) -> PER_ELEMENT:
    """``count`` moments in fp32 whatever the weights are in (bitsandbytes' 32-bit states)."""
    return lambda tensor, recipe, shards: 4.0 * count


def blockwise(count: int, whole_embeddings: bool = False) -> PER_ELEMENT:
    """A byte for each of ``count`` moments and an fp32 maximum a block; small tensors in fp32.

    Dettmers et al. 2021, arXiv:2110.02861, section 2; bitsandbytes 0.50.2, optim/optimizer.py.
    The tables of quantised values, 1 KiB each, are shared by all tensors. transformers' Trainer keeps what
    belongs to embeddings in fp32 too (trainer.py, ``register_module_override``).
    """

    def per_element(tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
        n = tensor.elements
        blocks = np.ceil(n / BLOCK)
        whole = (n < LEAST_8BIT) | (whole_embeddings and tensor.embedding)
        return np.where(whole, 4.0 * count, count * (1 + 4 * blocks / n))

    return per_element


def torchao(bits: int, block: int, table: int) -> PER_ELEMENT:
    """Two moments of so many bits, an fp32 scale a block and a ``table`` of bytes for each state.

    torchao 0.18, optim/adam.py and subclass_8bit.py, subclass_4bit.py, subclass_fp8.py: what counts is the
    GPU's own part of the tensor (``to_local``); small parts, and those that are no whole blocks, keep the
    weights' type.
    """

    def per_element(tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
        own = tensor.elements / shards
        packed = 2 * (bits / 8 + 4 / block + table / own)
        return np.where((own >= LEAST_8BIT) & (own % block == 0), packed, 2 * recipe.weight)

    return per_element


def factored(tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
    """Rows and columns of a matrix, every element of a vector, in the weights' type.

    Shazeer and Stern 2018, arXiv:1804.04235, section 3; torch.optim.Adafactor, ``_init_group``.
    """
    if len(tensor.shape) == 1:
        return recipe.weight
    *others, rows, columns = tensor.shape
    return recipe.weight * prod(others) * (rows + columns) / tensor.elements


def factored_fp32(tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
    """The same in fp32, whatever the weights are in: transformers' Adafactor, ``step``."""
    return 4 * factored(tensor, replace(recipe, weight=1.0), shards)


def came_state(tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
    """A moment of every element, factors of squares and of the instability; of a vector both moments; fp32.

    Luo et al. 2023, arXiv:2307.02047; came_pytorch 0.1.3, CAME.py, ``step``.
    """
    return 4 + (1 if len(tensor.shape) == 1 else 2) * factored_fp32(tensor, recipe, shards)


def muon_state(tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
    """A momentum of a block's matrices, AdamW's two moments of embedding, head, norms and biases.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982,
    section 2; torch.optim.Muon, ``_init_group``.
    """
    return recipe.moment * (1 if tensor.hidden else 2)


ITERATIONS = 5
"""Newton-Schulz iterations: torch.optim.Muon, ``ns_steps``."""


def newton_schulz_flops(tensor: Tensor) -> Quantity:
    """FLOPs of orthogonalising a matrix of m <= n: ``5 (4 m^2 n + 2 m^3)``.

    Each iteration multiplies X Xᵀ (2 m² n), its square (2 m³) and the result with X (2 m² n):
    torch.optim.Muon, ``_zeropower_via_newtonschulz``.

    >>> newton_schulz_flops(Tensor((10, 20), hidden=True))
    50000
    """
    if not tensor.hidden:
        return 0
    m, n = min(tensor.shape), max(tensor.shape)
    return ITERATIONS * (4 * m * m * n + 2 * m**3)


def newton_schulz_room(tensors: Sequence[Tensor], recipe: Recipe) -> float:
    """Bytes while the largest matrix is orthogonalised, one at a time.

    The update in the weights' type (Nesterov's), the bf16 matrix before and after an iteration, and two of
    m x m; where the weights are in bf16 too the update is the first of the matrices, and is kept.
    """
    sizes = ((recipe.weight + 4) * t.elements + 4 * min(t.shape) ** 2 for t in tensors if t.hidden)
    return float(max(sizes))


def factored_room(tensors: Sequence[Tensor], recipe: Recipe) -> float:
    """The update of a tensor beside that of the one before it, which Python still holds on to."""
    sizes = [recipe.weight * float(t.elements) for t in tensors]
    return max(a + b for a, b in zip([0.0, *sizes], [*sizes, 0.0], strict=True))


def factored_fp32_room(tensors: Sequence[Tensor], recipe: Recipe) -> float:
    """Of the largest tensor two in fp32, the estimate and the update; copies of half-precision gradient and
    weight beside them."""
    return max(4 * (2 + 2 * (recipe.weight < 4)) * float(t.elements) for t in tensors)


def came_room(tensors: Sequence[Tensor], recipe: Recipe) -> float:
    """Of a tensor the instability in three steps, in fp32, and a half-precision gradient's copy; of the one
    before it the update and the instability, which Python still holds on to."""
    sizes = [4.0 * float(t.elements) for t in tensors]
    own = 3 + (recipe.weight < 4)
    return max(2 * before + own * size for before, size in zip([0.0, *sizes], sizes, strict=False))


MOST_SOAP = 10_000
"""Length above which SOAP keeps no matrices of a dimension: soap.py, ``max_precond_dim``."""
SOAP_STEPS = 10
"""Steps between two of SOAP's QR decompositions: soap.py, ``precondition_frequency``."""
SHAMPOO_STEPS = 100
"""Steps between two of Shampoo's inverse roots: distributed_shampoo/README.md, ``precondition_frequency``."""


def preconditioned(tensor: Tensor) -> list[float]:
    """The lengths that SOAP keeps matrices of, the smallest first: none of vectors.

    It takes whole tensors, of the same lengths under every layout of a family.
    """
    if len(tensor.shape) == 1:
        return []
    lengths = [float(np.max(n)) for n in tensor.shape]
    return sorted(n for n in lengths if n <= MOST_SOAP)


def soap_state(tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
    """Two moments, and of each preconditioned length d two matrices of d x d: L and its eigenvectors.

    Vyas et al. 2024, arXiv:2409.11321, "Space usage of SOAP": 2 m^2 + 2 n^2 + 3 m n, of which one m n is the
    gradient; soap.py, ``init_preconditioner``.
    """
    squares = sum(d * d for d in preconditioned(tensor))
    return recipe.weight * (2 + 2 * squares / tensor.elements)


def soap_room(projections: int) -> ROOM:
    """Bytes while the largest tensor is updated, in a step with a QR decomposition of n x n.

    By then there are five of the tensor: the gradient's projection, the update, the second moment's root and
    both moments anew; of the second and larger length the outer product, two of m Q, Q and R, these and what
    is decomposed in fp32; of the first length its own Q and R. Then the authors' code projects the first
    moment, one more of the tensor for each length (``projections``); vectors have the root and the update.
    """

    def bytes_of(tensor: Tensor, width: float) -> float:
        lengths = preconditioned(tensor)
        n = float(tensor.elements)
        if not lengths:
            return 2 * width * n
        least = sum(d * d for d in lengths[:-1])
        most, copied = lengths[-1] ** 2, 4 * (width < 4)
        decomposed = 5 * width * n + (3 * width + 8 + copied) * most + (width + 4) * least
        return max(decomposed, width * ((5 + projections * len(lengths)) * n + most))

    return lambda tensors, recipe: max(bytes_of(t, recipe.weight) for t in tensors)


def soap_flops(products: int, cubes: float) -> Callable[[Tensor], Quantity]:
    """FLOPs of a step: ``products`` along each preconditioned length d, 2 n d each; every tenth one ``cubes``
    d^3, of which a QR decomposition takes 8/3 (Golub and Van Loan 2013, algorithm 5.2.1, section 5.1.6).

    >>> soap_flops(5, 0.0)(Tensor((20, 10)))
    60000.0
    """

    def flops(tensor: Tensor) -> Quantity:
        lengths = preconditioned(tensor)
        return sum(2 * products * tensor.elements * d + cubes * d**3 / SOAP_STEPS for d in lengths)

    return flops


def blocks(tensor: Tensor, most: int) -> Iterator[tuple[Quantity, tuple[Quantity, ...]]]:
    """How many blocks of which lengths a tensor is cut into, none above ``most``; small ones are vectors.

    distributed_shampoo/utils/shampoo_utils.py, ``merge_small_dims`` and ``multi_dim_split``.

    >>> list(blocks(Tensor((300, 100)), 200))
    [(1, (200, 100)), (1, (100, 100))]
    """
    merged = float(np.min(tensor.elements)) <= most
    cut: list[tuple[Quantity, tuple[Quantity, ...]]] = [(1, ())]
    for length in (tensor.elements,) if merged else tensor.shape:
        pieces = [(length // most, most), (1 * (length % most > 0), length % most)]
        cut = [(n * times, (*lengths, d)) for n, lengths in cut for times, d in pieces if np.any(times)]
    yield from cut


def shampoo_state(most: int) -> PER_ELEMENT:
    """Two moments (the gradient's, and the second of the Adam that it is grafted on), and of each length d of
    each block the upper triangles of a factor and of its inverse root, in fp32.

    Shi et al. 2023, arXiv:2309.06497; distributed_shampoo, ``use_symmetric_packing``. Vectors have them too.
    """

    def per_element(tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
        packed = sum(count * sum(d * (d + 1) for d in lengths) for count, lengths in blocks(tensor, most))
        return 2 * recipe.weight + 4 * packed / tensor.elements

    return per_element


def shampoo_indices(most: int) -> ROOM:
    """Bytes of the places of packed triangles, two in int32 for each element, once for each length: they are
    cached for good (distributed_shampoo/utils/shampoo_utils.py, ``_get_triu_indices``)."""

    def size(tensors: Sequence[Tensor], recipe: Recipe) -> float:
        lengths = {float(d) for t in tensors for _, block in blocks(t, most) for d in block}
        return sum(4 * d * (d + 1) for d in lengths)

    return size


def shampoo_flops(most: int) -> Callable[[Tensor], Quantity]:
    """FLOPs of a step: an outer product and a preconditioning along each length d of a block, 2 n d each, and
    every hundredth step an eigendecomposition, 9 d^3, and the product that makes the root of it, 2 d^3.

    Golub and Van Loan 2013, algorithm 8.3.3; distributed_shampoo/preconditioner/matrix_functions.py.

    >>> shampoo_flops(1024)(Tensor((1024, 1024))) == 4 * 2 * 1024**3 + 2 * 11 * 1024**3 / 100
    True
    """

    def flops(tensor: Tensor) -> Quantity:
        return sum(
            count * (4 * prod(lengths) * sum(lengths) + sum(11 * d**3 for d in lengths) / SHAMPOO_STEPS)
            for count, lengths in blocks(tensor, most)
        )

    return flops
