"""Tiles and waves: what part of its best rate a product reaches, by its shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.products import busy, passes


@pytest.mark.parametrize(("columns", "tiles"), [(1792, 98), (1920, 105)])
def test_a_wave_of_tiles_on_an_a100(columns: int, tiles: int) -> None:
    """108 multiprocessors; 1,792 rows are 7 tiles of 256, columns tiles of 128, as in NVIDIA's guide."""
    assert 1792 // 256 * (columns // 128) == tiles
    assert float(busy(1792, columns, 108)) == pytest.approx(tiles / 108)


def test_a_tile_more_than_a_wave_takes_smaller_tiles_or_a_second_wave() -> None:
    """2,048 columns: 112 tiles of 256 x 128 in two waves; or 224 of 128 x 128, at 3/4, in three."""
    large, small = 112 / 216, 224 / 324 * (64 / (256 * 128 / 384))
    assert float(busy(1792, 2048, 108)) == pytest.approx(max(large, small))


def test_small_results_are_computed_in_small_tiles() -> None:
    """256 x 1,024: 8 large tiles keep 7 % busy; 64 of 64 x 64 keep 59 %, at 3/8 of the rate."""
    assert float(busy(256, 1024, 108)) == pytest.approx(64 / 108 * 0.375)


def test_a_product_of_whole_waves_keeps_all_busy() -> None:
    assert float(busy(256 * 12, 128 * 9, 108)) == 1


lengths = st.integers(1, 60_000)


@given(lengths, lengths, st.integers(1, 200))
def test_busy_is_a_part_and_the_order_of_sides_does_not_matter(rows: int, columns: int, count: int) -> None:
    part = float(busy(rows, columns, count))
    assert 0 < part <= 1
    assert part == float(busy(columns, rows, count))
    assert part == pytest.approx(float(busy(np.array([rows]), np.array([columns]), count)[0]))


def test_a_weight_has_three_products_of_equal_work() -> None:
    whole = [float(part) for part in passes(256 * 108, 128 * 108, 128 * 108, 108)]
    assert whole == [1, 1, 1]


@given(lengths, lengths, lengths)
def test_turned_round_a_weight_s_forward_is_its_input_s_gradient(tokens: int, inner: int, outer: int) -> None:
    forward, inputs, weights = (float(part) for part in passes(tokens, inner, outer, 108))
    assert min(forward, inputs, weights) >= 1
    assert (inputs, forward, weights) == tuple(float(part) for part in passes(tokens, outer, inner, 108))
