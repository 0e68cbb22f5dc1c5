"""A damaged ledger: what can still be read of it, in a new file in its place. Level 4.5.

DuckDB keeps a checksum with every block and checks it at every reading, so that damage is an error and never another value. The
damaged file is moved aside under another name and never deleted. What the store knows as well (requests, outputs, models) is
told again by a rebuild; of what the ledger alone knew, tables are taken over whole, or by the ranges of rows that can be read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from evalcache.errors import LedgerError, LedgerLockedError
from evalcache.ledger import Ledger
from evalcache.schema import columns, quoted
from evalcache.structs import Frozen, field

FROM_STORE = ("requests", "outputs", "models", "modules", "fields")
"""Tables that a rebuild fills from the store."""

_RANGE_ROWS = 122_880  # DuckDB's row group: what a broken block takes with it
_NOT_DAMAGE = ("No space left", "Permission denied", "Cannot open file", "Out of Memory", "Read-only file system")


class MendedLedger(Frozen):
    """What became of a damaged ledger. ``lost``: table → rows that could not be read, None where nobody knows how many."""

    moved_to: Path
    lost: Mapping[str, int | None] = field(default_factory=dict)


def damage_of_ledger(ledger: Ledger) -> str | None:
    """What is wrong with the ledger's file, in a sentence; None where every block of it can be read, or there is none.

    Cost: a pass over the file.

    Raises:
        LedgerLockedError: somebody else holds it. LedgerError: it is no ledger, or of a newer version, or rights forbid it.
    """
    if not ledger.path.exists():
        return None
    try:
        with ledger.path.open("rb"):
            pass
    except OSError as error:
        raise LedgerError(f"{ledger.path} cannot be read: {error}", hint="check its rights", path=ledger.path) from error
    try:
        with ledger.reading() as ask:
            tables = [row[0] for row in ask("SELECT table_name FROM duckdb_tables() WHERE database_name = 'ledger'").rows]
            for table in tables:
                ask(f"SELECT max(hash(t)) FROM {table} t")
    except LedgerLockedError:
        raise
    except LedgerError as error:
        if error.__cause__ is None or hasattr(error, "expected") or "not a ledger" in error.message:
            raise
        if any(word in error.message for word in _NOT_DAMAGE):
            raise
        return error.message
    return None


def mend_ledger(ledger: Ledger) -> MendedLedger:
    """Put a new ledger in the place of a damaged one, with all that can be read of it.

    Killed before its end, it has changed nothing, or is to be called again.

    Raises:
        LedgerLockedError: somebody else holds it. LedgerError: the folder cannot be written.
    """
    path = ledger.path
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (path.with_name(f"{path.name}.damaged-{stamp}{more}") for more in ("", *(f".{n}" for n in range(1, 1000))))
    moved_to = next(name for name in names if not name.exists())
    made = Ledger(path.with_name(f"{path.name}.mending"))
    try:
        with ledger.turn():
            for suffix in ("", ".wal"):
                Path(f"{made.path}{suffix}").unlink(missing_ok=True)  # what another attempt has left
            with made.reading():
                pass  # is made
            # A log that cannot be applied holds nothing that the store's journal does not hold as well. Under its second name
            # the file has none.
            with contextlib.suppress(OSError):  # a file system without links
                os.link(path, moved_to)
            lost = _take_over(path if _opens(path, made) else moved_to, made)
            if not moved_to.exists():
                path.rename(moved_to)
            with contextlib.suppress(FileNotFoundError):
                Path(f"{path}.wal").rename(f"{moved_to}.wal")  # a log without its file would be applied to the new one
            made.path.replace(path)
            for name in ("lock", "queue"):
                Path(f"{made.path}.{name}").unlink(missing_ok=True)
    except OSError as error:
        raise LedgerError(f"{path} cannot be mended: {error}", hint="check rights and space", path=path) from error
    return MendedLedger(moved_to, lost)


def _opens(path: Path, made: Ledger) -> bool:
    try:
        with made.opened(path, read_only=True):
            return True
    except LedgerLockedError:
        raise
    except LedgerError:
        return False


def _take_over(damaged: Path, made: Ledger) -> dict[str, int | None]:
    """Copy what can be read, table by table; returns the rows that could not be."""
    lost: dict[str, int | None] = {}
    for table, types in columns().items():
        if table == "schema_version":
            continue
        try:
            total, shared = _size(damaged, made, table, list(types))
        except LedgerError as error:
            if "does not exist" not in str(error):
                lost[table] = None
            continue
        copied = _copy(damaged, made, table, shared)
        if copied is None:
            ranges = range(0, total, _RANGE_ROWS)
            copied = sum(_copy(damaged, made, table, shared, start) or 0 for start in ranges)
        if copied < total:
            lost[table] = total - copied
    return lost


def _size(damaged: Path, made: Ledger, table: str, names: list[str]) -> tuple[int, str]:
    """Rows of a damaged table, and those of its columns that are known."""
    with made.opened(made.path) as connection:
        connection.execute(f"ATTACH {quoted(str(damaged))} AS damaged (READ_ONLY)")
        there = {row[0] for row in connection.execute(f"DESCRIBE damaged.{table}").fetchall()}
        total = connection.execute(f"SELECT count(*) FROM damaged.{table}").fetchall()[0][0]
        return total, ", ".join(name for name in names if name in there)


def _copy(damaged: Path, made: Ledger, table: str, shared: str, start: int | None = None) -> int | None:
    """Copy a table, or a range of its rows; None where it cannot be read. A broken block ends a connection: each has its own."""
    where = "" if start is None else f" WHERE rowid >= {start} AND rowid < {start + _RANGE_ROWS}"
    try:
        with made.opened(made.path) as connection:
            connection.execute(f"ATTACH {quoted(str(damaged))} AS damaged (READ_ONLY)")
            copy = f"INSERT INTO ledger.{table} ({shared}) SELECT {shared} FROM damaged.{table}{where}"
            return connection.execute(copy).fetchall()[0][0]
    except LedgerLockedError:
        raise
    except LedgerError as error:
        if any(word in error.message for word in _NOT_DAMAGE):
            raise
        return None
