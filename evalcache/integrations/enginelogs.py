"""What transformers logs while a call is resolved: it will say so itself when it computes, and must not say it twice."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

_one_at_a_time = threading.RLock()


class Told:
    """What the engine logged while a call was resolved; the call itself will say it again, unless nothing is computed."""

    def __init__(self) -> None:
        self.said: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def repeat(self) -> None:
        """Say it now, since no call will."""
        for say, args in self.said:
            say(*args)


@contextlib.contextmanager
def buffered_logs() -> Iterator[Told]:
    """Keep the engine's warnings back inside the block; they can be repeated after it."""
    with _one_at_a_time:
        yield from _buffered()


def _buffered() -> Iterator[Told]:
    told = Told()
    names = ("transformers.generation.utils", "transformers.generation.configuration_utils")
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        for method in ("warning", "warning_once"):
            say = getattr(logger, method)
            setattr(logger, method, functools.partial(_note, told, say))
    try:
        yield told
    finally:
        for logger in loggers:
            for method in ("warning", "warning_once"):
                vars(logger).pop(method, None)


def _note(told: Told, say: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    told.said.append((say, args))
