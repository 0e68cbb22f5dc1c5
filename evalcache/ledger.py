"""Ledger: what was asked, answered, reused and saved, as tables in one DuckDB file. The only import of duckdb.

The ledger is told by a store's journal. One sync is one DuckDB transaction that takes in events, the entries they name, and how
far it came; what it wrote is read again from the reopened file, and only then does the store forget those events. So a sync that
is killed at any instant is done again by the next one, and nothing is counted twice.

DuckDB lets one process write and then nobody else even read. So the file is open for as short as possible, behind a lock file
that all of evalcache's processes queue for; somebody's notebook that holds the file delays a sync and nothing else.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import filelock

from evalcache.errors import LedgerError, LedgerLockedError
from evalcache.holders import held_by, holder_in
from evalcache.intake import Intake, JournalSource, execute
from evalcache.schema import STEPS, VERSION, comments, quoted
from evalcache.sigterm import undivided
from evalcache.structs import Frozen

LOCK_TIMEOUT_S = 10.0
"""How long to queue behind other processes of evalcache."""
_POLL_S = 0.01

_FILE_FORMAT = "v1.5.0"  # the newest that duckdb 1.5 and 2.0 both read and write
_SETTINGS = {"autoinstall_known_extensions": "false"}  # a foreign file must not make DuckDB download what might read it
_WRITER_THREADS = 2  # a sync runs beside the eval, whose cores they are
_LOCKED = (
    "Could not set lock",
    "Conflicting lock",
    "already attached",
    "Unique file handle",
    "different configuration",
    "being used by another process",
)

_LOGS = "enable_logging"
"""Where files may not be reached, DuckDB 1.5.5 ends the whole process at the first line that it would log to one."""

Ask = Callable[..., "Table"]


class SyncReport(Frozen):
    """What a sync or rebuild did. ``skipped``: entries or events that were damaged, or gone before they could be told."""

    events: int
    entries: int
    seconds: float
    skipped: int


class Table(Frozen):
    """The answer to a query. Digests are 32 hex digits, JSON is text, times are UTC."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


class Ledger:
    """The ledger in one file, which is made (mode 0600) when it is first needed. Holds nothing open between calls.

    Args:
        path: the ``.duckdb`` file. lock_timeout_s: how long to queue behind other processes of evalcache.
    """

    def __init__(self, path: str | os.PathLike[str], *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self.path = Path(path).absolute()
        self._lock_timeout_s = lock_timeout_s

    def sync(
        self, store: JournalSource, *, progress: Callable[[int, int], None] | None = None, last_of: str | None = None
    ) -> SyncReport:
        """Take in what waits in the store's journal. Cost: what is new; 10,000 entries in about a second.

        A ledger that was lost, or never was, is rebuilt from the store's entries on the way.

        Args:
            progress: called with the number of events done and waiting.
            last_of: a run that ends with this: what it takes until its commit is noted as the run's, which can tell no more.

        Raises:
            LedgerLockedError: somebody else holds the file; the journal keeps everything.
            LedgerError: the file is no ledger, or of a newer version.
        """
        return self._take_in(store, progress, last_of)

    def _take_in(
        self,
        store: JournalSource,
        progress: Callable[[int, int], None] | None,
        last_of: str | None = None,
        *,
        frames: bool = False,
    ) -> SyncReport:
        began = time.perf_counter()
        waiting = store.waiting.count()
        if not (waiting or frames) and self.path.exists():
            return SyncReport(0, 0, time.perf_counter() - began, 0)
        store_id = store.waiting.id()
        with self.turn():
            fresh = self._make()
            if not (fresh or frames or store.waiting.count()):  # whose turn it was before has taken in everything
                return SyncReport(0, 0, time.perf_counter() - began, 0)
            with self._attached() as connection:
                intake = Intake(connection, store)
                known = last = intake.last_seq(store_id)
                if (told := intake.is_told_again(store_id, last)) is not None:
                    store_id, known, last = store.waiting.begin_anew(told), 0, 0
                # DuckDB would give its log the usual mode, and others would see in it what the ledger hides from them.
                with contextlib.suppress(OSError):
                    os.close(os.open(f"{self.path}.wal", os.O_WRONLY | os.O_CREAT, 0o600))
                with _transaction(connection):
                    for whole in (False, True) if fresh or frames else (False,):
                        if whole:  # after the journal, and again before what others have written to it meanwhile
                            intake.take_frames(store, progress if frames else None)
                        while events := store.waiting.read(after=last):
                            for seq, event in events:
                                intake.take(store_id, seq, event)
                            last = events[-1][0]
                            if progress:
                                progress(intake.events, max(waiting, intake.events))
                    intake.finish()
                    if last > known:
                        if last_of:
                            took = [store_id, last, last_of, _now_us(), "last_sync", time.perf_counter() - began]
                            execute(connection, "INSERT INTO overheads VALUES (?, ?, ?, make_timestamp(?), ?, ?)", took)
                        execute(connection, "INSERT INTO synced VALUES (?, ?, make_timestamp(?))", [store_id, last, _now_us()])
            if last > known:
                # On a fresh connection: a COMMIT that was answered has been seen to be gone after a kill around its checkpoint.
                with self._attached(read_only=True) as connection:
                    kept = Intake(connection, store).last_seq(store_id)
                if kept < last:
                    raise LedgerError(f"{self.path}: the ledger did not keep what it was told", path=self.path, found=kept)
        if waiting:
            store.waiting.forget(last)
        return SyncReport(intake.events, intake.entries, time.perf_counter() - began, intake.skipped)

    def rebuild(self, store: JournalSource, *, progress: Callable[[int, int], None] | None = None) -> SyncReport:
        """Add the requests, outputs, models and modules that the store has and the ledger lacks.

        What only the journal told (runs, lookups, overheads, tasks, documents, scores) cannot be rebuilt: the store forgets it
        once the ledger has it. Tasks and documents come back with the next run that tells them; scores do not.

        Args:
            progress: called with the number of entries looked at, twice: how many there are is not known before.

        Cost: a pass over the store. Raises: as `sync`.
        """
        return self._take_in(store, progress, frames=True)

    def query(self, sql: str, params: Sequence[Any] = (), *, unsafe: bool = False) -> Table:
        """The rows of one query; see `reading`."""
        with self.reading(unsafe=unsafe) as ask:
            return ask(sql, params)

    @contextlib.contextmanager
    def reading(self, *, unsafe: bool = False) -> Iterator[Ask]:
        """Ask several questions on one opening of the file: ``ask(sql, params=()) -> Table``.

        Args:
            unsafe: allow statements that change the ledger, and that read and write other files. Without it the ledger is open
                for reading, and neither files nor settings can be reached from SQL.

        Raises:
            LedgerLockedError: somebody else has the file open for writing.
            LedgerError: the file is no ledger, or (from ``ask``) the query is wrong, in DuckDB's words.
        """
        with self.turn():
            self._make()
            with self._attached(read_only=not unsafe) as connection:
                if not unsafe:
                    connection.execute("SET enable_external_access = false")
                    connection.execute("SET lock_configuration = true")

                def ask(sql: str, params: Sequence[Any] = ()) -> Table:
                    if not unsafe and _LOGS in sql.lower():
                        raise LedgerError(f"{_LOGS} writes files", hint="`--unsafe` allows it", path=self.path)
                    try:
                        answer = execute(connection, sql, params)
                        names = tuple(column[0] for column in answer.description or ())
                        return Table(names, [tuple(map(_plain, row)) for row in answer.fetchall()] if names else [])
                    except (duckdb.Error, RuntimeError) as error:
                        raise LedgerError(str(error), path=self.path) from error

                yield ask

    # --- the file ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """This process's turn at the file. The operating system ends the turn of a process that is killed."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            until = time.monotonic() + self._lock_timeout_s
            # Who has had a turn and wants another one queues behind whoever waits: otherwise it would take the lock again at
            # once, while the others sleep between two looks at it.
            queue, lock = (filelock.FileLock(f"{self.path}.{name}", mode=0o600) for name in ("queue", "lock"))
            with queue.acquire(timeout=self._lock_timeout_s, poll_interval=_POLL_S):
                lock.acquire(timeout=max(0.0, until - time.monotonic()), poll_interval=_POLL_S / 4)
        except filelock.Timeout as error:
            raise self._locked("another process of evalcache is using the ledger") from error
        except OSError as error:
            raise LedgerError(f"{self.path}: the ledger's folder cannot be used: {error}", path=self.path) from error
        try:
            with undivided():
                yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _attached(self, *, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """The file, opened with the newest schema."""
        with self.opened(self.path, read_only=read_only) as connection:
            version = self._version(connection)
            if version > VERSION:
                raise LedgerError(
                    f"{self.path}: the ledger has schema {version}, this evalcache knows up to {VERSION}",
                    hint="upgrade evalcache, or use another folder",
                    path=self.path,
                    expected=VERSION,
                    found=version,
                )
            if version == VERSION or not read_only:
                self._apply(connection, version)
                yield connection
                return
        with self._attached():
            pass  # an elder schema cannot be read before it has been brought up to date
        with self._attached(read_only=True) as connection:
            yield connection

    @contextlib.contextmanager
    def opened(self, path: Path, *, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of its own with the file attached and in use as ``ledger``; closing it folds the write-ahead log in."""
        options = "READ_ONLY" if read_only else f"STORAGE_VERSION '{_FILE_FORMAT}'"
        try:
            with contextlib.closing(duckdb.connect(":memory:", config=_SETTINGS)) as connection:
                # Beside the ledger, not in the working directory, which is the user's.
                connection.execute(f"SET temp_directory = {quoted(f'{self.path}.tmp')}")
                if not read_only:
                    connection.execute(f"SET threads = {min(_WRITER_THREADS, os.cpu_count() or 1)}")
                connection.execute(f"ATTACH {quoted(str(path))} AS ledger ({options})")
                connection.execute("USE ledger")
                yield connection
        except duckdb.Error as error:
            if any(word in str(error) for word in _LOCKED):
                raise self._locked("another program has the ledger open", holder_in(error)) from error
            raise LedgerError(f"{path}: {error}", hint="`evalcache verify --fix` mends a damaged ledger", path=path) from error

    def _locked(self, message: str, holder: str = "") -> LedgerLockedError:
        holder = holder or held_by(self.path, Path(f"{self.path}.lock"))
        said = f"{self.path}: {message}{f' ({holder})' if holder else ''}"
        return LedgerLockedError(said, hint="nothing is lost; close it there, or try again when it is closed", path=self.path)

    def _make(self) -> bool:
        """Make the file where there is none; returns whether it was."""
        if self.path.exists():
            return False
        # What is left of processes that were killed in here: it is our turn, so nobody else is making one.
        for left in self.path.parent.glob(f".{glob.escape(self.path.name)}.*"):
            shutil.rmtree(left, ignore_errors=True)
        # Made in a folder of its own and moved: nobody ever sees half a schema, nor the file before it has its mode.
        try:
            with tempfile.TemporaryDirectory(prefix=f".{self.path.name}.", dir=self.path.parent) as private:
                made = Path(private) / self.path.name
                with self.opened(made) as connection:
                    self._apply(connection, 0)
                    connection.execute("CHECKPOINT ledger")  # the one of closing cannot fail, and leaves nothing on a full disk
                made.chmod(0o600)
                # A log without its ledger belongs to one that was deleted; DuckDB would try to apply it to the new one.
                Path(f"{self.path}.wal").unlink(missing_ok=True)
                made.replace(self.path)
        except OSError as error:
            raise LedgerError(f"{self.path}: the ledger cannot be made: {error}", path=self.path) from error
        return True

    def _version(self, connection: duckdb.DuckDBPyConnection) -> int:
        try:
            return connection.execute("SELECT max(version) FROM schema_version").fetchall()[0][0] or 0
        except duckdb.CatalogException as error:
            raise LedgerError(
                f"{self.path}: a DuckDB file, but not a ledger", hint="move it away or use another folder", path=self.path
            ) from error

    def _apply(self, connection: duckdb.DuckDBPyConnection, version: int) -> None:
        for number, step in enumerate(STEPS[version:], version + 1):
            with _transaction(connection):
                connection.execute(step)
                for comment in comments(step):
                    connection.execute(comment)
                execute(connection, "INSERT INTO schema_version VALUES (?, make_timestamp(?))", [number, _now_us()])


@contextlib.contextmanager
def _transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    connection.execute("BEGIN TRANSACTION")
    try:
        yield
    except BaseException:
        with contextlib.suppress(duckdb.Error):  # the first error is the one to tell
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _now_us() -> int:
    """Microseconds in UTC; SQL's now() would be turned into the session's time zone."""
    return time.time_ns() // 1000


def _plain(value: Any) -> Any:
    if isinstance(value, uuid.UUID):
        return value.hex
    return [_plain(item) for item in value] if isinstance(value, list) and value and isinstance(value[0], uuid.UUID) else value
