"""Arithmetic that articles print and engineers quote, reproduced from the same bills of terms."""

from __future__ import annotations

import pytest

from planner import ModelSpec
from planner.stacks.base import Recipe
from planner.weights import count_matrix_parameters
from strategies.base import Role
from tests.helpers import block_of, gpt, job_of, saved

GIB = 2**30


def llama_13b_as_gpt() -> ModelSpec:
    """LLaMA-13B's depth and width with the GPT block that the article's formulas describe."""
    return gpt(40, 5120, 40, vocab=32000, seq=1024)


def test_llama_13b_activations_are_14_45_gib_at_batch_1() -> None:
    job = job_of(llama_13b_as_gpt(), attention="eager", seq_length=1024, precision="fp16")
    layer = saved(block_of(job), without=("norm statistics",)) * 40
    assert layer == 1024 * 1 * 5120 * (34 + 5 * 40 * 1024 / 5120) * 40
    assert f"{layer / GIB:.2f}" == "14.45"
    millions = saved(block_of(job, 4_000_000), without=("norm statistics",)) * 40
    assert millions / GIB == 57_812_500


def test_llama_13b_parts_add_up_to_222_45_as_printed() -> None:
    """Inputs and outputs 10 MiB each; 13e9 parameters at 2 + 2 + 12 bytes; GB and GiB added."""
    job = job_of(llama_13b_as_gpt(), attention="eager", seq_length=1024, precision="fp16")
    block = block_of(job)
    stream = next(t for t in block.terms if t.name == "block input")
    assert stream.amount == 10 * 2**20
    recipe = Recipe(2, 2, 4, 4)
    parameters, gradients = 13e9 * recipe.weight / 1e9, 13e9 * recipe.gradient / 1e9
    optimizer = 13e9 * (recipe.master + 2 * recipe.moment) / 1e9
    assert (parameters, gradients, optimizer) == (26, 26, 156)
    activations = saved(block, without=("norm statistics",)) * 40 / GIB
    assert f"{parameters + gradients + optimizer + activations:.2f}" == "222.45"


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "vocab"),
    [(12, 768, 12, 50257), (48, 1600, 25, 50257), (96, 12288, 96, 51200)],
)
def test_transformer_parameters_are_12h2_plus_13h_per_layer_plus_vh(
    layers: int, hidden: int, heads: int, vocab: int
) -> None:
    model = gpt(layers, hidden, heads, vocab=vocab, seq=1024)
    positions_and_final_norm = 1024 * hidden + 2 * hidden
    expected = layers * (12 * hidden**2 + 13 * hidden) + vocab * hidden
    assert model.num_parameters - positions_and_final_norm == expected


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "printed"),
    [
        (32, 4096, 32, 6_442_450_944),
        (40, 5120, 40, 12_582_912_000),
        (60, 6656, 52, 31_897_681_920),
        (80, 8192, 64, 64_424_509_440),
    ],
)
def test_twelve_l_h_squared_for_the_llama_sizes(layers: int, hidden: int, heads: int, printed: int) -> None:
    model = gpt(layers, hidden, heads, vocab=32000)
    assert count_matrix_parameters(model) - 32000 * hidden == printed


def test_13_billion_fp32_parameters_are_48_4_gib() -> None:
    assert (
        f"{13e9 * job_of(llama_13b_as_gpt(), precision='fp32', seq_length=1024).recipe.weight / GIB:.1f}"
        == "48.4"
    )


def bytes_per_parameter(optimizer: str = "adamw", **training: object) -> float:
    """All model states of a block over its parameters, as the stack and the options have them."""
    model = gpt(2, 1024, 16, model_type="llama" if training.get("framework") == "torchtitan" else "gpt")
    job = job_of(model, optimizer=optimizer, seq_length=1024, **training)
    block = block_of(job)
    parameters = sum(t.elements for t in block.by_role[Role.PARAMETER])
    roles = (Role.PARAMETER, Role.GRADIENT, Role.OPTIMIZER)
    return float(sum(t.amount for role in roles for t in block.by_role[role]) / parameters)


def test_bytes_per_parameter_of_the_usual_recipes() -> None:
    assert bytes_per_parameter(precision="fp32", framework="hf") == 16
    # Mixed precision: the ZeRO paper's 2 + 2 + 12, and Megatron's with fp32 gradients.
    zero = {"gradient_dtype": "bf16", "master_weights": True, "optimizer_dtype": "fp32"}
    assert bytes_per_parameter(precision="pure-bf16", framework="hf", **zero) == 16
    assert bytes_per_parameter(precision="fp16", framework="hf") == 16
    assert bytes_per_parameter(precision="bf16", framework="megatron") == 18
    # Megatron's docs/dist_optimizer: fp16 parameters and gradients 20, 4 of them the step's copies; fp32 16.
    assert bytes_per_parameter(precision="bf16", gradient_dtype="bf16") == 20 - 4
    assert bytes_per_parameter(precision="fp32") == 16
    assert bytes_per_parameter(precision="bf16", framework="torchtitan") == 16


@pytest.mark.parametrize(("optimizer", "times"), [("sgd", 0), ("momentum", 1), ("adamw", 2)])
def test_optimizer_states_are_0_1_or_2_times_the_parameters_in_fp32(optimizer: str, times: int) -> None:
    assert bytes_per_parameter(optimizer, precision="fp32", framework="hf") == 4 + 4 + 4 * times


def test_a_billion_parameters_in_bf16_only_with_adam_are_8_gb() -> None:
    assert bytes_per_parameter(precision="pure-bf16", framework="hf") * 1e9 == 8e9


def test_llama_2_7b_as_2_plus_4_plus_8_bytes_has_98_gb_of_model_states() -> None:
    each = bytes_per_parameter(
        precision="pure-bf16",
        gradient_dtype="fp32",
        optimizer_dtype="fp32",
        master_weights=False,
        framework="hf",
    )
    assert each * 7e9 == 98e9


@pytest.mark.parametrize(
    ("batch", "seq", "hidden", "heads"), [(1, 1024, 1024, 16), (8, 2048, 4096, 32), (3, 512, 768, 12)]
)
def test_ratio_of_activations_to_states_of_an_fp32_gpt(batch: int, seq: int, hidden: int, heads: int) -> None:
    """``b (s / 3d + h s^2 / 24 d^2)``: 16 sbd + 2 h s^2 b elements against 4 x 12 d^2 elements.

    The published ratio leaves out one-byte masks and the norms' statistics, biases and norm weights.
    """
    job = job_of(gpt(2, hidden, heads, seq=seq), precision="fp32", attention="eager", seq_length=seq)
    block = block_of(job, batch)
    activations = saved(block, without=("norm statistics", "mask"))
    matrices = sum(
        t.elements for t in block.by_role[Role.PARAMETER] if "weight" in t.name and "norm" not in t.name
    )
    assert matrices == 12 * hidden**2
    ratio = activations / (16 * matrices)
    assert ratio == pytest.approx(batch * (seq / (3 * hidden) + heads * seq**2 / (24 * hidden**2)), rel=1e-12)


@pytest.mark.parametrize("shards", [1, 2, 8, 64])
def test_megatron_distributed_optimizer_bytes_per_parameter(shards: int) -> None:
    """Megatron-LM docs/source/api-guide/dist_optimizer.md: 6 + 12/d, 4 + 16/d, 8 + 8/d."""
    from strategies.base import held
    from strategies.layout import Layout, Wire, strategies_of

    *strategies, _ = strategies_of(Layout(data_parallel=shards, sharding="zero1"), Wire())
    for training, (fixed, cut) in {
        (("precision", "bf16"),): (6, 12),
        (("precision", "fp16"), ("gradient_dtype", "fp16")): (4, 16),
        (("precision", "fp32"),): (8, 8),
    }.items():
        block = block_of(job_of(gpt(2, 1024, 16), seq_length=1024, **dict(training)))
        roles = (Role.PARAMETER, Role.GRADIENT, Role.OPTIMIZER)
        parameters = sum(t.elements for t in block.by_role[Role.PARAMETER])
        total = sum(held(t, strategies) for role in roles for t in block.by_role[role])
        if "gradient_dtype" in dict(training):  # copied to fp32 in the optimizer step alone
            total += 4 * parameters / shards
        assert total / parameters == pytest.approx(fixed + cut / shards, rel=1e-12)
