"""Planning: a cache that looks requests up, writes down what it found, and neither computes nor stores anything.

`evalcache plan -- CMD` runs the command with this in the place of its cache. The client goes as far as its requests; then this
process ends, and the launcher reads what was written down (`plan.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from evalcache.cache import Cache
from evalcache.digest import Digest
from evalcache.key import keys_of
from evalcache.records import Action, Entry, Environment, Lookup, Policy
from evalcache.serving import Labels, Serving
from evalcache.structs import Struct, asdict, field
from evalcache.watch import Watch


class Looked(BaseException):
    """Requests were looked up: this is what was found, and nothing more is done with them.

    Not an Exception: between here and the client's adapter, failures of ours are caught and run bare.
    """

    def __init__(
        self, actions: Sequence[Action], keys: Sequence[Digest], lookups: Mapping[Digest, Lookup], labels: Labels | None
    ) -> None:
        super().__init__("looked up")
        self.actions, self.keys, self.lookups, self.labels = actions, keys, lookups, labels


class WouldLoad(BaseException):
    """The weights would have to be loaded to go on."""


class Group(Struct):
    """What became of the requests of one kind and task.

    Args:
        asked_kind: as the client calls them. kind: as they are stored. samples: requests that are served as one.
        hit_seconds: what the stored answers cost when they were computed. unmeasured_hits: those of which nobody knows.
        prompt_tokens, limits: of each request that would run; limits are the new tokens that it may have.
        settings: canonical bytes as hex of those that would run, each once.
    """

    asked_kind: str
    kind: str
    task: str
    hits: int = 0
    runs: int = 0
    duplicates: int = 0
    samples: int = 0
    hit_seconds: float = 0.0
    unmeasured_hits: int = 0
    uncacheable: dict[str, int] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)


class PlanCache(Cache):
    """Looks up what a client asks, and notes it.

    Args:
        folder: where this process writes what it found.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, *, policy: str | None, match: str | None, folder: str) -> None:
        given = Policy(policy or os.environ.get("EVALCACHE") or "use")
        super().__init__(directory, policy=Policy.READ_ONLY, match=match)
        self.refresh = given is Policy.REFRESH
        self.model: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self._groups: dict[tuple[str, str], Group] = {}
        self._missed: set[Digest] = set()
        self._folder = Path(folder)
        self._ended = False

    @contextlib.contextmanager
    def serving(
        self,
        watch: Watch,
        actions: Sequence[Action],
        *,
        client: str = "",
        labels: Labels | None = None,
        all_or_none: bool = False,
    ) -> Iterator[Serving]:
        """Look up, and hand what was found to the client's adapter."""
        keys = keys_of(actions)
        raise Looked(actions, keys, self._look_up(list(dict.fromkeys(keys)), all_or_none), labels)
        yield

    def group(self, asked_kind: str, kind: str, task: str) -> Group:
        """The group of one kind and task."""
        return self._groups.setdefault((asked_kind, task), Group(asked_kind, kind, task))

    def found(self, asked_kind: str, looked: Looked, sizes: Sequence[tuple[int, int]], tasks: Sequence[str]) -> None:
        """Note what was found.

        Args:
            sizes: tokens that are read, and new ones at most, of each request.
        """
        seen: set[Digest] = set()
        for place, key in enumerate(looked.keys):
            action, lookup = looked.actions[place], looked.lookups[key]
            group = self.group(asked_kind, action.request.kind, tasks[place] if tasks else "")
            if key in seen or key in self._missed:
                group.duplicates += 1
            elif isinstance(lookup, Entry) and not self.refresh:
                group.hits += 1
                cost = lookup.result.cost
                group.hit_seconds += cost.seconds if cost else 0.0
                group.unmeasured_hits += cost is None
            else:
                self._missed.add(key)
                self._runs(group, sizes[place], action.request.settings.canonical.hex())
            seen.add(key)

    def runs(self, asked_kind: str, kind: str, sizes: Sequence[tuple[int, int]], tasks: Sequence[str]) -> None:
        """Note requests that are known to run, of which no key is known. Equal ones were left out before."""
        for place, size in enumerate(sizes):
            self._runs(self.group(asked_kind, kind, tasks[place] if tasks else ""), size, "")

    def refused(self, asked_kind: str, kind: str, tasks: Sequence[str], reason: str) -> None:
        """Note requests that run as if evalcache were not there."""
        for task in tasks:
            uncacheable = self.group(asked_kind, kind, task).uncacheable
            uncacheable[reason] = uncacheable.get(reason, 0) + 1

    def meet_environment(self, environment: Environment) -> None:
        """Note where the model would answer."""
        self.model["environment"] = environment.keyed.canonical.hex()
        self.facts["device"] = str(environment.recorded.get("device_name") or "")

    def end(self, reason: str = "") -> NoReturn:
        """Write down what was found, and end this process in peace. ``reason``: why no plan can be made."""
        if not self._ended:
            self._ended = True
            told = {
                "reason": reason,
                "refresh": self.refresh,
                "model": self.model,
                **self.facts,
                "groups": [asdict(group) for group in self._groups.values()],
            }
            name = self._folder / f"{os.getpid()}"
            name.with_suffix(".part").write_text(json.dumps(told))
            name.with_suffix(".part").replace(name.with_suffix(".json"))
        if threading.current_thread() is not threading.main_thread():  # where nobody would hear of it, and others would wait
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        raise SystemExit(0)

    def _runs(self, group: Group, size: tuple[int, int], settings: str) -> None:
        group.runs += 1
        group.prompt_tokens.append(size[0])
        group.limits.append(size[1])
        if settings and settings not in group.settings:
            group.settings.append(settings)
