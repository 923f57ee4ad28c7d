"""The pipeline schedule of one plan as a graph: its exact critical path, and what is in flight.

Nodes are passes (stage, chunk, micro-batch; forward, backward, or a backward split in two); an edge
says that one pass waits for another: in the order in which its stage works, or for its input from a
neighbouring stage. The step takes as long as the longest path. The search ranks by a closed form that
equals this for equal stages. Where stages differ, or some of them recompute and others do not, it can
be a few percent off. Plans give both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from strategies.layout import Layout
from strategies.pipeline_parallel import FOLDED

if TYPE_CHECKING:
    import networkx as nx


class Kind(StrEnum):
    """What a pass computes, in the zero-bubble paper's letters."""

    FORWARD = "F"
    INPUT = "B"  # the gradients of the chunk's input
    WEIGHT = "W"  # the gradients of its weights
    BACKWARD = "BW"  # both, as one


F, B, W, BW = Kind


class Pass(NamedTuple):
    """One chunk's pass over one micro-batch.

    A ``paired`` forward runs side by side with the backward after it: what either of them makes goes
    on when both are done.
    """

    stage: int
    chunk: int
    microbatch: int
    kind: Kind
    paired: bool = False

    @property
    def forward(self) -> bool:
        """Is it a forward?"""
        return self.kind is F


class PassSeconds(NamedTuple):
    """Seconds of one micro-batch's passes through one chunk."""

    forward: float
    input: float
    weight: float

    def of(self, kind: Kind) -> float:
        """Seconds of a pass of that kind."""
        return {F: self.forward, B: self.input, W: self.weight, BW: self.input + self.weight}[kind]


Seconds = Sequence[Sequence[PassSeconds]]
"""Of every stage's chunks."""


class Timed(NamedTuple):
    """A pass and when it starts and ends, in seconds from the start of the step."""

    work: Pass
    start: float
    end: float


def _interleaved(stage: int, p: int, m: int, v: int) -> Iterator[Pass]:
    # Narayanan et al. 2021, arXiv:2104.04473, figure 4, as Megatron-LM orders it: groups of p
    # micro-batches go through chunk 0, then chunk 1, and so on; backward in the opposite order.
    def at(number: int, kind: Kind) -> Pass:
        group, within = divmod(number, p * v)
        chunk = within // p if kind is F else v - 1 - within // p
        return Pass(stage, chunk, group * p + within % p, kind)

    total = m * v
    warm_up = min(total, 2 * (p - stage - 1) + (v - 1) * p)
    for number in range(warm_up):
        yield at(number, F)
    for number in range(total - warm_up):
        yield at(warm_up + number, F)
        yield at(number, BW)
    for number in range(total - warm_up, total):
        yield at(number, BW)


def _gpipe(stage: int, p: int, m: int) -> Iterator[Pass]:
    for i in range(m):
        yield Pass(stage, 0, i, F)
    for i in reversed(range(m)):
        yield Pass(stage, 0, i, BW)


def _one_f_one_b(stage: int, p: int, m: int) -> Iterator[Pass]:
    warm_up = min(m, p - stage - 1)
    for i in range(warm_up):
        yield Pass(stage, 0, i, F)
    for i in range(m):
        if warm_up + i < m:
            yield Pass(stage, 0, warm_up + i, F)
        yield Pass(stage, 0, i, BW)


def _zero_bubble(stage: int, m: int, warm_up: int, lag: int) -> Iterator[Pass]:
    # Qi et al. 2024, arXiv:2401.10241, figure 3: 1F1B whose weight gradients come ``lag`` micro-batches
    # after the input gradients, so that warm-up and lag together are the same on every stage.
    for i in range(warm_up):
        yield Pass(stage, 0, i, F)
    for i in range(m + lag):
        if warm_up + i < m:
            yield Pass(stage, 0, warm_up + i, F)
        if i < m:
            yield Pass(stage, 0, i, B)
        if i >= lag:
            yield Pass(stage, 0, i - lag, W)


class _Writer:
    """Writes down a stage's passes, the next micro-batch of each chunk and kind at a time."""

    def __init__(self, stage: int, first: Sequence[int] = (0, 0)) -> None:
        self.stage, self.passes = stage, list[Pass]()
        self.next = {(chunk, kind): first[chunk] for chunk in (0, 1) for kind in (F, B)}
        self.pending: deque[Pass] = deque()  # whose weights' gradients are still to be made

    def add(self, kind: Kind, chunk: int, paired: bool = False) -> None:
        """A forward or a backward, split or not."""
        which = F if kind is F else B
        one = Pass(self.stage, chunk, self.next[chunk, which], kind, paired)
        self.next[chunk, which] += 1
        self.passes.append(one)
        if kind is B:
            self.pending.append(one)

    def weights(self, chunk: int | None = None) -> None:
        """The longest due gradients of weights, of one chunk or of any."""
        due = next(one for one in self.pending if chunk in (None, one.chunk))
        self.pending.remove(due)
        self.passes.append(due._replace(kind=W))


def _zb_v(stage: int, p: int, m: int) -> list[Pass]:
    # Qi et al. 2024, section 6, in the order of torch.distributed.pipelining's ScheduleZBVZeroBubble.
    write = _Writer(stage)
    for _ in range(2 * (p - stage) - 1):
        write.add(F, 0)
    for _ in range(stage):
        write.add(F, 1)
        write.add(F, 0)
    for _ in range(p - stage):
        write.add(F, 1)
        write.add(B, 1)
        write.weights()
    while write.next[1, F] < m:
        if write.next[0, F] < m:
            write.add(F, 0)
        write.add(B, 0)
        write.weights()
        write.add(F, 1)
        write.add(B, 1)
        write.weights()
    for _ in range(stage):
        write.add(B, 0)
        write.add(B, 1)
    for _ in range(p - stage):
        write.add(B, 0)
        write.weights(0)
    for chunk in (1, 0):
        while any(one.chunk == chunk for one in write.pending):
            write.weights(chunk)
    return write.passes


def _dualpipe(stage: int, p: int, m: int) -> list[Pass]:
    # DeepSeek-AI 2024, arXiv:2412.19437, figure 5, in the eight steps of deepseek-ai/DualPipe. Chunk 0
    # is the earlier part of the model; micro-batches of the first half enter at stage 0, the others at
    # stage p - 1. The middle stages do not join the first forward and backward of the main step.
    half, near = p // 2, min(stage, p - 1 - stage)
    write = _Writer(stage, (0, m // 2) if stage < half else (m // 2, 0))

    def pair(forward: int, backward: int, joined: bool = True) -> None:
        write.add(F, forward, joined)
        write.add(BW, backward, joined)

    for _ in range(2 * (half - near - 1)):
        write.add(F, 0)
    for _ in range(near + 1):
        write.add(F, 0)
        write.add(F, 1)
    for _ in range(half - near - 1):
        write.add(B, 1)
        write.weights()
        write.add(F, 1)
    for number in range(m // 2 - p + near + 1):
        pair(0, 1, joined=number > 0 or near < half - 1)
        pair(1, 0)
    for _ in range(half - near - 1):
        write.add(BW, 1)
        pair(1, 0)
    whole = near + 1  # backward passes of both chunks that are not split, of twice as many
    for number in range(2 * (near + 1)):
        write.add(BW if number < whole else B, 1 - number % 2)
    for _ in range(half - near - 1):
        write.weights()
        write.add(B, 0)
    while write.pending:
        write.weights()
    return write.passes


def order(schedule: str, stage: int, p: int, m: int, v: int = 1) -> list[Pass]:
    """The passes of one stage in the order in which it works through them."""
    if schedule == "interleaved":
        return list(_interleaved(stage, p, m, v))
    if schedule == "gpipe":
        return list(_gpipe(stage, p, m))
    if schedule == "zb-h1":
        return list(_zero_bubble(stage, m, p - stage - 1, stage))
    if schedule == "zb-h2":
        return list(_zero_bubble(stage, m, 2 * (p - stage - 1), 2 * stage))
    if schedule == "zb-v":
        return _zb_v(stage, p, m)
    if schedule == "dualpipe":
        return _dualpipe(stage, p, m)
    return list(_one_f_one_b(stage, p, m))


def alive(passes: Sequence[Pass]) -> Iterator[int]:
    """Passes through a chunk whose activations a stage holds after each pass of its order.

    A forward allocates. What frees is the pass that makes the weights' gradients: where these come
    later than the inputs', all activations are counted until then. Qi et al. 2024, section 2.3, count
    less in between, M_W of M_B; autograd keeps its whole graph.
    """
    now = 0
    for one in passes:
        now += {F: 1, B: 0}.get(one.kind, -1)
        yield now


def in_flight(schedule: str, stage: int, p: int, m: int, v: int = 1) -> int:
    """Most passes whose activations a stage holds at once, by walking its order."""
    return max(alive(order(schedule, stage, p, m, v)))


def route(schedule: str, p: int, m: int, v: int, microbatch: int) -> list[tuple[int, int]]:
    """The (stage, chunk) pairs that a micro-batch's forward goes through, first to last."""
    if schedule == "zb-v":
        return [(stage, 0) for stage in range(p)] + [(stage, 1) for stage in reversed(range(p))]
    if schedule == "dualpipe":
        down = [(stage, int(stage >= p // 2)) for stage in range(p)]
        return down if microbatch < m // 2 else [(p - 1 - stage, chunk) for stage, chunk in down]
    return [(stage, chunk) for chunk in range(v) for stage in range(p)]


def schedule_graph(schedule: str, seconds: Seconds, m: int) -> nx.DiGraph[Pass | str]:
    """Every pass of a step, with edges to those that wait for it, weighted by its own seconds."""
    import networkx as nx

    p, v = len(seconds), len(seconds[0])
    orders = [order(schedule, stage, p, m, v) for stage in range(p)]
    graph: nx.DiGraph[Pass | str] = nx.DiGraph()

    def wait(later: Pass | str, earlier: Pass) -> None:
        took = seconds[earlier.stage][earlier.chunk].of(earlier.kind)
        graph.add_edge(earlier, later, weight=took)

    found: dict[tuple[int, int, int, bool], tuple[Pass, Pass]] = {}  # what waits, what is waited for
    for passes in orders:
        following: list[Pass | str] = [*passes[1:], "end"]
        for one, later in zip(passes, following, strict=True):
            wait(later, one)
        for number, one in enumerate(passes):
            if one.kind is not W:
                begin = passes[number - 1] if one.paired and one.kind is BW else one
                done = passes[number + 1] if one.paired and one.kind is F else one
                found[one.stage, one.chunk, one.microbatch, one.forward] = begin, done
    for i in range(m):
        way = route(schedule, p, m, v, i)
        there = [(*where, i, True) for where in way]
        back = [(*where, i, False) for where in reversed(way)]
        for source, place in zip(there + back[:-1], there[1:] + back, strict=True):
            wait(found[place][0], found[source][1])
    return graph


def timeline(schedule: str, seconds: Seconds, m: int) -> list[Timed]:
    """When every pass of a step starts and ends, stage by stage; each as soon as it can."""
    import networkx as nx

    graph = schedule_graph(schedule, seconds, m)
    start: dict[Pass | str, float] = {}
    for one in nx.topological_sort(graph):
        before = graph.pred[one]
        start[one] = max((start[other] + edge["weight"] for other, edge in before.items()), default=0.0)
    works = sorted((one for one in start if isinstance(one, Pass)), key=lambda one: (one.stage, start[one]))
    return [Timed(one, start[one], start[one] + seconds[one.stage][one.chunk].of(one.kind)) for one in works]


def even_chunks(
    schedule: str,
    forward: Sequence[float],
    backward: Sequence[float],
    v: int = 1,
    weight: Sequence[float] | None = None,
) -> Seconds:
    """Seconds of one micro-batch on each stage as those of its chunks, all alike.

    ``weight`` is the part of the backward that makes the weights' gradients, half by default.
    """
    v = 2 if schedule in FOLDED else v
    visits = 1 if schedule == "dualpipe" else v
    weight = weight or [whole / 2 for whole in backward]
    return [
        [PassSeconds(f / visits, (b - w) / visits, w / visits)] * v
        for f, b, w in zip(forward, backward, weight, strict=True)
    ]


def path_seconds(schedule: str, seconds: Seconds, m: int) -> float:
    """Seconds from the first forward to the last backward of a step."""
    import networkx as nx

    return float(nx.dag_longest_path_length(schedule_graph(schedule, seconds, m), weight="weight"))


def critical_path(
    schedule: str,
    forward: Sequence[float],
    backward: Sequence[float],
    m: int,
    v: int = 1,
    weight: Sequence[float] | None = None,
) -> float:
    """Seconds from the first forward to the last backward; times are per stage, all chunks alike."""
    return path_seconds(schedule, even_chunks(schedule, forward, backward, v, weight), m)


MOST_PASSES = 1000
"""Passes in one graph; a longer step is told from its beginning."""


def shown_microbatches(schedule: str, p: int, m: int, v: int) -> int:
    """Micro-batches of a step that are looked at on the graph: all, or a beginning and an end of them."""
    return min(m, max(3, MOST_PASSES // (2 * p * p * v)) * p + m % p)


def step_seconds(layout: Layout, seconds: Seconds) -> float:
    """Seconds of the pipeline's work in a step, without what happens once per step.

    Of a long step the beginning is timed on the graph; each micro-batch more then takes what the
    slowest stage needs for it, which is the rate that every pipeline settles at.
    """
    p, m, v = len(seconds), int(layout.grad_accum), len(seconds[0])
    copies = 2 if layout.schedule == "dualpipe" else 1
    forward = [sum(chunk.forward for chunk in stage) / copies for stage in seconds]
    backward = [sum(chunk.of(BW) for chunk in stage) / copies for stage in seconds]
    slowest = max(f + b for f, b in zip(forward, backward, strict=True))
    if layout.schedule == "pipedream" or p == 1:  # no flush: the slowest stage never waits
        return m * slowest
    shown = shown_microbatches(layout.schedule, p, m, v)
    pace = max(forward) + max(backward) if layout.schedule == "gpipe" else slowest
    return path_seconds(layout.schedule, seconds, shown) + (m - shown) * pace
