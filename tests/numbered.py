"""Entries whose whole content follows from a number: whoever knows the number knows what has to be there, and asks no store.

A *batch* is one run that misses `SIZE` requests, computes them, and tells of it, all in one transaction.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from recorded import BASE, NOON, begin, look, make_action

from evalcache.digest import Digest
from evalcache.errors import FrameError
from evalcache.journal import RunEnded
from evalcache.key import key_of
from evalcache.ledger import Ledger
from evalcache.records import Action, Array, Cost, Entry, Result, pack_logprobs, pack_tokens
from evalcache.store import Store
from evalcache.verification import verify_cache

SIZE = 8
_LARGE = 23  # every so manieth answer is of several pages


def action_of(number: int) -> Action:
    """What is asked under a number."""
    return make_action(prompt=(number, *range(number % 5)))


@functools.cache
def key_of_number(number: int) -> Digest:
    """Its key."""
    return key_of(action_of(number))


def result_of(number: int, answer: str = "answer") -> Result:
    """What is answered; another word makes it another answer."""
    text = f"{answer} {number}"
    if number % _LARGE == 0:
        text += hashlib.shake_256(text.encode()).hexdigest(12_000)
    scalars = {"sum": -float(number), "is_greedy": number % 2 == 0}
    arrays = {"scores": Array("int32", (1,), pack_tokens([number]))} if number % 11 == 0 else {}
    tokens = [number % 1000, number // 1000]
    return Result(pack_tokens(tokens), text, pack_logprobs([-number / 7]), "stop", scalars, arrays, Cost(0.5, 3, 2, "cpu", SIZE))


def run_of(batch: int) -> str:
    """The run that a batch is."""
    return f"{batch:032x}"


def numbers_of(batches: Iterable[int]) -> list[int]:
    """The numbers of whole batches."""
    return [batch * SIZE + place for batch in batches for place in range(SIZE)]


def entry_of(number: int) -> Entry:
    """The entry that has to be there."""
    batch = number // SIZE
    return Entry(key_of_number(number), result_of(number), run_of(batch), NOON + batch)


def put_batch(store: Store, batch: int, answer: str = "answer") -> None:
    """Commit one batch."""
    asked = [(number, action_of(number)) for number in numbers_of([batch])]
    entries = [(key_of(action), action, result_of(number, answer)) for number, action in asked]
    run, at = run_of(batch), NOON + batch
    looked = look(run, at, [(key, "miss", "absent", 0.5) for key, _, _ in entries])
    objects = {f"model/{BASE.root.hex}": BASE.to_bytes()}
    store.commit(entries, [*begin(run, at), looked, RunEnded(run, at, "ok", 0)], objects, run=run, created_at=at)


@dataclass(frozen=True, order=True)
class Fault:
    """Something that may not be.

    Args:
        kind: ``lost``, ``wrong``, ``half``, ``twice``, ``disagrees``, ``damaged`` or ``litter``.
    """

    kind: str
    what: str


@functools.cache
def _numbers_by_key(batches: int) -> dict[Digest, int]:
    """Of more batches than were ever begun."""
    return {key_of_number(number): number for number in numbers_of(range(batches))}


def faults_of_store(store: Store, sure: Iterable[int], *, whole: bool = True) -> tuple[list[Fault], set[int]]:
    """What is wrong with the entries of a store, and the batches that are in it.

    Args:
        sure: batches that were acknowledged. whole: a batch is there as a whole or not at all.
    """
    held = dict(store.frames())
    sure = set(sure)
    numbers = _numbers_by_key(max(sure, default=0) // 64 * 64 + 128)
    faults = [Fault("wrong", f"{key} is nobody's") for key in held if key not in numbers]
    found = store.get_many([key for key in held if key in numbers])
    present: dict[int, int] = {}
    for key, entry in found.items():
        number = numbers[key]
        if isinstance(entry, FrameError):
            faults.append(Fault("damaged", str(entry)))
        elif entry != entry_of(number):
            faults.append(Fault("wrong", f"number {number}: {entry}"))
        else:
            present[number // SIZE] = present.get(number // SIZE, 0) + 1
    faults += [Fault("lost", f"batch {batch}") for batch in sure if present.get(batch) != SIZE]
    if whole:
        faults += [Fault("half", f"{count} of batch {batch}") for batch, count in present.items() if count != SIZE]
    faults += [Fault("damaged", problem) for problem in store.check()]
    events = [number for number, _ in store.waiting.read(limit=1_000_000)]
    if len(events) != len(set(events)) or events != sorted(events):
        faults.append(Fault("twice", f"journal numbers {events}"))
    wanted = {f"model/{BASE.root.hex}"} if present else set()
    for question in store.get_questions(list(found)).values():
        wanted |= {f"fields/{question.settings.hex}", f"fields/{question.environment.hex}"}
    faults += [Fault("lost", name) for name in wanted if store.get_object(name) is None]
    return faults, set(present)


def faults_of_ledger(store: Store, ledger: Ledger, batches: set[int], *, told: set[int] | None = None) -> list[Fault]:
    """What is wrong with a ledger that has just been brought up to date.

    Args:
        batches: that are in the store. told: those of which the journal told; others came from elsewhere.
    """
    told = batches if told is None else told
    numbers = {key_of_number(number).hex: number for number in numbers_of(batches)}
    faults = [Fault("disagrees", problem) for problem in verify_cache(store, ledger).problems]
    if waiting := store.waiting.count():
        faults.append(Fault("disagrees", f"{waiting} events wait after a sync"))
    counted = (
        ("outputs", "key", len(numbers)),
        ("requests", "key", len(numbers)),
        ("lookups", "(store, seq, n)", len(told) * SIZE),
        ("lookups", "key", len(told) * SIZE),
        ("runs", "run", len(told)),
        ("run_ends", "run", len(told)),
        ("models", "digest", 1),
    )
    with ledger.reading() as ask:
        for table, what, expected in counted:
            rows, distinct = ask(f"SELECT count(*), count(DISTINCT {what}) FROM {table}").rows[0]
            if (rows, distinct) != (expected, expected):
                kind = "lost" if distinct < expected else "twice"
                faults.append(Fault(kind, f"{rows} rows of {table}, {distinct} by {what}, for {expected}"))
        sql = "SELECT key, text, token_ids, logprobs, seconds, run, prompt_token_ids FROM answers"
        for key, text, tokens, logprobs, seconds, run, prompt in ask(sql).rows:
            number = numbers.get(key)
            if number is None:
                faults.append(Fault("wrong", f"the ledger answers {key}, which is nobody's"))
                continue
            expected_row = (result_of(number).text, [number % 1000, number // 1000], [-number / 7], 0.5, run_of(number // SIZE))
            if (text, tokens, logprobs, seconds, run) != expected_row or prompt != [number, *range(number % 5)]:
                faults.append(Fault("wrong", f"the ledger's answer to number {number}: {text!r:.80}"))
    return faults


def litter_in(folder: Path) -> list[Fault]:
    """What nobody needs any more."""
    known = {"store", "ledger.duckdb", "ledger.duckdb.lock", "ledger.duckdb.queue", "ledger.duckdb.wal"}
    return [Fault("litter", path.name) for path in folder.iterdir() if path.name not in known]
