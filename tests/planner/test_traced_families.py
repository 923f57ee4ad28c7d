"""Bytes that transformers' modules beyond Llama's and GPT's keep, against the rows of hf, fsdp and deepspeed.

The numbers in ``tests/data/traced_families.json`` were read off the modules running on tensors without
storage, as those of test_traced.py were. Left out of the rows are the masks of unfused attention, one for
all blocks, and tables of rotary positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import InputError, ModelSpec
from planner.families import model_from_config
from planner.replay import StageReplay
from planner.stages import Prices, price
from strategies.layout import Layout
from tests.helpers import job_of

ROWS = json.loads((Path(__file__).parents[1] / "data" / "traced_families.json").read_text())["rows"]
WHOLE = [row for row in ROWS if row["peak"]]
BLOCKS = [row for row in ROWS if not row["peak"]]


def priced(row: dict[str, Any], framework: str = "hf", precision: str = "pure-bf16") -> Prices:
    """The model that a row was traced of, on one GPU."""
    job = job_of(
        model_from_config(row["config"], "traced/config.json"),
        "1xH200",
        framework=framework,
        precision=precision,
        attention=row["attention"],
        seq_length=row["s"],
        global_batch_size=row["b"],
    )
    return price(job, Layout(micro_batch_size=row["b"]), (row["recompute"],))


def replayed(prices: Prices) -> StageReplay:
    """One GPU with all of the model's blocks."""
    return StageReplay(prices, 0, [prices.counts])


def kept(prices: Prices, blocks: int) -> float:
    """Activation bytes of the last blocks."""
    return sum(float(prices.blocks[kind].saved) for kind in prices.kinds[-blocks:])


@pytest.mark.parametrize("row", BLOCKS, ids=lambda row: row["id"])
def test_saved_bytes_of_blocks(row: dict[str, Any]) -> None:
    """To 1e-4: exact but for states of random generators, offsets of experts and copies of norms' weights."""
    assert kept(priced(row), row["blocks"]) == pytest.approx(row["kept"], rel=1e-4)


@pytest.mark.parametrize("row", WHOLE, ids=lambda row: row["id"])
def test_peak_of_a_whole_model(row: dict[str, Any]) -> None:
    """Within 1 %; the search's closed form is never below the replay."""
    prices = priced(row)
    timeline = replayed(prices).run()
    highest = max(size for _, size in timeline.snapshots)
    assert highest == pytest.approx(row["peak"], rel=0.01)
    closed, _ = prices.spread().peak(0, prices.counts)
    assert closed >= timeline.pools * (1 - 1e-12)


@pytest.mark.parametrize("row", [row for row in WHOLE if row["kept"]], ids=lambda row: row["id"])
def test_saved_bytes_of_a_whole_model(row: dict[str, Any]) -> None:
    """Within 1 %, mostly 1e-3: the models are small, so that tables of positions show, and where blocks are
    run again the mask that all of them take."""
    prices = priced(row)
    around = float(prices.embedding.saved) + float(prices.head.saved)
    mask = row["b"] * row["s"] ** 2 * (row["recompute"] == "full" and "sliding_window" in row["config"])
    assert row["kept"] * 0.9875 - 1.2 * mask < kept(prices, row["blocks"]) + around < row["kept"] * 1.001
