"""Requests of somebody's own eval loop on their way: which have to be computed, and what came back. Runs nothing.

Requests and answers are strings or JSON. They are kept as text, so that what comes back is exactly what went in, whatever its
order of names, and the ledger can be asked for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from evalcache.cache import COMMIT_S
from evalcache.canonical import digest_canonical
from evalcache.code import class_name
from evalcache.digest import Digest
from evalcache.errors import EvalCacheError
from evalcache.records import Action, Cost, Environment, Fields, Request, Result
from evalcache.serving import Labels, Serving

KIND = "answer"


class Asked:
    """The requests of one call: which have to be computed, and what came back."""

    def __init__(
        self, requests: Sequence[Any], samples: int | None, tasks: str | Sequence[str], documents: Sequence[str]
    ) -> None:
        if samples is not None and (type(samples) is not int or samples < 1):
            raise EvalCacheError(f"samples={samples!r}", hint="a number of answers for each request, or None", found=samples)
        self._requests = requests
        self._samples = samples
        self._draws = samples or 1
        tasks = [tasks] * len(requests) if isinstance(tasks, str) and tasks else tasks
        for what, labels in (("tasks", tasks), ("documents", documents)):
            if labels and len(labels) != len(requests):
                raise EvalCacheError(
                    f"{len(labels)} {what} for {len(requests)} requests", hint="give one each", found=len(labels)
                )
        self.labels = Labels(*([str(label) for label in labels for _ in range(self._draws)] for labels in (tasks, documents)))
        self._slots = [(place, draw) for place in range(len(requests)) for draw in range(self._draws)]
        self.device = ""
        """That computes the answers; empty where nobody knows."""
        self._serving: Serving | None = None
        self._missing = self._computed = list(range(len(self._slots)))
        self._bare: list[Any] | None = [None] * len(self._slots)  # the answers of a run without a cache
        self._given: set[int] = set()
        self._waiting: list[tuple[int, str, bool]] = []
        self._since = self._kept_at = time.perf_counter()

    @property
    def missing_count(self) -> int:
        """How many answers are not in the store."""
        return len(self._missing)

    def portions(self) -> Iterator[list[Any]]:
        """What ``compute`` is given: everything that is missing, at once; without what another process computes right now, of
        which comes later what that one has given up. Each has to be answered before the next is asked for, which may block.

        Raises:
            EvalCacheError: something was left without an answer.
        """
        for mine in [self._missing] if self._serving is None else self._serving.claims([self._missing]):
            if not mine:
                continue
            self._computed, self._given = mine, set()
            self._since = self._kept_at = time.perf_counter()
            yield [self._requests[self._slots[place][0]] for place in mine]
            self.keep()
            if len(self._given) < len(mine):
                raise broken(f"answered {len(self._given)} of {len(mine)} requests")

    def actions(self, model: Digest, settings: Fields, environment: Environment, strict: bool) -> list[Action]:
        """One for each draw of each request."""
        texts = [encode_json(request, f"request {place}") for place, request in enumerate(self._requests)]
        if strict:
            batch = digest_canonical([list(one) for one in texts]).value
            environment = Environment(Fields(dict(environment.keyed) | {"batch": batch}), environment.recorded)
        inputs = [{"json" if is_json else "text": text} for text, is_json in texts]
        return [
            Action(model, Request(KIND, b"", settings, inputs[place] | ({"draw": draw} if draw else {})), environment)
            for place, draw in self._slots
        ]

    def serve(self, serving: Serving) -> None:
        """From here on answers go to the store."""
        self._serving, self._bare = serving, None
        self._missing = serving.missing

    def take(self, made: Any) -> None:
        """What ``compute`` returned: a list in order, or an iterator of pairs."""
        if isinstance(made, Sequence) and not isinstance(made, (str, bytes)):
            if len(made) != len(self._computed):
                raise broken(f"returned {len(made)} answers for {len(self._computed)} requests")
            made = enumerate(made)
        elif not isinstance(made, Iterator):
            raise broken(f"returned a {type(made).__name__}")
        for pair in made:
            self.put(pair)

    def put(self, pair: Any) -> None:
        """One answer, with its place among the missing."""
        if not (isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is int):
            raise broken(f"yielded a {type(pair).__name__}")
        index, answer = pair
        if not 0 <= index < len(self._computed) or index in self._given:
            raise broken(f"answered request {index} of {len(self._computed)} {'twice' if index in self._given else ''}".rstrip())
        self._given.add(index)
        place = self._computed[index]
        if self._bare is not None:
            self._bare[place] = answer
            return
        if answer is None:
            raise EvalCacheError(
                f"compute has no answer to request {index}: None is never kept as one",
                hint="raise what went wrong (what was answered is kept), or answer with a value that says so", found=None,
            )  # fmt: skip
        self._waiting.append((place, *encode_json(answer, f"answer {index}")))
        if time.perf_counter() - self._kept_at > COMMIT_S:
            self.keep(True)

    def keep(self, more: bool = False) -> None:
        """Hand over what was answered since the last time, with the seconds that it took."""
        now = time.perf_counter()
        waiting, self._waiting = self._waiting, []
        if not waiting or self._serving is None:
            return
        length = sum(len(text) for _, text, _ in waiting)
        for place, text, is_json in waiting:
            seconds = (now - self._since) * (len(text) / length if length else 1 / len(waiting))
            # How many tokens that was, nobody said.
            cost = Cost(seconds, None, None, self.device, len(waiting))
            self._serving.put(place, Result(text=text, scalars={"json": True} if is_json else {}, cost=cost))
        if more:
            self._serving.flush(True)
        self._since = self._kept_at = now

    def answers(self) -> list[Any]:
        """In the order of the requests."""
        # Read anew for each, so that equal requests do not share one list.
        found = self._bare if self._serving is None else [_decode(result) for result in self._serving.results()]
        assert found is not None
        if self._samples is None:
            return list(found)
        return [found[start : start + self._draws] for start in range(0, len(found), self._draws)]


def encode_json(value: Any, what: str) -> tuple[str, bool]:
    """(text, whether it is JSON) of a value: a string is itself, all else JSON that says exactly what it was."""
    if type(value) is str and value.isascii():
        return value, False
    if type(value) is str:
        try:
            value.encode()
            return value, False
        except UnicodeEncodeError:  # half a surrogate pair: JSON can say it
            return json.dumps(value), True
    check_json(value, what)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True), True


def _decode(result: Result) -> Any:
    return json.loads(result.text or "") if result.scalars.get("json") else result.text


def check_json(value: Any, what: str) -> None:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return
    if kind is list:
        for index, item in enumerate(value):
            check_json(item, f"{what}[{index}]")
    elif kind is dict and all(type(name) is str for name in value):
        for name, item in value.items():
            check_json(item, f"{what}[{name!r}]")
    else:
        raise EvalCacheError(
            f"{what} is a {class_name(kind)}, which JSON cannot say exactly",
            hint="use strings, numbers, lists, and dicts with names of text", found=kind.__name__,
        )  # fmt: skip


def broken(what: str) -> EvalCacheError:
    return EvalCacheError(
        f"compute {what}", hint="return a list with one answer for each request, or yield (index, answer)", found=what
    )
