"""The pages of ``planner serve``: a form, and a form with its answer. They work without a script."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from planner import __version__
from planner.catalog import names
from planner.optimizers import OPTIMIZERS
from planner.report import PAGE, environment
from planner.web.fields import CONFIG, FIRST, MOST_CONFIG, MOST_NOTE, NOTE, TITLE, Asked, fields, folds

if TYPE_CHECKING:
    from jinja2 import Template

    from planner.documents import Document

LONGEST_ADDRESS = 6_000
"""Characters of an address that is sure to be taken wherever it is pasted; a longer question has none."""
EXAMPLES = (
    ("LLaMA 65B on 64 GPUs of 80 GB", {"model": "llama-65b", "gpus": "64x80G", "tokens": "1.4T"}),
    (
        "Llama 3.1 70B on 8 nodes of H100, torchtitan",
        {"model": "llama-3.1-70b", "gpus": "8x8xH100", "framework": "torchtitan", "seq_length": "8192"},
    ),
    ("Mixtral 8x7B on 64 H100", {"model": "mixtral-8x7b", "gpus": "64xH100", "seq_length": "4096"}),
    ("Does GPT-2 XL fit on one RTX 4090?", {"model": "gpt2-xl", "gpus": "1xRTX-4090-24GB"}),
)
LISTS: Mapping[str, tuple[str, ...]] = {
    "gpus": ("8xH100", "64x80G", "64xH100", "8x8xH200", "512xB200"),
    "optimizer": tuple(OPTIMIZERS),
    "precision": ("bf16", "fp16", "fp32", "tf32", "pure-bf16", "fp8"),
    "recompute": ("none", "selective", "full"),
}


@cache
def _template() -> Template:
    return environment(escape=True).get_template("serve.html.j2")


@cache
def static(name: str) -> bytes:
    """A style or a script of these pages."""
    files = {"page.css": ("review.css", "serve.css"), "page.js": ("serve.js",)}[name]
    return b"".join((PAGE / file).read_bytes() for file in files)


def _base(values: Mapping[str, str]) -> dict[str, Any]:
    """What every page is filled with. ``values`` are the fields' texts."""
    return {
        "folds": folds(),
        "model": fields()["model"],
        "gpus": fields()["gpus"],
        "first": FIRST,
        "values": values,
        "most_config": MOST_CONFIG,
        "models": names("models"),
        "lists": LISTS,
        "version": __version__,
        "error": "",
        "marked": (),
        "answer": None,
        "examples": [(words, "/search?" + urlencode(given)) for words, given in EXAMPLES],
        "title": "planner: will this model fit on these GPUs?",
    }


@cache
def first_page() -> str:
    """The form as everybody finds it."""
    return form_page()


def form_page(values: Mapping[str, str] = {}, error: str = "") -> str:
    """The form, with what is wrong with its ``values``."""
    given = {name: text for name, text in values.items() if text.strip()}
    return _template().render(**_base(given) | {"error": error, "marked": marked(error)})


def marked(error: str) -> tuple[str, ...]:
    """Fields that an error names.

    >>> marked("--seq-length '4k' is no whole number"), marked("tensor_parallel=3 does not divide 64")
    (('seq_length',), ('tensor_parallel',))
    """
    said = re.findall(r"--([a-z][a-z-]+)|\b([a-z_]{3,40})(?==|\b)", error)
    found = [(flag or word).replace("-", "_") for flag, word in said]
    own = [name for name in dict.fromkeys(found) if name in fields() or name == CONFIG]
    sure = [name for name in own if f"--{name.replace('_', '-')}" in error or f"{name}=" in error]
    return tuple(sure or ([CONFIG] if "config.json" in error[:40] else []))


def result_page(document: Document, asked: Asked) -> str:
    """The answer, the ranked layouts, and the form again."""
    from planner.report import shown, summary
    from planner.review import alternatives, changes, subject_words

    ranked = shown(alternatives(document.plans)) if document.plans else None
    if ranked is None and document.changes:
        ranked = shown(changes(document))
    links = () if document.plans else [_changed(asked, one.get("options", {})) for one in document.changes]
    query = urlencode(asked.address())
    return _template().render(
        **_base(asked.by_name)
        | {
            "title": subject_words(document.best),
            "answer": summary(document),
            "ranked": ranked,
            "heading": "Layouts that fit, best first" if document.plans else "What would fit",
            "asked": asked.texts,
            "links": links,
            "query": query if len(query) <= LONGEST_ADDRESS else "",
            "most_note": MOST_NOTE,
            "names": (TITLE, NOTE),
        }
    )


def _changed(asked: Asked, options: Mapping[str, Any]) -> str:
    """The address of what was asked with some options changed, left out where None; empty if it has none."""
    texts = asked.by_name
    for name, value in options.items():
        if name not in fields():
            return ""
        if isinstance(value, bool):
            value = "yes" if value else "no"
        ones = [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]
        kept = texts.get(name, "").split("\n") if fields()[name].kind == "list" else []
        texts[name] = "" if value is None else "\n".join(filter(None, dict.fromkeys([*kept, *ones])))
    address = "/search?" + urlencode({name: text for name, text in texts.items() if text})
    return address if options and len(address) <= LONGEST_ADDRESS else ""
