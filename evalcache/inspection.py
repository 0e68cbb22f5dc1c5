"""Inspection: every row of a store read and checked, and the bad ones set aside. Level 3.9; works on rows, in the file's order.

Which rows a store has is told in `store.py`; here is what each kind must be. Nothing is deleted: what fails its checks is kept
under ``aside/<its key>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from evalcache.digest import SIZE_BYTES, Digest
from evalcache.errors import FrameError, NewerFrameError
from evalcache.frame import decode_entry, decode_question, unseal
from evalcache.rows import Rows
from evalcache.structs import Frozen
from evalcache.waiting import STATE

ASIDE = "aside/"
SEALED = ("object/", "journal/", STATE, "worker/", "lease/", "segment/")
"""What the names of rows begin with that are not entries; each holds sealed bytes."""

_SCAN_ROWS = 500
# As bytes: a damaged name may be text that is no UTF-8, which SQLite cannot hand over.
_COLUMNS = (
    "SELECT rowid, raw, typeof(key), CAST(key AS BLOB), CASE typeof(value) WHEN 'blob' THEN value END FROM Cache WHERE rowid"
)


class BadRow(Frozen):
    """A row that fails its checks: where it stands in the file, what it calls itself, and what is wrong with it."""

    rowid: int
    name: str
    why: str


def bad_rows(rows: Rows) -> Iterator[BadRow]:
    """Every row that fails its checks. Cost: a pass over the whole file.

    Raises:
        StoreError: the file cannot be read any further.
    """
    after = -(1 << 63)
    while some := rows.query(f"{_COLUMNS} > ? ORDER BY rowid LIMIT {_SCAN_ROWS}", (after,)):
        yield from _bad(some)
        after = some[-1][0]


def set_aside(rows: Rows, found: Iterable[BadRow]) -> int:
    """Keep bad rows under other names, where nobody asks for them; returns how many. One that is good by now stays.

    Raises:
        StoreError: the file cannot be written.
    """
    count = 0
    for one in list(found):
        with rows.transaction("setting rows aside"):
            if any(_bad(rows.query(f"{_COLUMNS} = ?", (one.rowid,)))):
                # Its number makes the name its own: what was set aside before stays as well.
                name = f"{ASIDE}{one.name.encode('utf-8', 'replace').decode()}#{one.rowid}"
                rows.query("UPDATE Cache SET key = ?, raw = 1 WHERE rowid = ?", (name, one.rowid))
                count += 1
    return count


def what_is_wrong(raw: object, kind: str, key: bytes | None, value: bytes | None) -> str | None:
    """What is wrong with one row, None where nothing is.

    Args:
        raw, kind: diskcache's mark of a key that is no pickle, and SQLite's type of it. value: None where it is not bytes.
    """
    if raw == 1 and kind == "blob" and key is not None and len(key) == SIZE_BYTES:
        try:
            decode_entry(Digest(key), value)  # type: ignore[arg-type]
            decode_question(Digest(key), value)  # type: ignore[arg-type]
        except NewerFrameError:
            return None  # it may be good: who wrote it can tell
        except FrameError as error:
            return str(error)
        return None
    name = name_of(kind, key)
    if raw != 1 or kind != "text" or not name.startswith((*SEALED, ASIDE)):
        return f"row {name!r} is none of this store's"
    if not name.startswith(ASIDE):
        try:
            unseal(name, value)
        except (FrameError, UnicodeError) as error:
            return str(error)
    return None


def name_of(kind: str, key: bytes | None) -> str:
    """What a row calls itself: its text, or its bytes in hex."""
    return (key or b"").decode("utf-8", "replace") if kind == "text" else (key or b"").hex()


def _bad(some: Iterable[tuple]) -> Iterator[BadRow]:
    for rowid, raw, kind, key, value in some:
        if why := what_is_wrong(raw, kind, key, value):
            yield BadRow(rowid, name_of(kind, key), why)
