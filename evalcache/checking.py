"""Checking: what was computed waits until a check of its model, after it, has found what the check before it found.

Only then does it enter the store. The answers are with the caller in any case.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from evalcache.counts import Counts
from evalcache.digest import Digest
from evalcache.errors import FingerprintError
from evalcache.frame import size_bytes_of
from evalcache.manifest import Manifest
from evalcache.outbox import Outbox
from evalcache.serving import Made
from evalcache.sigterm import undivided
from evalcache.watch import Batch, Watch

CHECK_SHARE = 0.002
"""A check that costs less than this share of a batch is made at once; else the one that opens the next call serves both. Two
checks a call, then, cost well under 1 % of it."""
PENDING_S = 10.0
RESULT_LIMIT_BYTES = 256 << 20
"""A result larger than this (the scores of a long batch over a large vocabulary) is not stored."""


class Checking:
    """The checks of one run's models, and what waits for them.

    Args:
        meet: told of each manifest that was read.

    Thread-safe.
    """

    def __init__(self, outbox: Outbox, counts: Counts, meet: Callable[[Watch, Manifest], None]) -> None:
        self._outbox = outbox
        self._counts = counts
        self._meet = meet
        self._lock = threading.Lock()
        self._watches: list[Watch] = []

    @property
    def empty(self) -> bool:
        """Whether there are no models."""
        return not self._watches

    def watch(self, watch: Watch) -> Watch:
        """Register a model, so that `flush` checks it. Lets other models go."""
        self.let_go()
        with self._lock:
            self._watches.append(watch)
        return watch

    def open(self, watch: Watch) -> Manifest:
        """Check a model, and let in what was computed since the last check.

        Raises:
            FingerprintError: the model cannot be hashed exactly now; what waited is not stored.
        """
        with watch.lock, undivided():
            try:
                with self._counts.taking("fingerprint" if watch.manifest is None else "checks"):
                    manifest = watch.read()
            except FingerprintError:
                self._drop(watch)
                raise
            self._settle(watch, manifest)
            self._meet(watch, manifest)
            return manifest

    def wait(self, watch: Watch, root: Digest, entries: Sequence[Made], now: bool) -> None:
        """Let what was computed by the model ``root`` wait for the next check, or check ``now``."""
        storable = [entry for entry in entries if size_bytes_of(entry[2]) <= RESULT_LIMIT_BYTES]
        self._not_stored("too_large", len(entries) - len(storable))
        if not storable:
            return
        with watch.lock:
            watch.put(Batch(root, storable, time.monotonic()))
            busy_s = sum(result.cost.seconds for _, _, result in entries if result.cost)
            waited_s = time.monotonic() - watch.pending[0].since
            if now or watch.check_seconds < CHECK_SHARE * busy_s or waited_s > PENDING_S:
                # A refusal has dropped and counted what waited.
                with contextlib.suppress(FingerprintError):
                    self.open(watch)

    def let_go(self) -> bool:
        """Check what waits of models that no call is busy with. Says whether something waited.

        What waits for its check keeps its model alive: a script that has deleted it may need the memory for the next one.
        """
        waited = False
        for watch in list(self._watches):
            if watch.pending and watch.lock.acquire(blocking=False):
                waited = True
                try:
                    self.open(watch)
                except Exception:  # control is not with a call of ours: whatever fails here, the script goes on
                    self._drop(watch)
                finally:
                    watch.lock.release()
        return waited

    def flush(self) -> None:
        """Check what waits of all models."""
        for watch in list(self._watches):
            if watch.pending:
                # A refusal has dropped and counted what waited.
                with contextlib.suppress(FingerprintError):
                    self.open(watch)

    def begin_child(self) -> None:
        """After a fork, in the child: what waits is the parent's."""
        self._lock = threading.Lock()  # a thread that is not here may hold it
        for watch in self._watches:
            watch.lock = threading.RLock()
            watch.take()

    def _settle(self, watch: Watch, manifest: Manifest) -> None:
        batches = watch.take()
        unchanged = [batch for batch in batches if batch.root == manifest.root]
        good = [entry for batch in unchanged for entry in batch.entries]
        self._not_stored("changed", sum(len(batch.entries) for batch in batches) - len(good))
        if good:
            self._outbox.commit(good)
        for batch in unchanged:
            if batch.accept is not None:
                batch.accept()

    def _drop(self, watch: Watch) -> None:
        batches = watch.take()
        self._not_stored("changed", sum(len(batch.entries) for batch in batches))

    def _not_stored(self, reason: str, number: int) -> None:
        # The caller has these answers; the store must not.
        if number:
            self._counts.not_stored += number
            self._counts.misses -= number
            self._counts.uncacheable[reason] += number
