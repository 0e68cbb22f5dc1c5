"""The ledger on real files: told by a real store, killed, locked, rebuilt, and asked by people who may not be trusted."""

from __future__ import annotations

import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from recorded import (
    BASE,
    FIRST,
    NOON,
    SECOND,
    THIRD,
    TUNED,
    ask_all,
    begin,
    cold_and_warm,
    full_result,
    look,
    make_action,
    make_model,
    make_result,
    open_pair,
    write,
)

from evalcache.canonical import decode
from evalcache.digest import digest_bytes
from evalcache.errors import LedgerError, LedgerLockedError
from evalcache.journal import DocumentsSeen, Event, LookedUp, RunEnded, Scored, TaskSeen
from evalcache.ledger import Ledger, Table
from evalcache.records import pack_tokens
from evalcache.schema import VERSION, columns
from evalcache.store import Store
from evalcache.waiting import Waiting


def only(table: Table) -> dict:
    assert len(table.rows) == 1
    return dict(zip(table.columns, table.rows[0], strict=True))


def dump(ledger: Ledger) -> dict[str, list[str]]:
    """All rows of all tables but the books about the tables themselves."""
    with ledger.reading() as ask:
        return {
            table: sorted(repr(row) for row in ask(f"SELECT * FROM {table}").rows)
            for table in columns()
            if table not in ("schema_version", "synced", "models")  # `first_seen` is the ledger's own clock
        }


class TestSync:
    def test_every_field_of_an_entry_arrives(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        action, result = make_action(prompt=(5, 6, 2**31 - 1), hole=b"\x01", at=[1, 2]), full_result()
        key = ask_all(store, FIRST, NOON, [(action, result)])[0]
        report = ledger.sync(store)
        assert (report.events, report.entries, report.skipped) == (5, 1, 0)
        asked = only(ledger.query("SELECT * FROM requests"))
        assert asked["key"] == key.hex
        assert asked["model"] == BASE.root.hex
        assert asked["prompt_token_ids"] == [5, 6, 2**31 - 1]
        assert asked["settings"] == '{"max_new_tokens": 8}'
        assert asked["inputs"] == '{"at": [1, 2], "hole": "01"}'
        assert decode(asked["inputs_canonical"]) == dict(action.request.inputs)
        answered = only(ledger.query("SELECT * FROM outputs WHERE key = ?", [key.hex]))
        assert answered["text"] == result.text
        assert answered["token_ids"] == [7, 8]
        assert answered["logprobs"] == [-0.1, float("-inf"), 1 / 3]
        assert (answered["finish_reason"], answered["prompt_tokens"], answered["completion_tokens"]) == ("stop", 3, 2)
        assert (answered["seconds"], answered["device"], answered["batch_size"]) == (2.0, "cpu", 2)
        assert (answered["dtype"], answered["run"]) == ("float32", FIRST)
        assert answered["created_at"].isoformat() == "2023-11-14T22:13:22.250000"
        assert decode(answered["exact"]) == [dict(result.scalars), {"batch_size": 2}]
        assert decode(answered["arrays"]) == {"scores": ["float32", [2], bytes(range(8))]}
        fields = {digest: decode(data) for digest, data in ledger.query("SELECT * FROM fields").rows}
        assert fields[asked["settings_digest"]] == dict(action.request.settings)
        assert fields[asked["environment_digest"]] == dict(action.environment.keyed)

    def test_models_and_their_modules_arrive_once(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        model = make_model({"embed": b"e", "head": b"h"}, config={"eps": 1e-6}, adapter="lora", parent=BASE.root.value)
        ask_all(store, FIRST, NOON, [(make_action(model), make_result())], model, "mine")
        ledger.sync(store)
        ask_all(store, SECOND, NOON + 50, [(make_action(model, prompt=(9,)), make_result())], model, "also mine")
        ledger.sync(store)
        row = only(ledger.query("SELECT * FROM models"))
        assert (row["digest"], row["class"]) == (model.root.hex, "TinyLM")
        assert (row["parameters"], row["bytes"], row["modules"]) == (4, 16, 3)
        assert (row["config"], row["adapter"], row["parent"]) == ('{"eps": 1e-06}', "lora", BASE.root.hex)
        assert row["manifest"] == model.to_bytes()
        assert ledger.query("SELECT path, class, tensors, bytes FROM modules ORDER BY path").rows == [
            ("", "tiny.TinyLM", 0, 0),
            ("embed", "tiny.Linear", 1, 8),
            ("head", "tiny.Linear", 1, 8),
        ]
        assert ledger.query("SELECT run, name FROM model_names ORDER BY run").rows == [(FIRST, "mine"), (SECOND, "also mine")]

    def test_twice_adds_nothing(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        before = dump(ledger)
        assert store.waiting.count() == 0
        report = ledger.sync(store)
        assert (report.events, report.entries) == (0, 0)
        assert dump(ledger) == before

    def test_events_that_were_taken_in_but_not_forgotten_are_not_counted_twice(self, pair, monkeypatch) -> None:
        store, ledger = pair

        def interrupted(self: Waiting, through: int) -> None:
            raise KeyboardInterrupt

        cold_and_warm(store)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Waiting, "forget", interrupted)
            ledger.sync(store)
        before, waiting, store_id = dump(ledger), store.waiting.count(), store.waiting.id()
        assert waiting > 0
        report = ledger.sync(store)
        assert (report.events, store.waiting.count(), store.waiting.id()) == (0, 0, store_id)
        assert dump(ledger) == before

    def test_a_refreshed_answer_is_kept_beside_the_elder(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        for run, at, tokens in ((FIRST, NOON, (7,)), (SECOND, NOON + 50, (8,))):
            ask_all(store, run, at, [(make_action(), make_result(tokens))])
            ledger.sync(store)
        assert ledger.query("SELECT run, token_ids FROM outputs ORDER BY run").rows == [(FIRST, [7]), (SECOND, [8])]
        assert ledger.query("SELECT run, token_ids FROM answers").rows == [(SECOND, [8])]

    def test_two_stores_share_a_ledger(self, tmp_path: Path) -> None:
        one, ledger = open_pair(tmp_path)
        other = Store(tmp_path / "other")
        ask_all(one, FIRST, NOON, [(make_action(prompt=(1,)), make_result())])
        ask_all(other, SECOND, NOON, [(make_action(prompt=(2,)), make_result())])
        assert ledger.sync(one).entries == ledger.sync(other).entries == 1
        assert ledger.query("SELECT count(*) FROM hits_by_run").rows == [(2,)]

    def test_a_damaged_entry_is_skipped_and_counted(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        ask_all(store, FIRST, NOON, [(make_action(prompt=(n,)), make_result()) for n in range(3)])
        victim = next(iter(store.frames()))
        store._rows.put([(victim[0].value, victim[1][:-1] + bytes([victim[1][-1] ^ 1]))])
        with pytest.warns(UserWarning):
            report = ledger.sync(store)
        assert (report.entries, report.skipped) == (2, 1)

    def test_values_that_json_lacks_do_not_stop_it(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        odd = {"nan": float("nan"), "inf": float("inf"), "raw": b"\x00\xff", "quote": "'\"\\\u2028\x00"}
        ask_all(store, FIRST, NOON, [(make_action(settings={**odd, "deep": {"list": [odd]}}), make_result((), scalars=odd))])
        assert ledger.sync(store).entries == 1
        row = only(ledger.query("SELECT settings->>'nan' AS nan, settings->'deep'->'list'->0->>'raw' AS raw FROM requests"))
        assert (row["nan"], row["raw"]) == ("nan", "00ff")
        assert only(ledger.query("SELECT token_ids FROM outputs"))["token_ids"] == []

    def test_progress_is_told(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        waiting, told = store.waiting.count(), []
        ledger.sync(store, progress=lambda done, total: told.append((done, total)))
        assert told[-1] == (waiting, waiting)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from recorded import open_pair
store, ledger = open_pair(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    ledger.sync(store)
"""


def test_kill_9_at_any_instant_loses_and_doubles_nothing(tmp_path: Path) -> None:
    store, ledger = open_pair(tmp_path)
    keys = set()
    for round_ in range(6):
        syncing = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
        )
        assert syncing.stdout is not None
        assert syncing.stdout.readline() == "ready\n"
        for batch in range(8):
            actions = [make_action(prompt=(round_, batch, n)) for n in range(20)]
            run = f"{round_:016x}{batch:016x}"
            keys.update(ask_all(store, run, NOON + batch, [(action, make_result()) for action in actions]))
            time.sleep(0.007 * round_)  # so that the kills fall into different moments
        os.kill(syncing.pid, signal.SIGKILL)
        syncing.wait()
    ledger.sync(store)
    assert store.waiting.count() == 0
    assert {row[0] for row in ledger.query("SELECT key FROM outputs").rows} == {key.hex for key in keys}
    # Not only present: each once.
    assert ledger.query("SELECT count(*), count(DISTINCT key) FROM outputs").rows == [(960, 960)]
    assert ledger.query("SELECT count(*), count(DISTINCT (store, seq, n)) FROM lookups").rows == [(960, 960)]
    assert ledger.query("SELECT sum(misses), count(*) FROM hits_by_run WHERE status = 'ok'").rows == [(960, 48)]
    assert store.check() == []


HELD = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1])
connection.execute("CREATE TABLE IF NOT EXISTS of_the_notebook (n INTEGER)")
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_ledger_held_by_another_program_is_locked_and_loses_nothing(pair: tuple[Store, Ledger]) -> None:
    store, ledger = pair
    ask_all(store, FIRST, NOON, [(make_action(prompt=(1,)), make_result())])
    ledger.sync(store)
    ask_all(store, SECOND, NOON, [(make_action(prompt=(2,)), make_result())])
    waiting = store.waiting.count()
    notebook = subprocess.Popen(
        [sys.executable, "-c", HELD, str(ledger.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert notebook.stdout is not None
    assert notebook.stdout.readline() == "held\n"
    try:
        for act in (lambda: ledger.sync(store), lambda: ledger.query("SELECT 1"), lambda: ledger.rebuild(store)):
            with pytest.raises(LedgerLockedError) as caught:
                act()
            assert caught.value.exit_code == 3
            assert caught.value.path == ledger.path
        assert store.waiting.count() == waiting
    finally:
        notebook.communicate("\n")
    assert ledger.sync(store).entries == 1
    assert ledger.query("SELECT count(*) FROM outputs").rows == [(2,)]


def test_a_ledger_held_by_this_very_process_is_locked(pair: tuple[Store, Ledger]) -> None:
    store, ledger = pair
    cold_and_warm(store)
    with duckdb.connect(str(ledger.path)) if ledger.sync(store).entries else None, pytest.raises(LedgerLockedError):
        ledger.query("SELECT 1")


def test_processes_queue_for_their_turn(pair: tuple[Store, Ledger]) -> None:
    store, ledger = pair
    cold_and_warm(store)
    ledger.sync(store)
    impatient = Ledger(ledger.path, lock_timeout_s=0.05)
    with ledger.turn(), pytest.raises(LedgerLockedError):
        impatient.query("SELECT 1")
    assert impatient.query("SELECT 1").rows == [(1,)]


class TestRebuild:
    def test_a_lost_ledger_comes_back_from_the_store(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ask_all(store, SECOND, NOON + 200, [(make_action(TUNED, hole=b"\x01"), full_result())], TUNED)
        ledger.sync(store)
        before = dump(ledger)
        ledger.path.unlink()
        report = ledger.rebuild(store)
        assert (report.entries, report.skipped) == (4, 0)
        after = dump(ledger)
        for table in ("requests", "outputs", "modules", "fields"):
            assert after[table] == before[table] != []
        assert ledger.query("SELECT count(*) FROM models").rows == [(2,)]

    def test_adds_only_what_is_missing(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        keys = cold_and_warm(store)
        ledger.sync(store)
        before = dump(ledger)
        assert ledger.rebuild(store).entries == 0
        ledger.query(f"DELETE FROM outputs WHERE key = '{keys[1].hex}'", unsafe=True)
        assert ledger.rebuild(store).entries == 1
        assert dump(ledger)["outputs"] == before["outputs"]

    def test_what_waits_is_told_once(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        ask_all(store, THIRD, NOON + 200, [(make_action(TUNED), full_result())], TUNED)
        assert (ledger.rebuild(store).entries, store.waiting.count()) == (1, 0)
        ledger.sync(store)
        assert ledger.query("SELECT count(*), count(DISTINCT key) FROM outputs").rows == [(4, 4)]

    def test_a_sync_notices_that_the_ledger_was_lost(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        ledger.path.unlink()
        ledger.sync(store)
        assert ledger.query("SELECT count(*) FROM answers").rows == [(3,)]


class TestFile:
    def test_is_private_and_of_the_older_format(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
        version = ledger.query("SELECT tags FROM duckdb_databases() WHERE database_name = 'ledger'").rows[0][0]
        assert version["storage_version"] == "v1.5.0+"
        kept = {path.name for path in ledger.path.parent.iterdir()}
        assert kept == {"store", "ledger.duckdb", "ledger.duckdb.lock", "ledger.duckdb.queue"}

    def test_what_a_killed_process_left_while_it_made_one_is_cleared_away(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        left = ledger.path.with_name(f".{ledger.path.name}.{FIRST}")
        left.mkdir()
        (left / ledger.path.name).write_bytes(b"half a ledger")
        cold_and_warm(store)
        ledger.sync(store)
        assert not left.exists()

    def test_of_a_newer_schema_is_refused(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        ledger.query(f"INSERT INTO schema_version VALUES ({VERSION + 1}, TIMESTAMP '2030-01-01')", unsafe=True)
        with pytest.raises(LedgerError, match="upgrade evalcache") as caught:
            ledger.query("SELECT 1")
        assert (caught.value.expected, caught.value.found) == (VERSION, VERSION + 1)

    @pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" * 400], ids=["empty", "foreign"])
    def test_that_is_no_ledger_is_an_error_and_stays(self, pair: tuple[Store, Ledger], content: bytes) -> None:
        store, ledger = pair
        cold_and_warm(store)
        waiting = store.waiting.count()
        ledger.path.write_bytes(content)
        with pytest.raises(LedgerError):
            ledger.sync(store)
        assert ledger.path.read_bytes() == content
        assert store.waiting.count() == waiting

    def test_of_another_database_is_an_error(self, pair: tuple[Store, Ledger]) -> None:
        _, ledger = pair
        with duckdb.connect(str(ledger.path)) as connection:
            connection.execute("CREATE TABLE theirs AS SELECT 1 AS n")
        with pytest.raises(LedgerError, match="not a ledger"):
            ledger.query("SELECT 1")

    def test_every_table_and_column_is_explained_in_it(self, pair: tuple[Store, Ledger]) -> None:
        _, ledger = pair
        rows = ledger.query("SELECT table_name, comment FROM duckdb_tables() WHERE database_name = 'ledger'").rows
        assert {name for name, comment in rows if comment} == set(columns())
        rows = ledger.query(
            "SELECT c.table_name, c.column_name, c.comment FROM duckdb_columns() c JOIN duckdb_tables() t "
            "USING (database_name, table_name) WHERE database_name = 'ledger'"
        ).rows
        assert [row for row in rows if not row[2]] == []
        assert {(table, column) for table, column, _ in rows} == {
            (t, column) for t, names in columns().items() for column in names
        }

    def test_can_be_attached_under_another_name(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        with duckdb.connect() as connection:
            connection.execute(f"ATTACH '{ledger.path}' AS elsewhere (READ_ONLY)")
            assert connection.execute("SELECT count(*) FROM elsewhere.hits_by_run").fetchall() == [(2,)]


class TestQuery:
    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT * FROM read_text('/etc/passwd')",
            "SELECT * FROM '/etc/passwd'",
            "COPY (SELECT 1) TO '{folder}/out.csv'",
            "EXPORT DATABASE '{folder}/out'",
            "ATTACH '{folder}/out.duckdb' AS out",
            "INSTALL httpfs",
            "SET enable_external_access = true",
            "SET lock_configuration = false",
            "RESET enable_external_access",
            "INSERT INTO runs (run) VALUES ('x')",
            "DELETE FROM outputs",
            "DROP TABLE outputs",
            "CREATE TABLE ledger.mine AS SELECT 1 AS n",
            "SELECT 1; DROP VIEW hits_by_run",
            "SELECT * FROM read_csv('/etc/passwd')",
            "SELECT * FROM glob('/*')",
            "SELECT * FROM read_duckdb('{folder}/other.duckdb')",
            "ATTACH '{folder}/other.duckdb' AS other (READ_ONLY)",
            "LOAD httpfs",
            "CREATE SECRET s (TYPE s3)",
            "SET temp_directory = '{folder}/temp'",
            "SET log_query_path = '{folder}/log'",
            "PRAGMA profile_output = '{folder}/profile'",
            "CALL enable_logging('QueryLog', storage = 'file', storage_config = {{'path': '{folder}/logs'}}); SELECT 1",
            "SELECT * FROM Enable_Logging('QueryLog', storage := 'file', storage_path := '{folder}/logs'); SELECT 1",
        ],
    )
    def test_reaches_no_file_and_changes_nothing(self, pair: tuple[Store, Ledger], sql: str, tmp_path: Path) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        duckdb.connect(str(tmp_path / "other.duckdb")).close()
        before, files = dump(ledger), sorted(tmp_path.iterdir())
        with pytest.raises(LedgerError):
            ledger.query(sql.format(folder=tmp_path))
        assert dump(ledger) == before
        assert sorted(tmp_path.iterdir()) == files

    def test_unsafe_may_write(self, pair: tuple[Store, Ledger], tmp_path: Path) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
        ledger.query(f"COPY (SELECT run FROM hits_by_run) TO '{tmp_path}/runs.csv' (HEADER false)", unsafe=True)
        assert sorted((tmp_path / "runs.csv").read_text().split()) == [FIRST, SECOND]

    def test_errors_are_told_in_duckdbs_words(self, pair: tuple[Store, Ledger]) -> None:
        _, ledger = pair
        with pytest.raises(LedgerError, match="nonsuch") as caught:
            ledger.query("SELECT * FROM nonsuch")
        assert caught.value.path == ledger.path

    def test_names_of_others_are_values_and_never_sql(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        evil = "x'); DROP TABLE ledger.outputs; --\"\x00\n{{[$1]}}"
        action = make_action()
        keys = write(store, FIRST, NOON, [(action, make_result(text=evil))], begin(FIRST, NOON, BASE, evil, command=evil), BASE)
        asked = look(FIRST, NOON, [(keys[0], "miss", evil, 1.0)])
        told = [type(asked)(**{**{n: getattr(asked, n) for n in asked.__slots__}, "tasks": (evil,), "documents": (evil,)})]
        write(store, FIRST, NOON, (), [*told, RunEnded(FIRST, NOON, evil)])
        ledger.sync(store)
        assert ledger.query("SELECT name FROM model_names WHERE name = ?", [evil]).rows == [(evil,)]
        assert ledger.query("SELECT task, document FROM lookups").rows == [(evil, evil)]
        assert ledger.query("SELECT command FROM runs").rows == ledger.query("SELECT text FROM outputs").rows == [(evil,)]
        assert ledger.query("SELECT status FROM hits_by_run").rows == [(evil,)]

    def test_a_path_with_quotes_is_a_path(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "store")
        cold_and_warm(store)
        ledger = Ledger(tmp_path / "it's; DROP" / "a 'ledger'.duckdb")
        ledger.sync(store)
        assert ledger.query("SELECT count(*) FROM hits_by_run").rows == [(2,)]

    @pytest.mark.parametrize("written", ["hex", "literal", "uuid"])
    def test_digests_are_found_however_they_are_written(self, pair: tuple[Store, Ledger], written: str) -> None:
        store, ledger = pair
        key = cold_and_warm(store)[1]
        ledger.sync(store)
        where = f"key = '{key.hex}'" if written == "literal" else "key = ?"
        dashed = "-".join((key.hex[:8], key.hex[8:12], key.hex[12:16], key.hex[16:20], key.hex[20:]))
        params = {"hex": [key.hex], "literal": [], "uuid": [dashed]}[written]
        assert ledger.query(f"SELECT key, token_ids FROM outputs WHERE {where}", params).rows == [(key.hex, [7, 1])]


class TestViews:
    """Numbers against those that `recorded.cold_and_warm` says in words, and once more with every row there twice."""

    @pytest.fixture(params=["once", "twice"])
    def ledger(self, request: pytest.FixtureRequest, pair: tuple[Store, Ledger]) -> Ledger:
        store, ledger = pair
        cold_and_warm(store)
        ask_all(store, "4" * 32, NOON + 300, [(make_action(TUNED, (1, 2, 0)), make_result((7, 0), 1.0))], TUNED, "tuned")
        other = [(make_action(TUNED, (1, 2, 1)), make_result((9, 9), 1.0)), (make_action(TUNED, (8, 8)), make_result((9,), 1.0))]
        ask_all(store, "5" * 32, NOON + 400, other, TUNED, "tuned")
        ledger.sync(store)
        if request.param == "twice":
            with ledger.reading(unsafe=True) as ask:
                for table in columns():
                    ask(f"INSERT INTO {table} SELECT * FROM {table}")
        return ledger

    def test_hits_by_run(self, ledger: Ledger) -> None:
        row = only(ledger.query("SELECT * FROM hits_by_run WHERE run = ?", [FIRST]))
        assert (row["hits"], row["misses"], row["uncacheable"], row["duplicates"], row["model_loads"]) == (0, 3, 0, 1, 1)
        assert (row["credited_seconds"], row["duplicate_seconds"], row["spent_seconds"]) == (0.0, 4.0, 7.0)
        assert (row["overhead_seconds"], row["saved_seconds"]) == (0.75, -0.75)
        assert (row["hit_rate"], row["hit_rate_by_seconds"], row["status"]) == (0.0, 0.0, "ok")
        row = only(ledger.query("SELECT * FROM hits_by_run WHERE run = ?", [SECOND]))
        assert (row["hits"], row["misses"], row["uncacheable"], row["duplicates"], row["model_loads"]) == (3, 0, 3, 0, 0)
        assert (row["credited_seconds"], row["spent_seconds"], row["unmeasured_hits"]) == (3.0, 6.0, 1)
        assert (row["overhead_seconds"], row["saved_seconds"]) == (1.125, 1.875)
        assert (row["hit_rate"], row["hit_rate_by_seconds"], row["status"]) == (0.5, 1 / 3, "failed")
        assert [row[0] for row in ledger.query("SELECT run FROM hits_by_run").rows] == ["5" * 32, "4" * 32, SECOND, FIRST]

    def test_uncacheable_by_reason(self, ledger: Ledger) -> None:
        assert ledger.query("SELECT * FROM uncacheable_by_reason").rows == [
            (SECOND, "streamer", 2, 6.0, "a TextStreamer"),
            (SECOND, "training", 1, None, None),
        ]

    def test_outputs_side_by_side(self, ledger: Ledger) -> None:
        rows = ledger.query(
            "SELECT prompt_token_ids, token_ids_a, token_ids_b, same, same_environment, names_a, names_b, model_a, model_b "
            "FROM outputs_side_by_side ORDER BY prompt_token_ids"
        ).rows
        models = (["base"], ["tuned"], BASE.root.hex, TUNED.root.hex)
        assert rows == [([1, 2, 0], [7, 0], [7, 0], True, True, *models), ([1, 2, 1], [7, 1], [9, 9], False, True, *models)]

    def test_modules_shared(self, ledger: Ledger) -> None:
        rows = ledger.query("SELECT class, bytes, paths_a, paths_b, names_a, names_b FROM modules_shared ORDER BY paths_a").rows
        assert rows == [
            ("tiny.Linear", 8, ["embed"], ["embed"], ["base"], ["tuned"]),
            ("tiny.Linear", 8, ["layers.0"], ["layers.0"], ["base"], ["tuned"]),
        ]

    def test_answers(self, ledger: Ledger) -> None:
        assert ledger.query("SELECT count(*), sum(seconds) FROM answers").rows == [(6, 10.0)]

    def test_a_run_without_an_end_is_unfinished(self, ledger: Ledger, pair: tuple[Store, Ledger]) -> None:
        write(
            pair[0], "6" * 32, NOON, (), [*begin("6" * 32, NOON), *begin("6" * 32, NOON + 1), RunEnded("6" * 32, NOON + 2, "ok")]
        )
        ledger.sync(pair[0])
        assert ledger.query("SELECT status FROM hits_by_run WHERE run = ?", ["6" * 32]).rows == [("unfinished",)]


def documents(run: str, names: dict[str, str], task: str = "gsm8k", client: str = "lm_eval") -> DocumentsSeen:
    digests = tuple(digest_bytes(content.encode()).value for content in names.values())
    return DocumentsSeen(run, client, task, tuple(names), digests, tuple(names.values()))


def scored(
    run: str, values: dict[str, float], clusters: dict[str, str] | None = None, metric: str = "acc", role: str = "", **of: str
) -> Scored:
    grouped = tuple((clusters or {}).get(name, "") for name in values)
    told = (tuple(values), (metric,) * len(values), tuple(values.values()), grouped, (b"",) * len(values))
    return Scored(run, of.get("client", "lm_eval"), of.get("task", "gsm8k"), role, *told)


def tell(pair: tuple[Store, Ledger], *events: Event) -> int:
    """Through the store into the ledger; returns how many events were skipped."""
    store, ledger = pair
    write(store, FIRST, NOON, (), events)
    return ledger.sync(store).skipped


class TestWhatAnEvalIsAbout:
    def test_every_field_arrives(self, pair: tuple[Store, Ledger]) -> None:
        _, ledger = pair
        content = '{"question": "naïve 😀 \'\\"\\\\", "choices": [1, 2.5, null]}'
        events = [
            TaskSeen(FIRST, "lm_eval", "gsm8k", "3.0", {"shots": 5, "split": "test", "stop": ["\n", {"raw": b"\x00\xff"}]}),
            documents(FIRST, {"7": content, "large": ""}),
            Scored(
                FIRST, "lm_eval", "gsm8k", "judge", ("7", "8"), ("acc", "f1"), (1 / 3, 5e-324), ("a", ""), (bytes(range(16)), b"")
            ),
        ]
        assert tell(pair, *events) == 0
        assert ledger.query("SELECT * FROM tasks").rows == [
            ("lm_eval", "gsm8k", "3.0", '{"stop": ["\\n", {"raw": "00ff"}], "shots": 5, "split": "test"}')
        ]
        assert ledger.query("SELECT * FROM documents ORDER BY document").rows == [
            ("lm_eval", "gsm8k", "7", digest_bytes(content.encode()).hex, content),
            ("lm_eval", "gsm8k", "large", digest_bytes(b"").hex, None),
        ]
        assert ledger.query("SELECT content->>'question' FROM documents WHERE document = '7'").rows == [("naïve 😀 '\"\\",)]
        first, second = ledger.query("SELECT * EXCLUDE (store, seq) FROM scores ORDER BY n").rows
        assert first == (0, FIRST, bytes(range(16)).hex(), "lm_eval", "gsm8k", "7", "judge", "acc", 1 / 3, "a")
        assert second == (1, FIRST, None, "lm_eval", "gsm8k", "8", "judge", "f1", 5e-324, None)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_is_null_and_counted(self, pair: tuple[Store, Ledger], value: float) -> None:
        assert tell(pair, scored(FIRST, {"1": value, "2": 1.0, "3": 0.0})) == 0
        assert pair[1].query("SELECT value FROM scores ORDER BY n").rows == [(None,), (1.0,), (0.0,)]
        row = only(pair[1].query("SELECT * FROM scores_by_run"))
        assert (row["documents"], row["unscored"], row["mean"], row["standard_error"]) == (2, 1, 0.5, 0.5)

    @pytest.mark.parametrize("at_once", [True, False], ids=["one sync", "three syncs"])
    def test_tasks_and_documents_are_written_once(self, pair: tuple[Store, Ledger], at_once: bool) -> None:
        told = [
            [TaskSeen(run, "lm_eval", "gsm8k", "3.0", {"shots": 5, "split": "test"}), documents(run, {"1": "{}", "2": "[]"})]
            for run in (FIRST, SECOND, THIRD)
        ]
        for events in [[*told[0], *told[1], *told[2]]] if at_once else told:
            assert tell(pair, *events) == 0
        assert pair[1].query("SELECT count(*) FROM tasks").rows == [(1,)]
        assert pair[1].query("SELECT document, content FROM documents ORDER BY document").rows == [("1", "{}"), ("2", "[]")]

    def test_twice_within_one_event_is_once(self, pair: tuple[Store, Ledger]) -> None:
        one = documents(FIRST, {"1": "{}"})
        tell(pair, DocumentsSeen(FIRST, one.client, one.task, one.documents * 3, one.digests * 3, one.contents * 3))
        assert pair[1].query("SELECT count(*) FROM documents").rows == [(1,)]

    @pytest.mark.parametrize("name", ["it's; DROP", "nul\x00", "naïve 😀", "3"])
    def test_odd_names_are_known_again(self, pair: tuple[Store, Ledger], name: str) -> None:
        for run in (FIRST, SECOND):
            tell(pair, TaskSeen(run, name, name, name, {name: name}), documents(run, {name: "{}"}, name, name))
        assert pair[1].query("SELECT client, task, version FROM tasks").rows == [(name,) * 3]
        assert pair[1].query("SELECT client, task, document FROM documents").rows == [(name,) * 3]

    def test_each_part_of_the_identity_makes_another_row(self, pair: tuple[Store, Ledger]) -> None:
        tell(pair, TaskSeen(FIRST, "a", "t", "1", {"shots": 0}), documents(FIRST, {"1": "{}"}, "t", "a"))
        tell(
            pair,
            TaskSeen(SECOND, "b", "t", "1", {"shots": 0}),
            TaskSeen(SECOND, "a", "u", "1", {"shots": 0}),
            TaskSeen(SECOND, "a", "t", "2", {"shots": 0}),
            TaskSeen(SECOND, "a", "t", "1", {"shots": 0.0}),
            TaskSeen(SECOND, "a", "t", "1", {}),
            documents(SECOND, {"1": "{}"}, "t", "b"),
            documents(SECOND, {"1": "{}"}, "u", "a"),
            documents(SECOND, {"2": "{}"}, "t", "a"),
            documents(SECOND, {"1": "[]"}, "t", "a"),
        )
        assert pair[1].query("SELECT count(*) FROM tasks").rows == [(6,)]
        assert pair[1].query("SELECT count(*) FROM documents").rows == [(5,)]

    def test_of_another_store_is_known_too(self, tmp_path: Path) -> None:
        one, ledger = open_pair(tmp_path)
        other = Store(tmp_path / "other")
        for store in (one, other):
            tell((store, ledger), TaskSeen(FIRST, "lm_eval", "gsm8k"), documents(FIRST, {"1": "{}"}), scored(FIRST, {"1": 1.0}))
        assert ledger.query("SELECT (SELECT count(*) FROM tasks), (SELECT count(*) FROM documents)").rows == [(1, 1)]
        assert ledger.query("SELECT count(*) FROM scores").rows == [(2,)]

    def test_a_task_of_many_documents_arrives_whole_and_once(self, pair: tuple[Store, Ledger]) -> None:
        names = [f"{n}" for n in range(25_000)]
        parts = [names[start : start + 2000] for start in range(0, len(names), 2000)]
        for run in (FIRST, SECOND):
            told = [documents(run, {name: f'{{"n": {name}}}' for name in part}) for part in parts]
            tell(pair, *told, *(scored(run, {name: float(name) for name in part}) for part in parts))
        assert pair[1].query("SELECT count(*), count(DISTINCT digest) FROM documents").rows == [(25_000, 25_000)]
        assert pair[1].query("SELECT documents, mean FROM scores_by_run").rows == [(25_000, 12_499.5)] * 2

    def test_what_is_malformed_stops_nothing(self, pair: tuple[Store, Ledger]) -> None:
        good = documents(FIRST, {"1": "{}"})
        events = [
            DocumentsSeen(FIRST, "lm_eval", "gsm8k", ("1", "2"), good.digests, good.contents),
            Scored(FIRST, "lm_eval", "gsm8k", "", ("1",), ("acc",), (), ("",), (b"",)),
            Scored(FIRST, "lm_eval", "gsm8k", "", ("1",), ("acc",), ("high",), ("",), (b"",)),  # type: ignore[arg-type]
            Scored(FIRST, "lm_eval", "gsm8k", "", ("1",), ("acc",), (1.0,), ("",), (3,)),  # type: ignore[arg-type]
            DocumentsSeen(FIRST, "lm_eval", "gsm8k", ("1",), ("x" * 16,), ("{}",)),  # type: ignore[arg-type]
            TaskSeen(FIRST, "lm_eval", "gsm8k", "1", None),  # type: ignore[arg-type]
        ]
        odd = DocumentsSeen(FIRST, "lm_eval", "gsm8k", ("short", "no json"), (b"\x01", bytes(16)), ("{}", "{'a'"))
        assert tell(pair, *events, odd, good, scored(FIRST, {"1": 1.0})) == len(events)
        assert pair[0].waiting.count() == 0
        assert pair[1].query("SELECT document, digest, content FROM documents ORDER BY document").rows == [
            ("1", digest_bytes(b"{}").hex, "{}"),
            ("no json", bytes(16).hex(), None),
            ("short", None, "{}"),
        ]
        assert pair[1].query("SELECT document, value FROM scores").rows == [("1", 1.0)]

    def test_a_lost_ledger_loses_them(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        cold_and_warm(store)
        tell(pair, TaskSeen(FIRST, "lm_eval", "gsm8k"), documents(FIRST, {"1": "{}"}), scored(FIRST, {"1": 1.0}))
        ledger.path.unlink()
        assert ledger.rebuild(store).entries == 3
        for table in ("tasks", "documents", "scores"):
            assert ledger.query(f"SELECT count(*) FROM {table}").rows == [(0,)]
        # The next run tells its tasks and documents again.
        tell(pair, TaskSeen(SECOND, "lm_eval", "gsm8k"), documents(SECOND, {"1": "{}"}))
        assert ledger.query("SELECT count(*) FROM tasks").rows == ledger.query("SELECT count(*) FROM documents").rows == [(1,)]


class TestScores:
    """The views, and once more with every row there twice."""

    @pytest.fixture(params=["once", "twice"])
    def told(self, request: pytest.FixtureRequest, pair: tuple[Store, Ledger]):
        def tell_all(*events: Event) -> Ledger:
            assert tell(pair, *events) == 0
            if request.param == "twice":
                with pair[1].reading(unsafe=True) as ask:
                    for table in columns():
                        ask(f"INSERT INTO {table} SELECT * FROM {table}")
            return pair[1]

        return tell_all

    def test_a_mean_has_the_usual_standard_error(self, told) -> None:
        values = np.random.default_rng(1).normal(size=50)
        row = only(told(scored(FIRST, {str(n): float(v) for n, v in enumerate(values)})).query("SELECT * FROM scores_by_run"))
        assert (row["run"], row["client"], row["task"], row["role"], row["metric"]) == (FIRST, "lm_eval", "gsm8k", "", "acc")
        assert (row["documents"], row["clusters"], row["unscored"]) == (50, None, 0)
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert row["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-12)

    def test_documents_of_a_cluster_are_not_independent(self, told) -> None:
        # Four documents of two clusters, which agree within: as good as two. Mean 1/2; deviations of the clusters ±1;
        # sqrt((1 + 1) · 2 / 1) / 4 = 1/2, where documents by themselves would have had sqrt(1/12) = 0.29.
        clusters = {"1": "a", "2": "a", "3": "b", "4": "b"}
        row = only(told(scored(FIRST, {"1": 1, "2": 1, "3": 0, "4": 0}, clusters)).query("SELECT * FROM scores_by_run"))
        assert (row["documents"], row["clusters"], row["mean"], row["standard_error"]) == (4, 2, 0.5, 0.5)

    def test_clusters_of_unequal_size_and_documents_without_one(self, told) -> None:
        rng = np.random.default_rng(2)
        values, groups = rng.normal(size=40), rng.integers(0, 7, size=40)
        clusters = {str(n): f"c{group}" for n, group in enumerate(groups) if group}  # group 0: each by itself
        ledger = told(scored(FIRST, {str(n): float(v) for n, v in enumerate(values)}, clusters))
        labels = np.where(groups == 0, 100 + np.arange(40), groups)
        # Every pair of a cluster's documents, as the paper has it.
        away = values - values.mean()
        pairs = float(np.where(labels[:, None] == labels[None, :], np.outer(away, away), 0.0).sum())
        count = len(set(labels.tolist()))
        row = only(ledger.query("SELECT * FROM scores_by_run"))
        assert row["standard_error"] == pytest.approx(math.sqrt(pairs * count / (count - 1)) / 40, rel=1e-12)
        assert (row["documents"], row["clusters"]) == (40, 6)

    @pytest.mark.parametrize("clusters", [None, {"1": "a", "2": "a"}], ids=["one document", "one cluster"])
    def test_one_alone_has_no_standard_error(self, told, clusters: dict[str, str] | None) -> None:
        values = {"1": 1.0, "2": 0.0} if clusters else {"1": 0.5}
        row = only(told(scored(FIRST, values, clusters)).query("SELECT * FROM scores_by_run"))
        assert (row["mean"], row["standard_error"]) == (0.5, None)

    def test_no_finite_value_has_no_mean(self, told) -> None:
        row = only(told(scored(FIRST, {"1": math.nan, "2": math.inf})).query("SELECT * FROM scores_by_run"))
        assert (row["documents"], row["unscored"], row["mean"], row["standard_error"]) == (0, 2, None, None)

    def test_values_at_the_edge_of_a_double_do_not_break_it(self, told) -> None:
        ledger = told(
            scored(FIRST, {"1": 1.7e308, "2": 1.7e308, "3": -1.7e308}),
            scored(SECOND, {"1": -1.7e308, "2": 1.0}),
            scored(THIRD, {"1": 1.0, "2": 0.0}),
        )
        rows = {row[0]: row[1:] for row in ledger.query("SELECT run, mean, standard_error FROM scores_by_run").rows}
        assert len(rows) == 3
        assert rows[THIRD] == (0.5, 0.5)
        assert len(ledger.query("SELECT * FROM scores_side_by_side").rows) == 2 + 2 + 2

    def test_tries_of_one_document_count_once(self, told) -> None:
        ledger = told(scored(FIRST, {"1": 1.0, "2": 0.0}), scored(FIRST, {"1": 0.0}), scored(FIRST, {"1": 0.5, "2": math.nan}))
        row = only(ledger.query("SELECT * FROM scores_by_run"))
        assert (row["documents"], row["unscored"], row["mean"], row["standard_error"]) == (2, 0, 0.25, 0.25)
        rows = ledger.query("SELECT document, value, tries FROM scores_by_document ORDER BY document").rows
        assert rows == [("1", 0.5, 3), ("2", 0.0, 1)]

    def test_rows_without_a_document_stay_apart(self, told) -> None:
        event = Scored(FIRST, "mine", "t", "", ("",) * 3, ("acc",) * 3, (1.0, 1.0, 0.0), ("",) * 3, (b"",) * 3)
        ledger = told(event, scored(SECOND, {"": 1.0}, client="mine", task="t"))
        rows = ledger.query("SELECT run, documents, mean FROM scores_by_run").rows
        assert rows == [(FIRST, 3, pytest.approx(2 / 3)), (SECOND, 1, 1.0)]
        assert ledger.query("SELECT * FROM scores_side_by_side").rows == []

    def test_each_part_of_a_line_makes_another(self, told) -> None:
        ledger = told(
            scored(FIRST, {"1": 0.0}),
            scored(SECOND, {"1": 1.0}),
            scored(FIRST, {"1": 2.0}, client="mine"),
            scored(FIRST, {"1": 3.0}, task="mmlu"),
            scored(FIRST, {"1": 4.0}, role="judge"),
            scored(FIRST, {"1": 5.0}, metric="f1"),
        )
        assert sorted(ledger.query("SELECT mean FROM scores_by_run").rows) == [(float(n),) for n in range(6)]

    def test_two_runs_side_by_side(self, told) -> None:
        def asked(run: str, model, role: str = "") -> LookedUp:
            return LookedUp(run, NOON, model.root.value, "lm_eval", role, (bytes(16),), ("miss",), ("absent",), (1.0,))

        late, early = FIRST, SECOND
        ledger = told(
            *begin(late, NOON + 100, TUNED, "tuned"),
            *begin(early, NOON, BASE, "base"),
            asked(late, TUNED),
            asked(early, BASE),
            asked(early, TUNED, "judge"),
            scored(late, {"1": 1.0, "2": 0.25, "4": 1.0}),
            scored(early, {"1": 0.0, "2": 0.75, "3": 1.0}),
            scored(early, {"1": 9.0}, role="judge"),
            scored(late, {"1": 9.0}, task="mmlu"),
            scored(THIRD, {"2": math.nan}),
        )
        rows = ledger.query("SELECT * FROM scores_side_by_side ORDER BY document, run_a, run_b")
        same = ("lm_eval", "gsm8k", "", "acc")
        base, tuned = [BASE.root.hex], [TUNED.root.hex]
        assert rows.rows == [
            (*same, "1", 0.0, 1.0, 1.0, ["base"], ["tuned"], base, tuned, early, late),
            (*same, "2", 0.25, None, None, ["tuned"], None, tuned, None, late, THIRD),
            (*same, "2", 0.75, 0.25, -0.5, ["base"], ["tuned"], base, tuned, early, late),
            (*same, "2", 0.75, None, None, ["base"], None, base, None, early, THIRD),
        ]

    def test_side_by_side_names_the_models(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair
        ask_all(store, FIRST, NOON, [(make_action(), make_result())], BASE, "base")
        ask_all(store, SECOND, NOON + 50, [(make_action(TUNED), make_result())], TUNED, "tuned")
        tell(pair, scored(FIRST, {"1": 0.0}), scored(SECOND, {"1": 1.0}))
        rows = ledger.query("SELECT names_a, names_b, difference FROM scores_side_by_side").rows
        assert rows == [(["base"], ["tuned"], 1.0)]


def test_tokens_of_many_lengths_stay_in_order(pair: tuple[Store, Ledger]) -> None:
    store, ledger = pair
    prompts = [list(range(n, n + n % 97)) for n in range(700)]
    keys = ask_all(
        store, FIRST, NOON, [(make_action(prompt=prompt, n=n), make_result(prompt)) for n, prompt in enumerate(prompts)]
    )
    ledger.sync(store)
    kept = dict(ledger.query("SELECT key, prompt_token_ids FROM requests").rows)
    assert [kept[key.hex] for key in keys] == prompts
    assert ledger.query("SELECT key, token_ids FROM outputs ORDER BY key").rows == sorted(kept.items())
    assert pack_tokens(kept[keys[300].hex]) == pack_tokens(prompts[300])


def test_questions_and_syncs_do_not_import_pandas(tmp_path: Path) -> None:
    """DuckDB does, for each value that is bound: half a second, where somebody has it installed."""
    pytest.importorskip("pandas", reason="needs pandas (comes with llm-evalcache[lm-eval])")
    code = """
import sys
from evalcache.cache import Cache
from evalcache.ledger import Ledger
with_quote = "it's; DROP TABLE runs --"
cache = Cache(sys.argv[1])
cache.uncacheable("streamer", "a test", requests=2)
cache.close()
asked = Ledger(cache.ledger_path).query("SELECT ? AS text, ?, ? FROM runs", [with_quote, 3, None])
assert asked.rows == [(with_quote, 3, None)], asked.rows
print(sorted({"pandas", "pyarrow", "polars"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
