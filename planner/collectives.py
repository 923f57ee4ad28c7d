"""How long a collective takes: the quickest of the ways that NCCL has for it.

Every way is a latency and a bandwidth (alpha and beta), and NCCL's tuner takes the one whose
``latency + bytes / bandwidth`` is least for the message at hand: here too. A way is an algorithm under a
protocol. Of LL's bytes a half are flags, of LL128's 8 in 128, so that nobody waits for a fence: short
steps at a part of the bandwidth; Simple has all of it. Constants are those of NCCL's tuning model,
NVIDIA/nccl, src/graph/tuning.cc (June 2026). The ring is that of Patarasuk and Yuan 2009,
doi:10.1016/j.jpdc.2008.09.002, the pair of binary trees that of Sanders, Speck and Träff 2009, Two-tree
algorithms for full bandwidth broadcast, reduction and scan, Parallel Computing 35.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from planner.network import Level, Network, Place, group
from planner.specs import ClusterSpec
from strategies.base import Collective, Quantity
from strategies.layout import Layout

Way = tuple[Any, Any]
"""Seconds before the first byte, and seconds per byte of the buffer."""

PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
"""How often a ring passes the buffer around."""
PROTOCOLS = ("LL", "LL128", "Simple")
BASE_S = {"ring": (6.6e-6, 14e-6, 8.4e-6), "tree": (6.8e-6, 14e-6, 8.4e-6)}
"""Seconds before the first step, by protocol (``baseLatencies``)."""
STEP_S = {
    ("ring", "NVLink"): (0.6e-6, 1.9e-6, 3.4e-6),
    ("tree", "NVLink"): (0.6e-6, 1.25e-6, 4.0e-6),
    ("ring", "PCI"): (1.0e-6, 2.5e-6, 5.7e-6),
    ("tree", "PCI"): (1.0e-6, 1.9e-6, 4.0e-6),
    ("ring", "network"): (2.7e-6, 4.0e-6, 14e-6),
    ("tree", "network"): (5.0e-6, 8.5e-6, 14e-6),
}
"""Seconds of one step over a link, by protocol (``hwLatencies``)."""
POST_S = (1e-6, 1e-6, 3e-6)
"""Seconds that every step of a ring across nodes costs at least, to post a request (Intel's hosts)."""
SHARE = {"ring": (1 / 2, 0.92, 1), "tree": (0.92 / 3.8, 0.92 * 120 / 128, 0.92)}
"""Part of the links' bandwidth that an algorithm gets under each protocol."""
TREE_IN_DOMAIN = (0.92 / 3.8, 0.92 * 7 / 9, 0.92)
"""The same of a tree within one NVLink domain."""
LL_BYTES_PER_S = {7: 39e9, 8: 87.7e9, 9: 141e9, 10: 282e9}
"""What LL gets at most within a domain, by compute capability (``llMaxBws``)."""
LL_ACROSS = (39e9, 20.4e9)
"""The same across two domains, and across more (Intel's hosts)."""
NVLS = {9: 0.85, 10: 0.74}
"""Part of a ring's bandwidth that reductions in the NVSwitch get, by compute capability
(``nvlsEfficiency``): from Hopper on."""
NVLS_S = 25e-6
NVLS_STEP_S = 20.9e-6
"""Seconds of a reduction in the switch, and of each level of the tree between domains."""


class Messages:
    """A layout's messages on a network. Numbers may be arrays over a family of layouts."""

    def __init__(self, network: Network, layout: Layout) -> None:
        self.network, self.layout = network, layout
        self._ways: dict[tuple[str, str], Way] = {}

    @staticmethod
    def of(cluster: ClusterSpec, layout: Layout) -> Messages:
        """A layout's messages on a cluster."""
        return Messages(Network.of(cluster), layout)

    def seconds(self, message: Collective) -> Any:
        """Seconds that a message takes, all its repetitions together."""
        key = message.kind, message.axis
        if key not in self._ways:
            self._ways[key] = self._stacked(*key)
        latency, per_byte = self._ways[key]
        return message.times * (latency + per_byte * message.size).min(axis=0)

    def send_seconds(self, size: Quantity) -> Any:
        """Seconds to hand ``size`` bytes to the next pipeline stage."""
        return self.seconds(Collective("send", "pipeline", size))

    def _stacked(self, kind: str, axis: str) -> Way:
        """All ways of a collective along the first dimension of two arrays; nothing in a group of one."""
        place = self.network.place(*group(axis, self.layout))
        if kind == "send":
            ways = [self._send(place, axis)]
        elif kind == "all_to_all":
            ways = [self._all_to_all(place)]
        else:
            ways = self._ring(place, kind)
            if kind == "all_reduce":
                ways += [*self._tree(place), *self._in_switch(place)]
        whole = np.shape(self.layout.world_size)
        latency, per_byte = (
            np.stack([np.broadcast_to(np.where(place.n > 1, one[i], 0.0), whole) for one in ways])
            for i in range(2)
        )
        return latency, per_byte

    def _protocols(self) -> tuple[int, ...]:
        """LL128 needs the order in which NVLink, from Volta on, delivers 128 bytes."""
        ordered = self.network.levels[0].link == "NVLink" and self.network.generation >= 7
        return (0, 1, 2) if ordered else (0, 2)

    def _ll_limit(self, place: Place) -> Any:
        """Bytes per second of LL at most."""
        inside = LL_BYTES_PER_S.get(self.network.generation, np.inf)
        two, more = LL_ACROSS
        return np.where(place.crossed[1], np.where(place.units[1] <= 2, two, more), inside)

    def _ring(self, place: Place, kind: str) -> list[Way]:
        """n - 1 steps a pass: those between the units of a level over its way out, the rest inside."""
        n, passes, links = place.n, PASSES[kind], self.network.bandwidth(place)
        volume = 1 if kind == "broadcast" else passes * (n - 1) / n  # of the buffer, over every link
        units = [*place.units, 1]
        ways = []
        for protocol in self._protocols():
            steps = []
            for index, level in enumerate(self.network.levels):
                each = step_s("ring", protocol, level)
                if index == 0:
                    each = np.where(place.crossed[1], np.maximum(each, POST_S[protocol]), each)
                else:  # with one member in a domain nothing else hides the network's latency
                    each = np.where(place.members[1] == 1, step_s("tree", protocol, level), each)
                steps.append((units[index] - units[index + 1]) * each)
            speed = links * SHARE["ring"][protocol]
            if protocol == 0:
                speed = np.minimum(speed, self._ll_limit(place))
            latency = BASE_S["ring"][protocol] + passes * sum(steps)
            ways.append((latency, volume / speed))
        return ways

    def _tree_links(self, place: Place) -> Any:
        """Bytes per second between domains, of twice the buffer, which a unit of a tree sends.

        In one tree it is inner, receives half the buffer from two children and sends it to its parent and
        back to them; in the other it is a leaf. Of two units each is the other's parent once: half of that.
        """
        between = [
            several * np.where(spread == 2, 2, 1)
            for several, spread in zip(place.members, place.units, strict=True)
        ]
        return self.network.slowest(place, (np.inf, *between[1:]))

    def _tree(self, place: Place) -> list[Way]:
        """Two binary trees of domains, each a chain of its members, up and down."""
        inside, between = self.network.levels[:2]
        links = np.minimum(inside.bytes_per_s, self._tree_links(place))
        ways = []
        for protocol in self._protocols():
            chain = (place.members[1] - 1) * step_s("tree", protocol, inside)
            up = chain + np.floor(np.log2(place.units[1])) * step_s("tree", protocol, between)
            share = np.where(place.crossed[1], SHARE["tree"][protocol], TREE_IN_DOMAIN[protocol])
            speed = links * share
            if protocol == 0:
                speed = np.minimum(speed, self._ll_limit(place))
            ways.append((BASE_S["tree"][protocol] + 2 * up, 2 / speed))
        return ways

    def _in_switch(self, place: Place) -> list[Way]:
        """NVLink SHARP: the switches add up and multicast; trees between them across domains.

        A GPU sends its whole buffer to be added up, and its own 1/m of the sum to be handed to all.
        """
        part, inside = NVLS.get(self.network.generation, 0.0), self.network.levels[0]
        if not part or inside.link != "NVLink":
            return []
        members = place.members[1]
        within = (1 + 1 / members) / (part * inside.bytes_per_s)
        latency = NVLS_S + 2 * np.floor(np.log2(place.units[1])) * NVLS_STEP_S
        per_byte = np.maximum(within, 2 / self._tree_links(place))
        alone = members == 1  # nothing to add up within a domain
        return [(np.where(alone, np.inf, latency), per_byte)]

    def _all_to_all(self, place: Place) -> Way:
        """Pairwise: 1/n of the buffer to every other rank, what leaves a unit over its way out.

        Every level's part is sent at once, so the slowest counts; messages to all peers are in flight
        together, so that only their shortest steps add up.
        """
        latency: Any = BASE_S["ring"][2]
        units_within = [1, *place.members[1:], place.n]
        per_byte: Any = 0.0
        for index, level in enumerate(self.network.levels):
            leaving = np.where(place.crossed[index], place.n - place.members[index], 0)
            per_byte = np.maximum(per_byte, leaving / place.n / level.bytes_per_s)
            latency = latency + (units_within[index + 1] - units_within[index]) * level.latency_s
        return latency, per_byte

    def _send(self, place: Place, axis: str) -> Way:
        """One step under Simple over the farthest link that is crossed on the way to the next rank."""
        farthest = [
            np.where(out, step_s("ring", 2, level), 0.0)
            for out, level in zip(place.crossed, self.network.levels, strict=True)
        ]
        per_byte = 1 / self.network.send_bandwidth(self.layout, axis)
        return BASE_S["ring"][2] + reduce(np.maximum, farthest), per_byte


def step_s(algorithm: str, protocol: int, level: Level) -> Any:
    """Seconds of a step over a level's way out: its own under LL, and what NCCL has for others beyond."""
    return level.latency_s + STEP_S[algorithm, level.link][protocol] - STEP_S["ring", level.link][0]
