"""Fills in what a job leaves open, and lists every assumption it makes by doing so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2
from typing import Any

from planner import adapters
from planner.catalog import step_time
from planner.errors import InputError
from planner.frozen import blocks_of, unmade_by_mixers
from planner.hybrids import for_hybrids, notes_of
from planner.model import Block
from planner.optimizers import OPTIMIZERS, check_states, shardings_of
from planner.precision import EIGHT_BITS, FOUR_BITS, check_options, precision_of, words_of
from planner.specs import ClusterSpec, ModelSpec, Profile, TrainingSpec
from planner.stacks import STACKS, stack_named
from planner.stacks.base import WIDTHS, Recipe, Stack
from planner.unplanned import uncounted, unfused, unplanned

USUAL_TOKENS = 4 * 2**20
"""Tokens per step where none are given: LLaMA's 4M (Touvron et al. 2023, arXiv:2302.13971, 2.3)."""


LEAST_BYTES = 256 * 2**20
"""Below this not even a process's own libraries fit."""


@dataclass(frozen=True)
class Job:
    """The three inputs with nothing left open, and the stack's tables for them."""

    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    stack: Stack
    recipe: Recipe
    assumptions: tuple[str, ...]
    stretch: float = 1.0  # the capacity is taken this many times: to find what comes nearest

    @property
    def seq_length(self) -> int:
        """Tokens of one sequence."""
        assert self.training.seq_length is not None
        return self.training.seq_length

    @property
    def global_batch_size(self) -> int:
        """Sequences of one step."""
        assert self.training.global_batch_size is not None
        return self.training.global_batch_size

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The model's blocks, in order, and how far each is trained."""
        return blocks_of(self.model, self.training)

    @property
    def trained_parameters(self) -> int:
        """Parameters that have a gradient."""
        return adapters.trained_parameters(self.model, self.training, self.stack, self.recipe)

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of one token, without the gradients of frozen weights."""
        return adapters.model_flops(self.model, self.training, self.stack, self.recipe)

    @property
    def attention_flops_per_token(self) -> float:
        """The part of :attr:`flops_per_token` that mixers have besides their matrices."""
        whole = self.model.attention_flops_per_token(self.seq_length)
        return whole - unmade_by_mixers(self.model, self.training)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step."""
        return self.seq_length * self.global_batch_size


def usual_batch(seq_length: int, num_gpus: int) -> int:
    """The number of sequences nearest to 4M tokens that divides well over that many GPUs.

    On large clusters at least one sequence for every 8 GPUs (Llama 3 405B: 2,048 on 16,384). The
    odd part of the GPU count times a power of two, so that every data-parallel degree divides.

    >>> usual_batch(2048, 64), usual_batch(2048, 48)
    (2048, 1536)
    """
    odd = num_gpus
    while odd % 2 == 0:
        odd //= 2
    target = max(USUAL_TOKENS / seq_length, num_gpus / 8, 1)
    return int(odd * 2 ** max(0, round(log2(max(target / odd, 1)))))


def _options(
    stack: Stack, training: TrainingSpec, model: ModelSpec, gpus: int, precision: str
) -> dict[str, str]:
    """Every option of the stack with its value: what was asked for, or the first that is listed."""
    given = dict(training.options)
    stack = stack.under(given)  # an option may bring others with it
    recipe = stack.recipes[precision]
    for name in ("attention", "swiglu"):
        value = getattr(training, name)
        heeded = value is not None and (name != "swiglu" or model.gated_mlp)
        if heeded and given.setdefault(name, value) != value:
            raise InputError(f"{name}={value} contradicts option {name}={given[name]}: give one")
    for name, value in given.items():
        if name in stack.sizes:
            _check_size(name, value)
            continue
        if name not in stack.options:
            known = ", ".join([*stack.options, *stack.sizes])
            raise InputError(f"{name}={value[:40]} is not an option of {stack.name}: it has {known}")
        if value not in stack.options[name]:
            allowed = " or ".join(stack.options[name])
            raise InputError(f"{name}={value[:40]} is not offered by {stack.name}: use {allowed}")
        if not stack.concerned(name, model, recipe):
            of = f"{model.name} in {precision} has no {stack.concerns[name].replace('_', ' ')}"
            raise InputError(f"{name}={value}: {of} that it is of: leave it out")
    concerned = [name for name in stack.options if stack.concerned(name, model, recipe)]
    usual = {name: stack.options[name][0] for name in concerned}
    if gpus == 1:
        usual |= stack.alone
    if stack.reduces_as_weights and recipe.weight == 2:
        usual["reduce_dtype"] = "bf16"
    chosen = {name: given.get(name, value) for name, value in usual.items()}
    return chosen | {name: given.get(name, f"{size:g}") for name, size in stack.sizes.items()}


def _check_size(name: str, value: str) -> None:
    try:
        size = float(value)
    except ValueError:
        size = 0.0
    if not 1 <= size <= 1e13:
        raise InputError(f"{name}={value[:40]}: write a number of elements, 1 or more, as in 5e8")


def _with_profile(stack: Stack, profile: Profile | None) -> Stack:
    """The stack with the overheads that a profile has measured.

    Those of few runs never narrow the framework's range. Raises InputError for another framework's.
    """
    if profile is None:
        return stack
    if profile.framework not in (None, stack.name):
        raise InputError(f"the profile was measured under {profile.framework}, not {stack.name}")
    measured: dict[str, Any] = {}
    for name, figure in profile.overheads.items():
        own = getattr(stack, name)
        least, most = figure.range_beside(own)
        measured[str(name)] = replace(
            own,
            value=figure.value,
            least=least,
            most=most,
            tag="measured",
            source=figure.source,
            of_tensors=not figure.few,  # the framework's own range is of what the pools serve
        )
    return replace(stack, **measured)


def profile_notes(profile: Profile | None, gpu: str) -> list[str]:
    """Why a profile's figures may not be those of the job: framework, kind of GPU, number of runs."""
    if profile is None:
        return []
    notes = []
    if profile.framework is None:
        notes.append("the profile names no framework: it may have been measured under another")
    if profile.gpu not in (None, gpu):
        differ = " and ".join(name for name in ("context", "communicator") if name in profile.overheads)
        effect = f"its {differ} may differ" if differ else "the allocator's part depends little on the GPU"
        notes.append(f"the profile was measured on {profile.gpu}, not {gpu}: {effect}")
    if few := " and ".join(name for name, figure in profile.overheads.items() if figure.few):
        notes.append(f"the profile has few runs: the range of {few} takes in the framework's own")
    return notes


def _switches(cluster: ClusterSpec) -> str:
    """What joins the nodes."""
    if cluster.nodes_per_leaf is None:
        return "one non-blocking switch joins all nodes"
    return f"leaf switches of {cluster.nodes_per_leaf} nodes, oversubscribed {cluster.oversubscription:g} : 1"


def _frameworks_for(model: ModelSpec) -> str:
    """The frameworks that plan such a model, in words; empty if none does."""
    able = [
        name
        for name, one in STACKS.items()
        if (not one.families or model.model_type in one.families)
        and not unplanned(model, one, "", {"attention": "eager"})
    ]
    return f"{', '.join(able[:-1])} or {able[-1]}" if able[1:] else "".join(able)


def _not_planned(model: ModelSpec, stack: Stack, reason: str) -> str:
    """Why a model is not planned in a framework, and in which it is."""
    elsewhere = _frameworks_for(model)
    if stack.families and model.model_type not in stack.families and elsewhere:
        has = ", ".join(stack.families)
        reason = f"framework={stack.name} has no {model.model_type} models, only {has}"
    same = not elsewhere or stack.name in elsewhere
    return reason if same else f"{reason}: use --framework {elsewhere}"


def resolve(model: ModelSpec, cluster: ClusterSpec, training: TrainingSpec) -> Job:
    """The job with every open choice made. Raises InputError for choices that cannot be."""
    for given, kind in ((model, ModelSpec), (cluster, ClusterSpec), (training, TrainingSpec)):
        if not isinstance(given, kind):
            raise InputError(f"{str(given)[:60]!r} is not a {kind.__name__}: make one, as the README shows")
    stack = stack_named(training.framework)
    if stack.families and model.model_type not in stack.families:
        raise InputError(_not_planned(model, stack, unplanned(model, stack)))
    if cluster.capacity_bytes < LEAST_BYTES:
        raise InputError(
            f"a budget of {cluster.capacity_bytes:,} bytes per GPU holds no training job: "
            "give 256 MiB or more"
        )
    if cluster.costed:
        from planner.cost_inputs import check

        check(cluster, training)
    notes = list(cluster.assumptions)
    if cluster.num_gpus > cluster.domain:
        notes.append(_switches(cluster))
    precision = precision_of(training.precision, stack, cluster.gpu)
    seq = training.seq_length or min(model.max_position_embeddings, 8192)
    if model.position_embedding == "learned" and seq > model.max_position_embeddings:
        raise InputError(
            f"seq_length={seq} exceeds the {model.max_position_embeddings} learned positions of "
            f"{model.name}: use {model.max_position_embeddings} or less"
        )
    if model.patches is not None and seq != model.patches.tokens:
        raise InputError(
            f"seq_length={seq}: an image of {model.name} has {model.patches.tokens} tokens: "
            f"use {model.patches.tokens}"
        )
    if model.kind == "encoder-decoder":
        notes.append(f"encoder and decoder see {seq} tokens each")
    batch = training.global_batch_size or usual_batch(seq, cluster.num_gpus)
    if not model.experts and (training.expert_capacity_factor or training.expert_imbalance != 1):
        raise InputError(f"expert_imbalance and expert_capacity_factor: {model.name} has no routed experts")
    options = _options(stack, training, model, cluster.num_gpus, precision)
    check_options(precision, stack, model, options)
    stack = _with_profile(stack.under(options), training.profile)
    stack = replace(stack, precision_words=words_of(precision, stack, cluster.gpu))
    if reason := uncounted(model, stack, options):
        raise InputError(reason)
    if options.get("compile") == "on" and not (model.gated_mlp and model.norm == "rmsnorm"):
        raise InputError(
            "compile=on: what compiled blocks keep is known of gated MLPs with RMSNorm only, "
            f"not of {model.model_type}"
        )
    asked = training.attention or training.options.get("attention")
    if "bf16" not in cluster.gpu.peak_flops and "eager" in stack.options["attention"]:
        if asked == "flash":
            raise InputError(f"attention=flash: {cluster.gpu.name} predates its kernels: use eager")
        options["attention"] = "eager"
    if stack.eager_alibi and unfused(model) and asked is None:
        options["attention"] = "eager"  # transformers has no fused attention for them
    if reason := unplanned(model, stack, precision, options):
        raise InputError(_not_planned(model, stack, reason))
    recipe = stack.recipes[precision]
    check_states(stack, training, recipe)
    if training.gradient_dtype:
        recipe = replace(recipe, gradient=WIDTHS[training.gradient_dtype])
    if training.optimizer_dtype:
        recipe = replace(recipe, moment=WIDTHS[training.optimizer_dtype])
    if training.master_weights is not None:
        recipe = replace(recipe, master=4.0 if training.master_weights else 0.0)

    if recipe.cast_alone and (training.adapters or training.frozen.blocks or training.frozen.embeddings):
        raise InputError("fp8_param_gather=on is planned where all weights are trained: leave it out")
    if stack.both_gradients and recipe.master and recipe.gradient == 4 and recipe.compute < 4:
        if recipe.unit == "fp16":
            raise InputError(f"gradient_dtype=fp32 in {stack.name} takes precision=bf16")
        recipe = replace(recipe, gradient=4 + recipe.compute)
    stack = replace(stack, shardings=stack.takes(stack.shardings, recipe))
    shardings = shardings_of(stack, training.optimizer, model, options)
    stack = for_hybrids(replace(stack, shardings=shardings), model, recipe, options)

    given_fields = training.model_dump(exclude_none=True)
    chosen = training.model_copy(update={"precision": precision, "options": options})
    adapters.check(model, chosen, stack)
    if training.frozen.blocks:
        stack = replace(stack, policies=("none",))
    if training.adapters:
        stack = adapters.with_launches(stack)
    if "seq_length" not in given_fields:
        whole = "all" if seq == model.max_position_embeddings else f"8192 of {model.max_position_embeddings}"
        notes.append(f"sequence length {seq}: {whole} positions of the model")
    if training.global_batch_size is None or "global_batch_size" not in training.model_fields_set:
        about = "about 4M tokens a step, a sequence per 8 GPUs at least"
        if batch != usual_batch(seq, cluster.num_gpus):
            about += ", in whole micro-batches"
        notes.append(f"global batch of {batch} sequences: {about}")
    if "precision" not in given_fields:
        notes.append(f"precision {precision}")
    moments = f"moments of {recipe.moment:g}" if OPTIMIZERS[training.optimizer].typed else "the optimizer's"
    weight = f"{recipe.weight:g}" + f", of blocks' {recipe.cast_weight:g}" * recipe.cast_alone
    states = f"{weight} + {recipe.gradient:g} + {recipe.master:g} + {moments}"
    of = "trained parameter" if training.adapters else "parameter"
    notes.append(f"{stack.version}; bytes per {of} (weight, gradient, master, moments): {states}")
    shown = {name: value for name, value in options.items() if name != "swiglu" or model.gated_mlp}
    notes.append(", ".join(f"{name} {value}" for name, value in shown.items()))
    if model.experts and not training.expert_capacity_factor and training.expert_imbalance == 1:
        notes.append("tokens are spread evenly over the GPUs' experts (--expert-imbalance)")
    if model.mtp_layers and options.get("mtp") != "on":
        how = ": option mtp=on" if "mtp" in options else f", which {stack.name} is planned without"
        notes.append(f"modules that predict further tokens are left out{how}")
    notes += adapters.notes(model, chosen, stack, recipe)
    if precision in stack.notes:
        notes.append(stack.notes[precision])
    optimizer = OPTIMIZERS[training.optimizer]
    if training.optimizer != "adamw":
        notes.append(f"optimizer {training.optimizer}: {optimizer.source}")
    if optimizer.note:
        notes.append(optimizer.note)
    if recipe.quantized:
        notes.append(FOUR_BITS if recipe.unit == "fp4" else EIGHT_BITS)
    notes += notes_of(model)
    notes.append("MFU counts attention in full, as if it were not causal")
    low, high, tie = (step_time(name).value for name in ("least", "most", "tie"))
    notes.append(
        f"step times: of 64 published runs that nothing was fitted to, four in five took {low:.2f} to "
        f"{high:.2f} times as long; layouts within {tie:.1%} of the first are ties (docs/time.md)"
    )
    if stack.hidden_transfers and options.get("overlap") != "off":
        notes.append(f"data-parallel messages overlap with compute, as with {stack.hidden_transfers}")
    overheads = (stack.context, stack.communicator, stack.allocator)
    for overhead in overheads:
        small = overhead.fraction
        size, least, most = (
            f"{x:.0%}" if small else f"{x / 2**30:.3g}"
            for x in (overhead.value, overhead.least, overhead.most)
        )
        size = f"{size}{'' if small else ' GiB'}, {least} to {most}"
        notes.append(f"{overhead.name}: {size} ({overhead.tag}: {overhead.source})")
    filled = training.model_copy(
        update={
            "seq_length": seq,
            "global_batch_size": batch,
            "precision": precision,
            "attention": options["attention"],
            "swiglu": options.get("swiglu"),
            "options": options,
        }
    )
    return Job(model, cluster, filled, stack, recipe, tuple(notes))
