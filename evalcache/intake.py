"""Intake: a store's events and entries on their way into the ledger's tables. Level 3.8; the connection is the ledger's.

Everything here happens within one transaction that `ledger.py` opens and commits.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from evalcache.canonical import decode
from evalcache.digest import Digest
from evalcache.errors import CanonicalError, FrameError
from evalcache.frame import Question, decode_entry, decode_question
from evalcache.journal import Event, ModelSeen, Removed, Stored
from evalcache.manifest import Manifest
from evalcache.records import Entry
from evalcache.schema import literal, quoted
from evalcache.tables import COLUMNS, Row, event_rows, model_rows, output_row, render_json, request_row
from evalcache.waiting import Waiting

_FLUSH_ROWS = 5_000  # DuckDB takes up to 15 KB for each while it reads a statement of them
_FLUSH_BYTES = 64 << 20
_ONCE = {"tasks": "version, settings::VARCHAR", "documents": "document, replace(digest::VARCHAR, '-', '')"}
"""Tables whose rows are told again by every run → what, after client and task, makes a row of it the same one."""
_READ_KEYS = 256  # entries in memory at once: some hold tensors
_RUNS_THROUGH = "SELECT DISTINCT run FROM runs WHERE store = ? AND seq <= ?"
_PLACE = re.compile(r"\?|\$(\d+)")


class Connection(Protocol):
    """What the intake needs of a DuckDB connection."""

    def execute(self, query: str, parameters: Any = ...) -> Any: ...
    def register(self, view_name: str, python_object: Any) -> Any: ...
    def unregister(self, view_name: str) -> Any: ...


class JournalSource(Protocol):
    """What the ledger needs of a store."""

    @property
    def waiting(self) -> Waiting: ...
    def get_many(self, keys: Sequence[Digest]) -> dict[Digest, Entry | FrameError]: ...
    def get_questions(self, keys: Sequence[Digest]) -> dict[Digest, Question]: ...
    def get_object(self, name: str) -> bytes | None: ...
    def frames(self) -> Iterator[tuple[Digest, bytes]]: ...


def execute(connection: Connection, sql: str, params: Sequence[Any] = ()) -> Any:
    """Run one statement of ours with values for its ``?`` or ``$1``, of which it has none elsewhere.

    They are written into it, because DuckDB imports pandas, where that is installed, to see whether a *bound* value is one of its
    kinds: half a second at the end of each run. (A prepared statement cannot create a table.)
    """
    if not params:
        return connection.execute(sql)
    following = iter(params)

    def write(found: re.Match[str]) -> str:
        return literal(params[int(found[1]) - 1] if found[1] else next(following))

    return connection.execute(_PLACE.sub(write, sql))


class Intake:
    """Rows on their way into the tables, within one transaction."""

    def __init__(self, connection: Connection, store: JournalSource) -> None:
        self.events = self.entries = self.skipped = 0
        self._connection = connection
        self._store = store
        self._rows: dict[str, list[Row]] = {}
        self._waiting_rows = self._waiting_bytes = 0
        self._keys: dict[Digest, None] = {}
        self._json: dict[Digest, str | None] = {}
        self._dtypes: dict[Digest, str | None] = {}
        self._told: dict[tuple[str, str, str], set[Row]] = {}
        self._any_removed = bool(connection.execute("SELECT 1 FROM removals LIMIT 1").fetchall())
        self._stored: dict[str, Row] = {}  # keys that may be back, as rows of ``removals``
        self._walked: set[Digest] = set()  # keys that were met in the store itself: the journal need not tell them
        self._place = -1
        self._fields = self._known("SELECT digest FROM fields")
        self._models = self._known("SELECT digest FROM models")

    def last_seq(self, store_id: str) -> int:
        """How far this store's journal has been taken in."""
        found = execute(self._connection, "SELECT max(last_seq) FROM synced WHERE store = ?", [store_id]).fetchall()
        return found[0][0] or 0

    def is_told_again(self, store_id: str, last: int) -> int | None:
        """After which number events wait that have numbers up to ``last`` and are new to this ledger; None where there are none.

        A store that was put back from a backup, and a copy of a store, give out numbers for the second time, and what is new
        would be taken for what is known. None of it is of a run that the ledger knows; what waited in the backup is, and so is
        what a killed sync had told and not forgotten.
        """
        place = told = 0
        runs: set[str] = set()
        while place < last and (events := self._store.waiting.read(after=place, limit=1000 if place else 1)):
            if not place:
                runs = {run for (run,) in execute(self._connection, _RUNS_THROUGH, [store_id, last]).fetchall()}
            for number, event in events:
                if number > last:
                    return told if place > told else None
                place, told = number, number if event.run in runs else told
        return told if place > told else None

    def take(self, store_id: str, seq: int, event: Event) -> None:
        """One event of the journal."""
        self.events += 1
        if isinstance(event, Removed):
            self._any_removed = True
            about = (event.why, event.run or None, event.at)
            self._add("removals", [(store_id, seq, self._next_place(), key.hex(), *about) for key in event.keys])
            return
        if isinstance(event, Stored):
            if self._any_removed:
                self._note_stored(store_id, seq, event.run, [key.hex() for key in event.keys])
            self._keys.update((key, None) for key in map(Digest, event.keys) if key not in self._walked)
            if len(self._keys) >= _READ_KEYS:
                self._take_keys()
            return
        try:
            for table, rows in event_rows(store_id, seq, event).items():
                self._add(table, self._new(table, rows) if table in _ONCE else rows)
        except (ValueError, TypeError, AttributeError):
            # Columns of unequal length or another type: one bad event must not stop the ledger for good.
            self.skipped += 1
        if isinstance(event, ModelSeen):
            self._take_model(Digest(event.root), time.time())

    def take_frames(self, store: JournalSource, progress: Callable[[int, int], None] | None = None) -> None:
        """Every entry of the store that is not in the tables yet: the anti-join of a rebuild.

        What came through the journal alone (runs, lookups, overheads, tasks, documents, scores) is not in the store any more.
        """
        self.finish()
        asked, answered = self._known("SELECT DISTINCT key FROM requests"), self._known("SELECT DISTINCT key FROM outputs")
        gone = self._known("SELECT key FROM entries_gone") if self._any_removed else set()
        for number, (key, frame) in enumerate(store.frames(), 1):
            if progress:
                progress(number, number)
            if key.hex in gone:
                self._note_stored(store.waiting.id(), None, "", [key.hex])
            if key.hex in asked and key.hex in answered:
                continue
            try:
                self._take_entry(decode_entry(key, frame), decode_question(key, frame))
                self._walked.add(key)
            except FrameError:
                self.skipped += 1

    def finish(self) -> None:
        """Write what is still on its way."""
        self._take_keys()
        self._flush()
        self._take_back()

    def _note_stored(self, store_id: str, seq: int | None, run: str, keys: list[str]) -> None:
        row = (store_id, seq, self._next_place())
        self._stored.update((key, (*row, key, "stored", run or None, time.time())) for key in keys)
        if len(self._stored) > _FLUSH_ROWS:
            self._flush()
            self._take_back()

    def _take_back(self) -> None:
        """Of the keys that were stored, those that had left the store before are there again."""
        stored, self._stored = self._stored, {}
        if stored:
            keys = quoted(",".join(stored))
            known = self._known(f"SELECT DISTINCT key FROM removals WHERE key IN (SELECT unnest(split({keys}, ','))::UUID)")
            if back := [row for key, row in stored.items() if key in known]:
                insert_rows(self._connection, "removals", back)

    def _next_place(self) -> int:
        if self._place < 0:
            self._place = self._connection.execute("SELECT coalesce(max(place), 0) FROM removals").fetchall()[0][0]
        self._place += 1
        return self._place

    def _take_keys(self) -> None:
        keys, self._keys = list(self._keys), {}
        for start in range(0, len(keys), _READ_KEYS):
            chunk = keys[start : start + _READ_KEYS]
            entries, questions = self._store.get_many(chunk), self._store.get_questions(chunk)
            for key in chunk:
                entry, question = entries.get(key), questions.get(key)
                if isinstance(entry, Entry) and question is not None:
                    self._take_entry(entry, question)
                else:
                    self.skipped += 1

    def _take_entry(self, entry: Entry, question: Question) -> None:
        self.entries += 1
        self._take_model(question.model, entry.created_at)
        self._add("requests", [request_row(entry.key, question, self._read_fields)])
        dtype = self._dtypes.get(question.environment)
        self._waiting_bytes += sum(len(array.data) for array in entry.result.arrays.values())
        self._waiting_bytes += len(question.tokens) + len(entry.result.tokens) + len(entry.result.text or "")
        self._add("outputs", [output_row(entry, question.recorded, dtype)])

    def _take_model(self, root: Digest, seen_at: float) -> None:
        if root.hex in self._models:
            return
        self._models.add(root.hex)
        data = self._store.get_object(f"model/{root.hex}")
        if data is None:
            return  # its name and digest stay known; the next sync that meets it looks again
        try:
            for table, rows in model_rows(Manifest.from_bytes(data), data, seen_at).items():
                self._add(table, rows)
        except CanonicalError:
            self.skipped += 1

    def _read_fields(self, digest: Digest) -> str | None:
        """Settings or an environment as JSON; the exact bytes are added to ``fields`` on the first meeting."""
        if digest not in self._json:
            data = self._store.get_object(f"fields/{digest.hex}")
            fields = None
            if data is not None:
                with contextlib.suppress(CanonicalError):
                    fields = decode(data)
                if digest.hex not in self._fields:
                    self._fields.add(digest.hex)
                    self._add("fields", [(digest.hex, data)])
            self._json[digest] = None if fields is None else render_json(fields)
            named = fields.get("dtype") if isinstance(fields, dict) else None
            self._dtypes[digest] = named if isinstance(named, str) else None
        return self._json[digest]

    def _new(self, table: str, rows: list[Row]) -> list[Row]:
        """The rows of ``tasks`` or ``documents`` that are neither in the ledger nor on their way: every run tells them all again.

        Asked by task, and not before one is met: what a sync of other things costs must not grow with the ledger.
        """
        new = []
        for row in rows:
            client, task, *identity = row[:4]
            known = self._told.get((table, client, task))
            if known is None:
                sql = f"SELECT {_ONCE[table]} FROM {table} WHERE client = ? AND task = ?"
                known = self._told[table, client, task] = set(execute(self._connection, sql, [client, task]).fetchall())
            if tuple(identity) not in known:
                known.add(tuple(identity))
                new.append(row)
                self._waiting_bytes += sum(len(value) for value in row if isinstance(value, str))
        return new

    def _known(self, sql: str) -> set[str]:
        return {row[0].hex for row in self._connection.execute(sql).fetchall()}

    def _add(self, table: str, rows: list[Row]) -> None:
        self._rows.setdefault(table, []).extend(rows)
        self._waiting_rows += len(rows)
        if self._waiting_rows > _FLUSH_ROWS or self._waiting_bytes > _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        rows, self._rows = self._rows, {}
        self._waiting_rows = self._waiting_bytes = 0
        for table, waiting in rows.items():
            for start in range(0, len(waiting), _FLUSH_ROWS):
                insert_rows(self._connection, table, waiting[start : start + _FLUSH_ROWS])


_READ_AS = {  # SQL type → (type of the member in JSON, expression over the member)
    "JSON": ("VARCHAR", "TRY_CAST({0} AS JSON)"),
    "BLOB": ("VARCHAR", "unhex({0})"),
    "TIMESTAMP": ("BIGINT", "make_timestamp({0})"),
}


def insert_rows(connection: Connection, table: str, rows: list[Row]) -> None:
    """Add rows: plain columns as one JSON text that DuckDB takes apart, lists as arrays that it scans in place.

    A value of an unexpected kind becomes NULL and does not keep everything behind it out of the ledger for good. Rejected:
    `executemany` (a plan per row), list parameters (minutes for 10,000 lists of 300 tokens), and arrays of Python objects, for
    which duckdb looks for pandas value by value. Cost: 5 µs a row, 0.1 µs an item of a list.
    """
    plain: dict[str, list[Any]] = {"row_": list(range(len(rows)))}
    members, selected, joins = ['"row_":"INTEGER"'], [], ""
    for place, (column, kind) in enumerate(COLUMNS[table].items()):
        values = [row[place] for row in rows]
        if kind.endswith("[]"):
            connection.register(f"{column}_of", _flat(values))
            joins += (
                f" LEFT JOIN (SELECT row_, list(item ORDER BY place) AS items FROM {column}_of GROUP BY row_) {column}_"
                f" ON {column}_.row_ = r.row_"
            )
            selected.append(f"coalesce({column}_.items, []::{kind})")
            continue
        read_as, expression = _READ_AS.get(kind, (kind, "{0}"))
        members.append(f'"{column}":"{read_as}"')
        selected.append(expression.format(f"r.{column}"))
        plain[column] = [_member(kind, value) for value in values]
    text = json.dumps([dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)])
    given = f"from_json({quoted(text)}, '[{{{','.join(members)}}}]')"
    connection.execute(
        f"INSERT INTO ledger.{table} ({', '.join(COLUMNS[table])}) SELECT {', '.join(selected)} "
        f"FROM (SELECT unnest({given}, recursive := true)) r{joins} ORDER BY r.row_"
    )
    for column, kind in COLUMNS[table].items():
        if kind.endswith("[]"):
            connection.unregister(f"{column}_of")


def _member(kind: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if kind == "TIMESTAMP":
        return round(value * 1_000_000)
    if kind == "BLOB":
        return value.hex()
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "replace").decode()  # lone surrogates are not text to DuckDB
    return value


def _flat(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of different lengths as one column with the row and the place of each item."""
    lengths = np.array([len(array) for array in arrays])
    starts = np.cumsum(lengths) - lengths
    return {
        "row_": np.repeat(np.arange(len(arrays)), lengths),
        "place": np.arange(int(lengths.sum())) - np.repeat(starts, lengths),
        "item": np.concatenate(arrays),
    }
