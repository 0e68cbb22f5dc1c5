"""Where the cache folder is, and where on this machine it is worked in.

SQLite and DuckDB lock and map their files, which network file systems do badly or not at all. Where the cache folder lies on one
(cluster homes do), the store and the ledger are in a folder on a local disk instead, and the cache folder holds what the machines
exchange (`segments.py`).
"""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
from pathlib import Path

import platformdirs

from evalcache.digest import digest_bytes
from evalcache.errors import EvalCacheError, StoreError
from evalcache.faults import FOLDER_HINT

_REMOTE = {
    0x6969: "nfs", 0x517B: "smb", 0xFE534D42: "smb2", 0xFF534D42: "cifs", 0x0BD00BD0: "lustre", 0x47504653: "gpfs",
    0x19830326: "beegfs", 0x00C36400: "ceph", 0x01021997: "9p", 0x5346414F: "afs", 0x6B414653: "afs", 0x73757245: "coda",
    0x7461636F: "ocfs2", 0x01161970: "gfs2", 0xAAD7AAEA: "panfs", 0x013111A8: "ibrix", 0xBEEFDEAD: "snfs", 0x564C: "ncp",
    0x20030528: "orangefs", 0xBACBACBC: "vmhgfs", 0x7C7C6673: "prl_fs", 0x786F4256: "vboxsf", 0xA501FCF5: "vxfs",
}  # fmt: skip
"""statfs types of file systems that several machines may share. Source: GNU coreutils, src/stat.c, those marked remote."""
_FUSE = 0x65735546
_COPY_ON_WRITE = {0x9123683E, 0xCA451A4E, 0xF2F52010, 0x3434, 0x2FC12FC1}  # btrfs, bcachefs, f2fs, nilfs, ZFS
_LOCAL_FUSE = re.compile(r"fuseblk|fuse\.(mergerfs|bindfs|encfs|gocryptfs|cryfs|unionfs(-fuse)?|fuse-overlayfs|lxcfs|ntfs-3g)")


def default_folder() -> Path:
    """``EVALCACHE_DIR``, or the user's cache folder. Not made here."""
    given = os.environ.get("EVALCACHE_DIR")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("evalcache"))


def local_folder(folder: Path) -> Path:
    """Where the store and the ledger of a cache folder are: in itself, or, where that is shared by machines, on a local disk.

    Raises:
        EvalCacheError: ``EVALCACHE_NETWORK`` is neither 0 nor 1. StoreError: there is no safe place on a local disk.

    Cost: one statfs.
    """
    if not is_shared(folder):
        return folder
    return _local_base() / "shared" / digest_bytes(os.fsencode(os.path.realpath(folder))).hex


def is_shared(folder: Path) -> bool:
    """Whether a cache folder is shared by machines: ``EVALCACHE_NETWORK`` says so, or its file system is of such a kind.

    Raises:
        EvalCacheError: ``EVALCACHE_NETWORK`` is neither 0 nor 1.
    """
    told = os.environ.get("EVALCACHE_NETWORK", "")
    if told not in ("", "0", "1"):
        raise EvalCacheError(
            f"unknown EVALCACHE_NETWORK {told!r}", hint="1 or 0; leave it out to go by the file system", found=told
        )
    return told == "1" or (told == "" and is_remote(folder))


def is_remote(path: Path) -> bool:
    """Whether a path, which need not exist, lies on a network file system. Linux; False where that cannot be known."""
    kind = _statfs_type(path)
    if kind == _FUSE:  # everything in user space: its name is in the table of mounts alone
        return _LOCAL_FUSE.fullmatch(file_system(path)) is None
    return kind in _REMOTE


def journal_mode(path: Path) -> str:
    """How SQLite keeps a transaction in a folder: by a log in front, or, where that could end the process, by its undoing.

    The log's index is a file that SQLite maps into memory. A file system that copies what is written needs room for a page that
    it has stored already; on a full disk or beyond a quota there is none, and the write to memory ends the process (SIGBUS).
    """
    return "truncate" if _statfs_type(path) in _COPY_ON_WRITE else "wal"


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The name of the file system that a path lies on, empty where it cannot be known."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    real, best, kind = os.path.realpath(path), "", ""
    for line in lines:
        words = line.split()
        if len(words) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), words[1])  # a space is \040
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # the later of two at one point is the one that is seen
            best, kind = point, words[2]
    return kind


def make_folder(folder: Path) -> None:
    """Make a cache folder, for its owner alone: what it holds are somebody's prompts and answers. One that exists stays as it is.

    Raises:
        StoreError: it cannot be made.
    """
    try:
        for above in [*reversed(folder.parents), folder]:  # those above it, too, which `parents=True` would give the usual mode
            above.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the cache folder {folder} cannot be made: {error.strerror}", hint=FOLDER_HINT, path=str(folder)
        ) from error


def _statfs_type(path: Path) -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    buffer = ctypes.create_string_buffer(512)  # a struct statfs has 120 bytes; its type comes first, as long as a word
    kernel = ctypes.CDLL(None)
    there = os.path.abspath(path)
    while kernel.statfs(os.fsencode(there), buffer):
        above = os.path.dirname(there)
        if above == there:
            return None
        there = above
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def _local_base() -> Path:
    """``EVALCACHE_LOCAL_DIR``, or the user's cache folder, or, where that is remote as well, a folder beside temporary files."""
    if given := os.environ.get("EVALCACHE_LOCAL_DIR"):
        return Path(given).expanduser()
    cache = Path(platformdirs.user_cache_dir("evalcache"))
    if not is_remote(cache):
        return cache
    place = Path(tempfile.gettempdir()) / f"evalcache-{os.getuid()}"
    make_folder(place)
    found = place.lstat()
    # Everybody may write beside it: who made it first might be somebody else, who then reads and answers everything.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StoreError(
            f"{place} is not yours alone", hint="set EVALCACHE_LOCAL_DIR to a folder on a local disk", path=str(place)
        )
    return place
