"""Many processes, threads and forks on one folder, with syncs going on: nothing lost, nothing twice, nobody waits for long.

The long campaigns are `benchmarks/exp_faults.py` and `benchmarks/exp_procs.py`.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
from crowd import run_crowd
from numbered import entry_of, faults_of_ledger, faults_of_store, key_of_number, numbers_of, put_batch
from recorded import open_pair

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def check_crowd(folder: Path, seconds: float, pause_s: float, kills: int) -> None:
    crowd = run_crowd(folder, 8, seconds, pause_s=pause_s, kills=kills)
    assert crowd.faults == []
    assert (len(crowd.seen), crowd.kills) == (8, kills)
    assert crowd.all("gets")[-1] < 1.0 + crowd.stalled_s, "a reader waited for somebody"
    assert sum(seen.locked for seen in crowd.seen) == 0, "a syncer was not let in"
    assert min(seen.syncs for seen in crowd.seen) > 0, "a syncer was starved"


def test_8_processes_for_a_minute(tmp_path: Path) -> None:
    # They rest between two rounds: this is about what they do to each other, not about how fast the machine is.
    check_crowd(tmp_path, 60, 0.8, 6)


@pytest.mark.campaign
def test_8_processes_that_never_rest(tmp_path: Path) -> None:
    check_crowd(tmp_path, 120, 0.0, 12)


def test_who_has_had_a_turn_queues_behind_those_who_wait(tmp_path: Path) -> None:
    """One that asks without end does not keep another one out, which would have to find the moment between two questions."""
    store, ledger = open_pair(tmp_path)
    put_batch(store, 0)
    ledger.sync(store)
    asked, over = [], threading.Event()

    def ask_without_end() -> None:
        while not over.is_set():
            with ledger.turn():
                asked.append(time.monotonic())
                time.sleep(0.03)

    thread = threading.Thread(target=ask_without_end)
    thread.start()
    turns = []
    for _ in range(15):
        before = len(asked)
        while len(asked) == before:  # until the other one has its next turn
            time.sleep(0.001)
        before = len(asked)
        with ledger.turn():
            turns.append(len(asked) - before)
    over.set()
    thread.join()
    assert max(turns) == 0


def test_forks_while_threads_write_and_sync(tmp_path: Path) -> None:
    """Children of a process whose other threads are at the store and the ledger: their handles are their own."""
    gc.collect()  # stores of other tests: whichever thread met them would close their connections, whenever it likes
    store, ledger = open_pair(tmp_path)
    put_batch(store, 0)
    over, failed = threading.Event(), []
    done = {0}

    def work(first: int, sync: bool) -> None:
        try:
            batch = first
            while not over.is_set():
                put_batch(store, batch)
                done.add(batch)
                batch += 10
                if sync:
                    ledger.sync(store)
                time.sleep(0.005)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(first, first == 1)) for first in (1, 2)]
    for thread in threads:
        thread.start()
    children = []
    for child in range(6):
        time.sleep(0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which is the point
            pid = os.fork()
        if not pid:
            try:
                signal.alarm(30)  # for a lock that another thread held at that moment, and nobody gives back
                for batch in (3 + child, 13 + child):
                    put_batch(store, batch)
                    expected = {key_of_number(number): entry_of(number) for number in numbers_of([0, batch])}
                    assert store.get_many(list(expected)) == expected
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
        done |= {3 + child, 13 + child}
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 6
    over.set()
    for thread in threads:
        thread.join()
    assert failed == []
    ledger.sync(store)
    faults, batches = faults_of_store(store, done)
    assert faults + faults_of_ledger(store, ledger, batches) == []
    assert batches == done
