"""A layer's own work: traffic as traced, attention as published, what recompute and messages add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import ClusterSpec, TrainingSpec
from planner.catalog import host, load_gpu
from planner.compute import CHANNELS, again
from planner.defaults import resolve
from planner.families import model_from_config
from planner.layers import Builder
from planner.stages import Prices, price
from strategies.base import Role
from strategies.layout import Layout, strategies_of
from tests.helpers import job_of, llama

TRACED = json.loads((Path(__file__).parents[1] / "data" / "traced_traffic.json").read_text())


@pytest.mark.parametrize("row", TRACED, ids=[f"{row['name']} {row['precision']}" for row in TRACED])
def test_traffic_of_an_eager_block_is_what_its_operators_move(row: dict[str, Any]) -> None:
    """scripts/trace_traffic: inputs and outputs of every operator of transformers' block."""
    layers = "n_layer" if row["name"] == "gpt2" else "num_hidden_layers"
    config = {"max_position_embeddings": row["tokens"], **row["config"], layers: 2}
    model = model_from_config(config, "traced", name="traced", source="")
    training = TrainingSpec(
        seq_length=row["tokens"], global_batch_size=1, framework="hf", precision=row["precision"]
    )
    job = resolve(model, ClusterSpec.parse("1xA100"), training)
    block = Builder(model, job.training, job.stack, job.recipe).block()
    moved = sum(term.amount for term in block.by_role[Role.TRAFFIC])
    traced = row["forward"]["bytes"] + row["backward"]["bytes"]
    assert moved == pytest.approx(traced, rel=0.04)
    # A third of it is the forward's, as recompute counts it: between 0.29 and 0.42.
    assert 0.29 < row["forward"]["bytes"] / traced < 0.42


H100 = {
    512: (191, 315),
    1024: (260, 410),
    2048: (298, 484),
    4096: (319, 518),
    8192: (333, 529),
    16384: (335, 539),
}
"""Causal forward with heads of 128, TFLOP/s of FlashAttention-2 and of cuDNN: Shah et al. 2024,
arXiv:2407.08608, figure 5."""
H100_BACKWARD = {512: (214, 305), 1024: (260, 408), 2048: (291, 465), 4096: (310, 499), 8192: (318, 518)}
"""Backward, figure 6."""
NARROW = {1024: 229, 2048: 262, 4096: 284, 8192: 295, 16384: 299}
"""Causal forward of FlashAttention-2 with heads of 64."""


def test_attention_is_as_fast_as_published() -> None:
    gpu = load_gpu("h100")
    for sequence, figures in H100.items():
        for kernel, figure in zip(("flash", "cudnn"), figures, strict=True):
            rate = gpu.attention[kernel].rates(128, sequence)[0] * gpu.peak_flops["bf16"] / 1e12
            assert rate == pytest.approx(figure, rel=0.12), (kernel, sequence)
    for sequence, figures in H100_BACKWARD.items():
        for kernel, figure in zip(("flash", "cudnn"), figures, strict=True):
            rate = gpu.attention[kernel].rates(128, sequence)[1] * gpu.peak_flops["bf16"] / 1e12
            assert rate == pytest.approx(figure, rel=0.13), (kernel, sequence)
    for sequence, narrow in NARROW.items():
        rate = gpu.attention["flash"].rates(64, sequence)[0] * gpu.peak_flops["bf16"] / 1e12
        assert rate == pytest.approx(narrow, rel=0.05), sequence


def prices_of(framework: str = "megatron", **rest: Any) -> Prices:
    """A LLaMA-like model of four layers on eight A100."""
    options = {"framework": framework, "seq_length": 16384, "global_batch_size": 8, **rest}
    model = llama(4, 4096, 32, 8, vocab_size=32000)
    layout = Layout(tensor_parallel=8, grad_accum=8) if framework == "megatron" else Layout(data_parallel=8)
    return price(job_of(model, "8xA100", **options), layout)


def test_recompute_runs_the_forward_once_more() -> None:
    prices = prices_of()
    by_policy = dict(zip(prices.policies, prices.blocks, strict=True))
    none, full = by_policy["none"], by_policy["full"]
    assert float(full.forward) == pytest.approx(float(none.forward))
    assert float(full.weights) == float(none.weights)
    assert float(full.seconds - none.seconds) == pytest.approx(float(none.forward))
    selective = float(by_policy["selective"].seconds - none.seconds)
    block, compute = prices.layers[1], prices.compute
    *plain, _ = strategies_of(prices.layout, prices.wire)
    core = next(t for t in block.by_role[Role.FLOPS] if t.name == "attention core")
    assert selective == pytest.approx(float(compute.seconds(block, core, plain)[0]))


def test_weights_take_a_third_of_the_products_and_nothing_else() -> None:
    prices = prices_of()
    block, compute = prices.layers[1], prices.compute
    *plain, _ = strategies_of(prices.layout, prices.wire)
    products = [t for t in block.by_role[Role.FLOPS] if "hidden" in t.dims]
    weights = sum(float(compute.seconds(block, t, plain)[2]) for t in products)
    assert float(prices.plain.weights) == pytest.approx(weights)
    flops = sum(t.amount for t in products) / 8 / 3
    assert weights >= flops / compute.products


def test_a_head_that_tensor_cores_cannot_take_is_slow() -> None:
    """Heads of 108 in BLOOM's size search took a quarter more of a step than those of 112 or 104."""

    def core(width: int) -> float:
        model = llama(4, 64 * width, 64, 64, vocab_size=32000)
        job = job_of(model, "8xA100", seq_length=2048, global_batch_size=8, attention="eager")
        prices = price(job, Layout(tensor_parallel=8, grad_accum=8))
        block = prices.layers[1]
        *plain, _ = strategies_of(prices.layout, prices.wire)
        term = next(t for t in block.by_role[Role.FLOPS] if t.name == "attention core")
        return sum(float(part) for part in prices.compute.seconds(block, term, plain))

    assert core(108) > 5 * core(112)
    assert core(112) == pytest.approx(core(104), rel=0.1)


def test_hidden_messages_take_multiprocessors() -> None:
    compute = prices_of("torchtitan").compute
    part = CHANNELS / 108
    assert float(compute.behind(10.0, 1.0)) == pytest.approx(10 + part)
    assert float(compute.behind(10.0, 20.0)) == 20


def test_a_small_layer_takes_as_long_as_its_launches() -> None:
    model = llama(4, 256, 8, 8, vocab_size=32000)
    job = job_of(model, "1xA100", seq_length=64, global_batch_size=1)
    block = price(job, Layout(), ("none",)).plain
    forward, backward = job.stack.launches
    launch = host("launch_s").value
    assert float(block.forward) == pytest.approx(forward * launch)
    assert float(block.seconds) == pytest.approx((forward + backward) * launch)


def test_again_counts_forwards() -> None:
    prices = prices_of()
    block = prices.layers[1]
    for policy, times in (("none", 0), ("full", 1)):
        *strategies, _ = strategies_of(prices.layout, prices.wire, 0, policy)
        for role in (Role.FLOPS, Role.TRAFFIC, Role.MESSAGE):
            assert {again(term, strategies) for term in block.by_role[role]} == {times}
