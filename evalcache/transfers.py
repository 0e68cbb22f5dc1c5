"""Transfers: which entries a store has yet to give to other machines, and which of their segments it knows. See `segments.py`.

| row | value, sealed |
|---|---|
| ``segment/shared`` | the folder that is shared; a store without this row gives nothing |
| ``segment/due/<id>`` | keys that were committed here and are in no segment yet, written in the transaction that committed them |
| ``segment/gave/<name>`` | the keys of a segment that this store has written |
| ``segment/took/<name>`` | nothing: a segment whose entries are here |
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence

from evalcache.digest import SIZE_BYTES, Digest
from evalcache.errors import FrameError
from evalcache.frame import seal, unseal
from evalcache.rows import Rows

_SHARED = "segment/shared"
_DUE = ("segment/due/", "segment/due0")  # "0" follows "/"
_GAVE = ("segment/gave/", "segment/gave0")
_TOOK = ("segment/took/", "segment/took0")
_SCAN_ROWS = 1000
_FRAMES = 256  # in memory at once: some hold tensors


class Transfers:
    """The transfers of one store."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._on: bool | None = None

    def begin(self, folder: str) -> None:
        """From here on, what is committed is due.

        Raises:
            StoreError: the store cannot be written.
        """
        if self._rows.get(_SHARED) is None:
            with self._rows.transaction("sharing it"):
                self._rows.add(_SHARED, seal(_SHARED, folder.encode()))
        self._on = True

    def note(self, keys: Sequence[bytes]) -> None:
        """These entries are due, where anything is. Within the transaction that writes them."""
        if self._on is None:
            self._on = self._rows.get(_SHARED) is not None
        if self._on and keys:
            row = f"{_DUE[0]}{uuid.uuid4().hex}"
            self._rows.put([(row, seal(row, b"".join(keys)))])

    def due(self) -> dict[str, list[Digest]]:
        """Row → keys that no segment has yet. Damaged rows are set aside: their entries stay here."""
        return self._keys(*_DUE)

    def frames(self, keys: Sequence[Digest]) -> Iterator[tuple[Digest, bytes]]:
        """The entries under these keys as they lie here, unchecked and in no order."""
        for start in range(0, len(keys), _FRAMES):
            for rows in self._rows.select(keys[start : start + _FRAMES], []):
                yield from ((Digest(key), frame) for key, frame in rows)

    def gave(self, name: str, keys: Sequence[Digest], rows: Iterable[str]) -> None:
        """A segment with these keys has been written; the rows of `due` are done.

        Raises:
            StoreError: the store cannot be written.
        """
        row = f"{_GAVE[0]}{name}"
        with self._rows.transaction("noting a segment"):
            self._rows.put([(row, seal(row, b"".join(key.value for key in keys)))])
            self._rows.drop(rows)

    def took(self, name: str) -> None:
        """The entries of a segment are here.

        Raises:
            StoreError: the store cannot be written.
        """
        row = f"{_TOOK[0]}{name}"
        with self._rows.transaction("noting a segment"):
            self._rows.put([(row, seal(row, b""))])

    def known(self) -> set[str]:
        """Names of the segments whose entries are here, given and taken."""
        return set(self._names(*_GAVE)) | set(self._names(*_TOOK))

    def give_again(self, there: Iterable[str]) -> int:
        """What was given in segments that are not ``there`` any more is due again. Returns how many segments that were.

        Raises:
            StoreError: the store cannot be written.
        """
        lost = set(self._names(*_GAVE)) - set(there)
        if not lost:
            return 0
        kept = self._keys(*_GAVE)
        with self._rows.transaction("giving segments again"):
            for name in lost:
                row = f"{_GAVE[0]}{name}"
                self.note([key.value for key in kept.get(row, [])])
                self._rows.drop([row])
        return len(lost)

    def _names(self, after: str, before: str) -> Iterator[str]:
        # Without the values: those of `gave` are as large as all keys that were ever given.
        named = "SELECT key FROM Cache WHERE raw = 1 AND key > ? AND key < ?"
        yield from (row.removeprefix(after) for (row,) in self._rows.query(named, (after, before)))

    def _keys(self, after: str, before: str) -> dict[str, list[Digest]]:
        found: dict[str, list[Digest]] = {}
        start = after
        while rows := self._rows.scan(start, before, _SCAN_ROWS):
            bad = []
            for row, value in rows:
                try:
                    data = unseal(row, value)
                    found[row] = [Digest(data[place : place + SIZE_BYTES]) for place in range(0, len(data), SIZE_BYTES)]
                except (FrameError, ValueError) as error:
                    bad.append((row, value, str(error)))
            self._rows.set_aside(bad)
            start = rows[-1][0]
        return found
