"""Which spans of a step each of its places lies in."""

from __future__ import annotations

SPANS_OF = {
    "start": {"start"},
    "forward end": {"passes"},
    "logits": {"passes", "logits"},
    "loss": {"passes", "loss"},
    "first": {"passes", "block", "not last"},
    "inner": {"passes", "block", "not first", "not last"},
    "last": {"passes", "block", "not first"},
    "only": {"passes", "block"},
    "end": {"passes", "end"},
    "reduction": {"reduction"},
    "optimizer step": {"optimizer step"},
}
"""The buffers' spans that each place of a step lies in: the first, an inner, the last or the only layer
to run backward, and the end of the backward."""
