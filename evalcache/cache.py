"""Cache: joins key, decide, store and ledger. The only file with effects on two things.

Every call goes one way: check the model → keys → lookup → decide → compute the misses → check again → commit. A computed batch
waits in memory until a check after it equals the check before it; only then does it enter the store, in one transaction with
the journal rows that tell the ledger.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evalcache.checking import Checking
from evalcache.collector import paused_for, resume
from evalcache.counts import Counts
from evalcache.decide import decide_all, policy_of
from evalcache.digest import Digest
from evalcache.errors import EvalCacheError, LedgerLockedError, StoreError, UncacheableError
from evalcache.faults import tell, tell_of_folder
from evalcache.folder import default_folder, local_folder, make_folder
from evalcache.journal import Event, LookedUp, Measured, ModelLoaded, ModelSeen, RunEnded
from evalcache.key import keys_of
from evalcache.leases import Leases, is_one_of_several_ranks
from evalcache.ledger import Ledger
from evalcache.manifest import Manifest
from evalcache.measuring import Meter
from evalcache.outbox import Outbox
from evalcache.provenance import describe_run
from evalcache.records import Action, Entry, Lookup, Miss, Policy, Result
from evalcache.serving import Compute, Labels, Made, Portions, Serving, Told
from evalcache.store import Store
from evalcache.watch import Watch

COMMIT_S = 3.0
COMMIT_SHARE = 0.01
"""A long call is checked and committed every `COMMIT_S`; less often where checks would cost more than this share of its time."""
SYNC_S = 30.0
SYNC_SHARE = 0.001
"""A long run brings the ledger up to date every `SYNC_S`; less often where that would cost more than this share of its time."""
SYNC_PATIENCE_S, END_PATIENCE_S = 1.0, 6.0
"""How long that queues behind other processes of evalcache, meanwhile and at the end. What waits is kept."""


class Cache:
    """The store, the ledger and one run that uses them.

    Args:
        directory: None means ``EVALCACHE_DIR``, or the user's cache folder. Where machines share it, `directory` is a local one.
        policy: None means ``EVALCACHE``, or ``use``. match: None means ``EVALCACHE_MATCH``, or ``portable``.
        run: id of the run (UUID hex), so that several processes of one launch are one run.

    Raises:
        EvalCacheError: a setting is unknown. StoreError: the folder cannot be used.

    Thread-safe. Cost: opening takes some 20 ms.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        policy: Policy | str | None = None,
        match: str | None = None,
        run: str | None = None,
    ) -> None:
        shared = default_folder() if directory is None else Path(directory)
        self.policy = policy_of(policy)
        self.match = match or os.environ.get("EVALCACHE_MATCH") or "portable"
        if self.match not in ("portable", "strict"):
            raise EvalCacheError(f"unknown match {self.match!r}", hint="portable or strict", found=self.match)
        self.run_id = run or uuid.uuid4().hex
        self.counts = Counts()
        self.meter = Meter()
        self.clients: dict[str, str] = {}  # those that are held on to in this process, with their versions
        self.components = os.environ.get("EVALCACHE_COMPONENTS", "0") not in ("", "0")  # may forwards begin above layers?
        self.at_end: list[Callable[[], object]] = []  # called before the last commit
        self.evicted: Any = None  # what left the store at the end, as a `pruning.Amount`
        self._client = ""  # the one of them that asked first
        self.directory = local_folder(shared)
        make_folder(self.directory)
        self.store = Store(self.directory / "store")
        self._segments = None
        if self.directory != shared:
            from evalcache.segments import Segments  # here: few cache folders are shared by machines

            self._segments = Segments(shared, self.store, pull=self.policy.reads)
        self.ledger_path = self.directory / "ledger.duckdb"
        self._lock = threading.RLock()
        writes = self.policy is not Policy.READ_ONLY
        self._outbox = Outbox(self.store, self.run_id, self.counts, self._describe, writes=writes)
        self._checking = Checking(self._outbox, self.counts, self._meet)
        self._warned: set[str] = set()
        self._synced_at = time.monotonic()
        self._sync_seconds, self._closed = 0.0, False
        self.told = False  # whether the ledger knows everything, as of the last sync
        _caches.add(self)

    @property
    def untouched(self) -> bool:
        """Whether no model has been met yet: nothing was asked, loaded or written."""
        return self._outbox.empty and self._checking.empty

    # --- one call ------------------------------------------------------------------------------------------------------

    def open(self, watch: Watch) -> Manifest:
        """Check the model before anything of it is served; lets the batches in that were computed since the last check.

        Raises:
            FingerprintError: the model cannot be hashed exactly now; what waited is not stored.
        """
        return self._checking.open(watch)

    def serve(
        self,
        watch: Watch,
        actions: Sequence[Action],
        compute: Compute,
        *,
        client: str = "",
        labels: Labels | None = None,
        all_or_none: bool = False,
        portions: Portions | None = None,
    ) -> list[Result]:
        """Results for ``actions`` in their order: stored ones for hits, and ``compute`` for the others.

        Args:
            labels: tasks and documents, for the ledger.
            all_or_none: where one misses, all are computed: for actions whose batch is part of their key.
            portions: splits the missing positions into what is computed together; None means all at once.

        Equal actions are computed once, also where another process asks for them at the same time: each computes the portions
        that it gets hold of, so ``compute`` is called once, several times or never. The caller has called `open`; what was
        computed is stored once a later check has found the model unchanged.

        Raises:
            ReplayMissError: the policy is ``replay`` and an action is not in the store.
        """
        with self.serving(watch, actions, client=client, labels=labels, all_or_none=all_or_none) as serving:
            if missing := serving.missing:
                for mine in serving.claims([missing] if portions is None else portions(missing)):
                    for position, result in compute(mine):
                        serving.put(position, result)
        return serving.results()

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
        """`serve` for engines that hand their results over themselves: the block puts one for each missing position, or for
        each that `Serving.claims` gives it.

        What was put is kept although the block raises.
        """
        looked_at = time.time()
        self._asks(client)

        def hand_over(made: list[Made], now: bool) -> None:
            if self.policy.writes:
                self._checking.wait(watch, made[0][1].model, made, now)

        with paused_for(len(actions)):
            with self.counts.taking("keys"):
                keys = keys_of(actions)
            with self.counts.taking("lookup"):
                lookups = self._look_up(list(dict.fromkeys(keys)), all_or_none)
                serving = Serving(
                    actions, keys, lookups, hand_over, max(COMMIT_S, watch.check_seconds / COMMIT_SHARE), labels,
                    leases=self._leases(), look=self._look_again, fault=self._outbox.give_up, together=all_or_none,
                    looked_at=looked_at, taking=lambda: self.counts.taking("lookup"), run=self.run_id,
                )  # fmt: skip
            if serving.missing:
                resume()
            whole = False
            try:
                yield serving
                whole = True
            finally:
                with self.counts.taking("lookup"):
                    serving.close()
                    self._tell_lookups(watch, serving.told(computed_only=not whole), client)

    def uncacheable(
        self, reason: str, detail: str = "", *, requests: int = 1, seconds: float | None = None, client: str = ""
    ) -> None:
        """Count requests that ran as if evalcache were not there, with the reason."""
        self._asks(client)
        with self._lock:
            self.counts.uncacheable[reason] += requests
            if seconds is not None:
                self.counts.spent_seconds += seconds
            share = None if seconds is None else seconds / requests
            root = next(iter(self.counts.models.values()), None)
            why = f"{reason}: {detail}" if detail else reason
            columns = ((b"",) * requests, ("uncacheable",) * requests, (why,) * requests, (share,) * requests)
            self._outbox.tell(LookedUp(self.run_id, time.time(), root.value if root else b"", client, "", *columns))
        self._flush_soon()

    @contextlib.contextmanager
    def bypassed(self, error: UncacheableError, *, requests: int, client: str) -> Iterator[None]:
        """Count requests that the block computes as if evalcache were not there, and the seconds that it takes."""
        began = time.perf_counter()
        yield
        self.uncacheable(error.reason, error.detail, requests=requests, seconds=time.perf_counter() - began, client=client)

    def block(self) -> dict[str, Any]:
        """What this run has reused so far, for a client's own results. JSON."""
        return {"run": self.run_id} | self.counts.block()

    def get_object(self, name: str) -> bytes | None:
        """A shared object's bytes, from what waits or from the store; a fault reads as absent."""
        if (waiting := self._outbox.get_object(name)) is not None:
            return waiting
        try:
            return self.store.get_object(name) if self.policy.reads else None
        except StoreError as error:
            self._outbox.give_up(error)
            return None

    def put_object(self, name: str, data: bytes) -> None:
        """Keep a shared object with the next commit."""
        self._outbox.put_object(name, data)

    def note(self, event: Event) -> None:
        """Tell the ledger something with the next commit."""
        self._outbox.tell(event)
        self._flush_soon()

    def warn(self, text: str) -> None:
        """Warn, each text once a run."""
        with self._lock:
            if text in self._warned:
                return
            self._warned.add(text)
        tell(text)

    def loaded(self, root: Digest, seconds: float) -> None:
        """Note that weights were loaded, and how long it took."""
        with self._lock:
            self.counts.model_loads += 1
            self.counts.model_load_seconds += seconds
            self._outbox.tell(ModelLoaded(self.run_id, root.value, seconds))

    def watch(self, watch: Watch) -> Watch:
        """Register a watch, so that `close` makes the last check for it. Lets other models go."""
        return self._checking.watch(watch)

    def let_go(self) -> bool:
        """Check what waits of models that no call is busy with, and let them go. Says whether something waited."""
        return self._checking.let_go()

    # --- the end -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Check what waits, and write everything that is due."""
        self._checking.flush()
        self._outbox.commit()

    def close(self, status: str = "ok", exit_code: int | None = None) -> None:
        """End the run: last checks, last commit, sync. Faults are warnings; closing twice does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.flush()
        for call in self.at_end:
            call()
        if self._outbox.started:
            self._tell_used()
            self._outbox.tell(RunEnded(self.run_id, time.time(), status, exit_code))
            self._outbox.commit(last=True)
            told_at = time.time()
            if self.sync() and os.environ.get("EVALCACHE_MAX_SIZE") and self.policy.writes:
                from evalcache.pruning import evict

                self.evicted = evict(self.store, told_at=told_at, run=self.run_id)
        self.store.close()

    def sync(self) -> bool:
        """Bring the ledger up to date; says whether it is. One that somebody else holds delays this and nothing else."""
        if self.policy is Policy.READ_ONLY or self._outbox.broken:
            return False
        began, self.told = time.perf_counter(), False
        patience_s = END_PATIENCE_S if self._closed else SYNC_PATIENCE_S
        if not self._closed:
            self._tell_used()
        try:
            with self.counts.taking("sync"):
                ledger = Ledger(self.ledger_path, lock_timeout_s=patience_s)
                ledger.sync(self.store, last_of=self.run_id if self._closed else None)
            self.told = True
        except LedgerLockedError:
            pass  # the journal keeps what waits
        except (EvalCacheError, OSError) as error:
            tell_of_folder(self.directory, f"the ledger was not brought up to date; what is new waits in the store: {error}")
        if self._segments is not None:
            with self.counts.taking("sync"):
                self._segments.push()
        self._sync_seconds = time.perf_counter() - began
        self._synced_at = time.monotonic()
        return self.told

    # --- inside --------------------------------------------------------------------------------------------------------

    def _read(self, keys: list[Digest]) -> Mapping:
        try:
            return self.store.get_many(keys)
        except StoreError as error:
            self._outbox.give_up(error)
            return {}

    def _asks(self, client: str) -> None:
        if client in self.clients and not self._client:
            self._client = client

    def _describe(self) -> Event:
        name = self._client or (next(iter(self.clients)) if len(self.clients) == 1 else "")
        return describe_run(self.run_id, self.policy, self.match, name, self.clients.get(name, ""))

    def _leases(self) -> Leases | None:
        """The leases of a process that may leave work to others, and whose own work is of use to them."""
        alone = self.policy is not Policy.USE or self._outbox.broken or is_one_of_several_ranks()
        return None if alone else self.store.leases

    def _look_up(self, keys: list[Digest], all_or_none: bool) -> dict[Digest, Lookup]:
        found = self._read(keys) if self.policy.reads else {}
        lookups = decide_all(self.policy, keys, found)
        if all_or_none and not all(isinstance(lookup, Entry) for lookup in lookups.values()):
            return {key: Miss("batch") if isinstance(lookup, Entry) else lookup for key, lookup in lookups.items()}
        return lookups

    def _look_again(self, keys: list[Digest]) -> dict[Digest, Entry]:
        return {key: entry for key, entry in self._read(keys).items() if isinstance(entry, Entry)}

    def _meet(self, watch: Watch, manifest: Manifest) -> None:
        with self._lock:
            name = watch.name or str(manifest.about.get("name") or manifest.about.get("class") or "model")
            if self.counts.models.get(name) == manifest.root:
                return
            self.counts.models[name] = manifest.root
            self._outbox.put_object(f"model/{manifest.root.hex}", manifest.to_bytes())
            self._outbox.tell(ModelSeen(self.run_id, manifest.root.value, name, watch.role))

    def _tell_lookups(self, watch: Watch, told: Told, client: str) -> None:
        if not told.keys:
            return
        with self._lock:
            self.counts.add(told.outcomes, told.reasons, told.seconds)
            root = watch.manifest.root.value if watch.manifest else b""
            keys = tuple(key.value for key in told.keys)
            columns = (told.outcomes, told.reasons, told.seconds, told.tasks, told.documents, told.devices, told.origins)
            self._outbox.tell(LookedUp(self.run_id, time.time(), root, client, watch.role, keys, *map(tuple, columns)))
        self._flush_soon()

    def _tell_used(self) -> None:
        for used in self.meter.used():
            measured = (used.device, used.device_count, used.peak_bytes, used.energy_joules)
            self._outbox.tell(Measured(self.run_id, time.time(), *measured))

    def _flush_soon(self) -> None:
        self._outbox.commit_if_due()
        if time.monotonic() - self._synced_at > max(SYNC_S, self._sync_seconds / SYNC_SHARE):
            self.sync()

    def _begin_child(self) -> None:
        """After a fork, in the child: what waits is the parent's to write, and the ledger the parent's to bring up to date."""
        self._lock = threading.RLock()  # a thread that is not here may hold it
        self._outbox.begin_child()
        self.meter = Meter()
        self._synced_at = math.inf
        self._checking.begin_child()
        if multiprocessing := sys.modules.get("multiprocessing.util"):
            # Its processes end without the interpreter's own exit: a worker's last batch would be lost.
            multiprocessing.register_after_fork(self, lambda cache: multiprocessing.Finalize(None, cache.flush, exitpriority=0))


_caches: weakref.WeakSet[Cache] = weakref.WeakSet()


def _begin_children() -> None:
    for cache in list(_caches):
        cache._begin_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_children)
