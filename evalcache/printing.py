"""How results reach a terminal or a pipe: tables for people, one JSON document for programs. The only import of rich's tables.

Model outputs are other people's bytes: for a person, control characters are shown and never sent to the terminal; JSON escapes
them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evalcache.digest import Digest
from evalcache.visible import visible

_PIPE_WIDTH = 10_000  # where nobody watches, nothing is wrapped or cut


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: digests with their algorithm, other bytes as hex, infinities as null, else its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Digest):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value).hex()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def print_json(value: Any) -> None:
    """One JSON document, ASCII only."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=True, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], empty: str = "nothing yet") -> None:
    """A table for people; numbers to the right; ``empty`` where there are no rows."""
    rows = list(rows)
    if not rows:
        print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        numbers = all(row[place] is None or isinstance(row[place], (int, float)) for row in rows)
        table.add_column(Text(visible(column)), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(said(value)) for value in row))
    _console().print(table)


def print_fields(fields: Mapping[str, Any]) -> None:
    """Names and values below each other; values of several lines are kept as they are."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        print(f"{visible(name):<{width}}  {said(value)}".rstrip())


def said(value: Any) -> str:
    """One value for a person."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}" if math.isfinite(value) else str(value)
    if isinstance(value, (Mapping, list, tuple)):
        return visible(json.dumps(plain(value), ensure_ascii=False))
    return visible(str(plain(value)))


def said_bytes(size: int) -> str:
    """A size as a person reads it, in binary units.

    >>> said_bytes(1536), said_bytes(12)
    ('1.5 KiB', '12 B')
    """
    amount, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"


def print_error(message: str, hint: str | None) -> None:
    """One clear message on stderr, and what to do about it."""
    print(f"evalcache: {visible(message)}", file=sys.stderr)
    if hint:
        print(f"  {visible(hint)}", file=sys.stderr)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)
