"""Qi et al. 2024, arXiv:2401.10241: table 2 and sections 2.3 and 6."""

from __future__ import annotations

import pytest

from planner.schedule import Kind, even_chunks, in_flight, order, timeline
from strategies.pipeline_parallel import PipelineParallel

UNITS = [(1.0, 1.0, 1.0), (3.0, 4.0, 2.0), (3.0, 5.0, 3.0), (4.0, 7.0, 3.0)]
"""F, B and W: equal, as in figure 3, and with attention and recompute in F and B."""


def idle(schedule: str, p: int, m: int, unit: tuple[float, float, float]) -> float:
    """The longest that a stage is idle between its first pass and its last: the paper's bubble."""
    f, b, w = unit
    times = timeline(schedule, even_chunks(schedule, [f] * p, [b + w] * p, weight=[w] * p), m)
    lanes = [[one for one in times if one.work.stage == stage] for stage in range(p)]
    return max(lane[-1].end - lane[0].start for lane in lanes) - m * (f + b + w)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("p", [2, 4, 8])
def test_table_2_bubbles_of_the_handcrafted_schedules(p: int, unit: tuple[float, float, float]) -> None:
    f, b, w = unit
    m = 3 * p
    assert idle("1f1b", p, m, unit) == pytest.approx((p - 1) * (f + b + w))
    assert idle("zb-h1", p, m, unit) == pytest.approx((p - 1) * (f + b - w))
    assert idle("zb-h2", p, m, unit) == pytest.approx((p - 1) * max(f + b - 2 * w, 0))


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_zb_h1_has_a_third_of_1f1bs_bubble_and_zb_h2_and_zb_v_none_where_all_passes_are_equal(p: int) -> None:
    unit, m = (1.0, 1.0, 1.0), 2 * p
    assert idle("zb-h1", p, m, unit) == pytest.approx(idle("1f1b", p, m, unit) / 3)
    assert idle("zb-h2", p, m, unit) == pytest.approx(0.0)
    assert idle("zb-v", p, m, unit) == pytest.approx(0.0)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_table_2_peak_activation_memory_is_that_of_p_and_of_2p_minus_1_micro_batches(p: int) -> None:
    m = 4 * p
    assert max(in_flight("1f1b", i, p, m) for i in range(p)) == p
    assert [in_flight("zb-h1", i, p, m) for i in range(p)] == [p] * p
    assert [in_flight("zb-h2", i, p, m) for i in range(p)] == [2 * p - 1] * p


@pytest.mark.parametrize(("schedule", "passes"), [("zb-h1", 1), ("zb-h2", 2)])
def test_section_2_3_device_i_holds_fewer_for_b_and_more_for_w(schedule: str, passes: int) -> None:
    """Device i of 1 to p: (p - i + 1) M_B + (i - 1) M_W, and (2p - 2i + 1) M_B + (2i - 2) M_W."""
    p, m, m_b, m_w = 6, 30, 10.0, 8.0
    for i in range(1, p + 1):
        held = most = 0.0
        for one in order(schedule, i - 1, p, m):
            held += {Kind.FORWARD: m_b, Kind.INPUT: m_w - m_b, Kind.WEIGHT: -m_w}[one.kind]
            most = max(most, held)
        before = passes * (p - i) + 1
        assert most == pytest.approx(before * m_b + passes * (i - 1) * m_w)
        # The planner counts a pass whole until W, one more of them while it waits for its own.
        waiting, pending = PipelineParallel(p, i - 1, m, 1, schedule).held[0]
        assert (waiting + 1, pending - 1) == (before, passes * (i - 1))


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_zb_v_holds_as_much_as_1f1bs_first_stage_on_every_stage(p: int) -> None:
    """As the page of the authors' fork of Megatron-LM tables it; a pass through a chunk is half a stage's."""
    assert [in_flight("zb-v", i, p, 4 * p, 2) / 2 for i in range(p)] == [p] * p


def test_a_step_that_ends_for_all_stages_at_once_waits_for_the_last_to_start() -> None:
    """Without the authors' optimizer post-validation ZB-H2's figure 3 takes (p - 1) F more."""
    p, m = 4, 8
    times = timeline("zb-h2", even_chunks("zb-h2", [1.0] * p, [2.0] * p), m)
    assert max(one.end for one in times) == 3 * m + (p - 1)
    assert PipelineParallel(p, 0, m, 1, "zb-h2").bubble * 3 * m == pytest.approx(p - 1)
