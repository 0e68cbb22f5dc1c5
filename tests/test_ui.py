"""`evalcache ui`: a real server process, asked by programs, by a real browser, and by pages that have no business with it."""

from __future__ import annotations

import contextlib
import csv
import http.client
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from recorded import FIRST, NOON, cold_and_warm, look, make_action, open_pair, write

from evalcache.errors import LedgerError, LedgerLockedError
from evalcache.key import key_of
from evalcache.ledger import LOCK_TIMEOUT_S, Ledger
from evalcache.ui.asking import ANSWER_BYTES, CELL_CHARACTERS, ROWS, SECONDS, Asker, answer
from evalcache.ui.guard import Guard
from evalcache.ui.server import CONNECTIONS, QUESTION_BYTES, Live

pytest_plugins = ["browser"]

TEMPLATES = Path(__file__).parent.parent / "evalcache" / "report" / "templates"


class Reply(NamedTuple):
    status: int
    headers: Message
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    """A running `evalcache ui`."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "evalcache", "ui", "--dir", str(folder), *options]
        self.errors = folder / "errors.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.addresses: list[str] = []
        self._told = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()
        self.port = int(re.match(r"http://127\.0\.0\.1:(\d+)/", self.address())[1])
        self.origin = f"http://127.0.0.1:{self.port}"
        self.folder = folder

    def _listen(self) -> None:
        for line in self.process.stdout:
            with self._told:
                self.addresses += re.findall(r"http://[^\s\"]+", line)
                self._told.notify_all()

    def address(self, after: int = 0) -> str:
        """The newest address that was printed, once there are more than ``after``."""
        with self._told:
            assert self._told.wait_for(lambda: len(self.addresses) > after, timeout=60), self.errors.read_text()
            return self.addresses[-1]

    def send(self, method: str, path: str, headers: dict[str, str] | None = None, body: str | bytes | None = None) -> Reply:
        """One request with these headers and no others but Host."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            told = dict(headers or {})
            connection.putrequest(method, path, skip_host="Host" in told, skip_accept_encoding=True)
            if body is not None:
                told.setdefault("Content-Length", str(len(body)))
            for name, value in told.items():
                connection.putheader(name, value)
            connection.endheaders(body.encode() if isinstance(body, str) else body)
            reply = connection.getresponse()
            return Reply(reply.status, reply.headers, reply.read().decode())

    def enter(self) -> str:
        """Use the address up; returns the cookie."""
        count = len(self.addresses)
        reply = self.send("GET", self.address().removeprefix(self.origin))
        assert reply.status == 200
        self.address(after=count)
        return reply.headers["Set-Cookie"].partition(";")[0]

    def ask(self, sql: str, cookie: str, **headers: str) -> Reply:
        told = {"Cookie": cookie, "Origin": self.origin, "Content-Type": "application/json", **headers}
        return self.send("POST", "/query", told, json.dumps({"sql": sql}))

    def end(self, number: int = signal.SIGINT) -> tuple[int, float]:
        """The exit code, and how long it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(timeout=30), time.monotonic() - began

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def ask_on(server: Served, sql: str, cookie: str) -> None:
    """A question whose server may end below it."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.ask(sql, cookie)


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Served]:
    with contextlib.closing(Served(folder, *options)) as server:
        yield server


def fill(folder: Path) -> Path:
    store, ledger = open_pair(folder)
    cold_and_warm(store)
    ledger.sync(store)
    return ledger.path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    fill(folder)
    with serving(folder) as server:
        yield server
        assert server.errors.read_text() == ""


@pytest.fixture(scope="module")
def cookie(served: Served) -> str:
    return served.enter()


class TestGuard:
    """Who is let in, without a server."""

    HOST = "127.0.0.1:5000"

    def headers(self, *pairs: tuple[str, str]) -> Message:
        made = Message()
        for name, value in pairs:
            made[name] = value
        return made

    @pytest.mark.parametrize("host", ["127.0.0.1:5000", "localhost:5000", "LOCALHOST:5000"])
    def test_the_printed_address_is_answered(self, host: str) -> None:
        guard = Guard(5000)
        for site in ("none", "same-origin"):
            assert guard.refuses(self.headers(("Host", host), ("Sec-Fetch-Site", site))) is None
        asked = self.headers(("Host", host), ("Origin", f"http://{host}"), ("Sec-Fetch-Site", "same-origin"))
        assert guard.refuses(asked, asks=True) is None

    @pytest.mark.parametrize(
        "host",
        ["", "evil.example", "evil.example:5000", "127.0.0.1", "127.0.0.1:5001", "127.0.0.1.evil.example:5000", "[::1]:5000",
         "0.0.0.0:5000", "2130706433:5000", "127.1:5000", "user@127.0.0.1:5000", "127.0.0.1:5000.evil.example",
         "localhost.:5000", "x.localhost:5000"],
    )  # fmt: skip
    def test_another_name_for_this_machine_is_not(self, host: str) -> None:
        for asks in (False, True):
            assert Guard(5000).refuses(self.headers(("Host", host), ("Origin", f"http://{host}")), asks=asks)

    def test_no_host_and_two_hosts_are_not(self) -> None:
        guard = Guard(5000)
        assert guard.refuses(self.headers())
        assert guard.refuses(self.headers(("Host", self.HOST), ("Host", self.HOST)))

    @pytest.mark.parametrize(
        "origin", ["http://evil.example", "null", "https://127.0.0.1:5000", "http://127.0.0.1:5001", "http://localhost:5000", ""]
    )
    def test_another_origin_is_not(self, origin: str) -> None:
        for asks in (False, True):
            assert Guard(5000).refuses(self.headers(("Host", self.HOST), ("Origin", origin)), asks=asks)

    def test_a_question_without_an_origin_is_not(self) -> None:
        assert Guard(5000).refuses(self.headers(("Host", self.HOST)), asks=True)

    @pytest.mark.parametrize("site", ["cross-site", "same-site", "", "other"])
    def test_another_site_is_not(self, site: str) -> None:
        told = self.headers(("Host", self.HOST), ("Origin", f"http://{self.HOST}"), ("Sec-Fetch-Site", site))
        for asks in (False, True):
            assert Guard(5000).refuses(told, asks=asks)

    def test_a_typed_address_asks_nothing(self) -> None:
        told = self.headers(("Host", self.HOST), ("Origin", f"http://{self.HOST}"), ("Sec-Fetch-Site", "none"))
        assert Guard(5000).refuses(told, asks=True)

    def test_a_link_enters_only_as_a_tab(self) -> None:
        guard = Guard(5000)
        for mode, dest, good in [
            ("navigate", "document", True),
            ("navigate", "iframe", False),
            ("no-cors", "image", False),
            ("cors", "empty", False),
        ]:
            told = self.headers(
                ("Host", self.HOST), ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", mode), ("Sec-Fetch-Dest", dest)
            )
            assert (guard.refuses(told, enters=True) is None) is good
            assert guard.refuses(told)

    def test_a_token_works_once(self) -> None:
        guard = Guard(5000)
        token = guard.address.partition("=")[2]
        assert len(token) >= 43  # 256 bits
        assert not guard.admits("") and not guard.admits(token[:-1]) and not guard.admits(token + "ä\udcff")
        assert guard.admits(token)
        assert not guard.admits(token)
        assert guard.admits(guard.address.partition("=")[2])

    def test_the_cookie_is_known_among_others(self) -> None:
        guard = Guard(5000)
        name, _, session = guard.cookie.partition(";")[0].partition("=")
        assert {part.strip() for part in guard.cookie.split(";")} >= {"HttpOnly", "SameSite=Strict", "Path=/"}
        assert guard.knows(self.headers(("Cookie", f"a=b; {name}=wrong; {name}={session}; c")))
        for wrong in ("", name, f"{name}=", f"{name}=wrong", f"other={session}", session, f"{name}=\xff"):
            assert not guard.knows(self.headers(("Cookie", wrong)))
        assert not guard.knows(self.headers())
        assert guard.cookie != Guard(5000).cookie


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
        found = answer(path, "SELECT range AS n FROM range(1000000000) ORDER BY n")
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
        ["SELECT count(*) FROM range(1000000000000)", "SELECT list(range) FROM range(100000000000)",
         "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b",
         "WITH RECURSIVE t(a) AS (SELECT 1 UNION ALL SELECT a + 1 FROM t) SELECT max(a) FROM t"],
    )  # fmt: skip
    def test_a_long_question_is_ended(self, path: Path, sql: str) -> None:
        began = time.monotonic()
        reply = Asker(path, seconds=1.0).ask(sql)
        assert (reply.status, "stopped after 1 second" in reply.body.decode()) == (408, True), reply
        assert time.monotonic() - began < 5
        Ledger(path, lock_timeout_s=0.5).query("SELECT 1")  # and holds nothing

    def test_a_large_question_is_ended(self, path: Path) -> None:
        asker = Asker(path, seconds=20, memory_bytes=400 * 2**20)
        assert asker.ask("SELECT count(*) FROM audit_by_run").status == 200
        for sql in ("SELECT repeat('x', 1000000) FROM range(9000)", "SELECT list(repeat('y', 10000)) FROM range(3000000)"):
            reply = asker.ask(sql)
            assert reply.status in (400, 500) and b"emory" in reply.body
            assert b"SET" not in reply.body
        assert not list(path.parent.glob("*.tmp/*"))

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
        assert SECONDS < LOCK_TIMEOUT_S - 2
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


class TestRequests:
    """A real process, asked over a socket."""

    def test_everything_needs_the_cookie(self, served: Served, cookie: str) -> None:
        for path in ("/", "/state", "/nothing", "/?token=", "/?token=wrong", "/favicon.ico"):
            assert served.send("GET", path).status == 403
        for wrong in ("", "x=y", cookie[:-1], cookie.replace("=", "=x")):
            assert served.send("GET", "/", {"Cookie": wrong}).status == 403
            assert served.ask("SELECT 1", wrong).status == 403

    def test_who_has_it_is_answered(self, served: Served, cookie: str) -> None:
        page = served.send("GET", "/", {"Cookie": cookie})
        assert page.status == 200 and "<title>evalcache report</title>" in page.body and "data-state=" in page.body
        assert served.ask("SELECT sum(hits) AS hits FROM audit_by_run", cookie).json["rows"] == [["3"]]
        assert served.send("GET", "/state", {"Cookie": cookie}).json["state"] in page.body
        assert served.send("GET", "/nothing", {"Cookie": cookie}).status == 404

    def test_the_address_works_once(self, served: Served) -> None:
        used, count = served.address().removeprefix(served.origin), len(served.addresses)
        first = served.send("GET", used)
        assert first.status == 200 and "HttpOnly; SameSite=Strict" in first.headers["Set-Cookie"]
        assert "report" in first.body and "Location" not in first.headers
        second = served.send("GET", used)
        assert second.status == 403 and "Set-Cookie" not in second.headers
        assert served.address(after=count) != served.origin + used

    @pytest.mark.parametrize(
        "headers",
        [
            {"Host": "evil.example"},
            {"Host": "evil.example:{port}"},
            {"Host": "rebound.localhost:{port}"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
            {"Origin": "https://127.0.0.1:{port}"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ],
        ids=str,
    )
    def test_other_origins_are_refused_even_with_the_cookie(self, served: Served, cookie: str, headers: dict[str, str]) -> None:
        told = {name: value.format(port=served.port) for name, value in headers.items()}
        for reply in (served.send("GET", "/", {"Cookie": cookie, **told}), served.ask("SELECT 42", cookie, **told)):
            assert reply.status == 403
            assert "42" not in reply.body and "runs" not in reply.body

    def test_a_rebound_name_cannot_use_the_address_up(self, served: Served) -> None:
        path = served.address().removeprefix(served.origin)
        assert served.send("GET", path, {"Host": f"evil.example:{served.port}"}).status == 403
        assert served.send("GET", path, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).status == 403
        served.enter()

    @pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "HEAD", "TRACE", "PATCH", "CONNECT", "NONSENSE"])
    def test_other_methods_are_not_answered(self, served: Served, cookie: str, method: str) -> None:
        reply = served.send(method, "/query", {"Cookie": cookie, "Origin": "http://evil.example"})
        assert reply.status == 501

    def test_every_reply_has_the_headers_and_none_has_cors(self, served: Served, cookie: str) -> None:
        replies = [
            served.send("GET", "/"),
            served.send("GET", "/", {"Cookie": cookie}),
            served.send("GET", "/x", {"Cookie": cookie}),
            served.send("OPTIONS", "/query", {"Origin": served.origin, "Access-Control-Request-Method": "POST"}),
            served.ask("SELECT 1", cookie),
            served.ask("SELECT", cookie),
        ]
        assert [reply.status for reply in replies] == [403, 200, 404, 501, 200, 400]
        for reply in replies:
            assert reply.headers["Cache-Control"] == "no-store"
            assert reply.headers["X-Frame-Options"] == "DENY"
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert reply.headers["Referrer-Policy"] == "no-referrer"
            assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]
            assert not [name for name in reply.headers if name.lower().startswith("access-control")]
            assert "Python" not in reply.headers["Server"]

    @pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
    def test_a_question_is_json(self, served: Served, cookie: str, kind: str | None) -> None:
        told = {"Cookie": cookie, "Origin": served.origin} | ({} if kind is None else {"Content-Type": kind})
        assert served.send("POST", "/query", told, '{"sql": "SELECT 1"}').status == 415

    @pytest.mark.parametrize(
        "body", ["", "{", "[]", "null", '{"sql": 1}', '{"sql": null}', '{"SQL": "SELECT 1"}', "[" * 60_000, b"\xff\xfe"]
    )
    def test_what_is_no_question_is_refused(self, served: Served, cookie: str, body: str | bytes) -> None:
        told = {"Cookie": cookie, "Origin": served.origin, "Content-Type": "application/json"}
        assert served.send("POST", "/query", told, body).status == 400

    @pytest.mark.parametrize(
        ("length", "status"), [("-1", 411), ("1e3", 411), ("١", 411), (str(QUESTION_BYTES + 1), 413), ("9" * 5000, 413)]
    )
    def test_a_question_is_short(self, served: Served, cookie: str, length: str, status: int) -> None:
        told = {
            "Cookie": cookie,
            "Origin": served.origin,
            "Content-Type": "application/json",
            "Content-Length": length.encode("utf-8"),
        }
        assert served.send("POST", "/query", told).status == status

    def test_chunks_are_not_read(self, served: Served, cookie: str) -> None:
        told = {"Cookie": cookie, "Origin": served.origin, "Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        assert served.send("POST", "/query", told, "0\r\n\r\n").status == 411

    @pytest.mark.parametrize(
        "sent",
        [b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
         b"\x16\x03\x01\x02\r\n\r\n",
         b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"GET /\r\n\r\n"],
        ids=["absolute", "version", "tls", "many headers", "long line", "0.9"],
    )  # fmt: skip
    def test_odd_requests_are_refused_and_stop_nothing(self, served: Served, cookie: str, sent: bytes) -> None:
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(sent)
            heard = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    heard += part
        assert b"200 OK" not in heard and b"evalcache report" not in heard
        assert served.ask("SELECT 1", cookie).status == 200

    def test_it_listens_on_this_machine_alone(self, served: Served) -> None:
        addresses = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
        for address in {*addresses, "127.0.0.2"}:
            with pytest.raises(OSError):
                socket.create_connection((address, served.port), timeout=2).close()

    def test_so_many_connections_and_no_more(self, served: Served, cookie: str) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(CONNECTIONS + 5):
                stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=5))
            with pytest.raises(OSError):
                served.send("GET", "/state", {"Cookie": cookie})
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert served.send("GET", "/state", {"Cookie": cookie}).status == 200
                return
            time.sleep(0.1)
        pytest.fail("the server did not come back")


class TestProcess:
    """How it begins and ends, and what it does beside others."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_ends_well(self, tmp_path: Path, number: int) -> None:
        fill(tmp_path)
        with serving(tmp_path) as server:
            cookie = server.enter()
            assert server.send("GET", "/", {"Cookie": cookie}).status == 200
            # One that would take its five seconds, and one that never sends its request.
            threading.Thread(target=ask_on, args=[server, "SELECT count(*) FROM range(1000000000000)", cookie]).start()
            with socket.create_connection(("127.0.0.1", server.port)):
                time.sleep(1.0)
                code, seconds = server.end(number)
            assert (code, server.errors.read_text()) == (0, "")
            assert seconds < 3
        Ledger(tmp_path / "ledger.duckdb", lock_timeout_s=1).query("SELECT 1")

    def test_a_program_is_told_the_address(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "evalcache", "ui", "--dir", str(tmp_path), "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert json.loads(process.stdout.readline())["address"].startswith("http://127.0.0.1:")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0

    def test_a_taken_port_is_said(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            command = [sys.executable, "-m", "evalcache", "ui", "--dir", str(tmp_path), "--port", port]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"port {port}" in done.stderr and "Traceback" not in done.stderr

    def test_a_cache_that_was_never_used_has_a_page(self, tmp_path: Path) -> None:
        with serving(tmp_path) as server:
            assert server.send("GET", "/", {"Cookie": server.enter()}).status == 200

    def test_the_page_takes_in_what_runs_tell(self, tmp_path: Path) -> None:
        fill(tmp_path)
        with serving(tmp_path) as server:
            cookie = server.enter()
            first = server.send("GET", "/state", {"Cookie": cookie}).body
            write(open_pair(tmp_path)[0], FIRST, NOON, (), [look(FIRST, NOON, [(key_of(make_action()), "hit", "", 1.0)])])
            assert server.send("GET", "/state", {"Cookie": cookie}).body != first
            asked = "SELECT count(*) FROM lookups"
            before = int(server.ask(asked, cookie).json["rows"][0][0])
            assert server.send("GET", "/", {"Cookie": cookie}).status == 200
            assert int(server.ask(asked, cookie).json["rows"][0][0]) == before + 1

    def test_a_locked_ledger_leaves_the_last_page(self, tmp_path: Path) -> None:
        path = fill(tmp_path)
        hold = (
            f"import duckdb, sys; one = duckdb.connect({str(path)!r}); one.execute('CREATE TEMP TABLE x (a INT)');"
            "print('held', flush=True); sys.stdin.read()"
        )
        with serving(tmp_path) as server:
            cookie = server.enter()
            holder = None
            try:
                for has_page in (False, True):
                    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1, text=True)
                    assert holder.stdout.readline() == "held\n"
                    page = server.send("GET", "/", {"Cookie": cookie})
                    assert page.status == (200 if has_page else 503)
                    assert "another program has the ledger open" in page.body
                    assert ("page as it was made before" in page.body) is has_page
                    reply = server.ask("SELECT 1", cookie)
                    assert reply.status == 503 and "another program has the ledger open" in reply.json["error"]
                    holder.communicate("", timeout=20)
                    fresh = server.send("GET", "/", {"Cookie": cookie})
                    assert fresh.status == 200 and "another program" not in fresh.body
            finally:
                if holder is not None and holder.poll() is None:
                    holder.kill()

    def test_a_page_that_cannot_be_made_says_why(self, tmp_path: Path) -> None:
        def make() -> str:
            raise LedgerError("<b>wrong</b>\u202e")

        store, ledger = open_pair(tmp_path)
        status, said = Live(ledger, store, make).page()
        assert status == 500 and "&lt;b&gt;wrong&lt;/b&gt;\\u202e" in said


@contextlib.contextmanager
def foreign(body: str) -> Iterator[str]:
    """A page of somebody else's: another port of ``localhost``, which is another site than 127.0.0.1."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield str(server.server_port)
        server.shutdown()


class TestBrowser:
    """A real chromium."""

    @pytest.fixture
    def opened(self, served: Served, open_page: Callable) -> tuple[Any, Any]:
        page, seen = open_page(served.address())
        page.wait_for_url(f"{served.origin}/")
        page.wait_for_selector("#ask-run")
        return page, seen

    def run(self, page: Any, sql: str) -> str:
        page.fill("#ask-sql", sql)
        page.press("#ask-sql", "Control+Enter")
        page.wait_for_function("() => !document.getElementById('ask-run').hasAttribute('aria-disabled')")
        return page.inner_text("#ask-status")

    def test_the_address_leads_to_the_page(self, served: Served, opened: tuple[Any, Any]) -> None:
        page, seen = opened
        assert page.title() == "evalcache report"
        assert "token" not in page.url and page.evaluate("document.cookie") == ""
        assert seen.complaints == []
        assert {request.partition("?")[0] for request in seen.requests} == {f"{served.origin}/"}
        assert page.evaluate("history.length") <= 3
        assert page.get_by_text("Made ").first.is_visible()

    def test_a_question_is_answered(self, opened: tuple[Any, Any]) -> None:
        page, seen = opened
        said = self.run(page, "SELECT run, hits, net_seconds, NULL AS nothing FROM audit_by_run ORDER BY hits")
        assert said.startswith("2 rows in ")
        assert page.locator("#ask-answer th").all_inner_texts() == ["run", "hits", "net_seconds", "nothing"]
        assert page.locator("#ask-answer tbody tr").nth(1).locator("td").all_inner_texts() == ["2" * 32, "3", "1.875", "NULL"]
        assert "cannot" not in self.run(page, "SELECT 1 WHERE false")
        assert page.inner_text("#ask-status").startswith("0 rows in ")
        assert seen.complaints == []

    def test_each_example_is_answered(self, opened: tuple[Any, Any]) -> None:
        page, seen = opened
        examples = page.locator(".ask-examples button")
        assert examples.count() >= 6
        for place in range(examples.count()):
            examples.nth(place).click()
            page.wait_for_function("() => !document.getElementById('ask-run').hasAttribute('aria-disabled')")
            assert page.is_hidden("#ask-error"), page.inner_text("#ask-error")
            assert " in " in page.inner_text("#ask-status")
        page.keyboard.press("Control+Z")  # what stood in the box comes back
        assert page.input_value("#ask-sql") == examples.nth(examples.count() - 2).get_attribute("data-sql")
        assert seen.complaints == []

    def test_hostile_text_is_text(self, opened: tuple[Any, Any]) -> None:
        page, _ = opened
        hostile = "<img src=x onerror=document.title=1><script>document.title=2</script>"
        self.run(page, f"SELECT '{hostile}' AS \"{hostile}\", 'a' || chr(8238) || chr(27) || '[2J' || chr(0) AS b")
        assert page.locator("#ask-answer td").first.inner_text() == hostile
        assert page.locator("#ask-answer th").first.inner_text() == hostile
        assert page.locator("#ask-answer td").nth(1).inner_text() == r"a\u202e\x1b[2J\x00"
        self.run(page, f'SELECT "{hostile}"')
        assert hostile in page.inner_text("#ask-error")
        assert page.title() == "evalcache report" and page.locator("#sql img, #sql script").count() == 0
        with pytest.raises(Exception, match=r"TrustedHTML"):
            page.evaluate("document.body.innerHTML = '<b>x</b>'")

    def test_long_answers_are_cut_and_shown_in_parts(self, opened: tuple[Any, Any]) -> None:
        page, _ = opened
        said = self.run(page, "SELECT range AS n, repeat('long ', 150) AS t FROM range(100000)")
        assert said.startswith("10,000 rows in ") and "cut at 10,000 rows: the query has more" in said
        assert page.locator("#ask-answer tbody tr").count() == 500
        page.click("#ask-more")
        assert page.locator("#ask-answer tbody tr").count() == 1000
        folded = page.locator("#ask-answer details").first
        folded.locator("summary").click()
        assert folded.inner_text().count("long") >= 150

    def test_the_answer_is_downloaded_as_csv(self, opened: tuple[Any, Any], tmp_path: Path) -> None:
        page, seen = opened
        self.run(page, "SELECT 'a,\"b\"' || chr(10) || 'c' AS \"x,y\", NULL AS n, '' AS e, range + 0.5 AS r FROM range(1000)")
        with page.expect_download() as told:
            page.click("#ask-csv")
        assert told.value.suggested_filename == "evalcache-query.csv"
        told.value.save_as(tmp_path / "kept.csv")
        raw = (tmp_path / "kept.csv").read_bytes().decode()
        rows = list(csv.reader(raw.splitlines(keepends=True)))
        assert len(rows) == 1001  # all, not only those that are shown
        assert rows[:2] == [["x,y", "n", "e", "r"], ['a,"b"\nc', "", "", "0.5"]]
        assert ',,"",0.5\r\n' in raw  # NULL is not an empty text
        assert seen.complaints == []

    def test_errors_are_told(self, served: Served, opened: tuple[Any, Any]) -> None:
        page, _ = opened
        assert self.run(page, "SELECT nothing FROM runs") == ""
        assert page.inner_text("#ask-error").startswith('Binder Error: Referenced column "nothing"')
        assert page.get_attribute("#ask-error", "role") == "alert"
        page.context.clear_cookies()
        self.run(page, "SELECT 1")
        assert "Open the address that evalcache ui printed" in page.inner_text("#ask-error")
        page.context.route("**/query", lambda route: route.abort())
        self.run(page, "SELECT 1")
        assert "has evalcache ui ended?" in page.inner_text("#ask-error")

    def test_it_is_used_by_keyboard(self, opened: tuple[Any, Any]) -> None:
        page, _ = opened
        page.focus("#ask-sql")
        page.keyboard.press("Control+A")
        page.keyboard.type("SELECT 42 AS answer")
        page.keyboard.press("Tab")  # leaves the box
        assert page.evaluate("document.activeElement.id") == "ask-run"
        page.keyboard.press("Enter")
        page.wait_for_selector("#ask-answer td")
        assert page.evaluate("document.activeElement.id") == "ask-run"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "ask-csv"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "ask-answer"
        page.reload()
        page.wait_for_selector("#ask-run")
        assert page.input_value("#ask-sql") == "SELECT 42 AS answer"

    def test_the_page_tells_when_there_is_more(self, served: Served, opened: tuple[Any, Any]) -> None:
        page, _ = opened
        page.clock.install()
        page.reload()
        page.wait_for_selector("#ask-run")
        page.clock.run_for(10_500)
        assert page.inner_text("#live-new") == ""
        write(open_pair(served.folder)[0], FIRST, NOON, (), [look(FIRST, NOON, [(key_of(make_action()), "hit", "", 1.0)])])
        page.clock.run_for(10_500)
        page.wait_for_function("() => document.getElementById('live-new').textContent === 'Runs have told more since.'")
        page.click(".live a")
        page.wait_for_selector("#ask-run")
        assert page.inner_text("#live-new") == ""

    def test_a_link_on_another_page_opens_it(self, served: Served, open_page: Callable) -> None:
        with foreign(f'<a href="{served.address()}">report</a>') as port:
            page, _ = open_page(f"http://localhost:{port}/")
            page.click("a")
            page.wait_for_selector("#ask-run")
            assert page.url == f"{served.origin}/"

    def test_pages_of_others_get_nothing(self, served: Served, opened: tuple[Any, Any]) -> None:
        """In the very browser that has the cookie."""
        page, _ = opened
        body = f"""<title>foreign</title><iframe name=frame src="{served.origin}/"></iframe><img src="{served.origin}/state">
            <script src="{served.origin}/state"></script>
            <form method=post action="{served.origin}/query" enctype="text/plain" target=frame>
            <input name='{{"sql": "SELECT 42", "a' value='": 1}}'></form>"""
        ask = f"""async (options) => {{
            const asked = {{method: "POST", body: '{{"sql": "SELECT 42"}}', ...options}};
            try {{
                const reply = await fetch("{served.origin}/query", asked);
                return reply.type + " " + await reply.text();
            }} catch (error) {{ return "refused"; }}
        }}"""
        with foreign(body) as port:
            # localhost is another site; 127.0.0.1 on another port is the same site, and is sent the cookie.
            for host in ("localhost", "127.0.0.1"):
                other = page.context.new_page()
                answers: list[Any] = []
                other.on("response", lambda reply, kept=answers: kept.append(reply) if served.origin in reply.url else None)
                other.goto(f"http://{host}:{port}/")
                for options in (
                    {"mode": "cors", "credentials": "include", "headers": {"Content-Type": "application/json"}},
                    {"mode": "cors", "credentials": "include"},
                    {"mode": "no-cors", "credentials": "include"},
                ):
                    assert other.evaluate(ask, options) in ("refused", "opaque ")
                other.evaluate("document.forms[0].submit()")
                other.wait_for_timeout(300)
                assert answers and {reply.status for reply in answers} <= {403, 501}
                other.evaluate(f"window.opened = window.open('{served.origin}/')")
                other.wait_for_timeout(300)
                assert other.evaluate("window.opened === null || window.opened.closed || window.opened.length === 0")
                other.close()

    def test_a_rebound_name_gets_nothing(self, served: Served, opened: tuple[Any, Any]) -> None:
        page = opened[0].context.new_page()
        for path in ("/", served.address().removeprefix(served.origin)):
            reply = page.goto(f"http://rebound.localhost:{served.port}{path}")  # which a browser takes to 127.0.0.1
            assert reply.status == 403 and "not the one that evalcache ui printed" in page.content()

    @pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
    def test_it_is_accessible_and_fits(self, served: Served, open_page: Callable, scheme: str, width: int) -> None:
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe comes with llm-evalcache[test]")
        page, _ = open_page(served.address(), color_scheme=scheme, viewport={"width": width, "height": 844}, bypass_csp=True)
        page.wait_for_selector("#ask-run")
        for sql in ("SELECT * FROM audit_by_run", "SELECT nothing"):
            self.run(page, sql)
            found = axe.Axe().run(page, context=[["#sql"], [".live"]])
            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
