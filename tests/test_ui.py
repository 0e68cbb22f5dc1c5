"""`evalcache ui`: a real server process, asked by programs, and by those who have no business with it."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest
from recorded import FIRST, NOON, look, make_action, open_pair, write
from served_ui import Served, ask_on, fill, serving, serving_filled

from evalcache.errors import LedgerError
from evalcache.key import key_of
from evalcache.ledger import Ledger
from evalcache.ui.guard import Guard
from evalcache.ui.server import CONNECTIONS, QUESTION_BYTES, Live


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_filled(tmp_path_factory.mktemp("served")) as server:
        yield server


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
