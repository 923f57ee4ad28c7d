"""YAML of structured values, which means the same to every parser; nothing is put together by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

PLAIN = re.compile(r"[A-Za-z/](?:[\w./:@+,=()-]|\$(?!\{)| (?![#]))*", re.ASCII)
BLOCK = re.compile(r"(?:(?:\S|\S[^\n]*\S)\n|(?<=\n) +\S(?:[^\n]*\S)?\n|(?<=\n)\n)+")
"""Whole lines, none with blanks at its end, the first not indented."""
WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}


class _Dumper(yaml.SafeDumper):
    """Strings that another parser could take for something else are quoted; nothing is said by reference.

    PyYAML reads YAML 1.1, Kubernetes' parser a mixture with 1.2: ``1e-4`` is text to the one, a number to the
    other, and a number is refused where the API wants text.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style: str | None = "'"
    if PLAIN.fullmatch(value) and value.lower() not in WORDS and not value.endswith(" "):
        style = None
    elif not value.isprintable():
        style = "|" if BLOCK.fullmatch(value) and value.replace("\n", "").isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def yaml_of(documents: Iterable[Mapping[str, Any]], header: str = "") -> str:
    """Documents as one YAML file under a header of comments; keys stay in order.

    >>> print(yaml_of([{"lr": "1e-4", "command": ["a", "$(b)"], "on": 1}]), end="")
    lr: '1e-4'
    command:
    - a
    - '$(b)'
    'on': 1
    """
    texts = [
        yaml.dump(dict(one), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
        for one in documents
    ]
    return header + "---\n".join(texts)
