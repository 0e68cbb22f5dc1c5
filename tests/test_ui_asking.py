"""What SQL may do in `evalcache ui`, and for how long."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from recorded import FIRST, NOON, look, make_action, open_pair, write
from served_ui import fill

from evalcache.cache import END_PATIENCE_S
from evalcache.errors import LedgerError, LedgerLockedError
from evalcache.key import key_of
from evalcache.ledger import Ledger
from evalcache.ui.asking import ANSWER_BYTES, CELL_CHARACTERS, ROWS, SECONDS, Asker, answer

TEMPLATES = Path(__file__).parent.parent / "evalcache" / "report" / "templates"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger that nobody serves."""
    return fill(tmp_path_factory.mktemp("asked"))


class TestQuestions:
    """What SQL may do."""

    @pytest.mark.parametrize(
        "sql",
        ["SELECT run, hits FROM audit_by_run", "SHOW TABLES", "DESCRIBE runs", "SUMMARIZE runs", "FROM runs", "SELECT 1 -- end",
         "SELECT 1;", "WITH a AS (SELECT 1 AS x) SELECT * FROM a", "VALUES (1), (2)", "SELECT 'it''s' AS \"q\"\"\""],
    )  # fmt: skip
    def test_a_question_is_answered_as_evalcache_query_answers_it(self, path: Path, sql: str) -> None:
        found, table = answer(path, sql), Ledger(path).query(sql)
        assert list(found["columns"]) == list(table.columns)
        assert len(found["rows"]) == len(table.rows) and not found["cut"]

    @pytest.mark.parametrize(
        "sql",
        ["INSERT INTO runs SELECT * FROM runs", "DELETE FROM runs", "UPDATE runs SET run = ''", "DROP VIEW audit_by_run",
         "CREATE TABLE x (a INT)", "CREATE TEMP TABLE x (a INT)", "CREATE TABLE memory.main.x (a INT)",
         "ALTER TABLE runs ADD x INT",
         "ATTACH ':memory:' AS m", "ATTACH '/tmp/x.duckdb'", "DETACH ledger", "USE memory", "COPY runs TO '/tmp/x.csv'",
         "COPY (SELECT 1) TO '/tmp/x.csv'", "EXPORT DATABASE '/tmp/x'", "IMPORT DATABASE '/tmp/x'", "INSTALL httpfs",
         "LOAD httpfs",
         "SET threads = 1", "SET GLOBAL enable_external_access = true", "SET lock_configuration = false", "RESET threads",
         "PRAGMA database_size", "PRAGMA threads = 1", "CALL pragma_version()", "CHECKPOINT", "VACUUM", "BEGIN", "COMMIT",
         "CREATE SECRET (TYPE s3)", "CREATE MACRO m() AS 1", "PREPARE p AS SELECT 1", "EXECUTE p", "EXPLAIN ANALYZE SELECT 1",
         "SELECT 1; SELECT 2", "SELECT 1; DROP VIEW audit_by_run", "SELECT 1) LIMIT 1; DROP VIEW audit_by_run; --",
         "SELECT '1'') ; DROP VIEW audit_by_run; --", "", ";", "-- nothing",
         "SELECT * FROM read_text('{secret}')", "SELECT * FROM '{secret}'", "SELECT * FROM read_csv('{secret}')",
         "SELECT * FROM read_blob('{secret}')", "SELECT * FROM read_json('{secret}')", "SELECT * FROM parquet_scan('{secret}')",
         "SELECT * FROM glob('{secret}')", "SELECT * FROM sniff_csv('{secret}')", "SELECT * FROM query('SELECT 1; SELECT 2')",
         "SELECT * FROM query('ATTACH ''/tmp/x''')", "SELECT * FROM query_table(['{secret}'])", "SELECT getenv('HOME')",
         "SELECT * FROM duckdb_secrets()", "SELECT * FROM sqlite_scan('{secret}', 't')", "SELECT * FROM read_duckdb('{secret}')",
         "SELECT * FROM 'http://127.0.0.1:9/x.csv'", "SELECT * FROM pandas_scan(1)", "SELECT * FROM sys",
         "SELECT * FROM question"],
    )  # fmt: skip
    def test_it_reads_the_ledger_and_nothing_else(self, path: Path, tmp_path: Path, sql: str) -> None:
        secret = tmp_path / "secret.csv"
        secret.write_text("a,b\nkeep,this\n")
        question = [1, 2, 3]  # a name that DuckDB could find in the frames above
        before = path.read_bytes()
        with pytest.raises(LedgerError) as caught:
            answer(path, sql.format(secret=secret))
        assert "keep" not in str(caught.value)
        assert path.read_bytes() == before
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["secret.csv"]
        assert len(question) == 3

    def test_values_are_exact(self, path: Path) -> None:
        sql = """SELECT 0.1::DOUBLE + 0.2 AS spent_seconds, 9007199254740993 AS bytes,
            12345678901234567890123456789::HUGEINT AS h, 1.10::DECIMAL(4, 2) AS d,
            'NaN'::DOUBLE AS n, NULL AS nothing, true AS b, TIMESTAMP '2026-01-02 03:04:05.5' AS at,
            '\u202e<b>\x1b[2J' AS text, '\\xFF'::BLOB AS blob, [1, NULL] AS list, MAP {[1]: 2} AS map, {'a': 'ü'} AS struct,
            md5('a')::UUID AS digest"""
        found = answer(path, sql)
        told = dict(zip(found["columns"], found["rows"][0], strict=True))
        assert told | {"map": ""} == {
            "spent_seconds": "0.30000000000000004", "bytes": "9007199254740993", "h": "12345678901234567890123456789",
            "d": "1.10", "n": "nan", "nothing": None, "b": "true", "at": "2026-01-02 03:04:05.500000", "text": "\u202e<b>\x1b[2J",
            "blob": "ff", "list": "[1, null]", "map": "", "struct": '{"a": "ü"}', "digest": "0cc175b9c0f1b6a831c399e269772661",
        }  # fmt: skip
        assert [name for name, right in zip(found["columns"], found["numeric"], strict=True) if right] == [
            "spent_seconds", "bytes", "h", "d", "n", "nothing",
        ]  # fmt: skip

    def test_rows_are_cut_and_it_is_said(self, path: Path) -> None:
        found = answer(path, "SELECT range AS n FROM range(1000000) ORDER BY n")
        assert (len(found["rows"]), found["rows"][-1], found["cut"]) == (ROWS, [str(ROWS - 1)], True)
        found = answer(path, f"SELECT * FROM range({ROWS})")
        assert (len(found["rows"]), found["cut"]) == (ROWS, False)

    def test_texts_are_cut_and_it_is_said(self, path: Path) -> None:
        found = answer(path, f"SELECT repeat('x', {CELL_CHARACTERS} + range) FROM range(2)")
        assert [len(row[0]) for row in found["rows"]] == [CELL_CHARACTERS, CELL_CHARACTERS + 1]
        assert (found["cut"], found["cut_cells"]) == (False, 1)
        found = answer(path, f"SELECT repeat('x', {CELL_CHARACTERS}) FROM range(1000)")
        assert found["cut"] and len(found["rows"]) == ANSWER_BYTES // CELL_CHARACTERS

    def test_errors_are_in_duckdbs_words_without_ours(self, path: Path) -> None:
        for sql, said in [
            ("SELEC 1", 'Parser Error: syntax error at or near "SELEC"'),
            ("SET threads = 1", "Parser Error: Expected a single SELECT statement"),
        ]:
            reply = Asker(path).ask(sql)
            assert (reply.status, json.loads(reply.body)) == (400, {"error": said})

    @pytest.mark.parametrize("sql", ["SELECT '\0'", "SELECT '\ud800'"])
    def test_what_is_no_text_is_refused(self, path: Path, sql: str) -> None:
        assert Asker(path).ask(sql).status == 400

    @pytest.mark.parametrize(
        "sql",
        ["SELECT count(*) FROM range(1000000000000)", "SELECT list(range) FROM range(100000000000)"],
    )
    def test_a_long_question_is_ended(self, path: Path, sql: str) -> None:
        began = time.monotonic()
        reply = Asker(path, seconds=1.0).ask(sql)
        assert (reply.status, "stopped after 1 second" in reply.body.decode()) == (408, True), reply
        assert time.monotonic() - began < 5
        Ledger(path, lock_timeout_s=0.5).query("SELECT 1")  # and holds nothing

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep a limit on memory")
    def test_a_large_question_is_ended(self, path: Path) -> None:
        asker = Asker(path, seconds=20, memory_bytes=400 * 2**20)
        assert asker.ask("SELECT count(*) FROM audit_by_run").status == 200
        for sql in ("SELECT repeat('x', 1000000) FROM range(9000)", "SELECT list(repeat('y', 10000)) FROM range(3000000)"):
            reply = asker.ask(sql)
            assert reply.status in (400, 500) and b"emory" in reply.body
            assert b"SET" not in reply.body
        assert not list(path.parent.glob("*.tmp/*"))

    def test_nothing_is_printed_into_an_answer(self, path: Path) -> None:
        """As DuckDB's bar of progress is after two seconds; here it is printed by a stand-in for `answer`."""
        code = (
            "import os\nimport evalcache.ui.asking as asking\n"
            "asking.answer = lambda path, sql: {'rows': [], 'printed': os.write(1, b'100%')}\nasking.answer_stdin()"
        )
        question = json.dumps({"path": str(path), "sql": "", "seconds": 20, "memory_bytes": 2**32})
        done = subprocess.run([sys.executable, "-c", code], input=question, capture_output=True, text=True, timeout=60)
        assert (done.returncode, json.loads(done.stdout)) == (0, {"rows": [], "printed": 4})

    def test_one_at_a_time(self, path: Path) -> None:
        asker = Asker(path)
        replies = []
        thread = threading.Thread(target=lambda: replies.append(asker.ask("SELECT count(*) FROM range(1000000000000)")))
        thread.start()
        while not asker._turn.locked():
            time.sleep(0.01)
        assert asker.ask("SELECT 1").status == 429
        time.sleep(0.5)
        began = time.monotonic()
        asker.close()  # ends it at once
        thread.join(timeout=10)
        assert time.monotonic() - began < 2 and replies[0].status != 200
        assert asker.ask("SELECT 1").status == 503

    def test_a_sync_has_more_patience_than_a_question(self, path: Path) -> None:
        assert SECONDS < END_PATIENCE_S
        store = open_pair(path.parent)[0]
        thread = threading.Thread(target=Asker(path, seconds=2.0).ask, args=["SELECT count(*) FROM range(1000000000000)"])
        thread.start()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                Ledger(path, lock_timeout_s=0).query("SELECT 1")
            except LedgerLockedError:
                break
        write(store, FIRST, NOON, (), [look(FIRST, NOON, [(key_of(make_action()), "hit", "", 1.0)])])
        assert Ledger(path).sync(store).events == 1
        thread.join()

    def test_the_page_says_the_limits(self) -> None:
        said = (TEMPLATES / "live.html").read_text()
        assert (SECONDS, ROWS) == (5, 10_000)
        assert "five seconds" in said and "ten thousand rows" in said
