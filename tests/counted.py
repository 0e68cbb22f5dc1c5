"""evalcache in a test's own process, and what it counted there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evalcache
from evalcache import session as sessions


@dataclass
class Told:
    """What a run counted."""

    hits: int
    misses: int
    loads: int
    uncacheable: dict[str, int]
    duplicates: int


@contextlib.contextmanager
def cached(folder: Path, **settings: Any) -> Iterator[Callable[[], Told]]:
    """Inside the block evalcache is on; yields a function that says what it has counted, the check of the last batch included."""
    with evalcache.enable(folder, **settings) as session:
        assert session.cache is not None
        counts = session.cache.counts

        def told() -> Told:
            session.cache.flush()
            return Told(counts.hits, counts.misses, counts.model_loads, dict(counts.uncacheable), counts.duplicates)

        yield told
    sessions._current = None
