"""Shelf: what one place holds under keys, bounded by bytes, the least worth per byte first. Knows nothing of what it holds."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

from evalcache.digest import Digest
from evalcache.structs import Struct


class Held(Struct):
    """One thing in its place.

    Args:
        microseconds: what it spares when it is used. what: the thing. used: False if nobody has asked for it for long.
    """

    size_bytes: int
    microseconds: int
    what: Any = None
    used: bool = True

    @property
    def worth(self) -> float:
        """Microseconds per byte; nothing where nobody asks for it."""
        return self.microseconds / max(1, self.size_bytes) if self.used else 0.0


class Shelf:
    """Things under keys. What is held and what is reserved are never more than the limit, if `victims` is asked. Not thread-safe.

    Args:
        limit_bytes: of all together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held: dict[Digest, Held] = {}
        self.held_bytes = 0
        self.reserved_bytes = 0  # of what is on its way in or out
        # In order: to insert into a hundred thousand moves a megabyte, less than any write. Equals go by their keys, so that
        # processes which make room in one folder at the same time delete the same files.
        self._order: list[tuple[float, Digest]] = []

    @property
    def size_bytes(self) -> int:
        """How much room is not free."""
        return self.held_bytes + self.reserved_bytes

    def victims(self, size_bytes: int, worth: float) -> list[Digest] | None:
        """What has to go for something to find room, which may be nothing; None if some of that is worth as much."""
        over_bytes = self.size_bytes + size_bytes - self.limit_bytes
        going: list[Digest] = []
        while over_bytes > 0:
            if size_bytes > self.limit_bytes or len(going) == len(self._order) or self._order[len(going)][0] >= worth:
                return None
            going.append(self._order[len(going)][1])
            over_bytes -= self.held[going[-1]].size_bytes
        return going

    def add(self, key: Digest, one: Held) -> None:
        """Hold something, in the place of what was there under its key."""
        self.remove(key)
        self.held[key] = one
        self.held_bytes += one.size_bytes
        insort(self._order, (one.worth, key))

    def remove(self, key: Digest) -> None:
        """Hold it no longer, if it was held."""
        one = self.held.pop(key, None)
        if one is not None:
            self.held_bytes -= one.size_bytes
            del self._order[bisect_left(self._order, (one.worth, key))]

    def take(self, keys: Sequence[Digest]) -> dict[Digest, Held]:
        """Hold these no longer; their room is free only when it is given back."""
        taken = {key: self.held[key] for key in keys}
        for key, one in taken.items():
            self.remove(key)
            self.reserved_bytes += one.size_bytes
        return taken

    def give_back(self, taken: Mapping[Digest, Held]) -> None:
        """The room of what was taken is free."""
        self.reserved_bytes -= sum(one.size_bytes for one in taken.values())

    def refill(self, held: dict[Digest, Held]) -> None:
        """Hold these and nothing else."""
        self.held = held
        self.held_bytes = sum(one.size_bytes for one in held.values())
        self._order = sorted((one.worth, key) for key, one in held.items())
