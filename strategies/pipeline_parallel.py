"""Pipeline parallelism: stages of layers, micro-batches in flight, and the bubble."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import AbstractStrategy, Layer, Quantity, Role, Term, larger, smaller

SCHEDULES = ("1f1b", "interleaved", "gpipe", "pipedream", "zb-h1", "zb-h2", "zb-v", "dualpipe")
SPLIT = ("zb-h1", "zb-h2", "zb-v", "dualpipe")
"""Schedules with passes that make the gradients of the weights alone."""
FOLDED = ("zb-v", "dualpipe")
"""Schedules whose stages hold two model chunks: one as far from the model's start as the other from
its end."""


@dataclass(frozen=True)
class PipelineParallel(AbstractStrategy):
    """One of p stages, each of ``chunks`` model chunks, working through m micro-batches.

    A stage's micro-batch takes T = F + B + W seconds: the forward, the gradients of its inputs, and
    those of its weights. ``forward_share`` is F/T and ``weight_share`` W/T; where a schedule splits
    the backward, the closed forms take W <= F <= B, as in a transformer (attention has work in F and
    twice that in B, but no weights).

    In flight, at most, on stage i (0 first), in passes through a chunk:

    - ``gpipe``: m. Huang et al. 2019, arXiv:1811.06965, section 2.3.
    - ``1f1b`` (PipeDream-flush): min(m, p - i). Narayanan et al. 2021, arXiv:2104.04473, 2.2.1.
    - ``interleaved``: min(m v, 2 (p - i - 1) + (v - 1) p + 1) passes through one of v chunks.
      Narayanan et al. 2021, section 2.2.2; Megatron-LM's warm-up count plus the one in work.
      On stage 0 this is p (1 + (p - 1)/(p v)) of a stage: Korthikanti et al. 2022, section 4.2.3.
    - ``pipedream``: as 1f1b, and one stashed version of the weights for each micro-batch in
      flight; no flush, so no bubble. Narayanan et al. 2019, SOSP, doi:10.1145/3341301.3359646, 3.3.
    - ``zb-h1``: p, and ``zb-h2``: 2p - 1, on every stage, where a pass counts until its weights'
      gradients are made. Qi et al. 2024, arXiv:2401.10241, sections 2.1 to 2.3, table 2.
    - ``zb-v``: 2p passes through one of two chunks, on every stage. The same, section 6.
    - ``dualpipe``: p + 1 passes through one of two chunks. DeepSeek-AI 2024, arXiv:2412.19437,
      section 3.2.1, table 2.

    The bubble, as a fraction of the time that the work itself takes, is (p - 1) / (v m)
    (Narayanan et al. 2021, sections 2.2.1 and 2.2.2); a pipeline of one micro-batch is naive
    model parallelism. With a split backward, in seconds:

    - ``zb-h1``: (p - 1) (F + B - W), ``zb-h2``: (p - 1) (F + B - 2W). Qi et al. 2024, table 2.
    - ``zb-v``: (p - 1) (B - W), which is 0 for F = B = W as in section 6; derived from the graph.
    - ``dualpipe``: (p/2 - 1) (F&B + (B + W) - 3W), DeepSeek-AI 2024, table 2, where a forward and a
      backward side by side take F&B = T, as nothing is gained where no messages hide.

    The zero-bubble paper counts a stage's idle time between its first and its last pass. Here a step
    ends for all stages at once, as clipping by the norm of all gradients makes them wait (its authors'
    post-validation does without). So the bubble is no shorter than the last stage's wait, (p - 1) F,
    and in zb-v half of (p - 1) B, the way back of the last micro-batch. The step's time is

        fill * sum of the stages' micro-batch times + repeat * the slowest stage's + once a step

    which gives that bubble for equal stages.
    """

    axis: ClassVar[str] = "pipeline"
    label: ClassVar[str] = "in flight"
    stage: Quantity = 0
    microbatches: Quantity = 1
    chunks: Quantity = 1
    schedule: str = "1f1b"
    forward_share: Quantity = 1 / 3
    weight_share: Quantity = 1 / 3

    @property
    def copies(self) -> int:
        """How many stages hold each layer: DualPipe feeds micro-batches in from both ends."""
        return 2 if self.schedule == "dualpipe" else 1

    @property
    def passes(self) -> Quantity:
        """Chunks of a stage that one micro-batch goes through."""
        return self.chunks / self.copies

    @property
    def split(self) -> bool:
        """Are there passes that make the gradients of the weights alone?"""
        return self.schedule in SPLIT

    @property
    def ends(self) -> tuple[Quantity, Quantity]:
        """Does this stage hold the embedding, does it hold the head?"""
        first, last = self.stage == 0, self.stage == self.degree - 1
        if self.schedule == "zb-v":
            return first, first
        return (first | last, first | last) if self.copies == 2 else (first, last)

    @property
    def in_flight(self) -> Quantity:
        """Passes through one chunk whose activations this stage holds at once, at most."""
        p, m, v = self.degree, self.microbatches, self.chunks
        if self.schedule == "gpipe":
            return m + 0 * self.stage
        if self.schedule == "interleaved":
            return smaller(m * v, 2 * (p - self.stage - 1) + (v - 1) * p + 1)
        if self.split:
            waiting, pending = self.held[0]
            return waiting + pending
        return smaller(m, p - self.stage)

    @property
    def held(self) -> tuple[tuple[Quantity, Quantity], ...]:
        """Passes through a chunk that wait for their backward, and that wait for W after it, at once.

        One pair for each time of a step at which a stage may hold most.
        """
        p, i = self.degree, self.stage
        if self.schedule == "zb-h1":
            return ((p - 1 - i, i + 1),)
        if self.schedule == "zb-h2":
            return ((2 * (p - 1 - i), 2 * i + 1),)
        if self.schedule == "zb-v":
            return (2 * p - 1 + 0 * i, 1), (p - 1 - i, 2 * i + 1)
        if self.schedule == "dualpipe":
            near = smaller(i, p - 1 - i)  # the distance from the nearer end
            return (p + 1 + 0 * i, 0), (p - 1, 1), (p / 2 - 1 - near, near + 1)
        return ((self.in_flight, 0),)

    @property
    def first_chunk_in_flight(self) -> Quantity:
        """Micro-batches whose activations the chunk with the embedding holds at once, at most."""
        if self.schedule in ("interleaved", "zb-v"):
            return smaller(self.microbatches, 2 * (self.degree - self.stage))
        return self.in_flight - (self.copies - 1)

    @property
    def last_chunk_in_flight(self) -> Quantity:
        """Micro-batches whose activations the chunk with the head holds at once, at most."""
        if self.schedule == "gpipe":
            return self.microbatches
        return self.in_flight if self.schedule in ("zb-h1", "zb-h2") else 1

    @property
    def bubble(self) -> Quantity:
        """Idle time over working time, for equal stages: what a step takes above m T."""
        return self.fill * (self.degree - 1) / self.microbatches

    @property
    def fill(self) -> Quantity:
        """How often the sum of all stages' times enters the step."""
        p, forward, weight = self.degree, self.forward_share, self.weight_share
        if self.schedule == "pipedream":
            return 0.0 * p
        if self.schedule == "zb-h1":
            return larger(1 - 2 * weight, forward) + 0.0 * p
        if self.schedule == "zb-h2":
            return larger(1 - 3 * weight, forward) + 0.0 * p
        if self.schedule == "zb-v":
            back = 1 - forward - weight
            return larger(back - weight, larger(back, forward) / 2) + 0.0 * p
        if self.schedule == "dualpipe":
            # (p/2 - 1) of (p - 1); a single stage, which has no bubble, is refused.
            return (p - 2) / (p - 1 + (p == 1)) / 2 * (2 - forward - 3 * weight)
        return 1 / self.chunks

    @property
    def repeat(self) -> Quantity:
        """How often the slowest stage's time enters the step."""
        return self.microbatches - self.fill

    def share(self, term: Term) -> Quantity:
        """Micro-batches in flight, of activations: ``in_flight`` passes through a v-th each."""
        if term.role is Role.ACTIVATION:
            return self.in_flight / self.chunks
        if term.role is Role.PARAMETER and self.schedule == "pipedream":
            return self.in_flight
        return 1

    @property
    def least_microbatches(self) -> Quantity:
        """Micro-batches that a split schedule needs to be what its paper draws."""
        p = self.degree
        return {"zb-h1": p, "zb-h2": 2 * p - 1, "zb-v": 2 * p - 1, "dualpipe": 2 * p}.get(self.schedule, 1)

    def objections(self, layers: Sequence[Layer]) -> Iterable[str]:
        blocks = sum(layer.count for layer in layers if layer.is_block)
        yield from self._unfilled(blocks)
        if self.schedule != "1f1b" and self.degree == 1:
            yield f"{self.schedule} schedule without a pipeline: use pipeline_parallel 2 or more, or 1f1b"
        if self.schedule in FOLDED and self.chunks != 2:
            yield f"chunks={self.chunks}: the {self.schedule} schedule has two chunks on every stage: use 2"
        p, m, least = self.degree, self.microbatches, self.least_microbatches
        if m < least:
            yield (
                f"grad_accum={m} is less than the {least} micro-batches that the {self.schedule} schedule "
                f"needs to fill {p} stages: use {least} or more, or 1f1b"
            )
        if self.schedule == "interleaved":
            if self.chunks == 1:
                yield "interleaved schedule with chunks=1 interleaves nothing: use chunks 2 or more, or 1f1b"
            if m % p:
                yield (
                    f"grad_accum={m} is not a multiple of pipeline_parallel="
                    f"{p}, which the interleaved schedule needs: use "
                    f"{max(p, m // p * p)}, or 1f1b"
                )
        if self.schedule == "dualpipe":
            if p % 2:
                yield (
                    f"pipeline_parallel={p} is odd, and dualpipe pairs stages from both ends: use {p - 1} "
                    f"or {p + 1}, or zb-v"
                )
            if m % 2:
                yield f"grad_accum={m} is odd, and half of it enters at each end: use {m - 1} or {m + 1}"
            if blocks % 2:
                yield f"{blocks} layers cannot lie alike from both ends, as dualpipe needs: use zb-v"

    def _unfilled(self, blocks: int) -> Iterable[str]:
        """More stages or chunks than there are layers for."""
        if self.degree > blocks:
            yield f"pipeline_parallel={self.degree} is more than the {blocks} layers: use {blocks} or fewer"
        elif self.copies == 1 and self.degree * self.chunks > blocks + -blocks % self.chunks:
            yield (
                f"pipeline_parallel={self.degree} x chunks={self.chunks} is more than the "
                f"{blocks} layers: use chunks {max(1, blocks // self.degree)} or fewer"
            )
