"""Pruning: stored entries that are no longer wanted leave the store. Level 4.8.

Who decides is a person (`evalcache prune`), or a size limit that a person has set. What was asked, answered and spent stays in
the ledger, which is told that the entries left; what is asked again is computed again.

Where a size is to be reached, entries go in the order of what they cost by the byte, the cheapest first and the eldest of equals:
so that what is lost takes least to be had again. An entry whose cost nobody measured stands at the mean of the others.

A size is what is stored, not the file's length: SQLite uses the room again that is left in the file, and gives it back to the
disk only by `vacuum_store`.
"""

from __future__ import annotations

import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from evalcache.amounts import parse_bytes
from evalcache.digest import SIZE_BYTES, Digest
from evalcache.errors import AmountError, EvalCacheError, FrameError, StoreError
from evalcache.faults import tell
from evalcache.frame import Question, decode_entry, decode_question
from evalcache.journal import Overhead, Removed
from evalcache.records import Entry
from evalcache.store import Store
from evalcache.structs import Frozen, asdict, names_of

YOUNG_S = 300.0
"""Entries that were stored this recently are left while other processes are at work: they may be about to use them."""
ROW_BYTES = 120
"""What a row takes beside its value: its key, and its places in the indexes."""
FREE_SHARE = 0.1
"""Room that an eviction makes below a size limit, so that not each run has to."""

_SCAN_ROWS = 500
_CHUNK_ROWS, _CHUNK_BYTES = 256, 16 << 20  # of one transaction, which other writers wait for
_PAUSE_S = 0.005
_ENTRIES = (
    "SELECT rowid, key, CASE typeof(value) WHEN 'blob' THEN value END, store_time FROM Cache"
    " WHERE rowid > ? AND raw = 1 AND typeof(key) = 'blob' AND length(key) = 16 ORDER BY rowid LIMIT ?"
)
_RECENT = _ENTRIES.replace("ORDER", "AND store_time >= ? ORDER")


class Amount(Frozen):
    """Of some entries: how many, what they take, and the measured seconds that it took to compute them.

    ``unmeasured``: entries of which nobody knows the seconds.
    """

    entries: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    unmeasured: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(getattr(self, name) + getattr(other, name) for name in names_of(self)))


class PrunePlan(Frozen):
    """What would leave the store.

    Args:
        keys: of the entries, in the order in which they would go. sizes: their bytes.
        by_model: root → what would go of that model. kept: what would stay, of all models.
        objects: settings, environments and manifests that nothing names which stays.
        stored_before: Unix seconds; what was stored later stays.
    """

    keys: Sequence[bytes]
    sizes: Sequence[int]
    by_model: Mapping[Digest, Amount]
    kept: Amount
    objects: Sequence[str]
    stored_before: float

    @property
    def total(self) -> Amount:
        """All that would go."""
        return sum(self.by_model.values(), Amount())

    def to_json(self, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Stable field names. ``names``: root (hex) → the names under which runs met that model."""
        total = self.total
        return {
            "entries": total.entries,
            "size_bytes": total.size_bytes,
            "seconds": total.seconds,
            "unmeasured": total.unmeasured,
            "kept_entries": self.kept.entries,
            "kept_bytes": self.kept.size_bytes,
            "by_model": [
                {"model": str(root), "names": list(names.get(root.hex, ()))} | asdict(amount)
                for root, amount in self.by_model.items()
            ],
        }


def size_limit() -> int | None:
    """The limit that ``EVALCACHE_MAX_SIZE`` sets, in bytes; None where none is set.

    Raises:
        AmountError: it is no size.
    """
    text = os.environ.get("EVALCACHE_MAX_SIZE", "").strip()
    return parse_bytes(text) if text else None


def used_bytes(store: Store) -> int:
    """Bytes of the store's file that are in use, the halves of pages that stand empty with them. Cost: microseconds."""
    pages, free, size = (store.rows.query(f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count", "page_size"))
    return (pages - free) * size


def stored_bytes(store: Store) -> int:
    """Bytes of all that is stored. Cost: a walk over the pages of the file, a second a gigabyte."""
    rows, values = store.rows.query("SELECT count(*), coalesce(sum(length(value)), 0) FROM Cache")[0]
    return rows * ROW_BYTES + values


def plan_prune(
    store: Store,
    holds: Callable[[Entry, Question], bool] = lambda entry, question: True,
    max_bytes: int | None = None,
    *,
    told_at: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PrunePlan:
    """What would leave the store: the entries that are meant, or as many of them as make what is stored fit.

    Args:
        holds: whether an entry is meant. max_bytes: of all that is stored, see `stored_bytes`; entries alone go.
        told_at: Unix seconds before which whatever was stored has been told to the ledger: what came later stays.

    Damaged entries stay. Cost: a pass over the store; 50 bytes of memory an entry.

    Raises:
        StoreError: the store cannot be read.
    """
    stored_before = told_at - YOUNG_S if store.leases.others() else told_at
    keys, chosen = bytearray(), array("b")
    sizes, seconds, created = array("q"), array("d"), array("d")
    numbers: dict[Digest, int] = {}
    named = tuple(array("l") for _ in range(3))  # model, settings and environment of each, by number
    for done, (key, frame, stored_at) in enumerate(_entries(store), 1):
        progress(done, done)
        try:
            entry, question = decode_entry(key, frame), decode_question(key, frame)
        except FrameError:
            continue
        keys += key
        sizes.append(len(frame) + ROW_BYTES)
        cost = entry.result.cost
        seconds.append(float("nan") if cost is None else cost.seconds)
        created.append(entry.created_at)
        chosen.append(stored_at < stored_before and holds(entry, question))
        for place, digest in zip(named, (question.model, question.settings, question.environment), strict=True):
            place.append(numbers.setdefault(digest, len(numbers)))
    going = np.flatnonzero(np.asarray(chosen))
    columns = np.asarray(sizes), np.asarray(seconds)
    if max_bytes is not None:
        going = _cheapest(going, *columns, np.asarray(created), stored_bytes(store) - max_bytes)
    staying = np.ones(len(sizes), dtype=bool)
    staying[going] = False
    names, digests = [np.asarray(place) for place in named], list(numbers)
    needed = {digests[number].hex for number in set(np.concatenate([place[staying] for place in names]).tolist())}
    models = names[0][going]
    by_model = {digests[model]: _amount(going[models == model], *columns) for model in np.unique(models).tolist()}
    return PrunePlan(
        keys=[bytes(keys[SIZE_BYTES * place : SIZE_BYTES * (place + 1)]) for place in going.tolist()],
        sizes=columns[0][going].tolist(),
        by_model=dict(sorted(by_model.items(), key=lambda item: -item[1].size_bytes)),
        kept=_amount(np.flatnonzero(staying), *columns),
        objects=[name for name in _shared(store) if name.rpartition("/")[2] not in needed],
        stored_before=stored_before,
    )


def _cheapest(going: np.ndarray, sizes: np.ndarray, seconds: np.ndarray, created: np.ndarray, to_free: int) -> np.ndarray:
    """As many of the entries as it takes to free so much, the cheapest by the byte first."""
    if to_free <= 0 or not len(going):
        return going[:0]
    by_byte = seconds[going] / sizes[going]
    known = by_byte[~np.isnan(by_byte)]
    by_byte = np.where(np.isnan(by_byte), known.mean() if len(known) else 0.0, by_byte)
    going = going[np.lexsort((created[going], by_byte))]
    return going[: int(np.searchsorted(np.cumsum(sizes[going]), to_free)) + 1]


def _amount(places: np.ndarray, sizes: np.ndarray, seconds: np.ndarray) -> Amount:
    unmeasured = np.isnan(seconds[places])
    return Amount(
        len(places), int(sizes[places].sum()), float(seconds[places][~unmeasured].sum()), int(unmeasured.sum())
    )  # fmt: skip


def prune(
    store: Store,
    plan: PrunePlan,
    *,
    why: str = "pruned",
    run: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Let the entries of a plan go; returns how many went. The ledger has been told of all that was stored before the plan.

    What another process computes anew at the moment stays, and so does what was stored since the plan was made. Each transaction
    is small, and a pause follows it: a writer waits for milliseconds. Killed at any instant, what left the store is what the
    journal says.

    Raises:
        StoreError: the folder cannot be written; what went before is gone.
    """
    gone = 0
    for some in _chunks(plan):
        began = time.monotonic()
        gone += _remove(store, some, plan.stored_before, why, run)
        progress(gone, len(plan.keys))
        time.sleep(max(_PAUSE_S, time.monotonic() - began))
    _sweep(store, plan)
    return gone


def _remove(store: Store, keys: Sequence[bytes], stored_before: float, why: str, run: str) -> int:
    with store.rows.transaction("pruning"):
        leased = store.leases.taken([Digest(key) for key in keys])
        gone = store.rows.remove_elder([key for key in keys if key not in leased], stored_before)
        for key in gone:
            beside = f"object/conflict/{key.hex()}"  # what another store answered
            store.rows.delete(f"{beside}/", f"{beside}0")
        if gone:
            now = time.time()
            store.commit([], [Removed(run, now, tuple(gone), why)], run=run, created_at=now)
    return len(gone)


def _sweep(store: Store, plan: PrunePlan) -> None:
    """Let the objects go that no entry names any more: not while others are at work, who may have seen that one is there."""
    for _ in range(3):
        if not plan.objects or store.leases.others():
            return
        version = store.rows.version()
        used: set[str] = set()
        for key, frame, _ in _entries(store, since=plan.stored_before):
            try:
                question = decode_question(key, frame)
            except FrameError:
                continue
            used.update(digest.hex for digest in (question.model, question.settings, question.environment))
        dead = [name for name in plan.objects if name.rpartition("/")[2] not in used]
        with store.rows.transaction("pruning"):
            if store.rows.version() == version:  # nobody has written since: what was just read is how it is
                for start in range(0, len(dead), _CHUNK_ROWS):
                    some = [f"object/{name}" for name in dead[start : start + _CHUNK_ROWS]]
                    store.rows.remove_elder(some, plan.stored_before)
                return


def evict(store: Store, *, told_at: float, run: str) -> Amount:
    """Let the entries go that cost least by the byte, where the limit of ``EVALCACHE_MAX_SIZE`` is passed; returns what went.

    For the end of a run, which it never fails: a fault is a warning.

    Cost: microseconds, where the whole file is smaller; else a pass over the store, which then makes room for some time.
    """
    began = time.perf_counter()
    try:
        limit = size_limit()
        if limit is None or used_bytes(store) <= limit or stored_bytes(store) <= limit:
            return Amount()
        plan = plan_prune(store, max_bytes=int(limit * (1 - FREE_SHARE)), told_at=told_at)
        prune(store, plan, why="evicted", run=run)
        took = Overhead(run, time.time(), {"prune": time.perf_counter() - began})
        store.commit([], [took], run=run, created_at=took.at)
        return plan.total
    except AmountError as error:
        tell(f"EVALCACHE_MAX_SIZE: {error}; nothing was evicted")
    except EvalCacheError as error:
        tell(f"the store was not kept below EVALCACHE_MAX_SIZE: {error}")
    return Amount()


def vacuum_store(store: Store) -> int:
    """Give the room that stands empty in the store's file back to the disk; returns how many bytes. Writers wait meanwhile.

    Cost: the whole file is written anew, beside itself.

    Raises:
        StoreError: other processes are at work, or the disk has no room for a second file.
    """
    folder = store.directory
    if store.leases.others():
        raise StoreError(f"other processes are at work on {folder}", hint="wait for their end", path=str(folder))
    before, needed = store.rows.size_bytes(), 2 * used_bytes(store)
    if shutil.disk_usage(folder).free < needed:
        hint = f"it takes {needed:,} bytes for a while"
        raise StoreError(f"no room beside {folder} to write it anew", hint=hint, path=str(folder))
    store.rows.query("VACUUM")
    store.rows.query("PRAGMA wal_checkpoint(TRUNCATE)")
    return before - store.rows.size_bytes()


def _shared(store: Store) -> list[str]:
    """The names of all settings, environments and manifests."""
    kinds = (("object/fields/", "object/fields0"), ("object/model/", "object/model0"))
    names = [store.rows.query("SELECT key FROM Cache WHERE raw = 1 AND key > ? AND key < ?", kind) for kind in kinds]
    return [name.removeprefix("object/") for rows in names for (name,) in rows]


def _entries(store: Store, since: float | None = None) -> Iterator[tuple[Digest, bytes, float]]:
    """Key, frame and time of storing of every entry, in the order of the file."""
    after = -(1 << 63)
    while rows := store.rows.query(*_scan(after, since)):
        for _, key, frame, stored_at in rows:
            yield Digest(key), frame, stored_at
        after = rows[-1][0]


def _scan(after: int, since: float | None) -> tuple[str, tuple]:
    return (_ENTRIES, (after, _SCAN_ROWS)) if since is None else (_RECENT, (after, since, _SCAN_ROWS))


def _chunks(plan: PrunePlan) -> Iterator[list[bytes]]:
    some: list[bytes] = []
    size = 0
    for key, bytes_ in zip(plan.keys, plan.sizes, strict=True):
        if some and (len(some) >= _CHUNK_ROWS or size + bytes_ > _CHUNK_BYTES):
            yield some
            some, size = [], 0
        some.append(key)
        size += bytes_
    if some:
        yield some
