"""Preflight before frameworks that are really installed."""

from __future__ import annotations

from typing import Any

import pytest

from planner import ClusterSpec, Layout, ModelSpec, TrainingSpec, estimate
from planner.export import Subject, export
from planner.preflight import preflight
from tests.contract import python_of

pytestmark = pytest.mark.contract
CASES: dict[str, tuple[str, str, str | None, dict[str, Any], Layout]] = {
    "megatron": (
        "frameworks",
        "megatron",
        None,
        {},
        Layout(2, 4, 2, 2, 1, 8, sharding="zero1", sequence_parallel=True, schedule="interleaved"),
    ),
    "torchtitan": (
        "titan02",
        "torchtitan",
        "0.2",
        {"framework": "torchtitan", "options": {"qkv": "separate", "rotary_table": "model"}},
        Layout(4, 2, 2, grad_accum=4, sharding="fsdp", sequence_parallel=True),
    ),
    "torchtitan 0.3": (
        "titan03",
        "torchtitan",
        "0.3",
        {"framework": "torchtitan"},
        Layout(4, 2, 2, grad_accum=4, sharding="fsdp", sequence_parallel=True),
    ),
    "deepspeed": (
        "frameworks",
        "deepspeed",
        None,
        {"framework": "deepspeed"},
        Layout(16, grad_accum=1, sharding="zero3"),
    ),
    "accelerate": (
        "frameworks",
        "accelerate",
        None,
        {"framework": "fsdp", "options": {"root": "split", "reduce_dtype": "bf16"}},
        Layout(16, grad_accum=1, sharding="fsdp"),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_what_is_installed_takes_the_export_and_reads_the_plan(name: str) -> None:
    environment, target, version, given, layout = CASES[name]
    model, cluster = ModelSpec.from_catalog("llama-3-8b"), ClusterSpec.parse("16xH100")
    training = TrainingSpec(seq_length=2048, global_batch_size=16, **given)
    plan = estimate(model, cluster, training, layout, recompute="full")
    subject = Subject(model, cluster, plan)
    found = preflight(subject, export(subject, target, version), str(python_of(environment)))
    assert found.holds, found
    parameters = [check for check in found.checks if "parameters" in check.what]
    assert len(parameters) == (layout.pipeline_parallel if name in ("megatron", "torchtitan") else 0)
