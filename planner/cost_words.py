"""What a whole training takes, in words."""

from __future__ import annotations

from planner.plan import CostPlan, Span
from planner.units import DAY, HOUR, about, decimal_bytes


def checkpoints(cost: CostPlan) -> str:
    """Size, time and interval of checkpoints, and what part of the time is work."""
    text = f"checkpoint {decimal_bytes(cost.checkpoint_bytes)}"
    if cost.checkpoint_s:
        rate = cost.checkpoint_bytes / cost.checkpoint_s
        text += f", {human_time(cost.checkpoint_s)} at {decimal_bytes(rate)}/s"
    if cost.interval_s and cost.interval_steps and cost.goodput and cost.mtbf_s:
        steps = f"{cost.interval_steps:,} step{'s' if cost.interval_steps > 1 else ''}"
        text += f", every {steps} (Daly: {human_time(cost.interval_s)})"
        text += f"; a failure every {human_time(cost.mtbf_s)}: goodput {cost.goodput:.1%}"
    return text


def in_range(figure: Span, unit: str) -> str:
    """A figure with its range.

    >>> in_range(Span(value=24.82, least=20.6, most=31.27), "days")
    '24.8 days (20.6 to 31.3)'
    """
    return f"{about(figure.value)} {unit}".rstrip() + f" ({about(figure.least)} to {about(figure.most)})"


def energy(kwh: float) -> str:
    """Energy with the unit that suits it."""
    return f"{about(kwh / 1000)} MWh" if kwh >= 1000 else f"{about(kwh)} kWh"


def human_time(seconds: float) -> str:
    """A time to three digits, with the unit that suits it.

    >>> [human_time(seconds) for seconds in (18.28, 1781, 87890, 900000)]
    ['18.3 s', '29.7 min', '24.4 h', '10.4 days']
    """
    for name, unit, until in (("s", 1, 100), ("min", 60, 100), ("h", HOUR, 48)):
        if seconds < until * unit:
            return f"{about(seconds / unit)} {name}"
    return f"{about(seconds / DAY)} days"
