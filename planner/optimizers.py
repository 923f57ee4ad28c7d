"""Optimizers: the bytes of state that each keeps of a tensor, and what its step needs and moves.

One table, :data:`OPTIMIZERS`. State is a function of the tensor's shape: factored moments keep rows and
columns, block-wise ones a scale a block and small tensors unquantised, Muon one moment of a block's matrices
and AdamW's two of everything else. A master copy of the weights is the precision's, not the optimizer's
(:class:`~planner.stacks.base.Recipe`). A step counter of 4 bytes a tensor is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod

import numpy as np

from planner.errors import InputError, nearest_names
from planner.model import Block, ModelSpec
from planner.specs import TrainingSpec
from planner.stacks.base import WIDTHS, Recipe, Stack
from planner.weights import Weight, block_weights, embedding_weights, head_weights
from strategies.base import Quantity

FOREACH = "foreach"
IN_BACKWARD = "in_backward"
"""Values of the option ``optimizer_step``: an operation at a time on all parameters; each parameter as soon
as its gradient is there, which is then freed (``register_post_accumulate_grad_hook``; torchtune's
``optimizer_in_bwd``; LOMO: Lv et al. 2023, arXiv:2306.09782, section 3.1)."""

TEMPORARIES = "temporaries of the optimizer step"
"""The buffer of a step that goes tensor by tensor."""

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


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One optimizer: its states, and what its step makes and moves.

    ``foreach`` counts elements of the moments' type that torch's foreach step reads and writes for each
    parameter, ``accesses`` bytes of a step that is not fused; else states are read and written, the gradient
    read and the weight written, once. ``room`` is the temporaries of a step that goes tensor by tensor; a
    foreach step makes ``foreach_room`` copies of the moments' type of all at once.
    """

    per_element: PER_ELEMENT
    source: str
    stacks: Mapping[str, tuple[str, ...]] | None = None
    """The stacks that it is planned in and their shardings; None: all of them."""
    foreach: float = 0.0
    foreach_room: float = 0.0
    accesses: Callable[[Recipe], float] | None = None
    room: Callable[[Sequence[Tensor], Recipe], float] | None = None
    flops: Callable[[Tensor], Quantity] | None = None
    in_backward: bool = True
    paged: float = 0.0  # bytes per parameter of states that may be evicted to the host
    typed: bool = True  # are its moments of the recipe's type?
    needs: str = ""
    note: str = ""


ONE_GPU = {"hf": ("ddp",)}
TORCH = "torch.optim"
BITSANDBYTES = "bitsandbytes 0.50.2, optim/optimizer.py"
OWN_PART = {"hf": ("ddp",), "fsdp": ("fsdp",)}
LEAST_PAGED = 1e5
"""Elements from which bitsandbytes pages a tensor's states (optim/optimizer.py, ``get_state_buffer``)."""
PAGED = (
    "paged optimizer states are left out of the GPU's memory: they lie in managed memory, outside PyTorch's "
    "allocator, on the GPU where there is room, else on the host; fetching them from there is not timed"
)

ADAM_FOREACH = 20
"""torch/optim/adam.py, ``_multi_tensor_adam``: a product for weight decay 2, the moments 3 + 5, root,
division and sum 6, the update 4."""

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(moments(2), "Loshchilov and Hutter 2019, arXiv:1711.05101", None, ADAM_FOREACH, 1.0),
    "adam": Optimizer(moments(2), "Kingma and Ba 2015, arXiv:1412.6980", None, ADAM_FOREACH, 1.0),
    # foreach: the momentum's product 2 and sum 3, the update 3.
    "momentum": Optimizer(moments(1), f"{TORCH}.SGD, _multi_tensor_sgd", None, 8.0),
    "sgd": Optimizer(moments(0), f"{TORCH}.SGD, _multi_tensor_sgd", None, 3.0),
    "adamw8bit": Optimizer(blockwise(2), BITSANDBYTES, ONE_GPU, typed=False),
    "adam8bit": Optimizer(blockwise(2), BITSANDBYTES, ONE_GPU, typed=False),
    "trainer-adamw8bit": Optimizer(
        blockwise(2, whole_embeddings=True),
        f"{BITSANDBYTES}; transformers 5.23, trainer.py",
        ONE_GPU,
        typed=False,
    ),
    "trainer-lion8bit": Optimizer(
        blockwise(1, whole_embeddings=True),
        f"{BITSANDBYTES}; transformers 5.23, trainer.py",
        ONE_GPU,
        typed=False,
    ),
    "paged-adamw8bit": Optimizer(
        blockwise(2), BITSANDBYTES, ONE_GPU, paged=2 * (1 + 4 / BLOCK), typed=False, note=PAGED
    ),
    "paged-adamw": Optimizer(whole_precision(2), BITSANDBYTES, ONE_GPU, paged=8.0, typed=False, note=PAGED),
    "lion": Optimizer(
        whole_precision(1),
        "Chen et al. 2023, arXiv:2302.06675; bitsandbytes' lion_32bit, DeepSpeed's FusedLion",
        ONE_GPU | {"deepspeed": ("ddp", "zero1", "zero2", "zero3")},
        typed=False,
    ),
    "lion8bit": Optimizer(blockwise(1), BITSANDBYTES, ONE_GPU, typed=False),
    "torchao-adamw8bit": Optimizer(
        torchao(8, 256, 1024), "torchao 0.18, optim/adam.py", OWN_PART, typed=False
    ),
    "torchao-adamw4bit": Optimizer(torchao(4, 128, 64), "torchao 0.18, optim/adam.py", OWN_PART, typed=False),
    "torchao-adamwfp8": Optimizer(torchao(8, 256, 0), "torchao 0.18, optim/adam.py", OWN_PART, typed=False),
    "adafactor": Optimizer(
        factored,
        "Shazeer and Stern 2018, arXiv:1804.04235; torch.optim.Adafactor, not transformers' (fp32 factors)",
        ONE_GPU,
        # Norms of rows and columns 2, the estimate 3, clamp and root 4, the product 3, norms 2, the update 3.
        accesses=lambda recipe: 17 * recipe.weight,
        room=factored_room,
        in_backward=False,
        typed=False,
        needs="factors of rows and columns are of whole matrices",
    ),
    "transformers-adafactor": Optimizer(
        factored_fp32,
        "Shazeer and Stern 2018, arXiv:1804.04235; transformers 5.23, optimization.py, Adafactor",
        ONE_GPU,
        # Square and sum 5, means 2, the estimate 3, the product 3, norms 2, scaled 4, negated 2, added 3.
        accesses=lambda recipe: 24 * 4.0,
        room=factored_fp32_room,
        in_backward=False,
        typed=False,
        needs="factors of rows and columns are of whole matrices",
    ),
    "muon": Optimizer(
        muon_state,
        "Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982; torch.optim.Muon, AdamW for the rest",
        ONE_GPU,
        # Momentum and Nesterov's update 6, norm and division 3, four in each iteration, the update 5.
        accesses=lambda recipe: 34 * recipe.weight,
        room=newton_schulz_room,
        flops=newton_schulz_flops,
        in_backward=False,
        needs="Newton-Schulz iterations take whole matrices, which are gathered in many ways",
    ),
    "lomo": Optimizer(
        moments(0),
        "Lv et al. 2023, arXiv:2306.09782: SGD within the backward, without a norm to clip",
        ONE_GPU,
    ),
}

REFUSED: Mapping[str, str] = {
    "shampoo": "its preconditioners' sizes depend on the implementation's blocks",
    "soap": "its preconditioners' sizes depend on the implementation's largest dimension",
    "adalomo": "its factored moments within the backward are not measured",
    "galore": "its projections' sizes depend on their rank",
    "came": "not measured",
}
"""Optimizers that are known by name but not planned, and why."""


def optimizer_named(name: str) -> Optimizer:
    """The optimizer of that name. Raises InputError with the nearest names.

    >>> optimizer_named("adamw").foreach_room
    1.0
    """
    if name in REFUSED:
        raise InputError(
            f"optimizer={name} is not planned: {REFUSED[name]}; use {' or '.join(('adamw', 'muon'))}"
        )
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer={name[:40]!r} is not known: {nearest_names(name, OPTIMIZERS)}")
    return OPTIMIZERS[name]


EMBEDDINGS = ("word embedding", "position embedding")
"""Weights of look-ups."""


def tensor_of(weight: Weight, model: ModelSpec) -> Tensor:
    """The tensor that a weight is, or is a part of: GPT-2, GPT-NeoX and BLOOM keep q, k and v in one.

    A ``pair`` are two tensors of one shape, ``copies`` how many there are.
    """
    dims = {name: length for name, length in weight.dims.items() if name not in ("pair", "copies")}
    together = model.model_type in ("gpt2", "gpt_neox", "bloom")
    if together and weight.name.startswith(("query ", "key and value ")) and "norm" not in weight.name:
        heads = model.num_attention_heads + 2 * model.num_key_value_heads
        dims = {name: n for name, n in dims.items() if name == "hidden"} | {"qkv": heads * model.head_dim}
    hidden, experts = dims.pop("hidden", None), dims.pop("experts", None)
    others: tuple[Quantity, ...] = (prod(dims.values()),) if dims else ()
    lengths = (experts, hidden) if experts is not None else (hidden,)
    shape = (*(n for n in lengths if n is not None), *others)
    return Tensor(shape, weight.matrix and len(shape) == 2, weight.name in EMBEDDINGS)


def resident(optimizer: Optimizer, tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
    """Bytes of state per element of a tensor that the GPU must hold: all, but for what may be evicted."""
    states = optimizer.per_element(tensor, recipe, shards)
    return np.where(tensor.elements < LEAST_PAGED, states, 0.0) if optimizer.paged else states


def tensors_of(model: ModelSpec) -> list[Tensor]:
    """Tensors in the order of the model, one of each kind of block."""
    weights: list[Weight] = [*embedding_weights(model, model.vocab_size)]
    for block in model.block_kinds:
        weights += block_weights(model, block)
    weights += [w for w in head_weights(model, model.vocab_size, 0) if w.dims.get("copies", 1)]
    return [tensor_of(weight, model) for weight in weights]


def in_backward(optimizer: str, options: Mapping[str, str]) -> bool:
    """Is each parameter updated within the backward, its gradient never kept?"""
    return optimizer == "lomo" or options.get("optimizer_step") == IN_BACKWARD


def moved(optimizer: Optimizer, recipe: Recipe, step: str | None, states: Quantity) -> Quantity:
    """Bytes that the step moves for each parameter, of which ``states`` bytes are kept."""
    if step == FOREACH and optimizer.foreach:
        return optimizer.foreach * recipe.moment
    if optimizer.accesses:
        return optimizer.accesses(recipe)
    return 2 * (states + optimizer.paged) + recipe.gradient + recipe.weight


def step_flops(name: str, model: ModelSpec, blocks: Iterable[Block] | None = None) -> float:
    """FLOPs of the optimizer step's matrix products, of all trained blocks: a model's own, if not given."""
    flops = optimizer_named(name).flops
    if flops is None:
        return 0.0
    total = 0.0
    for block, same in groupby(model.blocks if blocks is None else blocks):
        count = len(list(same)) * (block.trained != "none")
        for weight in block_weights(model, block):
            tensor = tensor_of(weight, model)  # of which the weight is a part, or there are two
            total += count * prod(weight.dims.values()) / tensor.elements * flops(tensor)
    return total


def unscaled(recipe: Recipe) -> float:
    """Bytes per parameter of 8-bit moments in fp32, of all parameters at once, while they are updated.

    Transformer Engine, pytorch/optimizers/fused_adam.py, ``step``: ``unscaled_lists``.
    """
    return 2 * 4.0 * (recipe.moment == 1)


def check_states(stack: Stack, training: TrainingSpec, recipe: Recipe) -> None:
    """Raises InputError for types of gradients, moments and master copies that do not go together."""
    gradient, moment, name = training.gradient_dtype, training.optimizer_dtype, training.optimizer
    if gradient and stack.gradients_as_weights and WIDTHS[gradient] != recipe.weight:
        raise InputError(
            f"gradient_dtype={gradient}: under {stack.name} gradients are of the weights' type, of "
            f"{recipe.weight:g} bytes: leave it out, or choose precision pure-bf16 or fp32"
        )
    if moment and moment not in stack.moment_types:
        allowed = " or ".join(stack.moment_types)
        raise InputError(f"optimizer_dtype={moment} is not planned under {stack.name}: use {allowed}")
    if moment and not optimizer_named(name).typed:
        raise InputError(f"optimizer_dtype={moment}: {name} has moments of its own type: leave it out")
    if moment == "fp8" and name not in ("adam", "adamw"):
        raise InputError(f"optimizer_dtype=fp8 is Adam's, not {name}'s: use optimizer adamw")
    if moment == "fp8" and recipe.compute == 4:
        raise InputError("optimizer_dtype=fp8 belongs to weights in half precision: use precision bf16")
    if training.precision == "bf16-kahan" and training.master_weights is not None:
        raise InputError("precision=bf16-kahan has a compensation in place of master weights: leave them out")


def shardings_of(stack: Stack, name: str, model: ModelSpec, options: Mapping[str, str]) -> dict[str, bool]:
    """The shardings of a stack that an optimizer is planned in. Raises InputError where there are none."""
    optimizer = optimizer_named(name)
    shardings = dict(stack.shardings)
    if optimizer.stacks is not None:
        if stack.name not in optimizer.stacks:
            why = f" ({optimizer.needs})" if optimizer.needs else ""
            raise InputError(
                f"optimizer={name} is not planned under {stack.name}{why}: "
                f"use --framework {' or '.join(optimizer.stacks)}, or optimizer adamw"
            )
        shardings = {kind: shardings[kind] for kind in shardings if kind in optimizer.stacks[stack.name]}
    if model.experts and optimizer.flops:
        raise InputError(f"optimizer={name} is not planned for a mixture of experts: use adamw")
    step = options.get("optimizer_step")
    if step == FOREACH and not optimizer.foreach:
        raise InputError(f"optimizer={name} has no foreach step: use optimizer_step=fused, or adamw")
    if in_backward(name, options) and not optimizer.in_backward:
        raise InputError(f"optimizer={name} is not planned within the backward: use optimizer_step=fused")
    return shardings
