"""Outbox: what a run has to tell, until it is committed: events for the ledger, shared objects, and the seconds that we took.

They go into the store with the entries, in one transaction; the ledger reads them there. What a store does not take (its disk is
full, its folder is gone) is held in memory and offered again, so that a fault which passes costs nothing but a warning.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from evalcache.counts import Counts
from evalcache.digest import Digest
from evalcache.errors import EvalCacheError, FrameError, StoreError, StoreGoneError
from evalcache.faults import cache_folder_of, forget, tell_of_folder
from evalcache.frame import size_bytes_of
from evalcache.journal import Event, Overhead, RunStarted
from evalcache.records import Action, Result
from evalcache.sigterm import undivided
from evalcache.store import Store

FLUSH_S = 2.0
RETRY_S = 30.0
"""A store that did not answer is tried again after this; later, where a try takes more than `RETRY_SHARE` of the time."""
RETRY_SHARE = 0.01
HELD_BYTES = 256 << 20
"""Most of results that are held for a store which does not answer; the eldest go first."""
HELD_EVENTS = 10_000
_PATIENCE_S = 2.0  # a store that made its last try wait longer than this is not tried again at the end


class Outbox:
    """What one run has to tell its store.

    Args:
        begin: gives the event that the run begins with, asked for with the first commit.
        writes: whether anything is written at all.

    Thread-safe.
    """

    def __init__(self, store: Store, run: str, counts: Counts, begin: Callable[[], Event], *, writes: bool) -> None:
        self.started = False
        """Whether the run has told of its beginning."""
        self.broken = False
        """Whether the store did not answer the last time."""
        self._writes = writes
        self._store = store
        self._run = run
        self._counts = counts
        self._begin = begin
        self._lock = threading.RLock()
        self._events: list[Event] = []
        self._objects: dict[str, bytes] = {}
        self._overhead_told: Counter[str] = Counter()
        self._flushed_at = time.monotonic()
        # What a store has not taken yet.
        self._entries: list[tuple[Digest, Action, Result]] = []
        self._kept: dict[str, bytes] = {}
        self._retry_at = 0.0
        self._try_s = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing was ever told."""
        return not (self.started or self._events or self._objects)

    def tell(self, event: Event) -> None:
        """Tell the ledger something with the next commit."""
        with self._lock:
            self._events.append(event)

    def put_object(self, name: str, data: bytes) -> None:
        """Keep a shared object with the next commit."""
        with self._lock:
            self._objects[name] = data

    def get_object(self, name: str) -> bytes | None:
        """A shared object that waits."""
        with self._lock:
            return self._objects.get(name)

    def commit_if_due(self) -> None:
        """Every `FLUSH_S` seconds."""
        if time.monotonic() - self._flushed_at > FLUSH_S:
            self.commit()

    def commit(self, entries: Sequence[tuple[Digest, Action, Result]] = (), *, last: bool = False) -> None:
        """One transaction with everything that is due. A fault is a warning: the answers are with the caller.

        Args:
            last: the run ends; a store that did not answer is asked once more, unless that takes long.
        """
        if not self._writes:
            self._events.clear()
            return
        with self._lock:
            self._entries.extend(entries)
            if self.broken and time.monotonic() < self._retry_at and not (last and self._try_s < _PATIENCE_S):
                self._hold_less()
                return
        with undivided(), self._counts.taking("write"):
            self._commit()

    def _commit(self) -> None:
        with self._lock:
            entries, self._entries = self._entries, []
            if not self.started and (self._events or entries):
                self.started = True
                self._events.insert(0, self._begin())
            due = {kind: value - self._overhead_told[kind] for kind, value in self._counts.overhead.items()}
            due = {kind: value for kind, value in due.items() if value > 0}
            if due and self.started:
                self._events.append(Overhead(self._run, time.time(), due))
                self._overhead_told.update(due)
            events, self._events = self._events, []
            objects, self._objects = self._objects, {}
            self._kept |= objects
        self._flushed_at = began = time.monotonic()
        if not (entries or events or objects):
            return
        try:
            try:
                if self.broken:
                    self._reopen(events, objects)
                self._store.commit(entries, events, objects, run=self._run, created_at=time.time())
            except StoreGoneError:
                self._reopen(events, objects)
                self._store.commit(entries, events, objects, run=self._run, created_at=time.time())
            if self.broken:
                self.broken = False
                forget(cache_folder_of(self._store.directory))
        except EvalCacheError as error:
            self._try_s = time.monotonic() - began
            self.give_up(error)
            if isinstance(error, StoreError) and not isinstance(error.__cause__, FrameError):
                with self._lock:  # else these very entries are what it refuses, and would be refused again
                    self._entries, self._events = [*entries, *self._entries], [*events, *self._events]
                    self._objects = objects | self._objects
                    self._hold_less()

    def _reopen(self, events: list[Event], objects: dict[str, bytes]) -> None:
        """Open a store that has failed. One that was deleted is a new one, which is told everything from the beginning."""
        if self._store.reopen():
            folder = self._store.directory
            tell_of_folder(
                cache_folder_of(folder),
                f"{folder} was deleted or replaced while this run used it: what it held is gone from it, the run goes on with a "
                "new one (set EVALCACHE_DIR to a folder that is not cleaned up)",
                stacklevel=5,
            )
            objects.update(self._kept | objects)
            if self.started and not (events and isinstance(events[0], RunStarted)):
                events.insert(0, self._begin())

    def _hold_less(self) -> None:
        """Let the eldest go of what is too much to be held."""
        size = sum(size_bytes_of(result) for _, _, result in self._entries)
        gone = 0
        while size > HELD_BYTES:
            size -= size_bytes_of(self._entries[gone][2])
            gone += 1
        del self._entries[:gone]
        if len(self._events) > HELD_EVENTS:
            del self._events[1 : len(self._events) - HELD_EVENTS + 1]  # the first may be the run's beginning

    def give_up(self, error: Exception) -> None:
        """The store does not answer: say so once, go on without it, and try again later."""
        self.broken = True
        if isinstance(error, StoreGoneError):
            self._retry_at = 0.0  # the next commit makes it anew
            return
        self._retry_at = time.monotonic() + max(RETRY_S, self._try_s / RETRY_SHARE)
        tell_of_folder(
            cache_folder_of(self._store.directory),
            f"the store does not answer, this run goes on without it and tries again now and then: {error}",
            stacklevel=4,
        )

    def begin_child(self) -> None:
        """After a fork, in the child: what waits is the parent's to write, and the run the parent's to tell the beginning of."""
        self._lock = threading.RLock()  # a thread that is not here may hold it
        self.started = self.started or bool(self._events)
        self._events.clear()
        self._entries.clear()
        self._overhead_told = Counter(self._counts.overhead)
