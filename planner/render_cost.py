"""What a whole training takes, in a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from planner.cost_words import checkpoints, energy, in_range
from planner.plan import CostPlan
from planner.units import DAY, HOUR, about, human_count


def cost_lines(cost: CostPlan) -> Iterator[Text]:
    """Time, GPU-hours, energy and money, if the tokens are given; checkpoints and failures."""
    if cost.tokens and cost.wall_s and cost.gpu_hours and cost.energy_kwh and cost.compute_s:
        unit, name = (DAY, "days") if cost.wall_s.value >= 2 * DAY else (HOUR, "hours")
        time = in_range(cost.wall_s.times(1 / unit), name)
        text = f"{human_count(cost.tokens)} tokens, {cost.steps:,} steps: {time}"
        if cost.goodput:
            text += f", {about(cost.compute_s.value / unit)} of them at work"
        text += f"; {about(cost.gpu_hours.value)} GPU-hours"
        text += f", {energy(cost.energy_kwh.value)} with all boards at their {cost.power_w:g} W"
        if cost.money and cost.price:
            label = "" if cost.currency else "price "
            text += f"; {label}{in_range(cost.money, cost.currency)} at {cost.price:g} a GPU-hour"
        yield Text(text)
    yield Text(checkpoints(cost))
