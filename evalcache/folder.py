"""Where the cache folder is."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def default_folder() -> Path:
    """``EVALCACHE_DIR``, or the user's cache folder. Not made here."""
    given = os.environ.get("EVALCACHE_DIR")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("evalcache"))
