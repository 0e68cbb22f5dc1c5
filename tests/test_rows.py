"""Rows: no pickle is ever read, no connection crosses a fork, nothing is half written."""

from __future__ import annotations

import os
import pickle
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from evalcache.errors import CorruptEntryWarning, StoreError
from evalcache.rows import Rows


def select(rows: Rows, keys: list[bytes], unreadable: list[tuple[bytes, str]] | None = None) -> dict[bytes, object]:
    return {key: value for found in rows.select(keys, [] if unreadable is None else unreadable) for key, value in found}


class Bomb:
    """Unpickling this leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def plant(folder: Path, key: object, raw: int, mode: int, value: object, filename: str | None = None) -> None:
    connection = sqlite3.connect(folder / "cache.db")
    connection.execute(
        "INSERT OR REPLACE INTO Cache (key, raw, store_time, access_time, mode, value, filename) VALUES (?, ?, 1, 1, ?, ?, ?)",
        (key, raw, mode, value, filename),
    )
    connection.commit()
    connection.close()


def test_a_planted_pickle_is_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    rows = Rows(tmp_path / "s")
    (tmp_path / "s" / "bomb.val").write_bytes(bomb)
    plant(rows.directory, "inline", 1, 4, bomb)
    plant(rows.directory, "file", 1, 4, None, "bomb.val")
    plant(rows.directory, bomb, 0, 1, b"x")
    for key in ("inline", "file"):
        with pytest.raises(StoreError, match="never read"):
            rows.get(key)
    with pytest.raises(StoreError, match="never read"):
        list(rows._cache)
    assert select(rows, [bomb]) == {}
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the planted row was harmless, and this test proved nothing"


@pytest.mark.parametrize(("key", "value"), [((1, 2), b""), (7, b""), ("k", "text"), ("k", None), ("k", {"a": 1}), ("k", 1.5)])
def test_nothing_but_bytes_is_written(tmp_path: Path, key: object, value: object) -> None:
    rows = Rows(tmp_path)
    with pytest.raises(StoreError):
        rows._cache.set(key, value)
    assert rows.count("") == 0


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "a" / "s")
    with rows.transaction("writing"):
        rows.put([("k", b"v")])
    assert stat.S_IMODE(rows.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in rows.directory.iterdir()} == {0o600}


def test_replacing_keeps_the_counts_that_diskcache_checks(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    for value in (b"1", b"2"):
        with rows.transaction("writing"):
            rows.put((key.to_bytes(16, "big"), value) for key in range(2500))
            rows.add("once", value)
    found = select(rows, [key.to_bytes(16, "big") for key in range(3000)])
    assert (len(found), set(found.values()), rows.get("once")) == (2500, {b"2"}, b"1")
    assert (rows.count(b""), len(rows._cache)) == (2500, 2501)
    with rows.transaction("deleting"):
        rows.delete("onc", "once")
    assert (rows.get("once"), len(rows._cache), rows.check()) == (None, 2500, [])


def test_an_exception_in_the_middle_undoes_everything(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    with pytest.raises(KeyboardInterrupt), rows.transaction("writing"):
        rows.put([("a", b"1")])
        raise KeyboardInterrupt
    assert rows.get("a") is None
    with rows.transaction("writing"):
        rows.put([("b", b"2")])
    assert rows.get("b") == b"2"


def test_a_full_disk_is_an_error_and_the_store_goes_on(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    pages = rows.query("PRAGMA page_count")[0][0]
    rows.query(f"PRAGMA max_page_count = {pages + 4}")
    with pytest.raises(StoreError, match="full"), rows.transaction("writing"):
        rows.put((str(number), bytes(3000)) for number in range(50))
    rows.query("PRAGMA max_page_count = 1000000")
    assert rows.count("") == 0
    with rows.transaction("writing"):
        rows.put([("a", b"1")])
    assert (rows.get("a"), rows.check()) == (b"1", [])


def test_a_lock_held_elsewhere_is_an_error_with_the_path(tmp_path: Path) -> None:
    rows = Rows(tmp_path, timeout_s=0.05)
    other = sqlite3.connect(tmp_path / "cache.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another process writes") as caught, rows.transaction("writing"):
        rows.put([("a", b"1")])
    assert caught.value.path == str(tmp_path)
    assert select(rows, [b"k"]) == {}  # readers are not held up
    other.execute("ROLLBACK")
    other.close()
    with rows.transaction("writing"):
        rows.put([("a", b"1")])


@pytest.mark.parametrize("damage", ["a folder that is a file", "a database that is none", "a folder without rights"])
def test_an_unusable_folder_says_so(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "s"
    if damage == "a folder that is a file":
        folder.write_bytes(b"")
    elif damage == "a database that is none":
        folder.mkdir()
        (folder / "cache.db").write_bytes(b"no database" * 1000)
    else:
        folder = Path("/proc/evalcache")
    with pytest.raises(StoreError) as caught:
        Rows(folder)
    assert caught.value.path == str(folder)
    assert caught.value.hint


def test_a_damaged_page_costs_its_own_rows_only(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    keys = [key.to_bytes(16, "big") for key in range(400)]
    with rows.transaction("writing"):
        rows.put((key, key * 60) for key in keys)
    rows.close()
    database = tmp_path / "cache.db"
    page_bytes = rows.query("PRAGMA page_size")[0][0]
    assert page_bytes == 8192
    rows.close()
    content = bytearray(database.read_bytes())
    page = content.index(keys[200] * 60) // page_bytes
    content[page * page_bytes : page * page_bytes + 8] = b"\xff" * 8  # the page's own header
    database.write_bytes(content)
    unreadable: list[tuple[bytes, str]] = []
    found = select(rows, keys, unreadable)
    assert found and unreadable
    assert all(value == key * 60 for key, value in found.items())
    assert set(found) | {key for key, _ in unreadable} == set(keys)
    assert keys[200] not in found
    assert rows.check()


def test_what_was_written_anew_is_not_set_aside(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    with rows.transaction("writing"):
        rows.put([("a", b"new"), ("b", b"bad")])
    with pytest.warns(CorruptEntryWarning, match="2 bad rows"):
        rows.set_aside([("a", b"old", "why"), ("b", b"bad", "why")])
    assert (rows.get("a"), rows.get("b"), rows.get("aside/b")) == (b"new", None, b"bad")


def test_threads_have_connections_of_their_own(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    failed = []

    def work(thread: int) -> None:
        try:
            for number in range(30):
                key = f"{thread}-{number}".encode()
                with rows.transaction("writing"):
                    rows.put([(key, key)])
                assert select(rows, [key]) == {key: key}
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failed, rows.count(b""), rows.check()) == ([], 120, [])


def test_a_fork_loses_nothing_on_either_side(tmp_path: Path) -> None:
    """Children write while the parent closes: with a connection carried across, the parent deletes the log under them."""
    rows = Rows(tmp_path)
    with rows.transaction("writing"):
        rows.put([("before", b"1")])
    stop = threading.Event()

    def keep_writing() -> None:
        number = 0
        while not stop.is_set():
            with rows.transaction("writing"):
                rows.put([(b"parent%d" % number, b"1")])
            number += 1
        written.append(number)

    written: list[int] = []
    thread = threading.Thread(target=keep_writing)
    thread.start()
    children = []
    for child in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                for number in range(10):
                    with rows.transaction("writing"):
                        rows.put([(b"child%d-%d" % (child, number), b"1")])
                os._exit(0 if rows.get("before") == b"1" else 1)
            finally:
                os._exit(2)
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    stop.set()
    thread.join()
    assert statuses == [0] * 6
    assert rows.count(b"") == 60 + written[0]
    assert rows.check() == []
