"""The JSON document of commands that answer with plans: written, read back, and its published schema.

    {"schema": "planner.plans/1", "model": ..., "cluster": ..., "plans": [<Plan>, ...], ...}

It holds all that is needed to go on from: ``planner explain``, ``report``, ``diff`` and ``check`` read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WrapSerializer

from planner import __version__
from planner.errors import InfeasibleError, InputError
from planner.files import content, deeper, named, plain
from planner.plan import MODEL, Plan
from planner.specs import ClusterSpec, ModelSpec, TrainingSpec, first_problem

if TYPE_CHECKING:
    from planner.advice import Advice

SCHEMA: Literal["planner.plans/1"] = "planner.plans/1"
MOST_BYTES = 50_000_000
DEEPEST = 20
"""Levels of lists and objects that a document may have; its own are 8."""

OF_FAILURE = {"error", "nearest"}
OF_ADVICE = {"binding", "changes", "tried"}


def _without_count(given: Any) -> Any:
    return {k: v for k, v in given.items() if k != "num_parameters"} if isinstance(given, dict) else given


def _with_count(model: ModelSpec, dump: Any) -> dict[str, Any]:
    return {"num_parameters": model.num_parameters, **dump(model)}


class ClusterDocument(BaseModel):
    """A cluster: what people look for, and the whole ``spec``."""

    model_config = MODEL

    gpu: str
    num_gpus: int
    gpus_per_node: int
    nodes_per_leaf: int | None
    oversubscription: float
    usable_bytes: int
    capacity_bytes: int
    host_memory_bytes: int | None
    nvme_bytes: int | None
    spec: ClusterSpec

    @staticmethod
    def of(cluster: ClusterSpec) -> ClusterDocument:
        """The document of a cluster."""
        own = {"gpu", "usable_bytes", "capacity_bytes", "spec"}
        alike = {name: getattr(cluster, name) for name in ClusterDocument.model_fields if name not in own}
        return ClusterDocument(
            gpu=cluster.gpu.name,
            usable_bytes=cluster.gpu.usable_bytes,
            capacity_bytes=cluster.capacity_bytes,
            spec=cluster,
            **alike,
        )


class Document(BaseModel):
    """Plans for one job, best first; none, with an ``error`` and the ``nearest``, where nothing fits.

    ``binding`` is what does not fit of a given layout or of the nearest, ``changes`` are what would,
    ``tried`` what would not either (docs/whynot.md). ``command`` gives it again; empty where it was made in
    Python.
    """

    model_config = MODEL

    schema_version: Literal["planner.plans/1"] = Field(SCHEMA, alias="schema")
    planner: str
    command: str = ""
    model: Annotated[ModelSpec, BeforeValidator(_without_count), WrapSerializer(_with_count)]
    cluster: ClusterDocument
    training: TrainingSpec
    assumptions: tuple[str, ...]
    plans: tuple[Plan, ...]
    proof: dict[str, Any]
    error: str = ""
    nearest: Plan | None = None
    binding: dict[str, Any] | None = None
    changes: tuple[dict[str, Any], ...] = ()
    tried: tuple[dict[str, Any], ...] = ()

    @property
    def best(self) -> Plan:
        """The first plan, or the nearest where nothing fits."""
        found = self.plans[0] if self.plans else self.nearest
        assert found is not None
        return found

    def to_json(self) -> dict[str, Any]:
        """The document as JSON values; what is about failure only where there is one."""
        left_out = (set() if self.error else OF_FAILURE) | (set() if self.binding else OF_ADVICE)
        return self.model_dump(mode="json", by_alias=True, exclude=left_out)


def document_of(
    model: ModelSpec,
    cluster: ClusterSpec,
    plans: Sequence[Plan],
    command: str = "",
    advice: Advice | None = None,
) -> Document:
    """The document of a command that answers with plans; ``advice`` on one that does not fit."""
    more = advice.document() if advice else {}
    return _document(model, cluster, plans[0], command, plans=tuple(plans), **more)


def document_of_failure(
    model: ModelSpec, cluster: ClusterSpec, error: InfeasibleError, command: str = ""
) -> Document:
    """The document of a search that found nothing: the nearest plan, and changes that would fit."""
    from planner.advice import Advice

    more = Advice(error.binding, error.changes, error.tried).document()
    nearest = error.nearest
    return _document(model, cluster, nearest, command, plans=(), error=str(error), nearest=nearest, **more)


def _document(model: ModelSpec, cluster: ClusterSpec, first: Plan, command: str, **more: Any) -> Document:
    given: dict[str, Any] = {
        "schema": SCHEMA,
        "planner": __version__,
        "command": command,
        "model": model,
        "cluster": ClusterDocument.of(cluster),
        "training": first.training,
        "assumptions": first.assumptions,
        "proof": first.proof,
    }
    return Document(**given, **more)


def read_document(path: Path) -> Document:
    """A document that ``--json`` wrote. Raises InputError for what is none, or of another version."""
    shown, found = read_json(path, SCHEMA, "planner search --json")
    try:
        document = Document.model_validate(found)
    except ValidationError as error:
        by = plain(str(found.get("planner", "an older version")))
        problem = plain(first_problem(error), 200)
        raise InputError(f"{shown}, written by planner {by}: {problem}; plan it again") from None
    if not (document.plans or document.nearest):
        raise InputError(f"{shown}: no plan in it")
    return document


def read_json(path: Path, schema: str, writer: str) -> tuple[str, dict[str, Any]]:
    """A file's name as it may be shown, and the JSON object of a schema in it, of bounded size and depth.

    Raises InputError for anything else, naming the command that writes such files.
    """
    import json

    shown = named(path)
    data = content(path, MOST_BYTES, f"what {writer} writes")
    try:
        found = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise InputError(f"{shown}: not JSON: give a file that {writer} wrote") from None
    if not isinstance(found, dict) or deeper(found, DEEPEST):
        raise InputError(f"{shown}: not what {writer} writes")
    if (given := found.get("schema")) != schema:
        what = f"schema {plain(str(given))}" if given else "a file without a schema"
        raise InputError(f"{shown}: {what} is not read here: give {schema}, as {writer} writes it")
    return shown, found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def json_schema() -> dict[str, Any]:
    """The published JSON Schema of a document (docs/schema/planner.plans-1.json)."""
    schema = Document.model_json_schema(mode="serialization")
    model = ModelSpec.model_json_schema(mode="serialization")
    schema["$defs"] |= model.pop("$defs")
    model["properties"] |= {"num_parameters": {"title": "Num Parameters", "type": "integer"}}
    model["required"].append("num_parameters")
    schema["properties"]["model"] = model
    schema["required"] = [name for name in schema["required"] if name not in OF_FAILURE | OF_ADVICE]
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**dialect, **schema, "title": SCHEMA}
