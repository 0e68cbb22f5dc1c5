"""Segments: the entries that machines exchange through a cache folder which they share, one immutable file at a time.

On a network file system no database is opened. Each machine has its store on a local disk (`folder.local_folder`) and gives what
it has computed in files of the form of an export (`exchange.py`): checked, written under another name in the same folder, renamed
and never changed. What others have given is taken in when a cache opens, checked whole like any import; what was computed here is
given after each sync. What runs asked and spent stays in the ledger of the machine that they ran on.

A file's name is the digest of what it holds, so that giving the same again, after a kill in between, is the same file. Files that
were given from here and have gone are given again: the folder may have been emptied. Nobody merges files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock

from evalcache.digest import Digest, checksum, digest_bytes
from evalcache.errors import EvalCacheError, ExchangeError, FrameError
from evalcache.exchange import import_entries, write_archive
from evalcache.faults import tell_of_folder
from evalcache.folder import make_folder
from evalcache.frame import decode_entry, decode_question
from evalcache.records import Taken
from evalcache.store import Store

SEGMENT_ENTRIES = 50_000
"""Most entries of one file."""
TURN_S = 30.0
"""How long to wait for another process of this machine that takes or gives."""
_ENDING = ".segment"
_UNFINISHED = ".unfinished-"
_ABANDONED_S = 24 * 3600.0


class Segments:
    """What one store exchanges with other machines.

    Args:
        shared: the cache folder that the machines share. store: on a local disk; from here on, what it is told is given, too.
        pull: whether to begin with `pull`.

    Raises:
        StoreError: the store cannot be written.
    """

    def __init__(self, shared: Path, store: Store, *, pull: bool = False) -> None:
        self.shared = shared
        self.folder = shared / "segments"
        self._store = store
        self._local = store.directory.parent
        store.transfers.begin(str(shared))
        if pull:
            self.pull()

    def pull(self) -> Taken:
        """Take what other machines have given since the last time. Never raises: what cannot be had costs a warning.

        Processes of one machine take turns, and find it done.

        Cost: listing a folder, and reading what is new.
        """
        taken = Taken()
        try:
            if not self._new():
                return taken
            with self._turn():
                for path in self._new():
                    with self._skipped(path):
                        taken += import_entries(self._store, path, due=False)
                        self._store.transfers.took(path.name)
        except (EvalCacheError, OSError, filelock.Timeout) as error:
            self._failed("not everything that other machines have computed could be had", error)
        return taken

    def push(self) -> int:
        """Give what was computed here since the last time; returns how many entries. Never raises, as `pull`.

        Cost: some 50 ms, and writing what is new.
        """
        given = 0
        try:
            self._store.transfers.give_again(path.name for path in self._listed())
            if not self._store.transfers.due():
                return 0
            with self._turn():
                for rows, keys in self._portions():
                    self._give(rows, keys)
                    given += len(keys)
                self._sweep()
        except (EvalCacheError, OSError, filelock.Timeout) as error:
            self._failed("what was computed here waits to be given to other machines", error)
        return given

    # --- within ------------------------------------------------------------------------------------------------------------

    def _listed(self) -> list[Path]:
        try:
            with os.scandir(self.folder) as found:
                return [self.folder / one.name for one in found if one.name.endswith(_ENDING)]
        except FileNotFoundError:
            return []

    def _new(self) -> list[Path]:
        listed = self._listed()
        known = self._store.transfers.known() if listed else set()
        return sorted(path for path in listed if path.name not in known)

    def _portions(self) -> Iterator[tuple[list[str], list[Digest]]]:
        """Rows of what is due, with their keys, as much at a time as one file may hold."""
        rows: list[str] = []
        keys: dict[Digest, None] = {}
        for row, some in self._store.transfers.due().items():
            if rows and len(keys) + len(some) > SEGMENT_ENTRIES:
                yield rows, list(keys)
                rows, keys = [], {}
            rows.append(row)
            keys |= dict.fromkeys(some)
        if rows:
            yield rows, list(keys)

    def _give(self, rows: Sequence[str], keys: Sequence[Digest]) -> None:
        given: dict[Digest, bytes] = {}
        objects: dict[str, None] = {}

        def entries() -> Iterator[tuple[bytes, bytes]]:
            for key, frame in self._store.transfers.frames(keys):
                with contextlib.suppress(FrameError):  # a damaged one stays here
                    decode_entry(key, frame)
                    asked = decode_question(key, frame)
                    given[key] = checksum(frame)
                    objects[f"fields/{asked.settings.hex}"] = objects[f"fields/{asked.environment.hex}"] = None
                    objects[f"model/{asked.model.hex}"] = None
                    yield key.value, frame

        def named() -> Iterator[tuple[str, bytes]]:
            for name in objects:
                if (data := self._store.get_object(name)) is not None:
                    yield name, data

        make_folder(self.folder)
        unique = uuid.uuid4().hex
        made, unfinished = self._local / f"given-{unique}", self.folder / f"{_UNFINISHED}{unique}"
        try:
            # DuckDB works on the local disk; the shared folder sees plain writes and one rename.
            write_archive(made, entries(), named())
            name = digest_bytes(b"".join(key.value + given[key] for key in sorted(given))).hex + _ENDING
            with (
                made.open("rb") as source,
                open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
            unfinished.replace(self.folder / name)
        finally:
            made.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
        self._store.transfers.gave(name, list(given), rows)

    def _sweep(self) -> None:
        """Take away what machines left unfinished that were killed, long ago by the shared folder's own clock."""
        probe = self.folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            left = [one for one in self.folder.iterdir() if one.name.startswith(_UNFINISHED)]
            if not left:
                return
            probe.touch(0o600)
            now = probe.stat().st_mtime
            probe.unlink()
            for one in left:
                if now - one.stat().st_mtime > _ABANDONED_S:
                    one.unlink()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """This process's turn among those of this machine. The system ends that of a process that is killed."""
        with filelock.FileLock(self._local / "segments.lock", timeout=TURN_S, mode=0o600):
            yield

    @contextlib.contextmanager
    def _skipped(self, path: Path) -> Iterator[None]:
        """A file that is damaged, of a newer version, or not ours to read costs a warning and no other file."""
        try:
            yield
        except ExchangeError as error:
            told = f"{error.message} ({path.name} is skipped: {error.hint or 'delete it'})"
            tell_of_folder(self.folder, told, stacklevel=5)

    def _failed(self, what: str, error: Exception) -> None:
        why = "another process of this machine is at it" if isinstance(error, filelock.Timeout) else str(error)
        tell_of_folder(self.folder, f"{self.shared}: {what}: {why} (is it mounted? the next run tries again)", stacklevel=4)
