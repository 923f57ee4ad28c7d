"""``planner catalog``: the models and GPUs that are known by name."""

from __future__ import annotations

from typing import Any

from planner import options as o

EXAMPLE = "Example: planner catalog models"


def catalog(
    what: o.What,
    name: o.Entry = None,
    as_json: o.Json = False,
) -> None:
    """The models and GPUs that are known by name, and their sources."""
    from planner.cli import print_json, reported

    with reported(as_json):
        from planner.catalog import load_gpu, load_model, names
        from planner.errors import InputError

        if what not in ("models", "gpus"):
            raise InputError(f"catalog {what[:40]!r}: ask for models or gpus")
        load: Any = load_model if what == "models" else load_gpu
        entries = [load(stem) for stem in ([name] if name else names(what))]
        dumped = [entry.model_dump(mode="json") for entry in entries]
        if what == "models":
            for entry, values in zip(entries, dumped, strict=True):
                values["num_parameters"] = entry.num_parameters
                values["num_active_parameters"] = entry.num_active_parameters
        if as_json:
            return print_json({"schema": "planner.catalog/1", what: dumped})
        from planner.render_catalog import show_entry, show_gpus, show_models

        if name:
            return show_entry(dumped[0])
        show: Any = show_models if what == "models" else show_gpus
        show(entries)
