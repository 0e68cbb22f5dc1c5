"""The server of `evalcache ui`: the report made anew at each reload, and an answer to each question in SQL.

Python's own ``http.server``: three addresses on one machine for one person do not need a framework, and whoever has evalcache
has this. Each connection is one request and one thread; their number, their time and the size of what they send are limited.
The ledger is open only while a page is made or a question is asked, so that a running eval's sync waits for seconds at most.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import shutil
import signal
import socketserver
import sys
import tempfile
import threading
import traceback
import webbrowser
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from evalcache.errors import EvalCacheError, LedgerLockedError, ServerError
from evalcache.ledger import Ledger
from evalcache.printing import visible
from evalcache.store import Store
from evalcache.ui.asking import Asker
from evalcache.ui.guard import Guard

CONNECTIONS = 32
QUESTION_BYTES = 64 * 2**10
NOTICE = "<!-- evalcache ui: notice -->"
"""Where a live page says what the server has to add. What a page quotes has no such sign: its ``<`` is escaped."""

_SYNC_TIMEOUT_S = 3.0
_PAGE_TIMEOUT_S = 60.0
_ENDING_S = 5.0
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),  # the page has a policy of its own, which knows each of its styles and scripts; both hold
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_HTML, _JSON = "text/html; charset=utf-8", "application/json"


class Live:
    """The page of one ledger, and what has changed since it was made.

    Args:
        make: makes the page from the ledger as it is. ledger, store: brought together before that.
    """

    def __init__(self, ledger: Ledger, store: Store, make: Callable[[], str]) -> None:
        self._ledger, self._store, self._make = ledger, store, make
        self._turn = threading.Lock()
        self._last: tuple[str, str] | None = None

    def page(self) -> tuple[int, str]:
        """A status and the page; where the ledger is locked the last one, which says so."""
        if not self._turn.acquire(timeout=_PAGE_TIMEOUT_S):
            return 503, _message("The page is being made for somebody else. Try again.")
        try:
            return self._page()
        finally:
            self._turn.release()

    def state(self) -> str:
        """Another text when the ledger, or what waits for it, has changed. Opens nothing of DuckDB's."""
        with contextlib.suppress(OSError, EvalCacheError):
            about = self._ledger.path.stat()
            return f"{about.st_mtime_ns:x}.{about.st_size:x}.{self._store.waiting.count():x}"
        return ""

    def finish(self, timeout_s: float) -> None:
        """Wait for the page that is being made, if any, and make no other."""
        self._turn.acquire(timeout=timeout_s)

    def _page(self) -> tuple[int, str]:
        notice = ""
        try:
            self._ledger.sync(self._store)
        except LedgerLockedError as error:
            notice = f"Not brought up to date: {self._said(error)}. What runs have told is kept."
        except EvalCacheError as error:
            notice = f"Not brought up to date: {self._said(error)}."
        try:
            state = self.state()
            made = self._make()
        except LedgerLockedError as error:
            if self._last is None:
                return 503, _message(f"The ledger cannot be read now: {self._said(error)}. Nothing is lost; reload the page.")
            made, state = self._last
            notice = f"This is the page as it was made before: {self._said(error)}."
        except EvalCacheError as error:
            return 500, _message(str(error))
        except Exception as error:  # of ours, and told rather than a page that never comes
            traceback.print_exc()
            return 500, _message(f"The page could not be made: {type(error).__name__}: {error}")
        else:
            self._last = made, state
        return 200, made.replace(NOTICE, f'<span class="live-notice" data-state="{state}">{_escaped(notice)}</span>')

    def _said(self, error: EvalCacheError) -> str:
        return error.message.removeprefix(f"{self._ledger.path}: ")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name == "posix"  # elsewhere that lets another program take the port over

    def __init__(self, port: int, live: Live, asker: Asker, say: Callable[[str, bool], None]) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.live, self.asker, self.say = live, asker, say
        self.guard = Guard(self.server_port)
        self._room = threading.BoundedSemaphore(CONNECTIONS)

    def server_bind(self) -> None:
        # HTTPServer asks the name service for the host's name, which takes its time where there is none.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the browser left, or was too slow
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = 10

    def do_GET(self) -> None:
        server, where = cast(_Server, self.server), urlsplit(self.path)
        token = parse_qs(where.query).get("token", [""])[0] if where.path == "/" else ""
        if why := server.guard.refuses(self.headers, enters=bool(token)):
            self._refuse(why)
        elif token and server.guard.admits(token):
            # A page of ours that goes on to itself: the browser sends a strict cookie on no redirect that began elsewhere.
            self._send(200, _HTML, _message("Opening the report.", onward=True), {"Set-Cookie": server.guard.cookie})
            server.say(server.guard.address, True)
        elif not server.guard.knows(self.headers):
            self._refuse("open the address that evalcache ui printed last; each works once")
        elif token:
            self._send(200, _HTML, _message("Opening the report.", onward=True))
        elif where.path == "/":
            status, made = server.live.page()
            self._send(status, _HTML, made)
        elif where.path == "/state":
            self._send(200, _JSON, json.dumps({"state": server.live.state()}))
        else:
            self._send(404, _HTML, _message("There is nothing at this address."))

    def do_POST(self) -> None:
        server = cast(_Server, self.server)
        if why := server.guard.refuses(self.headers, asks=True):
            self._refuse(why)
        elif not server.guard.knows(self.headers):
            self._refuse("open the address that evalcache ui printed last; each works once")
        elif self.path != "/query":
            self._send(404, _JSON, _error("there is nothing at this address"))
        elif self.headers.get_content_type() != _JSON or "Content-Type" not in self.headers:
            self._send(415, _JSON, _error("a question is application/json"))
        else:
            self._answer(server)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What `http.server` finds wrong by itself: with our headers, and without an echo."""
        self._send(code, _HTML, _message("This is not a request that is answered here."))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: an address that is logged may have a token in it."""

    def version_string(self) -> str:
        return "evalcache"

    def _answer(self, server: _Server) -> None:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            self._send(411, _JSON, _error("a question has a Content-Length"))
            return
        if len(length) > 9 or int(length) > QUESTION_BYTES:
            self._send(413, _JSON, _error(f"a question is at most {QUESTION_BYTES:,} bytes long"))
            return
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            asked = None
        sql = asked.get("sql") if isinstance(asked, dict) else None
        if not isinstance(sql, str):
            self._send(400, _JSON, _error('a question is {"sql": "SELECT …"}'))
            return
        answered = server.asker.ask(sql)
        self._send(answered.status, _JSON, answered.body)

    def _refuse(self, why: str) -> None:
        self._send(403, _HTML, _message(f"Refused: {why}."))

    def _send(self, status: int, kind: str, body: str | bytes, more: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else body.encode("utf-8", "replace")
        self.close_connection = True
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **_HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def serve(
    ledger_path: Path,
    store_path: Path,
    make: Callable[[], str],
    *,
    say: Callable[[str, bool], None],
    port: int = 0,
    opens: bool = False,
) -> None:
    """Serve a live page until SIGINT or SIGTERM.

    Args:
        make: makes the page (`report.page` with ``live=True``). say: is told the address, and another one each time it has been
            used; and whether it has. port: 0 for any that is free. opens: open the user's browser.

    Raises:
        ServerError: the port cannot be had.
    """
    live = Live(Ledger(ledger_path, lock_timeout_s=_SYNC_TIMEOUT_S), Store(store_path), make)
    asker = Asker(ledger_path)
    try:
        server = _Server(port, live, asker, say)
    except (OSError, OverflowError) as error:
        raise ServerError(f"port {port}: {error}", hint="--port 0 takes one that is free", found=port) from error
    ending = threading.Event()
    with server, _ended_by_signals(ending), _entrance(server.guard.address, opens):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        say(server.guard.address, False)
        ending.wait()
        server.shutdown()
        asker.close()
        live.finish(_ENDING_S)  # Python must not end below a thread that is drawing


@contextlib.contextmanager
def _ended_by_signals(ending: threading.Event) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: ending.set()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _entrance(address: str, opens: bool) -> Iterator[None]:
    """Opens the browser, with a file of the user's own that leads on: anybody may read a command line."""
    if not opens:
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="evalcache-ui-"))
    try:
        entrance = folder / "open.html"
        entrance.write_text(_message("Opening the report.", onward=True, to=address), encoding="utf-8")
        # Some browsers of a terminal come back only when they are left.
        threading.Thread(target=webbrowser.open, args=(entrance.as_uri(),), daemon=True).start()
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _message(text: str, *, onward: bool = False, to: str = "/") -> str:
    refresh = f'<meta http-equiv="refresh" content="0; url={_escaped(to)}">' if onward else ""
    link = f'<p><a href="{_escaped(to)}">{"Go on" if onward else "Reload"}</a></p>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}<title>evalcache</title>'
        "<style>body { font: 1rem/1.5 system-ui; max-width: 40rem; margin: 4rem auto; padding: 0 1rem }</style></head>"
        f"<body><main><h1>evalcache</h1><p>{_escaped(text)}</p>{link}</main></body></html>\n"
    )


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _error(why: str) -> str:
    return json.dumps({"error": why})
