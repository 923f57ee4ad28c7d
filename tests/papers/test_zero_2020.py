"""Rajbhandari et al. 2020, arXiv:1910.02054: figure 1, tables 1 and 2, to the printed digits.

Mixed precision with Adam: 2 + 2 + 12 bytes per parameter. The paper cuts some digits off and
rounds others, so a printed number may differ by less than one in its last place.
"""

from __future__ import annotations

import pytest

from strategies.base import Role, Term, held
from strategies.layout import Layout, Wire, strategies_of

UNITS = {Role.PARAMETER: 2.0, Role.GRADIENT: 2.0, Role.OPTIMIZER: 12.0}
ZERO = ("zero1", "zero2", "zero3")

# DP, then (P_os, P_os+g, P_os+g+p) in GB for 7.5B, 128B and 1T parameters.
TABLE_1 = {
    1: (("120", "120", "120"), ("2048", "2048", "2048"), ("16000", "16000", "16000")),
    4: (("52.5", "41.3", "30"), ("896", "704", "512"), ("7000", "5500", "4000")),
    16: (("35.6", "21.6", "7.5"), ("608", "368", "128"), ("4750", "2875", "1000")),
    64: (("31.4", "16.6", "1.88"), ("536", "284", "32"), ("4187", "2218", "250")),
    256: (("30.4", "15.4", "0.47"), ("518", "263", "8"), ("4046", "2054", "62.5")),
    1024: (("30.1", "15.1", "0.12"), ("513", "257", "2"), ("4011", "2013", "15.6")),
}


def state_bytes(parameters: float, sharding: str, data: int, tensor: int = 1) -> float:
    layout = Layout(data_parallel=data, tensor_parallel=tensor, sharding=sharding, data_shards=data)
    *strategies, _ = strategies_of(layout, Wire())
    dims = {"ffn": parameters}  # anything that tensor parallelism cuts
    return float(sum(held(Term("all", role, dims, unit), strategies) for role, unit in UNITS.items()))


def agrees(value: float, printed: str) -> bool:
    decimals = len(printed.partition(".")[2])
    return abs(value - float(printed)) < 10.0**-decimals


@pytest.mark.parametrize("data", TABLE_1)
def test_table_1(data: int) -> None:
    for parameters, row in zip((7.5, 128.0, 1000.0), TABLE_1[data], strict=True):
        for sharding, printed in zip(ZERO, row, strict=True):
            assert agrees(state_bytes(parameters, sharding, data), printed), (parameters, sharding)


def test_figure_1_at_64_gpus() -> None:
    ours = [state_bytes(7.5, sharding, 64) for sharding in ("ddp", *ZERO)]
    assert [round(size, 1) for size in ours] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize(
    ("tensor", "printed"),
    [
        (1, ("2", "7.6", "14.4", "128")),
        (2, ("4", "15.2", "28.8", "256")),
        (4, ("8", "30.4", "57.6", "512")),
        (8, ("16", "60.8", "115.2", "1024")),
        (16, ("32", "121.6", "230.4", "2048")),
    ],
)
def test_table_2_largest_model_in_32_gb(tensor: int, printed: tuple[str, ...]) -> None:
    """Largest model in billions for 64 data-parallel GPUs, times the model-parallel degree.

    The paper prints multiples of its rounded first row, so its later rows carry that rounding.
    """
    for sharding, largest in zip(("ddp", *ZERO), printed, strict=True):
        ours = 32.0 / state_bytes(1.0, sharding, 64, tensor)
        first = 32.0 / state_bytes(1.0, sharding, 64, 1)
        assert ours == pytest.approx(first * tensor, rel=1e-12)
        assert ours == pytest.approx(float(largest), abs=0.06 * tensor)
