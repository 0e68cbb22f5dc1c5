"""StateFolder: boundary states in files, for many processes. No fault of the folder is ever an error: a state is only not there.

A file is named by its key and the microseconds that it spares, so that a look into the folder tells what is worth keeping. It is
written once (`stateframe.py`), under another name, renamed and never changed; any process may delete any of them. Nothing is
synced to the disk: what a power cut leaves of a file fails its checksum.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evalcache.digest import Digest
from evalcache.errors import CorruptEntryWarning, FrameError, StoreError
from evalcache.faults import FOLDER_HINT, cache_folder_of, tell, tell_of_folder
from evalcache.filememo import SETTLED_NS
from evalcache.folder import make_folder
from evalcache.forks import no_fork
from evalcache.shelf import Held, Shelf
from evalcache.stateframe import HEAD_BYTES, check_head, decode_state, encode_state

UNUSED_S = 24 * 3600.0
"""A file that nobody has read for so long is worth nothing."""
LOOK_S = 1.0
"""So long a process goes by what it saw in the folder, at the least."""
LOOK_SHARE = 0.02
"""Looking into a folder of very many files takes at most so much of the time."""
LOOK_PARTS = 32
"""After writing such a part of the limit a process looks again, whatever the time."""
RETRY_S = 30.0
"""A folder that could not be written is left alone for so long."""

_NAME = re.compile(r"([0-9a-f]{32})-([1-9][0-9]{0,14})")
_UNFINISHED = re.compile(r"\.unfinished-([0-9]+)-[0-9a-f]{32}")
_ABANDONED_S = 3600.0
_TOUCH_S = 3600.0  # how exact the time of the last reading is


class StateFolder:
    """The files of one folder, for many threads.

    What other processes have written is known from the last look: a second ago, or where looking takes long somewhat more, and
    before every thirty-second part of the limit that this process writes. So for some seconds the files of several processes may
    be larger together than the limit, by such a part for each of them.

    Args:
        directory: for states alone; it is made, for its owner alone, by the first that is written. limit_bytes: of all files.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = directory.absolute()
        self.shelf = Shelf(limit_bytes)
        self.evicted = self.damaged = 0
        # A signal's handler may come here while its thread is in here.
        self._lock = threading.RLock()
        self._look_at, self._write_at = -math.inf, -math.inf  # not before
        self._looking = False
        self._changed_ns: int | None = None  # the folder's mtime at the last look
        self._written_bytes = 0  # since the last look
        self._unfinished_bytes = 0  # what other processes are writing
        # Of these the shelf knows better than a look that went on meanwhile: what is being written or deleted, and what was.
        self._underway: set[Digest] = set()
        self._touched: set[Digest] = set()

    def has(self, key: Digest) -> bool:
        """Whether there is a file, which may yet turn out to be damaged."""
        return key in self.shelf.held or (self._look() and key in self.shelf.held)

    def held(self) -> tuple[int, int]:
        """How many files there are, and how many bytes, with those that are being written."""
        with no_fork(), self._lock:
            return len(self.shelf.held), self.shelf.size_bytes

    def would_keep(self, size_bytes: int, worth: float) -> bool:
        """Whether a state would find room now."""
        with no_fork(), self._lock:
            return time.monotonic() >= self._write_at and self.shelf.victims(size_bytes, worth) is not None

    def read(self, key: Digest) -> Held | None:
        """The state under ``key``, whose tensors are views of the file's bytes, or None. Cost: one reading, one pass over it."""
        if not self.has(key) or (one := self.shelf.held.get(key)) is None:
            return None
        path = self._path(key, one)
        try:
            # Read, not mapped: a mapped file that somebody cuts short ends the process.
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                check_head(key, file.read(HEAD_BYTES), status.st_size)  # before memory is asked for
                file.seek(0)
                state = decode_state(key, file.readall())
        except FileNotFoundError:
            pass  # another process has made room
        except FrameError as error:
            self._discard_damaged(path, error)
        except (OSError, MemoryError) as error:
            self._failed("a state cannot be read and is computed", error)
        else:
            found = Held(one.size_bytes, one.microseconds, state)
            self._used(key, one, path, status.st_mtime)
            return found
        with no_fork(), self._lock:
            if self.shelf.held.get(key) is one:
                self.shelf.remove(key)
        return None

    def write(self, key: Digest, one: Held) -> bool:
        """Keep a state; files that are worth less make room. True if there is a file already."""
        if time.monotonic() < self._write_at:
            return False
        self._look()
        written = False
        try:
            while going := self._reserve(key, one):
                self._unlink(going)
            if going is None:
                return key in self.shelf.held
            try:
                self._write_file(self._path(key, one), encode_state(key, one.what))
                written = True
            finally:
                self._settle(key, one, written)
        except (OSError, StoreError) as error:
            self._write_at = time.monotonic() + RETRY_S
            self._failed("states cannot be kept there and are computed when they are needed", error)
        return written

    # --- within ------------------------------------------------------------------------------------------------------------

    def _path(self, key: Digest, one: Held) -> str:
        return f"{self.directory}{os.sep}{key.hex}-{one.microseconds}"

    def _write_file(self, path: str, parts: list) -> None:
        unfinished = f"{self.directory}{os.sep}.unfinished-{os.getpid()}-{uuid.uuid4().hex}"
        try:
            opened = _create(unfinished)
        except FileNotFoundError:  # not made yet, or deleted meanwhile
            make_folder(self.directory)
            opened = _create(unfinished)
        try:
            with open(opened, "wb") as file:
                file.writelines(parts)
            os.replace(unfinished, path)
        except BaseException:
            self._discard(unfinished)
            raise

    def _reserve(self, key: Digest, one: Held) -> Mapping[Digest, Held] | None:
        """Room for a state, if nothing has to go first; else what has to. None if there is a file, or it is worth no room."""
        with no_fork(), self._lock:
            if key in self.shelf.held or key in self._underway:
                return None
            going = self.shelf.victims(one.size_bytes, one.worth)
            if going:
                return self._take(going)
            if going is not None:
                self.shelf.reserved_bytes += one.size_bytes
                self._underway.add(key)
            return None if going is None else {}

    def _settle(self, key: Digest, one: Held, written: bool) -> None:
        """What `_reserve` has begun is done."""
        with no_fork(), self._lock:
            self.shelf.reserved_bytes -= one.size_bytes
            if written:
                self.shelf.add(key, Held(one.size_bytes, one.microseconds))
                self._written_bytes += one.size_bytes
            self._underway.remove(key)
            self._touched.add(key)

    def _take(self, going: Sequence[Digest]) -> Mapping[Digest, Held]:
        self._underway.update(going)
        return self.shelf.take(going)

    def _unlink(self, leaving: Mapping[Digest, Held]) -> None:
        """Delete the files of what was taken from the shelf, whose room is free from then on."""
        gone = 0
        try:
            for key, one in leaving.items():
                with contextlib.suppress(FileNotFoundError):  # another process has had to make room, too
                    os.unlink(self._path(key, one))
                    gone += 1
        except OSError:
            self._changed_ns = None  # the others are still there: the next look finds them
            raise
        finally:
            with no_fork(), self._lock:
                self.evicted += gone
                self.shelf.give_back(leaving)
                self._underway.difference_update(leaving)
                self._touched.update(leaving)

    def _used(self, key: Digest, one: Held, path: str, at: float) -> None:
        """A file was read: its time says so, to other processes as well."""
        if time.time() - at < _TOUCH_S:
            return
        with contextlib.suppress(OSError):
            os.utime(path)
        with no_fork(), self._lock:
            if self.shelf.held.get(key) is one and not one.used:
                self.shelf.add(key, Held(one.size_bytes, one.microseconds))

    def _look(self) -> bool:
        """Find what other processes have written or deleted, if that is due; whether it was."""
        with no_fork():
            return self._look_now() if self._is_due() else False

    def _is_due(self) -> bool:
        """Whether to look now, which this thread does and no other."""
        with self._lock:
            written_much = self._written_bytes * LOOK_PARTS > self.shelf.limit_bytes
            if self._looking or (time.monotonic() < self._look_at and not written_much):
                return False
            self._looking, self._written_bytes = True, 0
            self._touched.clear()
            return True

    def _look_now(self) -> bool:
        began = time.monotonic()
        leaving: Mapping[Digest, Held] = {}
        try:
            changed_ns = os.stat(self.directory).st_mtime_ns
            if changed_ns == self._changed_ns:
                return False
            settled = time.time_ns() - changed_ns >= SETTLED_NS  # else a later change may leave the same time behind
            found, unfinished_bytes = self._scan()
            with self._lock:
                self._changed_ns = changed_ns if settled else None
                leaving = self._refill(found, unfinished_bytes)
        except FileNotFoundError:  # not made yet, or deleted
            with self._lock:
                self._changed_ns = None
                self._refill({}, 0)
        except OSError as error:
            self._failed("states cannot be found there and are computed when they are needed", error)
        finally:
            ended = time.monotonic()
            self._look_at = ended + max(LOOK_S, (ended - began) / LOOK_SHARE)
            self._looking = False
        with contextlib.suppress(OSError):
            self._unlink(leaving)
        return True

    def _refill(self, found: dict[Digest, Held], unfinished_bytes: int) -> Mapping[Digest, Held]:
        """Go by these files, as far as nothing has happened to them since; what is too much is taken from the shelf."""
        for key in self._touched | self._underway:
            found.pop(key, None)
            if key in self.shelf.held:
                found[key] = self.shelf.held[key]
        self.shelf.refill(found)
        self.shelf.reserved_bytes += unfinished_bytes - self._unfinished_bytes
        self._unfinished_bytes = unfinished_bytes
        return self._take(self.shelf.victims(0, math.inf) or [])

    def _scan(self) -> tuple[dict[Digest, Held], int]:
        """The files that there are, and the bytes of those that other processes are writing. Deletes what killed ones left."""
        found: dict[Digest, Held] = {}
        unfinished_bytes = 0
        for name, status, age_s in self._files():
            if match := _NAME.fullmatch(name):
                key = Digest(bytes.fromhex(match[1]))
                one = Held(status.st_size, int(match[2]), used=age_s < UNUSED_S)
                if (other := found.get(key)) is not None:  # of a process that has measured other seconds
                    one, other = sorted((one, other), key=lambda file: file.microseconds, reverse=True)
                    self._discard(self._path(key, other))
                found[key] = one
            elif match := _UNFINISHED.fullmatch(name):
                if age_s > _ABANDONED_S:
                    self._discard(f"{self.directory}{os.sep}{name}")
                elif int(match[1]) != os.getpid():
                    unfinished_bytes += status.st_size
        return found, unfinished_bytes

    def _files(self) -> Iterator[tuple[str, os.stat_result, float]]:
        """Name, status and age in seconds of each."""
        now = time.time()
        with os.scandir(self.directory) as files:
            for file in files:
                try:
                    status = file.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield file.name, status, now - status.st_mtime

    def _discard(self, path: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)

    def _discard_damaged(self, path: str, error: FrameError) -> None:
        self._discard(path)
        with no_fork(), self._lock:
            self.damaged += 1
            first = self.damaged == 1
        if first:
            said = f"{path}: the state fails its checks, is deleted and computed again: {error.message}"
            tell(f"{said} (if this is not the first time, check the disk)", CorruptEntryWarning, stacklevel=5)

    def _failed(self, what: str, error: Exception) -> None:
        why = error.message if isinstance(error, StoreError) else error
        tell_of_folder(cache_folder_of(self.directory), f"{self.directory}: {what}: {why} ({FOLDER_HINT})", stacklevel=5)


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
