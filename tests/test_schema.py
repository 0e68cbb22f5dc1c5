"""Steps of the schema: an elder ledger opens and keeps all it knew, whenever a step is killed; and what left the store."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from recorded import FIRST, NOON, SECOND, ask_all, cold_and_warm, make_action, make_result, open_pair, write

from evalcache.journal import Removed
from evalcache.ledger import Ledger
from evalcache.mending import mend_folder, verify_folder
from evalcache.schema import STEPS, VERSION, columns
from evalcache.store import Store


def make_elder(folder: Path, steps: int = 1) -> tuple[Store, Ledger]:
    """A ledger of the schema's first step, which has been told of two runs by hand, as that version would have told it."""
    store, ledger = open_pair(folder)
    cold_and_warm(store)
    ledger.sync(store)
    told = {table: set(names) for table, names in columns().items()}
    elder = folder / "elder.duckdb"
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{elder}' AS ledger (STORAGE_VERSION 'v1.5.0')")
        connection.execute("USE ledger")
        for number, step in enumerate(STEPS[:steps], 1):
            connection.execute(step)
            connection.execute(f"INSERT INTO schema_version VALUES ({number}, now()::TIMESTAMP)")
        connection.execute(f"ATTACH '{ledger.path}' AS newer (READ_ONLY)")
        for table in told:
            there = [row[0] for row in connection.execute(f"SELECT column_name FROM duckdb_columns() WHERE table_name = '{table}'"
                                                          " AND database_name = 'ledger'").fetchall()]  # fmt: skip
            if there and table != "schema_version":
                names = ", ".join(there)
                connection.execute(f"INSERT INTO ledger.{table} ({names}) SELECT {names} FROM newer.{table}")
    elder.replace(ledger.path)
    return store, ledger


def test_an_elder_ledger_opens_and_knows_what_it_knew(tmp_path):
    store, ledger = make_elder(tmp_path)
    before = duckdb.connect(str(ledger.path), read_only=True)
    runs, answers = (before.execute(f"SELECT * FROM {view} ORDER BY ALL").fetchall() for view in ("hits_by_run", "answers"))
    before.close()
    assert len(runs) == 2 and len(answers) == 3
    assert ledger.query("SELECT max(version) FROM schema_version").rows == [(VERSION,)], "reading is enough"
    now = duckdb.connect(str(ledger.path), read_only=True)
    assert now.execute("SELECT * FROM hits_by_run ORDER BY ALL").fetchall() == runs
    assert now.execute("SELECT * FROM answers ORDER BY ALL").fetchall() == answers
    now.close()
    ask_all(store, "4" * 32, NOON + 900, [(make_action(prompt=(9,)), make_result())])
    ledger.sync(store)
    assert ledger.query("SELECT count(*), count(answer) FROM outputs").rows == [(4, 1)]
    assert verify_folder(tmp_path).good


def test_columns_that_a_step_adds_are_explained(tmp_path):
    _, ledger = make_elder(tmp_path)
    sql = (
        "SELECT comment FROM duckdb_columns() WHERE table_name = 'outputs' AND column_name = 'answer' OR table_name = 'removals'"
    )
    told = [comment for (comment,) in ledger.query(sql).rows]
    assert len(told) == 8 and all(told)


KILLED = """
import os, signal, sys, threading, time
from evalcache.ledger import Ledger
delay = float(sys.argv[2])
ledger = Ledger(sys.argv[1])
print("go", flush=True)
if delay < 0:  # at the very end of the step, before the log is folded in
    apply = Ledger._apply
    def die(self, connection, version):
        apply(self, connection, version)
        if version:
            os.kill(os.getpid(), signal.SIGKILL)
    Ledger._apply = die
else:
    threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
ledger.query("SELECT 1")
time.sleep(1)
"""


@pytest.mark.parametrize("delay", [-1.0, 0.01, *(pytest.param(n / 500, marks=pytest.mark.campaign) for n in range(20))])
def test_a_step_that_is_killed_is_made_by_the_next_to_come(tmp_path, delay):
    _, ledger = make_elder(tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(ledger.path), str(delay)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert ledger.query("SELECT count(*) FROM outputs").rows == [(3,)]
    versions = ledger.query("SELECT version FROM schema_version ORDER BY version").rows
    assert versions == [(number,) for number in range(1, VERSION + 1)]
    assert ledger.query("SELECT count(*) FROM lookups").rows == [(10,)] and verify_folder(tmp_path).good


# --- what left the store ----------------------------------------------------------------------------------------------------


def gone(ledger: Ledger) -> set[str]:
    return {row[0] for row in ledger.query("SELECT key FROM entries_gone").rows}


def test_what_left_the_store_is_gone_until_it_is_stored_again(pair):
    store, ledger = pair
    entries = [(make_action(prompt=(n,)), make_result((n,))) for n in range(3)]
    keys = ask_all(store, FIRST, NOON, entries)
    ledger.sync(store)
    two = tuple(key.value for key in keys[:2])
    store.commit([], [Removed("", NOON + 5, two, "pruned")], run="", created_at=NOON + 5)
    ledger.sync(store)
    assert gone(ledger) == {keys[0].hex, keys[1].hex}
    write(store, SECOND, NOON - 99, [entries[0]])  # a clock that was moved back says nothing about the order
    ledger.sync(store)
    assert gone(ledger) == {keys[1].hex}
    for _ in range(2):  # away, back and away again within one sync
        store.commit([], [Removed("", NOON + 6, two, "pruned")], run="", created_at=NOON + 6)
        write(store, SECOND, NOON, [entries[1]])
    store.commit([], [Removed("", NOON + 6, two[1:], "pruned")], run="", created_at=NOON + 6)
    ledger.sync(store)
    assert gone(ledger) == {keys[0].hex, keys[1].hex}
    write(store, SECOND, NOON, [entries[1]])
    ledger.sync(store)
    assert gone(ledger) == {keys[0].hex}
    assert ledger.query("SELECT count(*) FROM lookups").rows == [(3,)], "what was asked stays"


def test_an_entry_that_came_back_unseen_is_known_again_after_a_rebuild(tmp_path):
    store, ledger = open_pair(tmp_path)
    (key,) = ask_all(store, FIRST, NOON, [(make_action(), make_result())])
    ledger.sync(store)
    store.commit([], [Removed("", NOON + 5, (key.value,), "lost")], run="", created_at=NOON + 5)
    ledger.sync(store)
    assert gone(ledger) == {key.hex}
    assert verify_folder(tmp_path).only_in_store == (key.hex,)
    assert mend_folder(tmp_path).lost == [] and gone(ledger) == set() and verify_folder(tmp_path).good
