"""Processes that are killed in the middle of what they do, and what is left of it.

A round: a folder that is a copy of a prepared one; a process of its own that does one thing there (a *phase*) and acknowledges
each part that is done; SIGKILL at a moment of its duration or at a line of its code; and a look at all that is left, by content.

Processes come from a server that has everything imported and nothing open, and forks: a round costs some tenths of a second.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import unittest.mock
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from numbered import Fault, faults_of_ledger, faults_of_store, litter_in, numbers_of, put_batch, result_of
from recorded import open_pair

from evalcache import ledger as ledgers
from evalcache import schema
from evalcache.errors import EvalCacheError
from evalcache.exchange import export_entries, import_entries
from evalcache.ledger import Ledger
from evalcache.store import Store
from evalcache.verification import verify_cache

SYNCED, WAITING, NEW = range(4), range(4, 10), range(10, 22)
"""Batches of a prepared folder: those that its ledger knows, those that wait in the journal, and those that a phase adds."""
_LATE = 1.1  # kills are spread over so much of a phase's duration: some come after its end
_PATIENCE_S = 60.0

_PACKAGE = str(Path(ledgers.__file__).parent)

Tell = Callable[[Any], None]


@functools.cache
def fork_server() -> Any:
    """Where processes come from, with this file imported and nothing open."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    # Python 3.11 does not hand its path on to what is imported beforehand.
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    return context


# --- what is done ----------------------------------------------------------------------------------------------------------


def _put(folder: Path, tell: Tell) -> None:
    store, _ = open_pair(folder)
    for batch in NEW:
        put_batch(store, batch)
        tell(batch)


def _sync(folder: Path, tell: Tell) -> None:
    store, ledger = open_pair(folder)
    ledger.sync(store)


def _put_and_sync(folder: Path, tell: Tell) -> None:
    store, ledger = open_pair(folder)
    for batch in NEW:
        put_batch(store, batch)
        tell(batch)
        if batch % 4 == 3:
            ledger.sync(store)


def _rebuild(folder: Path, tell: Tell) -> None:
    store, ledger = open_pair(folder)
    ledger.rebuild(store)


def _verify(folder: Path, tell: Tell) -> None:
    store, ledger = open_pair(folder)
    ledger.sync(store)
    if not verify_cache(store, ledger).good:
        raise AssertionError("what was prepared is not good")


def _export(folder: Path, tell: Tell) -> None:
    store, _ = open_pair(folder)
    export_entries(store, folder / "out.evalcache")


def _import(folder: Path, tell: Tell) -> None:
    store, _ = open_pair(folder)
    import_entries(store, folder / "in.evalcache")


# A schema has few steps so far. This one is none of evalcache's own: it stands for the next one, and does what steps do.
_STEP = """
CREATE TABLE told_of ( -- Of whom lookups told.
    run VARCHAR, -- id of the run
    lookups BIGINT -- how many
);
INSERT INTO told_of SELECT run, count(*) FROM lookups GROUP BY run;
ALTER TABLE run_ends ADD COLUMN lookups BIGINT;
UPDATE run_ends SET lookups = (SELECT t.lookups FROM told_of t WHERE t.run = run_ends.run);
CREATE VIEW told AS SELECT * FROM told_of JOIN run_ends USING (run);
"""


@contextlib.contextmanager
def newer_schema() -> Iterator[None]:
    """As if evalcache had one step more."""
    steps = (*schema.STEPS, _STEP)
    before = ledgers.STEPS, ledgers.VERSION
    ledgers.STEPS, ledgers.VERSION = steps, len(steps)
    try:
        yield
    finally:
        ledgers.STEPS, ledgers.VERSION = before


def _step(folder: Path, tell: Tell) -> None:
    with newer_schema():
        Ledger(folder / "ledger.duckdb").query("SELECT 1")


# --- what has to be there afterwards ---------------------------------------------------------------------------------------


def _look(folder: Path, acknowledged: Sequence[Any], finished: bool) -> list[Fault]:
    """Of every phase that puts or syncs."""
    sure = {*SYNCED, *WAITING, *acknowledged}
    store, ledger = open_pair(folder)
    faults, batches = faults_of_store(store, sure)
    ledger.sync(store)
    faults += faults_of_ledger(store, ledger, batches)
    store.close()
    return faults + litter_in(folder)


def _look_at_export(folder: Path, acknowledged: Sequence[Any], finished: bool) -> list[Fault]:
    target = folder / "out.evalcache"
    old, old_bytes = folder / "old.evalcache", None
    if old.exists():
        old_bytes = old.read_bytes()
        old.unlink()
    faults = []
    if target.exists() and target.read_bytes() != old_bytes:
        with Store(folder / "there") as there:
            taken = import_entries(there, target)
            if taken.new != len(numbers_of([*SYNCED, *WAITING])):
                faults.append(Fault("half", f"an export of {taken.new} entries"))
            faults += faults_of_store(there, [*SYNCED, *WAITING])[0]
        shutil.rmtree(folder / "there")
    elif finished or (old_bytes is not None and not target.exists()):
        faults.append(Fault("lost", target.name))
    target.unlink(missing_ok=True)
    for scratch in folder.glob(".out.evalcache.*"):  # in the user's folder, where nobody may clear up after others
        shutil.rmtree(scratch)
    return faults + _look(folder, [], finished)


def _look_at_import(folder: Path, acknowledged: Sequence[Any], finished: bool) -> list[Fault]:
    store, ledger = open_pair(folder)
    here = {*SYNCED, *WAITING}
    faults, _ = faults_of_store(store, [*here, *(NEW if finished else ())], whole=False)
    import_entries(store, folder / "in.evalcache")
    again, batches = faults_of_store(store, [*here, *NEW])
    faults += again
    # The file has another answer to each request of the first batch here, and the usual ones to those of the last.
    others = sorted(other.result.text or "" for _, other in store.conflicts())
    if others != sorted(result_of(number, "other").text or "" for number in numbers_of(SYNCED[:1])):
        faults.append(Fault("wrong", f"{len(others)} conflicts"))
    ledger.sync(store)
    faults += faults_of_ledger(store, ledger, batches, told=here)
    store.close()
    (folder / "in.evalcache").unlink()
    return faults + litter_in(folder)


def _look_at_step(folder: Path, acknowledged: Sequence[Any], finished: bool) -> list[Fault]:
    with newer_schema():
        faults = _look(folder, acknowledged, finished)
        with Ledger(folder / "ledger.duckdb").reading() as ask:
            versions = [row[0] for row in ask("SELECT version FROM schema_version ORDER BY version").rows]
            told = ask("SELECT count(*), count(DISTINCT run), sum(lookups) FROM told").rows[0]
    if versions != list(range(1, len(schema.STEPS) + 2)):
        faults.append(Fault("twice", f"steps {versions}"))
    known = len(SYNCED)
    if told != (known, known, len(numbers_of(SYNCED))):
        faults.append(Fault("wrong", f"after the step: {told}"))
    return faults


# --- rounds ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Something that a process does.

    Args:
        act: does it, and acknowledges batches. look: what is wrong afterwards, given the folder, what was acknowledged, and
            whether it came to its end. prepare: what it needs beside the usual folder.
    """

    act: Callable[[Path, Tell], None]
    look: Callable[[Path, Sequence[Any], bool], list[Fault]] = _look
    prepare: Callable[[Path], None] = lambda folder: None


def _give_old_export(folder: Path) -> None:
    with Store(folder / "elsewhere") as store:
        put_batch(store, 0)
        export_entries(store, folder / "out.evalcache")
    shutil.rmtree(folder / "elsewhere")
    shutil.copy(folder / "out.evalcache", folder / "old.evalcache")


def _give_file(folder: Path) -> None:
    with Store(folder / "elsewhere") as store:
        put_batch(store, SYNCED[0], "other")
        for batch in (WAITING[-1], *NEW):
            put_batch(store, batch)
        export_entries(store, folder / "in.evalcache")
    shutil.rmtree(folder / "elsewhere")


PHASES = {
    "put": Phase(_put),
    "sync": Phase(_sync),
    "put and sync": Phase(_put_and_sync),
    "first sync": Phase(_sync, prepare=lambda folder: _only_waiting(folder)),
    "rebuild": Phase(_rebuild),
    "verify": Phase(_verify),
    "export": Phase(_export, _look_at_export),
    "export over an older one": Phase(_export, _look_at_export, _give_old_export),
    "import": Phase(_import, _look_at_import, _give_file),
    "schema step": Phase(_step, _look_at_step),
}


def _only_waiting(folder: Path) -> None:
    """A store whose ledger was never made."""
    shutil.rmtree(folder)
    store, _ = open_pair(folder)
    for batch in (*SYNCED, *WAITING):
        put_batch(store, batch)
    store.close()


def prepare(folder: Path) -> Path:
    """A store and a ledger that knows a part of it; the usual folder of a phase."""
    store, ledger = open_pair(folder)
    for batch in SYNCED:
        put_batch(store, batch)
    ledger.sync(store)
    for batch in WAITING:
        put_batch(store, batch)
    store.close()
    return folder


Line = tuple[str, int]
"""A line of evalcache's own source: file and number."""


def _watch_lines(reached: Counter[Line], fatal: tuple[Line, int] | None) -> None:
    """Count the lines that this thread reaches from here on, and have it killed when it reaches one for the n-th time."""

    def at_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            reached[line] += 1
            if fatal is not None and line == fatal[0] and reached[line] == fatal[1]:
                os.kill(os.getpid(), signal.SIGKILL)
        return at_line

    sys.settrace(lambda frame, event, _: at_line if frame.f_code.co_filename.startswith(_PACKAGE) else None)


def _act(phase: str, folder: Path, connection: Connection, at: tuple[Line, int] | None, counting: bool) -> None:
    """In a process of its own. A message is one write: it arrives whole or not at all."""
    warnings.simplefilter("error")  # nothing may even look damaged
    reached: Counter[Line] = Counter()
    connection.send("begun")
    try:
        if counting or at is not None:
            _watch_lines(reached, at)
        PHASES[phase].act(folder, connection.send)
        sys.settrace(None)
        connection.send(reached)
        connection.send("done")
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
    signal.pause()  # for the kill: whoever is waited for is not replaced by another process of the same id


@dataclass
class Campaign:
    """Rounds of one phase.

    Half of the kills come at moments of the phase's duration, most of which passes in few places (in a COMMIT, in Parquet); the
    others at lines of evalcache's own code that it runs through.

    Args:
        scratch: a folder for it alone. prepared: by `prepare`.
    """

    phase: str
    scratch: Path
    prepared: Path
    rounds: int = 0
    late: int = 0
    """Rounds whose kill came when everything was done."""
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._template = self.scratch / "template"
        shutil.copytree(self.prepared, self._template)
        PHASES[self.phase].prepare(self._template)
        _, self.duration_s = self._do()
        self.lines: Counter[Line] = next(word for word in self._do(counting=True)[0] if isinstance(word, Counter))

    def run(self, rounds: int, seed: int = 0) -> list[Fault]:
        """Kill so many times, once in each of as many equal parts of the whole, and look after each; returns the faults."""
        draw = random.Random(f"{self.phase} {seed}")
        lines = sorted(self.lines)
        for place in draw.sample(range(rounds), rounds):
            share = (place + draw.random()) / rounds
            if place % 2:
                line = lines[int(share * len(lines))]
                said, _ = self._do(at=(line, draw.randint(1, self.lines[line])))
            else:
                said, _ = self._do(moment_s=share * _LATE * self.duration_s)
            finished = said[-1:] == ["done"]
            self.rounds += 1
            self.late += finished
            self.faults += self._look([word for word in said if isinstance(word, int)], finished)
        return self.faults

    @property
    def _folder(self) -> Path:
        return self.scratch / "round"

    def _do(
        self, *, moment_s: float | None = None, at: tuple[Line, int] | None = None, counting: bool = False
    ) -> tuple[list[Any], float]:
        """One process, killed at a moment, at a line, or when it has finished; what it said, and how long it took."""
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._template, self._folder)
        context = fork_server()
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_act, args=(self.phase, self._folder, theirs, at, counting))
        process.start()
        theirs.close()
        said: list[Any] = []

        def hear(until: str | None) -> None:
            with contextlib.suppress(EOFError):  # in the middle of a message, too
                while (not said or said[-1] != until) and ours.poll(_PATIENCE_S):
                    said.append(ours.recv())

        with ours:
            hear("begun")
            began = time.perf_counter()
            if moment_s is None:
                hear("done")
            else:
                time.sleep(moment_s)
            took_s = time.perf_counter() - began
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            hear(None)
        process.join(_PATIENCE_S)
        finished = said[-1:] == ["done"]
        if said[:1] != ["begun"] or process.exitcode != -signal.SIGKILL or not (finished or moment_s is not None or at):
            raise AssertionError(f"{self.phase} ended with {process.exitcode}: {said[-1:]}")
        if failed := [word for word in said[1:] if isinstance(word, str) and word != "done"]:
            raise AssertionError(f"{self.phase} failed: {failed}")
        return said, took_s

    def _look(self, acknowledged: list[Any], finished: bool) -> list[Fault]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                return PHASES[self.phase].look(self._folder, acknowledged, finished)
            except (EvalCacheError, Warning) as error:
                return [Fault("damaged", f"{type(error).__name__}: {error}")]
