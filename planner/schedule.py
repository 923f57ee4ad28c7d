"""The pipeline schedule of one plan as a graph: its exact critical path, and what is in flight.

Nodes are passes (stage, chunk, micro-batch, forward or backward); an edge says that one pass waits
for another: in the order in which its stage works, or for its input from a neighbouring stage. The
step takes as long as the longest path. The search ranks by a closed form that equals this for
equal stages. Under 1F1B and GPipe it is never lower where backward takes the same multiple of forward
on every stage; where some stages recompute and others do not, or unlike stages are interleaved, it
can be a few percent low. Plans give both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from strategies.layout import Layout


class Pass(NamedTuple):
    """One chunk's pass over one micro-batch."""

    stage: int
    chunk: int
    microbatch: int
    forward: bool


def _interleaved(stage: int, p: int, m: int, v: int) -> Iterator[Pass]:
    # Narayanan et al. 2021, arXiv:2104.04473, figure 4, as Megatron-LM orders it: groups of p
    # micro-batches go through chunk 0, then chunk 1, and so on; backward in the opposite order.
    def at(number: int, forward: bool) -> Pass:
        group, within = divmod(number, p * v)
        chunk = within // p if forward else v - 1 - within // p
        return Pass(stage, chunk, group * p + within % p, forward)

    total = m * v
    warm_up = min(total, 2 * (p - stage - 1) + (v - 1) * p)
    for number in range(warm_up):
        yield at(number, True)
    for number in range(total - warm_up):
        yield at(warm_up + number, True)
        yield at(number, False)
    for number in range(total - warm_up, total):
        yield at(number, False)


def order(schedule: str, stage: int, p: int, m: int, v: int = 1) -> list[Pass]:
    """The passes of one stage in the order in which it works through them."""
    if schedule == "interleaved":
        return list(_interleaved(stage, p, m, v))
    if schedule == "gpipe":
        return [Pass(stage, 0, i, True) for i in range(m)] + [
            Pass(stage, 0, i, False) for i in reversed(range(m))
        ]
    return _one_f_one_b(stage, p, m)


def _one_f_one_b(stage: int, p: int, m: int) -> list[Pass]:
    warm_up = min(m, p - stage - 1)
    passes = [Pass(stage, 0, i, True) for i in range(warm_up)]
    for i in range(m - warm_up):
        passes += [Pass(stage, 0, warm_up + i, True), Pass(stage, 0, i, False)]
    return passes + [Pass(stage, 0, i, False) for i in range(m - warm_up, m)]


def in_flight(schedule: str, stage: int, p: int, m: int, v: int = 1) -> int:
    """Most passes whose activations a stage holds at once, by walking its order."""
    now = most = 0
    for one in order(schedule, stage, p, m, v):
        now += 1 if one.forward else -1
        most = max(most, now)
    return most


def _inputs(one: Pass, p: int, v: int) -> Pass | None:
    """The pass of a neighbouring stage whose result this pass needs."""
    stage, chunk, i, forward = one
    if forward:
        if stage:
            return Pass(stage - 1, chunk, i, True)
        return Pass(p - 1, chunk - 1, i, True) if chunk else None
    if stage < p - 1:
        return Pass(stage + 1, chunk, i, False)
    return Pass(0, chunk + 1, i, False) if chunk < v - 1 else Pass(stage, chunk, i, True)


def critical_path(schedule: str, forward: list[float], backward: list[float], m: int, v: int = 1) -> float:
    """Seconds from the first forward to the last backward; times are per stage, all chunks."""
    import networkx as nx

    p = len(forward)
    graph: nx.DiGraph[Pass | str] = nx.DiGraph()
    edges: list[tuple[Pass, Pass | str, float]] = []
    for stage in range(p):
        passes = order(schedule, stage, p, m, v)
        seconds = {True: forward[stage] / v, False: backward[stage] / v}
        following: list[Pass | str] = [*passes[1:], "end"]
        edges += [(a, b, seconds[a.forward]) for a, b in zip(passes, following, strict=True)]
        for one in passes:
            if source := _inputs(one, p, v):
                cost = forward[source.stage] if source.forward else backward[source.stage]
                edges.append((source, one, cost / v))
    # Parallel edges carry the same weight (the source pass's time), so none hides another.
    graph.add_weighted_edges_from(edges)
    return float(nx.dag_longest_path_length(graph, weight="weight"))


MOST_PASSES = 6000
"""Passes in one graph; a longer step is told from its beginning."""


def step_seconds(layout: Layout, forward: list[float], backward: list[float]) -> float:
    """Seconds of the pipeline's work in a step, without what happens once per step.

    Of a long step the beginning is timed on the graph; each micro-batch more then takes what the
    slowest stage needs for it, which is the rate that every pipeline settles at.
    """
    p, m, v = len(forward), int(layout.grad_accum), int(layout.chunks)
    slowest = max(f + b for f, b in zip(forward, backward, strict=True))
    if layout.schedule == "pipedream" or p == 1:  # no flush: the slowest stage never waits
        return m * slowest
    first = max(4, MOST_PASSES // (2 * p * p * v)) * p + m % p
    if m <= first:
        return critical_path(layout.schedule, forward, backward, m, v)
    pace = max(forward) + max(backward) if layout.schedule == "gpipe" else slowest
    return critical_path(layout.schedule, forward, backward, first, v) + (m - first) * pace
