"""Tiles and waves: what part of its best rate a product reaches, by its shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.products import busy, passes
from planner.stages import price
from strategies.base import Role
from strategies.layout import Layout
from tests.helpers import job_of, llama


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


@given(lengths, lengths, lengths)
def test_a_forward_is_one_product_and_a_backward_two(tokens: int, inner: int, outer: int) -> None:
    forward, backward = (float(part) for part in passes(tokens, inner, outer, 108))
    assert forward >= 1 / 3
    assert backward >= 2 / 3
    # Turned round, the weight's forward is what the gradient of its input was.
    turned, _ = (float(part) for part in passes(tokens, outer, inner, 108))
    assert forward + backward == pytest.approx(forward + turned + 1 / float(busy(inner, outer, 108)) / 3)


def test_recompute_runs_the_forward_once_more() -> None:
    model = llama(4, 4096, 32, 8, vocab_size=32000)
    job = job_of(model, "8xA100", seq_length=1024, global_batch_size=8)
    prices = price(job, Layout(tensor_parallel=8, grad_accum=8), ("none", "full"))
    block = prices.layers[1]
    products = [found for (kind, _), found in prices.products.items() if kind == "block"]
    forward = sum(3 * once * ahead for once, ahead, _ in products)
    core = next(term for term in block.by_role[Role.FLOPS] if term.name == "attention core")
    again = float(prices._work(block, "full")) - float(prices._work(block, "none"))
    assert again == pytest.approx(float(forward) / 3 + core.amount / 8 / 3)


def test_small_products_are_slow_under_wide_tensor_parallelism() -> None:
    """Per token of a GPU's work, eight ways of a short micro-batch cost more than of a long one."""
    model = llama(4, 4096, 32, 8, vocab_size=32000)
    seconds = {}
    for batch in (1, 8):
        job = job_of(model, "8xA100", seq_length=1024, global_batch_size=8)
        layout = Layout(
            tensor_parallel=8, sequence_parallel=True, micro_batch_size=batch, grad_accum=8 // batch
        )
        prices = price(job, layout, ("none",))
        seconds[batch] = float(prices._work(prices.layers[1], "none")) / batch
    assert seconds[1] > 1.2 * seconds[8]
