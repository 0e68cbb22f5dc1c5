"""Two evals that share requests, at once on one store: each request is computed by one of them, and neither waits for the dead.

All processes and stores are real. Engines are stand-ins for a slow model: they sleep.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import evalcache.leases as module
import evalcache.serving as serving
from evalcache.cache import Cache
from evalcache.digest import digest_bytes
from evalcache.errors import EvalCacheWarning
from evalcache.leases import Leases
from evalcache.manifest import Manifest, ModuleRecord
from evalcache.records import Action, Cost, Environment, Fields, Request, Result, pack_tokens, unpack_tokens
from evalcache.rows import Rows
from evalcache.store import Store
from evalcache.watch import Watch

SPAWN = multiprocessing.get_context("spawn")
ENVIRONMENT = Environment(Fields({"dtype": "float32"}))
SETTINGS = Fields({"max_new_tokens": 1})
KEYS = [digest_bytes(str(number).encode()) for number in range(8)]


@contextlib.contextmanager
def database(folder: Path):
    """The database of a store, for looking at it from outside."""
    with contextlib.closing(sqlite3.connect(folder / "cache.db", timeout=10, isolation_level=None)) as connection:
        yield connection


def rows_like(folder: Path, pattern: str) -> int:
    with database(folder) as connection:
        return connection.execute("SELECT COUNT(*) FROM Cache WHERE key LIKE ?", (pattern,)).fetchone()[0]


def count_writes(folder: Path) -> None:
    """From here on, note every row of a lease or worker that is written for the first time."""
    with database(folder) as connection:
        connection.execute("CREATE TABLE Noted (key)")
        connection.execute(
            "CREATE TRIGGER noting AFTER INSERT ON Cache WHEN NEW.key LIKE 'lease/%' OR NEW.key LIKE 'worker/%'"
            " BEGIN INSERT INTO Noted VALUES (NEW.key); END"
        )


def noted(folder: Path, kind: str) -> int:
    with database(folder) as connection:
        return connection.execute("SELECT COUNT(*) FROM Noted WHERE key LIKE ?", (f"{kind}/%",)).fetchone()[0]


class Engine:
    """Answers a number with the next one, after a while for each portion."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked: list[int] = []
        self.portions: list[list[int]] = []

    def manifest(self) -> Manifest:
        return Manifest({"": ModuleRecord(digest_bytes(b"engine"), "Engine")})

    def serve(self, cache: Cache, numbers: list[int], size: int | None = None, **how) -> list[int]:
        watch = cache.watch(Watch(self.manifest, "engine"))
        root = cache.open(watch).root
        actions = [Action(root, Request("generate", pack_tokens([number]), SETTINGS), ENVIRONMENT) for number in numbers]

        def portions(missing):
            return [missing[start : start + size] for start in range(0, len(missing), size)] if size else [missing]

        def compute(missing):
            self.portions.append([numbers[place] for place in missing])
            for place in missing:
                time.sleep(self.seconds)
                self.asked.append(numbers[place])
                yield place, Result(tokens=pack_tokens([numbers[place] + 1]), cost=Cost(self.seconds, 1, 1, "cpu", 1))

        results = cache.serve(watch, actions, compute, portions=portions, **how)
        return [int(unpack_tokens(result.tokens)[0]) for result in results]


def run_engine(folder, numbers, size, seconds, barrier, answers, how):
    """One eval, in a process of its own."""
    engine, cache = Engine(seconds), Cache(folder)
    if barrier is not None:
        barrier.wait()
    began = time.monotonic()
    right = engine.serve(cache, numbers, size, **how) == [number + 1 for number in numbers]
    took_s = time.monotonic() - began
    hits = cache.counts.hits
    cache.close()
    answers.put((right, engine.asked, hits, took_s))


def run_together(folder, works, size, seconds, **how):
    """Several evals that begin at the same moment; what each answered."""
    Store(folder / "store").close()
    barrier, answers = SPAWN.Barrier(len(works)), SPAWN.Queue()
    processes = [SPAWN.Process(target=run_engine, args=(folder, work, size, seconds, barrier, answers, how)) for work in works]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in works]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert all(right for right, *_ in found)
    assert rows_like(folder / "store", "lease/%") == 0
    with Store(folder / "store") as store:
        assert store.check() == []
    return found


@pytest.mark.parametrize("workers", [2, 3])
def test_a_shared_request_is_computed_by_one(tmp_path, workers):
    """70 % are everybody's, 30 % one's own."""
    works = [[*range(280), *range(1000 * own, 1000 * own + 120)] for own in range(1, workers + 1)]
    found = run_together(tmp_path, works, 8, 0.005)
    computed = [number for _, asked, *_ in found for number in asked]
    distinct = {number for work in works for number in work}
    assert set(computed) == distinct and len(computed) <= 1.05 * len(distinct)
    assert sum(hits for _, _, hits, _ in found) == sum(map(len, works)) - len(computed)
    # Together they were not slower than one would have been alone, and where there are two, neither has done it all.
    assert max(took_s for *_, took_s in found) < 400 * 0.005 + 1
    assert workers > 2 or min(len(asked) for _, asked, *_ in found) > 120


def test_calls_one_after_another_are_shared_too(tmp_path):
    """A loop of small calls, each one portion: the second process takes what the first has, and waits for what it computes."""
    found = run_together(tmp_path, [list(range(12))] * 2, None, 0.05)
    assert sorted(number for _, asked, *_ in found for number in asked) == list(range(12))


def test_a_whole_batch_is_computed_by_one(tmp_path):
    found = run_together(tmp_path, [list(range(20))] * 2, 4, 0.05, all_or_none=True)
    assert sorted(len(asked) for _, asked, *_ in found) == [0, 20]


@pytest.mark.parametrize("how", [{}, {"all_or_none": True}], ids=["rows", "whole"])
def test_a_process_that_is_killed_delays_nobody(tmp_path, how):
    Store(tmp_path / "store").close()
    answers = SPAWN.Queue()
    first = SPAWN.Process(target=run_engine, args=(tmp_path, list(range(40)), 20, 60, None, answers, how))
    first.start()
    wait_for(lambda: rows_like(tmp_path / "store", "lease/%"))
    second = SPAWN.Process(target=run_engine, args=(tmp_path, list(range(40)), 20, 0.01, None, answers, how))
    second.start()
    wait_for(lambda: rows_like(tmp_path / "store", "worker/%") == 2)
    time.sleep(1.5)
    assert second.is_alive(), "it has not waited for what the first one computes"
    os.kill(first.pid, signal.SIGKILL)
    killed = time.monotonic()
    right, asked, hits, _ = answers.get(timeout=60)
    assert time.monotonic() - killed < 5
    assert right and sorted(asked) == list(range(40)) and hits == 0
    second.join(30)
    first.join(30)
    with Store(tmp_path / "store") as store:  # whoever comes next sweeps away what the dead one left
        store.leases.claim(KEYS[:1])
        store.leases.release(KEYS)
    assert rows_like(tmp_path / "store", "lease/%") == 0


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


# --- leases by themselves ------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    rows = Rows(tmp_path)
    yield rows
    rows.close()


def another(rows, host="elsewhere", pid=7, birth="1"):
    """Leases as a process of another host would hold them."""
    leases = Leases(rows)
    leases._process = (host, os.getpid(), birth)  # this process's id, or it would take itself for a forked child
    return leases


def test_what_another_holds_is_left_to_it_until_it_gives_it_up(rows):
    mine, other = Leases(rows), another(rows)
    assert other.claim(KEYS[:4]) == set(KEYS[:4])
    assert mine.claim(KEYS) == set(KEYS[4:]) and mine.turn == 1 and mine.met_at > 0
    assert not mine.any_free(KEYS[:4]) and other.claim(KEYS) == set(KEYS[:4])
    other.release(KEYS[1:])
    assert mine.any_free(KEYS[:4]) and mine.claim(KEYS) == set(KEYS[1:])
    mine.release(KEYS)
    other.release(KEYS)
    assert rows.count("lease/", "lease0") == 0


def test_nobody_gives_up_what_is_anothers_by_now(rows, monkeypatch):
    mine, other = Leases(rows), another(rows)
    monkeypatch.setattr(module, "LEASE_S", 0.2)
    monkeypatch.setattr(module, "_SKEW_S", 0.0)
    other.claim(KEYS)
    time.sleep(0.3)
    assert mine.claim(KEYS) == set(KEYS)
    other.release(KEYS)
    assert rows.count("lease/", "lease0") == len(KEYS)


def test_leases_of_the_dead_are_taken_at_once(tmp_path, rows):
    code = f"""
        import os
        from evalcache.digest import digest_bytes
        from evalcache.leases import Leases
        from evalcache.rows import Rows
        leases = Leases(Rows({str(tmp_path)!r}))
        print(len(leases.claim([digest_bytes(str(number).encode()) for number in range(8)])), flush=True)
        os.read(0, 1)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "8\n"
    mine = Leases(rows)
    assert mine.claim(KEYS) == set()
    process.kill()  # and nobody has asked after it yet: its process id still stands
    wait_for(lambda: mine.any_free(KEYS), 5)
    assert mine.claim(KEYS) == set(KEYS)
    process.communicate()


def test_a_process_id_that_was_given_out_again_is_not_the_dead_one(rows):
    other = another(rows, host=module._host(), birth="1")
    assert module._birth(os.getpid()) not in (None, "1")
    other.claim(KEYS)
    assert Leases(rows).claim(KEYS) == set(KEYS)


def test_expired_leases_are_anybodys(rows, monkeypatch):
    monkeypatch.setattr(module, "LEASE_S", 0.5)
    other, mine = another(rows), Leases(rows)
    other.claim(KEYS)
    assert mine.claim(KEYS) == set()
    time.sleep(0.6)
    assert mine.claim(KEYS) == set(KEYS)


def test_leases_live_as_long_as_their_holder_computes(rows, monkeypatch):
    monkeypatch.setattr(module, "LEASE_S", 1.0)
    monkeypatch.setattr(module, "RENEW_S", 0.2)
    other, mine = another(rows), Leases(rows)
    with other.computing():
        other.claim(KEYS)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert mine.claim(KEYS) == set()
            time.sleep(0.1)
    wait_for(lambda: mine.any_free(KEYS), 5)
    wait_for(lambda: not [one for one in threading.enumerate() if one.name == "evalcache-leases"], 5)


@pytest.mark.parametrize(("hours", "waits"), [(1 / 120, True), (-1 / 120, True), (24 * 365, False), (-24 * 365, False)], ids=str)
def test_clocks_of_other_hosts(rows, monkeypatch, hours, waits):
    """Half a minute apart is believed, and not for longer than a lease lasts by our own clock; a year is not believed."""
    monkeypatch.setattr(module, "LEASE_S", 0.5)
    other, mine = another(rows), Leases(rows)
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + hours * 3600)
        other.claim(KEYS)
    assert mine.claim(KEYS) == (set() if waits else set(KEYS))
    time.sleep(0.6)
    assert mine.claim(KEYS) == set(KEYS)


def test_damaged_rows_of_workers_and_leases_are_nobodys(tmp_path, rows):
    other, mine = another(rows), Leases(rows)
    other.claim(KEYS[:4])
    with database(tmp_path) as connection:
        connection.execute("UPDATE Cache SET value = x'00' WHERE key LIKE 'lease/%'")
    assert mine.claim(KEYS) == set(KEYS)
    with database(tmp_path) as connection:
        connection.execute("UPDATE Cache SET value = 'text' WHERE key LIKE 'worker/%'")
    assert Leases(rows).claim(KEYS) == set(KEYS)


def test_what_the_dead_left_is_swept_away(rows, monkeypatch):
    monkeypatch.setattr(module, "LEASE_S", 0.1)
    monkeypatch.setattr(module, "_FORGET_S", 0.2)
    monkeypatch.setattr(module, "_SKEW_S", 0.0)
    another(rows).claim(KEYS)
    time.sleep(0.4)
    Leases(rows).claim(KEYS[:1])
    assert rows.count("lease/", "lease0") == 1 and rows.count("worker/", "worker0") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_another_worker(rows):
    mine = Leases(rows)
    assert mine.claim(KEYS[:4]) == set(KEYS[:4])
    child = os.fork()
    if child == 0:
        right = mine.claim(KEYS) == set(KEYS[4:])
        mine.release(KEYS)
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert mine.others() is False
    assert rows.count("lease/", "lease0") == 4  # the child has given up its own only


@pytest.mark.parametrize("patience_s", [0.5, 600.0])
def test_one_that_lives_and_brings_nothing_is_waited_for_within_bounds(tmp_path, monkeypatch, patience_s):
    monkeypatch.setattr(serving, "_PATIENCE_S", (0.1, patience_s))
    monkeypatch.setattr(module, "LEASE_S", 1.5)
    cache, engine = Cache(tmp_path), Engine(0.01)
    keys = []
    with monkeypatch.context() as patch:  # the keys, as the cache makes them
        patch.setattr(cache.store.leases, "claim", lambda asked: keys.extend(asked) or set(asked))
        engine.serve(cache, [1, 2, 3])
    cache.close()
    cache, again = Cache(tmp_path / "other"), Engine(0.01)
    with Store(tmp_path / "other" / "store") as store:
        hung = another(store._rows)
        assert hung.claim(keys) == set(keys)
        began = time.monotonic()
        assert again.serve(cache, [1, 2, 3]) == [2, 3, 4]
        took_s = time.monotonic() - began
    assert again.asked == [1, 2, 3]
    # Here it ends with its lease, which nobody renews, if not before that with our patience.
    assert took_s > min(patience_s, 1.5) - 0.1 and (took_s < 1.3 or patience_s > 1)
    assert cache.counts.overhead["lookup"] > 0.3
    cache.close()


# --- a process that is alone ---------------------------------------------------------------------------------------------


def test_alone_only_the_first_portion_is_leased_and_briefly(tmp_path):
    cache = Cache(tmp_path)
    count_writes(tmp_path / "store")
    engine = Engine(0.001)
    engine.serve(cache, list(range(100)), 5)
    assert (noted(tmp_path / "store", "lease"), noted(tmp_path / "store", "worker")) == (5, 1)
    assert rows_like(tmp_path / "store", "lease/%") == 0
    for number in range(200, 220):
        engine.serve(cache, [number])
    assert (noted(tmp_path / "store", "lease"), noted(tmp_path / "store", "worker")) == (5, 1)
    # In order, and short portions put together.
    assert engine.asked == [*range(100), *range(200, 220)] and len(engine.portions) < 20 + 10
    cache.close()
    # A run that hits everywhere is nobody's worker.
    again = Cache(tmp_path)
    Engine().serve(again, list(range(100)), 5)
    assert noted(tmp_path / "store", "worker") == 1 and again.counts.hits == 100
    again.close()


@pytest.mark.parametrize("policy", ["refresh", "read_only", "off"])
def test_other_policies_lease_nothing(tmp_path, policy):
    cache = Cache(tmp_path, policy=policy)
    count_writes(tmp_path / "store")
    assert Engine().serve(cache, [1, 2, 3], 1) == [2, 3, 4]
    assert noted(tmp_path / "store", "%") == 0
    cache.close()


def test_ranks_of_one_launch_lease_nothing(tmp_path, monkeypatch):
    """They may have to take part in each other's forwards."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    cache = Cache(tmp_path)
    count_writes(tmp_path / "store")
    assert Engine().serve(cache, [1, 2, 3], 1) == [2, 3, 4]
    assert noted(tmp_path / "store", "%") == 0
    cache.close()


def test_a_store_that_takes_no_leases_costs_a_warning(tmp_path):
    cache = Cache(tmp_path)
    with database(tmp_path / "store") as connection:
        connection.execute(
            "CREATE TRIGGER refusing BEFORE INSERT ON Cache WHEN NEW.key LIKE 'worker/%'"
            " BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
    with pytest.warns(EvalCacheWarning, match="goes on without it") as told:
        assert Engine().serve(cache, list(range(20)), 5) == list(range(1, 21))
        assert Engine().serve(cache, list(range(20)), 5) == list(range(1, 21))
    assert len(told) == 1
    cache.close()


def test_what_fails_gives_up_its_leases(tmp_path):
    cache = Cache(tmp_path)

    class Failing(Engine):
        def serve(self, cache, numbers, size=None, **how):
            self.seconds = -1  # time.sleep refuses
            return super().serve(cache, numbers, size, **how)

    with pytest.raises(ValueError, match="sleep"):
        Failing().serve(cache, [1, 2, 3])
    assert rows_like(tmp_path / "store", "lease/%") == 0
    cache.close()


# --- the whole way -------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys, time
sys.path.insert(0, {tests!r})
import tiny, words
from transformers import LlamaForCausalLM
from evalcache.cache import Cache
from evalcache.integrations.scoring import loglikelihood

class Slow(LlamaForCausalLM):
    # A stand-in for a large model: each forward takes a while.
    def forward(self, *args, **kwargs):
        time.sleep(float(os.environ["SLOW_S"]))
        return super().forward(*args, **kwargs)

tokenizer = words.train_tokenizer()
model = tiny.build("llama")
model.__class__ = Slow
pairs = json.load(open(sys.argv[2]))
cache = Cache(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
scores = loglikelihood(model, tokenizer, pairs, cache=cache, batch_tokens=64)
cache.close()
counts = cache.counts
print(json.dumps([counts.hits, counts.misses, counts.duplicates, [score.logprob for score in scores]]), flush=True)
"""


def test_two_evals_over_shared_pairs_score_each_once(tmp_path):
    words = "model answer question key cache weights said asked kept changed".split()
    contexts = [f"the {a} {b} is {c}" for a in words for b in words for c in words]
    shared, alone = contexts[:280], (contexts[280:400], contexts[400:520])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    environment = os.environ | {"SLOW_S": "0.02", "PYTHONPATH": str(Path(__file__).parent.parent)}
    processes = []
    for number, own in enumerate(alone):
        (tmp_path / f"{number}.json").write_text(json.dumps([(context, " kept") for context in shared + own]))
        command = [sys.executable, str(script), str(tmp_path / "cache"), str(tmp_path / f"{number}.json")]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment))
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    (hits0, misses0, *_, scores0), (hits1, misses1, *_, scores1) = found
    assert hits0 + misses0 == hits1 + misses1 == 400
    assert misses0 + misses1 <= 1.05 * 520 and min(misses0, misses1) > 120
    assert scores0[:280] == pytest.approx(scores1[:280], abs=1e-5)  # the odd one is computed by both, in other batches
