"""Models and GPUs that are known by name: one JSON file each, with its source.

A model's file holds Hugging Face's own config keys under ``config``; a GPU's file is a
:class:`planner.specs.Gpu`. Names are case-insensitive; an organisation before a slash is ignored.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import InputError, nearest_names

if TYPE_CHECKING:
    from planner.specs import Figure, Gpu, ModelSpec

HERE = Path(__file__).parent

USUAL_KIND = {
    16: "v100-sxm2-16gb",
    24: "rtx-4090-24gb",
    32: "v100-sxm2-32gb",
    40: "a100-sxm-40gb",
    48: "l40s-48gb",
    64: "mi250x-gcd-64gb",
    80: "a100-sxm-80gb",
    94: "h100-nvl-94gb",
    141: "h200-sxm-141gb",
    180: "b200-sxm-180gb",
    186: "gb200-nvl72-186gb",
    192: "mi300x-192gb",
}
"""The kind that ``64x80G`` stands for: the oldest common one, so that no plan is too hopeful."""


def _tidy(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower()).rsplit("/", 1)[-1]


@cache
def names(folder: str) -> tuple[str, ...]:
    """All names of ``models`` or ``gpus``."""
    return tuple(sorted(path.stem for path in (HERE / folder).glob("*.json")))


def _read(folder: str, name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((HERE / folder / f"{name}.json").read_bytes())
    return data


def _find(folder: str, name: str, what: str) -> str:
    tidy = _tidy(name)
    if tidy in names(folder):
        return tidy
    aliases = {alias: stem for stem in names(folder) for alias in _read(folder, stem)["aliases"]}
    if tidy in aliases:
        return aliases[tidy]
    shown = name if len(name) <= 60 else name[:57] + "..."
    hint = nearest_names(tidy, [*names(folder), *aliases])
    other = "; of any other, give the config.json" if folder == "models" else ""
    raise InputError(f"unknown {what} {shown!r}: {hint} All names: planner catalog {folder}{other}")


def load_model(name: str) -> ModelSpec:
    """The model of that name or alias. Raises InputError with the nearest names."""
    from planner.families import model_from_config

    stem = _find("models", name, "model")
    data = _read("models", stem)
    return model_from_config(data["config"], f"{stem}.json", name=stem, source=data["source"])


def config_of(name: str) -> dict[str, Any]:
    """The configuration of the model of that name, in Hugging Face's keys. Raises InputError."""
    config: dict[str, Any] = _read("models", _find("models", name, "model"))["config"]
    return config


@cache
def load_gpu(name: str) -> Gpu:
    """The GPU kind of that name or alias. Raises InputError with the nearest names."""
    from planner.specs import Gpu

    return Gpu(**_read("gpus", _find("gpus", name, "GPU kind")))


def host(name: str) -> Figure:
    """A figure of the machine that feeds the GPUs."""
    return _figure("host", name)


def step_time(name: str) -> Figure:
    """How sure a step time is: ``least`` and ``most`` of measured over predicted, and what is a ``tie``."""
    return _figure("step_time", name)


@cache
def _figure(file: str, name: str) -> Figure:
    from planner.specs import Figure

    data: dict[str, Any] = json.loads((HERE / f"{file}.json").read_bytes())
    return Figure(**data[name])


def gpu_of_memory(gigabytes: int) -> Gpu:
    """The usual kind with that much memory, in marketed GB. Raises InputError."""
    if gigabytes not in USUAL_KIND:
        known = ", ".join(f"{size}G" for size in USUAL_KIND)
        raise InputError(f"no usual GPU has {gigabytes} GB: use one of {known}, or a name such as H100")
    return load_gpu(USUAL_KIND[gigabytes])
