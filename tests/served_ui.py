"""A running `evalcache ui`, for tests that ask it."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

from recorded import cold_and_warm, open_pair


class Reply(NamedTuple):
    """What came back."""

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
    """A server that ends with the block."""
    with contextlib.closing(Served(folder, *options)) as server:
        yield server


def fill(folder: Path) -> Path:
    """A cache of two runs; returns its ledger's path."""
    store, ledger = open_pair(folder)
    cold_and_warm(store)
    ledger.sync(store)
    return ledger.path


@contextlib.contextmanager
def serving_filled(folder: Path) -> Iterator[Served]:
    """`serving` of a folder that was filled for it; whatever the tests ask, the server has no fault of its own."""
    fill(folder)
    with serving(folder) as server:
        yield server
        assert server.errors.read_text() == ""
