"""The cache's own promises: policies, duplicates, what waits for a check, faults of the store, costs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import evalcache.cache as module
import evalcache.checking as checking
from evalcache.cache import Cache
from evalcache.digest import digest_bytes
from evalcache.errors import EvalCacheError, EvalCacheWarning, FingerprintError, ReplayMissError
from evalcache.journal import Measured
from evalcache.ledger import Ledger
from evalcache.manifest import Manifest, ModuleRecord
from evalcache.records import Action, Array, Cost, Environment, Fields, Request, Result, pack_tokens
from evalcache.store import Store
from evalcache.watch import Watch


class Engine:
    """A deterministic engine of one's own: answers are the prompt's tokens plus the weight."""

    def __init__(self, weight=1, seconds=0.5):
        self.weight = weight
        self.seconds = seconds
        self.asked = []

    def manifest(self):
        return Manifest({"": ModuleRecord(digest_bytes(str(self.weight).encode()), "Engine")})

    def compute(self, prompts):
        def run(missing):
            for place in missing:
                self.asked.append(prompts[place])
                made = [token + self.weight for token in prompts[place]]
                yield place, Result(tokens=pack_tokens(made), cost=Cost(self.seconds, len(made), len(made), "cpu", len(missing)))

        return run


PROMPTS = [(1, 2), (3,), (1, 2), (4, 5, 6)]
ENVIRONMENT = Environment(Fields({"dtype": "float32"}))


def ask(cache, engine, prompts=PROMPTS, watch=None):
    watch = watch or cache.watch(Watch(engine.manifest, "engine"))
    root = cache.open(watch).root
    actions = [
        Action(root, Request("generate", pack_tokens(prompt), Fields({"max_new_tokens": 3})), ENVIRONMENT) for prompt in prompts
    ]
    return [list(memoryview(result.tokens).cast("i")) for result in cache.serve(watch, actions, engine.compute(prompts))]


def expected(engine, prompts=PROMPTS):
    return [[token + engine.weight for token in prompt] for prompt in prompts]


def test_misses_only_in_first_seen_order_and_once(tmp_path):
    engine = Engine()
    cache = Cache(tmp_path)
    assert ask(cache, engine) == expected(engine)
    assert engine.asked == [(1, 2), (3,), (4, 5, 6)]
    assert (cache.counts.hits, cache.counts.misses, cache.counts.duplicates) == (0, 3, 1)
    assert cache.counts.spent_seconds == 1.5 and cache.counts.duplicate_seconds == 0.5
    cache.close()
    again, engine2 = Cache(tmp_path), Engine()
    assert ask(again, engine2, [*PROMPTS, (9,)]) == expected(engine, [*PROMPTS, (9,)])
    assert engine2.asked == [(9,)]
    assert (again.counts.hits, again.counts.misses, again.counts.credited_seconds) == (3, 1, 1.5)
    again.close()


@pytest.mark.parametrize(("policy", "asked", "stored"), [("use", 0, 1), ("refresh", 3, 1), ("read_only", 0, 0), ("replay", 0, 0)])
def test_policies_on_a_full_store(tmp_path, policy, asked, stored):
    with_store = Cache(tmp_path)
    ask(with_store, Engine())
    with_store.close()
    engine = Engine()
    cache = Cache(tmp_path, policy=policy)
    assert ask(cache, engine) == expected(engine)
    assert len(engine.asked) == asked
    new = Engine()
    if policy == "replay":
        with pytest.raises(ReplayMissError, match="not in the store"):
            ask(cache, new, [(7,)])
    else:
        ask(cache, new, [(7,)])
    cache.close()
    check = Cache(tmp_path)
    last = Engine()
    ask(check, last, [(7,)])
    assert len(last.asked) == 1 - stored
    check.close()


def test_policy_off_runs_everything(tmp_path):
    engine = Engine()
    cache = Cache(tmp_path, policy="off")
    assert ask(cache, engine) == expected(engine)
    assert sum(cache.counts.uncacheable.values()) == 3 and cache.counts.misses == 0
    cache.close()


def test_settings_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALCACHE", "read_only")
    monkeypatch.setenv("EVALCACHE_MATCH", "strict")
    cache = Cache(tmp_path)
    assert cache.policy.value == "read_only" and cache.match == "strict"
    cache.close()
    monkeypatch.setenv("EVALCACHE", "sometimes")
    with pytest.raises(EvalCacheError, match="unknown policy 'sometimes'"):
        Cache(tmp_path)


def test_a_changed_model_is_never_answered_from_the_store(tmp_path):
    engine = Engine()
    cache = Cache(tmp_path)
    watch = cache.watch(Watch(engine.manifest))
    ask(cache, engine, watch=watch)
    engine.weight = 2
    assert ask(cache, engine, watch=watch) == expected(engine)
    engine.weight = 1
    assert ask(cache, engine, watch=watch) == expected(engine)
    cache.close()


def test_what_was_computed_while_the_model_changed_is_not_stored(tmp_path):
    engine = Engine()
    cache = Cache(tmp_path)
    watch = cache.watch(Watch(engine.manifest))
    root = cache.open(watch).root
    actions = [Action(root, Request("generate", pack_tokens((1,))), ENVIRONMENT)]

    def compute(missing):
        for place, result in engine.compute([(1,)])(missing):
            engine.weight = 5  # somebody edits it before the batch is done
            yield place, result

    cache.serve(watch, actions, compute)
    cache.close()
    assert cache.counts.uncacheable == {"changed": 1} and cache.counts.misses == 0
    assert Cache(tmp_path).store.stats().entries == 0


def test_a_model_that_cannot_be_read_any_more_drops_what_waits(tmp_path):
    engine = Engine(seconds=0.0)
    cache = Cache(tmp_path)
    watch = cache.watch(Watch(engine.manifest))
    ask(cache, engine, watch=watch)

    def refuse():
        raise FingerprintError("layer", "hooked", "hook")

    engine_manifest, watch._fingerprint = watch._fingerprint, refuse
    with pytest.raises(FingerprintError):
        cache.open(watch)
    watch._fingerprint = engine_manifest
    cache.close()
    assert cache.counts.uncacheable == {"changed": 3}


def test_a_long_call_commits_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COMMIT_S", 0.0)
    engine, cache = Engine(seconds=0.0), Cache(tmp_path)
    watch = cache.watch(Watch(engine.manifest))
    root = cache.open(watch).root
    actions = [Action(root, Request("generate", pack_tokens((n,))), ENVIRONMENT) for n in range(5)]
    seen = []

    def compute(missing):
        for place, result in engine.compute([(n,) for n in range(5)])(missing):
            seen.append(cache.store.stats().entries)
            yield place, result

    cache.serve(watch, actions, compute)
    assert seen == [0, 0, 1, 2, 3]
    cache.close()


def test_all_or_none(tmp_path):
    engine, cache = Engine(), Cache(tmp_path)
    watch = cache.watch(Watch(engine.manifest))
    ask(cache, engine, [(1,)], watch)
    root = cache.open(watch).root
    actions = [Action(root, Request("generate", pack_tokens((n,)), Fields({"max_new_tokens": 3})), ENVIRONMENT) for n in (1, 2)]
    engine.asked.clear()
    cache.serve(watch, actions, engine.compute([(1,), (2,)]), all_or_none=True)
    assert engine.asked == [(1,), (2,)]
    cache.close()


def test_results_that_are_too_large_are_returned_and_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "RESULT_LIMIT_BYTES", 100)
    engine, cache = Engine(), Cache(tmp_path)
    watch = cache.watch(Watch(engine.manifest))
    root = cache.open(watch).root
    actions = [Action(root, Request("generate", pack_tokens((n,))), ENVIRONMENT) for n in (1, 2)]

    def compute(missing):
        return [
            (place, Result(arrays={"scores": Array("uint8", (90 + 20 * place,), bytes(90 + 20 * place))})) for place in missing
        ]

    assert len(cache.serve(watch, actions, compute)) == 2
    cache.flush()
    assert cache.counts.uncacheable == {"too_large": 1} and cache.counts.misses == 1
    assert cache.store.stats().entries == 1
    cache.close()


def test_a_store_that_fails_costs_a_warning_and_never_the_run(tmp_path):
    engine, cache = Engine(), Cache(tmp_path)
    for file in (tmp_path / "store").glob("cache.db*"):
        file.write_bytes(b"\0" * 4096)
    with pytest.warns(EvalCacheWarning):
        assert ask(cache, engine) == expected(engine)
        cache.close()


def test_the_ledger_tells_what_happened(tmp_path):
    cache = Cache(tmp_path)
    ask(cache, Engine())
    cache.uncacheable("streamer", "a test", requests=2, seconds=0.25)
    cache.close("failed", 3)
    again = Cache(tmp_path)
    ask(again, Engine())
    again.close()
    table = Ledger(again.ledger_path).query(
        "SELECT run, hits, misses, uncacheable, duplicates, status FROM ledger.hits_by_run ORDER BY started_at"
    )
    assert [tuple(row) for row in table.rows] == [(cache.run_id, 0, 3, 2, 1, "failed"), (again.run_id, 3, 0, 0, 1, "ok")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_writes_what_is_its_own_and_the_parent_the_rest(tmp_path):
    cache, engine = Cache(tmp_path), Engine(seconds=0.0)
    watch = cache.watch(Watch(engine.manifest, "engine"))
    ask(cache, engine, watch=watch)
    assert watch.pending and not cache.store.stats().entries
    held, over = threading.Event(), threading.Event()

    def hold():
        with cache._lock, watch.lock:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = os.fork()
    if not pid:
        signal.alarm(30)  # waiting for a lock that nobody will let go
        ask(cache, engine, [(7,)], watch)
        cache.flush()
        os._exit(0)
    over.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
    assert cache.store.stats().entries == 1
    cache.close()
    table = Ledger(cache.ledger_path).query("SELECT run, hits, misses, duplicates, status FROM ledger.hits_by_run")
    assert [tuple(row) for row in table.rows] == [(cache.run_id, 0, 4, 1, "ok")]
    with Store(tmp_path / "store") as store:
        assert store.stats().entries == 4 and not store.check()


def test_a_run_that_asked_nothing_leaves_nothing(tmp_path):
    cache = Cache(tmp_path)
    assert cache.untouched
    cache.close()
    assert not cache.ledger_path.exists()


def test_killed_after_a_commit_nothing_of_it_is_lost(tmp_path):
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_cache import Engine, ask
        from evalcache.cache import Cache
        cache = Cache({str(tmp_path)!r})
        ask(cache, Engine())
        cache.flush()
        print("committed", flush=True)
        time.sleep(60)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "committed\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    engine, cache = Engine(), Cache(tmp_path)
    assert ask(cache, engine) == expected(engine)
    assert engine.asked == [] and cache.counts.hits == 3
    cache.close()


def test_no_second_is_counted_twice():
    counts = module.Counts()
    began = time.perf_counter()
    with counts.taking("lookup"):
        time.sleep(0.02)
        with counts.taking("write"):
            time.sleep(0.03)
        with counts.taking(""):  # not ours
            time.sleep(0.04)
            with counts.taking("checks"), contextlib.suppress(KeyError), counts.taking("sync"):
                time.sleep(0.01)
                raise KeyError
    took_s = time.perf_counter() - began
    assert counts.overhead.keys() == {"lookup", "write", "checks", "sync"}
    assert counts.overhead["write"] >= 0.03 and counts.overhead["sync"] >= 0.01 and counts.overhead["lookup"] >= 0.02
    assert 0.06 <= counts.overhead.total() <= took_s - 0.04


def test_the_ledger_knows_what_the_last_sync_took(tmp_path):
    cache = Cache(tmp_path)
    ask(cache, Engine())
    cache.close()
    rows = Ledger(cache.ledger_path).query("SELECT kind, sum(seconds) AS s FROM overheads GROUP BY kind").rows
    told = dict(rows)
    assert 0 < told["last_sync"] < cache.counts.overhead["sync"], "the part up to its commit"
    assert "sync" not in told, "the last sync counts once"


def test_what_a_run_computed_itself_is_no_saving_of_its_own(tmp_path):
    cache = Cache(tmp_path)
    watch = cache.watch(Watch(Engine().manifest, "engine"))
    ask(cache, Engine(), watch=watch)  # three computed, one merged
    cache.flush()
    engine = Engine()
    ask(cache, engine, watch=watch)  # three served, one merged
    assert engine.asked == []
    counts = cache.counts
    assert (counts.hits, counts.credited_seconds, counts.duplicate_seconds) == (3, 0.0, 2.5)
    cache.close()
    told = Ledger(cache.ledger_path).query(
        "SELECT outcome, reason, device, origin, count(*)::INTEGER FROM lookups GROUP BY ALL ORDER BY outcome, reason, origin"
    )
    assert told.rows == [
        ("duplicate", None, "cpu", cache.run_id, 1),
        ("duplicate", None, "cpu", None, 1),
        ("hit", "own", "cpu", cache.run_id, 3),
        ("miss", "absent", "cpu", None, 3),
    ]
    sums = "SELECT hits, credited_seconds, duplicate_seconds, unmeasured_hits, hit_rate_by_seconds FROM hits_by_run"
    assert Ledger(cache.ledger_path).query(sums).rows == [(3, 0.0, 2.5, 0, 0.0)]


def test_a_run_has_the_tags_that_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv("EVALCACHE_TAGS", "nightly, small ,,nightly")
    cache = Cache(tmp_path)
    ask(cache, Engine())
    cache.note(Measured(cache.run_id, 3.0, "NVIDIA H200", 2, None, 12.5))
    cache.close()
    ledger = Ledger(cache.ledger_path)
    assert ledger.query("SELECT run, tag FROM run_tags ORDER BY tag").rows == [(cache.run_id, "nightly"), (cache.run_id, "small")]
    told = ledger.query("SELECT run, device, device_count, peak_bytes, energy_joules FROM measurements").rows
    assert told == [(cache.run_id, "NVIDIA H200", 2, None, 12.5)]
