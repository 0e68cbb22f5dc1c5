"""States: what enters a layer, kept so that the layers below it need not run again. Losing one costs time only.

They lie in memory first, then in files (`statefolder.py`), each place bounded by bytes. Where room is short, what spares the
fewest seconds per byte goes: from memory into a file, from the files for good. What is worth no more than all that is there is
not kept, for else a sweep whose states do not fit would replace each of them just before it is asked for again. Files that nobody
has read for a day are worth nothing: the states of a model that is done with do not stand in the way of the next one's.
"""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from types import MappingProxyType

from evalcache.digest import Digest
from evalcache.forks import no_fork
from evalcache.records import Array
from evalcache.shelf import Held, Shelf
from evalcache.sigterm import undivided
from evalcache.statefolder import StateFolder
from evalcache.stateframe import State, size_bytes_of
from evalcache.structs import Frozen

__all__ = ["CLOSE_S", "State", "StateCounts", "States"]

CLOSE_S = 10.0
"""So long `States.close` goes on writing what memory holds."""

_MICROSECONDS_LIMIT = 10**15 - 1


class StateCounts(Frozen):
    """What one `States` holds and has done.

    Args:
        in_memory, in_memory_bytes, on_disk, on_disk_bytes: what is held now; one state may be in both places.
        hits: of them, ``disk_hits`` were read from files. misses: what `States.get` has not found.
        refused: states that were worth no more than what was there, or had no place. evicted: those that left for good.
        damaged: files that failed their checks.
    """

    in_memory: int
    in_memory_bytes: int
    on_disk: int
    on_disk_bytes: int
    hits: int
    disk_hits: int
    misses: int
    refused: int
    evicted: int
    damaged: int


class States:
    """States by key, for many threads; in one folder, for many processes. No fault of the folder is ever an error.

    Args:
        directory: for this alone; made when the first state goes there. None: memory only.
        memory_bytes, disk_bytes: how much may be held in memory by this process, and in files by all of them (`StateFolder` says
            how exactly); 0 for nothing. A state counts as large as its file.
    """

    def __init__(self, directory: Path | None, *, memory_bytes: int, disk_bytes: int) -> None:
        self._memory = Shelf(memory_bytes)
        self._folder = None if directory is None else StateFolder(Path(directory), disk_bytes)
        self._leaving: dict[Digest, State] = {}  # on their way from memory into files
        # A signal's handler may come here while its thread is in here.
        self._lock = threading.RLock()
        self._hits = self._disk_hits = self._misses = self._refused = self._evicted = 0

    def get(self, key: Digest) -> State | None:
        """The state that was put under ``key``, or None. Its bytes are shared and must not be changed: copy them.

        Cost: a microsecond from memory; else one reading of its file and one pass over its bytes, and now and then a look into
        the folder.
        """
        with no_fork(), self._lock:
            held = self._memory.held.get(key)
            state = self._leaving.get(key) if held is None else held.what
            if state is not None:
                self._hits += 1
                return state
        with undivided(), no_fork():  # a child must not inherit what another thread has half done
            found = None if self._folder is None else self._folder.read(key)
            with self._lock:
                self._hits += found is not None
                self._disk_hits += found is not None
                self._misses += found is None
            if found is None:
                return None
            self._hold(key, found)
            return found.what

    def has(self, key: Digest) -> bool:
        """Whether `get` should find it; a file may yet turn out to be gone or damaged. Cost: as `get`, without any reading."""
        with no_fork(), self._lock:
            if key in self._memory.held or key in self._leaving:
                return True
        return self._folder is not None and self._folder.has(key)

    def would_keep(self, size_bytes: int, *, seconds: float) -> bool:
        """Whether a state would find room now: to ask before it is copied from a device. Cost: microseconds."""
        if not 0 < seconds < math.inf:
            return False
        worth = Held(size_bytes, _microseconds(seconds)).worth
        with no_fork(), self._lock:
            if self._memory.victims(size_bytes, worth) is not None:
                return True
        return self._folder is not None and self._folder.would_keep(size_bytes, worth)

    def put(self, key: Digest, state: State, *, seconds: float) -> bool:
        """Keep a state; False if it is not worth its room or cannot be kept.

        Args:
            seconds: what it spares when it is used; a state that spares nothing is not kept.

        Raises:
            TypeError: a name, dtype or shape is not one, or a tensor's data are no bytes.

        Cost: a copy of what is not ``bytes`` already; where memory has no room, the writing of a file.
        """
        if self.has(key):
            return True
        size_bytes = size_bytes_of(state)
        kept = self.would_keep(size_bytes, seconds=seconds)
        if kept:
            # Whatever else shares the memory of a view could change it, or be kept alive by it.
            owned = State(MappingProxyType({name: _owned(array) for name, array in state.tensors.items()}), state.about)
            one = Held(size_bytes, _microseconds(seconds), owned)
            with undivided(), no_fork():
                kept = self._hold(key, one) or self._write(key, one)
        if not kept:
            with no_fork(), self._lock:
                self._refused += 1
        return kept

    @property
    def counts(self) -> StateCounts:
        """What is held, and what has happened so far."""
        folder = self._folder
        on_disk, on_disk_bytes = (0, 0) if folder is None else folder.held()
        with no_fork(), self._lock:
            return StateCounts(
                in_memory=len(self._memory.held),
                in_memory_bytes=self._memory.size_bytes,
                on_disk=on_disk,
                on_disk_bytes=on_disk_bytes,
                hits=self._hits,
                disk_hits=self._disk_hits,
                misses=self._misses,
                refused=self._refused,
                evicted=self._evicted + (0 if folder is None else folder.evicted),
                damaged=0 if folder is None else folder.damaged,
            )

    @property
    def size_bytes(self) -> int:
        """How much is held, in memory and in files."""
        counts = self.counts
        return counts.in_memory_bytes + counts.on_disk_bytes

    def close(self, *, within_s: float = CLOSE_S) -> None:
        """Let go of memory. What it holds goes into files for later processes, the most valuable first, while there is time."""
        until = time.monotonic() + within_s
        with undivided():
            with no_fork(), self._lock:
                held = sorted(self._memory.held.items(), key=lambda item: item[1].worth, reverse=True)
            for key, one in held:
                with no_fork():
                    if time.monotonic() < until:
                        self._write(key, one)
                    with self._lock:
                        self._memory.remove(key)

    # --- within ------------------------------------------------------------------------------------------------------------

    def _hold(self, key: Digest, one: Held) -> bool:
        """Into memory; what is worth less makes room there, and goes into files."""
        while True:
            with no_fork(), self._lock:
                going = self._memory.victims(one.size_bytes, one.worth)
                if going is None:
                    return False
                if not going:
                    self._memory.add(key, one)
                    return True
                leaving = self._memory.take(going)
                self._leaving.update({name: other.what for name, other in leaving.items()})
            lost = 0
            try:
                for name, other in leaving.items():
                    lost += not self._write(name, other)
            finally:
                with no_fork(), self._lock:
                    self._evicted += lost
                    self._memory.give_back(leaving)
                    for name in leaving:
                        self._leaving.pop(name, None)

    def _write(self, key: Digest, one: Held) -> bool:
        return self._folder is not None and self._folder.write(key, one)


def _microseconds(seconds: float) -> int:
    return min(max(1, round(seconds * 1e6)), _MICROSECONDS_LIMIT)


def _owned(array: Array) -> Array:
    """The same with bytes that nobody else can change."""
    return array if type(array.data) is bytes else Array(array.dtype, array.shape, memoryview(array.data).tobytes())
