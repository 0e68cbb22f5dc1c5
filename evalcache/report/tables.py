"""Tables of the page: cells that say their figure as `evalcache audit` does, and have its exact value beneath. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evalcache.audittext import AUDIT_COLUMNS, said_figure
from evalcache.figures import FIGURES, Row
from evalcache.printing import said, visible
from evalcache.structs import Frozen
from evalcache.summary import format_seconds


class Column(Frozen):
    """A column: what stands above it, the figure that it is (to whose definition it links), whether it has numbers or prose."""

    label: str
    figure: str | None = None
    numeric: bool = False
    prose: bool = False

    @property
    def kind(self) -> str:
        """How its cells are set."""
        return "number" if self.numeric else "prose" if self.prose else "name"


class Cell(Frozen):
    """A cell: what it says; exact: its value in the unit of its definition, where that says more; code: a key or digest."""

    text: str
    exact: str | None = None
    code: bool = False


class Table(Frozen):
    """A table with its caption; left_out: rows that are not in it, and how to see them."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    left_out: str = ""


def figure_cell(name: str, figures: Mapping[str, Any], currency: str | None = None) -> Cell:
    """A figure of an audit."""
    value, unit = figures[name], FIGURES[name].unit
    exact = None
    if isinstance(value, float):
        shown = currency if unit == "currency" else "" if unit == "share" else unit
        exact = f"{value:.6f} {shown or ''}".strip()
    return Cell(said_figure(name, figures, currency), exact)


def seconds_cell(seconds: float | None) -> Cell:
    """Seconds as a person reads them, and exactly."""
    return Cell("–") if seconds is None else Cell(format_seconds(seconds), f"{seconds:.6f} s")


def figures_table(caption: str, by: str, names: Sequence[str], rows: Sequence[Row], currency: str | None, left_out: str) -> Table:
    """Rows of an audit under their names."""
    shown = [name for name in AUDIT_COLUMNS if name != "money_net" or currency]
    columns = [Column(by), *(Column(AUDIT_COLUMNS[name], name, numeric=True) for name in shown)]
    cells = [
        [Cell(name), *(figure_cell(figure, row.figures, currency) for figure in shown)]
        for name, row in zip(names, rows, strict=True)
    ]
    return Table(caption, columns, cells, left_out)


def values_table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[Any]], left_out: str = "") -> Table:
    """Rows of anything: cells as they are, everything else as a person reads it."""
    return Table(caption, columns, [[c if isinstance(c, Cell) else Cell(said(c)) for c in row] for row in rows], left_out)


def one_line(text: Any, most: int = 200) -> str:
    """What somebody else wrote, on one line that shows all its signs, and no longer than ``most``."""
    shown = " ".join(visible(str(text)).split())
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def command(sql: str) -> str:
    """A query as it is typed in a shell: nothing in it means more there than it says."""
    harmless = not set(sql) & set('"$`!\\')  # within double quotes, which leave SQL's own single ones as they are
    return f'evalcache query "{sql}"' if harmless else f"evalcache query {shlex.quote(sql)}"


def more(rows: Sequence[Any], most: int, how: str) -> str:
    """What is said where there are more rows than are shown."""
    return f"The first {most:,} of {len(rows):,}; {how} tells all." if len(rows) > most else ""
