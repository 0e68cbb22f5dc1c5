"""How this process ended: ``ok``, ``failed`` or ``interrupted``, and its exit code where that can be known.

An uncaught exception is in ``sys.last_value``, which Python sets before it calls any excepthook; so the hooks are left alone. The
code of a SystemExit is cleared before ``atexit`` runs, so ``sys.exit`` notes it in passing; a bare ``raise SystemExit(3)`` leaves
no trace and counts as ``ok`` with an unknown code. A supervising parent would know, and was rejected (`launch.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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


def end_with_server(server: type, close: Callable[[int], None]) -> Callable[[], None]:
    """See to it that ``close(signal number)`` is called before a uvicorn server that was told to stop ends its process.

    uvicorn shuts down in peace, and then sends itself the signal once more: by its default that ends Python on the spot, and no
    ``atexit`` function runs. A signal handler of our own was rejected: what computes would have to end first, and who sends
    SIGTERM means it.

    Args:
        server: ``uvicorn.Server``.

    Returns:
        What puts everything back.
    """
    import contextlib  # here, for a Python that starts needs none of these
    import functools
    import signal

    original = vars(server)["capture_signals"]

    @contextlib.contextmanager
    def capturing(self: Any) -> Iterator[None]:
        at_once = {number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is signal.SIG_DFL}
        with original(self):
            yield
            # It may hold others that are none of the process's end.
            if deadly := [number for number in getattr(self, "_captured_signals", ()) if number in at_once]:
                close(int(deadly[-1]))

    def put_back() -> None:
        if vars(server).get("capture_signals") is ours:
            server.capture_signals = original  # type: ignore[attr-defined]

    ours = functools.wraps(original)(capturing)
    server.capture_signals = ours  # type: ignore[attr-defined]
    return put_back


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


def stay_interrupted() -> None:
    """Have Python end as it does after a Ctrl-C, killed by SIGINT, although something ran since.

    Python remembers that the *last* code which it ran from source ended in KeyboardInterrupt, and a module that is imported while
    we say our line (a dataclass is made by `exec`) makes it forget.
    """
    try:
        exec("raise KeyboardInterrupt")
    except KeyboardInterrupt:
        return


def _noting_exit(status: Any = None, /) -> None:
    import threading  # here, for a Python that starts needs it only now

    global _seen
    if threading.current_thread() is threading.main_thread():
        code = 0 if status is None else int(status) if isinstance(status, int) else 1
        _seen = (code, _progress(), _last_error())
    _bare_exit(status)


def _last_error() -> BaseException | None:
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
