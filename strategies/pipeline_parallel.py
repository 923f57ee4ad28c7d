"""Pipeline parallelism: stages of layers, micro-batches in flight, and the bubble."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import AbstractStrategy, Layer, Quantity, Role, Term, smaller

SCHEDULES = ("1f1b", "interleaved", "gpipe", "pipedream")


@dataclass(frozen=True)
class PipelineParallel(AbstractStrategy):
    """One of p stages, each of ``chunks`` model chunks, working through m micro-batches.

    In flight, at most, on stage i, in passes through a chunk:

    - ``gpipe``: m. Huang et al. 2019, arXiv:1811.06965, section 2.3.
    - ``1f1b`` (PipeDream-flush): min(m, p - i). Narayanan et al. 2021, arXiv:2104.04473, 2.2.1.
    - ``interleaved``: min(m v, 2 (p - i - 1) + (v - 1) p + 1) passes through one of v chunks.
      Narayanan et al. 2021, section 2.2.2; Megatron-LM's warm-up count plus the one in work.
      On stage 0 this is p (1 + (p - 1)/(p v)) of a stage: Korthikanti et al. 2022, section 4.2.3.
    - ``pipedream``: as 1f1b, and one stashed version of the weights for each micro-batch in
      flight; no flush, so no bubble. Narayanan et al. 2019, SOSP, doi:10.1145/3341301.3359646, 3.3.

    The bubble, as a fraction of the time that the work itself takes, is (p - 1) / (v m)
    (Narayanan et al. 2021, sections 2.2.1 and 2.2.2); a pipeline of one micro-batch is naive
    model parallelism. The step's time is

        fill * sum of the stages' micro-batch times + repeat * the slowest stage's + once a step

    which gives that bubble for equal stages.
    """

    axis: ClassVar[str] = "pipeline"
    label: ClassVar[str] = "in flight"
    stage: Quantity = 0
    microbatches: Quantity = 1
    chunks: Quantity = 1
    schedule: str = "1f1b"

    @property
    def in_flight(self) -> Quantity:
        """Passes through one chunk whose activations this stage holds at once, at most."""
        p, m, v = self.degree, self.microbatches, self.chunks
        if self.schedule == "gpipe":
            return m + 0 * self.stage
        if self.schedule == "interleaved":
            return smaller(m * v, 2 * (p - self.stage - 1) + (v - 1) * p + 1)
        return smaller(m, p - self.stage)

    @property
    def first_chunk_in_flight(self) -> Quantity:
        """Micro-batches whose activations the stage's first chunk holds at once, at most."""
        if self.schedule == "interleaved":
            return smaller(self.microbatches, 2 * (self.degree - self.stage))
        return self.in_flight

    @property
    def bubble(self) -> Quantity:
        """Idle time over working time, for equal stages."""
        if self.schedule == "pipedream":
            return 0.0 * self.degree
        return (self.degree - 1) / (self.chunks * self.microbatches)

    @property
    def fill(self) -> Quantity:
        """How often the sum of all stages' times enters the step."""
        return 0.0 * self.degree if self.schedule == "pipedream" else 1 / self.chunks

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

    def objections(self, layers: Sequence[Layer]) -> Iterable[str]:
        blocks = sum(layer.count for layer in layers if layer.kind == "block")
        if self.degree > blocks:
            yield f"pipeline_parallel={self.degree} is more than the {blocks} layers: use {blocks} or fewer"
        elif self.degree * self.chunks > blocks + 2:
            yield (
                f"pipeline_parallel={self.degree} x chunks={self.chunks} is more than the "
                f"{blocks} layers: use chunks {max(1, blocks // self.degree)} or fewer"
            )
        if self.schedule != "1f1b" and self.degree == 1:
            yield f"{self.schedule} schedule without a pipeline: use pipeline_parallel 2 or more, or 1f1b"
        if self.schedule == "interleaved":
            if self.chunks == 1:
                yield "interleaved schedule with chunks=1 interleaves nothing: use chunks 2 or more, or 1f1b"
            if self.microbatches % self.degree:
                yield (
                    f"grad_accum={self.microbatches} is not a multiple of pipeline_parallel="
                    f"{self.degree}, which the interleaved schedule needs: use "
                    f"{max(self.degree, self.microbatches // self.degree * self.degree)}, or 1f1b"
                )
