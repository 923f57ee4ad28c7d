"""Runs that were measured: the form they are written in, and how a file of them is read.

A run says what was trained, on what, how, and what was seen: a peak of memory, that it ran out of
memory, or only that it ran. ``needs`` lists what the planner would have to know or to model first;
``assumed`` names fields that the source of the run does not print.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.adapters import Adapters
from planner.errors import InputError
from planner.files import content
from planner.specs import ModelSpec, first_problem

MAX_BYTES = 50_000_000
MAX_RUNS = 20_000
FROZEN = ConfigDict(frozen=True, extra="forbid")
Memory = Literal["allocated", "active", "reserved", "nvidia-smi", "unknown"]
MEMORY: tuple[Memory, ...] = ("allocated", "active", "reserved", "nvidia-smi", "unknown")
Text = Annotated[str, Field(max_length=300)]
Degree = Annotated[int, Field(ge=1, le=10_000_000)]
Size = Annotated[float, Field(gt=0, le=1e6)]
Readings = Annotated[tuple[Size, ...], Field(max_length=100_000)]


class RunGpu(BaseModel):
    """A kind of the catalog; ``usable_gib`` where the source says what a process could use."""

    model_config = FROZEN

    kind: Text
    usable_gib: Size | None = None
    network_gb_per_s: Size | None = None  # of the network, per GPU and direction


class RunLayout(BaseModel):
    """The degrees, in the names of :class:`strategies.layout.Layout`."""

    model_config = FROZEN

    data_parallel: Degree | None = None
    tensor_parallel: Degree = 1
    pipeline_parallel: Degree = 1
    chunks: Degree = 1
    micro_batch_size: Degree | None = None
    grad_accum: Degree | None = None
    sharding: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"] = "ddp"
    data_shards: Degree | None = None
    reshard_after_forward: bool = True
    sequence_parallel: bool = False
    schedule: Text = "1f1b"
    context_parallel: Degree = 1
    context_comm: Literal["ring", "all-gather", "ulysses", "ulysses+ring"] | None = None  # the default way
    ulysses_degree: Degree = 1
    expert_parallel: Degree = 1
    expert_tensor_parallel: Degree = 1
    layers_per_stage: Annotated[tuple[Degree, ...], Field(max_length=10_000)] | None = None


class Measured(BaseModel):
    """A reading in GiB (2^30), which counter it is of, and of which GPUs.

    ``scope`` is ``max`` over all GPUs, ``first and last`` pipeline stage, or ``one rank``, not said
    which. ``others`` are readings of other counters in the same run.
    """

    model_config = FROZEN

    gib: Size
    kind: Memory = "unknown"
    scope: Literal["max", "first and last", "one rank", "sum"] = "max"
    others: dict[Memory, Size] = Field(default_factory=dict)
    ranks_gib: Readings = ()
    reserved_ranks_gib: Readings = ()


class Run(BaseModel):
    """One run. ``group`` is a short name of where it comes from.

    ``model`` is a shape, or the name of one: in the file's own table, in the catalog, or the path of a
    ``config.json``.
    """

    model_config = FROZEN

    id: Annotated[str, Field(min_length=1, max_length=200)]
    source: Annotated[str, Field(max_length=1000)] = ""
    group: Text = "own"
    tier: Literal["A", "B", "C"] = "B"
    kind: Literal["peak", "oom", "ran"]
    model: ModelSpec | Text
    seq: Degree | None = None
    gpu: RunGpu
    gpus: Degree | None = None
    framework: Text
    precision: Text | None = None
    optimizer: Text = "adamw"
    gradient_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    optimizer_dtype: Literal["fp32", "bf16", "fp16", "fp8"] | None = None
    master_weights: bool | None = None
    adapters: Adapters | None = None
    options: Annotated[dict[Text, Text], Field(max_length=50)] = Field(default_factory=dict)
    expert_imbalance: Annotated[float, Field(ge=1, le=1000)] = 1.0
    expert_capacity_factor: Size | None = None
    layout: RunLayout = RunLayout()
    recompute: Text | None = None
    measured: Measured | None = None
    step_s: Annotated[float, Field(gt=0, lt=1e9)] | None = None  # measured seconds of a step
    when: Text = ""  # state of the cluster, where the source says that it changed between its runs
    needs: Annotated[tuple[Text, ...], Field(max_length=50)] = ()
    assumed: Annotated[tuple[Text, ...], Field(max_length=50)] = ()
    remark: Annotated[str, Field(max_length=1000)] = ""


class Difference(BaseModel):
    """Two runs that differ in one thing: what ``more`` reads above ``less``."""

    model_config = FROZEN

    name: Text
    less: Text
    more: Text


class Fitted(BaseModel):
    """Readings that a number of the planner was chosen from: of which kind, and in which runs.

    ``prefix`` is the beginning of the runs' ids.
    """

    model_config = FROZEN

    prefix: Text
    kind: Memory
    what: Text


class FittedTime(BaseModel):
    """Step times that a number of the planner was chosen from."""

    model_config = FROZEN

    prefix: Text
    what: Text


class Runs(BaseModel):
    """A file of runs."""

    model_config = FROZEN

    schema_version: Literal["planner.runs/1"] = "planner.runs/1"
    runs: Annotated[tuple[Run, ...], Field(min_length=1, max_length=MAX_RUNS)]
    differences: Annotated[tuple[Difference, ...], Field(max_length=1000)] = ()
    fitted: Annotated[tuple[Fitted, ...], Field(max_length=100)] = ()
    timed_fits: Annotated[tuple[FittedTime, ...], Field(max_length=100)] = ()


def load_runs(path: str | Path) -> Runs:
    """The runs of a ``.json`` or ``.csv`` file. Raises InputError with the run and the field.

    JSON is ``{"runs": [...]}`` or the list alone; a ``models`` table beside it may hold shapes that
    runs name. CSV has a column per field: those of a run, of its layout, and ``gib``, ``memory``
    (which counter), ``scope``, ``usable_gib``, ``options.NAME``; ``needs``, ``assumed`` and
    ``layers_per_stage`` are lists with semicolons between.
    """
    path = Path(path)
    try:
        text = content(path, MAX_BYTES, "file of runs").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read: it is not text in UTF-8") from None
    data = _of_csv(text, str(path)) if path.suffix.lower() == ".csv" else _of_json(text, str(path))
    return _checked(data, str(path))


def _of_json(text: str, origin: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin} is not JSON: {str(error)[:200]}") from None
    if isinstance(data, list):
        data = {"runs": data}
    if not isinstance(data, dict) or not isinstance(data.get("runs"), list):
        raise InputError(f'{origin}: no list of runs: write {{"runs": [{{"id": ...}}]}}')
    return data


NESTED = {
    "gpu": ("gpu", "kind"),
    "usable_gib": ("gpu", "usable_gib"),
    "gib": ("measured", "gib"),
    "memory": ("measured", "kind"),
    "scope": ("measured", "scope"),
} | {name: ("layout", name) for name in RunLayout.model_fields}
LISTS = ("needs", "assumed", "layers_per_stage")


def _of_csv(text: str, origin: str) -> dict[str, Any]:
    csv.field_size_limit(100_000)
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise InputError(f"{origin} is not CSV: {error}") from None
    if not rows:
        raise InputError(f"{origin}: no runs: write a line of column names and a line for each run")
    return {"runs": [_nested(row, f"{origin}: line {line}") for line, row in enumerate(rows, 2)]}


def _nested(row: dict[str | None, Any], where: str) -> dict[str, Any]:
    run: dict[str, Any] = {}
    for column, cell in row.items():
        if column is None or cell is None:
            raise InputError(f"{where}: not as many cells as there are column names")
        value: Any = cell.strip()
        if not value:
            continue
        if column in LISTS:
            value = [part.strip() for part in value.split(";") if part.strip()]
        if column.startswith("options."):
            run.setdefault("options", {})[column.removeprefix("options.")] = value
        elif column in NESTED:
            outer, inner = NESTED[column]
            run.setdefault(outer, {})[inner] = value
        else:
            run[column] = value
    return run


def _checked(data: dict[str, Any], origin: str) -> Runs:
    models = dict(_models(data.pop("models", None), origin))
    if len(data["runs"]) > MAX_RUNS:
        raise InputError(f"{origin}: {len(data['runs']):,} runs: {MAX_RUNS:,} at most")
    seen: set[str] = set()
    runs = []
    for number, row in enumerate(data["runs"], 1):
        run = _run(row, models, f"{origin}: run {number}")
        if run.id in seen:
            raise InputError(f"{origin}: run {number}: id={run.id!r} is there twice: give each run its own")
        seen.add(run.id)
        runs.append(run)
    try:
        return Runs(**{**data, "runs": runs})
    except ValidationError as error:
        raise InputError(f"{origin}: {first_problem(error)}") from None


def _models(table: Any, origin: str) -> Iterator[tuple[str, ModelSpec]]:
    if table is not None and not isinstance(table, dict):
        raise InputError(f"{origin}: models must be a table of names and shapes")
    for name, shape in (table or {}).items():
        try:
            yield name, ModelSpec(**{"name": name, **shape})
        except (ValidationError, TypeError) as error:
            why = first_problem(error) if isinstance(error, ValidationError) else "not a table of fields"
            raise InputError(f"{origin}: model {name[:60]}: {why}") from None


def _run(row: Any, models: dict[str, ModelSpec], where: str) -> Run:
    if not isinstance(row, dict):
        raise InputError(f"{where}: {str(row)[:60]!r} is not a table of fields")
    model = row.get("model")
    if isinstance(model, str) and model in models:
        row = {**row, "model": models[model]}
    elif isinstance(model, dict):
        row = {**row, "model": {"name": "own", **model}}
    if isinstance(row.get("id"), str):
        where = f"{where} ({row['id'][:100]})"
    try:
        return Run(**row)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error)}") from None
    except TypeError:
        raise InputError(f"{where}: its fields must have names") from None
