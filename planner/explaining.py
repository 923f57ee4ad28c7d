"""A plan taken apart: every byte of one of its stages at one moment, and every message it sends."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, NamedTuple

from planner.defaults import Job
from planner.errors import InputError, nearest_names
from planner.ledger import Entry, Message, entries, entries_elsewhere, messages, view
from planner.plan import Plan, priced_again
from planner.replay import StageReplay
from planner.sources import source_of


class Explanation(NamedTuple):
    """A plan, one of its stages and moments, every byte held there and every message sent."""

    plan: Plan
    stage: int
    moment: str
    entries: list[Entry]
    messages: list[Message]

    def only(self, term: str) -> Explanation:
        """The entries whose name contains a text. Raises InputError if there is none, with the nearest."""
        found = [entry for entry in self.entries if term.lower() in entry.name.lower()]
        if not found or not term.strip():
            near = nearest_names(term, {entry.name for entry in self.entries})
            where = f"on stage {self.stage} at {self.moment}"
            raise InputError(f"--term {term[:60]!r} is in the name of nothing {where}: {near}")
        return self._replace(entries=found)


def explained(job: Job, plan: Plan, stage: int | None = None, moment: str | None = None) -> Explanation:
    """What one stage of a plan holds at one moment, and sends; the fullest stage at its peak by default.

    The plan's own rows of layers are gone through, with the job that it was made for. Raises InputError for a
    stage or moment that it does not have.
    """
    index = plan.fullest if stage is None else stage
    if not 0 <= index < len(plan.stages):
        raise InputError(f"stage={stage}: the plan has stages 0 to {len(plan.stages) - 1}")
    own = plan.stages[index]
    when = moment or own.moment
    prices, rows = priced_again(job, plan)
    seen, layout = view(prices, rows, index), plan.layout.to_layout()
    held, sent = [], []
    if when in own.elsewhere:
        held = list(entries_elsewhere(prices, seen, when))
    else:
        timeline = StageReplay(prices, index, rows).run()
        peaks = timeline.peaks()
        if when not in peaks:
            raise InputError(f"moment={when!r}: stage {index} has {', '.join(peaks)}")
        held = list(entries(prices, seen, peaks[when][0], timeline.pools if when == own.moment else 0.0))
        sent = list(messages(prices, seen))
    held = [replace(entry, source=source_of(entry, job, layout)) for entry in held]
    return Explanation(plan, index, when, held, sent)


def explanation_of(found: Explanation) -> dict[str, Any]:
    """The JSON of ``explain``."""
    return {
        "schema": "planner.explain/1",
        "stage": found.stage,
        "moment": found.moment,
        "entries": [asdict(entry) for entry in found.entries],
        "messages": [asdict(message) for message in found.messages],
        "plan": found.plan.model_dump(mode="json"),
    }
