"""Activation recomputation: what is freed after the forward is computed again in the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.base import AbstractStrategy, Quantity, Role, Term


@dataclass(frozen=True)
class Recompute(AbstractStrategy):
    """0 of freed activations; work and messages of the forward once more.

    Chen et al. 2016, arXiv:1604.06174 (full: only the block's input is kept); Korthikanti et al.
    2022, arXiv:2205.05198, section 5 (selective: the attention core). A term of FLOPs or memory
    traffic counts forward and backward as 1 + 2, so a freed one counts 4/3; a message crosses
    once forward and once backward, so a freed one counts 3/2.
    """

    axis: ClassVar[str] = "recompute"
    label: ClassVar[str] = "recompute"
    policy: str = "none"

    def share(self, term: Term) -> Quantity:
        if self.policy in term.kept_by:
            return 1
        return {Role.ACTIVATION: 0, Role.FLOPS: 4 / 3, Role.TRAFFIC: 4 / 3, Role.MESSAGE: 3 / 2}.get(
            term.role, 1
        )
