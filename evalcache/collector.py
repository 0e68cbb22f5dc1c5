"""The garbage collector, out of the way of a bulk of entries."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_BULK = 1000
_paused = False  # of the process, as the collector is


@contextlib.contextmanager
def paused_for(count: int) -> Iterator[None]:
    """No garbage collection while so many entries are in use, or until `resume`.

    They have no cycles and are gone when the block has ended, but enough of them set off passes over the *caller's* whole heap,
    a third of the time of a bulk lookup. To be put around all of their lives: the first pass afterwards goes over what is left.
    """
    global _paused
    mine = count >= _BULK and gc.isenabled()
    if mine:
        gc.disable()
        _paused = True
    try:
        yield
    finally:
        if mine:
            resume()


def resume() -> None:
    """End a pause before its block ends: what computes needs its collector."""
    global _paused
    if _paused:
        _paused = False
        gc.enable()
