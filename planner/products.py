"""What part of its best rate a matrix product reaches, by its shape: tiles, and waves of them.

A product's result is computed in tiles, one on each multiprocessor at a time. Tiles that reach over the edge
and the last wave of tiles leave multiprocessors idle. NVIDIA, Matrix Multiplication Background User's Guide,
"Tile Quantization" and "Wave Quantization"; tiles of 256 x 128 elements are the largest and the fastest, as a
tile of a x b elements uses what it loads a b / (a + b) times. That smaller ones are slower in this proportion
is assumed; they serve products that would not fill a wave with large ones.
"""

from __future__ import annotations

import numpy as np

from strategies.base import Quantity

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))


def busy(rows: Quantity, columns: Quantity, multiprocessors: int, groups: Quantity = 1) -> Quantity:
    """The part of the best rate at which ``groups`` results of that shape are computed: above 0, at most 1.

    The guide's example, on 108 multiprocessors: 1,792 x 1,792 is 98 tiles and one wave.

    >>> round(float(busy(1792, 1792, 108)), 3) == round(98 / 108, 3)
    True
    """
    best: Quantity = 0.0
    for high, wide in TILES:
        tiles = np.ceil(rows / high) * np.ceil(columns / wide) * groups
        area = np.ceil(tiles / multiprocessors) * multiprocessors * high * wide
        best = np.maximum(best, rows * columns * groups / area * (reuse(high, wide) / reuse(*TILES[0])))
    return best


def reuse(high: int, wide: int) -> float:
    """How often a tile uses each element that it loads."""
    return high * wide / (high + wide)


def passes(
    tokens: Quantity, inner: Quantity, outer: Quantity, multiprocessors: int, groups: Quantity = 1
) -> tuple[Quantity, Quantity, Quantity]:
    """Time of a weight's product, of the gradient of its input and of its own, over that at the best rate.

    Of ``groups`` weights of that shape, each with as many tokens, at once (a grouped product).
    The weight has ``inner`` x ``outer`` elements on a GPU. Its forward makes tokens x outer elements, its
    backward tokens x inner for the input and inner x outer for the weight: three products of equal work.
    """
    sides = ((tokens, outer), (tokens, inner), (inner, outer))
    forward, inputs, weights = (1 / busy(rows, columns, multiprocessors, groups) for rows, columns in sides)
    return forward, inputs, weights
