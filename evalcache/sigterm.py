"""SIGTERM: a scheduler takes the machine away, and Python would end on the spot. First what was computed is kept.

Nothing is raised into the script: its own ``finally`` and ``except`` would not have run without us either, and one that catches
everything would go on for ever. Everything happens within the signal's handler, and then the process ends by the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

GRACE_S = 20.0
"""What is done between the signal and the end may take so long: the script may hold a lock that is needed, and cannot go on."""

_depth = 0
_put_off: Callable[[], None] | None = None


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """What the block does is not cut in two by the end that `end_at_sigterm` makes: it comes after the block."""
    global _depth, _put_off
    if threading.current_thread() is not threading.main_thread():  # which goes on while the main one handles a signal
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _put_off is not None and not _depth:
            end, _put_off = _put_off, None
            end()


def end_at_sigterm(close: Callable[[int], None]) -> Callable[[], None]:
    """See to it that ``close(signal number)`` is called before SIGTERM ends this process.

    Only where it would end it on the spot: a script or a library that handles the signal goes on doing so. A second SIGTERM ends
    the process at once.

    Returns:
        What puts everything back.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return lambda: None
    process = os.getpid()

    def end() -> None:
        watchdog = threading.Timer(GRACE_S, os.kill, (process, signal.SIGTERM))
        watchdog.daemon = True
        watchdog.start()
        try:
            close(int(signal.SIGTERM))
        finally:
            os.kill(process, signal.SIGTERM)

    def handle(number: int, _: Any) -> None:
        global _put_off
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a child that was forked past Python
            os.kill(os.getpid(), number)
        elif _depth:
            _put_off = end
        else:
            end()

    def put_back() -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=put_back)
    return put_back
