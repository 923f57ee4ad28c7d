"""torchtitan's models by name and flavor, as shapes: which of them a plan's model is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from planner.errors import InputError, nearest_names
from planner.files import plain
from planner.model import ModelSpec

FREE = {"name", "source", "max_position_embeddings", "mtp_layers"}
"""What of a model no flavor has: torchtitan's positions are the sequence's, and further tokens are not
predicted."""

SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
"""Lengths that Llama's blocks may have."""


@dataclass(frozen=True)
class Flavor:
    """One of torchtitan's models; ``alike`` are flavors of the same shape with other attention kernels."""

    model: str
    name: str
    spec: ModelSpec
    versions: tuple[str, ...]
    alike: tuple[str, ...] = ()

    def differs(self, model: ModelSpec) -> dict[str, tuple[Any, Any]]:
        """Fields in which a model is another one: the flavor's value and the model's."""
        own, other = (one.model_dump(exclude=FREE) for one in (self.spec, model))
        return {name: (own[name], other[name]) for name in own if own[name] != other[name]}


def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(
        (Path(__file__).parent / "data" / "torchtitan_flavors.json").read_bytes()
    )
    return table


@cache
def flavors() -> tuple[Flavor, ...]:
    """All of them, larger models' usual ones first."""
    return tuple(_read())


def _read() -> Iterator[Flavor]:
    from planner.catalog import config_of
    from planner.families import model_from_config

    table = _table()
    for model, own in table["flavors"].items():
        for name, one in own.items():
            spec = ModelSpec.from_catalog(one["of"])
            if changes := one.get("config"):
                config = config_of(one["of"]) | changes
                label = f"torchtitan-{model}-{name}"
                spec = model_from_config(config, f"{label}.json", name=label, source=table["source"])
            yield Flavor(model, name, spec, tuple(one["versions"]), tuple(one.get("alike", ())))


def pipelined(model: str, version: str) -> bool:
    """Does a version of torchtitan run a model's layers as a pipeline?"""
    return model in _table()["pipelined"][version]


def flavor_of(model: ModelSpec, version: str) -> tuple[Flavor | None, Flavor, dict[str, tuple[Any, Any]]]:
    """The flavor that a model is, or None; the nearest one, and in what that differs."""
    known = [one for one in flavors() if version in one.versions]

    def distance(one: Flavor) -> tuple[bool, int, float]:
        size, other = model.num_parameters, one.spec.num_parameters
        ratio = max(size, other) / min(size, other)
        return one.spec.model_type != model.model_type, len(one.differs(model)) if ratio < 1.1 else 100, ratio

    nearest = min(known, key=distance)
    differs = nearest.differs(model)
    return (None if differs else nearest), nearest, differs


def in_llamas_blocks(model: ModelSpec) -> bool:
    """Does a model differ from Llama 3 in lengths alone? 0.3's recipes build such."""
    differs = flavor_named("llama3", "8B").differs(model)
    return model.model_type in ("llama", "mistral") and set(differs) <= {"model_type", *SHAPE}


def flavor_named(model: str, name: str) -> Flavor:
    """The flavor that a configuration names. Raises InputError with the nearest names."""
    models = dict.fromkeys(one.model for one in flavors())
    if model not in models:
        raise InputError(f"model.name={plain(model)}: no model of torchtitan's that is planned: "
                         f"{nearest_names(model, models)}")  # fmt: skip
    own = {n: one for one in flavors() if one.model == model for n in (one.name, *one.alike)}
    if name not in own:
        raise InputError(f"model.flavor={plain(name)}: no flavor of {model}: {nearest_names(name, own)}")
    return own[name]
