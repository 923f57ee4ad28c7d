"""Says what torchtitan's settings are (0.2.2), and how many parameters its flavors have. A case is
``{"version": "0.2" or "0.3", "flavors": [[model, flavor], ...]}``."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).parents[3] / "planner" / "probes")
import without_triton  # noqa: E402, F401

sys.path.pop(0)
logging.disable(logging.WARNING)
TABLES = {"llama3": "llama3", "qwen3": "qwen3", "deepseek_v3": "deepseekv3", "gpt_oss": "gptoss"}


def word(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return "|".join(repr(one) for one in typing.get_args(kind))
    if origin in (typing.Union, types.UnionType):
        return "|".join(word(one) for one in typing.get_args(kind))
    if origin is list:
        return f"list[{word(typing.get_args(kind)[0])}]"
    return "none" if kind is type(None) else kind.__name__


def settings(section: Any, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from settings(kind, f"{prefix}{field.name}.")
        else:
            made = field.default is dataclasses.MISSING
            default: Any = field.default_factory() if made else field.default  # type: ignore[misc]
            yield prefix + field.name, [word(kind), default]


def of(model: str, version: str) -> Any:
    package = import_module(f"torchtitan.models.{model}")
    names = [name for name in dir(package) if name.endswith(("_args", "_configs"))]
    return getattr(package, next(name for name in names if name.startswith(TABLES[model])))


def count(model: str, flavor: str, version: str) -> int:
    package = import_module(f"torchtitan.models.{model}")
    with torch.device("meta"):
        if version == "0.3":
            built = package.model_registry(flavor, attn_backend="flex").model.build()
        else:
            spec = package.get_train_spec()
            arguments = spec.model_args[flavor]
            arguments.moe_impl = "standard"  # as update_from_config has it
            built = spec.model_cls(arguments)
    return sum(one.numel() for one in built.parameters())


def main() -> None:
    for case in json.load(sys.stdin):
        answer: dict[str, Any] = {}
        version = case["version"]
        if version == "0.2":
            from torchtitan.config.job_config import JobConfig

            answer["keys"] = dict(settings(JobConfig))
        if "flavors" in case:
            answer["parameters"] = [count(*one, version) for one in case["flavors"]]
            answer["known"] = [f"{model} {flavor}" for model in TABLES for flavor in of(model, version)]
            answer["unplanned"] = ["qwen3 debugmodel_non_fused_qkv", "gpt_oss debugmodel"]
        print(json.dumps(answer), flush=True)


main()
