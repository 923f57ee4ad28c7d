"""What one layer costs on one GPU, and the walk through its backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from strategies.base import AbstractStrategy, Layer, Quantity, Role, held


@dataclass(frozen=True)
class StepPrice:
    """One step of a layer's backward: bytes freed after it, gradients that arise, transients."""

    freed: Quantity
    whole: Quantity  # gradients kept whole to the end of the layer's backward
    final: Quantity  # gradients in the place and size in which they stay
    passing: Quantity  # transients, and gradients that are added to others at once


@dataclass(frozen=True)
class LayerPrice:
    """One layer on one GPU, pipeline aside: bytes by role, seconds of one micro-batch."""

    states: dict[Role, Quantity]
    gathered: Quantity  # parameters kept gathered from the forward to the backward
    update_bytes: Quantity  # moved by the optimizer step
    update_room: Quantity  # the optimizer step's temporaries
    saved: Quantity
    ahead: Quantity  # transients at the end of its forward
    recomputed: Quantity  # what its backward starts by making again, or keeps for its weights' gradients
    walk: tuple[StepPrice, ...]
    working: Quantity  # most bytes above ``saved`` while its own backward runs
    forward: Quantity  # seconds of one micro-batch, with the messages that are not hidden
    inputs: Quantity  # seconds of the gradient of its input, and of what is run again before it
    weights: Quantity  # seconds of the gradients of its weights
    exposed: Mapping[str, Quantity]  # of these the seconds of messages between kernels, by the pass
    per_step: Mapping[str, Quantity]  # seconds of once-a-step messages, by what hides them
    elsewhere: Mapping[str, Quantity] = field(default_factory=dict)  # bytes outside the GPU, by place
    update_seconds: Quantity = 0.0  # of the optimizer step on the host, with what it sends

    @property
    def seconds(self) -> Quantity:
        """Seconds of one micro-batch, forward and backward."""
        return self.forward + self.inputs + self.weights


SUMS = ("gathered", "update_bytes", "update_room", "saved", "ahead", "recomputed", "update_seconds")
SECONDS = ("forward", "inputs", "weights")


def average(prices: Sequence[LayerPrice], counts: Sequence[Quantity] = ()) -> LayerPrice:
    """The average of layers, of which there are ``counts`` (else one of each), in all that adds up.

    Of what does not it has the most: the working set, with the walk of the layer that comes first.
    See :func:`heaviest` for activations in flight.
    """
    if len(prices) == 1:
        return prices[0]
    counts = counts or [1] * len(prices)
    total = sum(counts)

    def mean(values: Iterable[Quantity]) -> Quantity:
        return sum(n * value for n, value in zip(counts, values, strict=True)) / total

    def means(name: str, keys: Iterable[Any]) -> dict[Any, Quantity]:
        return {key: mean(getattr(price, name).get(key, 0.0) for price in prices) for key in keys}

    behind = dict.fromkeys(key for price in prices for key in price.per_step)
    return replace(
        prices[0],
        states=means("states", prices[0].states),
        exposed=means("exposed", prices[0].exposed),
        per_step=means("per_step", behind),
        elsewhere=means("elsewhere", prices[0].elsewhere),
        working=highest(price.working for price in prices),
        **{name: mean(getattr(price, name) for price in prices) for name in (*SUMS, *SECONDS)},
    )


def heaviest(prices: Sequence[LayerPrice]) -> LayerPrice:
    """The average of a row's layers, with the activations of the one that keeps most.

    Chunks have unlike numbers of micro-batches in flight: no more is kept than if all went through that one.
    """
    if len(prices) == 1:
        return prices[0]
    most = {name: highest(getattr(price, name) for price in prices) for name in ("saved", "recomputed")}
    return replace(average(prices), **most)


def working_set(recomputed: Quantity, walk: Iterable[StepPrice]) -> Quantity:
    """The most that a backward needs above what was there before it."""
    now, most = recomputed, recomputed
    for step in walk:
        now = now + step.whole + step.final
        most = np.maximum(most, now + step.passing)
        now = now - step.freed
    return most


def highest(values: Iterable[Quantity]) -> Quantity:
    """The highest of numbers and arrays, place by place."""
    return reduce(np.maximum, values, 0.0)


def role_sum(layer: Layer, role: Role, strategies: Iterable[AbstractStrategy]) -> Quantity:
    """What one GPU holds of all of a layer's terms of a role."""
    return sum(held(term, strategies) for term in layer.by_role[role])
