"""Bits that are flipped and files that are cut short, in everything that a cache folder holds, and what becomes of the answers.

A damage is done to a copy of a prepared folder and looked at in a process of its own, which may hang or be killed by a signal:
that, too, is told. What may come of it: `OUTCOMES`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from killed import fork_server
from numbered import SIZE, entry_of, key_of_number, numbers_of, put_batch
from recorded import open_pair

from evalcache.errors import EvalCacheError
from evalcache.intake import Intake
from evalcache.journal import Event
from evalcache.ledger import Ledger
from evalcache.mending import mend_folder, verify_folder
from evalcache.records import Entry
from evalcache.schema import columns
from evalcache.sidetable import SideTable
from evalcache.store import Store

KNOWN, WAITING = range(6), range(6, 8)
"""Batches of which the ledger knows, and that wait in the journal."""
NEW = 8
TARGETS = {
    "store": ("store/cache.db",),
    "store and its log": ("store/cache.db", "store/cache.db-wal", "store/cache.db-shm"),
    "ledger": ("ledger.duckdb",),
    "ledger and its log": ("ledger.duckdb", "ledger.duckdb.wal"),
    "side table": ("files.sqlite",),
}
MENDED = tuple(target for target in TARGETS if target != "side table")
"""What `verify --fix` mends."""
OUTCOMES = {
    "right": "served right",
    "corrupt": "a miss with a reason",
    "verify": "found by verify",
    "error": "a clear error",
    "mended": "mended, and all of it served",
    "gone": "gone with the end of a log, as after a power cut: computed again",
    "wrong": "WRONG",
    "unnoticed": "LOST UNNOTICED",
    "unmended": "NOT MENDED",
    "raised": "ANOTHER ERROR",
    "crashed": "CRASHED",
    "hung": "HUNG",
}
GOOD = ("right", "corrupt", "verify", "error", "gone", "mended")
_PATIENCE_S = 30.0
_VIEWS = ("answers", "hits_by_run", "models_in_order")


@dataclass(frozen=True)
class Damage:
    """One bit of a file that is flipped, or (``bit`` None) a file that ends at a place."""

    file: str
    place: int
    bit: int | None = None

    def do(self, content: bytes) -> bytes:
        """The content, damaged."""
        if self.bit is None:
            return content[: self.place]
        damaged = bytearray(content)
        damaged[self.place] ^= 1 << self.bit
        return bytes(damaged)


def draw_damages(folder: Path, target: str, count: int, seed: int) -> list[Damage]:
    """Damages of a target's files, spread evenly over them by their lengths; every eighth one cuts a file short.

    Half of the flips hit bytes that are not zero: most of a database file is empty.
    """
    draw = random.Random(f"{target} {seed}")
    contents = {name: (folder / name).read_bytes() for name in TARGETS[target]}
    filled = {name: [place for place, byte in enumerate(content) if byte] for name, content in contents.items()}
    names = list(contents)
    drawn = []
    for number in range(count):
        name = names[number % len(names)]
        if number % 8 == 0:
            drawn.append(Damage(name, draw.randrange(len(contents[name]))))
        else:
            place = draw.choice(filled[name]) if number % 2 else draw.randrange(len(contents[name]))
            drawn.append(Damage(name, place, draw.randrange(8)))
    return drawn


def prepare(folder: Path, target: str) -> Path:
    """A folder to be damaged: its files are closed, or, with logs, as they are while somebody writes."""
    store, ledger = open_pair(folder / "open")
    for batch in KNOWN:
        put_batch(store, batch)
    ledger.sync(store)
    if target == "store and its log":
        store._rows.query("PRAGMA wal_checkpoint(TRUNCATE)")
    for batch in WAITING:
        put_batch(store, batch)
    if not target.startswith("store and"):
        store.close()
    if target == "ledger and its log":
        with ledger.opened(ledger.path) as connection:  # a sync that does not come further than its COMMIT
            connection.execute("BEGIN TRANSACTION")
            intake = Intake(connection, store)
            for number, event in store.waiting.read():
                intake.take(store.waiting.id(), number, event)
            intake.finish()
            connection.execute(f"INSERT INTO synced VALUES ('{store.waiting.id()}', {number}, now()::TIMESTAMP)")
            connection.execute("COMMIT")
            shutil.copytree(folder / "open", folder / "closed")
    else:
        if target == "side table":
            for key, value in _ASIDE.items():
                SideTable(folder / "open" / "files.sqlite").put(key, value)
        shutil.copytree(folder / "open", folder / "closed")
    store.close()
    return folder / "closed"


_ASIDE = {place.to_bytes(16, "big"): bytes(range(place)) for place in range(60)}
"""What a prepared side table holds."""


# --- what is left ----------------------------------------------------------------------------------------------------------


@dataclass
class _Expected:
    """What an undamaged folder tells."""

    entries: dict[Any, Entry]
    events: dict[int, Event]
    tables: list[dict[str, list[str]]] = field(default_factory=list)


def _tables(ledger: Ledger) -> dict[str, list[str]]:
    """Every row of every table and of some views."""
    with ledger.reading() as ask:
        return {name: sorted(map(repr, ask(f"SELECT * FROM {name}").rows)) for name in (*columns(), *_VIEWS)}


def _expect(folder: Path, target: str) -> _Expected:
    numbers = numbers_of([*KNOWN, *WAITING])
    expected = _Expected({key_of_number(number): entry_of(number) for number in numbers}, {})
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "copy"))
        store, ledger = open_pair(copy)
        expected.events = dict(store.waiting.read(limit=1000))
        if target.startswith("ledger"):
            expected.tables.append(_tables(ledger))
        if target == "ledger and its log":  # what a log says may be gone, as long as it is gone as a whole
            Path(f"{ledger.path}.wal").unlink()
            expected.tables.append(_tables(ledger))
        store.close()
    return expected


def _look_at_store(folder: Path, expected: _Expected) -> str:
    """Read, check, compute again what is missing, and read once more."""
    with Store(folder / "store") as store:
        found = store.get_many(list(expected.entries))
        good = {key for key, entry in found.items() if isinstance(entry, Entry)}
        if any(found[key] != expected.entries[key] for key in good):
            return "wrong"
        kept = {key for key, _ in store.frames()}
        missing = {_batch_of(key) for key in expected.entries.keys() - good}
        noticed = len(found) > len(good)
        told = bool(store.check())
        if missing and not (noticed or told):
            told = not verify_folder(folder).good
        for number, event in store.waiting.read(limit=1000):
            if expected.events.get(number) != event:
                return "wrong"
        for batch in (*missing, NEW):
            put_batch(store, batch)
        again = store.get_many([*expected.entries, key_of_number(NEW * SIZE)])
        for key, entry in again.items():
            if isinstance(entry, Entry) and entry != expected.entries.get(key, entry_of(NEW * SIZE)):
                return "wrong"
        # Where the index leads astray, what was stored anew is missed again, and `verify` says why.
        whole = all(isinstance(again.get(key), Entry) for key in expected.entries)
        if noticed or told:
            return "corrupt" if noticed else "verify"
        if not missing:
            return "right" if whole else "unnoticed"
        gone = sum(key not in kept for key in expected.entries)
        return "gone" if whole and gone == len(missing) * SIZE else "unnoticed"


def _batch_of(key: Any) -> int:
    return next(number // SIZE for number in numbers_of([*KNOWN, *WAITING]) if key_of_number(number) == key)


def _mend(folder: Path, expected: _Expected) -> str:
    """Have it mended, and see that it is: what was readable is served, what the ledger knew is back, and nothing is wrong."""
    good = {key_of_number(number) for number in numbers_of(KNOWN)}
    with contextlib.suppress(EvalCacheError), Store(folder / "store") as store:
        found = store.get_many(list(expected.entries))
        good |= {key for key, entry in found.items() if isinstance(entry, Entry)}
    mend_folder(folder)
    if not verify_folder(folder).good:
        return "unmended"
    with Store(folder / "store") as store:
        found = store.get_many(list(expected.entries))
    if any(entry != expected.entries[key] for key, entry in found.items()):
        return "wrong"
    return "mended" if good <= found.keys() else "unnoticed"


def _look_at_ledger(folder: Path, expected: _Expected) -> str:
    """Ask everything, bring it up to date, and ask again."""
    store, ledger = open_pair(folder)
    with store:
        if _tables(ledger) not in expected.tables:
            return "wrong"
        ledger.sync(store)
        known = sorted(key for (key,) in ledger.query("SELECT key FROM outputs").rows)
        return "right" if known == sorted(key.hex for key in expected.entries) else "wrong"


def _look_at_side_table(folder: Path, expected: _Expected) -> str:
    """It may forget, and has to take in what it has forgotten."""
    table = SideTable(folder / "files.sqlite")
    found = {key: table.get(key) for key in _ASIDE}
    lost = {key: value for key, value in _ASIDE.items() if found[key] is None}
    for key, value in lost.items():
        table.put(key, value)
    again = {key: table.get(key) for key in _ASIDE}
    for told in (found, again):
        if any(value not in (None, _ASIDE[key]) for key, value in told.items()):
            return "wrong"
    return "corrupt" if lost else "right"


_LOOKS = {"store": _look_at_store, "ledger": _look_at_ledger, "side table": _look_at_side_table}


def _examine(
    target: str, prepared: Path, scratch: Path, damages: Sequence[Damage], mending: bool, connection: Connection
) -> None:
    """In a process of its own: tells of each damage what came of it."""
    warnings.simplefilter("ignore")  # a warning is what a damage is meant to cost
    expected = _expect(prepared, target)
    contents = {path.relative_to(prepared): path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    look = _mend if mending else _LOOKS[target.removesuffix(" and its log")]
    connection.send("ready")
    for damage in damages:
        shutil.rmtree(scratch, ignore_errors=True)
        for name, content in contents.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(damage.do(content) if str(name) == damage.file else content)
        try:
            connection.send((look(scratch, expected), ""))
        except EvalCacheError as error:
            connection.send(("error", str(error)))
        except BaseException as error:
            connection.send(("raised", f"{type(error).__name__}: {error}"))


# --- campaigns -------------------------------------------------------------------------------------------------------------


@dataclass
class Flips:
    """Damages of one target, and what came of them."""

    target: str
    folder: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[Damage, str, str]] = field(default_factory=list)
    said: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.prepared = prepare(self.folder, self.target)
        # In memory where there is such a folder: nothing of this is about disks.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else self.folder
        self._memory = tempfile.TemporaryDirectory(dir=memory)
        self._scratch = Path(self._memory.name) / "damaged"

    def run(self, count: int, seed: int = 0, *, mending: bool = False) -> list[tuple[Damage, str, str]]:
        """So many damages; returns those of which something came that may not.

        Args:
            mending: have each of them mended by ``verify --fix``.
        """
        damages = draw_damages(self.prepared, self.target, count, seed)
        for damage, (outcome, said) in zip(damages, self._outcomes(damages, mending), strict=True):
            self.outcomes[outcome] += 1
            self.said[said[:60]] += 1
            if outcome not in GOOD:
                self.bad.append((damage, outcome, said))
        return self.bad

    def _outcomes(self, damages: Sequence[Damage], mending: bool) -> Iterator[tuple[str, str]]:
        done = 0
        while done < len(damages):
            context = fork_server()
            ours, theirs = context.Pipe(duplex=False)
            work = (self.target, self.prepared, self._scratch, damages[done:], mending, theirs)
            process = context.Process(target=_examine, args=work)
            process.start()
            theirs.close()
            with ours:
                try:
                    if not ours.poll(_PATIENCE_S) or ours.recv() != "ready":
                        raise AssertionError(f"nobody looks at {self.target}")
                    while done < len(damages) and ours.poll(_PATIENCE_S):
                        outcome = ours.recv()
                        done += 1
                        yield outcome
                    if done < len(damages):
                        done += 1
                        yield "hung", f"for {_PATIENCE_S} s"
                except EOFError:
                    process.join()
                    done += 1
                    yield "crashed", f"exit code {process.exitcode}"
            process.kill()
            process.join()
