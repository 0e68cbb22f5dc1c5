"""Outbox: what a run has to tell, until it is committed: events for the ledger, shared objects, and the seconds that we took.

They go into the store with the entries, in one transaction; the ledger reads them there.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from evalcache.counts import Counts
from evalcache.digest import Digest
from evalcache.errors import EvalCacheError, EvalCacheWarning
from evalcache.journal import Event, Overhead
from evalcache.records import Action, Result
from evalcache.store import Store

FLUSH_S = 2.0


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
        """Whether the store does not answer."""
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

    def commit(self, entries: Sequence[tuple[Digest, Action, Result]] = ()) -> None:
        """One transaction with everything that is due. A fault is a warning: the answers are with the caller."""
        if self.broken or not self._writes:
            self._events.clear()
            return
        with self._counts.taking("write"):
            self._commit(entries)

    def _commit(self, entries: Sequence[tuple[Digest, Action, Result]]) -> None:
        with self._lock:
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
        self._flushed_at = time.monotonic()
        if not (entries or events or objects):
            return
        try:
            self._store.commit(list(entries), events, objects, run=self._run, created_at=time.time())
        except EvalCacheError as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """The store does not answer: say so once, and write nothing more."""
        if not self.broken:
            self.broken = True
            warnings.warn(f"the store does not answer, this run goes on without it: {error}", EvalCacheWarning, stacklevel=4)

    def begin_child(self) -> None:
        """After a fork, in the child: what waits is the parent's to write, and the run the parent's to tell the beginning of."""
        self._lock = threading.RLock()  # a thread that is not here may hold it
        self.started = self.started or bool(self._events)
        self._events.clear()
        self._overhead_told = Counter(self._counts.overhead)
