"""Optimizers: the bytes of state that each keeps of a tensor, and what its step needs and moves.

One table, :data:`OPTIMIZERS`. State is a function of the tensor's shape (:mod:`planner.optimizer_states`). A
master copy of the weights is the precision's, not the optimizer's (:class:`~planner.stacks.base.Recipe`). A
step counter of 4 bytes a tensor is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod

import numpy as np

from planner.errors import InputError, nearest_names
from planner.model import Block, ModelSpec
from planner.optimizer_states import (
    BLOCK,
    PER_ELEMENT,
    ROOM,
    Tensor,
    blockwise,
    came_room,
    came_state,
    factored,
    factored_fp32,
    factored_fp32_room,
    factored_room,
    moments,
    muon_state,
    newton_schulz_flops,
    newton_schulz_room,
    shampoo_flops,
    shampoo_indices,
    shampoo_state,
    soap_flops,
    soap_room,
    soap_state,
    torchao,
    whole_precision,
)
from planner.specs import TrainingSpec
from planner.stacks.base import WIDTHS, Recipe, Stack
from planner.weights import Weight, block_weights, embedding_weights, head_weights
from strategies.base import Buffer, Quantity

FOREACH = "foreach"
IN_BACKWARD = "in_backward"
"""Values of the option ``optimizer_step``: an operation at a time on all parameters; each parameter as soon
as its gradient is there, which is then freed (``register_post_accumulate_grad_hook``; torchtune's
``optimizer_in_bwd``; LOMO: Lv et al. 2023, arXiv:2306.09782, section 3.1)."""

TEMPORARIES = "temporaries of the optimizer step"
"""The buffer of a step that goes tensor by tensor."""
INDICES = "indices of packed matrices"
"""The buffer of an optimizer that all its tensors share, between steps too."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One optimizer: its states, and what its step makes and moves.

    ``foreach`` counts elements of the moments' type that torch's foreach step reads and writes for each
    parameter, ``accesses`` bytes of a step that is not fused, from the recipe and its bytes of state; else
    states are read and written, the gradient read and the weight written, once. ``room`` is the temporaries
    of a step that goes tensor by tensor; a foreach step, or the only one of an optimizer, ``foreach_room``
    copies of the moments' type of all at once. ``kept`` is what all tensors share. ``flops`` of a tensor are
    of products of ``product_bytes``, or of the weights' type.
    """

    per_element: PER_ELEMENT
    source: str
    stacks: Mapping[str, tuple[str, ...]] | None = None
    """The stacks that it is planned in and their shardings; None: all of them."""
    foreach: float = 0.0
    foreach_room: float = 0.0
    accesses: Callable[[Recipe, Quantity], Quantity] | None = None
    room: ROOM | None = None
    kept: ROOM | None = None
    flops: Callable[[Tensor], Quantity] | None = None
    product_bytes: float = 0.0
    in_backward: bool = True
    paged: float = 0.0  # bytes per parameter of states that may be evicted to the host
    typed: bool = True  # are its moments of the recipe's type?
    whole_weights: bool = False  # does it take weights and gradients in fp32 alone?
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

ADAFACTOR = Optimizer(
    factored,
    "Shazeer and Stern 2018, arXiv:1804.04235; torch.optim.Adafactor, not transformers' (fp32 factors)",
    ONE_GPU,
    # Norms of rows and columns 2, the estimate 3, clamp and root 4, the product 3, norms 2, the update 3.
    accesses=lambda recipe, states: 17 * recipe.weight,
    room=factored_room,
    in_backward=False,
    typed=False,
    needs="factors of rows and columns are of whole matrices",
)

DECOMPOSED = (
    "decompositions of the optimizer's matrices are timed at the rate of products, which they do not reach, "
    "and are without cuSOLVER's workspace"
)

SOAP = Optimizer(
    soap_state,
    "Vyas et al. 2024, arXiv:2409.11321; the authors' soap.py (github.com/nikhilvyas/SOAP, a1e5535)",
    ONE_GPU,
    # Of each element 24, 2 in each of 8 products and of 2 outer ones; of a length's matrices 1 in each of its
    # 5 products, 3 for the mean; each tenth step 4 and 14. Tensors with one such length, embeddings, less.
    accesses=lambda recipe, states: 44.4 * recipe.weight + 4.7 * (states - 2 * recipe.weight),
    room=soap_room(1),
    flops=soap_flops(5, 26 / 3),
    in_backward=False,
    typed=False,
    whole_weights=True,
    needs="its matrices are of whole tensors' rows and columns",
    note=DECOMPOSED,
)


def shampoo(most: int) -> Optimizer:
    """Distributed Shampoo in AdamW's place, with matrices up to ``most`` rows: 8192 in its README's examples,
    1024 if ``max_preconditioner_dim`` is not given."""
    return Optimizer(
        shampoo_state(most),
        "Shi et al. 2023, arXiv:2309.06497; github.com/facebookresearch/optimizers, f606606, "
        f"distributed_shampoo/README.md, example 4, max_preconditioner_dim={most}",
        ONE_GPU,
        # The gradient's mean and its correction, Adam's root and quotient, the update.
        foreach_room=4.0,
        # Of each element 35, 16 bytes in products, 12 to cast halves; of a matrix's the outer product, its
        # packing, the mean and the unpacked root.
        accesses=lambda recipe, states: (
            35 * recipe.weight
            + 16
            + 12 * (recipe.weight < 4)
            + (64 + 3 * recipe.weight) * (states - 2 * recipe.weight) / 4
        ),
        kept=shampoo_indices(most),
        flops=shampoo_flops(most),
        product_bytes=4.0,
        in_backward=False,
        typed=False,
        needs="its blocks are of whole tensors, and its own configurations for DDP and FSDP share them out",
        note=f"{DECOMPOSED}; under DDP every GPU has all of Shampoo's blocks (no DDPDistributedConfig)",
    )


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
    "adafactor": ADAFACTOR,
    "transformers-adafactor": replace(
        ADAFACTOR,
        per_element=factored_fp32,
        source="Shazeer and Stern 2018, arXiv:1804.04235; transformers 5.23, optimization.py, Adafactor",
        # Square and sum 5, means 2, the estimate 3, the product 3, norms 2, scaled 4, negated 2, added 3.
        accesses=lambda recipe, states: 24 * 4.0,
        room=factored_fp32_room,
    ),
    "came": replace(
        ADAFACTOR,
        per_element=came_state,
        source="Luo et al. 2023, arXiv:2307.02047; came_pytorch 0.1.3, CAME.py",
        # Norms 2, square and sum 4, means 2, estimate and product 4, scaled 2, the mean 5, instability 7, its
        # means 2, estimate and product 4, weight decay 3, the update 7.
        accesses=lambda recipe, states: 42 * 4.0,
        room=came_room,
    ),
    "muon": Optimizer(
        muon_state,
        "Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982; torch.optim.Muon, AdamW for the rest",
        ONE_GPU,
        # Momentum and Nesterov's update 6, norm and division 3, four in each iteration, the update 5.
        accesses=lambda recipe, states: 34 * recipe.weight,
        room=newton_schulz_room,
        flops=newton_schulz_flops,
        product_bytes=2.0,
        in_backward=False,
        needs="Newton-Schulz iterations take whole matrices, which are gathered in many ways",
    ),
    "soap": SOAP,
    "pytorch-optimizer-soap": replace(
        SOAP,
        source="Vyas et al. 2024, arXiv:2409.11321; pytorch_optimizer 4.1.0, optimizer/soap.py",
        # As below, of 20, 6 and 2 products; each tenth step 4 and 12.
        accesses=lambda recipe, states: 36.4 * recipe.weight + 4.1 * (states - 2 * recipe.weight),
        room=soap_room(0),
        flops=soap_flops(4, 14 / 3),
        whole_weights=False,
    ),
    "shampoo": shampoo(8192),
    "shampoo-1024": shampoo(1024),
    "lomo": Optimizer(
        moments(0),
        "Lv et al. 2023, arXiv:2306.09782: SGD within the backward, without a norm to clip",
        ONE_GPU,
    ),
}

REFUSED: Mapping[str, str] = {
    "adalomo": "its factored moments within the backward are not measured",
    "galore": "its projections' sizes depend on their rank",
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


QUERY_KEY_VALUE = ("gpt2", "gpt_neox", "bloom", "falcon", "phi3", "mpt", "gpt_bigcode")
"""Families whose query, key and value are one tensor in transformers."""
GATE_UP = ("phi3", "glm4")
"""Families whose gate and up projections are one."""
COUNTS = ("pair", "copies", "vectors", "stacks")
"""Dimensions that say how many tensors of one shape there are."""


def tensor_of(weight: Weight, model: ModelSpec) -> Tensor:
    """The tensor that a weight is, or is a part of: ``QUERY_KEY_VALUE``, ``GATE_UP``."""
    dims = {name: length for name, length in weight.dims.items() if name not in COUNTS}
    together = model.model_type in QUERY_KEY_VALUE
    if together and weight.name.startswith(("query ", "key and value ")) and "norm" not in weight.name:
        heads = model.num_attention_heads + 2 * model.num_key_value_heads
        dims = {name: n for name, n in dims.items() if name == "hidden"} | {"qkv": heads * model.head_dim}
    if model.model_type in GATE_UP and weight.name in ("gate weight", "up weight"):
        dims["ffn"] = 2 * dims["ffn"]
    hidden, experts = dims.pop("hidden", None), dims.pop("experts", None)
    others: tuple[Quantity, ...] = (prod(dims.values()),) if dims else ()
    lengths = (experts, hidden) if experts is not None else (hidden,)
    shape = (*(n for n in lengths if n is not None), *others)
    if weight.name == "relative positions":
        shape = tuple(dims.values())
    return Tensor(shape, weight.matrix and len(shape) == 2, weight.name in EMBEDDINGS)


def resident(optimizer: Optimizer, tensor: Tensor, recipe: Recipe, shards: Quantity) -> Quantity:
    """Bytes of state per element of a tensor that the GPU must hold: all, but for what may be evicted."""
    states = optimizer.per_element(tensor, recipe, shards)
    return np.where(tensor.elements < LEAST_PAGED, states, 0.0) if optimizer.paged else states


def end_weights(model: ModelSpec, embeddings: bool = True) -> tuple[list[Weight], list[Weight]]:
    """Weights before and after the blocks on one GPU; where embeddings are frozen, without them."""
    before = list(embedding_weights(model, model.vocab_size)) if embeddings else []
    return before, [w for w in head_weights(model, model.vocab_size, 0) if w.dims.get("copies", 1)]


def tensors_of(model: ModelSpec, embeddings: bool = True) -> list[Tensor]:
    """Trained tensors in the order of the model, one of each kind of block."""
    before, after = end_weights(model, embeddings)
    blocks = [weight for block in model.block_kinds for weight in block_weights(model, block)]
    return [tensor_of(weight, model) for weight in [*before, *blocks, *after]]


def copies(optimizer: Optimizer, step: str | None) -> float:
    """How many copies of all parameters a step makes at once."""
    return optimizer.foreach_room * (step == FOREACH or not optimizer.foreach)


def step_buffers(
    optimizer: Optimizer, model: ModelSpec, recipe: Recipe, embeddings: bool = True
) -> list[Buffer]:
    """What the step allocates for the largest tensor, and what all tensors share, between steps too."""
    found: list[Buffer] = []
    if optimizer.room:
        size = optimizer.room(tensors_of(model, embeddings), recipe)
        found.append(Buffer(TEMPORARIES, size, "optimizer step"))
    if optimizer.kept:
        size = optimizer.kept(tensors_of(model, embeddings), recipe)
        found += [Buffer(INDICES, size, span) for span in ("passes", "optimizer step")]
    return found


def in_backward(optimizer: str, options: Mapping[str, str]) -> bool:
    """Is each parameter updated within the backward, its gradient never kept?"""
    return optimizer == "lomo" or options.get("optimizer_step") == IN_BACKWARD


def moved(optimizer: Optimizer, recipe: Recipe, step: str | None, states: Quantity) -> Quantity:
    """Bytes that the step moves for each parameter, of which ``states`` bytes are kept."""
    if step == FOREACH and optimizer.foreach:
        return optimizer.foreach * recipe.moment
    if optimizer.accesses:
        return optimizer.accesses(recipe, states - recipe.master)
    return 2 * (states + optimizer.paged) + recipe.gradient + recipe.weight


def step_flops(
    name: str, model: ModelSpec, blocks: Iterable[Block] | None = None, embeddings: bool = True
) -> float:
    """FLOPs of the optimizer step's matrix products, of the ends, of which embeddings may be frozen, and of
    all trained blocks: a model's own, if not given."""
    flops = optimizer_named(name).flops
    if flops is None:
        return 0.0

    def total(weights: Iterable[Weight]) -> float:
        """Of which a tensor is part, or there are two."""
        of = ((weight, tensor_of(weight, model)) for weight in weights)
        return sum(
            float(prod(weight.dims.values()) / tensor.elements * flops(tensor)) for weight, tensor in of
        )

    found = sum(total(weights) for weights in end_weights(model, embeddings))
    for block, same in groupby(model.blocks if blocks is None else blocks):
        if block.trained != "none":
            found += len(list(same)) * total(block_weights(model, block))
    return found


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
    if optimizer_named(name).whole_weights and min(recipe.weight, recipe.gradient) < 4:
        raise InputError(
            f"optimizer={name} takes weights and gradients in fp32, as its matrices are: use precision bf16 "
            "or fp32, or optimizer pytorch-optimizer-soap"
        )
    if optimizer_named(name).flops and training.adapters:
        raise InputError(f"optimizer={name} is not planned for adapters: use adamw")
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
    if optimizer.flops and (model.patches or model.state_space or model.delta):
        raise InputError(
            f"optimizer={name} is not planned for convolutions, whose tensors have more than two lengths: "
            "use adamw"
        )
    step = options.get("optimizer_step")
    if step == FOREACH and not optimizer.foreach:
        raise InputError(f"optimizer={name} has no foreach step: use optimizer_step=fused, or adamw")
    if in_backward(name, options) and not optimizer.in_backward:
        raise InputError(f"optimizer={name} is not planned within the backward: use optimizer_step=fused")
    return shardings
