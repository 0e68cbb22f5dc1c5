"""Watch: one live model as the cache sees it, with the computed batches that wait for its next check."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from evalcache.digest import Digest
from evalcache.manifest import Manifest
from evalcache.records import Action, Result
from evalcache.structs import Struct


class Batch(Struct):
    """Computed results that wait for the check which lets them in; ``accept`` is called by it, for what else was computed."""

    root: Digest
    entries: list[tuple[Digest, Action, Result]]
    since: float
    accept: Callable[[], object] | None = None


class Watch:
    """One live model as the cache sees it.

    Args:
        fingerprint: reads every byte of the model and returns its manifest; called whenever control has been elsewhere.
        name: what the caller calls the model. role: of a model among several in one run.
        subject: the model; kept alive while a batch of it waits for a check, and not a moment longer.

    ``read_seconds`` is what the last reading took, and ``check_seconds`` what the next one will take: 0 where the last one met
    the model or a change of it. That one looked at everything afresh and says nothing of those that follow, and a model that is
    being trained may change before the next call does its check.
    """

    def __init__(self, fingerprint: Callable[[], Manifest], name: str = "", role: str = "", subject: Any = None) -> None:
        self.name = name
        self.role = role
        self.manifest: Manifest | None = None
        self.read_seconds = self.check_seconds = 0.0
        self.lock = threading.RLock()
        self._fingerprint = fingerprint
        self.pending: list[Batch] = []
        self._subject = (lambda: None) if subject is None else weakref.ref(subject)
        self._held: Any = None

    def take(self) -> list[Batch]:
        """What waits, which then waits no more."""
        batches, self.pending, self._held = self.pending, [], None
        return batches

    def put(self, batch: Batch) -> None:
        """Let a computed batch wait for the next check."""
        self.pending.append(batch)
        self._held = self._subject()

    def read(self) -> Manifest:
        """Read the model now."""
        before, began = self.manifest, time.perf_counter()
        try:
            self.manifest = self._fingerprint()
        finally:
            self.read_seconds = time.perf_counter() - began
        same = before is not None and before.root == self.manifest.root
        self.check_seconds = self.read_seconds if same else 0.0
        return self.manifest
