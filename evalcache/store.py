"""Store: Key → Entry, with the shared objects and the journal that tells the ledger about them, in one folder.

| row key (`rows.py`) | value |
|---|---|
| 16 bytes | an entry's frame (`frame.py`) |
| ``object/<name>`` | shared bytes: ``fields/<hex>`` (settings, environments), ``model/<root hex>`` (manifests), sealed |
| ``object/conflict/…`` | the frame of an entry from elsewhere with another answer than the one here, sealed |
| ``journal/…``, ``store/state`` | what waits for the ledger (`waiting.py`), sealed |
| ``worker/…``, ``lease/…`` | who computes what at the moment (`leases.py`), sealed |
| ``segment/…`` | what is exchanged with other machines (`transfers.py`), sealed |
| ``aside/<row key>`` | what failed its checks, kept for whoever wants to know why |
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evalcache.collector import paused_for
from evalcache.digest import SIZE_BYTES, Digest, digest_bytes
from evalcache.errors import FrameError, NewerFrameError, StoreError
from evalcache.faults import tell_of_folder
from evalcache.frame import Question, decode_entry, decode_question, encode_frame, seal, unseal
from evalcache.inspection import ASIDE, BadRow, bad_rows, set_aside
from evalcache.journal import Event, Stored, encode_event
from evalcache.leases import Leases
from evalcache.records import Action, Entry, Result, Taken, digest_answer
from evalcache.rows import ROW_LIMIT_BYTES, Rows
from evalcache.structs import Frozen
from evalcache.transfers import Transfers
from evalcache.waiting import Waiting

_CONFLICT = "conflict/"  # among the objects
_OBJECTS = ("object/", "object0")  # "0" follows "/": the first text after every row of the kind
_ASIDE = (ASIDE, "aside0")
_ENTRIES = b""  # bytes come after all text
_SCAN_ROWS = 500


class StoreStats(Frozen):
    """What a store holds. ``size_bytes``: of its files on disk; ``journal_rows``: waiting for the ledger."""

    entries: int
    objects: int
    journal_rows: int
    aside: int
    size_bytes: int


class Store:
    """A folder of entries that many threads and processes read and write at once.

    Args:
        directory: made with mode 0700 where it does not exist; its files have mode 0600.
        timeout_s: how long a write waits for other processes.

    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(self, directory: str | os.PathLike[str], *, timeout_s: float = 60) -> None:
        self.directory = Path(directory)
        self.corrupt_count = 0
        self._newer: set[bytes] = set()  # keys of entries that a newer evalcache wrote
        self._rows = Rows(directory, timeout_s=timeout_s)
        self.leases = Leases(self._rows)
        self.transfers = Transfers(self._rows)
        self.waiting = Waiting(self._rows)
        with self._rows.transaction("opening"):
            self._id = self.waiting.state()[0]

    @property
    def rows(self) -> Rows:
        """The rows themselves, for whoever looks after the store."""
        return self._rows

    def close(self) -> None:
        """Let go of this thread's connection; other threads' go with them. A later call opens it again."""
        self._rows.close()

    def reopen(self) -> bool:
        """Open the folder once more, after it has failed, and make it where it is gone. Says whether it is another store now.

        Raises:
            StoreError: the folder cannot be used.
        """
        known = self._id
        self._rows.reopen()
        with self._rows.transaction("opening"):
            self._id = self.waiting.state()[0]
        return self._id != known

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Entries and objects

    def get_many(self, keys: Sequence[Digest]) -> dict[Digest, Entry | FrameError]:
        """The entries under these keys; absent keys are absent.

        A frame that fails its checks is set aside, counted, and stands as its `FrameError`: the caller computes it again.
        Cost: one statement for about a thousand keys; about 10 µs a key with a 300-token prompt.

        Raises:
            StoreError: the folder cannot be read at all.
        """
        return self._read(keys, decode_entry)

    def get(self, key: Digest) -> Entry | FrameError | None:
        """`get_many` of one key."""
        return self.get_many((key,)).get(key)

    def get_question(self, key: Digest) -> Question | None:
        """What the entry under ``key`` answers; None where there is no good entry."""
        return self.get_questions((key,)).get(key)

    def get_questions(self, keys: Sequence[Digest]) -> dict[Digest, Question]:
        """What the entries under these keys answer; keys without a good entry are absent, damaged frames are set aside.

        Raises:
            StoreError: the folder cannot be read at all.
        """
        found = self._read(keys, decode_question)
        return {key: question for key, question in found.items() if isinstance(question, Question)}

    def get_object(self, name: str) -> bytes | None:
        """A shared object's bytes; None where there is none, or where it failed its checks and was set aside."""
        row = f"{_OBJECTS[0]}{name}"
        bytes_only = "SELECT CASE typeof(value) WHEN 'blob' THEN value END FROM Cache WHERE raw = 1 AND key = ?"
        for (value,) in self._rows.query(bytes_only, (row,)):
            try:
                return unseal(row, value)
            except FrameError as error:
                self._rows.set_aside([(row, value, str(error))])
        return None

    def frames(self) -> Iterator[tuple[Digest, bytes]]:
        """Every entry's key and bytes, undecoded, in order of keys; no transaction stays open between two of them."""
        after = _ENTRIES
        while rows := self._rows.scan(after, None, _SCAN_ROWS):
            for key, value in rows:
                if len(key) == SIZE_BYTES:
                    yield Digest(key), value if type(value) is bytes else b""
            after = rows[-1][0]

    def commit(
        self,
        entries: Sequence[tuple[Digest, Action, Result]],
        events: Sequence[Event] = (),
        objects: Mapping[str, bytes] | None = None,
        *,
        run: str,
        created_at: float,
    ) -> None:
        """Write all of it in one transaction; when this returns it is on disk, when it raises nothing was written.

        An entry replaces one under the same key. Objects are written where they are absent; the settings and environments
        of the entries are added as ``fields/<hex>``, and a `Stored` event with the entries' keys follows the ``events``. Leases
        of the entries that this process holds are given up.

        Args:
            run: id of the run that computed the entries. created_at: Unix seconds, kept to the microsecond, as the ledger does.

        Raises:
            StoreError: an entry is too large, or the folder cannot be written.
            CanonicalError: a value has no canonical encoding.
        """
        shared, created_at = dict(objects or {}), round(created_at, 6)
        frames: list[tuple[bytes, bytes]] = []
        # All encoding happens before the transaction, which other processes wait for.
        for key, action, result in entries:
            for fields in (action.request.settings, action.environment.keyed):
                shared.setdefault(f"fields/{fields.digest.hex}", fields.canonical)
            if key.value not in self._newer:
                frames.append((key.value, self._encode(key, action, result, run, created_at)))
        if frames:
            frames.sort()  # keys are hashes: in order, a commit of many touches each page of the index once
            events = [*events, Stored(run, tuple(value for value, _ in frames))]
        encoded = [encode_event(event) for event in events]
        if not (encoded or shared):
            return
        with self._rows.transaction("writing"):
            self._put(frames, shared, encoded)
            self.transfers.note([value for value, _ in frames])
            self.leases.release(key for key, *_ in entries)

    def _put(self, frames: Sequence[tuple[bytes, bytes]], shared: Mapping[str, bytes], events: Sequence[bytes]) -> None:
        """Write all of it. Within a transaction."""
        self._rows.put(frames)
        for name, data in shared.items():
            row = f"{_OBJECTS[0]}{name}"
            self._rows.add(row, seal(row, data))
        self.waiting.append(events)

    # Entries from elsewhere

    def take_in(
        self, frames: Sequence[tuple[Digest, bytes]], objects: Mapping[str, bytes], *, told: bool = True, due: bool = True
    ) -> Taken:
        """Write entries of another store in one transaction: good frames, and what they name; ``due`` to other machines, or not.

        One that is here already stays as it is. One with another *answer* than the one here is kept beside it, see `conflicts`.

        Args:
            told: whether the ledger is told of what is new: not where it comes from there.

        Raises:
            StoreError: the folder cannot be written; nothing was.
        """
        with self._rows.transaction("importing"):
            here = self.get_many([key for key, _ in frames])
            new = [(key.value, frame) for key, frame in frames if not isinstance(here.get(key), Entry)]
            shared, others = dict(objects), 0
            for key, frame in frames:
                mine = here.get(key)
                if isinstance(mine, Entry) and digest_answer(mine.result) != digest_answer(decode_entry(key, frame).result):
                    shared[f"{_CONFLICT}{key.hex}/{digest_bytes(frame).hex}"] = frame
                    others += 1
            events = [Stored("", tuple(value for value, _ in new))] if new and told else []
            self._put(new, shared, [encode_event(event) for event in events])
            self.transfers.note([value for value, _ in new] if due else ())
        return Taken(len(new), len(frames) - len(new) - others, others)

    def objects(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every good shared object that entries name."""
        for name, data in self.objects_under():
            if not name.startswith(_CONFLICT):
                yield name, data

    def conflicts(self) -> Iterator[tuple[Entry, Entry]]:
        """Entries of which other stores had another answer: the one that is served, and each other one."""
        for name, data in self.objects_under(_CONFLICT):
            key = Digest(bytes.fromhex(name.split("/")[1]))
            mine = self.get(key)
            if isinstance(mine, Entry):
                yield mine, decode_entry(key, data)

    def objects_under(self, prefix: str = "") -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every good shared object whose name begins so; ``prefix`` is empty or ends with a slash."""
        after, before = f"{_OBJECTS[0]}{prefix}", f"{_OBJECTS[0]}{prefix[:-1]}0" if prefix else _OBJECTS[1]
        while rows := self._rows.scan(after, before, _SCAN_ROWS):
            for row, value in rows:
                with contextlib.suppress(FrameError):
                    yield row.removeprefix(_OBJECTS[0]), unseal(row, value)
            after = rows[-1][0]

    def _encode(self, key: Digest, action: Action, result: Result, run: str, created_at: float) -> bytes:
        try:
            frame = encode_frame(key, action, result, run, created_at)
            if len(frame) > ROW_LIMIT_BYTES:
                raise FrameError("the frame is too large", key=key, expected=ROW_LIMIT_BYTES, found=len(frame))
            return frame
        except FrameError as error:
            raise self._rows.unusable("refuses an entry", error, "let this call run uncached: too_large") from error

    # Looking after it

    def stats(self) -> StoreStats:
        """What the store holds. Cost: a pass over the index of all that is not an entry."""
        return StoreStats(
            entries=self._rows.total() - self._rows.count_texts(),
            objects=self._rows.count(*_OBJECTS),
            journal_rows=self.waiting.count(),
            aside=self._rows.count(*_ASIDE),
            size_bytes=self._rows.size_bytes(),
        )

    def check(self) -> list[str]:
        """Decode every frame, object and event and check the database; the list of problems, empty when all is well.

        Nothing is changed. Cost: a pass over the whole store, during a part of which others cannot write.
        """
        problems = []
        try:
            problems.extend(bad.why for bad in bad_rows(self._rows))
        except StoreError as error:  # a damaged page: what follows it cannot be reached
            problems.append(str(error))
        return problems + self._rows.check()

    def set_bad_aside(self, bad: Iterable[BadRow]) -> int:
        """Keep rows that fail their checks under other names; returns how many. Nothing is deleted.

        Raises:
            StoreError: the folder cannot be written.
        """
        return set_aside(self._rows, bad)

    # Within

    def _read(self, keys: Sequence[Digest], decode_frame: Callable[[Digest, bytes], Any]) -> dict[Digest, Any]:
        """What ``decode_frame`` makes of the frames under these keys, or the `FrameError` of those that were set aside."""
        wanted = dict(zip(keys, keys, strict=True))  # found by plain bytes, too
        found: dict[Digest, Any] = {}
        unreadable: list[tuple[bytes, str]] = []
        bad: list[tuple[Digest, Any, FrameError]] = []
        with paused_for(len(keys)):
            for rows in self._rows.select(list(wanted), unreadable):
                for value, frame in rows:
                    key = wanted.get(value)
                    if key is None:  # a damaged index leads from the key of one row to another one
                        continue
                    try:
                        found[key] = decode_frame(key, frame)
                    except FrameError as error:
                        bad.append((key, frame, error))
        for key, why in ((wanted[value], why) for value, why in unreadable):
            bad.append((key, None, FrameError(f"{key}: the row cannot be read: {why}", key=key, expected="a row", found=why)))
        if bad:
            found.update((key, error) for key, _, error in bad)
            if newer := {key.value for key, _, error in bad if isinstance(error, NewerFrameError)}:
                self._newer |= newer
                tell_of_folder(self.directory.parent, f"{bad[0][2].message}; it is computed again here: upgrade to use such")
                bad = [one for one in bad if one[0].value not in newer]
            self.corrupt_count += len(bad)
            self._rows.set_aside([(key.value, frame, str(error)) for key, frame, error in bad])
        return found
