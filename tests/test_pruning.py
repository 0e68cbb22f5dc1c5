"""Entries leave the store when somebody says so, in small steps; the ledger knows, and what is asked again is stored again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from recorded import BASE, FIRST, NOON, SECOND, TUNED, ask_all, begin, make_action, make_result, open_pair, write

from evalcache.amounts import parse_bytes, parse_date, parse_seconds, parse_versions
from evalcache.cache import Cache
from evalcache.digest import Digest
from evalcache.errors import AmountError, StoreError, UnknownNameError
from evalcache.journal import RunStarted
from evalcache.ledger import Ledger
from evalcache.mending import mend_folder, verify_folder
from evalcache.pruning import ROW_BYTES, Amount, evict, plan_prune, prune, stored_bytes, used_bytes, vacuum_store
from evalcache.selection import Selection, select
from evalcache.store import Store


def ask_two_models(folder: Path) -> tuple[Store, Ledger, list[Digest], list[Digest]]:
    """Eight entries of `BASE` in the first run and four of `TUNED`, a day later, in the second; each costs its number."""
    store, ledger = open_pair(folder)
    first = ask_all(store, FIRST, NOON, [(make_action(prompt=(1, n)), make_result((n,), float(n))) for n in range(8)])
    entries = [(make_action(TUNED, (1, n), {"max_new_tokens": 9}), make_result((n,), 10.0 + n)) for n in range(4)]
    second = ask_all(store, SECOND, NOON + 86_400, entries, TUNED, "tuned")
    ledger.sync(store)
    return store, ledger, first, second


@pytest.fixture
def asked(tmp_path):
    return ask_two_models(tmp_path)


def later() -> float:
    """A time before which everything was told."""
    time.sleep(0.002)
    return time.time()


def keys_in(store: Store) -> set[Digest]:
    return {key for key, _ in store.frames()}


# --- what is meant ----------------------------------------------------------------------------------------------------------


def test_what_is_meant(asked):
    store, ledger, first, second = asked

    def meant(**said: str) -> set[Digest]:
        plan = plan_prune(store, select(ledger, **said).holds, told_at=later())
        return set(map(Digest, plan.keys))

    assert meant(model="tuned") == meant(model=TUNED.root.hex) == meant(model=str(TUNED.root)[:20]) == set(second)
    assert meant(run="last") == meant(run=SECOND[:8]) == set(second) and meant(run=FIRST) == set(first)
    assert meant(model="tuned", run=FIRST) == set()
    assert meant(older_than="1s") == {*first, *second} and meant(older_than="99999d") == set()
    days = (time.time() - NOON - 43_200) / 86_400
    assert meant(older_than=f"{days:.6f}d") == set(first)
    assert meant(since="2023-11-15T12:00") == set(second) and meant(since="2023-11-14", run=FIRST) == set(first)
    for said in ({"model": "other"}, {"run": "f00"}, {"task": "gsm8k"}):
        with pytest.raises(UnknownNameError):
            meant(**said)


def test_versions_are_compared_as_versions(tmp_path):
    store, ledger = open_pair(tmp_path)
    keys = {}
    for number, version in enumerate(("0.1.0", "0.2.0", "0.10.1", None)):
        run, versions = str(number) * 32, {} if version is None else {"evalcache": version, "torch": "2.13.0+cpu"}
        (keys[version],) = write(store, run, NOON, [(make_action(prompt=(number,)), make_result())], [
            RunStarted(run, NOON, "x", versions=versions)
        ], BASE)  # fmt: skip
    ledger.sync(store)

    def meant(producer: str) -> set[Digest]:
        return set(map(Digest, plan_prune(store, select(ledger, producer=producer).holds, told_at=later()).keys))

    assert meant("<0.2") == {keys["0.1.0"]} and meant("<1") == {keys["0.1.0"], keys["0.2.0"], keys["0.10.1"]}
    assert meant("evalcache>=0.10") == {keys["0.10.1"]} and meant("torch<2.13") == set()
    assert len(meant("torch>=2.12,<2.14")) == 3, "of a run that told none, nothing is known"


@pytest.mark.parametrize("text", ["", "10", "ten days", "3 y", "5d junk", "-4d"])
def test_what_is_no_time(text):
    with pytest.raises(AmountError):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["", "GB", "10 XB", "1iB", "-5GB", "10GB more"])
def test_what_is_no_size(text):
    with pytest.raises(AmountError):
        parse_bytes(text)


def test_what_is_no_date_and_no_version():
    for parse, text in ((parse_date, "yesterday"), (parse_versions, "0.2"), (parse_versions, "<<2"), (parse_versions, "torch")):
        with pytest.raises(AmountError):
            parse(text)


# --- in which order ---------------------------------------------------------------------------------------------------------


def test_the_cheapest_by_the_byte_go_first_and_no_more_than_needed(asked):
    store, _, first, _ = asked
    sizes = {key: len(frame) + ROW_BYTES for key, frame in store.frames()}
    before = stored_bytes(store)
    plan = plan_prune(store, max_bytes=before - sizes[first[0]] - 1, told_at=later())
    assert plan.keys == [first[0].value, first[1].value]
    assert plan.total == Amount(2, sizes[first[0]] + sizes[first[1]], 1.0, 0) and plan.kept.entries == 10
    assert plan_prune(store, max_bytes=before, told_at=later()).keys == []
    assert len(plan_prune(store, max_bytes=0, told_at=later()).keys) == 12
    chosen = plan_prune(store, Selection(runs={SECOND}).holds, before - 1, told_at=later())
    assert len(chosen.keys) == 1 and Digest(chosen.keys[0]) not in first, "of those that are meant alone"


def test_what_nobody_measured_stands_at_the_mean(tmp_path):
    store, _ = open_pair(tmp_path)
    seconds = [1.0, None, 4.0, 5.0]
    keys = ask_all(store, FIRST, NOON, [(make_action(prompt=(n,)), make_result((n,), cost)) for n, cost in enumerate(seconds)])
    order = [Digest(key) for key in plan_prune(store, max_bytes=0, told_at=later()).keys]
    assert order[0] == keys[0] and order[1] == keys[1] and plan_prune(store, told_at=later()).total.unmeasured == 1


@settings(
    max_examples=15,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.none() | st.floats(0, 1e3), st.integers(0, 900)), min_size=1, max_size=12), st.floats(0, 1))
def test_what_stays_fits_and_is_worth_at_least_what_goes(tmp_path_factory, entries, share):
    with Store(tmp_path_factory.mktemp("evict")) as store:
        asked = enumerate(entries)
        write(
            store,
            FIRST,
            NOON,
            [(make_action(prompt=(n,)), make_result((n,), cost, text="x" * size)) for n, (cost, size) in asked],
        )
        store.waiting.forget(10**9)
        limit = int(stored_bytes(store) * share)
        plan = plan_prune(store, max_bytes=limit, told_at=later())
        left = stored_bytes(store) - plan.total.size_bytes
        assert left <= limit or plan.kept.entries == 0
        assert not plan.keys or left + plan.sizes[-1] > limit, "not one more than it takes"
        assert prune(store, plan) == len(plan.keys) and len(keys_in(store)) == plan.kept.entries
        assert plan.total.entries + plan.kept.entries == len(entries)


# --- how they go ------------------------------------------------------------------------------------------------------------


def test_what_was_pruned_is_gone_and_its_history_stays(asked, tmp_path):
    store, ledger, first, second = asked
    history = ledger.query("SELECT * FROM lookups ORDER BY ALL").rows, ledger.query("SELECT * FROM outputs ORDER BY ALL").rows
    plan = plan_prune(store, Selection(models={TUNED.root}).holds, told_at=later())
    assert prune(store, plan) == 4 and keys_in(store) == set(first)
    ledger.sync(store)
    assert (
        ledger.query("SELECT * FROM lookups ORDER BY ALL").rows,
        ledger.query("SELECT * FROM outputs ORDER BY ALL").rows,
    ) == history
    assert {row[0] for row in ledger.query("SELECT key FROM entries_gone WHERE why = 'pruned'").rows} == {
        key.hex for key in second
    }
    names = {name for name, _ in store.objects()}
    assert f"model/{BASE.root.hex}" in names and f"model/{TUNED.root.hex}" not in names and len(names) == 3
    assert verify_folder(tmp_path).good and mend_folder(tmp_path).restored == 0
    ask_all(store, "3" * 32, NOON, [(make_action(TUNED, (1, 0), {"max_new_tokens": 9}), make_result((0,)))], TUNED, "tuned")
    found = verify_folder(tmp_path)
    assert found.good and (found.entries, found.outputs) == (9, 9)


def test_what_was_stored_since_and_what_is_damaged_stays(asked):
    store, _, first, _ = asked
    store.rows.query("UPDATE Cache SET value = x'00' WHERE key = ?", (first[0].value,))
    at = later()
    (new,) = write(store, SECOND, NOON, [(make_action(prompt=(7, 7)), make_result())])
    plan = plan_prune(store, told_at=at)
    write(
        store, SECOND, NOON, [(make_action(prompt=(1, 3)), make_result((3,)))]
    )  # computed anew while somebody looks at the plan
    assert len(plan.keys) == 11 and prune(store, plan) == 10
    assert keys_in(store) == {new, first[3], first[0]}
    assert {f"model/{BASE.root.hex}"} < {name for name, _ in store.objects()}, "that one is still named"


WORKER = """
import sys, time
from evalcache.digest import Digest
from evalcache.store import Store
store = Store(sys.argv[1])
store.leases.claim([Digest(bytes.fromhex(key)) for key in sys.argv[2:]])
print("claimed", flush=True)
time.sleep(60)
"""


def test_beside_a_live_run_what_is_young_or_leased_stays_and_so_do_objects(asked, monkeypatch):
    store, _, first, second = asked
    command = [sys.executable, "-c", WORKER, str(store.directory), first[2].hex]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
        try:
            worker.stdout.readline()
            assert plan_prune(store, told_at=later()).keys == []
            with pytest.raises(StoreError, match="at work"):
                vacuum_store(store)
            monkeypatch.setattr("evalcache.pruning.YOUNG_S", 0.0)
            assert prune(store, plan_prune(store, told_at=later())) == 11
            assert keys_in(store) == {first[2]} and len(dict(store.objects())) == 5
        finally:
            worker.kill()
    assert prune(store, plan_prune(store, told_at=later())) == 1 and dict(store.objects()) == {}
    assert len(second) == 4


def test_a_conflict_goes_with_its_entry(asked, tmp_path):
    store, _, first, _ = asked
    with Store(tmp_path / "other") as other:
        write(other, SECOND, NOON, [(make_action(prompt=(1, 0)), make_result((99,)))])
        store.take_in(list(other.frames()), {})
    assert len(list(store.conflicts())) == 1
    prune(store, plan_prune(store, told_at=later()))
    assert store.rows.count("object/conflict/", "object/conflict0") == 0 and first


def test_a_writer_does_not_wait_long(tmp_path, monkeypatch):
    store, ledger = open_pair(tmp_path)
    for start in range(0, 1500, 500):
        write(
            store,
            FIRST,
            NOON,
            [(make_action(prompt=(1, n)), make_result((n,), text="x" * 400)) for n in range(start, start + 500)],
        )
    ledger.sync(store)
    plan = plan_prune(store, told_at=later())
    waits, done = [], threading.Event()

    def write_on() -> None:
        with Store(tmp_path / "store") as mine:
            while not done.is_set():
                began = time.monotonic()
                write(mine, SECOND, NOON, [(make_action(prompt=(2, len(waits))), make_result())])
                waits.append(time.monotonic() - began)
                time.sleep(0.005)

    writer = threading.Thread(target=write_on)
    writer.start()
    assert prune(store, plan) == 1500
    done.set()
    writer.join()
    assert len(waits) > 3 and max(waits) < 1.0
    ledger.sync(store)
    found = verify_folder(tmp_path)
    assert found.good and found.entries == len(waits)


PRUNER = """
import sys, time
from evalcache.pruning import plan_prune, prune
from evalcache.store import Store
import evalcache.pruning
evalcache.pruning._CHUNK_ROWS = 8
store = Store(sys.argv[1])
plan = plan_prune(store, told_at=time.time())
print("go", flush=True)
prune(store, plan)
"""


@pytest.mark.parametrize("delay", [0.001, 0.06, *(pytest.param(n / 100, marks=pytest.mark.campaign) for n in range(1, 16))])
def test_killed_at_any_instant_what_left_is_what_the_journal_says(tmp_path, delay):
    store, ledger = open_pair(tmp_path)
    keys = ask_all(store, FIRST, NOON, [(make_action(prompt=(1, n)), make_result((n,))) for n in range(200)])
    ledger.sync(store)
    with subprocess.Popen([sys.executable, "-c", PRUNER, str(store.directory)], stdout=subprocess.PIPE) as pruner:
        pruner.stdout.readline()
        time.sleep(delay)
        os.kill(pruner.pid, signal.SIGKILL)
    assert pruner.returncode == -signal.SIGKILL
    left = keys_in(store)
    assert len(left) < 200 or delay < 0.01
    found = verify_folder(tmp_path)
    assert found.good and found.entries == len(left) and left <= set(keys)
    assert prune(store, plan_prune(store, told_at=later())) == len(left) and verify_folder(tmp_path).good


def test_vacuum_gives_room_back(tmp_path):
    store, ledger = open_pair(tmp_path)
    write(store, FIRST, NOON, [(make_action(prompt=(1, n)), make_result((n,), text=f"x{n}" * 900)) for n in range(1500)])
    ledger.sync(store)
    store.rows.query("PRAGMA wal_checkpoint(TRUNCATE)")
    before = (tmp_path / "store" / "cache.db").stat().st_size
    prune(store, plan_prune(store, told_at=later()))
    assert used_bytes(store) < before / 4 and stored_bytes(store) < before / 4, "what is free is not counted"
    assert vacuum_store(store) > before / 2 and (tmp_path / "store" / "cache.db").stat().st_size < before / 4
    assert store.check() == []


# --- a size limit -----------------------------------------------------------------------------------------------------------


def test_without_a_limit_nothing_goes_and_with_one_as_little_as_needed(asked, monkeypatch):
    store, ledger, first, _ = asked
    assert evict(store, told_at=later(), run=FIRST) == Amount()
    monkeypatch.setenv("EVALCACHE_MAX_SIZE", "1GB")
    assert evict(store, told_at=later(), run=FIRST) == Amount()
    assert used_bytes(store) > stored_bytes(store) + 10
    monkeypatch.setenv("EVALCACHE_MAX_SIZE", str(stored_bytes(store) + 10))
    assert evict(store, told_at=later(), run=FIRST) == Amount(), "what counts is stored, not the file"
    limit = stored_bytes(store) - 10
    monkeypatch.setenv("EVALCACHE_MAX_SIZE", str(limit))
    went = evict(store, told_at=later(), run=FIRST)
    assert 0 < went.entries < 12 and first[0] not in keys_in(store) and stored_bytes(store) <= limit
    ledger.sync(store)
    assert ledger.query("SELECT DISTINCT why, run FROM entries_gone").rows == [("evicted", FIRST)]
    assert ledger.query("SELECT count(*) FROM overheads WHERE kind = 'prune' AND seconds > 0").rows == [(1,)]
    assert evict(store, told_at=later(), run=FIRST).entries <= went.entries, "it does not go on for ever"


def test_a_limit_that_is_none_costs_a_run_a_warning(asked, monkeypatch):
    monkeypatch.setenv("EVALCACHE_MAX_SIZE", "plenty")
    with pytest.warns(UserWarning, match="plenty"):
        assert evict(asked[0], told_at=later(), run=FIRST) == Amount()


def test_a_run_that_cannot_tell_the_ledger_evicts_nothing(tmp_path, monkeypatch):
    store, ledger, *_ = ask_two_models(tmp_path)
    monkeypatch.setenv("EVALCACHE_MAX_SIZE", "1")
    cache = Cache(tmp_path, run="4" * 32)
    cache.note(begin("4" * 32, NOON)[0])
    with ledger.turn():  # as another process would hold it
        monkeypatch.setattr("evalcache.cache.END_PATIENCE_S", 0.1)
        cache.close()
    assert cache.evicted is None and len(keys_in(store)) == 12
    cache = Cache(tmp_path, run="5" * 32)
    cache.note(begin("5" * 32, NOON)[0])
    cache.close()
    assert cache.evicted.entries == 12 and keys_in(store) == set()


# --- the verb ---------------------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path):
    store, *_ = ask_two_models(tmp_path)

    def evalcache(*arguments: str, **env: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "evalcache", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | env)

    folder = ("--dir", str(tmp_path), "--json")
    told = json.loads(evalcache("prune", "--model", "tuned", *folder).stdout)
    assert told["dry_run"] and (told["entries"], told["seconds"], told["kept_entries"]) == (4, 46.0, 8)
    same = {name: told[name] for name in ("entries", "size_bytes", "seconds", "unmeasured")}
    assert told["by_model"] == [{"model": str(TUNED.root), "names": ["tuned"]} | same]
    assert len(keys_in(store)) == 12
    said = evalcache("prune", "--model", "tuned", "--dir", str(tmp_path)).stdout
    assert "tuned" in said and "a dry run: --yes does it" in said
    told = json.loads(evalcache("prune", "--model", "tuned", "--vacuum", "--yes", *folder).stdout)
    assert (told["dry_run"], told["removed"]) == (False, 4) and "vacuumed_bytes" in told and len(keys_in(store)) == 8
    assert evalcache("verify", *folder).returncode == 0
    assert evalcache("prune", *folder).returncode == 2
    refused = evalcache("run", "--", "true", EVALCACHE_MAX_SIZE="plenty")
    assert refused.returncode == 2 and "plenty" in refused.stderr
