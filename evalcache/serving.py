"""Serving: the requests of one call on their way: what was found, what has to be computed, and what came back.

Effects are its owner's: `Cache` looks up, and takes what was computed.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from evalcache.digest import Digest
from evalcache.errors import StoreError
from evalcache.leases import Leases
from evalcache.records import Action, Cost, Entry, Lookup, Result, Uncacheable
from evalcache.structs import Frozen, replace

Made = tuple[Digest, Action, Result]
"""A computed entry that waits for its check."""

_PORTION_S = 0.5  # portions that take less are put together, so that claiming them stays cheap
_ALONE_S = 0.1  # after a portion that took less, one that began alone does not ask whether it still is
_PAUSE_S = (0.05, 0.5)  # between two looks at what others compute: at first, and at most
_PATIENCE_S = (30.0, 600.0)  # for another process that seems to live and brings nothing: at least, and at most
_PATIENCE_PORTIONS = 10  # in between, as long as so many portions of ours took

Compute = Callable[[Sequence[int]], Iterable[tuple[int, Result]]]
"""Given the positions to compute (misses only, duplicates merged, in first-seen order), gives (position, result) for each, in any
order and as they are made: a long call is checked and committed every few seconds."""
Portions = Callable[[list[int]], Iterable[Sequence[int]]]
"""Given the positions that are missing, gives them again, split into what is computed together."""


class Labels(Frozen):
    """What a client calls its requests: one task and one document for each, or nothing."""

    tasks: Sequence[str] = ()
    documents: Sequence[str] = ()


class Told(Frozen):
    """What became of requests, as columns of equal length; see `journal.LookedUp`."""

    keys: Sequence[Digest] = ()
    outcomes: Sequence[str] = ()
    reasons: Sequence[str] = ()
    seconds: Sequence[float | None] = ()
    tasks: Sequence[str] = ()
    documents: Sequence[str] = ()
    devices: Sequence[str] = ()
    origins: Sequence[str] = ()


class Serving:
    """The requests of one call.

    Args:
        actions, keys: one for each request. lookups: of each distinct key, in first-seen order.
        hand_over: takes entries as they are computed, between two batches after every ``commit_s`` seconds and at the end; True
            where they should be stored now.
        leases: what other processes on the store leave to us, and we to them. look: hits among keys that missed before.
        fault: told of a store that does not answer. together: where one has to be computed, all are.
        looked_at: Unix seconds before the lookups; None means now. taking: put around all that `claims` does but computing.
        run: id of the run; a hit on what it has itself computed is told as such.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        keys: Sequence[Digest],
        lookups: Mapping[Digest, Lookup],
        hand_over: Callable[[list[Made], bool], None],
        commit_s: float,
        labels: Labels | None = None,
        *,
        leases: Leases | None = None,
        look: Callable[[list[Digest]], Mapping[Digest, Entry]] = lambda keys: {},
        fault: Callable[[StoreError], None] = lambda error: None,
        together: bool = False,
        looked_at: float | None = None,
        taking: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        run: str = "",
    ) -> None:
        self._actions = actions
        self._keys = keys
        self._lookups = dict(lookups)
        self._hand_over = hand_over
        self._commit_s = commit_s
        self._labels = labels or Labels()
        self._first: dict[Digest, int] = {}
        for position, key in enumerate(keys):
            self._first.setdefault(key, position)
        self._results = {key: lookup.result for key, lookup in lookups.items() if isinstance(lookup, Entry)}
        self._made: list[Made] = []
        self._handed_at = time.monotonic()
        self._leases = leases
        self._look = look
        self._fault = fault
        self._together = together
        self._looked_at = time.time() if looked_at is None else looked_at
        self._ending = contextlib.ExitStack()
        self._merged = 1
        self._longest_s = 0.0
        self._taking = taking
        self._run = run

    @property
    def missing(self) -> list[int]:
        """Positions that have to be computed, equal requests once, in first-seen order."""
        return [position for key, position in self._first.items() if key not in self._results]

    @property
    def hit_count(self) -> int:
        """How many requests the store answered, equal ones counted each."""
        return sum(isinstance(self._lookups[key], Entry) for key in self._keys)

    def claims(self, portions: Iterable[Sequence[int]]) -> Iterator[list[int]]:
        """What to compute now of the missing positions, portion by portion; each has to be `put` before the next is asked for.

        What another process has finished meanwhile is a hit and is not asked for; what another one computes right now is left
        to it, and waited for at the end. Portions come in order, or in reverse where another process began at the front; short
        ones are put together.

        Args:
            portions: the missing positions, split into what is computed together.
        """
        queue = deque(list(portion) for portion in portions if portion)
        if self._together:
            queue = deque([[position for portion in queue for position in portion]] if queue else [])
        if self._leases is None:
            while queue:
                yield queue.popleft()
                if queue:
                    self._flush_if_due()
            return
        self._ending.enter_context(self._leases.computing())
        put_off: list[int] = []
        while queue:
            mine: list[int] = []
            wanted = 1
            # Where others have most of a portion, the next one fills it up: a device dislikes small batches.
            while queue and 2 * len(mine) < wanted:
                portion = [position for _ in range(min(self._merged, len(queue))) for position in self._next(queue)]
                wanted = max(wanted, len(portion))
                mine += self._claim(portion, put_off)
            if mine:
                yield from self._portion(mine)
                if queue:
                    self._flush_if_due()
        yield from self._wait(put_off)

    def _next(self, queue: deque[list[int]]) -> list[int]:
        # Two that begin together at the same end would be in each other's way until the other end.
        return queue.pop() if self._leases is not None and self._leases.turn % 2 else queue.popleft()

    def _claim(self, portion: list[int], put_off: list[int]) -> list[int]:
        """Those that are ours to compute; what others compute goes to ``put_off``, and what they have finished is a hit."""
        if self._leases is None:
            return portion
        with self._taking():
            return self._lease(portion, put_off)

    def _lease(self, portion: list[int], put_off: list[int]) -> list[int]:
        assert self._leases is not None
        try:
            ours = self._leases.claim([self._keys[position] for position in portion])
            # After claiming: what was finished in between would be computed again.
            if self._leases.met_at >= self._looked_at:
                self._find(portion)
            left = self._left(portion)
            mine = [position for position in left if self._keys[position] in ours]
            if self._together and len(mine) < len(portion):
                mine = []
            kept = {self._keys[position] for position in mine}
            put_off += [position for position in left if self._keys[position] not in kept]
            self._leases.release(ours - kept)
        except StoreError as error:
            self._go_without(error)
            return self._left(portion)
        return mine

    def _portion(self, mine: list[int]) -> Iterator[list[int]]:
        began = time.monotonic()
        yield mine
        took_s = time.monotonic() - began
        self._longest_s = max(self._longest_s, took_s)
        if took_s < _PORTION_S:
            self._merged *= 2
        elif took_s > 4 * _PORTION_S:
            self._merged = max(1, self._merged // 2)
        if self._leases is None:
            return
        with self._taking():
            self._give_up(mine, took_s)

    def _give_up(self, mine: list[int], took_s: float) -> None:
        assert self._leases is not None
        try:
            if (self._leases.shared or took_s > _ALONE_S) and self._leases.others():
                self.flush(True)  # others wait for it
            self._leases.release(self._keys[position] for position in mine)
        except StoreError as error:
            self._go_without(error)

    def _wait(self, waiting: list[int]) -> Iterator[list[int]]:
        """Until others have finished what was left to them; what they give up is ours."""
        pause_s, since = _PAUSE_S[0], time.monotonic()
        while waiting:
            mine: list[int] = []
            count = len(waiting)
            with self._taking():
                self._find(waiting)
            waiting = self._left(waiting)
            if self._leases is None or time.monotonic() - since > self._patience_s():
                mine, waiting = waiting, []
            elif self._is_free(waiting):
                put_off: list[int] = []
                mine, waiting = self._claim(waiting, put_off), put_off
            if mine:
                yield from self._portion(mine)
            if mine or len(waiting) < count:
                pause_s, since = _PAUSE_S[0], time.monotonic()
            elif waiting:
                with self._taking():
                    time.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S[1])

    def _patience_s(self) -> float:
        least, most = _PATIENCE_S
        return min(max(_PATIENCE_PORTIONS * self._longest_s, least), most) if self._longest_s else most

    def _is_free(self, waiting: list[int]) -> bool:
        try:
            return self._leases is not None and bool(waiting) and self._leases.any_free([self._keys[one] for one in waiting])
        except StoreError as error:
            self._go_without(error)
            return False

    def _find(self, positions: list[int]) -> None:
        """Take what other processes have stored since it missed."""
        found = self._look([self._keys[position] for position in positions])
        if self._together and len(found) < len(positions):
            return
        for key, entry in found.items():
            self._lookups[key] = entry
            self._results[key] = entry.result

    def _left(self, positions: list[int]) -> list[int]:
        return [position for position in positions if self._keys[position] not in self._results]

    def _go_without(self, error: StoreError) -> None:
        self._leases = None
        self._fault(error)

    def put(self, position: int, result: Result) -> None:
        """Take what was computed for one of the missing positions."""
        # What came before. The rows of a batch come all at once: to store its first one alone would cost a check for nothing.
        self._flush_if_due()
        key = self._keys[position]
        self._results[key] = result
        action = self._actions[position]
        if result.made:
            environment = action.environment
            action = replace(action, environment=replace(environment, recorded={**environment.recorded, **result.made}))
        self._made.append((key, action, result))

    def _flush_if_due(self) -> None:
        if time.monotonic() - self._handed_at > self._commit_s:
            self.flush(True)

    def flush(self, now: bool = False) -> None:
        """Hand over what was computed, to be stored now or when it suits."""
        self._handed_at = time.monotonic()
        made, self._made = self._made, []
        if made:
            self._hand_over(made, now)

    def close(self) -> None:
        """Hand over the rest, and give up what was claimed."""
        self.flush()
        if self._leases is not None:
            try:
                self._leases.release(self._first)
            except StoreError as error:
                self._go_without(error)
        self._ending.close()

    def results(self) -> list[Result]:
        """One result for each request, in their order."""
        return [self._results[key] for key in self._keys]

    def told(self, computed_only: bool = False) -> Told:
        """What became of the requests; of a call that was cut short, of those that were computed."""
        merged = len(self._first) < len(self._keys)
        if not merged and not computed_only and all(type(lookup) is Entry for lookup in self._lookups.values()):
            return self._told_hits()
        rows: list[tuple[int, Digest, str, str, Cost | None, str]] = []
        for position, key in enumerate(self._keys):
            result, lookup = self._results.get(key), self._lookups[key]
            hit = isinstance(lookup, Entry)
            if result is None or (computed_only and hit):
                continue
            if merged and self._first[key] != position:
                rows.append((position, key, "duplicate", "", result.cost, lookup.run if hit else ""))
            elif hit:
                rows.append((position, key, "hit", "own" if lookup.run == self._run != "" else "", result.cost, lookup.run))
            else:
                outcome = "uncacheable" if isinstance(lookup, Uncacheable) else "miss"
                rows.append((position, key, outcome, lookup.reason, result.cost, ""))
        if not rows:
            return Told()
        positions, keys, outcomes, reasons, costs, origins = zip(*rows, strict=True)
        tasks, documents = self._labels.tasks, self._labels.documents
        return Told(
            keys, outcomes, reasons,
            seconds=[cost.seconds if cost else None for cost in costs],
            tasks=[tasks[position] for position in positions] if tasks else (),
            documents=[documents[position] for position in positions] if documents else (),
            devices=[cost.device if cost else "" for cost in costs],
            origins=origins,
        )  # fmt: skip

    def _told_hits(self) -> Told:
        """`told` where each request is a hit of its own: the common case, in bulk."""
        entries = [self._lookups[key] for key in self._keys]
        costs = [entry.result.cost for entry in entries]
        return Told(
            self._keys, ("hit",) * len(entries), ["own" if entry.run == self._run != "" else "" for entry in entries],
            seconds=[cost.seconds if cost else None for cost in costs],
            tasks=self._labels.tasks, documents=self._labels.documents,
            devices=[cost.device if cost else "" for cost in costs],
            origins=[entry.run for entry in entries],
        )  # fmt: skip
