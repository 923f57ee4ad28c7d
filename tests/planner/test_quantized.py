"""Quantized products under Megatron: copies as Transformer Engine shapes them, and sums by hand."""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import pytest

from planner import ClusterSpec, InputError, ModelSpec, TrainingSpec, estimate
from planner.defaults import Job, resolve
from planner.layers import Builder
from planner.stages import price
from strategies.base import Layer, Role
from strategies.layout import Layout
from tests.helpers import block_of, saved

SEQ = 4096
EIGHT = ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise")
DEEPSEEK = ModelSpec.from_catalog("deepseek-v3")


def job_of(model: ModelSpec | str, precision: str, gpus: str = "", **given: Any) -> Job:
    whole = ModelSpec.from_catalog(model) if isinstance(model, str) else model
    gpus = gpus or ("8xB200" if precision in ("mxfp8", "nvfp4") else "8xH100")
    fields = {"precision": precision, "seq_length": SEQ, "global_batch_size": 8, **given}
    return resolve(whole, ClusterSpec.parse(gpus), TrainingSpec(**fields))


def copies(block: Layer) -> float:
    return sum(term.amount for term in block.by_role[Role.BUFFER])


def mixture_of(model: ModelSpec) -> ModelSpec:
    """The model with two layers of experts only."""
    return model.model_copy(update={"num_hidden_layers": 2, "mlps": model.mlps[-2:]})


def nvfp4(rows: int, columns: int, *, columnwise: bool) -> int:
    """Bytes of one copy: packed pairs, and a scale for 16 of them, its sides padded to 128 and to 4.

    Transformer Engine 2.20, pytorch/tensor/nvfp4_tensor.py: ``inner_tensor_specs`` and ``get_scale_shape``;
    the tensor's maximum, 4 bytes, is left out.
    """
    outer, inner = (columns, rows) if columnwise else (rows, columns)
    scales = ceil(outer / 128) * 128 * ceil(ceil(inner / 16) / 4) * 4
    return rows * columns // 2 + scales


def mxfp8(rows: int, columns: int, *, columnwise: bool) -> int:
    """A byte of each, and one for 32 of them (pytorch/tensor/mxfp8_tensor.py, ``get_scale_shape``)."""
    outer, inner = (columns, rows) if columnwise else (rows, columns)
    return rows * columns + ceil(outer / 128) * 128 * ceil(ceil(inner / 32) / 4) * 4


def both(shape: Any, weights: list[tuple[int, int]]) -> int:
    return sum(shape(*one, columnwise=way) for one in weights for way in (False, True))


@pytest.mark.parametrize(("precision", "shape"), [("nvfp4", nvfp4), ("mxfp8", mxfp8)])
def test_copies_of_a_dense_block_are_as_large_as_their_tensors(precision: str, shape: Any) -> None:
    """Llama 3.1 8B: four weights both ways; of three inputs of 4,096 tokens the columnwise copy is kept."""
    half, job = block_of(job_of("llama-3.1-8b", "bf16")), job_of("llama-3.1-8b", precision)
    block = block_of(job)
    weights = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert copies(block) == both(shape, weights)
    inputs = [(SEQ, 4096), (SEQ, 4096), (SEQ, 14336)]
    kept = sum(shape(*one, columnwise=True) for one in inputs)
    assert saved(half) - saved(block) == 2 * sum(map(prod, inputs)) - kept
    assert (job.recipe.weight, job.recipe.gradient, job.recipe.master, job.recipe.moment) == (2, 4, 4, 4)


def test_nvfp4_takes_9_16ths_of_a_byte_an_element() -> None:
    """Half a byte, and a scale of one byte for 16: NVIDIA 2025, arXiv:2509.25149, section 2."""
    assert nvfp4(4096, 4096, columnwise=True) == 4096**2 * 9 / 16
    recipe = job_of("llama-3.1-8b", "nvfp4").recipe
    assert recipe.cast == recipe.cast_weight == 9 / 16


def test_sequence_parallelism_leaves_the_rowwise_copy_of_a_norms_output_in_nvfp4() -> None:
    """layernorm_linear.py lets go of MXFP8's and of blocks', not of NVFP4's: both of two of width h."""
    tokens, h = SEQ, 4096

    def kept(precision: str, tensor: int) -> float:
        layout = Layout(8 // tensor, tensor, sequence_parallel=tensor > 1, sharding="zero1")
        return float(price(job_of("llama-3.1-8b", precision), layout, ["none"]).plain.saved)

    for precision, more in (("mxfp8", 0), ("nvfp4", 2 * tokens * h * 9 // 16)):
        # Log-sum-exp, statistics and the rest are cut as well: all of a block is.
        assert kept(precision, 2) * 2 - kept(precision, 1) == pytest.approx(more, abs=1)


@pytest.mark.parametrize(
    ("precision", "cast", "weight"),
    [
        ("fp8-delayed", 1, 2),
        ("fp8-tensorwise", 1, 2),
        ("fp8-blockwise", 1 + 4 / 128, 2),
        ("mxfp8", 33 / 32, 2 * 33 / 32),
        ("nvfp4", 9 / 16, 9 / 8),
    ],
)
def test_experts_keep_routed_tokens_and_their_second_input_quantized(
    precision: str, cast: float, weight: float
) -> None:
    """Mixtral's block: 2 experts of 14,336 a token, 8 in all. The router keeps its input in bf16."""
    half, block = block_of(job_of("mixtral-8x7b", "bf16")), block_of(job_of("mixtral-8x7b", precision))
    h, f, routed, heads = 4096, 14336, 2, 4096
    freed = h * (2 - cast) + routed * (h + f) * (2 - cast)  # attention's input; both products of experts
    if precision == "fp8-delayed":
        freed -= heads * cast  # attention's output twice
    assert saved(half) - saved(block) == pytest.approx(SEQ * freed, rel=1e-12)
    weights = h * (4096 + 2 * 1024 + 4096) + 8 * 3 * h * f
    assert copies(block) == pytest.approx(weights * weight)


@pytest.mark.parametrize("precision", [*EIGHT, "mxfp8", "nvfp4"])
def test_latent_attention_and_shared_experts_keep_quantized_inputs(precision: str) -> None:
    """DeepSeek-V3's block of experts, by hand: elements of a token in half precision, and quantized."""
    job = job_of(mixture_of(DEEPSEEK), precision)
    block = block_of(job)
    h, heads, experts, shared = 7168, 128, 8 * 2048, 2048
    # Both sums' inputs, the router's; compressed before their norms, rotary part; expanded, attention's
    # output; gate and up of the experts and of the shared one.
    half = 3 * h + 1536 + 512 + 64 + heads * (192 + 192 + 128 + 128) + 2 * experts + 2 * shared
    # Inputs of the first products, one each; compressed and normed; routed tokens; both second inputs.
    cast = 2 * h + 1536 + 512 + 8 * h + experts + shared
    if precision == "fp8-delayed":
        cast += heads * 128 + h  # what others take as it is kept: attention's output, the shared one's input
    other = 4 * heads + 8 + 8 + 256 * (4 + 4 + 1 + 4 + 4) + 8 * (8 + 2)
    assert saved(block) == pytest.approx(SEQ * (2 * half + job.recipe.cast * cast + other))
    first = h * (1536 + 576) + 1536 * heads * 192 + 512 * heads * 256 + heads * 128 * h
    weights = first + 257 * 3 * h * 2048
    assert copies(block) == pytest.approx(2 * weights * job.recipe.cast_weight)


def test_a_gpu_holds_the_copies_of_its_own_experts() -> None:
    job = job_of(mixture_of(DEEPSEEK), "fp8-blockwise")
    held = [
        float(price(job, Layout(8, expert_parallel=e, sharding="zero1"), ["none"]).plain.states[Role.BUFFER])
        for e in (1, 8)
    ]
    assert held[0] - held[1] == pytest.approx(2 * 256 * 3 * 7168 * 2048 * 7 / 8)


@pytest.mark.parametrize(
    ("option", "freed"),
    [
        ("norm", lambda cast: 2 * 7168 + 2 * 7168 * cast),  # the router's input; the first products' two
        ("moe_act", lambda cast: 8 * 2048 * cast),
        ("shared_experts", lambda cast: 2 * 2 * 2048 + 2048 * cast),
        ("mla_up_proj", lambda cast: 128 * (192 + 192 + 128) * 2),
    ],
)
def test_modules_that_are_recomputed_are_not_kept_quantized(option: str, freed: Any) -> None:
    plain, again = (
        job_of(mixture_of(DEEPSEEK), "fp8-blockwise", options=options)
        for options in ({}, {option: "recomputed"})
    )
    assert saved(block_of(plain)) - saved(block_of(again)) == pytest.approx(SEQ * freed(plain.recipe.cast))


def test_the_forward_of_quantized_experts_holds_their_tokens_sorted_and_padded() -> None:
    """In bf16 X three times and a message's other side; sorted, padded and what was activated on top."""
    forward = {}
    for precision in ("bf16", "fp8-blockwise"):
        block = block_of(job_of("mixtral-8x7b", precision))
        forward[precision] = sum(
            term.amount for term in block.by_role[Role.TRANSIENT] if term.steps == ("forward",)
        )
    assert forward["fp8-blockwise"] - forward["bf16"] == SEQ * 2 * 2 * (2 * 4096 + 14336)


def test_further_tokens_have_quantized_products_in_8_bits_and_none_in_4() -> None:
    """Megatron Core runs these modules under FP8's context alone (multi_token_prediction.py)."""

    def head(precision: str) -> Layer:
        job = job_of(DEEPSEEK, precision, options={"mtp": "on"})
        return Builder(job.model, job.training, job.stack, job.recipe).head()

    whole = copies(head("fp8-blockwise")) - copies(head("bf16"))
    block = copies(block_of(job_of(mixture_of(DEEPSEEK), "fp8-blockwise")))
    assert whole == block + 2 * 7168 * 2 * 7168
    with pytest.raises(InputError, match="mtp=on is not planned with precision=nvfp4: use mtp=off"):
        job_of(DEEPSEEK, "nvfp4", options={"mtp": "on"})


def test_4_bit_products_run_at_the_fp4_peak_and_the_rest_at_bf16s() -> None:
    """NVIDIA's DGX B200 and GB200 NVL72 data sheets: 9 and 10 PFLOP/s without sparsity, twice FP8's."""
    for gpus, peak in (("8xB200", 9e15), ("8xGB200", 10e15)):
        half, eight, four = (
            price(job_of("llama-3.1-8b", precision, gpus), Layout(8, sharding="zero1"), ["none"]).compute
            for precision in ("bf16", "mxfp8", "nvfp4")
        )
        assert four.peak == peak == 2 * eight.peak
        assert four.products == 2 * eight.products
        assert four.head_products == half.products


@pytest.mark.parametrize(
    ("model", "gpus", "layout", "faster"),
    [
        ("llama-3.1-70b", "64xGB200", (8, 2, 4, 5, 256), 4864 / 3712),
        ("llama-3.1-405b", "256xGB200", (4, 4, 16, 8, 1536), 1184 / 800),
    ],
)
def test_nvfp4_is_about_as_much_faster_than_mxfp8_as_published(
    model: str, gpus: str, layout: tuple[int, ...], faster: float
) -> None:
    """NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md: tokens a second of one mapping."""
    data, tensor, pipeline, chunks, batch = layout
    seconds = {}
    for precision in ("mxfp8", "nvfp4"):
        training = TrainingSpec(precision=precision, seq_length=8192, global_batch_size=batch)
        mapping = Layout(
            *(data, tensor, pipeline),
            chunks=chunks,
            schedule="interleaved",
            grad_accum=batch // data,
            sharding="zero1",
            sequence_parallel=True,
        )
        plan = estimate(ModelSpec.from_catalog(model), ClusterSpec.parse(gpus), training, mapping)
        seconds[precision] = plan.step_time_s
    assert seconds["mxfp8"] / seconds["nvfp4"] == pytest.approx(faster, rel=0.18)


@pytest.mark.parametrize(
    ("precision", "given", "message"),
    [
        ("nvfp4", {"gpus": "8xH100"}, "H100-SXM-80GB has no FP4 units: use bf16"),
        (
            "nvfp4",
            {"gpus": "8xB200", "framework": "torchtitan"},
            "precision=nvfp4 has no recipe in torchtitan",
        ),
        ("nvfp4", {"options": {"norm": "recomputed"}}, "norm=recomputed is not planned with precision=nvfp4"),
        ("nvfp4", {"attention": "eager"}, "attention=eager is not planned"),
        ("fp4", {"gpus": "8xB200"}, "precision=fp4 is not planned: name its scaling: nvfp4 under megatron"),
    ],
)
def test_what_4_bit_products_are_not_planned_with_is_refused(
    precision: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        job_of("llama-3.1-8b", precision, **given)


def test_delayed_scaling_casts_nothing_again() -> None:
    """transformer_config.py: no recomputed norms and activations with it."""
    for option in ("norm", "moe_act"):
        with pytest.raises(InputError, match=f"{option}=recomputed is not planned .*fp8-delayed"):
            job_of(mixture_of(DEEPSEEK), "fp8-delayed", options={option: "recomputed"})
