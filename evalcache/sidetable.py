"""SideTable: what can be found out again, as checked bytes under a key in one small SQLite file. Losing it costs time only.

So its faults are never errors: what cannot be read is not there, what cannot be written is not kept, each with a warning. The
standard library's SQLite is enough for a few rows a run; the store's folder, with its transactions and leases, is for entries.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from evalcache.digest import SIZE_BYTES, checksum
from evalcache.errors import CorruptEntryWarning
from evalcache.faults import FOLDER_HINT, tell, tell_of_folder
from evalcache.folder import journal_mode
from evalcache.forks import no_fork

_SCHEMA = "CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"

# The last: what SQLite says of a damaged schema may hold bytes that are no text.
_FAULTS = (sqlite3.Error, UnicodeDecodeError)


class SideTable:
    """Bytes under bytes in one file, for many threads and processes.

    Args:
        path: of the SQLite file; it and its folder are made by the first `put`.
        timeout_s: how long a write waits for other processes.

    Cost: a connection for each call, some 0.2 ms, so that nothing is held open across threads, forks or deleted files.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float = 10) -> None:
        self.path = Path(path)
        self._timeout_s = timeout_s

    def get(self, key: bytes) -> bytes | None:
        """The bytes that were put under ``key``, or None; rows that fail their check count as absent, with a warning."""
        if not self.path.exists():
            return None
        try:
            with self._connection() as connection:
                row = connection.execute("SELECT value FROM kept WHERE key = ?", (key,)).fetchone()
        except _FAULTS as error:
            self._failed("read", error)
            return None
        if row is None:
            return None
        sealed = row[0]
        # The key is under the checksum too: a flipped bit in a row's key must not return it for another one.
        if type(sealed) is not bytes or sealed[:SIZE_BYTES] != checksum(key + sealed[SIZE_BYTES:]):
            tell(f"{self.path}: a row fails its checksum and is made again", CorruptEntryWarning, stacklevel=3)
            return None
        return sealed[SIZE_BYTES:]

    def put(self, key: bytes, value: bytes) -> bool:
        """Keep ``value`` under ``key`` in the place of what was there; False, with a warning, if that is impossible."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives its side files the mode of the database file.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            with self._connection() as connection:
                connection.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (key, checksum(key + value) + value))
        except (OSError, *_FAULTS) as error:
            self._failed("written", error)
            return False
        return True

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with (
            no_fork(),
            contextlib.closing(sqlite3.connect(self.path, timeout=self._timeout_s, isolation_level=None)) as connection,
        ):
            connection.text_factory = bytes  # a damaged row may claim to be text that is none
            # A log, so that readers do not wait for the writer. Where several begin at once, SQLite refuses all but one to change
            # the mode, without waiting: they go on in the one that there is.
            with contextlib.suppress(sqlite3.OperationalError):
                connection.execute(f"PRAGMA journal_mode = {journal_mode(self.path)}")
            connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may take the last rows, never the file
            connection.execute(_SCHEMA)
            yield connection

    def _failed(self, what: str, error: Exception) -> None:
        # OperationalError is a matter of the moment (locked, full, read-only); any other DatabaseError is a broken file.
        if not isinstance(error, (sqlite3.DatabaseError, UnicodeDecodeError)) or isinstance(error, sqlite3.OperationalError):
            said = f"{self.path} cannot be {what}, this run goes on without what does not fit: {error} ({FOLDER_HINT})"
            tell_of_folder(self.path.parent, said, stacklevel=4)
            return
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.replace(f"{self.path}{suffix}", f"{self.path}.corrupt{suffix}")
        tell(f"{self.path} cannot be {what} and was set aside: {error}", CorruptEntryWarning, stacklevel=4)
