"""Many processes on one folder for a while: writers, readers and syncers at once, of whom now and then one is killed.

Each of them writes batches of its own, acknowledges them to all, looks up what others have acknowledged, and brings the ledger
up to date. What each saw comes back; that nothing is lost or there twice is for the caller to see, in the folder.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from killed import fork_server
from numbered import SIZE, Fault, entry_of, faults_of_ledger, faults_of_store, key_of_number, litter_in, put_batch
from recorded import open_pair

from evalcache.errors import LedgerLockedError
from evalcache.ledger import Ledger

_SYNC_S = (0.3, 1.5)  # between two syncs of one process, and two rests more
_PATIENCE_S = 60.0
_SPANS = "spans-"


@dataclass
class Seen:
    """What one process saw.

    Args:
        gets, puts, waits: seconds of each get (of `SIZE` keys), put (of a batch) and sync. locked: syncs that were not let in.
        missed: numbers that were not found, or answered wrongly. failed: with what it ended before its time.
    """

    gets: list[float] = field(default_factory=list)
    puts: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    syncs: int = 0
    locked: int = 0
    missed: list[str] = field(default_factory=list)
    failed: str = ""


class _Watched(Ledger):
    """Notes in a file since when and until when this process has the ledger open for writing; a kill ends the last line."""

    def __init__(self, path: Path, spans: Path) -> None:
        super().__init__(path)
        self._spans = os.open(spans, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    @contextlib.contextmanager
    def opened(self, path: Path, *, read_only: bool = False) -> Iterator[Any]:
        with super().opened(path, read_only=read_only) as connection:
            if not read_only:
                os.write(self._spans, b"%.6f " % time.monotonic())
            try:
                yield connection
            finally:
                if not read_only:
                    os.write(self._spans, b"%.6f\n" % time.monotonic())


def _work(folder: Path, place: int, acknowledged: Any, until: float, pause_s: float, connection: Connection) -> None:
    """In a process of its own."""
    seen = Seen()
    try:
        _work_until(until, folder, place, acknowledged, pause_s, seen)
    except BaseException as error:
        seen.failed = f"{type(error).__name__}: {error}"
    connection.send(seen)


def _work_until(until: float, folder: Path, place: int, acknowledged: Any, pause_s: float, seen: Seen) -> None:
    """Its batches are ``place``, ``place`` + the number of places, …"""
    draw, places = random.Random(place), len(acknowledged)
    store, _ = open_pair(folder)
    ledger = _Watched(folder / "ledger.duckdb", folder / f"{_SPANS}{place}")
    next_sync = time.monotonic() + draw.uniform(*_SYNC_S) + 2 * pause_s
    while time.monotonic() < until:
        began = time.perf_counter()
        put_batch(store, (acknowledged[place] + 1) * places + place)
        seen.puts.append(time.perf_counter() - began)
        acknowledged[place] += 1
        for _ in range(3):
            others = [other for other in range(places) if acknowledged[other] >= 0]
            batches = [draw.randint(0, acknowledged[other]) * places + other for other in draw.choices(others, k=SIZE)]
            numbers = [batch * SIZE + draw.randrange(SIZE) for batch in batches]
            keys = [key_of_number(number) for number in numbers]
            began = time.perf_counter()
            found = store.get_many(keys)
            seen.gets.append(time.perf_counter() - began)
            seen.missed += [str(number) for number, key in zip(numbers, keys, strict=True) if found.get(key) != entry_of(number)]
        if time.monotonic() > next_sync:
            began = time.perf_counter()
            try:
                ledger.sync(store)
                seen.syncs += 1
            except LedgerLockedError:
                seen.locked += 1
            seen.waits.append(time.perf_counter() - began)
            next_sync = time.monotonic() + draw.uniform(*_SYNC_S) + 2 * pause_s
        time.sleep(draw.uniform(0, 2 * pause_s))


@dataclass
class Crowd:
    """What came of it.

    Args:
        seen: by those that were not killed. stalled_s: the longest that the machine itself kept this process waiting.
    """

    seen: list[Seen]
    kills: int
    batches: int
    stalled_s: float
    faults: list[Fault]

    def all(self, what: str) -> list[float]:
        """One kind of seconds, of all processes."""
        return sorted(value for seen in self.seen for value in getattr(seen, what))


def run_crowd(folder: Path, workers: int, seconds: float, *, pause_s: float = 0.0, kills: int = 0) -> Crowd:
    """Let ``workers`` processes work on a folder, and look at everything that is left.

    Args:
        pause_s: of each process between two rounds, on average. kills: how many of them are killed meanwhile, and replaced.
    """
    context = fork_server()
    acknowledged = context.Array("q", [-1] * (workers + kills), lock=False)
    until = time.monotonic() + seconds
    running: list[tuple[Any, Connection]] = []
    killed_at: dict[int, float] = {}

    def start(place: int) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(folder, place, acknowledged, until, pause_s, theirs), name=str(place))
        process.start()
        theirs.close()
        running.append((process, ours))

    for place in range(workers):
        start(place)
    draw, stalled_s = random.Random(workers), 0.0
    kill_times = sorted(time.monotonic() + seconds * (number + draw.random()) / (kills + 1) for number in range(kills))
    while time.monotonic() < until:
        slept = time.monotonic()
        time.sleep(0.02)
        stalled_s = max(stalled_s, time.monotonic() - slept - 0.02)
        if kill_times and time.monotonic() > kill_times[0]:
            kill_times.pop(0)
            process, _ = running.pop(draw.randrange(len(running)))
            os.kill(process.pid, signal.SIGKILL)
            process.join(_PATIENCE_S)
            killed_at[int(process.name)] = time.monotonic()
            start(workers + len(killed_at) - 1)
    seen = []
    for process, ours in running:
        if not ours.poll(_PATIENCE_S):
            raise AssertionError(f"process {process.name} does not come to an end")
        seen.append(ours.recv())
        process.join(_PATIENCE_S)
    places = len(acknowledged)
    sure = [number * places + place for place in range(places) for number in range(acknowledged[place] + 1)]
    store, ledger = open_pair(folder)
    faults, batches = faults_of_store(store, sure)
    ledger.sync(store)
    faults += faults_of_ledger(store, ledger, batches)
    faults += [Fault("lost", f"number {number} was missed") for one in seen for number in one.missed]
    faults += [Fault("lost", one.failed) for one in seen if one.failed]
    faults += _overlaps(folder, killed_at)
    faults += litter_in(folder)
    return Crowd(seen, len(killed_at), len(batches), stalled_s, faults)


def _overlaps(folder: Path, killed_at: dict[int, float]) -> list[Fault]:
    """Times at which two processes had the ledger open for writing; takes the notes away."""
    spans: list[tuple[float, float, int]] = []
    for file in folder.glob(f"{_SPANS}*"):
        place = int(file.name.removeprefix(_SPANS))
        for line in file.read_text().splitlines():
            since, _, until = line.partition(" ")
            spans.append((float(since), float(until or killed_at[place]), place))
        file.unlink()
    spans.sort()
    pairs = itertools.pairwise(spans)
    faults = [Fault("twice", f"{one} and {other} were at the ledger at once") for one, other in pairs if other[0] < one[1]]
    return faults if spans else [Fault("lost", "nobody was at the ledger")]
