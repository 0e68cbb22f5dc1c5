"""The ledger on real files: told by a real store, killed, locked, rebuilt, and asked by people who may not be trusted."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
from recorded import (
    BASE,
    FIRST,
    NOON,
    SECOND,
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
from evalcache.errors import LedgerError, LedgerLockedError
from evalcache.journal import RunEnded
from evalcache.ledger import Ledger, Table
from evalcache.records import pack_tokens
from evalcache.schema import VERSION, columns
from evalcache.store import Store


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Store, Ledger]:
    return open_pair(tmp_path)


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
        assert store.journal_count() == 0
        report = ledger.sync(store)
        assert (report.events, report.entries) == (0, 0)
        assert dump(ledger) == before

    def test_events_that_were_taken_in_but_not_forgotten_are_not_counted_twice(self, pair: tuple[Store, Ledger]) -> None:
        store, ledger = pair

        class ForgetsNothing(Store):
            def forget_journal(self, through: int) -> None:
                raise KeyboardInterrupt

        cold_and_warm(store)
        with pytest.raises(KeyboardInterrupt):
            ledger.sync(ForgetsNothing(store.directory))
        before, waiting = dump(ledger), store.journal_count()
        assert waiting > 0
        report = ledger.sync(store)
        assert (report.events, store.journal_count()) == (0, 0)
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
        waiting, told = store.journal_count(), []
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
    assert store.journal_count() == 0
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
    waiting = store.journal_count()
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
        assert store.journal_count() == waiting
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
    with ledger._turn(), pytest.raises(LedgerLockedError):
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
        assert kept == {"store", "ledger.duckdb", "ledger.duckdb.lock"}

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
        waiting = store.journal_count()
        ledger.path.write_bytes(content)
        with pytest.raises(LedgerError):
            ledger.sync(store)
        assert ledger.path.read_bytes() == content
        assert store.journal_count() == waiting

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
        ],
    )
    def test_reaches_no_file_and_changes_nothing(self, pair: tuple[Store, Ledger], sql: str, tmp_path: Path) -> None:
        store, ledger = pair
        cold_and_warm(store)
        ledger.sync(store)
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
