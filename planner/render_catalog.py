"""The catalog as tables for a terminal.

The tables' own type is known to :mod:`planner.render` only, which is where rich lives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from planner.render import console_for, grid
from planner.specs import Gpu, ModelSpec
from planner.units import gib, human_bytes, human_count


def show_models(models: Sequence[ModelSpec]) -> None:
    """The catalog's models."""
    names = ("model", "parameters", "active", "layers", "hidden", "heads", "kv", "ffn", "vocab", "positions")
    table = grid(*names, left=("model",), spare=("positions", "kv", "vocab", "heads", "ffn", "active"))
    for m in models:
        heads = (m.num_attention_heads, m.num_key_value_heads)
        sizes = (m.num_hidden_layers, m.hidden_size, *heads, m.intermediate_size, m.vocab_size)
        cells = map(str, (*sizes, m.max_position_embeddings))
        active = human_count(m.num_active_parameters) if m.experts else "-"
        table.add_row(m.name, human_count(m.num_parameters), active, *cells)
    console_for().print(table)


def show_gpus(gpus: Sequence[Gpu]) -> None:
    """The catalog's GPU kinds."""
    names = ("GPU", "usable GiB", "bf16 TF/s", "HBM TB/s", "node GB/s", "net GB/s", "per node")
    table = grid(*names, left=("GPU",), spare=("per node", "net GB/s", "node GB/s", "HBM TB/s"))
    for gpu in gpus:
        peak = gpu.peak_flops.get("bf16")
        table.add_row(
            gpu.name,
            gib(gpu.usable_bytes),
            f"{peak / 1e12:,.0f}" if peak else "-",
            f"{gpu.hbm_bytes_per_s / 1e12:.2f}",
            f"{gpu.intra_node.bytes_per_s / 1e9:,.0f}",
            f"{gpu.network.bytes_per_s / 1e9:,.1f}",
            str(gpu.gpus_per_node),
        )
    console_for().print(table)


def show_entry(entry: Mapping[str, Any]) -> None:
    """One entry: its figures, then where each comes from."""
    figures, sources = _figures_and_sources(entry)
    console = console_for()
    console.print(_fields("value", figures))
    if sources:
        console.print()
        console.print(_fields("source", sources))


def _fields(title: str, lines: Mapping[str, str]) -> object:
    table = grid("field", title, left=("field", title), wrap=(title,))
    for field, text in lines.items():
        table.add_row(field, text.replace("[", r"\["))
    return table


def _figures_and_sources(entry: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Both by field; a field within a field is named ``network.kind``. A source of all is a figure."""
    figures: dict[str, str] = {}
    sources: dict[str, str] = {}
    for field, value in entry.items():
        if not isinstance(value, dict):
            figures[field] = _text(field, value)
        elif field == "source":
            sources = value | sources
        else:
            for part, figure in value.items():
                name = f"{field}.{part}"
                if not isinstance(figure, dict):
                    figures[name] = _text(name, figure)
                    continue
                sources[name] = figure["source"]
                for key, number in figure.items():
                    if key != "source":
                        full = name if key == "value" else f"{name}.{key}"
                        figures[full] = _text(full, number)
    return figures, sources


def _text(field: str, value: Any) -> str:
    """A figure with the unit of its field."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else "yes" if value else "no"
    if isinstance(value, list):
        runs = [(word, len(list(same))) for word, same in groupby(value)]
        return ", ".join(word if n == 1 else f"{n} x {word}" for word, n in runs) or "none"
    if isinstance(value, str):
        return value
    if field.endswith("bytes_per_s"):
        return f"{value / 1e9:,g} GB/s"
    if field.endswith("_bytes"):
        return human_bytes(value)
    if field.startswith("peak_flops"):
        return f"{value / 1e12:,g} TFLOP/s"
    if field.startswith("latency_s"):
        return f"{value * 1e6:g} us"
    return f"{value:,g}" if isinstance(value, float) else f"{value:,}"
