"""Predicted against what runs on real GPUs reported; the rows name their sources.

torchtitan prints *reserved* memory, which holds what tensors need and the allocator's slack; SimuMax's
rows are *allocated* bytes of Megatron-LM on B200, rank by rank. Qwen3's norms of queries and keys are
not modelled (it is planned as a LLaMA of its shape). Only rows whose settings the source gives in full,
run eagerly, are here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.candidate import Candidate
from planner.stages import price
from strategies.layout import Layout
from tests.helpers import job_of, llama

ROWS = json.loads((Path(__file__).parents[1] / "data" / "measured_runs.json").read_text())["rows"]
USABLE = {"a100": 79.1, "h100": 95.04, "b200": 178.0}  # torchtitan's H100 is a 96 GB part
MEGATRON = [row for row in ROWS if row["framework"] == "megatron"]
RAN = [row for row in ROWS if row["framework"] == "torchtitan" and not row["out_of_memory"]]
FAILED = [row for row in ROWS if row["out_of_memory"]]


def candidate_of(row: dict[str, Any]) -> Candidate:
    model = llama(
        row["layers"],
        row["hidden"],
        row["heads"],
        row["kv_heads"],
        head_dim=row["head_dim"],
        intermediate_size=row["ffn"],
        vocab_size=row["vocab"],
        tie_word_embeddings=row["tied"],
        max_position_embeddings=131072,
    )
    job = job_of(
        model,
        f"{row['gpus']}x{row['gpu']}",
        framework=row["framework"],
        seq_length=row["seq"],
        global_batch_size=row["global_batch"],
    )
    data = row["gpus"] // row["tensor"] // row["pipeline"]
    layout = Layout(
        data_parallel=data,
        tensor_parallel=row["tensor"],
        pipeline_parallel=row["pipeline"],
        micro_batch_size=row["micro_batch"],
        grad_accum=row["global_batch"] // data // row["micro_batch"],
        sequence_parallel=row["tensor"] > 1,
        sharding="zero1" if row["framework"] == "megatron" else "fsdp",
        reshard_after_forward=row["reshard"],
    )
    return price(job, layout, (row["recompute"],)).spread()


def tensors_gib(row: dict[str, Any], stage: int = 0) -> float:
    candidate = candidate_of(row)
    return candidate.peak(stage, [candidate.rows // row["pipeline"]])[0] / 2**30


@pytest.mark.parametrize("row", FAILED, ids=lambda row: row["id"])
def test_what_ran_out_of_memory_is_predicted_not_to_fit(row: dict[str, Any]) -> None:
    assert tensors_gib(row) > (row["usable_gib"] or USABLE[row["gpu"]])


@pytest.mark.parametrize("row", RAN, ids=lambda row: row["id"])
def test_what_ran_is_predicted_to_fit_and_below_what_it_reserved(row: dict[str, Any]) -> None:
    predicted = tensors_gib(row)
    assert predicted < row["usable_gib"]
    assert 0.64 < predicted / row["gib"] < 1.0


@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: row["id"])
def test_allocated_bytes_of_megatron_rank_by_rank(row: dict[str, Any]) -> None:
    """Within 3 %, always below: about 4 sbh bytes a layer are still unexplained."""
    data_and_tensor = row["gpus"] // row["pipeline"]
    for rank, measured in enumerate(row["ranks_gib"]):
        error = tensors_gib(row, rank // data_and_tensor) / measured - 1
        assert -0.03 < error < 0


def test_keeping_gathered_parameters_costs_what_was_measured() -> None:
    """Llama 3 8B on 8 GPUs, reshard_after_forward never against default: 62.18 - 49.59 = 12.6 GiB."""
    by_id = {row["id"]: row for row in RAN}
    kept, freed = (by_id[f"titan-5940ddeb5-8B-lbs1-{word}"] for word in ("never", "default"))
    measured = kept["gib"] - freed["gib"]
    assert tensors_gib(kept) - tensors_gib(freed) == pytest.approx(measured, rel=0.15)


def test_the_order_of_a_ladder_of_layouts_is_kept() -> None:
    """Qwen3 32B on FSDP x TP 8: 43.5, 63.3 and 70.8 GiB."""
    ladder = [row for row in RAN if row["tensor"] == 8]
    assert len(ladder) == 3
    by_measured = sorted(ladder, key=lambda row: row["gib"])
    assert by_measured == sorted(ladder, key=tensors_gib)
