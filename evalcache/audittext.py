"""An audit as text: for a terminal, as CSV, as Markdown. Pure formatting; no figure is made here."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evalcache.figures import FIGURES, UNKNOWN_DEVICE, Report, Row
from evalcache.printing import print_fields, print_table, said, visible
from evalcache.summary import format_seconds

_MOST_ROWS = 20
AUDIT_COLUMNS = {
    "requests": "requests",
    "hits": "hits",
    "misses": "misses",
    "uncacheable": "uncacheable",
    "duplicates": "merged",
    "spent_seconds": "spent",
    "reused_seconds": "reused",
    "first_computed_seconds": "first computed",
    "overhead_seconds": "overhead",
    "net_seconds": "net",
    "hit_rate": "hit rate",
    "hit_rate_by_seconds": "by seconds",
    "money_net": "money net",
}
"""Figures of the table by groups → what stands above them."""

Section = tuple[str, Sequence[str], list[list[str]], str]
"""Title, columns, rows, and a line below."""


def print_report(report: Report) -> None:
    """For a terminal."""
    print_fields(dict(_overview(report)))
    for title, columns, rows, note in _sections(report):
        print(f"\n{title}")
        print_table(columns, rows)
        if note:
            print(visible(note))
    for line in _notes(report):
        print(visible(line))


def to_markdown(report: Report) -> str:
    """As Markdown, with the same parts."""
    overview = [[name, said(value)] for name, value in _overview(report)]
    parts = ["## evalcache audit\n", _markdown_table(("figure", "value"), overview)]
    for title, columns, rows, note in _sections(report):
        parts += [f"### {title}\n", _markdown_table(columns, rows), *([f"{note}\n"] if note else [])]
    parts += ["### Figures\n", _markdown_table(("figure", "unit", "view", "meaning"), _meanings(report))]
    notes = _notes(report, meanings=False)
    text = "\n".join([*parts, *(f"- {line}" for line in notes), ""]) if notes else "\n".join(parts)
    return visible(text)


def to_csv(report: Report) -> str:
    """The rows and the total, one figure a column; what is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([report.by, "name", *FIGURES, "currency"])
    for row in [*report.rows, report.total]:
        named = ("total", None) if row is report.total else (row.group, row.name)
        writer.writerow([*(name and visible(name) for name in named), *row.figures.values(), report.currency])
    return out.getvalue()


def print_explanation(found: Mapping[str, Any]) -> None:
    """What `misses.explain_run` found, for a terminal."""
    compared = "all that was stored before" if found["against"] is None else f"run {found['against']}"
    print(f"run {found['run']} against {compared}: {found['misses']:,} misses")
    for task in found["tasks"]:
        name = ":".join(filter(None, (task["client"], task["task"]))) or "(no task)"
        print(visible(f"\n{name}: {task['misses']:,} of {task['requests']:,} requests missed"))
        for cause in task["causes"]:
            counted = f"{cause['share']:.1%} ({cause['requests']:,}, {format_seconds(cause['seconds'])})"
            print(visible(f"  {counted}: {cause['meaning']}"))
            if cause["changed"]:
                print(visible(f"    {cause['changed']}"))
            example = cause["example"]
            if example["nearest"] is None:
                continue
            print(f"    example: {example['nearest']} → {example['key']}")
            rows = [
                ("≠" if field["left"] != field["right"] else "", field["field"], _cut(field["left"]), _cut(field["right"]))
                for field in example["fields"]
            ]
            print_table(("", "field", "before", "now"), rows)
    print(f"\nviews: {', '.join(found['views'])}")


# --- parts ---------------------------------------------------------------------------------------------------------------


def _overview(report: Report) -> Iterator[tuple[str, str]]:
    total = report.total.figures
    asked = report.run or (f"since {report.since}" if report.since else "all")
    yield "runs", f"{report.runs:,} ({asked})"
    yield (
        "requests",
        f"{total['requests']:,}: {total['hits']:,} hits, {total['misses']:,} misses, "
        + f"{total['uncacheable']:,} uncacheable, {total['duplicates']:,} merged",
    )
    yield "hit rate", f"{said_figure('hit_rate', total)} by request, {said_figure('hit_rate_by_seconds', total)} by second"
    yield "first computed", f"{said_figure('spent_seconds', total)} in these runs"
    first_s = said_figure("first_computed_seconds", total)
    yield "reused", f"{said_figure('reused_seconds', total)}, by entries that cost {first_s} when first computed"
    across = total["hits"] - total["own_hits"] - total["imported_hits"]
    yield "  across runs", f"{said_figure('credited_seconds', total)} in {across:,} hits"
    yield "  imported", f"{said_figure('imported_seconds', total)} in {total['imported_hits']:,} hits"
    yield "overhead", f"{said_figure('overhead_seconds', total)}, all that evalcache itself took"
    yield "  verification", f"{said_figure('verification_seconds', total)} of it, for checks of models"
    yield "net", f"{said_figure('net_seconds', total)} (reused less overhead)"
    if report.components[0]:
        rows, spared_s = report.components
        yield (
            "components",
            f"{format_seconds(spared_s)} spared below the first changed layer, for {rows:,} rows; in no other figure",
        )
    merged, avoided, loads = total["duplicate_seconds"], total["avoided_loads"] or 0, total["loads"] or 0
    yield "merged", f"{format_seconds(merged)} with an equal request, or computed by the run itself"
    unmeasured = f", {total['unmeasured_loads']:,} of them not measured" if total["unmeasured_loads"] else ""
    yield "loads avoided", f"{avoided:,} ({said_figure('avoided_load_seconds', total)}{unmeasured})"
    yield "loads", f"{loads:,} ({said_figure('load_seconds', total)})"
    if total["unmeasured_hits"]:
        yield "not measured", f"{total['unmeasured_hits']:,} hits, credited nothing"
    for name in ("money_spent", "money_reused", "money_overhead", "money_net"):
        yield name.replace("_", " "), said_figure(name, total, report.currency)
    energies = [name for name in FIGURES if name.startswith(("energy", "carbon"))]
    for name in energies:
        if total[name] is not None:
            yield (
                name.replace("_", " ").removesuffix(" joules").removesuffix(" grams"),
                (f"{said_figure(name, total)} ({report.boundaries[name]})"),
            )


def _sections(report: Report) -> Iterator[Section]:
    columns = [column for name, column in AUDIT_COLUMNS.items() if name != "money_net" or report.currency]
    rows = [[_group(row, report.by), *_cells(row, report.currency)] for row in report.rows[:_MOST_ROWS]]
    more = len(report.rows) - _MOST_ROWS
    note = f"and {more:,} more (--json or --csv has all)" if more > 0 else ""
    yield f"by {report.by} (view {report.view('spent_seconds')})", (report.by, *columns), rows, note
    if report.uncacheable:
        columns = ["reason", "requests", "seconds", "example"]
        rows = [_texts(one, columns) for one in report.uncacheable]
        yield "not cacheable (view uncacheable_by_reason)", columns, rows, ""
    if report.misses:
        columns = ["cause", "requests", "share", "seconds", "meaning", "changed"]
        told = [{**one, "share": f"{one['share']:.1%}", "changed": "; ".join(one["changed"])} for one in report.misses]
        yield "why requests missed (view miss_reasons)", columns, [_texts(one, columns) for one in told], ""
    if report.expensive:
        columns = ["seconds", "outcome", "reason", "client", "task", "document", "run", "key"]
        rows = [_texts(one, columns) for one in report.expensive]
        yield "most expensive requests that were computed (view lookups_once)", columns, rows, ""


def _texts(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Some values of a row; seconds as a person reads them, ids of runs in short."""
    cells = []
    for name in names:
        value = values[name]
        if value is None:
            cells.append("–")
        elif name == "seconds":
            cells.append(format_seconds(value))
        else:
            cells.append(value[:8] if name == "run" else value if name in ("meaning", "changed") else _cut(said(value)))
    return cells


def unpriced(report: Report) -> list[str]:
    """Why not all money is known: a line for each device without a price."""
    return [
        f"no price for {device}: its money is not known; --price '{device}=AMOUNT CURRENCY' names one"
        if device != UNKNOWN_DEVICE
        else f"{device}: its money is not known; nobody told where those seconds were measured"
        for device in report.missing_prices
    ]


def _notes(report: Report, meanings: bool = True) -> list[str]:
    notes = unpriced(report)
    if not report.missing_prices and report.currency is None and report.prices:
        notes.append("prices are in several currencies, which have no sum")
    for device in sorted(set(report.missing_watts) - set(report.missing_prices)):
        notes.append(f"no watts for {device}: its energy is not known; --price '{device}=AMOUNT CURRENCY, WATTS W' names them")
    for price in report.prices:
        told = ", ".join(filter(None, (price.kind, price.source, price.date)))
        notes.append(f"price of {price.device}: {price.per_hour:g} {price.currency} per hour ({told})")
    if meanings:
        views = dict.fromkeys(report.view(name) for name in FIGURES)
        notes.append(f"views behind the figures: {', '.join(views)}; --json and --md say what each one means")
    return [f"\n{notes[0]}", *notes[1:]] if meanings and notes else notes


def _meanings(report: Report) -> list[list[str]]:
    boundaries = report.boundaries
    return [
        [
            f"`{name}`",
            report.currency or "currency" if figure.unit == "currency" else figure.unit,
            f"`{report.view(name)}`",
            figure.meaning + (f"; boundary: {boundaries[name]}" if name in boundaries else ""),
        ]
        for name, figure in FIGURES.items()
    ]


def _cells(row: Row, currency: str | None) -> list[str]:
    return [said_figure(name, row.figures, currency) for name in AUDIT_COLUMNS if name != "money_net" or currency]


def _group(row: Row, by: str) -> str:
    if row.group is None:
        return UNKNOWN_DEVICE if by == "device" else "(none)"
    return f"{row.group[:12]} {_cut(row.name, 40)}" if row.name else row.group


def said_figure(name: str, figures: Mapping[str, Any], currency: str | None = None) -> str:
    """A figure with its unit, as the audit and the page say it; – where it is not known."""
    value, unit = figures[name], FIGURES[name].unit
    if value is None:
        return "–"
    if unit == "s":
        return format_seconds(value)
    if unit == "share":
        return f"{value:.1%}"
    if unit == "currency":
        return f"{value:,.4f} {currency}" if currency else "–"
    return f"{value:,.1f} {unit}" if unit in ("J", "g") else f"{value:,}"


def _cut(value: Any, most: int = 60) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(visible(str(cell)).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows), ""])
