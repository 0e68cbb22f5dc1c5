"""The garbage collector, out of the way of a bulk of entries."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_BULK = 1000


@contextlib.contextmanager
def paused_for(count: int) -> Iterator[None]:
    """No garbage collection while so many entries are in use: they have no cycles and are gone when the call has ended, but
    enough of them set off passes over the *caller's* whole heap, a third of the time of a bulk lookup."""
    pause = count >= _BULK and gc.isenabled()
    if pause:
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()
