"""Salvage: what can still be read of a store's file that SQLite calls damaged, in a new file in its place. Level 4.5.

The damaged file is moved aside under another name and never deleted. Of what it holds, whatever passes its own checks
(`inspection.py`) goes into the new file as it is, and whatever does not is set aside there.

A row is found through the table's own tree where that can be walked, and through the trees of its indexes where it cannot: each
row is then read by its number alone, so that a broken page costs the rows that lie on it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from evalcache.digest import SIZE_BYTES
from evalcache.errors import StoreError
from evalcache.inspection import ASIDE, name_of, what_is_wrong
from evalcache.leases import is_at_work
from evalcache.rows import Rows
from evalcache.structs import Frozen

DATABASE = "cache.db"

_SIDE_FILES = ("-wal", "-shm")
_BATCH_ROWS = 500
_FAULTS = (sqlite3.Error, UnicodeDecodeError)  # the last: what SQLite says of a damaged schema may hold bytes that are no text
# Faults of the moment, and of rights: the file is not to blame.
_NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_INTERRUPT,
    }
)  # fmt: skip


class Salvaged(Frozen):
    """What became of a damaged file. ``entries``, ``others``: rows that were good; ``aside``: rows that were not."""

    moved_to: Path
    entries: int
    others: int
    aside: int


def damage_of(folder: Path) -> str | None:
    """What SQLite finds wrong with a store's file, in a sentence; None where it is good, or is not there.

    Nothing is changed. Cost: a pass over the file.

    Raises:
        StoreError: it cannot be told now: rights, or somebody holds the file.
    """
    path = folder / DATABASE
    if not path.exists():
        return None
    try:
        with contextlib.closing(_connect(path)) as connection:
            connection.execute("BEGIN")  # one view of it, whatever others write meanwhile
            found = [message for (message,) in connection.execute("PRAGMA integrity_check(5)").fetchall()]
            connection.execute("SELECT rowid, key, raw, store_time, mode, filename, value FROM Cache LIMIT 1").fetchall()
            (count,) = connection.execute("SELECT value FROM Settings WHERE key = 'count'").fetchone() or (None,)
            if found == ["ok"] and count != connection.execute("SELECT count(key) FROM Cache").fetchone()[0]:
                found = ["its count of rows is wrong"]
    except (*_FAULTS, TypeError) as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is not None and code & 0xFF in _NOT_DAMAGE:
            raise StoreError(f"{path} cannot be read: {error}", hint="check rights, and who uses it", path=str(path)) from error
        found = [str(error)]
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}", hint="check its rights", path=str(path)) from error
    return None if found == ["ok"] else f"{path}: {'; '.join(found)}"


def is_used(folder: Path) -> bool:
    """Whether other processes are at work on a store, as far as its damaged file can still tell. Writes nothing."""
    try:
        with contextlib.closing(_connect(folder / DATABASE)) as connection:
            rows = connection.execute("SELECT key, value FROM Cache WHERE raw = 1 AND key > 'worker/' AND key < 'worker0'")
            return any(is_at_work(row, value) for row, value in rows)
    except _FAULTS:
        return False  # so does theirs not answer


def salvage(folder: Path) -> Salvaged:
    """Put a new file in the place of a damaged one, with all in it that is good.

    Killed before its end, it has changed nothing, or has moved the damaged file aside and is to be called again.

    Raises:
        StoreError: the folder cannot be written.
    """
    path = folder / DATABASE
    moved_to = _free_name(path)
    made = folder / "mending"
    try:
        shutil.rmtree(made, ignore_errors=True)  # what another attempt has left
        with contextlib.closing(_connect(path)) as connection:
            counts = _copy(connection, made)
        try:
            os.link(path, moved_to)  # so that there is a file under the old name at every instant
        except OSError:  # a file system without links
            os.rename(path, moved_to)
        for suffix in _SIDE_FILES:  # a log without its file would be applied to the new one
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{path}{suffix}", f"{moved_to}{suffix}")
        os.replace(made / DATABASE, path)
        shutil.rmtree(made, ignore_errors=True)
    except (*_FAULTS, OSError) as error:
        raise StoreError(f"{path} cannot be mended: {error}", hint="check rights and space", path=str(path)) from error
    return Salvaged(moved_to, *counts)


def _connect(path: Path) -> sqlite3.Connection:
    """For reading alone: its end writes nothing, and takes no log away."""
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=10, isolation_level=None)


def _copy(connection: sqlite3.Connection, made: Path) -> tuple[int, int, int]:
    rows = Rows(made)
    entries = others = aside = 0
    try:
        waiting: list[tuple[bytes | str, bytes]] = []
        for raw, kind, key, value in _read(connection):
            wrong = what_is_wrong(raw, kind, key, value)
            if wrong is None and kind == "blob" and key is not None and len(key) == SIZE_BYTES:
                waiting.append((key, value))
                entries += 1
            elif wrong is None:
                waiting.append((name_of(kind, key), value))
                others += 1
            elif value is not None:
                waiting.append((f"{ASIDE}{name_of(kind, key)}", value))
                aside += 1
            if len(waiting) >= _BATCH_ROWS:
                _write(rows, waiting)
        _write(rows, waiting)
        rows.query("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        rows.close()
    return entries, others, aside


def _write(rows: Rows, waiting: list[tuple[bytes | str, bytes]]) -> None:
    with rows.transaction("mending"):
        rows.put(waiting)
    waiting.clear()


def _read(connection: sqlite3.Connection) -> Iterator[tuple]:
    """Every row that can be read: its mark of no pickle, its key's type, its key and value as bytes."""
    columns = "raw, typeof(key), CAST(key AS BLOB), CASE typeof(value) WHEN 'blob' THEN value END"
    for rowid in _rowids(connection):
        try:
            found = connection.execute(f"SELECT {columns} FROM Cache NOT INDEXED WHERE rowid = ?", (rowid,)).fetchone()
        except _FAULTS:
            continue
        if found is not None:
            yield found


def _rowids(connection: sqlite3.Connection) -> list[int]:
    """The numbers of all rows, as far as any of the trees can be walked, from either end."""
    found: set[int] = set()
    for tree in ("NOT INDEXED", "INDEXED BY Cache_key_raw", "INDEXED BY Cache_expire_time"):
        order = {"NOT INDEXED": "rowid", "INDEXED BY Cache_key_raw": "key"}.get(tree, "expire_time")
        for direction in ("ASC", "DESC"):
            try:
                for (rowid,) in connection.execute(f"SELECT rowid FROM Cache {tree} ORDER BY {order} {direction}"):
                    found.add(rowid)
            except (*_FAULTS, OverflowError):
                continue
            break  # walked to its end
    return sorted(found)


def _free_name(path: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (path.with_name(f"{path.name}.damaged-{stamp}{more}") for more in ("", *(f".{n}" for n in range(1, 1000))))
    return next(name for name in names if not name.exists())
