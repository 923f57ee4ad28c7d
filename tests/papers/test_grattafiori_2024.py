"""Grattafiori et al. 2024, arXiv:2407.21783: Llama 3 405B on H100, table 4 and section 3.3.2."""

from __future__ import annotations

import pytest

from planner import ClusterSpec, Layout, ModelSpec, TrainingSpec, estimate


@pytest.mark.parametrize(
    ("gpus", "data", "batch", "tflops", "mfu"), [(8192, 64, 32, 430, 0.43), (16384, 128, 16, 400, 0.41)]
)
def test_llama_3_405b_runs_at_the_published_rate(
    gpus: int, data: int, batch: int, tflops: float, mfu: float
) -> None:
    """TP 8, PP 16, sequences of 8,192, 16M tokens a step; their interleaving is not published: 8 chunks."""
    training = TrainingSpec(seq_length=8192, global_batch_size=data * batch)
    layout = Layout(
        data_parallel=data,
        tensor_parallel=8,
        pipeline_parallel=16,
        chunks=8,
        schedule="interleaved",
        grad_accum=batch,
        sequence_parallel=True,
        sharding="zero1",
    )
    plan = estimate(
        ModelSpec.from_catalog("llama-3.1-405b"), ClusterSpec.parse(f"{gpus}xH100"), training, layout
    )
    assert plan.mfu == pytest.approx(mfu, rel=0.1)
    assert plan.model_flops_per_s / 1e12 == pytest.approx(tflops, rel=0.1)
