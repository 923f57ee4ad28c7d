"""What is trained of a model: low-rank adapters beside frozen weights, or all but what is frozen.

LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1) adds ``B A x`` to a frozen product ``W x``: ``A`` is of
rank x input, ``B`` of output x rank. QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3) stores ``W``
in 4 bits with an fp32 constant for every 64 elements, double-quantised to 8 bits with one for every 256
of these, and casts one weight at a time to the precision of the products. What is frozen has
neither gradients nor optimizer states, and its products make no gradient of a weight: 4 FLOPs of 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, field_validator

from planner import frozen
from planner.errors import InputError
from planner.frozen import unmade_by_mixers
from planner.model import FROZEN, ModelSpec
from planner.steps import STEPS

if TYPE_CHECKING:
    from planner.specs import TrainingSpec
    from planner.stacks.base import Recipe, Row, Stack
    from planner.weights import Weight

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""Products of a block that an adapter can stand beside."""
GROUPS = {"all-linear": TARGETS, "attention": TARGETS[:4], "mlp": TARGETS[4:]}
"""Words for several of them; ``all-linear`` is peft's, without the head."""
STEP = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "out", "gate": "up", "up": "up", "down": "down"}
"""The step of a block's backward that a product belongs to (planner/layers.py)."""
FUSED: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("gate", "up"))
"""Products that Megatron-core makes in one, and so with one adapter."""
LAUNCHES = (38.0, 64.0)
"""Kernels of a block's forward and backward with frozen weights in half precision: those of transformers'
modules (tests/data/traced_traffic.json) less the seven that make gradients of weights. The adapters' own, 5
and 9 each, are not counted: at the host's time for a kernel, which was fitted to whole blocks, they alone
would take longer than the whole steps of fine-tuning that Qwen's README lists for 256 tokens."""


class Adapters(BaseModel):
    """Low-rank adapters in all blocks. ``rank`` is in elements; how they are scaled does not matter here.

    ``targets`` are products (``q k v o gate up down``) or words for several (``all-linear attention mlp``).
    ``dtype`` is that of the adapters where the weights are in half precision throughout. ``quantize``
    stores the frozen matrices in NF4 blocks of 64, their constants in turn in 8 bits with ``double``.
    """

    model_config = FROZEN

    rank: int = Field(ge=1, le=100_000)
    targets: tuple[str, ...] = Field(("all-linear",), min_length=1, max_length=20)
    dropout: float = Field(0.0, ge=0, lt=1)
    dtype: Literal["fp32", "bf16"] | None = None
    dora: bool = False
    quantize: Literal["nf4"] | None = None
    double: bool = False
    keeps_inputs: bool = False  # of quantised products, as bitsandbytes 0.41 does; 0.49 does not

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for word in targets:
            if word not in TARGETS and word not in GROUPS:
                known = ", ".join((*TARGETS, *GROUPS))
                raise ValueError(f"{word[:40]!r} is no product of a block: use {known}")
        return targets

    @property
    def quantized_bytes(self) -> float:
        """Bytes of an NF4 element with its constants: 0.5 + 4/64, or 0.5 + 1/64 + 4/(64 x 256).

        Dettmers et al. 2023, section 3: 0.5 and 0.127 bits of constants for each parameter.

        >>> round(8 * (Adapters(rank=8, double=True).quantized_bytes - 0.5), 3)
        0.127
        """
        return 0.5 + (1 / 64 + 4 / (64 * 256) if self.double else 4 / 64)

    def products(self, model: ModelSpec) -> tuple[str, ...]:
        """The targets one by one, as far as the model's blocks have them."""
        wanted = [one for word in self.targets for one in GROUPS.get(word, (word,))]
        return tuple(one for one in TARGETS if one in wanted and (one != "gate" or model.gated_mlp))


class Frozen(BaseModel):
    """What is not trained of a model without adapters."""

    model_config = FROZEN

    embeddings: bool = False  # and a head that is tied to them
    blocks: int = Field(0, ge=0, le=10_000)  # the first so many, with the embeddings


@dataclass(frozen=True)
class Tuning:
    """Which weights of a model are trained, under a stack; what that leaves of its tables' rows."""

    model: ModelSpec
    training: TrainingSpec
    stack: Stack
    recipe: Recipe

    @property
    def adapters(self) -> Adapters | None:
        """The adapters, if it is they that are trained."""
        return self.training.adapters

    def freezes(self, weight: Weight) -> bool:
        """Is this weight not trained?"""
        if self.adapters:
            return weight.of == ""
        if not self.training.frozen.embeddings:
            return False
        return weight.step == "embedding" or (weight.step == "head" and self.model.tie_word_embeddings)

    def frozen_bytes(self, weight: Weight) -> float:
        """Bytes of an element of a frozen weight: as the trained ones; beside adapters in the products'
        precision, or quantised.

        bitsandbytes replaces the blocks' products, not the head; nothing but matrices is quantised.
        """
        if self.adapters is None:
            return self.recipe.weight
        if self.adapters.quantize and weight.matrix:
            return self.adapters.quantized_bytes
        return min(self.recipe.weight, self.recipe.compute)

    @property
    def trained_recipe(self) -> Recipe:
        """Bytes of what is trained: the precision's own, or of adapters in a precision of their own."""
        if self.adapters and self.adapters.dtype:
            width = {"fp32": 4.0, "bf16": 2.0}[self.adapters.dtype]
            return replace(self.recipe, weight=width, gradient=width, moment=width)
        return self.recipe

    @property
    def lowest(self) -> str:
        """The last step of a block's backward that makes the gradient of a weight."""
        if self.adapters is None:
            return "norm1"
        return max((STEP[one] for one in self.adapters.products(self.model)), key=STEPS["block"].index)

    def ends_at(self, weight: Weight) -> bool:
        """Is this weight's product in the lowest trained step, or below: does its input need no gradient?"""
        ends = STEPS["block"].index(self.lowest)
        return STEPS["block"].index(weight.step) >= ends and not weight.name.startswith("adapter B")

    @property
    def casts(self) -> str:
        """How the input of an adapter is cast: under ``autocast``, to ``fp32``, or not at all.

        peft casts it to the adapter's type; autocast then casts this and both weights to half precision.
        """
        if self.training.precision in self.stack.autocast:
            return "autocast"
        return "fp32" if self.trained_recipe.weight > self.recipe.weight else ""

    @property
    def own_inputs(self) -> bool:
        """Does every adapter keep an input of its own, cast or dropped out?"""
        return bool(self.adapters and (self.casts or self.adapters.dropout))

    def rows(self, kind: str, rows: tuple[Row, ...]) -> Iterator[Row]:
        """The rows of a layer that are left: what only gradients of frozen weights need is not kept.

        Of frozen embeddings nothing is kept or made.
        """
        if not self.adapters and not self.training.frozen.embeddings:
            yield from rows
            return
        for row in rows:
            readers = row.read_by.split()
            alive = [self._reads(reader, row) for reader in readers]
            if (kind == "embedding" and row.role != "traffic") or (readers and not any(alive)):
                continue
            if all(alive):
                yield row
                continue
            steps = [step for step, read in zip(row.steps.split(), alive, strict=True) if read]
            yield replace(row, count=row.count * len(steps) / len(alive), steps=" ".join(steps))

    def _reads(self, reader: str, row: Row) -> bool:
        """Is a row needed for the gradients of the norms, the head, or the products of a step?"""
        if not self.adapters:
            return reader != "head" or not self.model.tie_word_embeddings
        if self.adapters.quantize and self.adapters.keeps_inputs and row.role == "activation":
            return reader in STEP.values()
        shared = row.role == "activation" and not self.own_inputs and not self.gathers_inputs
        return shared and reader in {STEP[one] for one in self.adapters.products(self.model)}

    @property
    def gathers_inputs(self) -> bool:
        """Adapters of Megatron Bridge keep inputs that sequence parallelism would cut, gathered."""
        return "mcore" in self.stack.words

    @property
    def crossings(self) -> int:
        """How often adapters gather the residual stream over a tensor-parallel group: for o and for down.

        Megatron Bridge cuts ``B`` beside a row-parallel product by columns and gathers its output.
        """
        adapted = self.adapters.products(self.model) if self.adapters else ()
        return sum(one in adapted for one in ("o", "down")) * self.gathers_inputs

    def modules(self) -> list[tuple[str, ...]]:
        """The adapted products, together where one adapter stands beside several."""
        if self.adapters is None:
            return []
        products = self.adapters.products(self.model)
        together: tuple[tuple[str, ...], ...] = FUSED if "mcore" in self.stack.words else ()
        if self.model.model_type in ("gpt2", "gpt_neox", "bloom"):
            together = FUSED if together else FUSED[:1]
        modules: list[tuple[str, ...]] = []
        for one in products:
            group = next((g for g in together if one in g), (one,))
            group = tuple(member for member in group if member != "gate" or self.model.gated_mlp)
            if any(member not in products for member in group):
                raise InputError(
                    f"targets={','.join(products)}: {', '.join(group)} are one product of "
                    f"{self.stack.name}'s {self.model.model_type}: target all of them or none"
                )
            if group not in modules:
                modules.append(group)
        return modules

    def weights(self) -> Iterator[Weight]:
        """The adapters of one block: of each ``A``, and ``B`` for each of its products."""
        from planner.weights import Weight

        if self.adapters is None:
            return
        rank = {"rank": self.adapters.rank}
        for module in self.modules():
            name, step = "-".join(module), STEP[module[0]]
            yield Weight(f"adapter A of {name}", self.input_dims(module[0]) | rank, step, True, of=name)
            for member in module:
                dims = rank | self.output_dims(member)
                yield Weight(f"adapter B of {member}", dims, step, True, of=name)
                if self.adapters.dora:
                    yield Weight(f"magnitudes of {member}", self.output_dims(member), step, of=name)

    def input_dims(self, product: str) -> dict[str, Any]:
        """Lengths of the input of a product, as a weight has them."""
        if product == "o":
            return {"heads": self.model.num_attention_heads, "head_dim": self.model.head_dim}
        return (
            {"ffn": self.model.intermediate_size} if product == "down" else {"hidden": self.model.hidden_size}
        )

    def output_dims(self, product: str) -> dict[str, Any]:
        """Lengths of the output of a product."""
        model = self.model
        if product == "q":
            return {"heads": model.num_attention_heads, "head_dim": model.head_dim}
        if product in ("k", "v"):
            return {"kv_heads": model.num_key_value_heads, "head_dim": model.head_dim}
        return (
            {"ffn": model.intermediate_size} if product in ("gate", "up") else {"hidden": model.hidden_size}
        )


def check(model: ModelSpec, training: TrainingSpec, stack: Stack) -> None:
    """Raises InputError where what is trained is not modelled."""
    adapters = training.adapters
    frozen.check(model, training, stack)
    if adapters is None:
        return
    if stack.name == "torchtitan":
        raise InputError(
            "adapters: torchtitan's converter adapts every Linear with the head, which has not been traced: "
            "use --framework fsdp, hf, deepspeed or megatron"
        )
    if model.model_type in stack.traced:
        raise InputError(
            f"adapters in {stack.name}: what {model.model_type} blocks keep beside them has not been traced: "
            "use a model of llama's, qwen's or gpt2's kind"
        )
    options, where = training.options, f"in {stack.name}"
    if options.get("kernels") == "megatron":
        raise InputError("adapters: Megatron-DeepSpeed has none: use kernels=hf, or --framework megatron")
    if options.get("compile") == "on":
        raise InputError("adapters: what compiled blocks keep beside them is not known: use compile=off")
    if adapters.dora and (stack.name == "megatron" or adapters.quantize):
        raise InputError(
            f"dora{' of 4-bit weights' if adapters.quantize else ''} {where}: what it keeps there is not "
            "traced: plan LoRA of the same rank, or use --framework hf, fsdp or deepspeed without --quantize"
        )
    if adapters.quantize and stack.name == "megatron":
        raise InputError(
            f"quantize={adapters.quantize}: 4-bit weights are not cut by tensor parallelism and Megatron "
            "Bridge has none: use --framework fsdp, hf or deepspeed"
        )
    causal = model.blocks[0].mixer in ("full", "window") and model.kind == "decoder" and not model.latent
    if model.block_kinds != model.blocks[:1] or model.blocks[0].mlp != "dense" or not causal:
        raise InputError(
            f"adapters: {model.name}'s blocks are not all alike, causal attention and a dense MLP: "
            "use a model whose blocks are"
        )
    if adapters.dtype and not (training.precision == "pure-bf16" and stack.name in ("hf", "fsdp")):
        raise InputError(
            f"adapters' dtype={adapters.dtype} {where}: precision={training.precision} gives trained weights "
            "theirs: leave it out, or use precision=pure-bf16"
        )


def trained_parameters(model: ModelSpec, training: TrainingSpec, stack: Stack, recipe: Recipe) -> int:
    """Parameters that have a gradient."""
    from planner.weights import block_weights, elements, embedding_weights, head_weights

    tuning = Tuning(model, training, stack, recipe)
    if tuning.adapters:
        return elements(tuning.weights()) * model.num_hidden_layers
    around = (*embedding_weights(model, model.vocab_size), *head_weights(model, model.vocab_size, 0))
    trained = model.blocks[training.frozen.blocks :]
    total = sum(elements(block_weights(model, block)) for block in trained)
    return total + elements(w for w in around if not tuning.freezes(w))


def model_flops(model: ModelSpec, training: TrainingSpec, stack: Stack, recipe: Recipe) -> float:
    """Model FLOPs of one token: those of training all weights, less 2 of 6 for each that is frozen.

    Adapters count in full; of blocks that no gradient reaches the forward's third is left. A fully trained
    model has :meth:`ModelSpec.flops_per_token`.
    """
    from planner.weights import block_weights, count_matrix_parameters, elements

    tuning = Tuning(model, training, stack, recipe)
    total = model.flops_per_token(training.seq_length or 1)
    if tuning.adapters:
        adapters = trained_parameters(model, training, stack, recipe)
        return total - 2.0 * count_matrix_parameters(model) + 6.0 * adapters
    tied = training.frozen.embeddings and model.tie_word_embeddings
    below = model.blocks[: training.frozen.blocks]
    total -= 4.0 * sum(elements(block_weights(model, block), True, True) for block in below)
    total -= unmade_by_mixers(model, training)
    return total - 2.0 * model.vocab_size * model.hidden_size * tied


def with_launches(stack: Stack) -> Stack:
    """The stack with the kernels that a block of frozen weights launches."""
    forward, backward = stack.launches
    return replace(stack, launches=(min(forward, LAUNCHES[0]), min(backward, LAUNCHES[1])))


def notes(model: ModelSpec, training: TrainingSpec, stack: Stack, recipe: Recipe) -> Iterator[str]:
    """What a plan takes for granted about what is trained."""
    tuning, adapters = Tuning(model, training, stack, recipe), training.adapters
    if not adapters and not training.frozen.embeddings:
        return
    trained = trained_parameters(model, training, stack, recipe)
    whole = model.num_parameters + (trained if adapters else 0)
    yield f"trained: {trained:,} of {whole:,} parameters ({trained / whole:.2%})"
    if training.frozen.blocks:
        yield (
            f"the first {training.frozen.blocks} of {model.num_hidden_layers} blocks are frozen with the "
            f"embeddings: {recipe.weight:g} bytes a weight, forward only, nothing kept"
        )
    if adapters is None:
        return
    products = " ".join("-".join(module) for module in tuning.modules())
    width = {2: "half precision", 4: "fp32"}[int(tuning.trained_recipe.weight)]
    yield f"adapters of rank {adapters.rank}, in {width}, beside {products}; dropout {adapters.dropout:g}"
    if adapters.quantize:
        twice = ", double-quantised" if adapters.double else ""
        yield (
            f"the blocks' matrices in NF4 blocks of 64{twice}: {adapters.quantized_bytes:.4g} bytes each; "
            "embedding, norms and head in half precision (peft's prepare_model_for_kbit_training: in fp32)"
        )
    else:
        yield f"frozen weights of {min(recipe.weight, recipe.compute):g} bytes each"
    if tuning.gathers_inputs:
        yield "the first block is taken to keep as much as any other, though nothing below it is trained"
        yield "adapters are Megatron Bridge's: their inputs gathered, both matrices cut by tensor parallelism"


def read(text: str | None, quantize: str | None) -> dict[str, Any] | None:
    """Adapters of ``16`` or ``rank=16,targets=q+v,dropout=0.05,dtype=fp32,dora,double``.

    Raises InputError for what is none of these.

    >>> read("16,targets=q+v", "nf4")
    {'rank': '16', 'targets': ['q', 'v'], 'quantize': 'nf4'}
    """
    if text is None:
        if quantize:
            raise InputError(
                f"--quantize {quantize[:40]}: 4-bit weights are frozen: add --lora, as in --lora 16"
            )
        return None
    values: dict[str, Any] = {}
    for part in text.lower().replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = ("rank", part) if part.isdigit() else (part, "on")
        if name not in Adapters.model_fields or name == "quantize" or name in values:
            raise InputError(
                f"--lora {text[:60]!r}: write a rank, or rank=16,targets=q+v,dropout=0.05,dtype=fp32,double"
            )
        values[name] = value.split("+") if name == "targets" else value
    if quantize:
        values["quantize"] = quantize.lower()
    return values
