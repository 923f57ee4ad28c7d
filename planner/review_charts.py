"""Charts of a review as Apache ECharts' options: data only, drawn by the page (planner/page/review.js).

Sizes are in GiB and times in seconds, rounded to what a chart can show; the tables beside have all digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.units import GIB

Option = dict[str, Any]
Rows = Sequence[tuple[Any, ...]]
COLOURS = ("#3b6fb6", "#6aaed6", "#8f6bb3", "#4f9d69", "#d9a441", "#c8743c", "#c2504f", "#8a8f98")
"""Of the components, in their order; told apart in grey too, and patterned besides."""
BUDGET = "#c0392b"
PLATE = {"backgroundColor": "rgba(255,255,255,0.85)", "padding": [1, 4], "borderRadius": 2}
"""Behind text that lies on bars."""
PASSES = {
    "forward": "#3b6fb6",
    "backward": "#4f9d69",
    "input gradient": "#d9a441",
    "weight gradient": "#8f6bb3",
}


@dataclass(frozen=True)
class Chart:
    """An option; ``height`` in pixels."""

    option: Option
    height: int = 320


def _g(size: float) -> float:
    return round(size / GIB, 3)


def _ceiling(*sizes: float) -> int:
    """A round number of GiB above all sizes."""
    most = max(sizes) / GIB
    step = int(10 ** max(0, len(str(int(most))) - 2))
    return step * int(most // step + 1)


def _axis(name: str, **more: Any) -> Option:
    return {"name": name, "nameLocation": "middle", "nameGap": 30, **more}


def _base(**more: Any) -> Option:
    """What all charts share: a legend that scrolls, room for labels, figures on pointing."""
    return {
        "animation": False,
        "legend": {"type": "scroll", "top": 0, "left": 48},
        "grid": {"left": 8, "right": 16, "top": 40, "bottom": 36, "containLabel": True},
        "tooltip": {"trigger": "axis", "renderMode": "richText", "confine": True},
        **more,
    }


def _budget(capacity: float) -> Option:
    """A line at the budget."""
    return {
        "silent": True,
        "symbol": "none",
        "lineStyle": {"color": BUDGET, "width": 2, "type": "dashed"},
        "label": {
            "formatter": f"budget {_g(capacity):.1f} GiB",
            "position": "insideEndTop",
            "color": BUDGET,
            **PLATE,
        },
        "data": [{"yAxis": _g(capacity)}],
    }


def stacked(stages: Sequence[str], names: Sequence[str], rows: Rows, start: int, capacity: float) -> Chart:
    """Stacked components of every stage, the most that each may come to, and the budget."""
    series: list[Option] = [
        {
            "name": name,
            "type": "bar",
            "stack": "memory",
            "barMaxWidth": 72,
            "color": COLOURS[i],
            "data": [_g(row[start + i]) for row in rows],
        }
        for i, name in enumerate(names)
    ]
    most = [_g(row[start + len(names) + 1]) for row in rows]
    series.append(
        {
            "name": "at most",
            "type": "scatter",
            "symbol": "rect",
            "symbolSize": [18, 3],
            "color": BUDGET,
            "data": most,
        }
    )
    series[0]["markLine"] = _budget(capacity)
    option = _base(
        xAxis=_axis("stage", type="category", data=list(stages)),
        yAxis={
            "type": "value",
            "name": "GiB",
            "max": _ceiling(capacity, *(row[start + len(names) + 1] for row in rows)),
        },
        series=series,
    )
    return Chart(option, 360)


def over_step(names: Sequence[str], rows: Rows, capacity: float) -> Chart:
    """Components as areas over the places of a step, with the highest one marked."""
    peak = max(range(len(rows)), key=lambda i: rows[i][-1])
    series: list[Option] = [
        {
            "name": name,
            "type": "line",
            "step": "middle",
            "stack": "memory",
            "symbol": "none",
            "lineStyle": {"width": 0},
            "areaStyle": {"opacity": 0.85},
            "color": COLOURS[i],
            "data": [_g(row[2 + i]) for row in rows],
        }
        for i, name in enumerate(names)
        if any(row[2 + i] for row in rows)
    ]
    series[0]["markLine"] = _budget(capacity)
    series.append(
        {
            "name": "peak",
            "type": "scatter",
            "symbol": "diamond",
            "symbolSize": 12,
            "color": BUDGET,
            "data": [[peak, _g(rows[peak][-1])]],
        }
    )
    option = _base(
        xAxis=_axis(
            "place in the step",
            type="category",
            data=[f"{row[0]} {row[1]}" for row in rows],
            axisLabel={"hideOverlap": True, "width": 90, "overflow": "truncate", "alignMinLabel": "left"},
        ),
        yAxis={"type": "value", "name": "GiB", "max": _ceiling(capacity, rows[peak][-1])},
        series=series,
    )
    return Chart(option, 360)


def gantt(works: Rows, depth: int) -> Chart:
    """Passes as bars on a line for every stage; drawn by the page's ``gantt``."""
    found: dict[str, list[list[float]]] = {}
    for stage, start, took, kind, number in works:
        found.setdefault(kind, []).append([round(start, 4), int(stage), round(took, 4), number])
    end = max(start + took for _, start, took, _, _ in works)
    option = _base(
        tooltip={"trigger": "item", "renderMode": "richText", "confine": True},
        xAxis=_axis(
            "seconds", type="value", max=round(end, 4), axisLabel={"hideOverlap": True, "showMaxLabel": False}
        ),
        yAxis={
            "type": "category",
            "name": "stage",
            "nameLocation": "start",
            "inverse": True,
            "data": [str(j) for j in range(depth)],
        },
        series=[
            {"name": kind, "type": "gantt", "color": PASSES[kind], "data": data}
            for kind, data in found.items()
        ],
    )
    return Chart(option, 90 + max(12, 26 - depth // 4) * depth)


def communication(rows: Rows) -> Chart:
    """Seconds of messages, exposed and behind compute, by group and link."""
    labels = list(dict.fromkeys(f"{row[0]}, {row[3]}" if row[3] else row[0] for row in rows))
    series = []
    for name, colour in (("exposed", BUDGET), ("behind compute", COLOURS[0])):
        totals = dict.fromkeys(labels, 0.0)
        for row in rows:
            label = f"{row[0]}, {row[3]}" if row[3] else row[0]
            totals[label] += row[6] if row[4] == name else 0.0
        if any(totals.values()):
            data = [float(f"{value:.4g}") for value in totals.values()]
            series.append({"name": name, "type": "bar", "stack": "time", "color": colour, "data": data})
    option = _base(
        xAxis=_axis("seconds a step", type="value"),
        yAxis={
            "type": "category",
            "inverse": True,
            "data": labels,
            "axisLabel": {"width": 150, "overflow": "break"},
        },
        series=series,
    )
    return Chart(option, 110 + 40 * len(labels))


def alternatives(rows: Rows) -> Chart:
    """Step time against what is free at least, a point a layout."""
    data = [
        {"name": row[1], "value": [float(f"{row[4]:.5g}"), _g(row[3])], "label": {"formatter": row[0]}}
        for row in rows
    ]
    option = _base(
        legend={"show": False},
        units=["s a step", "GiB free at least"],
        tooltip={"trigger": "item", "renderMode": "richText", "confine": True},
        xAxis=_axis("seconds a step", type="value", scale=True),
        yAxis={"type": "value", "name": "GiB free at least", "nameTextStyle": {"align": "left"}},
        series=[
            {
                "name": "layouts",
                "type": "scatter",
                "symbolSize": 20,
                "color": COLOURS[0],
                "label": {"show": True, "color": "#ffffff"},
                "data": data,
            }
        ],
    )
    return Chart(option, 300)


def frontier(rows: Sequence[Any]) -> Chart:
    """Tokens a second of each GPU over the number of GPUs: a series for each length and kind of GPU."""
    found: dict[str, list[Option]] = {}
    for row in rows:
        name = f"{row.gpu}, sequences of {row.seq_length:,}"
        free = f"{row.layout}, {_g(row.free_bytes or 0):.1f} GiB free"
        each = float(f"{(row.tokens_per_s or 0) / row.num_gpus:.4g}")
        point = {"name": free, "value": [row.num_gpus, each]}
        found.setdefault(name, []).append(point)
    option = _base(
        tooltip={"trigger": "item", "renderMode": "richText", "confine": True},
        xAxis=_axis("GPUs", type="log", logBase=2),
        yAxis={
            "type": "value",
            "scale": True,
            "name": "tokens a second per GPU",
            "nameTextStyle": {"align": "left"},
        },
        series=[
            {
                "name": name,
                "type": "scatter",
                "symbolSize": 12,
                "color": COLOURS[i % len(COLOURS)],
                "data": data,
            }
            for i, (name, data) in enumerate(found.items())
        ],
        units=["GPUs", "tokens a second per GPU"],
    )
    return Chart(option, 340)


def sensitivity(rows: Rows, capacity: float) -> Chart:
    """Peak memory and step time of each change, as bars."""
    labels = [row[0] for row in rows]
    line = _budget(capacity)
    line["data"] = [{"xAxis": _g(capacity)}]
    line["label"] = {"show": False}
    option = _base(
        grid=[
            {"left": 8, "right": "54%", "top": 40, "bottom": 36, "containLabel": True},
            {"left": "50%", "right": 16, "top": 40, "bottom": 36, "containLabel": True},
        ],
        xAxis=[
            _axis("peak, GiB", type="value", gridIndex=0, splitNumber=3),
            _axis("seconds a step", type="value", gridIndex=1, splitNumber=3),
        ],
        yAxis=[
            {"type": "category", "inverse": True, "data": labels, "gridIndex": 0},
            {
                "type": "category",
                "inverse": True,
                "data": labels,
                "gridIndex": 1,
                "axisLabel": {"show": False},
            },
        ],
        series=[
            {
                "name": "peak of the fullest GPU",
                "type": "bar",
                "color": COLOURS[0],
                "data": [_g(row[2]) for row in rows],
                "markLine": line,
            },
            {
                "name": "step time",
                "type": "bar",
                "color": COLOURS[3],
                "xAxisIndex": 1,
                "yAxisIndex": 1,
                "data": [float(f"{row[4]:.4g}") for row in rows],
            },
        ],
    )
    return Chart(option, 100 + 30 * len(labels))
