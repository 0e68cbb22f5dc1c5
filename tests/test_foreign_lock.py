"""Another program holds the ledger open, for as long as it likes: that delays what the ledger is told, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cache import Engine, ask, expected
from test_failing_folders import evaluate, verb

from evalcache import cache as module
from evalcache.cache import Cache
from evalcache.ledger import Ledger


@contextlib.contextmanager
def another_process(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that says when it holds something, and does so until it is ended."""
    held = f"import time\n{code}\nprint('held', flush=True)\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def notebook(folder: Path, *, read_only: bool = False) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return another_process(f"import duckdb\nc = duckdb.connect({str(folder / 'ledger.duckdb')!r}, read_only={read_only})")


@pytest.mark.parametrize("read_only", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_a_notebook_that_holds_the_ledger_delays_the_sync_and_nothing_else(tmp_path: Path, read_only: bool) -> None:
    folder = tmp_path / "cache"
    free_s = -time.monotonic()
    assert evaluate(tmp_path, "run").asked == 120
    free_s += time.monotonic()
    with notebook(folder, read_only=read_only) as holder:
        held_s = -time.monotonic()
        ran = evaluate(tmp_path, "run")
        held_s += time.monotonic()
        assert ran.is_right() and ran.asked == 0 and not ran.warnings, "nothing is wrong, so nothing is said"
        assert held_s < free_s + 2, f"{held_s:.1f} s, and {free_s:.1f} s where nobody holds it"
        stats = verb(tmp_path, "stats", "--json")
        told = json.loads(stats.out)
        assert stats.code == 0 and told["journal_rows"] > 0, "how much waits, from the store alone"
        assert str(holder.pid) in told["ledger_held_by"]
        for words in (["query", "FROM runs"], ["audit"], ["stats", "--run", "last"]):
            refused = verb(tmp_path, *words)
            assert (refused.code, refused.out) == (3, "")
            assert f"process {holder.pid}" in refused.err and "close it" in refused.err and len(refused.err.splitlines()) == 2
    rows = json.loads(verb(tmp_path, "query", "SELECT hits, misses FROM hits_by_run ORDER BY started_at", "--json").out)
    assert rows == [{"hits": 0, "misses": 120}, {"hits": 120, "misses": 0}], "told as soon as it is free"
    assert json.loads(verb(tmp_path, "stats", "--json").out)["ledger_held_by"] is None


def test_a_long_question_of_evalcache_itself_is_not_waited_for_again_and_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SYNC_S", 0.0)
    monkeypatch.setattr(module, "SYNC_SHARE", 1e9)  # after every call
    monkeypatch.setattr(module, "END_PATIENCE_S", 2.0)
    cache = Cache(tmp_path)
    ask(cache, Engine())
    cache.sync()
    lock = str(tmp_path / "ledger.duckdb.lock")
    with another_process(f"import filelock\nlock = filelock.FileLock({lock!r})\nlock.acquire()"):
        began = time.monotonic()
        assert ask(cache, Engine(), [(9,)]) == expected(Engine(), [(9,)])
        assert time.monotonic() - began < module.SYNC_PATIENCE_S + 1
        began = time.monotonic()
        cache.close()
        assert time.monotonic() - began < module.END_PATIENCE_S + 2
        assert not cache.told
    ledger = Ledger(cache.ledger_path)
    ledger.sync(cache.store)
    assert ledger.query("SELECT misses, status FROM hits_by_run").rows == [(4, "ok")]
    assert os.path.exists(lock)
