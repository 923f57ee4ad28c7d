"""What is offloaded: where its bytes go, and what moving them takes.

The host's memory and NVMe are budgets of their own, of a node; each of its GPUs has an equal share. The
host holds what the GPUs do not (the same terms, with the same shares of all strategies but the offload's),
the gradients that its optimizer reads, and buffers. Bytes per parameter follow the libraries' code, which
:class:`planner.stacks.base.Offloading` names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from planner.catalog import host as figure
from planner.defaults import Job
from planner.layer_price import highest
from planner.specs import ClusterSpec
from planner.stacks.base import Offloading, Stack
from strategies.base import AbstractStrategy, Layer, Quantity, Role, Term, held
from strategies.layout import Layout, Wire
from strategies.offload import PLACES, Way, places_of

MOST_IN_HOST, PARAMETER_BUFFERS = 1e9, 5 * 1e8
"""Elements that DeepSpeed keeps of parameters on NVMe (``max_in_cpu``), and its buffers for the rest
(``buffer_count`` times ``buffer_size``): runtime/zero/offload_config.py."""
OPTIMIZER_BUFFERS = 4
"""Sub-groups of fp32 states that it has in buffers (``buffer_count`` of offload_optimizer)."""
NONE = Offloading()

MOMENTS_ON_HOST = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}
"""Moments of the optimizers that are planned on the host: DeepSpeed's CPU Adam, torch.optim's."""


@dataclass(frozen=True)
class HostShare:
    """What one GPU has of its node's host: bytes, and bytes per second of each kind of traffic."""

    capacity: dict[str, float]  # by place
    link: float  # between GPU and host, each way
    adam: float  # of what the CPU's optimizer reads and writes
    nvme: float

    @staticmethod
    def of(cluster: ClusterSpec) -> HostShare:
        """The share of a cluster's GPU: its node's, over the GPUs of a node."""
        gpus, own = cluster.gpus_per_node, cluster.gpu.host
        memory = cluster.host_memory_bytes or (own.memory_bytes if own else figure("memory_bytes").value)
        speed = cluster.host_bytes_per_s or (own.bytes_per_s if own else figure("memory_bytes_per_s").value)
        nvme = cluster.nvme_bytes_per_s or figure("nvme_bytes_per_s").value
        return HostShare(
            {"host": memory / gpus, "nvme": (cluster.nvme_bytes or 0) / gpus},
            min(cluster.gpu.pcie_bytes_per_s * figure("link").value, speed / gpus),
            speed * figure("adam").value / gpus,
            nvme / gpus,
        )


def surely(place: str) -> float:
    """How many times its bytes a place may need: pinned memory is rounded up."""
    return figure("pinned").value if place == "host" else 1.0


def rates_noted(cluster: ClusterSpec) -> list[str]:
    """What is assumed of the host, for a plan that offloads."""
    share, gpus = HostShare.of(cluster), cluster.gpus_per_node
    notes = [
        f"the host of a node has {share.capacity['host'] * gpus / 1e12:.3g} TB of memory, "
        f"{share.adam * gpus / figure('adam').value / 1e9:.4g} GB/s, of which each of its {gpus} GPUs has an "
        "equal share; all of it is there for what is offloaded"
    ]
    known = cluster.gpu.host is not None
    if not (cluster.host_memory_bytes or known):
        notes.append(f"its memory is {figure('memory_bytes').source}")
    if not (cluster.host_bytes_per_s or known):
        notes.append(f"its speed is {figure('memory_bytes_per_s').source}")
    if cluster.nvme_bytes and not cluster.nvme_bytes_per_s:
        notes.append(f"NVMe: {figure('nvme_bytes_per_s').source}")
    notes.append(f"pinned memory, up to {surely('host'):g} times what it holds: {figure('pinned').source}")
    notes.append(f"CPU optimizer at {figure('adam').value:g} of the host's speed: {figure('adam').source}")
    notes.append(f"copies at {figure('link').value:g} of the link's speed: {figure('link').source}")
    return notes


class Move(NamedTuple):
    """What has moved of every term of a role: where it lies, in which component, bytes per element."""

    component: str
    role: Role
    place: str
    unit: Quantity = None  # the term's own


def offloading_of(stack: Stack, layout: Layout) -> Offloading:
    """What a stack offloads under a layout's sharding."""
    return stack.offloading.get(layout.sharding, NONE)


def wire_of(job: Job, layout: Layout) -> Wire:
    """What the stack sends, and what its offload has on the GPU."""
    wire = job.stack.wire(job.recipe, job.training.options)
    if not layout.offload:
        return wire
    offloading = offloading_of(job.stack, layout)
    staging = offloading.staging
    if job.training.options.get("offload_copy") == "tiled":
        staging = replace(staging, updated=0.0)
    return replace(wire, takes_gradients=offloading.takes_gradients, staging=staging)


def moves(job: Job, layout: Layout, way: str = "none") -> list[Move]:
    """Everything that lies elsewhere of a layer that is run in some way."""
    places = places_of(layout.offload) | dict.fromkeys(Way.of(way).offload, "host")
    offloading = offloading_of(job.stack, layout)
    found = []
    if place := places.get("optimizer"):
        gradients = job.recipe.gradient if offloading.gradients is None else offloading.gradients
        halves = offloading.halves
        if offloading.accumulated:
            halves = halves * (layout.grad_accum > 1)
        found += [
            Move("optimizer_states", Role.OPTIMIZER, place),
            Move("gradients", Role.OPTIMIZER, place, gradients),
            Move("gradients", Role.OPTIMIZER, "host", halves),
        ]
    if place := places.get("parameters"):
        found.append(Move("parameters", Role.PARAMETER, place))
    if place := places.get("activations"):
        found.append(Move("activations", Role.ACTIVATION, place))
    return found


def moved_terms(
    layer: Layer, move: Move, strategies: Sequence[AbstractStrategy]
) -> Iterator[tuple[Term, Any]]:
    """The terms of a move, and bytes of each that this GPU has elsewhere."""
    others = [one for one in strategies if one.axis not in ("offload", "pipeline")]
    for term in layer.by_role[move.role]:
        one = term if move.unit is None else Term(term.name, term.role, term.dims, move.unit)
        yield one, held(one, others)


def elsewhere(
    layer: Layer, moved: Iterable[Move], strategies: Sequence[AbstractStrategy]
) -> dict[str, Quantity]:
    """Bytes of a layer that a GPU has in each place, pipeline aside."""
    found: dict[str, Quantity] = dict.fromkeys(PLACES, 0.0)
    for move in moved:
        sizes = (size for _, size in moved_terms(layer, move, strategies))
        found[move.place] = found[move.place] + sum(sizes)
    return found


def host_buffers(
    job: Job, layout: Layout, layers: Sequence[Layer], strategies: Sequence[AbstractStrategy]
) -> list[tuple[str, Quantity]]:
    """Buffers that an offload has on the host, in bytes, besides what lies there."""
    places = places_of(layout.offload)
    others = [one for one in strategies if one.axis not in ("offload", "pipeline")]

    def elements(role: Role) -> list[tuple[int, Quantity]]:
        return [
            (one.count, held(Term(t.name, role, t.dims, 1.0), others))
            for one in layers
            for t in one.by_role[role]
        ]

    found: list[tuple[str, Quantity]] = []
    kept = offloading_of(job.stack, layout).staging.kept
    if "optimizer" in places and kept:
        found.append(
            ("staging buffer of the offload", kept * highest(n for _, n in elements(Role.PARAMETER)))
        )
    own = sum(count * n for count, n in elements(Role.OPTIMIZER))
    if places.get("optimizer") == "nvme":
        group = np.minimum(own, job.stack.size("sub_group_size", job.training.options))
        found.append(("buffers of optimizer states on NVMe", OPTIMIZER_BUFFERS * 4 * group))
    if places.get("parameters") == "nvme":
        width = job.recipe.weight
        size = np.minimum(own, MOST_IN_HOST) * width + PARAMETER_BUFFERS * width
        found.append(("parameters and buffers in front of NVMe", size))
    return found


class Traffic(NamedTuple):
    """Seconds of a layer's traffic to and from the host: behind its passes, after its forward and before its
    backward in the open, and in the optimizer step."""

    forward: Quantity = 0.0
    backward: Quantity = 0.0
    opened: Quantity = 0.0
    update: Quantity = 0.0

    def in_the_open(self) -> Traffic:
        """The same where nothing overlaps with compute."""
        return Traffic(0.0, 0.0, self.opened + self.forward + self.backward, self.update)


def traffic(
    job: Job, layout: Layout, layer: Layer, way: str, strategies: Sequence[AbstractStrategy], share: HostShare
) -> Traffic:
    """What a micro-batch, and a step, move of a layer.

    Parameters come once for each pass, activations go and come once. Gradients go in every micro-batch, in
    half precision (and come, to be added to) where they are accumulated; as fp32 in the last, or the only.
    """
    places = places_of(layout.offload) | dict.fromkeys(Way.of(way).offload, "host")
    if not places:
        return Traffic()
    offloading = offloading_of(job.stack, layout)
    others = [one for one in strategies if one.axis not in ("offload", "pipeline")]

    def size(role: Role) -> Quantity:
        return sum(held(term, others) for term in layer.by_role[role])

    weights = Role.OPTIMIZER if "optimizer" in places else Role.PARAMETER
    own = sum(held(Term(t.name, t.role, t.dims, 1.0), others) for t in layer.by_role[weights])
    fetched = size(Role.PARAMETER) / share.link if "parameters" in places else 0.0
    if places.get("parameters") == "nvme":
        fetched = np.maximum(fetched, size(Role.PARAMETER) / share.nvme)
    left: Quantity = 0.0
    back: Quantity = 0.0
    if "optimizer" in places and offloading.takes_gradients:
        if offloading.gradients is None:  # added to those on the host
            left = own * job.recipe.gradient / share.link
        else:
            several, half = (layout.grad_accum > 1) * 1, job.recipe.compute
            left = own * (4 / np.maximum(layout.grad_accum, 1) + half * several) / share.link
            back = own * half * several / share.link
    copied = size(Role.ACTIVATION) / share.link if "activations" in places else 0.0
    hidden, opened = (0.0, 2 * copied) if offloading.checkpoints else (copied, 0.0)
    return Traffic(
        forward=np.maximum(fetched, hidden),
        backward=np.maximum(fetched + hidden + back, left),
        opened=opened,
        update=_update_seconds(job, offloading, places, own, share),
    )


def _update_seconds(
    job: Job, offloading: Offloading, places: dict[str, str], own: Quantity, share: HostShare
) -> Quantity:
    """The CPU reads and writes states, reads gradients: 28 bytes of fp32 Adam. Then weights go back."""
    if "optimizer" not in places:
        return 0.0
    recipe = job.recipe
    states = (recipe.master or recipe.weight) + recipe.moment * MOMENTS_ON_HOST[job.training.optimizer]
    read = 4 if offloading.gradients is not None else recipe.gradient
    seconds = own * (2 * states + read) / share.adam
    if places["optimizer"] == "nvme":
        seconds = np.maximum(seconds, own * (2 * states + read) / share.nvme)
    returned = offloading.returned * ("parameters" not in places)
    if job.training.options.get("offload_copy") == "tiled":
        returned = 0.0
    fetched = 0.0 if offloading.takes_gradients else read
    return seconds + own * (returned + fetched) / share.link
