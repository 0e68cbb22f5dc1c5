"""A damaged file of a store: whatever can be read of it, by whichever tree, is in the new one; killed midway, nothing is lost."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from recorded import FIRST, NOON, make_action, make_result, open_pair, write

from evalcache.digest import Digest
from evalcache.errors import StoreError
from evalcache.mending import mend_folder, verify_folder
from evalcache.salvage import damage_of, salvage
from evalcache.store import Store


def fill(folder: Path, count: int = 300) -> tuple[Path, dict[Digest, bytes]]:
    """A store in one file, and its entries."""
    with Store(folder) as store:
        write(store, FIRST, NOON, [(make_action(prompt=(n, n)), make_result((n,), text=f"{n} " * 60)) for n in range(count)])
        store.rows.query("PRAGMA wal_checkpoint(TRUNCATE)")
        return folder / "cache.db", dict(store.frames())


def leaves(path: Path) -> tuple[bytearray, list[int], int]:
    """The file's bytes, where its pages of rows begin, and how long a page is."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[16:18], "big")
    return data, [start for start in range(size, len(data), size) if data[start] == 13], size


def rows_on(path: Path, spoilt: set[int], size: int) -> int:
    """How many entries lie on some pages, by SQLite's own reckoning of the good file."""
    data = path.read_bytes()
    return sum(int.from_bytes(data[start + 3 : start + 5], "big") for start in spoilt)


def test_a_broken_page_costs_the_rows_that_lie_on_it(tmp_path):
    path, entries = fill(tmp_path)
    data, starts, size = leaves(path)
    starts = starts[-20:]  # of the large table: the small ones come first
    spoilt = set(starts[2:18:3])
    lost = rows_on(path, spoilt, size)
    for start in spoilt:
        data[start : start + 8] = bytes(8)
    path.write_bytes(data)
    assert damage_of(tmp_path)
    done = salvage(tmp_path)
    assert done.moved_to.read_bytes() == data and damage_of(tmp_path) is None
    with Store(tmp_path) as store:
        found = dict(store.frames())
        assert all(entries[key] == frame for key, frame in found.items()) and store.check() == []
        assert len(entries) - lost <= len(found) == done.entries < len(entries), "rows between two broken pages are there"
    assert sorted(one.name for one in tmp_path.iterdir() if "mending" in one.name) == []


def test_a_bad_row_of_a_damaged_file_is_set_aside(tmp_path):
    path, entries = fill(tmp_path, 20)
    key = next(iter(entries))
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE Cache SET value = CAST(x'00' || substr(value, 2) AS BLOB) WHERE key = ?", (key.value,))
        connection.execute("UPDATE Settings SET value = value + 1 WHERE key = 'count'")
    connection.close()
    done = salvage(tmp_path)
    assert (done.entries, done.aside) == (19, 1)
    with Store(tmp_path) as store:
        assert store.get(key) is None and store.stats().aside == 1


def test_what_is_no_file_is_an_error_and_stays(tmp_path):
    path, _ = fill(tmp_path, 3)
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError):
        salvage(tmp_path)
    assert path.is_dir()


MENDER = """
import os, signal, sys
from pathlib import Path
from evalcache import mending
count = int(sys.argv[2])
def die(frame, event, argument):
    global count
    if event == "line" and "evalcache" in frame.f_code.co_filename:
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return die
sys.settrace(die)
mending.mend_folder(Path(sys.argv[1]))
sys.settrace(None)
"""
LINES = (1500, 4000)


@pytest.mark.parametrize("lines", [*LINES, *(pytest.param(n, marks=pytest.mark.campaign) for n in range(150, 14_000, 450))])
def test_mending_that_is_killed_is_done_by_the_next(tmp_path, lines):
    store, ledger = open_pair(tmp_path)
    write(store, FIRST, NOON, [(make_action(prompt=(n, n)), make_result((n,), text="x" * 300)) for n in range(60)])
    ledger.sync(store)
    write(store, FIRST, NOON, [(make_action(prompt=(n, 99)), make_result((n,))) for n in range(5)])  # not in the ledger
    store.rows.query("PRAGMA wal_checkpoint(TRUNCATE)")
    before = dict(store.frames())
    store.close()
    path = tmp_path / "store" / "cache.db"
    data, starts, _ = leaves(path)
    for start in starts[-6:-1:2]:
        data[start : start + 8] = bytes(8)
    path.write_bytes(data)
    ledger_bytes = bytearray(ledger.path.read_bytes())
    ledger_bytes[len(ledger_bytes) // 2] ^= 1
    ledger.path.write_bytes(ledger_bytes)
    done = subprocess.run([sys.executable, "-c", MENDER, str(tmp_path), str(lines)], capture_output=True, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    mend_folder(tmp_path)
    assert verify_folder(tmp_path).good
    with Store(tmp_path / "store") as store:
        found = dict(store.frames())
    assert all(before[key] == frame for key, frame in found.items())
    assert len(found) >= 60, "what the ledger knows is there whatever happens"
