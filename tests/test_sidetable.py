"""SideTable: what comes back is what was put there, or nothing; nothing that happens to its file is an error."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from evalcache.errors import CorruptEntryWarning, EvalCacheWarning
from evalcache.sidetable import SideTable


def test_what_was_put_last_comes_back(tmp_path: Path) -> None:
    table = SideTable(tmp_path / "new" / "folder" / "t.sqlite")
    assert table.get(b"key") is None
    assert not table.path.parent.exists()  # asking makes nothing
    assert table.put(b"key", b"one")
    assert table.put(b"key", b"two")
    assert table.put(b"", b"")
    assert SideTable(table.path).get(b"key") == b"two"
    assert SideTable(table.path).get(b"") == b""
    assert table.path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_value_or_a_value_of_another_key_is_absent(tmp_path: Path) -> None:
    table = SideTable(tmp_path / "t.sqlite")
    table.put(b"one", b"first")
    table.put(b"two", b"second")
    table.put(b"three", b"third")
    with sqlite3.connect(table.path) as connection:
        connection.execute("UPDATE kept SET value = substr(value, 1, 16) || x'00' WHERE key = ?", (b"one",))
        connection.execute("UPDATE kept SET value = (SELECT value FROM kept WHERE key = ?) WHERE key = ?", (b"three", b"two"))
    for key in (b"one", b"two"):
        with pytest.warns(CorruptEntryWarning, match="checksum"):
            assert table.get(key) is None
    assert table.get(b"three") == b"third"
    table.put(b"one", b"again")
    assert table.get(b"one") == b"again"


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path) -> None:
    table = SideTable(tmp_path / "t.sqlite")
    table.path.write_bytes(b"no database at all, but long enough to be read as one" * 40)
    with pytest.warns(CorruptEntryWarning, match="set aside"):
        assert table.get(b"key") is None
    assert table.put(b"key", b"value")
    assert table.get(b"key") == b"value"
    assert (tmp_path / "t.sqlite.corrupt").exists()


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(EvalCacheWarning, match="cannot be written"):
        assert SideTable(tmp_path / "file" / "t.sqlite").put(b"key", b"value") is False


def test_a_writer_that_holds_the_file_costs_the_wait_and_a_warning(tmp_path: Path) -> None:
    table = SideTable(tmp_path / "t.sqlite", timeout_s=0.05)
    table.put(b"key", b"value")
    holder = sqlite3.connect(table.path, isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        assert table.get(b"key") == b"value"  # readers do not wait
        with pytest.warns(EvalCacheWarning, match="locked"):
            assert table.put(b"key", b"other") is False
    finally:
        holder.close()
    assert table.get(b"key") == b"value"


def test_processes_write_one_file_together(tmp_path: Path) -> None:
    code = (
        "import sys; from evalcache.sidetable import SideTable; table = SideTable(sys.argv[1]);"
        "[table.put(f'{sys.argv[2]}-{n}'.encode(), b'x' * n) for n in range(40)]"
    )
    path = tmp_path / "t.sqlite"
    writers = [subprocess.Popen([sys.executable, "-W", "error", "-c", code, str(path), str(one)]) for one in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    table = SideTable(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(table.get(f"{one}-{n}".encode()) == b"x" * n for one in range(4) for n in range(40))
