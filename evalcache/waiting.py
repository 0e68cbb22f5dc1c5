"""Waiting: the rows of a store that wait for the ledger, and the numbers under which it is told of them.

| row | value, sealed |
|---|---|
| ``journal/<20 digits>`` | one event (`journal.py`); numbers only rise, also after rows were forgotten |
| ``store/state`` | the store's id and the last number given out |

The ledger knows an event by the store's id and the number, and takes none in twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from evalcache.canonical import decode, encode_canonical
from evalcache.errors import CanonicalError, CorruptEntryWarning, FrameError, NewerEventError, StoreError
from evalcache.faults import tell
from evalcache.frame import seal, unseal
from evalcache.journal import Event, decode_event
from evalcache.rows import Rows

STATE = "store/state"
_ROWS = ("journal/", "journal0")  # "0" follows "/": the first text after every row of the kind


class Waiting:
    """The waiting events of one store, in order of their numbers."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def id(self) -> str:
        """32 hex digits, drawn when the store was made; numbers are unique under it. Raises: `StoreError`."""
        with self._rows.transaction("reading its id"):
            return self.state()[0]

    def append(self, events: Sequence[bytes]) -> None:
        """Give encoded events the next numbers. Within a transaction."""
        if events:
            store_id, last = self.state()
            rows = [(_row(last + place), data) for place, data in enumerate(events, 1)]
            self._rows.put((row, seal(row, data)) for row, data in rows)
            self._set_state(store_id, last + len(rows))

    def read(self, after: int = 0, limit: int = 1000) -> list[tuple[int, Event]]:
        """The events with a number above ``after``, in order; an empty list means that there are no more.

        Rows that cannot be read are set aside with a warning.
        """
        events: list[tuple[int, Event]] = []
        start = _row(after)
        while not events and (rows := self._rows.scan(start, _ROWS[1], limit)):
            start = rows[-1][0]
            bad = []
            for row, value in rows:
                try:
                    events.append((int(row.removeprefix(_ROWS[0])), decode_event(unseal(row, value))))
                except NewerEventError:
                    if not events:
                        raise
                    break
                except (FrameError, CanonicalError, ValueError) as error:
                    bad.append((row, value, str(error)))
            self._rows.set_aside(bad)
        return events

    def count(self) -> int:
        """How many there are."""
        return self._rows.count(*_ROWS)

    def has_forgotten(self) -> bool:
        """Whether a ledger has been told anything of this store before: what it was told then is not here any more."""
        with self._rows.transaction("reading its journal"):
            return self.state()[1] > self.count()

    def forget(self, through: int) -> None:
        """Delete those up to and including this number: the ledger has committed and re-read them. Raises: `StoreError`."""
        with self._rows.transaction("forgetting journal rows"):
            self._rows.delete(_ROWS[0], _row(through))

    def begin_anew(self, after: int) -> str:
        """Tell what waits above this number under a new id, which is returned, and forget the rest. Raises: `StoreError`."""
        with self._rows.transaction("taking a new id"):
            self._rows.delete(_ROWS[0], _row(after))
            return self._draw_id(self.state()[1])

    def state(self) -> tuple[str, int]:
        """Id and last number, made where absent. Within a transaction.

        A damaged row gets a *new* id: under the old one, numbers given out twice would be skipped by a ledger that has seen them.
        """
        try:
            sealed = self._rows.get(STATE)
            if sealed is not None:
                store_id, last = decode(unseal(STATE, sealed))
                return store_id, last
        except (FrameError, CanonicalError, StoreError, ValueError, TypeError) as error:
            tell(f"{self._rows.directory}: the store gets a new id: {error}", CorruptEntryWarning, stacklevel=4)
        rows = self._rows.query("SELECT MAX(key) FROM Cache WHERE raw = 1 AND key > ? AND key < ?", _ROWS)
        last = int(rows[0][0].removeprefix(_ROWS[0])) if rows[0][0] else 0
        return self._draw_id(last), last

    def _draw_id(self, last: int) -> str:
        store_id = uuid.uuid4().hex
        self._set_state(store_id, last)
        return store_id

    def _set_state(self, store_id: str, last: int) -> None:
        self._rows.put([(STATE, seal(STATE, encode_canonical([store_id, last])))])


def _row(number: int) -> str:
    return f"{_ROWS[0]}{number:020d}"
