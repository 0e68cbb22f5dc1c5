"""Rows: bytes under bytes or text in one SQLite file, for many threads and processes. Level 3, and the only import of diskcache.

diskcache gives the folder, its settings, a connection per thread and process, transactions and an integrity check. Rows of ours
are read and written by SQL on its own table: its `get` and `set` are one statement each, several times slower at a hundred
thousand rows. Nothing is ever pickled or unpickled, whatever a row claims to be.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import MODE_RAW

from evalcache.errors import CorruptEntryWarning, StoreError, StoreGoneError
from evalcache.faults import FOLDER_HINT, tell
from evalcache.folder import journal_mode
from evalcache.forks import no_fork
from evalcache.sigterm import undivided

ROW_LIMIT_BYTES = 512 << 20
"""Largest row that is written; SQLite itself refuses rows of 1 GB."""

_WIDTHS = (1, 8, 32, 128, 512, 1024)  # keys per statement: few texts, so that SQLite's prepared statements are found again
_SELECT = {width: f"SELECT key, value FROM Cache WHERE raw = 1 AND key IN ({', '.join('?' * width)})" for width in _WIDTHS}
_BULK = 4 * _WIDTHS[-1]
_KEY = operator.itemgetter(0)
_PLACES = f"SELECT rowid FROM Cache WHERE raw = 1 AND key IN ({', '.join('?' * _WIDTHS[-1])})"
_AT_PLACES = f"SELECT key, value FROM Cache WHERE rowid IN ({', '.join('?' * _WIDTHS[-1])})"
# An upsert, for INSERT OR REPLACE would delete rows without firing the triggers that keep diskcache's count right.
_UPSERT = (
    "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, value) VALUES (?, 1, ?, ?, 0, 1, ?)"
    " ON CONFLICT (key, raw) DO UPDATE SET"
    " store_time = excluded.store_time, expire_time = NULL, size = 0, mode = 1, filename = NULL, value = excluded.value"
)
_FORK_WAIT_S = 5.0
_PAGE_BYTES = 8192
_BAD_ROW_CODES = frozenset({None, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_IOERR})  # None: undecodable text where bytes belong
# The last: what SQLite says of a damaged schema may hold bytes that are no text.
_FAULTS = (sqlite3.Error, UnicodeDecodeError)
_MISREAD = (TypeError, ValueError, AttributeError, AssertionError)  # diskcache's, of values in its tables that it has not written
_SETTINGS: dict[str, Any] = {
    "statistics": 0,
    "eviction_policy": "none",
    "cull_limit": 0,
    "disk_min_file_size": 1 << 30,  # every value in its row, so that a transaction covers it
    "sqlite_auto_vacuum": 0,  # FULL would move pages at each commit that follows a drained journal; free pages are used again
    "sqlite_cache_size": -(64 << 10),  # KiB
    # A mapped file that is cut short from outside kills the process (SIGBUS) instead of raising: a quarter of a bulk lookup is
    # not worth somebody's run.
    "sqlite_mmap_size": 0,
    "sqlite_journal_size_limit": 64 << 20,  # a bulk commit does not leave its log at that size for ever
    "sqlite_synchronous": 2,  # FULL: a commit that returned survives a power cut
}


class BytesDisk(diskcache.Disk):
    """diskcache's encoding without pickle: keys are bytes or text, values bytes in their row, both ways.

    Source: CVE-2025-69872; whoever can write a pickle into ``cache.db`` would otherwise run code in every reader.
    """

    def put(self, key: Any) -> tuple[Any, bool]:
        if type(key) is not bytes and type(key) is not str:
            raise StoreError(f"row keys are bytes or text, found {type(key).__name__}", found=type(key).__name__)
        return super().put(key)

    def get(self, key: Any, raw: bool) -> Any:
        if not raw:
            raise StoreError("a row key is a pickle, which is never read", found="pickle")
        return super().get(key, raw)

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> tuple[int, int, None, Any]:
        if read or type(value) is not bytes:
            raise StoreError(f"row values are bytes, found {type(value).__name__}", found=type(value).__name__)
        if len(value) > ROW_LIMIT_BYTES:
            raise StoreError(f"a row of {len(value)} bytes is larger than {ROW_LIMIT_BYTES}", found=len(value))
        return super().store(value, read, key)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> bytes:
        if mode != MODE_RAW or filename is not None or type(value) is not bytes:
            raise StoreError("a row is a pickle or a file, which is never read", found=mode)
        return value


class Rows:
    """The rows of one folder.

    Args:
        directory: made with mode 0700 where it does not exist; its files have mode 0600.
        timeout_s: how long a write waits for other processes.

    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(self, directory: str | os.PathLike[str], *, timeout_s: float = 60) -> None:
        self.directory = Path(directory)
        self.timeout_s = timeout_s
        self._writing = threading.RLock()
        self._fork_held = False
        self._file = self.directory.absolute() / "cache.db"
        self._cache = self._open()
        self._opened = _identity(self._file)
        _open_rows.add(self)

    def _open(self) -> diskcache.Cache:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_database(self._file)
            # Absolute, because diskcache opens connections later, when the working directory may be another.
            settings = _SETTINGS | {"sqlite_journal_mode": journal_mode(self._file)}
            with no_fork():
                return diskcache.Cache(str(self._file.parent), timeout=self.timeout_s, disk=BytesDisk, **settings)
        except (*_FAULTS, *_MISREAD, OSError, diskcache.Timeout) as error:
            raise self.unusable("cannot be opened", error) from error

    def reopen(self) -> None:
        """Open the folder once more, after it has failed; it is made where it is gone.

        Raises:
            StoreError: the folder cannot be used.
        """
        with undivided(), self._writing:
            self._cache.close()
            self._cache = self._open()
            self._opened = _identity(self._file)

    def close(self) -> None:
        """Let go of this thread's connection; other threads' go with them. A later call opens it again."""
        self._cache.close()

    def select(self, keys: Sequence[Any], unreadable: list[tuple[Any, str]]) -> Iterator[list[tuple[Any, Any]]]:
        """(key, value) of the rows under these keys, about a thousand to a list and statement; a value is whatever the row holds.

        Args:
            keys: bytes or text. unreadable: takes (key, why) of rows that SQLite cannot read; they do not cost the others.

        Raises:
            StoreError: nothing can be read.
        """
        if len(keys) > _BULK:
            found: set[bytes] = set()
            for rows in self._in_place(keys):
                found.update(map(_KEY, rows))
                yield rows
            # What was written anew meanwhile, or cannot be read in bulk, is asked for by its key; so are absent ones.
            keys = [key for key in keys if key not in found]
        for start in range(0, len(keys), _WIDTHS[-1]):
            chunk = keys[start : start + _WIDTHS[-1]]
            # Filled up by repeating one key, for few statement texts: SQLite drops equal members of a list.
            width = next(width for width in _WIDTHS if width >= len(chunk))
            try:
                yield self._ask(_SELECT[width], (*chunk, *chunk[-1:] * (width - len(chunk))))
            except _FAULTS:
                yield self._select_singly(chunk, unreadable)

    def _in_place(self, keys: Sequence[bytes]) -> Iterator[list[tuple[bytes, Any]]]:
        """Rows in the order in which they lie in the file: by their keys, which are hashes, pages would be read over and over."""
        width = _WIDTHS[-1]
        try:
            places: list[int] = []
            for start in range(0, len(keys), width):
                chunk = keys[start : start + width]
                places += [row for (row,) in self._ask(_PLACES, (*chunk, *chunk[-1:] * (width - len(chunk))))]
            places.sort()
            for start in range(0, len(places), width):
                some = places[start : start + width]
                yield self._ask(_AT_PLACES, (*some, *some[-1:] * (width - len(some))))
        except _FAULTS:
            return  # the caller asks for the rest by key, and finds out which rows are damaged

    def _select_singly(self, keys: Sequence[bytes], unreadable: list[tuple[bytes, str]]) -> list[tuple[bytes, Any]]:
        found: list[tuple[bytes, Any]] = []
        for key in keys:
            try:
                found += self._ask(_SELECT[1], (key,))
            except _FAULTS as error:
                code = getattr(error, "sqlite_errorcode", None)
                if (code & 0xFF if code else None) not in _BAD_ROW_CODES:
                    raise self.unusable("cannot be read", error) from error
                unreadable.append((key, str(error)))
        return found

    def query(self, statement: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of one SELECT over diskcache's table ``Cache (key, raw, value, …)``.

        Raises:
            StoreError: nothing can be read.
        """
        try:
            return self._ask(statement, tuple(values))
        except _FAULTS as error:
            raise self.unusable("cannot be read", error) from error

    def _ask(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with no_fork():
            return self._cache._sql(statement, values).fetchall()

    def version(self) -> tuple[int, int]:
        """Differs from what it was as soon as another connection has written, a thread's or a process's. Cost: some 5 µs."""
        return threading.get_ident(), self.query("PRAGMA data_version")[0][0]

    def scan(self, after: bytes | str, before: str | None, limit: int) -> list[tuple[Any, Any]]:
        """The first ``limit`` rows with ``after < key < before``, in order; all text comes before all bytes.

        A value that is not bytes stands as None: SQLite cannot even hand over text that is not UTF-8.
        """
        columns = "SELECT key, CASE typeof(value) WHEN 'blob' THEN value END FROM Cache WHERE raw = 1"
        if before is None:
            return self.query(f"{columns} AND key > ? ORDER BY key LIMIT ?", (after, limit))
        return self.query(f"{columns} AND key > ? AND key < ? ORDER BY key LIMIT ?", (after, before, limit))

    def total(self) -> int:
        """How many rows there are, as diskcache's triggers count them: at once, where counting ten million takes a second."""
        found = self.query("SELECT value FROM Settings WHERE key = 'count' AND typeof(value) = 'integer'")
        return found[0][0] if found else self.query("SELECT COUNT(*) FROM Cache")[0][0]

    def count_texts(self) -> int:
        """How many rows are under text."""
        return self.query("SELECT COUNT(*) FROM Cache WHERE raw = 1 AND key < ?", (b"",))[0][0]

    def count(self, after: bytes | str, before: str | None = None) -> int:
        """How many rows `scan` would find without a limit."""
        where, values = ("key > ?", (after,)) if before is None else ("key > ? AND key < ?", (after, before))
        return self.query(f"SELECT COUNT(*) FROM Cache WHERE raw = 1 AND {where}", values)[0][0]

    @contextlib.contextmanager
    def transaction(self, doing: str) -> Iterator[None]:
        """All writes within, or none. Writers of this process take turns at a lock, where SQLite would have them poll.

        Raises:
            StoreError: the folder cannot be written, or another process held it for longer than ``timeout_s``.
            StoreGoneError: the database was deleted, or another took its place; nobody would ever see what is written.
        """
        with undivided(), self._writing:
            found = _identity(self._file)
            if found is None or found != self._opened:
                gone = "was deleted or replaced while it was in use"
                raise StoreGoneError(f"store {self.directory} {gone}", path=str(self.directory))
            try:
                with self._cache.transact():
                    yield
            except diskcache.Timeout as error:
                raise self.unusable(f"was not free for {doing} within {self.timeout_s} s", "another process writes") from error
            except _FAULTS as error:
                raise self.unusable(f"failed while {doing}", error) from error
            finally:
                # A failed COMMIT, or a signal between BEGIN and diskcache's note of it, leaves the transaction open.
                connection = getattr(self._cache._local, "con", None)
                if connection is not None and connection.in_transaction and self._cache._txn_id != threading.get_ident():
                    connection.rollback()

    def put(self, rows: Iterable[tuple[bytes | str, bytes]]) -> None:
        """Write rows, replacing those under the same keys. Within a `transaction`."""
        now = time.time()
        self._cache._con.executemany(_UPSERT, ((key, now, now, value) for key, value in rows))

    def add(self, key: str, value: bytes) -> None:
        """Write one row unless there is one. Within a `transaction`."""
        self._cache.add(key, value)

    def get(self, key: str) -> bytes | None:
        """One row's bytes. For single rows; `select` for many.

        Raises:
            StoreError: the row is a pickle or a file, or nothing can be read.
        """
        try:
            with no_fork():
                return self._cache.get(key)
        except _FAULTS as error:
            raise self.unusable("cannot be read", error) from error

    def delete(self, after: str, through: str) -> None:
        """Delete the rows with ``after < key <= through``. Within a `transaction`."""
        self._cache._sql("DELETE FROM Cache WHERE raw = 1 AND key > ? AND key <= ?", (after, through))

    def drop(self, keys: Iterable[str]) -> None:
        """Delete rows, whatever they hold. Within a `transaction`."""
        self._cache._con.executemany("DELETE FROM Cache WHERE raw = 1 AND key = ?", ((key,) for key in keys))

    def remove(self, rows: Iterable[tuple[bytes | str, Any]]) -> None:
        """Delete rows that still hold the value given. Within a `transaction`."""
        self._cache._con.executemany("DELETE FROM Cache WHERE raw = 1 AND key = ? AND value IS ?", rows)

    def remove_elder(self, keys: Sequence[bytes | str], stored_before: float) -> list[bytes | str]:
        """Delete rows that were written before a time (Unix seconds); returns the keys that went. Within a `transaction`."""
        where = f"raw = 1 AND key IN ({', '.join('?' * len(keys))}) AND store_time < ?"
        gone = [key for (key,) in self.query(f"SELECT key FROM Cache WHERE {where}", (*keys, stored_before))]
        self.query(f"DELETE FROM Cache WHERE {where}", (*keys, stored_before))
        return gone

    def set_aside(self, rows: Sequence[tuple[bytes | str, Any, str]]) -> None:
        """Rename bad rows (key, value as read, why) to ``aside/…`` and warn; best effort, never an error.

        A row that another process has written anew since stays where it is.
        """
        if not rows:
            return
        why = "; ".join(reason for *_, reason in rows[:3]) + ("" if len(rows) <= 3 else f"; and {len(rows) - 3} more")
        try:
            with self.transaction("setting rows aside"):
                for key, value, _ in rows:
                    name = f"aside/{key.hex() if isinstance(key, bytes) else key}"
                    self._cache._sql("DELETE FROM Cache WHERE raw = 1 AND key = ?", (name,))
                    self._cache._sql("UPDATE Cache SET key = ? WHERE raw = 1 AND key = ? AND value IS ?", (name, key, value))
        except StoreError as error:
            why = f"{why} (left where they were: {error})"
        tell(f"{self.directory}: {len(rows)} bad rows are recomputed: {why}", CorruptEntryWarning, stacklevel=3)

    def check(self) -> list[str]:
        """What SQLite's and diskcache's own integrity checks find. Other processes cannot write meanwhile."""
        try:
            with no_fork(), warnings.catch_warnings():
                warnings.simplefilter("always")  # they are its findings: whoever silences warnings does not mean these
                found = self._cache.check(retry=True)
        except (*_FAULTS, *_MISREAD, OSError) as error:
            return [f"{self.directory}: {error}"]
        # Other files in the folder are not ours to judge; diskcache would call them strays of its own.
        strays = (diskcache.UnknownFileWarning, diskcache.EmptyDirWarning)
        return [str(warning.message) for warning in found if not issubclass(warning.category, strays)]

    def size_bytes(self) -> int:
        """Bytes of the database and its side files on disk."""
        files = (self.directory / f"cache.db{suffix}" for suffix in ("", "-wal", "-shm"))
        return sum(file.stat().st_size for file in files if file.exists())

    def unusable(self, what: str, error: object, hint: str = FOLDER_HINT) -> StoreError:
        """The error to raise when this folder does not do what it should."""
        return StoreError(f"store {self.directory} {what}: {error}", hint=hint, path=str(self.directory))


def _identity(file: Path) -> tuple[int, int] | None:
    """Which file it is; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_database(path: Path) -> None:
    """An empty database of ours, unless there is one: with rights that SQLite passes on to its side files, and larger pages.

    Two entries with 300 tokens fit a page of SQLite's default 4096 bytes and five one of 8192, which saves a seventh of the disk.
    diskcache sets the journal's mode first, after which a page size can no longer be chosen.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return
    # Where another process is quicker, its pages have the default size, and nothing else is different.
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA user_version = 1")  # the first write fixes the page size


# SQLite forbids carrying an open connection across fork, and a child must not inherit a transaction of another thread: so no
# write is under way and this thread's connection is closed when the process divides. Both sides open it again when they need it.
_open_rows: weakref.WeakSet[Rows] = weakref.WeakSet()


def _before_fork() -> None:
    for rows in list(_open_rows):
        rows._fork_held = rows._writing.acquire(timeout=_FORK_WAIT_S)
        if rows._cache._txn_id != threading.get_ident():
            rows._cache.close()


def _after_fork_in_parent() -> None:
    for rows in list(_open_rows):
        if rows._fork_held:
            rows._fork_held = False
            rows._writing.release()


def _after_fork_in_child() -> None:
    for rows in list(_open_rows):
        rows._fork_held = False
        rows._writing = threading.RLock()
        rows._cache._txn_id = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
