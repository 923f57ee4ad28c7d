"""Offload: what a GPU would hold lies in its host's memory, or on NVMe, and comes when it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import ClassVar

from strategies.base import AbstractStrategy, Buffer, Layer, Quantity, Role, Size, Term, larger

OFFLOADS = ("optimizer", "parameters", "activations")
"""What can be moved: optimizer states, parameters, and activations between forward and backward."""
PLACES = ("host", "nvme")


@dataclass(frozen=True, slots=True)
class Way:
    """How a layer is run: its recompute policy, and what of it is offloaded besides what all layers do."""

    recompute: str
    offload: tuple[str, ...] = ()

    @staticmethod
    @lru_cache
    def of(text: str) -> Way:
        """A way as it is written.

        >>> Way.of("full+activations")
        Way(recompute='full', offload=('activations',))
        """
        policy, *items = text.split("+")
        return Way(policy, tuple(items))

    def __str__(self) -> str:
        return "+".join((self.recompute, *self.offload))


def places_of(text: str) -> dict[str, str]:
    """Where each item of ``optimizer:nvme,parameters`` goes: the host unless it says NVMe.

    >>> places_of("optimizer:nvme,parameters")
    {'optimizer': 'nvme', 'parameters': 'host'}
    """
    pairs = (item.partition(":") for item in text.split(",") if item)
    return {name: place or "host" for name, _, place in pairs}


@dataclass(frozen=True)
class Staging:
    """What passes through a GPU on its way: bytes per element, each a line of a library.

    ``kept`` is of a buffer as large as the largest weight, there all the time. Of the gradients that leave,
    ``moving`` is of those of the largest weight, or of two ``units``; ``fetched`` says that the own part of
    one unit's weights comes before it is gathered; ``updated`` is of all of a GPU's own weights, as the
    optimizer step brings them back at once. A unit is a block, or embedding and head.
    """

    kept: float = 0.0
    moving: float = 0.0
    units: bool = False
    fetched: bool = False
    updated: float = 0.0


NO_STAGING = Staging()


@dataclass(frozen=True)
class Offload(AbstractStrategy):
    """A GPU holds nothing of the roles that have moved, but what is on its way.

    Ren et al. 2021, arXiv:2101.06840, section 4 (optimizer states and gradients to the host, half-precision
    parameters stay); Rajbhandari et al. 2021, arXiv:2104.07857, section 5 (parameters too, and NVMe).
    Activations come back one layer at a time (planner/stages.py). It sends nothing to other GPUs.
    """

    axis: ClassVar[str] = "offload"
    label: ClassVar[str] = "offload"
    roles: frozenset[Role] = frozenset()
    staging: Staging = NO_STAGING

    def share(self, term: Term) -> Quantity:
        return 0 if term.role in self.roles else 1

    def workspace(self, layers: Sequence[Layer], size: Size) -> Iterable[Buffer]:
        def elements(role: Role, weights: bool) -> Quantity:
            """Of the largest weight, or of the largest unit."""
            if weights:
                return reduce(larger, (size(t) / t.unit for one in layers for t in one.by_role[role]), 0.0)
            units = [one.by_role[role] for one in layers if one.is_block]
            units.append(tuple(t for one in layers if not one.is_block for t in one.by_role[role]))
            return reduce(larger, (sum(size(t) / t.unit for t in unit) for unit in units), 0.0)

        staging = self.staging
        if Role.OPTIMIZER not in self.roles:
            return
        if staging.kept:
            largest = elements(Role.PARAMETER, weights=True) * staging.kept
            for span in ("passes", "reduction", "optimizer step"):
                yield Buffer("staging buffer of the offload", largest, span)
        if staging.moving:
            leaving = elements(Role.GRADIENT, weights=not staging.units) * (1 + staging.units)
            for span in ("block", "end", "reduction"):
                yield Buffer("gradients on their way to the host", leaving * staging.moving, span)
        if staging.fetched and Role.PARAMETER in self.roles:
            units = [sum(size(t) for t in one.by_role[Role.PARAMETER]) for one in layers if one.is_block]
            units.append(
                sum(size(t) for one in layers if not one.is_block for t in one.by_role[Role.PARAMETER])
            )
            yield Buffer("parameters on their way from the host", reduce(larger, units, 0.0))
        if staging.updated:
            own = sum(one.count * size(t) / t.unit for one in layers for t in one.by_role[Role.OPTIMIZER])
            yield Buffer("updated weights from the host", own * staging.updated, "optimizer step")
