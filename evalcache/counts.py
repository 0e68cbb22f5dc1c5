"""Counts: what one run has met so far, kept while it goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from evalcache.digest import Digest
from evalcache.structs import Struct, field

_adding = threading.Lock()


class _Inner(threading.local):
    """Seconds that were counted within each block that this thread is in."""

    def __init__(self) -> None:
        self.seconds: list[float] = []


class Components(Struct):
    """What forwards that began above the first layer spared: rows, and measured seconds, those of reading states subtracted.

    ``declined``: forwards that ran whole because that was quicker. ``refused``: why others did.
    """

    resumed: int = 0
    whole: int = 0
    spared_seconds: float = 0.0
    declined: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class Counts(Struct):
    """What one run has met so far. Seconds are measured ones; ``models`` maps a model's name to its root.

    ``overhead``: seconds that evalcache itself took, by kind (`journal.OVERHEAD_KINDS`); see `taking`.
    """

    hits: int = 0
    misses: int = 0
    duplicates: int = 0
    uncacheable: Counter[str] = field(default_factory=Counter)
    model_loads: int = 0
    model_load_seconds: float = 0.0
    credited_seconds: float = 0.0
    duplicate_seconds: float = 0.0
    spent_seconds: float = 0.0
    overhead: Counter[str] = field(default_factory=Counter)
    models: dict[str, Digest] = field(default_factory=dict)
    not_stored: int = 0
    components: Components = field(default_factory=Components)
    _inner: _Inner = field(default_factory=lambda: _Inner())

    @contextlib.contextmanager
    def taking(self, kind: str) -> Iterator[None]:
        """Count what the block takes as seconds of ours, without what is counted within it: no second counts twice.

        An empty kind is not ours: the model's loading, computing. Cost: about 2 µs.
        """
        inner = self._inner.seconds
        inner.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - began
            inside_s = inner.pop()
            if inner:
                inner[-1] += took_s
            if kind:
                with _adding:
                    self.overhead[kind] += took_s - inside_s

    def add(self, outcomes: Iterable[str], reasons: Iterable[str], seconds: Iterable[float | None]) -> None:
        """Count what became of requests, one of each column for each; see `journal.LookedUp`."""
        for outcome, reason, cost_s in zip(outcomes, reasons, seconds, strict=True):
            if outcome == "duplicate":
                self.duplicates += 1
                self.duplicate_seconds += cost_s or 0.0
            elif outcome == "hit":
                self.hits += 1
                if reason == "own":  # computed by this very run: no saving
                    self.duplicate_seconds += cost_s or 0.0
                else:
                    self.credited_seconds += cost_s or 0.0
            elif outcome == "uncacheable":
                self.uncacheable[reason] += 1
            else:
                self.misses += 1
                self.spent_seconds += cost_s or 0.0

    def block(self) -> dict[str, Any]:
        """What was reused so far, for a client's own results. JSON."""
        overhead_s = sum(self.overhead.values())
        return {
            "hits": self.hits,
            "misses": self.misses,
            "uncacheable": dict(self.uncacheable),
            "duplicates": self.duplicates,
            "model_loads": self.model_loads,
            "saved_seconds": self.credited_seconds - overhead_s,
            "overhead_seconds": overhead_s,
            "models": {name: str(root) for name, root in self.models.items()},
        }
