"""Text from a command line to the three inputs, with errors that name the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planner.defaults import resolve
from planner.errors import InputError
from planner.layouts import CHOSEN_DEGREES
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec, first_problem
from planner.units import GIB, gib, parse_bytes, parse_fraction
from strategies.layout import Layout
from strategies.pipeline_parallel import FOLDED, SCHEDULES

LAYOUT_OPTIONS = (
    "tensor_parallel",
    "pipeline_parallel",
    "data_parallel",
    "micro_batch_size",
    "chunks",
    "sharding",
    "data_shards",
    "reshard_after_forward",
    "schedule",
    "sequence_parallel",
    "rank_order",
    "context_parallel",
    "context_comm",
    "ulysses_degree",
    "expert_parallel",
    "expert_tensor_parallel",
)


def read_model(text: str) -> ModelSpec:
    """A model from a path, if there is one or the text looks like one, a shape, or from the catalog."""
    if not text.strip():
        raise InputError("--model is empty: give a catalog name, a config.json or its folder")
    try:
        is_path = text.endswith(".json") or Path(text).exists()
    except (OSError, ValueError):
        raise InputError(f"--model {text[:60]!r} is neither a path nor a catalog name") from None
    if "=" in text and not is_path:
        from planner.shape import model_from_shape

        return model_from_shape(text)
    return ModelSpec.from_hugging_face(text) if is_path else ModelSpec.from_catalog(text)


def read_cluster(
    gpus: str | ClusterSpec,
    memory_budget: str | None = None,
    headroom: str | None = None,
    nodes_per_leaf: int | None = None,
    oversubscription: float | None = None,
    host_memory: str | None = None,
    host_bandwidth: str | None = None,
    nvme: str | None = None,
    nvme_bandwidth: str | None = None,
) -> ClusterSpec:
    """A cluster with its memory budget and the switches above its nodes."""
    cluster = gpus if isinstance(gpus, ClusterSpec) else ClusterSpec.parse(gpus)
    update: dict[str, Any] = {}
    if memory_budget is not None:
        update["budget_bytes"] = budget = parse_bytes(memory_budget, "--memory-budget ")
        if budget < GIB:
            raise InputError(f"--memory-budget {memory_budget}: less than 1 GiB holds no training job")
        if budget > cluster.gpu.memory_bytes:
            have = f"{cluster.gpu.name} has {gib(cluster.gpu.usable_bytes)} GiB usable"
            raise InputError(f"--memory-budget {memory_budget} is more than there is: {have}")
    if headroom is not None:
        update["headroom"] = parse_fraction(headroom, "--headroom ")
    if nodes_per_leaf is not None:
        update["nodes_per_leaf"] = nodes_per_leaf
    if oversubscription is not None:
        update["oversubscription"] = oversubscription
    for field, flag, text in (
        ("host_memory_bytes", "--host-memory", host_memory),
        ("host_bytes_per_s", "--host-bandwidth", host_bandwidth),
        ("nvme_bytes", "--nvme", nvme),
        ("nvme_bytes_per_s", "--nvme-bandwidth", nvme_bandwidth),
    ):
        if text is not None:
            update[field] = parse_bytes(text, f"{flag} ")
            if not update[field]:
                raise InputError(f"{flag} {text}: write more than nothing, or leave it out")
    try:
        return ClusterSpec(**{**dict(cluster), **update})
    except ValidationError as error:
        problem = first_problem(error)
        for name in ("nodes_per_leaf", "oversubscription"):
            flag = f"--{name.replace('_', '-')}"
            problem = problem.replace(f"{name}=", "\0 ").replace(name, "\0").replace("\0", flag)
        raise InputError(problem) from None


def read_training(given: dict[str, Any]) -> TrainingSpec:
    """A TrainingSpec of those of its fields that were given; ``tokens`` may be text."""
    values = {name: given[name] for name in TrainingSpec.model_fields if given.get(name) is not None}
    values = {
        name: v.lower() if isinstance(v, str) and name != "profile" else v for name, v in values.items()
    }
    if given.get("option"):
        values["options"] = read_options(given["option"])
    if "profile" in values:
        from planner.profiles import read_profile

        values["profile"] = read_profile(values["profile"])
    if "tokens" in values:
        values["tokens"] = read_count(values["tokens"])
    from planner import adapters, frozen

    if lora := adapters.read(given.get("lora"), given.get("quantize")):
        values["adapters"] = lora
    if given.get("freeze"):
        values["frozen"] = frozen.read(given["freeze"])
    try:
        return TrainingSpec(**values)
    except ValidationError as error:
        field, _, rest = first_problem(error).partition("=")
        flag = field.replace("adapters.quantize", "quantize").replace("adapters.", "lora ").replace("_", "-")
        raise InputError(f"--{flag} {rest}") from None


def read_options(texts: list[str]) -> dict[str, str]:
    """Options of ``["loss=fused", "norm=recomputed"]``; the framework's table says which there are."""
    options: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.strip().lower().partition("=")
        if not (name and equals and value) or len(text) > 100:
            raise InputError(f"--option {text[:40]!r}: write NAME=VALUE, as in loss=fused")
        if options.setdefault(name, value) != value:
            raise InputError(f"--option {name} is given twice: {options[name]} and {value[:40]}")
    return options


def read_count(text: str) -> float:
    """Tokens of a text.

    >>> read_count("1.4T")
    1400000000000.0
    """
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e18:
        raise InputError(f"--tokens {text[:40]!r} is not a number of tokens: write 300B or 1.4T")
    return value


def numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Degrees of ``2,4,8``. Raises InputError."""
    if text is None:
        return None
    parts = [part.strip() for part in text[:1000].split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part[:20]) <= 10**7 for part in parts):
        raise InputError(f"{option} {text[:40]!r}: write whole numbers, 1 or more, as in 4 or 2,4,8")
    return tuple(int(part) for part in parts)


def words(text: str | None) -> tuple[str, ...] | None:
    """Names of ``ddp,zero1``."""
    return None if text is None else tuple(word(part) for part in text.split(","))


def read_choices(given: dict[str, Any]) -> dict[str, Any]:
    """What a search may choose from, by the fields of :class:`planner.layouts.Choices`."""
    only: dict[str, Any] = {
        name: numbers(f"--{name.replace('_', '-')}", given[name]) for name in CHOSEN_DEGREES
    }
    only |= {name: words(given[name]) for name in ("sharding", "schedule", "recompute")}
    for name in ("rank_order", "context_comm"):
        text = given[name]
        only[name] = tuple(text.lower().replace(" ", "").split(",")) if text else None
    only["offload"] = tuple(read_offload(given.get("offload")).split(",")) if given.get("offload") else ()
    return only | {name: given[name] for name in ("sequence_parallel", "across_nodes", "launchable")}


def read_offload(text: str | None) -> str:
    """What ``--offload`` asks for, in the one way it is written. Raises InputError."""
    from planner.offload_choices import canonical

    return canonical(text) if text else ""


def read_way(recompute: str, offload: str | None) -> str:
    """The recompute policy, with the activations behind it if these are offloaded.

    >>> read_way("full", "optimizer,activations")
    'full+activations'
    """
    moved = "activations" in read_offload(offload).split(",")
    return f"{recompute}+activations" if moved else recompute


def word(text: str) -> str:
    """A name as it is listed.

    >>> word(" ZeRO-1"), word("ZBV")
    ('zero1', 'zb-v')
    """
    plain = text.strip().lower().replace("-", "")
    known = {name.replace("-", ""): name for name in SCHEDULES}
    return known.get(plain, plain if plain.isalnum() else text.strip().lower())


def with_batch(model: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, unit: int) -> TrainingSpec:
    """The training with the multiple of ``unit`` sequences nearest to the usual global batch.

    A batch that was given stays; one that was not still counts as assumed.
    """
    if training.global_batch_size is not None:
        return training
    usual = resolve(model, cluster, training).global_batch_size
    values = {**dict(training), "global_batch_size": max(1, round(usual / unit)) * unit}
    return TrainingSpec.model_construct(training.model_fields_set, **values)


def batch_unit(data: int, micro: int, pipeline: int, schedule: str) -> int:
    """Sequences that a step of a layout has a multiple of."""
    return data * micro * {"interleaved": pipeline, "dualpipe": 2}.get(schedule, 1)


def read_layout(
    model: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, given: dict[str, Any]
) -> tuple[TrainingSpec, Layout]:
    """A Layout from options, and a training whose batch it divides if none was given.

    The GPUs left over are data parallel; the batch sets ``grad_accum``.
    """
    for name in LAYOUT_OPTIONS:
        value = given[name]
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= 10**7:
            raise InputError(f"--{name.replace('_', '-')} {value}: use a whole number, 1 or more")
    tensor, pipeline, chunks = given["tensor_parallel"], given["pipeline_parallel"], given["chunks"]
    context = given["context_parallel"]
    data = given["data_parallel"] or max(1, cluster.num_gpus // (tensor * pipeline * context))
    micro = given["micro_batch_size"]
    sequence = given["sequence_parallel"]
    schedule = word(given["schedule"] or "") or ("interleaved" if chunks > 1 else "1f1b")
    if schedule in FOLDED and chunks == 1:  # they have two chunks or none
        chunks = 2
    training = with_batch(model, cluster, training, batch_unit(data, micro, pipeline, schedule))
    job = resolve(model, cluster, training)
    layout = Layout(
        data_parallel=data,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        chunks=chunks,
        micro_batch_size=micro,
        grad_accum=max(1, job.global_batch_size // (data * micro)),
        data_shards=given["data_shards"] or data,
        sequence_parallel=tensor > 1 if sequence is None else sequence,
        sharding=word(given["sharding"] or "")
        or ("zero1" if "zero1" in job.stack.shardings else next(iter(job.stack.shardings))),
        reshard_after_forward=given["reshard_after_forward"],
        schedule=schedule,
        rank_order=given["rank_order"].strip().lower(),
        context_parallel=context,
        context_comm=(given["context_comm"] or job.stack.context_comm).strip().lower(),
        ulysses_degree=given["ulysses_degree"],
        expert_parallel=given["expert_parallel"],
        expert_tensor_parallel=given["expert_tensor_parallel"],
        offload=",".join(i for i in read_offload(given["offload"]).split(",") if i != "activations"),
    )
    return training, layout
