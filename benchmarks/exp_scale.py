"""One cache as it grows: 100,000, 1,000,000 and 10,000,000 entries, each asked for once and told to the ledger.

An entry is a log-likelihood of 24 tokens, as most of an eval's are; 100,000 of them are one model's. At each size:

* **get**: 8 and 10,000 keys of one model, as a call asks for them, and of all models, each once, from a store that is opened
  afresh; *warm*: another connection has just read them, so that they lie in the system's cache; *cold*: the system was asked to
  forget the file (``POSIX_FADV_DONTNEED``);
* **put**: 100 and 10,000 new entries in one commit, into a file that lies in the system's cache; **sync**: these and their
  lookups on their way into the ledger;
* **open**: a `Cache`, up to its first answer; **stats**: ``evalcache stats`` as a process of its own;
* bytes of store and ledger for each entry; the most memory that a process took that did all of this.

Costs a key are compared with those at the first size. Machines drift while a store is filled for half an hour: so the store of
the first size is kept, and is measured again beside each larger one, in turns.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness import Report, arguments, hardware, hardware_line

from evalcache.cache import Cache
from evalcache.digest import Digest, digest_bytes
from evalcache.journal import LookedUp, RunStarted
from evalcache.key import keys_of
from evalcache.ledger import Ledger
from evalcache.records import Action, Cost, Entry, Environment, Fields, Request, Result, pack_tokens
from evalcache.store import Store

Item = tuple[Digest, Action, Result]
MODEL_ENTRIES = 100_000
SETTINGS = Fields({"context": "tokens"})
ENVIRONMENT = Environment(Fields({"dtype": "float32"}), {"device_name": "cpu"})
PART = 10_000
TURNS = 5


def model_of(number: int) -> Digest:
    """The model whose entry it is."""
    return digest_bytes(f"exp_scale {number // MODEL_ENTRIES}".encode())


def make_items(first: int, count: int) -> list[Item]:
    """Entries ``first`` to ``first + count``: what is asked and answered follows from the number."""
    actions, results = [], []
    for number in range(first, first + count):
        tokens = pack_tokens([number >> 16, number & 0xFFFF, *range(22)])
        actions.append(Action(model_of(number), Request("loglikelihood", tokens, SETTINGS, {"continuation": 2}), ENVIRONMENT))
        scalars = {"sum": -number / 1000, "is_greedy": number % 3 == 0}
        results.append(Result(scalars=scalars, cost=Cost(0.01, 24, 0, "cpu", 32)))
    return list(zip(keys_of(actions), actions, results, strict=True))


class Filled:
    """A cache folder that grows. ``count``: entries in it, numbered from zero."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self._run = os.urandom(16).hex()
        with Store(folder / "store") as store:
            store.commit((), (RunStarted(self._run, time.time(), "exp_scale"),), run=self._run, created_at=time.time())

    def put(self, count: int = PART) -> float:
        """Commit new entries with their lookups; the seconds of the commit."""
        items = make_items(self.count, count)
        keys = tuple(key.value for key, *_ in items)
        told = LookedUp(
            self._run, time.time(), model_of(self.count).value, "", "", keys, ("miss",) * count, ("absent",) * count,
            (0.01,) * count, devices=("cpu",) * count,
        )  # fmt: skip
        with Store(self.folder / "store") as store:
            began = time.perf_counter()
            store.commit(items, (told,), run=self._run, created_at=time.time())
            seconds = time.perf_counter() - began
        self.count += count
        return seconds

    def sync(self) -> float:
        """Bring the ledger up to date; the seconds."""
        with Store(self.folder / "store") as store:
            return Ledger(self.folder / "ledger.duckdb").sync(store).seconds

    def grow(self, count: int, *, sync: bool) -> None:
        """Fill up to ``count`` entries."""
        while self.count < count:
            self.put(min(10 * PART, count - self.count))
            if sync:
                self.sync()
            print(f"\r{self.count:,} of {count:,}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    def get(self, keys: Sequence[Digest], *, cold: bool = False) -> float:
        """Read entries on a connection of its own; the seconds."""
        if cold:
            forget(self.folder / "store" / "cache.db")
        else:
            with Store(self.folder / "store") as store:
                store.get_many(keys)
        with Store(self.folder / "store") as store:
            store.get_many([make_items(0, 1)[0][0]])  # which reads the schema
            began = time.perf_counter()
            found = store.get_many(keys)
            seconds = time.perf_counter() - began
        if len(found) != len(keys) or not all(isinstance(entry, Entry) for entry in found.values()):
            raise SystemExit("entries are missing")
        return seconds

    def warm(self) -> None:
        """Have the system read the whole store."""
        with (self.folder / "store" / "cache.db").open("rb") as file:
            while file.read(16 << 20):
                pass

    def open(self, key: Digest) -> float:
        """Open a cache and read one entry; the seconds."""
        began = time.perf_counter()
        cache = Cache(self.folder)
        cache.store.get_many([key])
        seconds = time.perf_counter() - began
        cache.close()
        return seconds

    def stats(self) -> float:
        """``evalcache stats`` in a process of its own; the seconds."""
        began = time.perf_counter()
        command = [sys.executable, "-m", "evalcache", "stats", "--dir", str(self.folder), "--json"]
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return time.perf_counter() - began

    def draw(self, count: int, *, scattered: bool) -> list[Digest]:
        """Keys of entries that were drawn from all, or from those of one model."""
        drawn = random.Random(count)
        first = 0 if scattered else drawn.randrange(self.count // MODEL_ENTRIES) * MODEL_ENTRIES
        numbers = drawn.sample(range(first, self.count if scattered else first + MODEL_ENTRIES), count)
        return [key for number in numbers for key, *_ in make_items(number, 1)]


def forget(path: Path) -> None:
    """Have the system drop a file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_turns(caches: Sequence[Filled], ask: Callable[[Filled], float], turns: int = TURNS) -> list[float]:
    """The median seconds of each cache, asked in turns."""
    seconds = [[ask(cache) for cache in caches] for _ in range(turns)]
    return [statistics.median(one) for one in zip(*seconds, strict=True)]


def sizes(chosen: bool) -> Iterator[int]:
    yield from (100_000, 200_000) if chosen else (100_000, 1_000_000, 10_000_000)


def measure(report: Report, small: Filled, large: Filled, *, ledger: bool) -> None:
    """All figures of one size, beside the first one's; without a ``ledger``, those of the store alone."""
    size = large.count
    for scattered in (False, True):
        for count, turns in ((8, 40), (10_000, TURNS)):
            drawn = {cache: cache.draw(count, scattered=scattered) for cache in (small, large)}
            what = f"{size} get {count}{' of all models' if scattered else ''}"
            for kind in ("warm", "cold"):
                asked = in_turns([small, large], lambda one, d=drawn, k=kind: one.get(d[one], cold=k == "cold"), turns)
                first_us, here_us = (seconds / count * 1e6 for seconds in asked)
                report.add(f"{what} {kind} us a key", here_us)
                if kind == "warm" and not scattered:
                    report.target(f"{what} warm, times that of the first size", here_us / first_us, "<=", 1.5)
                elif kind == "warm":
                    report.add(f"{what} warm, times that of the first size", here_us / first_us)
    for one in (small, large):
        one.warm()  # after the cold reads
    for count, turns in ((100, 7), (PART, 3)):
        parts = [[(one.put(count), one.sync() if ledger else 0.0) for one in (small, large)] for _ in range(turns)]
        for place, kind in enumerate(("put", "sync") if ledger else ("put",)):
            first_us, here_us = (statistics.median(turn[one][place] for turn in parts) / count * 1e6 for one in (0, 1))
            report.add(f"{size} {kind} {count} us an entry", here_us)
            report.target(f"{size} {kind} {count}, times that of the first size", here_us / first_us, "<=", 1.5)
    key = large.draw(8, scattered=True)[0]
    large.open(key)  # imports
    report.target(f"{size} open s", statistics.median(large.open(key) for _ in range(9)), "<=", 0.05)
    if ledger:
        report.target(f"{size} stats s", statistics.median(large.stats() for _ in range(3)), "<=", 1.0)
        report.add(f"{size} ledger bytes an entry", (large.folder / "ledger.duckdb").stat().st_size / large.count)
    report.add(f"{size} store bytes an entry", (large.folder / "store" / "cache.db").stat().st_size / large.count)
    report.add(f"{size} memory MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Fill, and measure at each size."""
    parser = arguments("exp_scale", (__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=10_000_000, help="the largest size")
    parser.add_argument("--store-only", action="store_true", help="no ledger: ten million take a quarter of an hour, not one")
    parser.add_argument("--dir", type=Path, help="where the caches are made; 10 GB")
    given = parser.parse_args()
    report = Report("exp_scale", given.quick, hardware(["duckdb", "diskcache"]))
    print(hardware_line(report.hardware))
    os.environ["EVALCACHE_QUIET"] = "1"
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        small, large = Filled(Path(folder) / "small"), Filled(Path(folder) / "large")
        first, *others = [size for size in sizes(given.quick) if size <= given.most]
        others = others[-1:] if given.store_only else others
        small.grow(first, sync=not given.store_only)
        for size in others:
            began = time.perf_counter()
            large.grow(size, sync=not given.store_only)
            report.add(f"{size} filled s", time.perf_counter() - began)
            measure(report, small, large, ledger=not given.store_only)
        shutil.rmtree(folder, ignore_errors=True)
    report.write(given.json)


if __name__ == "__main__":
    main()
