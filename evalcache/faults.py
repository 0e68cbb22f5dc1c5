"""Faults that cost a warning and nothing else: each said once, and none ever ends the run that meets it."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from pathlib import Path

from evalcache.errors import EvalCacheWarning
from evalcache.visible import visible

FOLDER_HINT = "check its rights and space, or set EVALCACHE_DIR"
"""What to do about a cache folder that cannot be used."""

_told: set[str] = set()
_telling = threading.Lock()


def tell(text: str, category: type[EvalCacheWarning] = EvalCacheWarning, *, stacklevel: int = 2) -> None:
    """A warning; where the script turns warnings into errors (``python -W error``), a line on stderr.

    Args:
        stacklevel: as of `warnings.warn`, counted from the caller.
    """
    try:
        warnings.warn(visible(text), category, stacklevel=stacklevel + 1)
    except EvalCacheWarning:
        if sys.stderr is not None:
            print(f"evalcache: warning: {visible(text)}", file=sys.stderr)


def tell_of_folder(folder: str | os.PathLike[str], text: str, *, stacklevel: int = 2) -> None:
    """A warning about a cache folder that cannot be read or written, once a process, whichever of its files is met first.

    A full disk fails the store, the ledger and the side tables alike: one of them says so.
    """
    name = os.path.abspath(folder)
    with _telling:
        known = name in _told
        _told.add(name)
    if not known:
        tell(text, stacklevel=stacklevel + 1)


def forget(folder: str | os.PathLike[str]) -> None:
    """The folder is in use again: what is wrong with it later is news."""
    with _telling:
        _told.discard(os.path.abspath(folder))


def cache_folder_of(file: str | os.PathLike[str]) -> Path:
    """The cache folder of one of its files or of its store."""
    return Path(file).absolute().parent
