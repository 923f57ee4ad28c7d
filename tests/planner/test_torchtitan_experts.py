"""torchtitan's mixtures and latent attention: traced bytes, FSDP over the experts' own group, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import ClusterSpec, InputError, ModelSpec, TrainingSpec
from planner.api import explain
from planner.axes import expert_problems
from planner.layers import Builder
from planner.replay import StageReplay
from planner.stages import price
from strategies.base import Layer, Role, held
from strategies.layout import Layout, strategies_of
from tests.helpers import job_of, saved

TRACED = json.loads((Path(__file__).parents[1] / "data" / "traced_experts.json").read_text())


def job(model: str, **training: Any) -> Any:
    given = {"framework": "torchtitan", "precision": "bf16", "seq_length": 4096, "global_batch_size": 64}
    return job_of(ModelSpec.from_catalog(model), "8xH200", **given | training)


def block(model: str, mlp: str = "experts", batch: int = 1, expert: int = 8, **training: Any) -> Layer:
    """The bill of a model's block with that MLP."""
    one = job(model, **training)
    builder = Builder(one.model, one.training, one.stack, one.recipe, batch=batch, expert_parallel=expert)
    return builder.block(next(kind for kind in builder.kinds if kind.mlp == mlp))


@pytest.mark.parametrize("row", TRACED["rows"], ids=lambda row: row["id"])
def test_saved_bytes_of_a_block(row: dict[str, Any]) -> None:
    """Exact but for seeds and 512-byte rounding, on one GPU or with an eighth of the experts."""
    one = block(row["model"], row["mlp"], row["b"], row["expert_parallel"], seq_length=row["s"])
    ours = saved(one, Layout(expert_parallel=row["expert_parallel"]), row["recompute"])
    assert ours + row.get("groups", 0) == pytest.approx(row["bytes"], rel=2e-5)


@pytest.mark.parametrize("row", TRACED["working"], ids=lambda row: row["id"])
def test_working_set_of_a_blocks_backward(row: dict[str, Any]) -> None:
    """Never below the trace, and above it by what is added up in another order: the gradient of the block's
    output, which the trace has before, and the experts' down weights', which it has after, here in fp32.
    """
    one = job(row["model"], global_batch_size=8)
    layout = Layout(8, expert_parallel=8, sharding="fsdp")
    prices = price(one, layout, (row["recompute"],))
    routed = [any("experts" in term.dims for term in layer.terms) for layer in prices.layers[1:-1]]
    model, experts = one.model, one.model.experts
    early = 4 * experts.num_experts / 8 * model.hidden_size * experts.intermediate_size
    output = 2 * 4096 * model.hidden_size
    ours = float(prices.blocks[routed.index(True)].working) - early - output
    assert row["bytes"] * 0.97 <= ours <= row["bytes"] * 1.1


def test_experts_are_sharded_over_what_expert_parallelism_leaves() -> None:
    """torchtitan's mesh ``efsdp``: 64 GPUs, 16 to an expert group, so every expert is cut in four; the rest
    is cut in 64 (distributed/parallel_dims.py: fsdp x tp / ep).
    """
    layout = Layout(64, expert_parallel=16, sharding="fsdp")
    one = job("deepseek-v3")
    wire = one.stack.wire(one.recipe, one.training.options)
    *strategies, _ = strategies_of(layout, wire)
    part = {
        term.name: float(held(term, strategies)) / float(term.amount)
        for term in block("deepseek-v3", expert=16).by_role[Role.OPTIMIZER]
    }
    assert part["expert up weight"] == pytest.approx(1 / 64)
    assert part["query down weight"] == part["shared up weight"] == part["router weight"] == 1 / 64
    few = Layout(8, expert_parallel=8, sharding="fsdp")
    *strategies, _ = strategies_of(few, wire)
    layers = {term.name: term for term in block("deepseek-v3").by_role[Role.PARAMETER]}
    assert held(layers["expert up weight"], strategies) == layers["expert up weight"].amount / 8


def test_an_expert_imbalance_is_held_by_the_fullest_gpu_but_not_sent_back() -> None:
    even, uneven = (block("qwen3-30b-a3b", expert_imbalance=x) for x in (1.0, 1.5))
    sizes = [
        {term.name: float(term.amount) for term in one.by_role[Role.ACTIVATION]} for one in (even, uneven)
    ]
    assert sizes[1]["tokens sent to experts"] == 1.5 * sizes[0]["tokens sent to experts"]
    assert sizes[1]["experts' gate and up"] == 1.5 * sizes[0]["experts' gate and up"]
    assert sizes[1]["experts' results, in fp32"] == sizes[0]["experts' results, in fp32"]


def test_the_router_ran_in_half_precision_and_all_to_alls_twice_in_2025() -> None:
    tokens, h, k = 4096, 2048, 6
    now = saved(block("deepseek-v2-lite"), Layout(expert_parallel=8), "none")
    half = saved(block("deepseek-v2-lite", options={"router": "half"}), Layout(expert_parallel=8), "none")
    assert now - half == 4 * tokens * h + 4 * 64 * h
    now, rerun = (
        saved(block("deepseek-v2-lite", options=options), Layout(expert_parallel=8), "selective")
        for options in ({}, {"all_to_all": "rerun"})
    )
    assert now - rerun == tokens * (4 * h * k + 12 * k)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_closed_form_is_never_below_the_replay_of_a_mixture(policy: str) -> None:
    layout = Layout(8, expert_parallel=8, sharding="fsdp")
    prices = price(job("deepseek-v2-lite", global_batch_size=8), layout, (policy,))
    candidate = prices.spread()
    (rows,) = candidate.under_one([candidate.rows])
    timeline = StageReplay(prices, 0, [rows]).run()
    highest = max(size for _, size in timeline.snapshots)
    closed, _ = candidate.peak(0, rows)
    assert closed >= timeline.pools * (1 - 1e-12)
    assert timeline.pools >= highest * (1 - 1e-12)


@pytest.mark.parametrize(
    ("model", "training", "words"),
    [
        (
            "deepseek-v2-lite",
            {"options": {"compile": "on"}},
            "compile=on: .* deepseek_v2, whose experts were .*: leave out compile",
        ),
        (
            "deepseek-v3",
            {"precision": "fp8-rowwise"},
            "precision in 8 bits: .* deepseek_v3, whose experts were .*: use --precision bf16",
        ),
        ("mixtral-8x7b", {}, "framework=torchtitan has no mixtral models"),
        ("llama-4-scout", {}, "mixtures of experts of llama4_text's kind are not planned in torchtitan"),
    ],
)
def test_what_was_not_counted_is_refused_by_name(model: str, training: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        job(model, **training)


def test_tensor_parallelism_without_expert_parallelism_is_refused() -> None:
    one = job("qwen3-30b-a3b")
    layers = [block("qwen3-30b-a3b")]
    cut = Layout(4, 2, sharding="fsdp", sequence_parallel=True)
    assert "cuts routed experts by it" in "".join(expert_problems(one, cut, layers))
    whole = Layout(4, 2, sharding="fsdp", sequence_parallel=True, expert_parallel=2)
    assert not list(expert_problems(one, whole, layers))


def test_a_mixture_is_explained_term_by_term() -> None:
    found = explain(
        ModelSpec.from_catalog("deepseek-v2-lite"),
        ClusterSpec.parse("8xH200"),
        TrainingSpec(framework="torchtitan", seq_length=4096, global_batch_size=64),
        Layout(8, expert_parallel=8, micro_batch_size=8, sharding="fsdp"),
    )
    names = {entry.name for entry in found.entries}
    assert {"latent of keys and values", "tokens sent to experts", "shared experts' gate"} <= names
