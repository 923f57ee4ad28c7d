"""Judges a launch configuration that somebody has: does it fit, what does it waste, what is better."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from planner import api, reading
from planner.advice import Advice
from planner.asked import Asked, options_between, options_text
from planner.catalog import step_time
from planner.errors import InputError, PlannerError, nearest_names
from planner.export.base import Subject
from planner.export.imported import READERS, Finding, Imported
from planner.files import content, named, plain
from planner.layouts import Choices, divisors
from planner.plan import Plan
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec
from planner.told import one_way
from strategies.layout import Layout

COUNTS = {"WORLD_SIZE", "NGPU", "NNODES"}
"""Variables that say how many processes there are, wherever they are used."""
MOST_BYTES = 2_000_000
"""Of one file of a launch configuration."""
LEANER = 0.05
"""Part of the peak that a change must save to be worth naming, where it costs no time."""


@dataclass(frozen=True)
class Gain:
    """One change that pays: it fits, and is quicker, or as quick with less memory.

    ``step_time_ratio`` is over the step as configured, ``saved_bytes`` of the fullest GPU.
    """

    what: str
    option: str
    step_time_ratio: float
    peak_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class Better:
    """The best layout on the same GPUs that the framework can be told, and what it gains."""

    plan: Plan
    option: str
    step_time_ratio: float


@dataclass(frozen=True)
class Audit:
    """What came of it. ``problem`` says why nothing could be planned, where ``plan`` is None.

    ``settings`` are what an ``option`` of the advice, of a gain and of what is better is in the framework's
    own words, where it can be told, ``untold`` why it cannot. ``none_better`` says why there is none.
    """

    imported: Imported
    model: ModelSpec
    cluster: ClusterSpec
    findings: tuple[Finding, ...]
    plan: Plan | None = None
    problem: str = ""
    advice: Advice | None = None
    gains: tuple[Gain, ...] = ()
    better: Better | None = None
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    none_better: str = ""
    untold: Mapping[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Does it fit, and is nothing in it refused by the framework?"""
        wrong = any(one.severity == "error" for one in self.findings)
        return self.plan is not None and self.plan.fits and not wrong

    def document(self) -> dict[str, Any]:
        """The audit as JSON."""
        from planner.documents import document_of

        better = self.better and asdict(self.better) | {"plan": self.better.plan.model_dump(mode="json")}
        plans = [self.plan] if self.plan else []
        return {
            "schema": "planner.audit/1",
            "framework": self.imported.framework,
            "holds": self.holds,
            "problem": self.problem,
            "findings": [asdict(one) for one in self.findings],
            "unread": list(self.imported.unread),
            "gains": [asdict(one) for one in self.gains],
            "better": better,
            "none_better": self.none_better,
            "settings": self.settings,
            "untold": self.untold,
            "document": document_of(self.model, self.cluster, plans, "", self.advice).to_json()
            if plans
            else None,
        }


def read_files(paths: Sequence[Path]) -> dict[str, str]:
    """The texts of a configuration's files by name, of bounded size. Raises InputError."""
    found: dict[str, str] = {}
    for path in paths:
        data = content(path, MOST_BYTES, "a launch configuration")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise InputError(f"{named(path)}: not text: give a script or a configuration file")
        found[str(path)] = text
    return found


def read_configuration(
    files: Mapping[str, str],
    framework: str | None = None,
    given: Mapping[str, str] | None = None,
    gpus: str | None = None,
) -> Imported:
    """Files in the planner's words; ``given`` are values of variables that they leave open.

    A reader that ``COUNTS_GPUS`` is told how many there are as ``WORLD_SIZE``, where ``gpus`` says so.
    Raises InputError for files that no reader knows.
    """
    if framework is not None and framework not in READERS:
        raise InputError(f"--as {plain(framework)}: {nearest_names(framework, READERS)}")
    for name, module in READERS.items():
        if framework not in (None, name):
            continue
        reader = import_module(module)
        if framework == name or reader.recognises(files):
            told = dict(given or {})
            _check_variables(told, files)
            if getattr(reader, "COUNTS_GPUS", False) and not {"NGPU", "WORLD_SIZE"} & set(told):
                told |= _processes(gpus)
            imported: Imported = reader.read(files, told)
            return imported
    for name, text in files.items():
        _broken(name, text)
    shown = ", ".join(named(Path(name)) for name in files)
    raise InputError(
        f"{shown}: no configuration of {', '.join(READERS)} that is known here: say which with --as"
    )


def _broken(name: str, text: str) -> None:
    """Raises InputError for a file that is nothing to audit, with what is wrong with it."""
    import tomllib

    from planner.export.structured import json_of, yaml_of

    shown, kind = named(Path(name)), Path(name).suffix.lower()
    found: Mapping[str, Any] = {}
    if kind == ".json":
        found = json_of(text, name)
    elif kind in (".yaml", ".yml"):
        found = yaml_of(text, name)
    elif kind == ".toml":
        try:
            tomllib.loads(text)
        except RecursionError:
            raise InputError(f"{shown}: not TOML: it is nested too deep") from None
        except ValueError as error:
            raise InputError(f"{shown}: not TOML: {plain(str(error))}") from None
    if str(found.get("schema", "")).startswith("planner."):
        raise InputError(f"{shown}: a file of planner's own: give it to planner check, report or export")
    if "apiVersion" in found:
        raise InputError(f"{shown}: a manifest of Kubernetes: give the script or configuration in it")


SHAPE = (
    "kind",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "num_parameters",
)


def named_as_known(model: ModelSpec) -> ModelSpec:
    """A model that a configuration describes, by the catalog's name where it has one of that shape.

    >>> shape = ModelSpec.from_catalog("llama-3.1-8b").model_copy(update={"name": "flags"})
    >>> named_as_known(shape).name
    'llama-3-8b'
    """
    from planner.catalog import load_model, names

    for name in names("models"):
        known = load_model(name)
        if all(getattr(known, one) == getattr(model, one) for one in SHAPE):
            return model.model_copy(update={"name": known.name})
    return model


def cluster_text(gpus: str | None, imported: Imported) -> str:
    """What ``--gpus`` stands for: a kind alone is of as many as the configuration starts processes.

    >>> cluster_text("h100", Imported("megatron", {}, world_size=64, per_node=8))
    '8x8xh100'
    """
    count, each = imported.world_size, imported.per_node
    if gpus is None or (count is None and not _counts(gpus)):
        known = "KIND, as in H100" if count else "COUNTxKIND, as in 64xH100"
        raise InputError(f"the configuration does not say on which GPUs it runs: give --gpus {known}")
    if _counts(gpus):
        return gpus
    return f"{count // each}x{each}x{gpus}" if each and count and not count % each else f"{count}x{gpus}"


def _check_variables(given: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Raises InputError for a variable that no file has."""
    named_in = {one for text in files.values() for one in re.findall(r"\$\{?([A-Za-z_]\w*)", text)}
    for name in given:
        if re.fullmatch(r"[A-Za-z_]\w*", name) and name not in named_in | COUNTS:
            nearest = nearest_names(name, named_in or COUNTS)
            raise InputError(f"--set {plain(name)}: no file has ${plain(name)}: {nearest}")


def _processes(gpus: str | None) -> dict[str, str]:
    if gpus is None or not _counts(gpus) or gpus.strip().lower().startswith("from-"):
        return {}
    return {"WORLD_SIZE": str(ClusterSpec.parse(gpus).num_gpus)}


def _counts(gpus: str) -> bool:
    return re.match(r"\s*\d+\s*[x\u00d7]|\s*from-", gpus, re.I) is not None


def audit(
    imported: Imported,
    model: ModelSpec,
    cluster: ClusterSpec,
    given: Mapping[str, Any],
    progress: Callable[[int, int], Any] = lambda done, left: None,
) -> Audit:
    """The verdict on a configuration. ``given`` are options of ``planner estimate``, each with a value.

    Raises InputError for options that cannot be read; a job that cannot be is the audit's ``problem``.
    """
    findings = [*_of_world(imported, cluster), *imported.findings]
    training = reading.read_training(dict(given))
    try:
        training, layout = reading.read_layout(model, cluster, training, dict(given))
        layers = reading.numbers("--layers-per-stage", given["layers_per_stage"])
        way = reading.read_way(given["recompute"], given["offload"])
        asked = Asked(model, cluster, training, layout, way, layers)
        plan = api.estimate_of(asked)
    except PlannerError as error:
        return Audit(imported, model, cluster, tuple(findings), problem=str(error))
    advice = (
        None
        if plan.fits
        else api.whynot(model, cluster, training, layout, recompute=way, layers=layers, progress=progress)
    )
    pays = gains(asked, plan) if plan.fits else {}
    best = better(asked, plan)
    others = {gain.option: there for gain, there in pays.items()}
    if isinstance(best, Better):
        others[best.option] = best.plan
    for change in advice.changes if advice else []:
        if change.of != "gpus":
            with contextlib.suppress(PlannerError):
                others[change.option] = api.estimate_of(change.asked)
    settings, untold = in_its_words(imported, Subject(model, cluster, plan), others)
    told = tuple(unlike(pays, settings))
    dropped = {gain.option for gain in pays} - {gain.option for gain in told}
    return Audit(
        imported,
        model,
        cluster,
        tuple(findings),
        plan,
        advice=advice,
        gains=told,
        better=best if isinstance(best, Better) else None,
        settings={option: words for option, words in settings.items() if option not in dropped},
        none_better="" if isinstance(best, Better) else best,
        untold=untold,
    )


def unlike(pays: Iterable[Gain], settings: Mapping[str, tuple[str, ...]]) -> Iterator[Gain]:
    """Gains that the framework can be told, each way to write it once; all where it has words for none."""
    seen: set[tuple[str, ...]] = set()
    for gain in pays:
        words = settings.get(gain.option)
        if not settings or (words and words not in seen):
            yield gain
        seen |= {words} if words else set()


def in_its_words(
    imported: Imported, before: Subject, others: Mapping[str, Plan]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """What makes each of other plans of one, as the framework is told it; why it cannot be told others."""
    from planner.export.difference import changed, told

    if isinstance(now := told(imported.target, before), str):
        return {}, dict.fromkeys(others, f"what is configured has no words in an export: {now}")
    exports = {name: told(imported.target, replace(before, plan=plan)) for name, plan in others.items()}
    why = {name: one for name, one in exports.items() if isinstance(one, str)}
    made = {name: one for name, one in exports.items() if not isinstance(one, str)}
    words = {name: changed(now, one, imported.settings) for name, one in made.items()}
    return {name: own for name, own in words.items() if own}, why


def _of_world(imported: Imported, cluster: ClusterSpec) -> Iterator[Finding]:
    count = imported.world_size
    if count and count != cluster.num_gpus:
        yield Finding(
            "error",
            "world size",
            f"it starts {count} processes, --gpus are {cluster.num_gpus}",
            f"give --gpus of {count}, or start {cluster.num_gpus}",
        )


def gains(asked: Asked, plan: Plan) -> dict[Gain, Plan]:
    """Single changes that pay, quickest first, with the plan that each makes."""
    found: dict[str, tuple[Gain, Plan]] = {}
    tie = step_time("tie").value
    for what, make in _leaner_or_quicker(asked):
        try:
            other = make()
            there = api.estimate_of(other)
        except PlannerError:
            continue
        ratio = there.step_time_s / plan.step_time_s
        saved = plan.peak_bytes - there.peak_bytes
        quicker = ratio < 1 / (1 + tie)
        leaner = ratio <= 1 + 0.1 * tie and saved > LEANER * plan.peak_bytes
        if there.fits and (quicker or leaner):
            option = options_text(options_between(asked, other))
            found.setdefault(option, (Gain(what, option, ratio, there.peak_bytes, saved), there))
    return dict(sorted(found.values(), key=lambda pair: pair[0].step_time_ratio))


def _leaner_or_quicker(asked: Asked) -> Iterator[tuple[str, Callable[[], Asked]]]:
    """Changes that cost nothing but saying them: the layout's, and the framework's options."""
    layout, job = asked.layout, asked.job
    assert layout is not None
    change = asked.with_layout
    if asked.recompute != "none":
        lighter = [name for name in job.stack.policies if name != asked.recompute.partition(":")[0]]
        for name in lighter[: lighter.index("full") if "full" in lighter else None]:
            yield f"recompute {name}", partial(replace, asked, recompute=name)
        yield "recompute as memory forces", partial(replace, asked, recompute="auto", layers=None)
    if layout.tensor_parallel > 1 and not layout.sequence_parallel:
        yield "sequence parallelism", partial(change, sequence_parallel=True)
    for name in job.stack.shardings:
        if name != layout.sharding and layout.data_ranks > 1:
            yield f"share states out as {name}", partial(change, sharding=name)
    if layout.sharding == "fsdp" and layout.reshard_after_forward:
        yield "keep units gathered", partial(change, reshard_after_forward=False)
    for factor in (2, 4):
        size = layout.micro_batch_size * factor
        yield f"micro-batches of {size}", partial(change, micro_batch_size=size)
    yield from _other_degrees(layout, change)
    if asked.offload:
        yield "no offload", partial(replace, asked, layout=replace(layout, offload=""))
    yield from _other_options(asked)


def _other_degrees(layout: Layout, change: Callable[..., Asked]) -> Iterator[tuple[str, Callable[[], Asked]]]:
    for name in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        degree = getattr(layout, name)
        for smaller in divisors(degree)[:-1]:
            data = layout.data_parallel * degree // smaller
            fields: dict[str, Any] = {name: smaller, "data_parallel": data}
            if name == "tensor_parallel":
                fields["sequence_parallel"] = layout.sequence_parallel and smaller > 1
            if name == "pipeline_parallel" and smaller == 1:
                fields |= {"chunks": 1, "schedule": "1f1b"}
            yield f"{name.replace('_parallel', '')} parallelism {smaller}", partial(change, **fields)
    if layout.pipeline_parallel > 1 and layout.schedule == "1f1b":
        for chunks in (2, 4):
            what = f"an interleaved schedule of {chunks} chunks"
            yield what, partial(change, chunks=chunks, schedule="interleaved")


def _other_options(asked: Asked) -> Iterator[tuple[str, Callable[[], Asked]]]:
    """The framework's options with each of their other values."""
    training, stack = asked.job.training, asked.job.stack
    for name, values in stack.options.items():
        for value in values if name != "kernels" else ():  # other modules are another program
            if training.options.get(name) not in (None, value):
                options = {**asked.training.options, name: value}
                own = {name: None} if name in TrainingSpec.model_fields else {}
                changed = asked.training.model_copy(update={"options": options, **own})
                yield f"{name} {value}", partial(replace, asked, training=changed)


def better(asked: Asked, plan: Plan) -> Better | str:
    """The best layout that the framework can be told, if it is quicker, or fits where this one does not.

    Else why there is none.
    """
    model, cluster = asked.model, asked.cluster
    training = asked.training.model_copy(update={"global_batch_size": asked.job.global_batch_size})
    try:
        told = api.search(model, cluster, training, top=1, choices=_choices(asked), time_limit=20)[0]
    except PlannerError as error:
        return f"No better layout on the same GPUs was found: {error}"
    if plan.fits and told.step_time_s * (1 + step_time("tie").value) > plan.step_time_s:
        return "No layout on the same GPUs that the framework can be told is quicker."
    policy, first = one_way([stage.rows for stage in told.stages]) or ("auto", None)
    way = policy if first is None else f"{policy}:{first}"
    layers = tuple(stage.layers for stage in told.stages)
    split = layers if len(set(layers)) > 1 and way != "auto" else None
    other = Asked(model, cluster, training, told.layout.to_layout(), way, split)
    return Better(told, options_text(options_between(asked, other)), told.step_time_s / plan.step_time_s)


def _choices(asked: Asked) -> Choices:
    """What may be offloaded stays so; all else is open."""
    return Choices(launchable=True, offload=tuple(part for part in asked.offload.split(",") if part))
