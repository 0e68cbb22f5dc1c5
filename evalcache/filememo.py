"""FileMemo: what is known about a file's content, for as long as the file has not been touched.

A file is known again by (real path, size, mtime, ctime, inode). ctime is what makes this safe against tools that restore a
file's size and mtime: no ordinary call sets it. What stays outside are writers through mmap, whose change of the times may come
late, and network mounts that keep their own idea of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from evalcache.canonical import decode, encode_canonical
from evalcache.errors import CanonicalError
from evalcache.folder import default_folder, local_folder
from evalcache.sidetable import SideTable
from evalcache.structs import Frozen

SETTLED_NS = 2_000_000_000
"""A file that was touched less than this before it was read is not remembered: another change could leave the same times
behind, since file systems count in steps of up to two seconds (FAT).

Source: git's "racy" index entries, Documentation/technical/racy-git.txt.
"""


class FileStamp(Frozen):
    """By what a file is known again. Times in nanoseconds since 1970."""

    real_path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | os.PathLike[str], status: os.stat_result | None = None) -> FileStamp:
        """The stamp of the file at ``path``, links followed; ``status`` where it has been asked for already.

        Raises:
            OSError: there is no such file.
        """
        found = os.stat(path) if status is None else status
        real_path = os.path.realpath(path)
        return cls(real_path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change after ``now_ns`` is sure to leave other times than these."""
        return now_ns - max(self.mtime_ns, self.ctime_ns) >= SETTLED_NS


class FileMemo:
    """Facts about files by their stamps, kept between processes.

    Args:
        directory: the cache folder; None means ``EVALCACHE_DIR``, or the user's cache folder.
        clock_ns: the wall clock that file times are compared with.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self.now_ns = clock_ns
        self._table = SideTable(os.path.join(local_folder(default_folder()) if directory is None else directory, "files.sqlite"))

    def recall(self, kind: str, stamp: FileStamp) -> Any:
        """What was remembered under ``kind`` for a file with this stamp, or None.

        Cost: one look-up.
        """
        found = self._table.get(_key(kind, stamp))
        if found is None:
            return None
        try:
            times, fact = decode(found)
        except (CanonicalError, TypeError, ValueError):
            return None  # a good checksum over something else than we write: read the file again
        return fact if times == _times(stamp) else None

    def remember(self, kind: str, stamp: FileStamp, fact: Any, read_at_ns: int) -> bool:
        """Keep a canonical value for a file that was read from ``read_at_ns`` on; False if the file had not settled by then.

        It takes the place of what was known of an earlier file at that path.
        """
        return stamp.is_settled(read_at_ns) and self._table.put(_key(kind, stamp), encode_canonical([_times(stamp), fact]))


def _key(kind: str, stamp: FileStamp) -> bytes:
    return encode_canonical([kind, os.fsencode(stamp.real_path)])  # a file's name is bytes that need not be UTF-8


def _times(stamp: FileStamp) -> list[int]:
    return [stamp.size_bytes, stamp.mtime_ns, stamp.ctime_ns, stamp.inode % (1 << 64)]  # Windows' file ids have 128 bits
