"""The parts of the page: for each its sentence, its chart in two widths, its table, its view and a query that checks it. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from evalcache.audittext import unpriced
from evalcache.figures import Row
from evalcache.report import charts
from evalcache.report.gather import Family, Gathered
from evalcache.report.svg import draw
from evalcache.report.tables import (
    Cell,
    Column,
    Table,
    figures_table,
    more,
    one_line,
    said_figure,
    seconds_cell,
    values_table,
)
from evalcache.schema import quoted
from evalcache.structs import Frozen, field
from evalcache.summary import format_seconds

MOST_BARS = 15
MOST_ROWS = 100
_MOST_BUCKETS = 92
_MOST_NAMED = 12  # blocks that a row of the table names
_SUMMED = ("modules_changed", "weights_changed", "modules", "bytes_changed", "bytes")
_ADDED = ("requests", "hits", "misses", "uncacheable", "spent_seconds", "reused_seconds", "overhead_seconds", "net_seconds")


class Figure(Frozen):
    """A chart with its table.

    Args:
        name: of the drawing, for who cannot see it. wide, narrow: SVG; empty where there is nothing to draw.
        view: of the ledger; check: a query that gives the numbers. notes: what is left out, or has to be known.
    """

    name: str
    view: str
    check: str
    wide: str = ""
    narrow: str = ""
    tables: Sequence[Table] = ()
    notes: Sequence[str] = field(default_factory=list)


def over_time(gathered: Gathered) -> Figure:
    """What was saved, day by day, or in longer spans where there are many days."""
    check = (
        "SELECT strftime(asked_at, '%Y-%m-%d') AS day, sum(seconds) FILTER (line IN ('credited', 'imported')) AS reused_seconds, "
        "sum(seconds) FILTER (line = 'spent') AS spent_seconds, sum(overhead_seconds) AS overhead_seconds "
        f"FROM audit_requests{_since(gathered)} GROUP BY day ORDER BY day"
    )
    name = "Chart: net seconds saved, added up over time, above the seconds reused and spent in each span"
    rows = {row.group: row.figures for row in gathered.by_day.rows if row.group}
    if not rows:
        return Figure(name, "audit_requests", check)
    buckets, days = _buckets(rows)
    drawn = [charts.history(buckets, days, narrow) for narrow in (False, True)]
    columns = [
        Column("from"), Column("to"), *(Column(name.removesuffix("_seconds"), name, numeric=True) for name in _ADDED),
        Column("net added up", "net_seconds", numeric=True),
    ]  # fmt: skip
    cells = [
        [bucket["start"], _day_before(bucket["end"]), *(_added(bucket, name) for name in _ADDED), seconds_cell(bucket["total"])]
        for bucket in reversed(buckets)
    ]
    span = {1: "day", 7: "week"}.get(days, f"{days} days")
    table = values_table(f"By {span}, the latest first (UTC)", columns, cells)
    notes = [] if days == 1 else [f"{len(rows):,} days with runs are drawn in spans of {days} days."]
    return Figure(name, "audit_requests", check, *(draw(spec, name) for spec in drawn), tables=[table], notes=notes)


def by_task(gathered: Gathered) -> Figure:
    """Hit rates of the tasks that cost most."""
    check = (
        "SELECT concat_ws(':', nullif(client, ''), nullif(task, '')) AS task, sum(requests) AS requests, sum(hits) AS hits, "
        "sum(credited_seconds + imported_seconds) AS reused_seconds, sum(spent_seconds) AS spent_seconds, "
        "sum(credited_seconds + imported_seconds) / nullif(sum(credited_seconds + imported_seconds + spent_seconds), 0) "
        "AS hit_rate_by_seconds "
        f"FROM audit_by_task WHERE requests > 0{_since(gathered, ' AND')} GROUP BY 1 "
        "ORDER BY sum(credited_seconds + imported_seconds + spent_seconds) DESC"
    )
    name = "Chart: hit rate of each task, by request and by second"
    report = gathered.by_task
    names = [_named(row, "(no task)") for row in report.rows]
    rows = [
        {
            "name": name, "by_request": row.figures["hit_rate"], "by_second": row.figures["hit_rate_by_seconds"],
            "told": f"{name}: {said_figure('hit_rate_by_seconds', row.figures)} by second, "
            f"{said_figure('hit_rate', row.figures)} by request, of {row.figures['requests']:,} requests",
        }
        for name, row in zip(names, report.rows, strict=True)
        if row.figures["hit_rate"] is not None
    ]  # fmt: skip
    drawn = [draw(charts.hit_rates(rows[:MOST_BARS], narrow), name) if rows else "" for narrow in (False, True)]
    left_out = more(report.rows, MOST_ROWS, "evalcache audit --by task --json")
    shown = report.rows[:MOST_ROWS]
    table = figures_table("By task, the most expensive first", "task", names[:MOST_ROWS], shown, report.currency, left_out)
    return Figure(name, "audit_by_task", check, *drawn, tables=[table], notes=_drawn(rows, "tasks"))


def by_model(gathered: Gathered) -> Figure:
    """What each model cost: money where every price is known, else seconds."""
    check = (
        "SELECT model, sum(seconds) FILTER (line = 'spent') AS spent_seconds, "
        "sum(seconds) FILTER (line IN ('credited', 'imported')) AS reused_seconds "
        f"FROM audit_requests{_since(gathered)} GROUP BY model ORDER BY spent_seconds + reused_seconds DESC NULLS LAST"
    )
    report = gathered.by_model
    most = max((row.figures[f"{line}_seconds"] for row in report.rows for line in ("spent", "reused")), default=0.0)
    unit, size = charts.unit_of(most)
    fields, currency = ("spent_seconds", "reused_seconds"), report.currency
    if currency and all(row.figures[f"money_{line}"] is not None for row in report.rows for line in ("spent", "reused")):
        fields, unit, size = ("money_spent", "money_reused"), currency, 1.0
    name = f"Chart: what was spent and what was reused of each model, in {unit}"
    names = [_named(row, "(no model)") for row in report.rows]
    rows = [
        {
            "name": name, "spent": row.figures[fields[0]] / size, "reused": row.figures[fields[1]] / size,
            "told": f"{name}: {said_figure(fields[0], row.figures, currency)} spent, "
            f"{said_figure(fields[1], row.figures, currency)} reused",
        }
        for name, row in zip(_apart(names, report.rows), report.rows, strict=True)
    ]  # fmt: skip
    drawn = [draw(charts.spending(rows[:MOST_BARS], unit, narrow), name) if rows else "" for narrow in (False, True)]
    left_out = more(report.rows, MOST_ROWS, "evalcache audit --by model --json")
    shown = report.rows[:MOST_ROWS]
    names = _apart(names, report.rows)[:MOST_ROWS]
    table = figures_table("By model, the most expensive first", "model", names, shown, currency, left_out)
    return Figure(name, "audit_requests", check, *drawn, tables=[table], notes=_drawn(rows, "models") + unpriced(report))


def misses(gathered: Gathered) -> Figure:
    """Why requests missed, and why some could not be cached."""
    check = (
        "SELECT cause, sum(requests) AS requests, sum(seconds) AS seconds FROM miss_reasons"
        f"{_since(gathered)} GROUP BY cause ORDER BY requests DESC, cause"
    )
    name = "Chart: share of the misses by their cause"
    report = gathered.by_task
    rows = [
        {
            "name": one["cause"], "share": one["share"],
            "label": f"{one['share']:.1%}: {one['requests']:,} requests, {format_seconds(one['seconds'])}",
            "short": f"{one['share']:.1%}",
            "told": f"{one['share']:.1%} of the misses: {one['meaning']}",
        }
        for one in report.misses
    ]  # fmt: skip
    drawn = [draw(charts.shares(rows, narrow), name) if rows else "" for narrow in (False, True)]
    tables = []
    if report.misses:
        columns = [
            Column("cause"), Column("meaning", prose=True), Column("requests", "misses", numeric=True),
            Column("share of misses", numeric=True), Column("seconds", "spent_seconds", numeric=True),
            Column("what changed, where most missed", prose=True),
        ]  # fmt: skip
        cells = [
            [
                one["cause"], one["meaning"], one["requests"], f"{one['share']:.1%}", seconds_cell(one["seconds"]),
                one_line("; ".join(one["changed"]) or "–", 600),
            ]
            for one in report.misses
        ]  # fmt: skip
        tables.append(values_table("Misses by cause, the most frequent first", columns, cells))
    if report.uncacheable:
        columns = [
            Column("reason"), Column("requests", "uncacheable", numeric=True), Column("seconds", "spent_seconds", numeric=True),
            Column("example", prose=True),
        ]  # fmt: skip
        cells = [
            [one["reason"] or "–", one["requests"], seconds_cell(one["seconds"]), one_line(one["example"] or "–")]
            for one in report.uncacheable
        ]
        tables.append(values_table("Not cacheable, by reason (view uncacheable_by_reason)", columns, cells))
    return Figure(name, "miss_reasons", check, *drawn, tables=tables)


def expensive(gathered: Gathered) -> Figure:
    """The requests that took longest to compute."""
    check = (
        "SELECT seconds, outcome, reason, client, task, document, run, key FROM lookups_once WHERE seconds IS NOT NULL AND "
        f"outcome IN ('miss', 'uncacheable'){_since(gathered, ' AND')} ORDER BY seconds DESC, run, store, seq, n LIMIT 20"
    )
    columns = [
        Column("seconds", "spent_seconds", numeric=True), Column("task"), Column("document"), Column("outcome"), Column("reason"),
        Column("device"), Column("run"), Column("key"),
    ]  # fmt: skip
    rows = [
        [
            seconds_cell(one["seconds"]),
            one_line(":".join(filter(None, (one["client"], one["task"]))) or "–"),
            one_line(one["document"] or "–", 60),
            one["outcome"],
            one_line(": ".join(filter(None, (one["reason"], one["detail"]))) or "–", 120),
            one_line(one["device"] or "–"),
            Cell(one["run"][:8], code=True),
            Cell(one["key"][:12] if one["key"] else "–", code=bool(one["key"])),
        ]
        for one in gathered.by_task.expensive
    ]
    tables = [values_table("Computed requests that took longest", columns, rows)] if rows else []
    return Figure("", "lookups_once", check, tables=tables)


def changes(family: Family) -> Figure:
    """What changed between the checkpoints of a family."""
    check = (
        "SELECT names_a, names_b, block, modules_changed, modules, weights_changed, bytes_changed, bytes "
        f"FROM model_blocks_changed WHERE modules_changed > 0 AND class = {quoted(family.class_name)} ORDER BY place, block"
    )
    name = f"Chart: which blocks of {one_line(family.class_name, 60)} changed from each checkpoint to the next"
    short = _short(family.blocks)
    steps = [f"{number} {one_line(step[3], 60)}" for number, step in enumerate(family.steps, 1)]
    cells = []
    for place, step in enumerate(steps):
        for block in family.blocks:
            row = family.cells.get((place, block))
            if row is not None:
                told = f"{step}, {short[block]}: {row['modules_changed']} of {row['modules']} modules, " + _share(row)
                degree = _degree(row)
                cells.append({"step": step, "number": place + 1, "block": short[block], "degree": degree, "told": told})
    blocks = [short[block] for block in family.blocks]
    drawn = [draw(charts.changes(cells, steps, blocks, narrow), name) if cells else "" for narrow in (False, True)]
    columns = [
        Column("checkpoint"), Column("against"), Column("blocks changed", numeric=True), Column("modules changed", numeric=True),
        Column("of these in their weights", numeric=True), Column("bytes changed", numeric=True), Column("which", prose=True),
    ]  # fmt: skip
    rows = []
    for place, step in enumerate(steps):
        here = [row for (at, _), row in family.cells.items() if at == place]
        changed = [family.cells[(place, block)] for block in family.blocks if (place, block) in family.cells]
        changed = [row for row in changed if row["modules_changed"]]
        named = ", ".join(short[row["block"]] for row in changed[:_MOST_NAMED])
        further = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
        sums = {key: sum(row[key] or 0 for row in here) for key in _SUMMED}
        rows.append(
            [
                step,
                one_line(family.steps[place][2], 60),
                f"{len(changed):,} of {sum(bool(row['bytes'] or row['modules_changed']) for row in here):,}",
                f"{sums['modules_changed']:,} of {sums['modules']:,}",
                sums["weights_changed"],
                f"{sums['bytes_changed']:,} of {sums['bytes']:,} B",
                named + further or "nothing",
            ]
        )
    notes = [f"The first is compared with {one_line(family.steps[0][2], 60)}, each other one with the one before it."]
    if family.left_out[0]:
        notes.append(f"{family.left_out[0]:,} earlier checkpoints are not shown.")
    if family.left_out[1]:
        notes.append(f"{family.left_out[1]:,} further blocks are not drawn; the sums in the table have them.")
    table = values_table(f"Checkpoints of {one_line(family.class_name, 60)}, in the order in which they were met", columns, rows)
    return Figure(name, "model_blocks_changed", check, *drawn, tables=[table], notes=notes)


# --- parts ---------------------------------------------------------------------------------------------------------------


def _since(gathered: Gathered, word: str = " WHERE") -> str:
    since = gathered.by_task.since
    return f"{word} run IN (SELECT run FROM run_spans WHERE started_at >= {quoted(since)})" if since else ""


def _named(row: Row, nothing: str) -> str:
    return one_line(row.name or row.group or nothing, 120)


def _apart(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Names of models; with the beginning of the digest where two models have one name."""
    return [
        f"{row.group[:8]} {name}" if row.group and names.count(name) > 1 else name for name, row in zip(names, rows, strict=True)
    ]


def _drawn(rows: Sequence[Any], what: str) -> list[str]:
    most = f"The chart shows the {MOST_BARS} most expensive of {len(rows):,} {what}."
    return [most] if len(rows) > MOST_BARS else []


def _buckets(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Days as spans of one, seven or more days, without gaps, with their figures added up; and how many days a span has."""
    first, last = (datetime.date.fromisoformat(day) for day in (min(rows), max(rows)))
    count = (last - first).days + 1
    days = 1 if count <= _MOST_BUCKETS else max(7, -(-count // _MOST_BUCKETS // 7) * 7)
    first -= datetime.timedelta(days=first.weekday() if days > 1 else 0)
    buckets: list[dict[str, Any]] = []
    total = 0.0
    for place in range(((last - first).days) // days + 1):
        start = first + datetime.timedelta(days=place * days)
        within = [rows[day] for n in range(days) if (day := (start + datetime.timedelta(days=n)).isoformat()) in rows]
        sums = {name: sum(figures[name] for figures in within) for name in _ADDED}
        total += sums["net_seconds"]
        told = (
            f"{start}{'' if days == 1 else f', {days} days'}: {format_seconds(sums['reused_seconds'])} reused, "
            f"{format_seconds(sums['spent_seconds'])} spent, net {format_seconds(sums['net_seconds'])}, "
            f"added up {format_seconds(total)}"
        )
        buckets.append(
            {
                "start": start.isoformat(), "end": (start + datetime.timedelta(days=days)).isoformat(), **sums,
                "spent": sums["spent_seconds"], "reused": sums["reused_seconds"], "total": total, "told": told,
            }
        )  # fmt: skip
    return buckets, days


def _added(bucket: Mapping[str, Any], name: str) -> Any:
    return seconds_cell(bucket[name]) if name.endswith("_seconds") else bucket[name]


def _day_before(day: str) -> str:
    return (datetime.date.fromisoformat(day) - datetime.timedelta(days=1)).isoformat()


def _short(blocks: Sequence[str]) -> dict[str, str]:
    """Names without the prefix that most of them have (``model.``)."""
    parts = [block.split(".") for block in blocks]
    prefixes = [part[0] for part in parts if len(part) > 1 and not part[1].isdecimal()]
    most = max(set(prefixes), key=prefixes.count) if prefixes else ""
    trimmed = {block: block.removeprefix(f"{most}.") for block in blocks}
    if len(set(trimmed.values())) < len(trimmed):
        trimmed = {block: block for block in blocks}
    return {block: one_line(name or "(the model itself)", 60) for block, name in trimmed.items()}


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['bytes_changed'] / row['bytes']:.1%} of {row['bytes']:,} B" if row["bytes"] else "no weights of its own"


def _degree(row: Mapping[str, Any]) -> str:
    unchanged, code_only, *degrees = charts.DEGREES
    if not row["modules_changed"]:
        return unchanged
    if not row["weights_changed"]:
        return code_only
    share = row["bytes_changed"] / row["bytes"] if row["bytes"] else 1.0
    return next(name for name, most in zip(degrees, (0.1, 0.5, 0.99, 2.0), strict=True) if share < most)
