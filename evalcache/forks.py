"""Forks: a process does not divide while one of its threads is within SQLite. Knows nothing of us.

SQLite's own locks stand in memory, and memory is what a child gets: one that another thread holds at that moment is held in the
child for ever, by nobody, and the child's first question to SQLite never returns. So each thread holds a lock of its own while it
is in there, which costs it a tenth of a microsecond, and who forks takes those of all the others first.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Any

WAIT_S = 5.0
"""So long a fork waits for the others; then it goes on as it would have without us."""


class _Gate(threading.local):
    def __init__(self) -> None:
        self.lock = threading.RLock()
        with _making:
            _gates.add(self.lock)


_making = threading.Lock()  # held while the process divides: a new thread waits outside
_gates: weakref.WeakSet = weakref.WeakSet()
_gate = _Gate()
_held: list = []


def no_fork() -> Any:
    """What this thread holds while it is within SQLite, as a context manager: for a statement or two, for others wait to fork."""
    return _gate.lock


def _before() -> None:
    until = time.monotonic() + WAIT_S
    if _making.acquire(timeout=WAIT_S):
        _held.append(_making)
    for lock in list(_gates):
        if lock.acquire(timeout=max(0.0, until - time.monotonic())):
            _held.append(lock)


def _after_in_parent() -> None:
    while _held:
        _held.pop().release()


def _after_in_child() -> None:
    global _making, _gates, _gate
    _held.clear()
    _making = threading.Lock()
    _gates = weakref.WeakSet()
    _gate = _Gate()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
