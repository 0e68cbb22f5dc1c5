"""Charts as Vega-Lite specifications: one shape for wide pages and paper, one for phones. Pure.

Nothing is told by colour alone: what was spent is hatched and what was reused is plain, rates differ in the shape of their marks,
and the squares of what changed grow with it.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
WIDE, NARROW = 940, 340

REUSED, SPENT = "var(--reused)", "url(#hatch)"
DEGREES = ("unchanged", "code only", "under 10%", "10 to 50%", "50 to 99%", "over 99%")
"""How much of a block changed, in bytes."""


def unit_of(most: float) -> tuple[str, float]:
    """The unit in which seconds up to ``most`` are drawn, and how many seconds it has."""
    return ("s", 1.0) if most < 120 else ("min", 60.0) if most < 7200 else ("h", 3600.0)


def history(buckets: Sequence[Mapping[str, Any]], days: int, narrow: bool = False) -> Spec:
    """Net savings added up over time, above what each span of ``days`` days spent and reused.

    Args:
        buckets: start, end (ISO dates), spent, reused, total (seconds; the last adds up) and told.
    """
    width = (NARROW if narrow else WIDE) - 70
    unit, size = unit_of(max(abs(bucket["total"]) for bucket in buckets))
    unit_each, size_each = unit_of(max(bucket["spent"] + bucket["reused"] for bucket in buckets))
    total = [{**_at(bucket), "seconds": bucket["total"] / size, "told": bucket["told"]} for bucket in buckets]
    start = {"at": buckets[0]["start"], "seconds": 0, "told": "before"}
    each = [
        {
            **{name: bucket[name] for name in ("start", "end", "told")},
            "line": line,
            "from": low / size_each,
            "seconds": high / size_each,
        }
        for bucket in buckets
        for line, low, high in (
            ("reused", 0, bucket["reused"]),
            ("spent", bucket["reused"], bucket["reused"] + bucket["spent"]),
        )
        if high > low
    ]
    time = {
        "type": "temporal",
        "scale": {"type": "utc", "domain": _domain(buckets, days)},
        "axis": {
            "title": None, "grid": False, "ticks": False, "values": _middles(buckets, days, 3 if narrow else 8),
            "format": "%-d %b" if len(buckets) * days < 300 else "%b %Y",
        },
    }  # fmt: skip
    told = {"field": "told"}
    points = {"mark": {"type": "point", "filled": True, "size": 28, "color": REUSED, "opacity": 1}} if len(total) <= 45 else {}
    sums: Spec = {
        "width": width,
        "height": 130 if narrow else 170,
        "title": f"Net saved, added up ({unit})",
        "encoding": {
            "x": {"field": "at", **time},
            "y": {"field": "seconds", "type": "quantitative", "axis": {"title": None, "tickCount": 4}},
        },
        "layer": [
            {"data": {"values": [start, *total]}, "mark": {"type": "area", "color": REUSED, "opacity": 0.14}},
            {"data": {"values": [start, *total]}, "mark": {"type": "line", "color": REUSED, "strokeWidth": 2}},
            *([{"data": {"values": total}, "encoding": {"description": told}, **points}] if points else []),
        ],
    }
    bars: Spec = {
        "width": width,
        "height": 130 if narrow else 170,
        "title": f"Reused and spent in each {_span_of(days)} ({unit_each})",
        "data": {"values": each},
        "mark": {"type": "rect", "xOffset": 0.75, "x2Offset": -0.75},
        "encoding": {
            "x": {"field": "start", **time},
            "x2": {"field": "end"},
            "y": {"field": "from", "type": "quantitative", "axis": {"title": None, "tickCount": 4}},
            "y2": {"field": "seconds"},
            "color": _lines(),
            "stroke": {"value": "var(--edge)"},
            "strokeWidth": {"value": 0.5},
            "description": told,
        },
    }
    return {"vconcat": [sums, bars], "spacing": 22, "resolve": {"legend": {"color": "independent"}}}


def hit_rates(rows: Sequence[Mapping[str, Any]], narrow: bool = False) -> Spec:
    """Of each task, the share of hits by request and by second.

    Args:
        rows: name, by_request, by_second (0 to 1, or None), told.
    """
    points = [
        {"name": row["name"], "measure": measure, "rate": row[field], "told": row["told"]}
        for row in rows
        for measure, field in (("by request", "by_request"), ("by second", "by_second"))
        if row[field] is not None
    ]
    both = [row for row in rows if row["by_request"] is not None and row["by_second"] is not None]
    measures = {"type": "ordinal", "domain": ["by second", "by request"]}
    legend = {"title": None}
    x = {
        "type": "quantitative",
        "scale": {"domain": [0, 1]},
        "axis": {"title": None, "format": ".0%", "values": [0, 0.25, 0.5, 0.75, 1]},
    }
    return {
        **_fitted(narrow),
        "height": {"step": 26},
        "encoding": {"y": _names(rows, narrow)},
        "layer": [
            {
                "data": {"values": both},
                "mark": {"type": "rule", "color": "var(--muted)", "strokeWidth": 1.5},
                "encoding": {"x": {"field": "by_request", **x}, "x2": {"field": "by_second"}},
            },
            {
                "data": {"values": points},
                "mark": {"type": "point", "opacity": 1, "strokeWidth": 1.5},
                "encoding": {
                    "x": {"field": "rate", **x},
                    # The circle is the larger one, so that equal rates show both.
                    **{
                        channel: {"field": "measure", "type": "nominal", "scale": {**measures, "range": kinds}, "legend": legend}
                        for channel, kinds in (
                            ("shape", ["diamond", "circle"]), ("size", [60, 170]), ("fill", [REUSED, "transparent"])
                        )
                    },
                    "stroke": {"value": REUSED},
                    "description": {"field": "told"},
                },
            },
        ],
    }  # fmt: skip


def spending(rows: Sequence[Mapping[str, Any]], unit: str, narrow: bool = False) -> Spec:
    """What was spent on each model, beside what was reused.

    Args:
        rows: name, spent, reused (in ``unit``), told.
    """
    values = [
        {"name": row["name"], "line": line, "amount": row[line], "told": row["told"]}
        for row in rows
        for line in ("reused", "spent")
    ]
    return {
        **_fitted(narrow),
        "height": {"step": 26},
        "data": {"values": values},
        "mark": {"type": "bar", "height": {"band": 0.62}},
        "encoding": {
            "y": _names(rows, narrow),
            "x": {
                "field": "amount", "type": "quantitative", "stack": "zero",
                "axis": {
                    "title": unit, "tickCount": 3 if narrow else 7, "titleAnchor": "end", "labelOverlap": True,
                    "labelSeparation": 8,
                },
            },
            "order": {"field": "line", "sort": "ascending"},
            "color": _lines(),
            "stroke": {"value": "var(--edge)"},
            "strokeWidth": {"value": 0.5},
            "description": {"field": "told"},
        },
    }  # fmt: skip


def shares(rows: Sequence[Mapping[str, Any]], narrow: bool = False) -> Spec:
    """Shares of a whole, with what is written at the end of each bar.

    Args:
        rows: name, share (0 to 1), label, short (for a phone), told.
    """
    x = {
        "field": "share", "type": "quantitative", "scale": {"domain": [0, 1.0 if narrow else 1.15]},
        "axis": {"title": None, "format": ".0%", "values": [0, 0.25, 0.5, 0.75, 1]},
    }  # fmt: skip
    # A bar that leaves no room beside it has its label inside of the plot's end, on a ground of the page's colour.
    label = {"type": "text", "align": "left", "dx": 6}
    near_end = 0.8
    text = {"field": "short" if narrow else "label"}
    return {
        **_fitted(narrow),
        "height": {"step": 30},
        "data": {"values": list(rows)},
        "encoding": {"y": _names(rows, narrow), "x": x},
        "layer": [
            {
                "mark": {"type": "bar", "height": {"band": 0.55}, "color": SPENT, "stroke": "var(--edge)", "strokeWidth": 0.5},
                "encoding": {"description": {"field": "told"}},
            },
            {
                "transform": [{"filter": f"datum.share <= {near_end}"}],
                "mark": label,
                "encoding": {"text": text},
            },
            {
                "transform": [{"filter": f"datum.share > {near_end}"}],
                "mark": {**label, "align": "right", "dx": -6, "stroke": "var(--paper)", "strokeWidth": 6, "strokeJoin": "round"},
                "encoding": {"text": text},
            },
            {
                "transform": [{"filter": f"datum.share > {near_end}"}],
                "mark": {**label, "align": "right", "dx": -6},
                "encoding": {"text": text},
            },
        ],
    }


def changes(cells: Sequence[Mapping[str, Any]], steps: Sequence[str], blocks: Sequence[str], narrow: bool = False) -> Spec:
    """Which blocks changed from each checkpoint to the next: a square that grows and darkens with the share of their bytes.

    Args:
        cells: step, number, block, degree (one of `DEGREES`), told. steps: their names in order. blocks: likewise.
    """
    if narrow:
        side = max(11, min(22, (NARROW - 150) // max(1, len(steps))))
        x = {"field": "number", "type": "ordinal", "axis": {"title": "checkpoint", "labelAngle": 0, "labelOverlap": True}}
        y = {
            "field": "block",
            "type": "nominal",
            "sort": list(blocks),
            "axis": {"title": None, "labelLimit": 130, "labelFontSize": 10},
        }
    else:
        side = max(9, min(32, (WIDE - 240) // max(1, len(blocks))))
        axis = {"title": None, "labelAngle": -60, "labelOverlap": side < 14, "labelLimit": 150}
        x = {"field": "block", "type": "nominal", "sort": list(blocks), "axis": axis}
        y = {"field": "step", "type": "nominal", "sort": list(steps), "axis": {"title": None, "labelLimit": 220}}
    grid = {"grid": True, "ticks": False, "bandPosition": 0.5}
    title = "changed, of the block's bytes" if narrow else "share of the block's bytes that changed"
    legend = {"columns": 2 if narrow else 6, "title": title, "titleLimit": 400}
    scale = {"type": "ordinal", "domain": list(DEGREES)}
    room = (min(side, 24) - 2.5) ** 2
    sizes = [max(2.5, room * share) for share in (0.012, 0.35, 0.2, 0.4, 0.65, 0.95)]
    heat = ["var(--muted)", "var(--paper)", *(f"var(--heat-{n})" for n in range(1, 5))]
    shapes = ["square", "diamond", *["square"] * 4]
    return {
        "width": {"step": side},
        "height": {"step": side if narrow else 24},
        "data": {"values": list(cells)},
        "mark": {"type": "point", "opacity": 1, "strokeWidth": 1},
        "encoding": {
            "x": {**x, "axis": {**x["axis"], **grid}},
            "y": {**y, "axis": {**y["axis"], **grid}},
            "shape": {"field": "degree", "type": "nominal", "scale": {**scale, "range": shapes}, "legend": legend},
            "size": {"field": "degree", "type": "nominal", "scale": {**scale, "range": sizes}, "legend": legend},
            "fill": {"field": "degree", "type": "nominal", "scale": {**scale, "range": heat}, "legend": legend},
            "stroke": {"value": "var(--heat-4)"},
            "description": {"field": "told"},
        },
    }  # fmt: skip


# --- parts ---------------------------------------------------------------------------------------------------------------


def _lines() -> Spec:
    return {
        "field": "line", "type": "nominal", "scale": {"domain": ["reused", "spent"], "range": [REUSED, SPENT]},
        "legend": {"title": None},
    }  # fmt: skip


def _names(rows: Sequence[Mapping[str, Any]], narrow: bool) -> Spec:
    axis = {"title": None, "labelLimit": 125 if narrow else 250, "ticks": False}
    return {"field": "name", "type": "nominal", "sort": [row["name"] for row in rows], "axis": axis}


def _fitted(narrow: bool) -> Spec:
    """The plot takes what the names beside it leave."""
    return {"width": NARROW if narrow else WIDE, "autosize": {"type": "fit-x", "contains": "padding"}}


def _at(bucket: Mapping[str, Any]) -> Spec:
    return {"at": bucket["end"]}


def _span_of(days: int) -> str:
    return {1: "day", 7: "week"}.get(days, f"{days} days")


def _middles(buckets: Sequence[Mapping[str, Any]], days: int, most: int) -> list[int]:
    """Where spans are named: the middle of each, or of every so many."""
    apart = -(-len(buckets) // most)
    begins = [datetime.datetime.fromisoformat(f"{bucket['start']}T00:00+00:00") for bucket in buckets[::apart]]
    return [int(begin.timestamp() * 1000) + days * 43_200_000 for begin in begins]


def _domain(buckets: Sequence[Mapping[str, Any]], days: int) -> list[str]:
    """A few days do not fill the width: it has room for at least three spans, and ends with the last."""
    end = datetime.date.fromisoformat(buckets[-1]["end"])
    begin = min(datetime.date.fromisoformat(buckets[0]["start"]), end - datetime.timedelta(days=3 * days))
    return [begin.isoformat(), end.isoformat()]
