"""What a worker does: what was asked to a document, and a document to a page. Texts in, texts out."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from planner.errors import InfeasibleError, InputError, PlannerError, SolverError
from planner.web.fields import CONFIG, Asked

UNEXPECTED = "something went wrong here that should not; the question is fine to ask again in another way"


@dataclass(frozen=True)
class Answer:
    """An HTTP status with its text in UTF-8; of any but 200, what is wrong.

    ``trace`` is for the server's own log, where something is wrong with the server; nobody else is told.
    """

    status: int
    body: bytes
    trace: str = ""

    @staticmethod
    def of(status: int, text: str) -> Answer:
        """An answer of a text."""
        return Answer(status, text.encode("utf-8", "replace"))

    @property
    def text(self) -> str:
        """The text."""
        return self.body.decode()


def answer(task: str, *given: Any) -> Answer:
    """One of the tasks below; never an exception."""
    try:
        return Answer.of(200, TASKS[task](*given))
    except SolverError:
        return Answer.of(504, "nothing was found within the time limit: ask for fewer layouts or fewer GPUs")
    except PlannerError as error:
        return Answer.of(422, str(error))
    except MemoryError:
        return Answer.of(503, "this takes more memory than there is for one answer: ask for fewer layouts")
    except RecursionError:
        return Answer.of(422, "the config.json is nested too deeply")
    except Exception:
        return Answer(500, UNEXPECTED.encode(), traceback.format_exc())


def prepare() -> None:
    """Imports what the first answer would have to wait for."""
    import planner.api
    import planner.documents
    import planner.report
    import planner.web.pages  # noqa: F401


def search(asked: Asked) -> str:
    """The document of a search, as planner.plans/1; also where nothing fits."""
    from planner import api, reading
    from planner.cli import cluster_of
    from planner.documents import document_of, document_of_failure
    from planner.layouts import Choices

    given = asked.given()
    choices = Choices(**reading.read_choices(given))
    training = reading.read_training(given)
    model, cluster = _model(asked), cluster_of(given)
    if choices.micro_batch_size and len(choices.micro_batch_size) == 1:
        training = reading.with_batch(
            model, cluster, training, cluster.num_gpus * choices.micro_batch_size[0]
        )
    how = {name: given[name] for name in ("top", "objective", "time_limit")}
    try:
        plans = api.search(model, cluster, training, choices=choices, **how)
        document = document_of(model, cluster, plans, asked.command)
    except InfeasibleError as error:
        document = document_of_failure(model, cluster, error, asked.command)
    return json.dumps(document.to_json(), separators=(",", ":"))


def _model(asked: Asked) -> Any:
    """The model that was asked about: never a path."""
    from planner.families import model_from_config
    from planner.files import plain
    from planner.model import ModelSpec
    from planner.shape import model_from_shape

    if config := asked.by_name.get(CONFIG):
        data = json.loads(config)
        name = data.get("_name_or_path")
        name = plain(name, 100) if isinstance(name, str) else ""
        return model_from_config(data, "config.json", name=name or "pasted model")
    text = asked.by_name["model"]
    if "=" in text:
        return model_from_shape(text)
    try:
        return ModelSpec.from_catalog(text)
    except InputError as error:
        raise InputError(f"--model: {error}") from None


def result(asked: Asked, document: bytes) -> str:
    """The page of a document."""
    from planner.web.pages import result_page

    return result_page(_document(document), asked)


def review(asked: Asked, document: bytes) -> str:
    """The review page of a document."""
    from planner.report import page

    return page(_document(document), asked.title, asked.note)


def _document(text: bytes) -> Any:
    from planner.documents import Document

    return Document.model_validate_json(text)


TASKS: dict[str, Callable[..., str]] = {"search": search, "result": result, "review": review}
