"""Mending: what is wrong with a cache is put right from what is left of it, and nothing is deleted. Level 5.5.

The store and the ledger know the same entries. A file that its engine calls damaged is moved aside, and what can be read of it
goes into a new one; rows that fail their checks are set aside; then each is given what the other one has. What is in neither is
lost: it is named, and the ledger notes that the entry is gone, so that the next run computes it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from evalcache.digest import Digest
from evalcache.errors import StoreError
from evalcache.inspection import bad_rows
from evalcache.journal import Removed
from evalcache.ledger import Ledger
from evalcache.ledger_mending import FROM_STORE, damage_of_ledger, mend_ledger
from evalcache.restoring import restore_entries, restore_objects
from evalcache.salvage import DATABASE, damage_of, is_used, salvage
from evalcache.store import Store
from evalcache.structs import Struct, field
from evalcache.verification import Verification, compare

Progress = Callable[[int, int], None]
_KEYS = 10_000  # of one event


def _no_progress(done: int, total: int) -> None:
    pass


class Mended(Struct):
    """What was put right, and what could not be.

    Args:
        moved: damaged files, under their new names. set_aside: rows of the store that failed their checks.
        restored: entries that came back from the ledger. objects: settings, environments and manifests likewise.
        told: entries that the ledger was told anew. lost: one sentence for each kind of thing that is in neither.
    """

    moved: list[str] = field(default_factory=list)
    set_aside: int = 0
    restored: int = 0
    objects: int = 0
    told: int = 0
    lost: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Stable field names."""
        return {
            "moved": self.moved, "set_aside": self.set_aside, "restored": self.restored, "objects": self.objects,
            "told": self.told, "lost": self.lost,
        }  # fmt: skip


def verify_folder(folder: Path, progress: Progress = _no_progress) -> Verification:
    """Check every byte of a cache, and its store and ledger against each other. Changes nothing but what waits for the ledger.

    Cost: a pass over the whole store and the whole ledger.

    Raises:
        LedgerLockedError: somebody else holds the ledger. EvalCacheError: rights, or a newer version, keep us from reading.
    """
    ledger = Ledger(folder / "ledger.duckdb")
    broken, remedies = [], []
    if damage := damage_of(folder / "store"):
        broken.append(damage)
        remedies.append(f"move {DATABASE} aside, fill a new one with what is good in it, and restore the rest from the ledger")
    if damage := damage_of_ledger(ledger):
        broken.append(damage)
        remedies.append(f"move {ledger.path.name} aside, fill a new one with what can be read of it and with what the store has")
    if broken:
        return Verification(broken=tuple(broken), remedies=tuple(remedies))
    with Store(folder / "store") as store:
        damaged = tuple(bad.why for bad in bad_rows(store.rows))
        ledger.sync(store, progress=progress)
        return compare(store, ledger, damaged)


def mend_folder(folder: Path, progress: Progress = _no_progress) -> Mended:
    """Put right what `verify_folder` finds. Killed at any instant, it can be called again.

    Raises:
        StoreError: another process is at work on the store, or the folder cannot be written.
        LedgerLockedError: somebody else holds the ledger.
    """
    mended, store_folder = Mended(), folder / "store"
    ledger = Ledger(folder / "ledger.duckdb")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / "mending.lock", timeout=0, mode=0o600):
            _mend_store_file(store_folder, mended)
            if damage_of_ledger(ledger):
                _mend_ledger_file(ledger, mended)
            with Store(store_folder) as store:
                _mend_rows(store, ledger, mended, progress)
    except filelock.Timeout as error:
        raise StoreError(f"{folder} is being mended by another process", hint="wait for it", path=str(folder)) from error
    return mended


def _mend_store_file(folder: Path, mended: Mended) -> None:
    if damage_of(folder) is None:
        return
    if is_used(folder):  # it has the damaged file open, and would go on writing into it
        raise StoreError(f"other processes are at work on {folder}", hint="wait for their end", path=str(folder))
    done = salvage(folder)
    mended.moved.append(str(done.moved_to))
    mended.set_aside += done.aside


def _mend_ledger_file(ledger: Ledger, mended: Mended) -> None:
    done = mend_ledger(ledger)
    mended.moved.append(str(done.moved_to))
    for table, rows in done.lost.items():
        if table not in FROM_STORE:
            what = "all rows" if rows is None else _number(rows, "row")
            mended.lost.append(f"{what} of the ledger's table {table}, which nothing but that file knew")


def _mend_rows(store: Store, ledger: Ledger, mended: Mended, progress: Progress) -> None:
    bad = list(bad_rows(store.rows))
    events = sum(one.name.startswith("journal/") for one in bad)
    if events:
        mended.lost.append(
            f"{events:,} damaged event{'' if events == 1 else 's'} of the journal that the ledger had not been told"
        )
    mended.set_aside += store.set_bad_aside(bad)
    is_lost = not ledger.path.exists() and store.waiting.has_forgotten()
    ledger.sync(store, progress=progress)
    found = compare(store, ledger)
    if is_lost:
        mended.told += found.outputs
        mended.lost.append("what only the lost ledger knew: runs, lookups, our own overhead, tasks, documents and scores")
    if found.only_in_store:
        mended.told += ledger.rebuild(store, progress=progress).entries
    missing = [Digest.parse(key) for key in found.only_in_ledger]
    restored = restore_entries(ledger, store, missing, progress)
    mended.restored, mended.objects = restored.entries, restored.objects
    with ledger.reading() as ask:
        mended.objects += restore_objects(ask, store)
    for reason, count in restored.reasons.most_common():
        mended.lost.append(f"{_number(count, 'entry', 'entries')}, to be computed again: {reason}")
    gone = [key.value for key in restored.refused]
    for start in range(0, len(gone), _KEYS):
        now = time.time()
        store.commit([], [Removed("", now, tuple(gone[start : start + _KEYS]), "lost")], run="", created_at=now)
    ledger.sync(store)


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
