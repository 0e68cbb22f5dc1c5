"""FileMemo: a fact is told of exactly the file that it was kept for, until somebody touches it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from evalcache.errors import CorruptEntryWarning
from evalcache.filememo import SETTLED_NS, FileMemo, FileStamp


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights of a model")
    return path


def settled_memo(folder: Path | None = None) -> FileMemo:
    """A memo by whose clock every file of this test has settled."""
    return FileMemo(folder, clock_ns=lambda: time.time_ns() + SETTLED_NS)


def keep(memo: FileMemo, file: Path, fact: object = "known") -> bool:
    return memo.remember("test", FileStamp.of(file), fact, memo.now_ns())


def test_a_fact_outlives_the_process_in_the_cache_folder(file: Path, store_folder: Path) -> None:
    assert keep(settled_memo(), file, {"tensors": [1, b"2"]})
    assert FileMemo().recall("test", FileStamp.of(file)) == {"tensors": [1, b"2"]}
    assert FileMemo(store_folder).recall("other kind", FileStamp.of(file)) is None
    assert (store_folder / "files.sqlite").exists()


def test_a_fact_about_a_file_that_was_just_written_is_not_kept(file: Path) -> None:
    memo = FileMemo()
    assert keep(memo, file) is False
    assert memo.recall("test", FileStamp.of(file)) is None


@pytest.mark.parametrize(("age_ns", "kept"), [(SETTLED_NS - 1, False), (SETTLED_NS, True), (-5 * SETTLED_NS, False)])
def test_a_file_settles_two_seconds_after_its_last_change(file: Path, age_ns: int, kept: bool) -> None:
    old = 10**18
    os.utime(file, ns=(old, old))  # an old mtime proves nothing: ctime is what `utime` itself has just set
    stamp = FileStamp.of(file)
    assert stamp.mtime_ns == old
    assert stamp.is_settled(stamp.ctime_ns + age_ns) is kept
    assert FileMemo().remember("test", stamp, "known", stamp.ctime_ns + age_ns) is kept


def rewrite_in_place(file: Path) -> None:
    status = file.stat()
    with file.open("r+b") as handle:
        handle.write(b"W")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(file: Path) -> None:
    status = file.stat()
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes().upper())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


def append(file: Path) -> None:
    status = file.stat()
    with file.open("ab") as handle:
        handle.write(b".")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("change", [rewrite_in_place, replace, append, touch], ids=lambda change: change.__name__)
def test_a_touched_file_is_not_known_any_more(file: Path, change) -> None:
    memo = settled_memo()
    keep(memo, file)
    before = FileStamp.of(file)
    time.sleep(0.02)  # longer than the kernel's clock tick, by which ctime counts
    change(file)
    after = FileStamp.of(file)
    if change in (rewrite_in_place, replace):
        assert (after.size_bytes, after.mtime_ns) == (before.size_bytes, before.mtime_ns)
    assert memo.recall("test", after) is None


def test_a_link_is_the_file_that_it_leads_to(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    memo = settled_memo()
    keep(memo, file)
    assert memo.recall("test", FileStamp.of(tmp_path / "link")) == "known"


def test_a_copy_is_another_file(file: Path, tmp_path: Path) -> None:
    memo = settled_memo()
    keep(memo, file)
    shutil.copy2(file, tmp_path / "copy")
    assert memo.recall("test", FileStamp.of(tmp_path / "copy")) is None


def test_a_name_that_is_not_text_is_a_name(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    file.write_bytes(b"x")
    memo = settled_memo()
    assert keep(memo, file)
    assert memo.recall("test", FileStamp.of(file)) == "known"


def test_a_damaged_memo_is_an_empty_one(file: Path, store_folder: Path) -> None:
    memo = settled_memo()
    keep(memo, file)
    with sqlite3.connect(store_folder / "files.sqlite") as connection:
        connection.execute("UPDATE kept SET value = x'00'")
    with pytest.warns(CorruptEntryWarning):
        assert memo.recall("test", FileStamp.of(file)) is None


def test_a_memo_keeps_one_fact_for_each_path(file: Path, store_folder: Path) -> None:
    memo = settled_memo()
    for fact in range(3):
        touch(file)
        keep(memo, file, fact)
    assert memo.recall("test", FileStamp.of(file)) == 2
    with sqlite3.connect(store_folder / "files.sqlite") as connection:
        assert connection.execute("SELECT COUNT(*) FROM kept").fetchone() == (1,)
