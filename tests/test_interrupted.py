"""Ctrl-C and SIGTERM while a wrapped script computes: it ends as it would, says its line, and what was computed is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from evalcache import sigterm
from evalcache.ledger import Ledger
from evalcache.store import Store

SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tiny
model = tiny.build("llama")
try:
    for number in range(int(sys.argv[1])):
        batch = tiny.prompts(seed=number)
        print(number, model.generate(**batch, max_new_tokens=16, do_sample=False).sum().item(), flush=True)
finally:
    print("cleaned up", flush=True)
"""
RUN = (sys.executable, "-m", "evalcache", "run", "--")
ROWS = 4  # of a batch


def start(folder: Path, batches: int, *prefix: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [*prefix, sys.executable, str(script), str(batches)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_it_computes(tmp_path: Path, store_folder: Path, number: signal.Signals) -> None:
    running = start(tmp_path, 100_000, *RUN)
    before = [running.stdout.readline() for _ in range(12)]
    time.sleep(0.011)  # into the next batch
    running.send_signal(number)
    said, told = running.communicate(timeout=60)
    printed = before + said.splitlines(keepends=True)
    # As without us: SIGTERM runs nothing of the script, Ctrl-C its own way out.
    assert running.returncode == -number
    assert ("cleaned up\n" in printed) == (number == signal.SIGINT)
    assert told.count("Traceback") == (number == signal.SIGINT)
    (line,) = [line for line in told.splitlines() if line.startswith("evalcache: ")]
    assert line.startswith("evalcache: 0 hits, ") and "no hits" in line
    answered = [text for text in printed if text[0].isdigit()]
    done = len(answered)
    assert done >= len(before)
    # Whole batches, all but the one in hand, and the ledger knows as much.
    with Store(store_folder / "store") as store:
        assert store.check() == [] and store.waiting.count() == 0
        entries = store.stats().entries
    assert entries % ROWS == 0 and ROWS * done <= entries <= ROWS * (done + 1)
    ledger = Ledger(store_folder / "ledger.duckdb")
    assert ledger.query("SELECT status, exit_code FROM run_ends").rows == [("interrupted", 128 + number)]
    assert ledger.query("SELECT count(DISTINCT key) FROM outputs").rows == [(entries,)]
    # The same command goes on from there, with the same answers.
    again = subprocess.run(
        [*RUN, sys.executable, "script.py", str(done)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert again.stdout.splitlines(keepends=True)[:-1] == answered
    assert f"evalcache: {ROWS * done} hits, 0 misses" in again.stderr


def test_a_second_ctrl_c_costs_the_sync_and_not_the_line(tmp_path: Path, store_folder: Path) -> None:
    # That it comes while the ledger is brought up to date is made sure of: it is sent from there.
    done = python(
        """
        import evalcache
        from evalcache.ledger import Ledger
        session = evalcache.enable()
        session.cache.uncacheable("streamer", requests=2)
        Ledger.sync = lambda *args, **more: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        """
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr.count("Traceback") == 1
    assert "evalcache: 0 hits, 0 misses, 2 uncacheable" in done.stderr
    with Store(store_folder / "store") as store:
        assert store.waiting.count() > 0


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    done = python(
        """
        sigterm.end_at_sigterm(lambda number: (print("closing", flush=True), time.sleep(60)))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)
        """
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "closing\n")


def test_a_lock_that_nobody_gives_back_delays_the_end_within_bounds() -> None:
    done = python(
        """
        sigterm.GRACE_S = 0.5
        lock = threading.Lock()
        sigterm.end_at_sigterm(lambda number: lock.acquire())
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
        """
    )
    assert done.returncode == -signal.SIGTERM


def test_what_must_not_be_divided_is_finished_first() -> None:
    done = python(
        """
        sigterm.end_at_sigterm(lambda number: print("closed", flush=True))
        with sigterm.undivided():
            with sigterm.undivided():
                os.kill(os.getpid(), signal.SIGTERM)
                print("in the middle", flush=True)
            print("at the end", flush=True)
        print("never")
        """
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "in the middle\nat the end\nclosed\n")


def test_who_handles_the_signal_goes_on_doing_so() -> None:
    theirs = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        ours = signal.getsignal(signal.SIGTERM)
        sigterm.end_at_sigterm(lambda number: None)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, theirs)
    before = signal.getsignal(signal.SIGTERM)
    put_back = sigterm.end_at_sigterm(lambda number: None)
    assert signal.getsignal(signal.SIGTERM) is not before
    put_back()
    assert signal.getsignal(signal.SIGTERM) is before
    other = threading.Thread(target=sigterm.end_at_sigterm, args=(lambda number: None,))
    other.start()
    other.join()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_ends_by_the_signal_as_ever() -> None:
    done = python(
        """
        sigterm.end_at_sigterm(lambda number: print("closed", flush=True))
        child = os.fork()
        if not child:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            time.sleep(60)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert (done.returncode, done.stdout) == (0, f"{-signal.SIGTERM}\n")


def python(code: str) -> subprocess.CompletedProcess[str]:
    code = "import os, signal, threading, time\nfrom evalcache import sigterm\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
