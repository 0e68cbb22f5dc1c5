"""What is damaged or lost is put right from what is left, exactly, or named; and nothing is deleted."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from recorded import (
    FIRST,
    NOON,
    SECOND,
    TUNED,
    ask_all,
    cold_and_warm,
    full_result,
    make_action,
    make_result,
    open_pair,
    write,
)
from test_exchange import results

from evalcache.errors import LedgerLockedError, StoreError
from evalcache.ledger import Ledger
from evalcache.mending import mend_folder, verify_folder
from evalcache.records import Array, pack_logprobs
from evalcache.restoring import NO_ANSWER, NO_PROOF, NO_QUESTION, TOO_LARGE
from evalcache.store import Store

UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)  # each try is two files: to shrink one takes minutes
ENTRIES = [(make_action(prompt=(1, 2, n), holes=[n]), make_result((7, n))) for n in range(5)]
ENTRIES += [(make_action(TUNED), full_result())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache with six entries of two models, which the ledger knows."""
    store, ledger = open_pair(tmp_path / "cache")
    ask_all(store, FIRST, NOON, ENTRIES)
    write(store, FIRST, NOON, [], [], TUNED)
    ledger.sync(store)
    store.close()
    return tmp_path / "cache"


def held(folder: Path) -> tuple[dict, dict]:
    """All entries, decoded, and all objects."""
    with Store(folder / "store") as store:
        keys = [key for key, _ in store.frames()]
        return {key: (store.get(key), store.get_question(key)) for key in keys}, dict(store.objects())


def lose_store(folder: Path) -> None:
    shutil.rmtree(folder / "store")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def query(folder: Path, sql: str) -> list:
    return Ledger(folder / "ledger.duckdb").query(sql, unsafe=True).rows


# --- the store, from the ledger ---------------------------------------------------------------------------------------------


def test_a_lost_store_comes_back_whole(folder):
    before = held(folder)
    lose_store(folder)
    assert len(verify_folder(folder).only_in_ledger) == 6 and not verify_folder(folder).good
    mended = mend_folder(folder)
    assert (mended.restored, mended.objects, mended.lost) == (6, 4, [])
    assert held(folder) == before and verify_folder(folder).good
    assert query(folder, "SELECT count(*) FROM outputs") == [(6,)], "the ledger is not told again what it told"
    assert mend_folder(folder).to_json() == {"moved": [], "set_aside": 0, "restored": 0, "objects": 0, "told": 0, "lost": []}


@settings(max_examples=10, deadline=None, phases=UNSHRUNK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(results, min_size=1, max_size=5), st.floats(0, 4e9))
def test_everything_that_a_result_can_hold_comes_back_from_the_ledger(tmp_path_factory, answers, at):
    folder = tmp_path_factory.mktemp("mend")
    store, ledger = open_pair(folder)
    write(store, FIRST, at, [(make_action(prompt=(n,), raw=b"\x00", at=[n]), answer) for n, answer in enumerate(answers)])
    ledger.sync(store)
    store.close()
    before = held(folder)
    lose_store(folder)
    assert mend_folder(folder).lost == [] and held(folder) == before


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("UPDATE outputs SET token_ids = [7, 9] WHERE token_ids = [7, 3]", TOO_LARGE),
        ("UPDATE outputs SET text = 'other' WHERE arrays IS NOT NULL", NO_ANSWER),
        ("UPDATE requests SET prompt_token_ids = [9] WHERE prompt_token_ids = [1, 2, 4]", NO_QUESTION),
        ("UPDATE requests SET inputs_canonical = NULL WHERE prompt_token_ids = [1, 2, 4]", NO_QUESTION),
        ("UPDATE outputs SET answer = NULL WHERE token_ids = [7, 3]", NO_PROOF),
    ],
)  # fmt: skip
def test_what_the_ledger_cannot_prove_is_not_believed(folder, sql, reason):
    before, _ = held(folder)
    query(folder, sql)
    lose_store(folder)
    mended = mend_folder(folder)
    assert (mended.restored, mended.lost) == (5, [f"1 entry, to be computed again: {reason}"])
    after, _ = held(folder)
    assert len(after) == 5 and all(before[key] == after[key] for key in after)
    assert verify_folder(folder).good, "what is lost is known to be"


def test_tensors_beyond_what_the_ledger_keeps_are_lost_and_said_so(tmp_path):
    store, ledger = open_pair(tmp_path)
    large = make_result(arrays={"scores": Array("float32", (300_000,), bytes(1_200_000))})
    (key, _) = ask_all(store, FIRST, NOON, [(make_action(), large), (make_action(prompt=(4,)), make_result())])
    ledger.sync(store)
    store.close()
    lose_store(tmp_path)
    mended = mend_folder(tmp_path)
    assert (mended.restored, mended.lost) == (1, [f"1 entry, to be computed again: {TOO_LARGE}"])
    assert verify_folder(tmp_path).good
    with Store(tmp_path / "store") as store:
        write(store, SECOND, NOON + 9, [(make_action(), large)])
        assert verify_folder(tmp_path).good and store.get(key).result == large, "computed again, it is there again"
    assert query(tmp_path, "SELECT count(*) FROM entries_gone") == [(0,)]


def test_a_log_probability_that_is_another_not_a_number_comes_back_as_that(tmp_path):
    store, ledger = open_pair(tmp_path)
    odd = pack_logprobs([0.5, -0.0, float("-inf"), float("nan")]) + bytes.fromhex("010000000000f8ff")
    (key,) = ask_all(store, FIRST, NOON, [(make_action(), make_result(logprobs=odd))])
    ledger.sync(store)
    store.close()
    lose_store(tmp_path)
    assert mend_folder(tmp_path).lost == [] and Store(tmp_path / "store").get(key).result.logprobs == odd


# --- rows and files of the store --------------------------------------------------------------------------------------------


def test_bad_rows_are_set_aside_and_come_back(folder):
    before = held(folder)
    key = next(iter(before[0]))
    connection = sqlite3.connect(folder / "store" / "cache.db")
    with connection:
        connection.execute("UPDATE Cache SET value = CAST(x'00' || substr(value, 2) AS BLOB) WHERE key = ?", (key.value,))
        connection.execute("UPDATE Cache SET value = CAST(x'ff' || value AS TEXT) WHERE key LIKE 'object/fields/%'")
        connection.execute("INSERT INTO Cache (key, raw, mode, value) VALUES ('stranger', 1, 1, x'00'), (x'8004', 0, 4, x'80')")
    connection.close()
    found = verify_folder(folder)
    assert len(found.damaged) == 5 and found.fixes[0].startswith("set the damaged rows aside")
    mended = mend_folder(folder)
    assert (mended.set_aside, mended.restored, mended.objects, mended.lost) == (5, 1, 2, [])
    assert held(folder) == before and verify_folder(folder).good
    with Store(folder / "store") as store:
        assert store.stats().aside == 5


def pages(folder: Path) -> tuple[Path, int]:
    connection = sqlite3.connect(folder / "store" / "cache.db")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    return folder / "store" / "cache.db", size


@pytest.mark.parametrize("damage", ["header", "no database", "cut", "a page of the index", "half of the pages"])
def test_a_file_that_sqlite_cannot_read_is_moved_aside(tmp_path, damage):
    store, ledger = open_pair(tmp_path)
    ask_all(store, FIRST, NOON, [(make_action(prompt=(n, n)), make_result((n,), text="x" * 300)) for n in range(200)])
    ledger.sync(store)
    write(store, SECOND, NOON + 50, [(make_action(prompt=(n, 9)), make_result((n,))) for n in range(9)])
    store.close()
    before = held(tmp_path)
    path, size = pages(tmp_path)
    if damage == "header":
        flip(path, 5)
    elif damage == "no database":
        path.write_bytes(b"\x80\x04not a database at all" * 400)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: 5 * size + 17])
    else:
        data = bytearray(path.read_bytes())
        kinds = {"a page of the index": (2, 10)}.get(damage, (13, 10))
        numbers = [n for n in range(2, len(data) // size) if data[n * size] in kinds]
        for number in numbers[:1] if damage == "a page of the index" else numbers[::2]:
            data[number * size : number * size + 64] = bytes(64)
        path.write_bytes(data)
    bad = path.read_bytes()
    found = verify_folder(tmp_path)
    assert not found.good and len(found.broken) == 1 and "aside" in found.fixes[0]
    mended = mend_folder(tmp_path)
    assert Path(mended.moved[0]).read_bytes() == bad, "what was damaged is still there"
    assert verify_folder(tmp_path).good
    after = held(tmp_path)
    assert all(after[0][key] == before[0][key] for key in after[0])
    assert len(after[0]) >= 200 or damage == "cut"
    assert len(after[0]) == 209 or damage != "a page of the index", "every row is found through another tree"


def test_a_store_at_work_is_not_mended(folder):
    code = """
import sys, time
from evalcache.digest import Digest
from evalcache.store import Store
store = Store(sys.argv[1])
store.leases.claim([Digest(bytes(16))])
print("claimed", flush=True)
time.sleep(60)
"""
    worker = subprocess.Popen([sys.executable, "-c", code, str(folder / "store")], stdout=subprocess.PIPE)
    try:
        worker.stdout.readline()
        connection = sqlite3.connect(folder / "store" / "cache.db")
        with connection:  # damage that keeps nobody from reading
            connection.execute("UPDATE Settings SET value = value + 1 WHERE key = 'count'")
        connection.close()
        with pytest.raises(StoreError, match="at work"):
            mend_folder(folder)
    finally:
        worker.kill()
        worker.wait()
    before = held(folder)
    assert len(mend_folder(folder).moved) == 1 and held(folder) == before


# --- the ledger, from the store ---------------------------------------------------------------------------------------------


def test_a_lost_ledger_is_rebuilt_and_what_it_alone_knew_is_named(folder):
    (folder / "ledger.duckdb").unlink()
    mended = mend_folder(folder)
    assert mended.told == 6 and mended.lost == [
        "what only the lost ledger knew: runs, lookups, our own overhead, tasks, documents and scores"
    ]
    assert verify_folder(folder).good


def test_a_ledger_that_never_was_is_not_called_lost(tmp_path):
    store, _ = open_pair(tmp_path)
    ask_all(store, FIRST, NOON, ENTRIES)
    store.close()
    assert mend_folder(tmp_path).lost == []
    assert query(tmp_path, "SELECT count(*) FROM runs") == [(1,)]


def test_a_ledger_that_lacks_entries_is_told_of_them(folder):
    query(folder, "DELETE FROM outputs WHERE token_ids = [7, 3]")
    assert len(verify_folder(folder).only_in_store) == 1
    assert mend_folder(folder).told == 1 and verify_folder(folder).good


@pytest.mark.parametrize("place", ["head", "middle", "cut", "log"])
def test_a_damaged_ledger_is_moved_aside_and_what_can_be_read_of_it_is_kept(tmp_path, place):
    store, ledger = open_pair(tmp_path)
    cold_and_warm(store)
    ask_all(store, "4" * 32, NOON, [(make_action(prompt=(n, n)), make_result((n,), text="x" * 500)) for n in range(300)])
    ledger.sync(store)
    store.close()
    path = tmp_path / "ledger.duckdb"
    size = path.stat().st_size
    if place == "log":
        code = "import duckdb, os, sys; c = duckdb.connect(sys.argv[1]); c.execute('CREATE TABLE t (i INT)')"
        code += "; c.execute('CHECKPOINT')"
        code += "; c.execute('INSERT INTO t VALUES (1)'); os._exit(0)"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "other.duckdb")], check=True, timeout=60)
        shutil.copy(tmp_path / "other.duckdb.wal", f"{path}.wal")
    elif place == "cut":
        path.write_bytes(path.read_bytes()[: size // 2])
    else:
        for at in {"head": (4096 + 40, 8192 + 40), "middle": (size // 3,)}[place]:
            flip(path, at)
    bad = path.read_bytes()
    found = verify_folder(tmp_path)
    assert len(found.broken) == 1 and "ledger.duckdb aside" in found.fixes[0]
    mended = mend_folder(tmp_path)
    assert Path(mended.moved[0]).read_bytes() == bad
    assert verify_folder(tmp_path).good and verify_folder(tmp_path).outputs == 303
    if place == "log":
        assert mended.lost == [] and query(tmp_path, "SELECT count(*) FROM lookups") != [(0,)]
    if place in ("head", "cut"):
        assert mended.lost


def test_a_ledger_that_somebody_holds_is_left_alone(folder):
    code = "import duckdb, sys, time; c = duckdb.connect(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder / "ledger.duckdb")], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(LedgerLockedError):
            mend_folder(folder)
        assert [file.name for file in folder.iterdir() if "damaged" in file.name] == []
    finally:
        holder.kill()
        holder.wait()


# --- the verb ---------------------------------------------------------------------------------------------------------------


def test_the_verb(folder):
    def verify(*arguments: str) -> tuple[int, dict]:
        command = [sys.executable, "-m", "evalcache", "verify", "--dir", str(folder), "--json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, json.loads(done.stdout)

    assert verify()[0] == verify("--fix")[0] == 0
    lose_store(folder)
    code, found = verify()
    assert code == 1 and len(found["only_in_ledger"]) == 6 and found["fixes"]
    code, found = verify("--fix")
    assert (code, found["good"], found["mended"]["restored"]) == (0, True, 6)
    assert verify()[0] == 0
