"""Serving: the requests of one call on their way: what was found, what has to be computed, and what came back.

Effects are its owner's: `Cache` looks up, and takes what was computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from evalcache.digest import Digest
from evalcache.records import Action, Hit, Lookup, Result, Uncacheable

Made = tuple[Digest, Action, Result]
"""A computed entry that waits for its check."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a client calls its requests: one task and one document for each, or nothing."""

    tasks: Sequence[str] = ()
    documents: Sequence[str] = ()


@dataclass(slots=True)
class Told:
    """What became of requests, as columns of equal length; see `journal.LookedUp`."""

    keys: list[Digest] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)


class Serving:
    """The requests of one call.

    Args:
        actions, keys: one for each request. lookups: of each distinct key, in first-seen order.
        hand_over: takes entries as they are computed, every ``commit_s`` seconds and at the end; True while more will come.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        keys: Sequence[Digest],
        lookups: Mapping[Digest, Lookup],
        hand_over: Callable[[list[Made], bool], None],
        commit_s: float,
        labels: Labels | None = None,
    ) -> None:
        self._actions = actions
        self._keys = keys
        self._lookups = lookups
        self._hand_over = hand_over
        self._commit_s = commit_s
        self._labels = labels or Labels()
        self._first: dict[Digest, int] = {}
        for position, key in enumerate(keys):
            self._first.setdefault(key, position)
        self._results = {key: lookup.entry.result for key, lookup in lookups.items() if isinstance(lookup, Hit)}
        self._made: list[Made] = []
        self._since = time.monotonic()

    @property
    def missing(self) -> list[int]:
        """Positions that have to be computed, equal requests once, in first-seen order."""
        return [position for key, position in self._first.items() if key not in self._results]

    @property
    def hit_count(self) -> int:
        """How many requests the store answered, equal ones counted each."""
        return sum(isinstance(self._lookups[key], Hit) for key in self._keys)

    def put(self, position: int, result: Result) -> None:
        """Take what was computed for one of the missing positions."""
        key = self._keys[position]
        self._results[key] = result
        self._made.append((key, self._actions[position], result))
        if time.monotonic() - self._since > self._commit_s:
            self.flush(True)
            self._since = time.monotonic()

    def flush(self, more: bool = False) -> None:
        """Hand over what was computed."""
        made, self._made = self._made, []
        if made:
            self._hand_over(made, more)

    def results(self) -> list[Result]:
        """One result for each request, in their order."""
        return [self._results[key] for key in self._keys]

    def told(self, computed_only: bool = False) -> Told:
        """What became of the requests; of a call that was cut short, of those that were computed."""
        told = Told()
        for position, key in enumerate(self._keys):
            lookup = self._lookups[key]
            if key not in self._results or (computed_only and isinstance(lookup, Hit)):
                continue
            cost = self._results[key].cost
            if self._first[key] != position:
                outcome, reason = "duplicate", ""
            elif isinstance(lookup, Hit):
                outcome, reason = "hit", ""
            else:
                outcome, reason = ("uncacheable" if isinstance(lookup, Uncacheable) else "miss"), lookup.reason
            told.keys.append(key)
            told.outcomes.append(outcome)
            told.reasons.append(reason)
            told.seconds.append(cost.seconds if cost else None)
            for names, mine in ((self._labels.tasks, told.tasks), (self._labels.documents, told.documents)):
                if names:
                    mine.append(names[position])
        return told
