"""What was asked for, as one value, and how two askings differ on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.defaults import Job, resolve
from planner.errors import InputError
from planner.layouts import Choices
from planner.reading import batch_unit, with_batch
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from strategies.layout import Layout

SHORT = {
    "tensor_parallel": "-tp",
    "pipeline_parallel": "-pp",
    "data_parallel": "-dp",
    "context_parallel": "-cp",
    "expert_parallel": "-ep",
    "expert_tensor_parallel": "-etp",
    "micro_batch_size": "-mb",
    "global_batch_size": "-b",
}
FLAGS = {
    ("sequence_parallel", True): "--sequence-parallel",
    ("sequence_parallel", False): "--no-sequence-parallel",
    ("reshard_after_forward", True): "--reshard-after-forward",
    ("reshard_after_forward", False): "--keep-gathered",
}
OF_TRAINING = (
    "framework",
    "precision",
    "optimizer",
    "gradient_dtype",
    "optimizer_dtype",
    "attention",
    "swiglu",
    "seq_length",
)
OF_LAYOUT = (
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "context_parallel",
    "context_comm",
    "ulysses_degree",
    "expert_parallel",
    "expert_tensor_parallel",
    "micro_batch_size",
    "chunks",
    "schedule",
    "sharding",
    "reshard_after_forward",
    "sequence_parallel",
    "rank_order",
)
OF_CHOICES = (
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "context_parallel",
    "context_comm",
    "ulysses_degree",
    "expert_parallel",
    "expert_tensor_parallel",
    "micro_batch_size",
    "chunks",
    "sharding",
    "schedule",
    "recompute",
    "rank_order",
    "offload",
)


@dataclass(frozen=True)
class Asked:
    """The inputs of ``estimate``, or of ``search`` where ``layout`` is None."""

    model: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    layout: Layout | None = None
    recompute: str = "none"
    layers: tuple[int, ...] | None = None
    choices: Choices = Choices()  # noqa: RUF009 - frozen

    @property
    def job(self) -> Job:
        """The job with nothing left open. Raises InputError for what cannot be."""
        return resolve(self.model, self.cluster, self.training)

    @property
    def offload(self) -> str:
        """What ``--offload`` says of a given layout, activations too."""
        whole = [self.layout.offload] if self.layout and self.layout.offload else []
        return ",".join([*whole, *["activations"] * self.recompute.endswith("+activations")])

    def with_layout(self, **fields: Any) -> Asked:
        """Other fields of the layout; micro-batches and shards follow, so that the batch is kept.

        Raises InputError where the batch does not divide so.
        """
        assert self.layout is not None
        before, batch = self.layout, self.layout.global_batch_size
        layout = replace(before, **fields)
        each = layout.data_parallel * layout.micro_batch_size
        if batch % each:
            raise InputError(f"a batch of {batch} is no multiple of {each} sequences")
        if "data_shards" not in fields:
            within = before.data_shards if layout.sharding == "fsdp" else layout.data_parallel
            whole = before.data_shards == before.data_parallel or layout.data_parallel % within
            fields["data_shards"] = layout.data_parallel if whole else within
        layout = replace(layout, data_shards=fields["data_shards"], grad_accum=batch // each)
        split = None if layout.pipeline_parallel != before.pipeline_parallel else self.layers
        return replace(self, layout=layout, layers=split)


def gpus_text(cluster: ClusterSpec) -> str:
    """How ``--gpus`` names a cluster.

    >>> gpus_text(ClusterSpec.parse("16xh100")), gpus_text(ClusterSpec.parse("4x4xh100"))
    ('16xH100-SXM-80GB', '4x4xH100-SXM-80GB')
    """
    count, per_node = cluster.num_gpus, cluster.gpus_per_node
    if per_node == min(cluster.gpu.gpus_per_node, count):
        return f"{count}x{cluster.gpu.name}"
    return f"{count // per_node}x{per_node}x{cluster.gpu.name}"


def options_between(before: Asked, after: Asked) -> dict[str, Any]:
    """The options that make ``after`` of ``before``, by their names: added, replaced, or left out if None.

    ``option`` maps the framework's own options to their values. ``layout`` of one may be there only where
    that of the other is.
    """
    return dict(_differences(before, after))


def _differences(before: Asked, after: Asked) -> Iterator[tuple[str, Any]]:
    if gpus_text(before.cluster) != gpus_text(after.cluster):
        yield "gpus", gpus_text(after.cluster)
    if before.cluster.budget_bytes and not after.cluster.budget_bytes:
        yield "memory_budget", None
    if before.cluster.headroom and not after.cluster.headroom:
        yield "headroom", None
    for name in OF_TRAINING:
        if getattr(before.training, name) != getattr(after.training, name):
            yield name, getattr(after.training, name)
    own, other = before.training.options, after.training.options
    if changed := {name: other.get(name) for name in {**own, **other} if own.get(name) != other.get(name)}:
        yield "option", changed
    if before.training.profile and not after.training.profile:
        yield "profile", None
    if _asks_for_batch(before, after):
        yield "global_batch_size", after.job.global_batch_size
    yield from _of_layout(before, after) if after.layout else _of_choices(before, after)


def _asks_for_batch(before: Asked, after: Asked) -> bool:
    """Would another batch be read, if it were not given?"""
    batch = after.job.global_batch_size
    if "global_batch_size" in before.training.model_fields_set and before.training.global_batch_size:
        return before.training.global_batch_size != batch
    sizes = after.choices.micro_batch_size
    unit = after.cluster.num_gpus * sizes[0] if sizes and len(sizes) == 1 else 1
    if after.layout:
        layout = after.layout
        places = layout.data_parallel, layout.micro_batch_size, layout.pipeline_parallel
        unit = batch_unit(*places, layout.schedule)
    unsaid = after.training.model_copy(update={"global_batch_size": None})
    return with_batch(after.model, after.cluster, unsaid, unit).global_batch_size != batch


def _of_layout(before: Asked, after: Asked) -> Iterator[tuple[str, Any]]:
    old, new = before.layout, after.layout
    assert old is not None
    assert new is not None
    moved = before.training.framework != after.training.framework
    alone = {"context_comm", "ulysses_degree"} if new.context_parallel == 1 else set()
    for name in OF_LAYOUT:
        if name in alone:
            continue
        if getattr(old, name) != getattr(new, name) or (moved and name == "sharding"):
            yield name, getattr(new, name)
    shards = [(one.data_parallel, one.data_shards, one.sharding) for one in (old, new)]
    hybrid = new.data_shards != new.data_parallel  # left out, it stands for all replicas there are then
    if new.sharding == "fsdp" and shards[0] != shards[1] and (hybrid or old.data_shards != new.data_shards):
        yield "data_shards", new.data_shards
    elif old.sharding == "fsdp" and new.sharding != "fsdp":
        yield "data_shards", None
    ways = [asked.recompute.partition("+")[0] for asked in (before, after)]
    if ways[0] != ways[1]:
        yield "recompute", ways[1]
    if before.offload != after.offload:
        yield "offload", after.offload or None
    if before.layers != after.layers:
        yield "layers_per_stage", ",".join(map(str, after.layers)) if after.layers else None


def _of_choices(before: Asked, after: Asked) -> Iterator[tuple[str, Any]]:
    for name in OF_CHOICES:
        value = getattr(after.choices, name)
        if getattr(before.choices, name) != value:
            yield name, ",".join(map(str, value)) if value else None


def options_text(options: dict[str, Any]) -> str:
    """Options as they are written.

    >>> options_text({"tensor_parallel": 8, "option": {"loss": "fused"}, "headroom": None})
    '-tp 8 --option loss=fused, no --headroom'
    """
    given: list[str] = []
    gone: list[str] = []
    for name, value in options.items():
        flag = SHORT.get(name, "--" + name.replace("_", "-"))
        if name == "option":
            given += [f"--option {own}={chosen}" for own, chosen in value.items() if chosen is not None]
            gone += [f"no --option {own}" for own, chosen in value.items() if chosen is None]
        elif value is None:
            gone.append(f"no {flag}")
        else:
            given.append(FLAGS.get((name, value)) or f"{flag} {value}")
    return ", ".join([*([" ".join(given)] if given else []), *gone])


def applied(given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A command's options by name with those of a change in their place."""
    changed = {**given, **{name: value for name, value in options.items() if name != "option"}}
    own: Sequence[str] = given.get("option") or ()
    new: dict[str, str | None] = options.get("option", {})
    kept = [one for one in own if one.partition("=")[0].strip().lower() not in new]
    return changed | {
        "option": kept + [f"{name}={value}" for name, value in new.items() if value is not None]
    }
