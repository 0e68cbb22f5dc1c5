"""How this process ended: ``ok``, ``failed`` or ``interrupted``, and its exit code where that can be known.

An uncaught exception is in ``sys.last_value``, which Python sets before it calls any excepthook; so the hooks are left alone. The
code of a SystemExit is cleared before ``atexit`` runs, so ``sys.exit`` notes it in passing; a bare ``raise SystemExit(3)`` leaves
no trace and counts as ``ok`` with an unknown code. A supervising parent would know, and was rejected (`launch.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_bare_exit = sys.exit
_progress: Callable[[], int] = int
_seen: tuple[int, int, Any] | None = None


def watch_exit(progress: Callable[[], int]) -> None:
    """Note the code of every `sys.exit` from here on.

    Args:
        progress: a number that grows as long as the program goes on; where it has grown since, the SystemExit was caught.
    """
    global _progress, _seen
    _progress, _seen = progress, None
    sys.exit = _noting_exit


def unwatch_exit() -> None:
    """Put `sys.exit` back, unless somebody else has replaced it since."""
    if sys.exit is _noting_exit:
        sys.exit = _bare_exit


def how_it_ended() -> tuple[str, int | None]:
    """(status, exit code or None where it is not known). Asked while Python shuts down."""
    error = _last_error()
    if _seen is not None:
        code, progress, error_then = _seen
        # Otherwise that SystemExit was caught: the program went on, or failed later.
        if progress == _progress() and error is error_then:
            return ("ok" if code == 0 else "failed"), code
        error = None if error is error_then else error
    if error is not None and not hasattr(sys, "ps1"):  # at a prompt, the last error did not end anything
        return ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else ("failed", 1)
    return "ok", None


def _noting_exit(status: Any = None, /) -> None:
    import threading  # here, for a Python that starts needs it only now

    global _seen
    if threading.current_thread() is threading.main_thread():
        code = 0 if status is None else int(status) if isinstance(status, int) else 1
        _seen = (code, _progress(), _last_error())
    _bare_exit(status)


def _last_error() -> BaseException | None:
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
