"""Layouts that large models were trained on: each must be judged to fit, or the reason why not be known."""

from __future__ import annotations

from typing import Any

import pytest

from planner import ClusterSpec, Layout, ModelSpec, Plan, TrainingSpec, estimate
from planner.units import GIB

INTERLEAVED: dict[str, Any] = {"schedule": "interleaved"}
SP: dict[str, Any] = {"sequence_parallel": True}
LLAMA3 = Layout(
    data_parallel=128,
    tensor_parallel=8,
    pipeline_parallel=16,
    grad_accum=16,
    chunks=8,
    sharding="zero1",
    **SP,
    **INTERLEAVED,
)
LLAMA3_LONG = Layout(
    data_parallel=8,
    tensor_parallel=8,
    pipeline_parallel=16,
    context_parallel=16,
    context_comm="all-gather",
    grad_accum=16,
    chunks=8,
    sharding="zero1",
    **SP,
    **INTERLEAVED,
)
DEEPSEEK = Layout(
    data_parallel=128, pipeline_parallel=16, expert_parallel=64, grad_accum=120, sharding="zero1"
)


def planned(
    model: str, gpus: str, seq: int, batch: int, layout: Layout, recompute: str = "none", **training: Any
) -> Plan:
    spec = TrainingSpec(seq_length=seq, global_batch_size=batch, **training)
    return estimate(ModelSpec.from_catalog(model), ClusterSpec.parse(gpus), spec, layout, recompute=recompute)


PUBLISHED: dict[str, dict[str, Any]] = {
    # Smith et al. 2022, arXiv:2201.11990: A100 80 GB, batch 1,920, 8 replicas of 280 GPUs, TP 8, PP 35.
    "MT-NLG 530B": {
        "model": "mt-nlg-530b",
        "gpus": "280x8xA100",
        "seq": 2048,
        "batch": 1920,
        "layout": Layout(8, 8, 35, grad_accum=240),
        "recompute": "full",
    },
    # NVIDIA 2024, arXiv:2406.11704: TP 8, PP 12, interleaved, DP 64, batch 2,304; 8 layers a stage.
    "Nemotron-4 340B": {
        "model": "nemotron-4-340b",
        "gpus": "768x8xH100",
        "seq": 4096,
        "batch": 2304,
        "layout": Layout(64, 8, 12, chunks=8, grad_accum=36, sharding="zero1", **SP, **INTERLEAVED),
    },
    # Le Scao et al. 2022, arXiv:2211.05100: 48 nodes, TP 4, PP 12, DP 8, ZeRO-1.
    "BLOOM 176B": {
        "model": "bloom-176b",
        "gpus": "48x8xA100",
        "seq": 2048,
        "batch": 2048,
        "layout": Layout(8, 4, 12, micro_batch_size=2, grad_accum=128, sharding="zero1"),
        "recompute": "full",
        "framework": "deepspeed",
        "options": {"kernels": "megatron"},
    },
    # Megatron Core, megatron/core/transformer/moe/README.md, "Reference Best Parallel Mapping" (v0.8).
    "Mixtral 8x7B": {
        "model": "mixtral-8x7b",
        "gpus": "8x8xH100",
        "seq": 4096,
        "batch": 256,
        "layout": Layout(
            16,
            pipeline_parallel=4,
            expert_parallel=8,
            chunks=8,
            grad_accum=16,
            sharding="zero1",
            **INTERLEAVED,
        ),
    },
    # The same table; experts are cut by TP unless --expert-tensor-parallel-size says otherwise.
    "Mixtral 8x22B": {
        "model": "mixtral-8x22b",
        "gpus": "16x8xH100",
        "seq": 4096,
        "batch": 256,
        "layout": Layout(
            data_parallel=4,
            tensor_parallel=4,
            pipeline_parallel=8,
            expert_parallel=2,
            expert_tensor_parallel=4,
            chunks=7,
            grad_accum=64,
            sharding="zero1",
            **SP,
            **INTERLEAVED,
        ),
    },
    # Grattafiori et al. 2024, arXiv:2407.21783, table 4: nothing recomputed, in a framework of their own
    # that frees tensors early (section 3.3.2). Megatron's recomputes norms and activations for that.
    "Llama 3 405B, 8K": {
        "model": "llama-3.1-405b",
        "gpus": "2048x8xH100",
        "seq": 8192,
        "batch": 2048,
        "layout": LLAMA3,
        "options": {"norm": "recomputed", "swiglu": "recomputed"},
    },
    "Llama 3 405B, 131K": {
        "model": "llama-3.1-405b",
        "gpus": "2048x8xH100",
        "seq": 131072,
        "batch": 128,
        "layout": LLAMA3_LONG,
        "options": {"norm": "recomputed", "swiglu": "recomputed"},
    },
    # DeepSeek-AI 2024, arXiv:2412.19437, sections 3.2 and 4.2: PP 16, EP 64, ZeRO-1, no TP. DualPipe takes
    # pairs of layers, which 61 have not; it holds as many micro-batches as the first stage of 1F1B.
    "DeepSeek-V3": {
        "model": "deepseek-v3",
        "gpus": "256x8xH800",
        "seq": 4096,
        "batch": 15360,
        "layout": DEEPSEEK,
        "recompute": "full",
        "options": {"mtp": "on"},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layout_that_a_model_was_trained_on_fits(name: str) -> None:
    plan = planned(**PUBLISHED[name])
    assert plan.verdict == "fits"
    assert 0.08 < plan.mfu < 0.6


def test_mixtral_8x7b_runs_at_the_published_rate() -> None:
    """The same README: 468 TFLOP/s a GPU in bf16, from MCore v0.9 on, with that mapping."""
    plan = planned(**PUBLISHED["Mixtral 8x7B"])
    assert plan.mfu * 989e12 == pytest.approx(468e12, rel=0.1)


def test_llama_3_without_any_recomputation_needs_a_tenth_more_than_megatron_has() -> None:
    """At 8K and at 131K alike, as CP 16 leaves every GPU 8K: what freeing tensors early saved them."""
    for layout, seq, batch in ((LLAMA3, 8192, 2048), (LLAMA3_LONG, 131072, 128)):
        plan = planned("llama-3.1-405b", "2048x8xH100", seq, batch, layout)
        assert plan.verdict == "does not fit"
        assert plan.peak_bytes / plan.capacity_bytes == pytest.approx(1.1, abs=0.02)


def test_deepseek_v3s_own_modules_fit_with_its_8_bit_products() -> None:
    """Sections 3.2.3 and 3.3: RMSNorm, up-projections and SwiGLU again, blocks of 1 x 128 and 128 x 128.

    Megatron keeps weights in 8 bits both ways besides; the activations of 69 GiB in bf16 are 47.
    """
    options = {"norm": "recomputed", "mla_up_proj": "recomputed", "moe_act": "recomputed"}
    plan = planned(
        *("deepseek-v3", "256x8xH800", 4096, 15360, DEEPSEEK), options=options, precision="fp8-blockwise"
    )
    assert plan.verdict == "fits"
    assert plan.stages[plan.fullest].components["activations"] / GIB == pytest.approx(47.5, abs=0.5)


def test_deepseek_v3s_own_modules_alone_need_its_8_bit_activations() -> None:
    """RMSNorm and the up-projections recomputed (section 3.2.3) leave 69 GiB of activations in bf16.

    Routed tokens, kept in 8 bits there (section 3.3.3), are most of them. With layers recomputed it fits.
    """
    options = {"norm": "recomputed", "mla_up_proj": "recomputed"}
    job: dict[str, Any] = {"model": "deepseek-v3", "gpus": "256x8xH800", "seq": 4096, "batch": 15360}
    plan = planned(**job, layout=DEEPSEEK, options=options)
    fullest = plan.stages[plan.fullest]
    assert plan.verdict == "does not fit"
    assert fullest.components["activations"] / GIB == pytest.approx(69, abs=1)
    assert planned(**job, layout=DEEPSEEK, options=options, recompute="auto").verdict == "fits"
