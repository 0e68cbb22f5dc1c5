"""Where the cache folder is."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from evalcache.errors import StoreError


def default_folder() -> Path:
    """``EVALCACHE_DIR``, or the user's cache folder. Not made here."""
    given = os.environ.get("EVALCACHE_DIR")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("evalcache"))


def make_folder(folder: Path) -> None:
    """Make a cache folder, for its owner alone: what it holds are somebody's prompts and answers. One that exists stays as it is.

    Raises:
        StoreError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        hint = "check its rights and space, or set EVALCACHE_DIR"
        raise StoreError(f"the cache folder {folder} cannot be made: {error.strerror}", hint=hint, path=str(folder)) from error
