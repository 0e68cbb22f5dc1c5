"""One question in SQL, asked by a process of its own that ends with it.

A limit on time and memory that DuckDB is asked to keep is kept where its code looks for it; one that the operating system keeps
holds for whatever somebody typed. The ledger is opened as `evalcache query` opens it, and is closed, and its lock given back, in
the moment in which the process ends, however it does. It costs a third of a second to start.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

from evalcache.errors import EvalCacheError, LedgerLockedError
from evalcache.ledger import Ledger
from evalcache.schema import quoted
from evalcache.structs import Frozen

ROWS = 10_000
SECONDS = 5.0
"""Of which a running eval's sync may have to wait; it has more patience than that (`cache.END_PATIENCE_S`)."""
MEMORY_BYTES = 4 * 2**30
ANSWER_BYTES = 16 * 2**20
CELL_CHARACTERS = 50_000

_LOCK_TIMEOUT_S = 2.0
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from evalcache.ui.asking import answer_stdin; answer_stdin()"


class Answered(Frozen):
    """A status of HTTP and a JSON document: columns, numeric, rows (texts, exact), cut, cut_cells, seconds; or error."""

    status: int
    body: bytes


class Asker:
    """Asks a ledger one question at a time; `close` ends the one that is being asked."""

    def __init__(self, ledger_path: Path, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self._path = ledger_path
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._turn = threading.Lock()
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def ask(self, sql: str) -> Answered:
        """Run one SELECT (or SHOW, DESCRIBE, SUMMARIZE, which are ones to DuckDB) within the limits."""
        if not all(letter != "\0" and not 0xD800 <= ord(letter) < 0xE000 for letter in sql):
            return _failed(400, "a query is text, without the sign NUL or half a character")
        if not self._turn.acquire(blocking=False):
            return _failed(429, "another query is running; one at a time")
        try:
            return self._ask(sql)
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the question that is being asked, and take no other."""
        with self._guard:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def _ask(self, sql: str) -> Answered:
        limits = {"seconds": self._seconds, "memory_bytes": self._memory_bytes}
        question = json.dumps({"path": str(self._path), "sql": sql, **limits}).encode()
        # The parent's path, and not the working directory, which may hold anybody's files.
        command = [sys.executable, "-P", "-c", _START, json.dumps(sys.path)]
        with self._guard:
            if self._closed:
                return _failed(503, "the server is ending")
            self._process = process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
            )
        with process:
            try:
                body, _ = process.communicate(question, timeout=self._seconds + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                body, _ = process.communicate()
        with self._guard:
            self._process = None
        code = process.returncode
        if code in _STATUS:
            return Answered(_STATUS[code], body)
        if -code in (_ALARM, 9):
            return _failed(408, f"stopped after {self._seconds:g} seconds; `evalcache query` has no such limit")
        return _failed(500, f"the query ended its process (exit code {code}); it may have needed more memory than it may have")


_ALARM = getattr(signal, "SIGALRM", 0)
_STATUS = {0: 200, EvalCacheError.exit_code: 400, LedgerLockedError.exit_code: 503}


def answer_stdin() -> None:
    """In the process of its own: read the question, print the answer."""
    # What a library prints, such as DuckDB's bar of progress, is no part of the answer.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    question = json.load(sys.stdin.buffer)
    _limit(question["seconds"], question["memory_bytes"])
    try:
        body, code = answer(Path(question["path"]), question["sql"]), 0
    except EvalCacheError as error:
        body, code = {"error": _told(error)}, error.exit_code
    except MemoryError:
        body, code = {"error": "the query needs more memory than it may have"}, EvalCacheError.exit_code
    with out:
        json.dump(body, out)
    sys.exit(code)


def answer(path: Path, sql: str) -> dict[str, Any]:
    """The answer to one question, cut to what a page can show."""
    began = time.perf_counter()
    # `query` takes a single SELECT and nothing else; the limit lets DuckDB stop early, and sort no more than it has to.
    with Ledger(path, lock_timeout_s=_LOCK_TIMEOUT_S).reading() as ask:
        table = ask(f"SELECT * FROM query({quoted(sql)}) LIMIT {ROWS + 1}")
    seconds = time.perf_counter() - began
    numeric = [
        all(isinstance(row[place], (int, float, Decimal, type(None))) and not isinstance(row[place], bool) for row in table.rows)
        for place in range(len(table.columns))
    ]
    rows: list[list[str | None]] = []
    size = cut_cells = 0
    for values in table.rows[:ROWS]:
        row = [exact(value) for value in values]
        for place, text in enumerate(row):
            if text is not None and len(text) > CELL_CHARACTERS:
                row[place], cut_cells = text[:CELL_CHARACTERS] + "…", cut_cells + 1
        size += sum(len(text or "") for text in row)
        if size > ANSWER_BYTES:
            break
        rows.append(row)
    cut = len(rows) < len(table.rows)
    return {"columns": table.columns, "numeric": numeric, "rows": rows, "cut": cut, "cut_cells": cut_cells, "seconds": seconds}


def exact(value: Any) -> str | None:
    """A value as text with nothing rounded and no unit changed; NULL is None.

    >>> exact(0.1), exact(12345678901234567890), exact(True), exact(b"\\xff"), exact([1.5, None, "ü"])
    ('0.1', '12345678901234567890', 'true', 'ff', '[1.5, null, "ü"]')
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (list, tuple, dict)):
        with contextlib.suppress(TypeError):  # keys of a MAP may be anything
            return json.dumps(value, ensure_ascii=False, default=exact)
    return str(value)


def _told(error: EvalCacheError) -> str:
    """Without the words that we put around the query, and without settings to change, which are locked."""
    return str(error).partition("\n\nLINE 1: SELECT * FROM query(")[0].partition("\n\nPossible solutions:")[0]


def _limit(seconds: float, memory_bytes: int) -> None:
    """By the operating system. Where it cannot, the parent still ends us in time."""
    if _ALARM:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its default is to end the process, whatever it is busy with
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nor fill the disk with what it could sort there
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _failed(status: int, why: str) -> Answered:
    return Answered(status, json.dumps({"error": why}).encode())
