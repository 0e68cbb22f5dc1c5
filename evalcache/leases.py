"""Leases: what a live process is computing is left to it by the others on the same store.

| row | value, sealed |
|---|---|
| ``worker/<id>`` | host, process id, when that process was born, until when it counts as alive |
| ``lease/<key hex>`` | id of the worker that computes this key |

A lease is worth what its worker is: that of a process which is gone (here, and at once), or which has not renewed its row for
`LEASE_S` (elsewhere, or stopped), is anybody's. So a worker renews one row and not one for each key. Leases save work and
promise nothing: whatever goes wrong with them, a key is computed twice and stored twice, with the same answer.

A process that is alone writes its worker's row and the leases of the first portion that it computes, in one transaction; after
that it asks, now and then and in some 20 µs, whether somebody else has come.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence

from evalcache.canonical import decode, encode_canonical
from evalcache.digest import Digest
from evalcache.errors import CanonicalError, FrameError, StoreError
from evalcache.frame import seal, unseal
from evalcache.rows import Rows
from evalcache.structs import Frozen

LEASE_S = 10.0
RENEW_S = 4.0
_SKEW_S = 60.0  # by so much the clocks of two hosts may differ; where they differ more, both compute
_FORGET_S = 600.0  # rows of workers that ended as long ago are swept away
_LOOK_S = 0.5  # so long a process that was alone takes itself to be, as long as nobody writes
_FIRST_KEYS = 20_000  # a larger first portion is not leased by a process that is alone: the rows would cost more than they may
_WORKERS = ("worker/", "worker0")
_LEASES = ("lease/", "lease0")


class _Worker(Frozen):
    process: tuple[str, int, str]
    expires_at: float


class Leases:
    """The leases that this process holds in a store, and its view of those of others.

    Threads of one process hold them together: two of them that miss the same key at once may both compute it. So may two
    `Leases` of one process. A forked child is another process.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._begin()

    def _begin(self) -> None:
        pid = os.getpid()
        self._process = (_host(), pid, _birth(pid))
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._held: set[Digest] = set()
        self._seen: dict[str, tuple[float, float]] = {}
        self._expires_at = 0.0
        self._alone: tuple[tuple[int, int], float] | None = None
        self._computing = 0
        self._renewing: threading.Thread | None = None
        self.shared = False
        """Whether others were at work when this was asked last."""
        self.met_at = 0.0
        """Unix seconds at which another worker was last alive, as far as is known here."""
        self.turn = 0
        """How many others were at work when this worker began. Two that walk the same way would meet all the time."""

    def _here(self) -> None:
        # After a fork: what the parent holds is the parent's, and a thread that is not here may hold the lock.
        if os.getpid() != self._process[1]:
            self._begin()

    def claim(self, keys: Sequence[Digest]) -> set[Digest]:
        """The keys that are ours to compute now; live processes are computing the others.

        Look up what was claimed *after* this: another process may have finished it just before.

        Raises:
            StoreError: the store cannot be written.
        """
        self._here()
        first = time.time() > self._expires_at - RENEW_S - 1  # or so long ago that nobody has renewed our row
        if not (first or self.others()):
            return set(keys)
        with self._rows.transaction("leasing"):
            others = self._live_others()
            if first:
                self._sweep(others)
                self.turn = len(others)
            self._renew()
            if not (others or (first and len(keys) <= _FIRST_KEYS)):
                return set(keys)
            taken = self._taken(keys, others)
            ours = {key for key in keys if key not in taken}
            self._rows.put((_row(key), seal(_row(key), self._id.encode())) for key in ours)
        with self._lock:
            self._held |= ours
        return ours

    def release(self, keys: Iterable[Digest]) -> None:
        """Give up those of the keys that we hold. Within a transaction it is part of that one.

        Raises:
            StoreError: the store cannot be written.
        """
        if not self._held:
            return
        self._here()
        with self._lock:
            held = self._held.intersection(keys)
        if not held:
            return
        with self._rows.transaction("giving leases up"):
            # As we wrote them: what expired may be another's by now.
            self._rows.remove((_row(key), seal(_row(key), self._id.encode())) for key in held)
        with self._lock:
            self._held -= held

    def others(self) -> bool:
        """Whether other processes are at work on this store. Cost: some 10 µs, and now and then ten times that.

        Raises:
            StoreError: the store cannot be read.
        """
        self._here()
        version = self._rows.version()  # before the rows are read: what is written in between is seen the next time
        if self._alone is not None and self._alone[0] == version and time.monotonic() < self._alone[1]:
            return False
        live = self._live_others()
        self._alone = None if live else (version, time.monotonic() + _LOOK_S)
        return bool(live)

    def any_free(self, keys: Sequence[Digest]) -> bool:
        """Whether `claim` would find any of these keys free. Writes nothing.

        Raises:
            StoreError: the store cannot be read.
        """
        return len(self.taken(keys)) < len(set(keys))

    def taken(self, keys: Sequence[Digest]) -> set[Digest]:
        """Those of the keys that other live processes compute. Writes nothing.

        Raises:
            StoreError: the store cannot be read.
        """
        self._here()
        return self._taken(keys, self._live_others())

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """While the block runs, this worker counts as alive, however long a portion takes."""
        self._here()
        with self._lock:
            self._computing += 1
            if self._renewing is None:
                self._renewing = threading.Thread(target=self._keep_renewing, name="evalcache-leases", daemon=True)
                self._renewing.start()
        pid = self._process[1]
        try:
            yield
        finally:
            if pid == os.getpid() == self._process[1]:
                with self._lock:
                    self._computing -= 1

    # Within

    def _keep_renewing(self) -> None:
        """Renews this worker's row until a while has passed in which nothing was computed."""
        try:
            while True:
                time.sleep(RENEW_S)
                with self._lock:
                    if not self._computing:
                        self._renewing = None
                        return
                with self._rows.transaction("renewing a worker's row"):
                    self._renew()
        except StoreError:
            # Others will take what we hold to be free. Whoever commits next will say what is wrong with the store.
            with self._lock:
                self._renewing = None
        finally:
            self._rows.close()

    def _renew(self) -> None:
        expires_at = time.time() + LEASE_S
        row = f"{_WORKERS[0]}{self._id}"
        self._rows.put([(row, seal(row, encode_canonical([*self._process, expires_at])))])
        self._expires_at = expires_at

    def _workers(self) -> Iterator[tuple[str, _Worker, bytes]]:
        for row, value in self._rows.scan(*_WORKERS, 10_000):
            yield row.removeprefix(_WORKERS[0]), _worker(row, value), value

    def _live_others(self) -> set[str]:
        now = time.time()
        live = set()
        for name, worker, _ in self._workers():
            if worker.process == self._process:
                continue
            if self._is_live(name, worker, now):
                live.add(name)
                self.met_at = now
            elif worker.expires_at < now + LEASE_S:
                self.met_at = max(self.met_at, min(worker.expires_at, now))
        self.shared = bool(live)
        return live

    def _is_live(self, name: str, worker: _Worker, now: float) -> bool:
        host, pid, birth = worker.process
        # A worker renews its row: one that stands unchanged for longer than a lease is dead, whatever the clocks say.
        changed, seen = self._seen.get(name, (0.0, 0.0))
        if changed != worker.expires_at:
            self._seen[name] = (worker.expires_at, seen := time.monotonic())
        if time.monotonic() - seen > LEASE_S:
            return False
        if host == self._process[0]:
            return now < worker.expires_at < now + 2 * LEASE_S and _birth(pid) == birth
        return now - _SKEW_S < worker.expires_at < now + LEASE_S + _SKEW_S

    def _taken(self, keys: Sequence[Digest], others: set[str]) -> set[Digest]:
        """Those of the keys that others compute."""
        if not others:
            return set()
        by_row = {_row(key): key for key in keys}
        taken = set()
        for rows in self._rows.select(list(by_row), []):
            # (A damaged index leads to rows that were not asked for.)
            taken |= {by_row[row] for row, value in rows if row in by_row and _holder(row, value) in others}
        return taken

    def _sweep(self, others: set[str]) -> None:
        """Remove what processes left that ended without a word. Within a transaction."""
        now = time.time()
        working = set(others)
        for name, worker, value in self._workers():
            if worker.process == self._process:
                working.add(name)
            elif abs(worker.expires_at - now) > _FORGET_S:  # one whose clock is that wrong writes its row again
                self._rows.remove([(f"{_WORKERS[0]}{name}", value)])
        after = _LEASES[0]
        while rows := self._rows.scan(after, _LEASES[1], 1000):
            self._rows.remove([(row, value) for row, value in rows if _holder(row, value) not in working])
            after = rows[-1][0]


def is_at_work(row: str, value: bytes) -> bool:
    """Whether a worker's row, read by whoever has no other means to ask, is that of another process which is alive."""
    worker = _worker(row, value)
    host, pid, birth = worker.process
    if host == _host():
        return pid != os.getpid() and bool(birth) and _birth(pid) == birth
    return abs(worker.expires_at - time.time()) < LEASE_S + _SKEW_S


def _worker(row: str, value: bytes) -> _Worker:
    try:
        host, pid, birth, expires_at = decode(unseal(row, value))
        return _Worker((str(host), int(pid), str(birth)), float(expires_at))
    except (FrameError, CanonicalError, ValueError, TypeError):
        return _Worker(("", 0, ""), 0.0)


def _row(key: Digest) -> str:
    return f"{_LEASES[0]}{key.hex}"


def _holder(row: str, value: bytes) -> str:
    try:
        return unseal(row, value).decode()
    except (FrameError, UnicodeDecodeError):
        return ""


@functools.cache
def _host() -> str:
    """Where process ids mean the same: containers of one machine may share its name, not its processes."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return f"{platform.node()} {processes}"


def _birth(pid: int) -> str | None:
    """When a process of this host began, so that one with a dead one's id is not taken for it; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name, in brackets, may hold anything. A zombie has ended, though its parent has not asked after it yet.
            state, *fields = file.read().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return None
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (OSError, OverflowError):
        pass
    return ""


def is_one_of_several_ranks() -> bool:
    """Ranks of one launch may have to take part in each other's forwards: all of them compute what all of them miss."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        return True
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
