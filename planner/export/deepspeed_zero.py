"""What is wasteful or not planned in a DeepSpeed configuration's ``zero_optimization``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from planner.export.imported import Finding
from planner.export.structured import number_of
from planner.units import gib

LARGE, SMALL = 2e9, 1e6
"""Elements of a bucket beyond which it costs memory for nothing, and below which messages are many."""
UNPLANNED: Mapping[str, tuple[Any, str]] = {
    "zero_hpz_partition_size": (1, "ZeRO++'s second copy of the weights within a node"),
    "zero_quantized_weights": (False, "ZeRO++'s quantized all-gathers"),
    "zero_quantized_gradients": (False, "ZeRO++'s quantized reductions"),
    "zenflow": (None, "ZenFlow's own part of the gradients on the GPU"),
    "parameter_alignment": (False, "padding between parameters"),
}
"""Keys with the value that is planned, and what another stands for."""
WASTED = (
    ("contiguous_gradients", (1, 2), "gradients lie where the backward makes them, in fragments"),
    ("overlap_comm", (2, 3), "reductions wait for the backward"),
    ("reduce_scatter", (1, 2, 3), "gradients are all-reduced, twice the bytes"),
)
"""Switches, the stages at which they are better on, and what comes of it where they are off."""


def zero_findings(zero: Mapping[str, Any], stage: int) -> Iterator[Finding]:
    """Findings on the section of a stage. Raises InputError for sizes that are no numbers."""
    for key, (usual, what) in UNPLANNED.items():
        if zero.get(key, usual) not in (usual, None, 0, False):
            yield Finding("warning", f"zero_optimization.{key}", f"{key}: {what} is not modelled")
    for key, stages, what in WASTED:
        if stage in stages and zero.get(key) is False:
            yield Finding("waste", f"zero_optimization.{key}", f"{key} off: {what}", "write true")
    for name in ("reduce_bucket_size", "allgather_bucket_size") if stage else ():
        where = f"zero_optimization.{name}"
        size = number_of(zero.get(name), where)
        if size is not None and size > LARGE:
            text = f"a bucket of {size:g} elements is {gib(2 * size)} GiB of half precision"
            yield Finding("waste", where, text, f"write 500000000, {gib(1e9)} GiB")
        elif size is not None and size < SMALL:
            text = f"a bucket of {size:g} elements makes many small messages"
            yield Finding("waste", where, text, "write 50000000 or more")
