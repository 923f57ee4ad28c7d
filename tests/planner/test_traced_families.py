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
from planner.layer_price import role_sum
from planner.replay import StageReplay
from planner.stacks import STACKS
from planner.stages import Prices, price
from strategies.base import Role
from strategies.layout import Layout, strategies_of
from tests.helpers import job_of

ROWS = json.loads((Path(__file__).parents[1] / "data" / "traced_families.json").read_text())["rows"]
TRAFFIC = json.loads((Path(__file__).parents[1] / "data" / "traced_traffic_families.json").read_text())
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
    """Activation bytes of the last blocks; of T5's one, of an encoder's block and a decoder's."""
    kinds = prices.kinds[-blocks:]
    if blocks == 1 and prices.job.model.kind == "encoder-decoder":
        kinds = (prices.kinds[0], prices.kinds[-1])
    return sum(float(prices.blocks[kind].saved) for kind in kinds)


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


def test_families_that_stand_in_the_traces_are_those_that_the_rows_name() -> None:
    traced = {row["config"]["model_type"] for row in ROWS}
    assert traced == set(STACKS["hf"].traced)
    assert STACKS["hf"].traced == STACKS["fsdp"].traced == STACKS["deepspeed"].traced


@pytest.mark.parametrize("framework", ["fsdp", "deepspeed"])
def test_blocks_keep_the_same_under_fsdp_and_deepspeed_in_half_precision(framework: str) -> None:
    """Their engines cast weights, not activations."""
    for row in [row for row in WHOLE if row["recompute"] == "none"][::3]:
        plain, other = priced(row), priced(row, framework, "bf16")
        assert kept(other, row["blocks"] or 1) == kept(plain, row["blocks"] or 1)


REFUSED = [
    (
        "mixtral",
        {"precision": "bf16"},
        "half precision without autocast, not with precision=bf16: use pure-bf16",
    ),
    ("mixtral", {"precision": "fp32"}, "not with precision=fp32"),
    ("mixtral", {"options": {"compile": "on"}}, "not compiled: use compile=off"),
    ("gemma2", {"attention": "sdpa"}, "with attention=eager: no fused kernel computes capped scores"),
    ("gpt_oss", {"attention": "sdpa"}, "with attention=eager: no fused kernel computes attention sinks"),
    (
        "t5",
        {"attention": "sdpa"},
        "with attention=eager: no fused kernel computes learned biases of the scores",
    ),
    ("falcon", {"attention": "sdpa"}, "one key head that is spread over the queries'"),
]


@pytest.mark.parametrize(("family", "training", "reason"), REFUSED)
def test_what_was_not_traced_is_refused_by_name(family: str, training: dict[str, Any], reason: str) -> None:
    config = next(row["config"] for row in ROWS if row["config"]["model_type"] == family)
    model = model_from_config(config, "traced/config.json")
    with pytest.raises(InputError, match=reason):
        job_of(model, framework="hf", **({"precision": "pure-bf16"} | training))


@pytest.mark.parametrize("framework", ["megatron", "torchtitan"])
def test_other_frameworks_still_refuse_these_families(framework: str) -> None:
    config = next(row["config"] for row in ROWS if row["config"]["model_type"] == "gemma2")
    model: ModelSpec = model_from_config(config, "traced/config.json")
    with pytest.raises(InputError):
        job_of(model, framework=framework)


@pytest.mark.parametrize("row", TRAFFIC, ids=lambda row: row["name"])
def test_bytes_that_memory_bound_kernels_move(row: dict[str, Any]) -> None:
    """A block's forward and backward within 7 %, of T5 an encoder's and a decoder's; kernels as counted."""
    prices = priced(row | {"recompute": "none"})
    *strategies, _ = strategies_of(prices.layout, prices.wire, 0, "none")
    blocks = prices.layers[1:-1] if row["name"] == "t5" else prices.layers[-2:-1]
    moved = sum(float(role_sum(block, Role.TRAFFIC, strategies)) for block in blocks)
    assert moved == pytest.approx(row["forward"]["bytes"] + row["backward"]["bytes"], rel=0.07)


@pytest.mark.parametrize("row", TRAFFIC[:18], ids=lambda row: row["name"])
def test_kernels_of_a_block(row: dict[str, Any]) -> None:
    """Of the attention that the family is run with; falcon's are those of the 7B."""
    family = row["config"]["model_type"]
    for count, way in zip(STACKS["hf"].family_launches[family], ("forward", "backward"), strict=True):
        assert count == pytest.approx(row[way]["kernels"] / (2 if family == "t5" else 1), rel=0.15)
