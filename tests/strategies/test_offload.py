"""Offload's four answers, by hand."""

from __future__ import annotations

import pytest

from strategies.base import Layer, Role, Term, held, size_seen_by
from strategies.layout import Layout, Wire, collectives_of, strategies_of
from strategies.offload import OFFLOADS, Offload, Staging, Way, places_of

WEIGHTS = {"hidden": 8, "ffn": 16}
BLOCK = Layer(
    "block",
    (
        Term("w", Role.PARAMETER, WEIGHTS, 2.0),
        Term("w", Role.GRADIENT, WEIGHTS, 2.0),
        Term("w", Role.OPTIMIZER, WEIGHTS, 12.0),
        Term("small", Role.PARAMETER, {"hidden": 8}, 2.0),
        Term("small", Role.GRADIENT, {"hidden": 8}, 2.0),
        Term("small", Role.OPTIMIZER, {"hidden": 8}, 12.0),
        Term("input", Role.ACTIVATION, {"batch": 4, "residual": 8}, 2.0),
    ),
)


def bytes_held(layout: Layout, role: Role, wire: Wire = Wire(), way: str = "none") -> float:
    *strategies, _ = strategies_of(layout, wire, 0, way)
    return float(sum(held(term, strategies) for term in BLOCK.by_role[role]))


def test_a_gpu_holds_nothing_of_what_has_moved_and_all_of_the_rest() -> None:
    plain, moved = Layout(), Layout(offload="optimizer")
    assert bytes_held(moved, Role.OPTIMIZER) == 0
    for role in (Role.PARAMETER, Role.GRADIENT, Role.ACTIVATION):
        assert bytes_held(moved, role) == bytes_held(plain, role)
    takes = Wire(takes_gradients=True)
    assert bytes_held(moved, Role.GRADIENT, takes) == 0
    assert bytes_held(Layout(offload="optimizer,parameters"), Role.PARAMETER) == 0
    assert bytes_held(plain, Role.ACTIVATION, way="none+activations") == 0
    assert bytes_held(plain, Role.OPTIMIZER, way="full+optimizer") == 0


def test_what_is_offloaded_is_sent_between_gpus_all_the_same() -> None:
    """ZeRO-3 gathers and reduces every parameter, wherever it lies between."""
    sent = {}
    for offload in ("", "optimizer,parameters"):
        layout = Layout(data_parallel=4, data_shards=4, sharding="zero3", offload=offload)
        *strategies, _ = strategies_of(layout, Wire(takes_gradients=True))
        sent[offload] = [float(one.size) for one in collectives_of(BLOCK, strategies)]
    assert sent[""] == sent["optimizer,parameters"]
    assert sum(sent[""]) > 0


@pytest.mark.parametrize(
    ("staging", "expected"),
    [
        (Staging(kept=2), {"passes": 256, "reduction": 256, "optimizer step": 256}),
        # Gradients of the largest weight, own half of it, in fp32.
        (Staging(moving=4), {"block": 256, "end": 256, "reduction": 256}),
        (Staging(updated=4), {"optimizer step": 4 * 136 / 2}),
        (Staging(moving=4, units=True), {"block": 544, "end": 544, "reduction": 544}),
    ],
)
def test_what_is_on_its_way_takes_room(staging: Staging, expected: dict[str, float]) -> None:
    layout = Layout(data_parallel=2, data_shards=2, sharding="zero2", offload="optimizer")
    *strategies, _ = strategies_of(layout, Wire(takes_gradients=True, staging=staging))
    offload = next(one for one in strategies if isinstance(one, Offload))
    found = offload.workspace([BLOCK], size_seen_by(offload, strategies))
    assert {buffer.span: float(buffer.size) for buffer in found} == expected


def test_a_way_reads_as_it_is_written() -> None:
    for text in ("none", "full+activations", "none+optimizer+activations"):
        assert str(Way.of(text)) == text
    assert places_of("") == {}
    assert set(places_of(",".join(OFFLOADS)).values()) == {"host"}
