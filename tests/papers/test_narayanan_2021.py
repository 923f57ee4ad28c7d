"""Narayanan et al. 2021, arXiv:2104.04473: bubble fractions of sections 2.2.1 and 2.2.2."""

from __future__ import annotations

import pytest

from planner.schedule import critical_path
from strategies.pipeline_parallel import PipelineParallel


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 8), (8, 64), (2, 1), (1, 5)])
def test_bubble_of_gpipe_and_1f1b_is_p_minus_1_over_m(p: int, m: int) -> None:
    for schedule in ("gpipe", "1f1b"):
        assert PipelineParallel(p, 0, m, 1, schedule).bubble == pytest.approx((p - 1) / m)
        # The same from the schedule itself: forward 1 s, backward 2 s, on every stage.
        ideal = m * 3.0
        path = critical_path(schedule, [1.0] * p, [2.0] * p, m)
        assert (path - ideal) / ideal == pytest.approx((p - 1) / m)


@pytest.mark.parametrize(("p", "m", "v"), [(4, 8, 2), (8, 16, 3), (4, 4, 4), (2, 8, 5)])
def test_interleaving_divides_the_bubble_by_the_number_of_chunks(p: int, m: int, v: int) -> None:
    assert PipelineParallel(p, 0, m, v, "interleaved").bubble == pytest.approx((p - 1) / (v * m))
    ideal = m * 3.0
    path = critical_path("interleaved", [1.0] * p, [2.0] * p, m, v)
    assert (path - ideal) / ideal == pytest.approx((p - 1) / (v * m))


def test_a_pipeline_of_one_micro_batch_is_naive_model_parallelism() -> None:
    """One stage works at a time: p stages take p times as long as the work itself."""
    assert PipelineParallel(8, 0, 1).bubble == 7
    assert critical_path("1f1b", [1.0] * 8, [2.0] * 8, 1) == 24.0
