"""A progress bar for work of ours that turns out to take long; never for the client's. On stderr, where somebody watches."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

SHOWN_AFTER_S = 2.0


@contextlib.contextmanager
def progress_bar(title: str, *, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A callback ``(done, total)`` that shows a bar once the work has taken `SHOWN_AFTER_S`, and takes it away at the end.

    Args:
        title: what is being done. in_bytes: show the numbers as sizes.

    Thread-safe: the callback may come from several threads.
    """
    began = time.monotonic()
    lock = threading.Lock()
    bar = task = None

    def tell(done: int, total: int) -> None:
        nonlocal bar, task
        if bar is None and (time.monotonic() - began < SHOWN_AFTER_S or sys.stderr is None or not sys.stderr.isatty()):
            return
        with lock:
            if bar is None:
                bar = _bar(in_bytes)
                bar.start()
                task = bar.add_task(title)
            bar.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.stop()


def _bar(in_bytes: bool):  # type: ignore[no-untyped-def]
    # Imported here: rich's bars cost 50 ms, and most work is done before one is needed.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("evalcache: {task.description}"), BarColumn(), amount, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
