"""DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.1, table 2: DualPipe's bubble and memory."""

from __future__ import annotations

import pytest

from planner.schedule import critical_path, in_flight
from strategies.pipeline_parallel import PipelineParallel


@pytest.mark.parametrize("p", [2, 4, 8, 16])
@pytest.mark.parametrize(("f", "b", "w"), [(1.0, 1.0, 1.0), (3.0, 3.0, 1.0), (2.0, 2.0, 1.0)])
def test_the_bubble_is_p_half_minus_1_times_f_and_b_plus_b_minus_3_w(
    p: int, f: float, b: float, w: float
) -> None:
    """B is the table's full backward, b + w here; without messages to hide, F&B = F + B."""
    m, backward = 3 * p, b + w
    bubble = (p / 2 - 1) * ((f + backward) + backward - 3 * w)
    path = critical_path("dualpipe", [f] * p, [backward] * p, m, weight=[w] * p)
    assert path - m * (f + backward) == pytest.approx(bubble)
    whole = f + backward
    pipeline = PipelineParallel(p, 0, m, 2, "dualpipe", f / whole, w / whole)
    assert pipeline.bubble * m * whole == pytest.approx(bubble)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_every_stage_holds_p_plus_1_activations(p: int) -> None:
    """Of a p-th of the model each, and twice the parameters."""
    assert [in_flight("dualpipe", i, p, 4 * p) for i in range(p)] == [p + 1] * p
    one = PipelineParallel(p, 0, 4 * p, 2, "dualpipe")
    assert (one.in_flight, one.copies) == (p + 1, 2)


def test_the_figures_example_has_8_stages_and_20_micro_batches() -> None:
    """Figure 5; its bubble is below that of 1F1B, (p - 1) (F + B), and of ZB1P, (p - 1) (F + B - 2W)."""
    one = [PipelineParallel(8, 0, 20, v, name) for name, v in (("dualpipe", 2), ("zb-h1", 1), ("1f1b", 1))]
    assert [round(float(each.bubble) * 20 * 3) for each in one] == [6, 7, 21]
    assert [int(each.least_microbatches) for each in one] == [16, 8, 1]
