"""Which files are opened, by whatever means: inotify sees what Rust and C do, too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

needs_inotify = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs inotify")
_IN_OPEN = 0x20


class Opened:
    """Watches some files, inside a block."""

    def __init__(self, *files: Path) -> None:
        kernel = ctypes.CDLL(None, use_errno=True)
        self._watcher = kernel.inotify_init1(os.O_NONBLOCK)
        assert self._watcher >= 0
        self._watched = {kernel.inotify_add_watch(self._watcher, os.fsencode(file), _IN_OPEN): file for file in files}
        assert -1 not in self._watched and len(self._watched) == len(files)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._watcher)

    def files(self) -> list[Path]:
        """Those opened since the last call, each as often as it was."""
        found, events = [], b""
        with contextlib.suppress(BlockingIOError):
            events = os.read(self._watcher, 1 << 16)
        while events:
            place, _, _, length = struct.unpack("iIII", events[:16])
            found.append(self._watched[place])
            events = events[16 + length :]
        return found

    def count(self) -> int:
        """How often they were opened since the last call."""
        return len(self.files())
