"""The store beside its peers: sqlitedict as lm-evaluation-harness uses it, diskcache one by one, lmdb.

All hold the same results (300 prompt tokens, 64 new ones, their text, a cost) and return them decoded:

* **sqlitedict**: pickled, ``autocommit=True``, SHA-256 in hex for keys; a lookup is ``key in db`` and ``db[key]``, a write
  ``db[key] = result`` with one ``commit()`` at the end, as in lm_eval 0.4.13 ``CachingLM``;
* **diskcache**: pickled, one ``get`` or ``set`` a key, its own default settings but no size limit;
* **lmdb**: our frames, one transaction, the same `encode_frame` and `decode_entry`; durable writes.

Keys are asked for in a shuffled order, the same for all.
"""

from __future__ import annotations

import hashlib
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diskcache
import lmdb
import numpy as np
from harness import Report, arguments, hardware, hardware_line, ratio, side_by_side
from sqlitedict import SqliteDict

from evalcache.digest import Digest, digest_bytes
from evalcache.frame import decode_entry, encode_frame
from evalcache.key import key_of
from evalcache.records import Action, Cost, Environment, Fields, Request, Result, pack_tokens
from evalcache.store import Store

Item = tuple[Digest, Action, Result]
RUN, CREATED_AT = "0" * 32, 1.7e9


def make_items(count: int, seed: int = 0) -> list[Item]:
    """Seeded requests of 300 token ids with results of 64 new ones and about as many bytes of text as those would be."""
    rng, draw = random.Random(seed), np.random.default_rng(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(3000)]
    model = digest_bytes(b"exp_store")
    settings = Fields({"do_sample": False, "max_new_tokens": 64, "eos_token_id": [2]})
    environment = Environment(Fields({"dtype": "bfloat16", "attention": "sdpa"}), {"device": "cpu", "batch_size": 16})
    items = []
    for _ in range(count):
        action = Action(model, Request("generate", pack_tokens(draw.integers(0, 50_000, 300)), settings), environment)
        new = pack_tokens(draw.integers(0, 50_000, 64))
        result = Result(new, " ".join(rng.choices(words, k=48)), b"", "stop", {}, {}, Cost(rng.random(), 300, 64, "cpu", 16))
        items.append((key_of(action), action, result))
    return items


def text_key(key: Digest) -> str:
    """A key of the length that lm_eval's ``hash_args`` makes."""
    return hashlib.sha256(key.value).hexdigest()


class Peers:
    """The four stores in one folder, each with the same reads and writes."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "evalcache")
        self.sqlitedict = SqliteDict(str(folder / "sqlitedict.db"), autocommit=True)
        self.diskcache = diskcache.Cache(str(folder / "diskcache"), size_limit=1 << 40)
        self.lmdb = lmdb.open(str(folder / "lmdb"), map_size=8 << 30)

    def close(self) -> None:
        self.store.close()
        self.sqlitedict.close()
        self.diskcache.close()
        self.lmdb.close()

    def readers(self, keys: Sequence[Digest]) -> dict[str, Callable[[], list[Result]]]:
        texts = [text_key(key) for key in keys]

        def ours() -> list[Result]:
            found = self.store.get_many(keys)
            return [found[key].result for key in keys]

        def from_sqlitedict() -> list[Result]:
            return [self.sqlitedict[text] for text in texts if text in self.sqlitedict]

        def from_diskcache() -> list[Result]:
            return [self.diskcache.get(key.value) for key in keys]

        def from_lmdb() -> list[Result]:
            with self.lmdb.begin() as transaction:
                return [decode_entry(key, transaction.get(key.value)).result for key in keys]

        return {"evalcache": ours, "sqlitedict": from_sqlitedict, "diskcache": from_diskcache, "lmdb": from_lmdb}

    def writers(self, items: Sequence[Item]) -> dict[str, Callable[[], Any]]:
        def ours() -> None:
            self.store.commit(items, run=RUN, created_at=CREATED_AT)

        def to_sqlitedict() -> None:
            for key, _, result in items:
                self.sqlitedict[text_key(key)] = result
            self.sqlitedict.commit()

        def to_diskcache() -> None:
            for key, _, result in items:
                self.diskcache.set(key.value, result)

        def to_lmdb() -> None:
            with self.lmdb.begin(write=True) as transaction:
                for key, action, result in items:
                    transaction.put(key.value, encode_frame(key, action, result, RUN, CREATED_AT))

        return {"evalcache": ours, "sqlitedict": to_sqlitedict, "diskcache": to_diskcache, "lmdb": to_lmdb}


def main() -> None:
    chosen = arguments("exp_store", __doc__ or "").parse_args()
    most = 10_000 if chosen.quick else 100_000
    report = Report("exp_store", chosen.quick, hardware(["diskcache", "lmdb", "sqlitedict", "zstandard", "cbor2"]))
    print(hardware_line(report.hardware))
    print(f"{most} results of 300-token requests; times in µs a key, ratios over evalcache in the same repeat")
    items = make_items(most)
    shuffled = [key for key, _, _ in items]
    random.Random(1).shuffle(shuffled)
    with tempfile.TemporaryDirectory(prefix="exp_store") as folder:
        peers = Peers(Path(folder))
        note(report, f"put {most}", side_by_side(peers.writers(items), 1), most)
        for size, repeats in ((8, 200), (1000, 15), (most, 3)):
            keys = shuffled[:size]
            readers = peers.readers(keys)
            if size == 1000:
                answers = {name: read() for name, read in readers.items()}
                if any(answer != answers["evalcache"] for answer in answers.values()):
                    raise SystemExit("the peers do not return the same results")
            seconds = side_by_side(readers, repeats)
            note(report, f"get {size}", seconds, size)
            if size != 1000:
                report.target(f"get {size}: lmdb is at most 3 times faster", 1 / ratio(seconds, "lmdb", "evalcache"), "<=", 3)
            if size == most:
                report.target(f"get {size}: times faster than sqlitedict", ratio(seconds, "sqlitedict", "evalcache"), ">=", 20)
        for size, repeats in ((8, 30), (1000, 3)):
            fresh = make_items(size, seed=size)
            note(report, f"put {size} more", side_by_side(peers.writers(fresh), repeats), size)
        actions = [action for _, action, _ in items]
        seconds = side_by_side({"whole": lambda: peers.store.get_many([key_of(action) for action in actions])}, 5)
        whole_us = statistics.median(seconds["whole"]) / most * 1e6
        report.add("key + lookup + decode, bulk: µs a request", whole_us)
        report.target("key + lookup + decode, µs a request", whole_us, "<=", 20)
        report.add("store, bytes an entry on disk", peers.store.stats().size_bytes / most)
        peers.close()
    report.write(chosen.json)


def note(report: Report, name: str, seconds: dict[str, list[float]], size: int) -> None:
    """Print and keep the median time of each peer, and its ratio to ours."""
    for peer, taken in seconds.items():
        report.add(f"{name}: {peer}, µs a key", statistics.median(taken) / size * 1e6)
    for peer in seconds:
        if peer != "evalcache":
            report.add(f"{name}: {peer} / evalcache", ratio(seconds, peer, "evalcache"))


if __name__ == "__main__":
    main()
