"""Patches: put functions in the place of a library's own, and put the originals back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from evalcache.code import ORIGINAL


class Patches:
    """What was replaced, to be put back in reverse order. Our functions carry the original: `code.is_ours` knows them by it."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any]] = []

    def replace(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put ``make(original)`` in the place of ``owner.name``; nothing where that is ours already.

        Args:
            owner: a class or a module, which has ``name`` itself. make: the original function → ours.
        """
        original = vars(owner)[name]
        if hasattr(original, ORIGINAL):
            return
        ours = functools.wraps(original)(make(original))
        setattr(ours, ORIGINAL, original)
        setattr(owner, name, ours)
        self._done.append((owner, name, original, ours))

    def undo(self) -> None:
        """Put everything back but what somebody else has replaced since: it is theirs to restore."""
        while self._done:
            owner, name, original, ours = self._done.pop()
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)
