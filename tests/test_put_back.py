"""Stores that give out journal numbers for the second time: put back from a backup, or copied beside the ledger of the first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from recorded import NOON, ask_all, make_action, make_result, open_pair

from evalcache.ledger import Ledger
from evalcache.store import Store

RUNS = [f"{number:032x}" for number in range(1, 10)]


def run(store: Store, number: int, calls: int = 1) -> None:
    """So many calls, each of one new prompt, as runs of their own: four events each."""
    for call in range(calls):
        ask_all(store, RUNS[number + call], NOON + 100 * (number + call), [(make_action(prompt=(number + call,)), make_result())])


def counted(ledger: Ledger) -> dict[str, int]:
    """Run → lookups that the ledger counts; none where it does not know the run."""
    runs = ledger.query("SELECT run, misses FROM hits_by_run ORDER BY run").rows
    lookups = ledger.query("SELECT count(*) FROM lookups").rows[0][0]
    assert lookups == sum(count for _, count in runs), "nothing twice"
    assert ledger.query("SELECT count(*) FROM runs").rows == [(len(runs),)]
    return dict(runs)


@pytest.mark.parametrize("synced", [True, False], ids=["all told", "some waited"])
@pytest.mark.parametrize("after", [1, 4], ids=["fewer", "more"])
def test_what_a_store_does_after_it_was_put_back_is_counted(tmp_path: Path, synced: bool, after: int) -> None:
    store, ledger = open_pair(tmp_path)
    run(store, 0)
    ledger.sync(store)
    if not synced:
        run(store, 1)
    store.close()
    shutil.copytree(store.directory, tmp_path / "backup")
    run(store, 1 if synced else 2, 2)
    ledger.sync(store)
    known, store_id = set(counted(ledger)), store.waiting.id()
    store.close()
    shutil.rmtree(store.directory)
    shutil.copytree(tmp_path / "backup", store.directory)

    store = Store(store.directory)
    run(store, 5, after)
    assert ledger.sync(store).events
    assert counted(ledger) == dict.fromkeys(sorted(known | set(RUNS[5 : 5 + after])), 1)
    assert store.waiting.id() != store_id and store.waiting.count() == 0
    run(store, 5 + after - 1)
    ledger.sync(store)
    assert ledger.query("SELECT count(*) FROM lookups").rows == [(len(known) + after + 1,)], "and so is what comes later"


@pytest.mark.parametrize("first", ["the store", "its copy"])
def test_a_store_and_its_copy_feed_one_ledger(tmp_path: Path, first: str) -> None:
    store, ledger = open_pair(tmp_path)
    run(store, 0)
    ledger.sync(store)
    run(store, 1)  # which waits in both
    store.close()
    shutil.copytree(store.directory, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    run(store, 2, 2)
    run(copy, 5)
    for one in (store, copy) if first == "the store" else (copy, store):
        ledger.sync(one)
    assert counted(ledger) == dict.fromkeys(RUNS[:4] + RUNS[5:6], 1)
    for number, one in ((6, copy), (7, store), (8, copy)):
        run(one, number)
        ledger.sync(one)
    assert counted(ledger) == dict.fromkeys(RUNS[:4] + RUNS[5:9], 1)
    assert store.waiting.id() != copy.waiting.id()


def test_a_store_that_is_moved_is_the_same_one(tmp_path: Path) -> None:
    store, ledger = open_pair(tmp_path)
    run(store, 0)
    ledger.sync(store)
    run(store, 1)
    store_id = store.waiting.id()
    store.close()
    moved = Store(shutil.copytree(store.directory, tmp_path / "moved"))
    shutil.rmtree(store.directory)
    run(moved, 2)
    ledger.sync(moved)
    assert counted(ledger) == dict.fromkeys(RUNS[:3], 1) and moved.waiting.id() == store_id
