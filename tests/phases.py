"""What a process may be doing when it is killed, and what has to be there afterwards: by content, and in store and ledger."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numbered import Fault, faults_of_ledger, faults_of_store, key_of_number, litter_in, numbers_of, put_batch, result_of, run_of
from recorded import open_pair

from evalcache import ledger as ledgers
from evalcache import schema
from evalcache.exchange import export_entries, import_entries
from evalcache.ledger import Ledger
from evalcache.mending import mend_folder, verify_folder
from evalcache.pruning import plan_prune, prune
from evalcache.segments import Segments
from evalcache.store import Store
from evalcache.verification import verify_cache

SYNCED, WAITING, NEW = range(4), range(4, 10), range(10, 22)
"""Batches of a prepared folder: those that its ledger knows, those that wait in the journal, and those that a phase adds."""
PRUNED = (*SYNCED[:2], *WAITING[:2])

Tell = Callable[[Any], None]


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


def _prune(folder: Path, tell: Tell) -> None:
    store, ledger = open_pair(folder)
    ledger.sync(store)
    runs = {run_of(batch) for batch in PRUNED}
    prune(store, plan_prune(store, lambda entry, question: entry.run in runs, told_at=time.time()))
    ledger.sync(store)


def _mend(folder: Path, tell: Tell) -> None:
    mend_folder(folder)


def _push(folder: Path, tell: Tell) -> None:
    store, _ = open_pair(folder)
    Segments(folder / "shared", store).push()


def _pull(folder: Path, tell: Tell) -> None:
    store, _ = open_pair(folder)
    Segments(folder / "shared", store).pull()


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


def _look_at_prune(folder: Path, acknowledged: Sequence[Any], finished: bool) -> list[Fault]:
    store, ledger = open_pair(folder)
    kept = [batch for batch in (*SYNCED, *WAITING) if batch not in PRUNED]
    faults, _ = faults_of_store(store, kept, whole=False)
    gone = [number for number in numbers_of(PRUNED) if store.get(key_of_number(number)) is None]
    if finished and len(gone) != len(numbers_of(PRUNED)):
        faults.append(Fault("half", f"{len(gone)} entries were pruned"))
    ledger.sync(store)
    faults += faults_of_ledger(store, ledger, {*SYNCED, *WAITING})  # which remembers what was pruned
    store.close()
    return faults + litter_in(folder)


def _look_at_mend(folder: Path, acknowledged: Sequence[Any], finished: bool) -> list[Fault]:
    mend_folder(folder)
    faults = [Fault("disagrees", problem) for problem in verify_folder(folder).problems]
    with Store(folder / "store") as store:
        return faults + faults_of_store(store, [*SYNCED, *WAITING], whole=False)[0]


def _look_at_push(folder: Path, acknowledged: Sequence[Any], finished: bool) -> list[Fault]:
    store, _ = open_pair(folder)
    faults = []
    for again in (False, True):
        if again:
            Segments(folder / "shared", store).push()
        with Store(folder / f"elsewhere-{again}" / "store") as elsewhere:
            Segments(folder / "shared", elsewhere).pull()
            sure = NEW if again or finished else ()
            faults += faults_of_store(elsewhere, sure, whole=False)[0]
            faults += [Fault("twice", str(key)) for key, _ in elsewhere.conflicts()]
        shutil.rmtree(folder / f"elsewhere-{again}")
    store.close()
    return faults


def _look_at_pull(folder: Path, acknowledged: Sequence[Any], finished: bool) -> list[Fault]:
    store, ledger = open_pair(folder)
    here = {*SYNCED, *WAITING}
    faults, _ = faults_of_store(store, [*here, *(NEW if finished else ())], whole=False)
    Segments(folder / "shared", store).pull()
    again, batches = faults_of_store(store, [*here, *NEW])
    ledger.sync(store)
    store.close()
    return faults + again + faults_of_ledger(store, ledger, batches, told=here)


# --- both ---


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
    with Store(folder / "elsewhere" / "store") as store:
        put_batch(store, 0)
        export_entries(store, folder / "out.evalcache")
    shutil.rmtree(folder / "elsewhere")
    shutil.copy(folder / "out.evalcache", folder / "old.evalcache")


def _give_file(folder: Path) -> None:
    with Store(folder / "elsewhere" / "store") as store:
        put_batch(store, SYNCED[0], "other")
        for batch in (WAITING[-1], *NEW):
            put_batch(store, batch)
        export_entries(store, folder / "in.evalcache")
    shutil.rmtree(folder / "elsewhere")


def _compute(folder: Path) -> None:
    """What is new was computed here, and not given to others yet."""
    with Store(folder / "store") as store:
        Segments(folder / "shared", store)
        for batch in NEW:
            put_batch(store, batch)


def _give_segments(folder: Path) -> None:
    """Another machine has computed what is new here."""
    with Store(folder / "elsewhere" / "store") as store:
        segments = Segments(folder / "shared", store)
        for batch in NEW:
            put_batch(store, batch)
            if batch % 4 == 3 or batch == NEW[-1]:
                segments.push()
    shutil.rmtree(folder / "elsewhere")


def _damage_store(folder: Path) -> None:
    """Rows of the store are not what they were, and the ledger knows what they held."""
    store, _ = open_pair(folder)
    with store.rows.transaction("damaging"):
        for number in numbers_of(SYNCED):
            key = key_of_number(number).value
            ((_, frame),) = next(store.rows.select([key], []))
            store.rows.put([(key, frame[:-1] + bytes([frame[-1] ^ 1]))])
    store.close()


def _damage_ledger(folder: Path) -> None:
    """The ledger cannot be opened, and the store is whole."""
    path = folder / "ledger.duckdb"
    content = bytearray(path.read_bytes())
    content[12_288] ^= 1
    path.write_bytes(content)


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
    "prune": Phase(_prune, _look_at_prune),
    "push of segments": Phase(_push, _look_at_push, _compute),
    "pull of segments": Phase(_pull, _look_at_pull, _give_segments),
    "verify --fix of a store": Phase(_mend, _look_at_mend, _damage_store),
    "verify --fix of a ledger": Phase(_mend, _look_at_mend, _damage_ledger),
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
