"""One process with evalcache in it: start watching, and say one line at the end.

Nothing of a client is imported here. A hook waits for transformers' own modules and installs the integration when the script
imports them, so a process that meets no model pays for an ``import os``, prints nothing and creates nothing. Whatever goes wrong
in here is one warning line on stderr, and the script runs bare.

How the process ended is `ending.py`'s business.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from evalcache.ending import end_with_server, how_it_ended, stay_interrupted, unwatch_exit, watch_exit
from evalcache.importhook import ImportHook

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from evalcache.cache import Cache

TRIGGERS = ("transformers.generation.utils", "transformers.modeling_utils")
"""The modules that a script has imported before it can hold a model. ``transformers`` itself comes without torch, and importing
more of it than the script does would show (time, messages of its optional parts)."""

LATECOMERS = ("peft.peft_model",)
"""Modules whose classes stand above those of transformers and are patched as well, whenever they come."""

CLIENTS = {
    "lm_eval": ("lm_eval.models.huggingface",),
    "lighteval": ("lighteval.models.transformers.transformers_model",),
    "inspect_ai": ("inspect_ai.model._providers.hf",),
}
"""Eval clients with an adapter of their own (``integrations/<name>.py``), and the modules after whose import it is installed."""

ENGINES = ("vllm", "sglang")
"""Engines that load models in their own way: below `evalcache plan` a process that imports one ends, before it takes a GPU."""

SERVERS = ("uvicorn.server",)
"""Modules of servers that end their process by a signal (`transformers serve` runs in one)."""

_current: Session | None = None


class Session:
    """evalcache in this process, from `enable` to `disable` or the end of the process. Made by `enable`.

    Usable as a context manager, which disables at the end of its block.
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None, policy: str | None, match: str | None, components: bool | None = None
    ) -> None:
        self.directory = directory
        self.policy = policy
        self.match = match
        self.components = components
        self._cache: Cache | None = None
        self._failed = False
        self._closed = False
        self._installed = False
        self._pid = os.getpid()
        self._clients: list[str] = []
        self._unwatch_server: Callable[[], None] = lambda: None
        self._unwatch_sigterm: Callable[[], None] | None = None
        self._plan = os.environ.get("EVALCACHE_PLAN") or None
        self._hooks: tuple[ImportHook, ...] = (
            ImportHook(TRIGGERS, self._install),
            ImportHook(LATECOMERS, self._install_again),
            ImportHook(SERVERS, self._watch_server),
            *(ImportHook(modules, functools.partial(self._install_client, name)) for name, modules in CLIENTS.items()),
        )
        if self._plan is not None:
            self._hooks += (
                ImportHook(("lm_eval.evaluator",), self._plan_evaluator),
                *(ImportHook((name,), functools.partial(self._end_plan, name)) for name in ENGINES),
            )

    @property
    def off(self) -> bool:
        """Whether the policy is ``off``: nothing is installed, read or written."""
        policy = self.policy if self.policy is not None else os.environ.get("EVALCACHE", "")
        return str(getattr(policy, "value", policy)).strip().lower() == "off"

    @property
    def cache(self) -> Cache | None:
        """This process's cache, opened when first asked for; None where the policy is off or the cache cannot be opened."""
        if self._cache is None and not (self._failed or self._closed or self.off):
            began = time.perf_counter()
            try:
                self._cache = self._open()
                if self.components is not None:
                    self._cache.components = self.components
                self._cache.counts.overhead["start"] += time.perf_counter() - began
            except Exception as error:
                self._failed = True
                warn(f"cannot open the cache ({say(error)}); running without it")
        return self._cache

    def _open(self) -> Cache:
        # Imported here: DuckDB and diskcache cost a process that meets no model a fifth of a second.
        if self._plan is not None:
            from evalcache.planning import PlanCache

            return PlanCache(self.directory, policy=self.policy, match=self.match, folder=self._plan)
        run = os.environ.get("EVALCACHE_RUN") or None
        if told := os.environ.get("EVALCACHE_BUDGET"):
            from evalcache.budget import open_with_budget

            return open_with_budget(told, self.directory, policy=self.policy, match=self.match, run=run)
        from evalcache.cache import Cache

        return Cache(self.directory, policy=self.policy, match=self.match, run=run)

    def reopen(self) -> None:
        """Begin again with the settings that were chosen since, where a cache was opened but no model has been met."""
        if self._cache is not None:
            cache, self._cache = self._cache, None
            cache.close()
            if self._installed:
                self._install()
            for name in self._clients:
                self._install_client(name)

    def close(self, status: str = "ok", exit_code: int | None = None) -> None:
        """Commit what is pending, end the run in the ledger and print the line. Never raises; the second call does nothing.

        Args:
            status: ``ok``, ``failed`` or ``interrupted``. exit_code: of the process, where it is known.
        """
        for hook in self._hooks:
            hook.remove()
        # A forked child inherits its parent's session, and the run is not the child's to end.
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._unwatch_server()
        if self._unwatch_sigterm is not None:
            self._unwatch_sigterm()
        for name in self._clients:
            self._client(name).uninstall()
        if self._installed:
            from evalcache.integrations.transformers import uninstall

            uninstall()
            self._installed = False
        if self._cache is None:
            return
        try:
            self._cache.close(status, exit_code)
        except KeyboardInterrupt:
            pass  # a second Ctrl-C: who is in such a hurry does not wait for the ledger, which is told by the next run
        except Exception as error:
            warn(f"could not end the run cleanly ({say(error)}); what was computed is in the store")
        try:
            self._print_summary(self._cache)
        except Exception as error:
            warn(f"could not sum up the run ({say(error)})")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "ok" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        _end(self, status, None)

    def _install(self) -> None:
        if self._closed or os.getpid() != self._pid or self.cache is None:
            return
        try:
            with self.cache.counts.taking("start"):
                name = "transformers" if self._plan is None else "planning"
                importlib.import_module(f"evalcache.integrations.{name}").install(self.cache)
            self._installed = True
            if self._unwatch_sigterm is None and self._plan is None:
                from evalcache.sigterm import end_at_sigterm

                self._unwatch_sigterm = end_at_sigterm(lambda number: self.close("interrupted", 128 + number))
        except Exception as error:
            warn(f"cannot hold on to transformers ({say(error)}); running without it")

    def _install_again(self) -> None:
        if self._installed:
            self._install()

    def _watch_server(self) -> None:
        server = getattr(sys.modules.get(SERVERS[0]), "Server", None)
        if "capture_signals" in vars(server or object):
            self._unwatch_server = end_with_server(server, lambda number: self.close("interrupted", 128 + number))

    def _install_client(self, name: str) -> None:
        """Hold on to an eval client, whose module has just been imported."""
        if self._closed or os.getpid() != self._pid or self.cache is None:
            return
        if self._plan is not None and name != "lm_eval":
            self._end_plan(name)
        if name not in self._clients:
            self._clients.append(name)
        try:
            with self.cache.counts.taking("start"):
                self._client(name).install(self.cache)
        except Exception as error:
            self._client(name).uninstall()
            warn(f"cannot hold on to {name} ({say(error)}); it runs without its adapter")

    def _client(self, name: str) -> Any:
        return importlib.import_module(f"evalcache.integrations.{name}{'' if self._plan is None else '_plan'}")

    def _plan_evaluator(self) -> None:
        from evalcache.integrations.lm_eval_plan import watch_evaluator

        watch_evaluator(self.cache)  # type: ignore[arg-type]

    def _end_plan(self, name: str) -> None:
        if self.cache is not None:
            self.cache.end(f"what {name} will ask is not known before it has loaded its model")  # type: ignore[attr-defined]

    def _print_summary(self, cache: Cache) -> None:
        from evalcache.summary import calls_seen, format_summary

        counts = cache.counts
        if os.environ.get("EVALCACHE_QUIET", "0") not in ("", "0") or os.environ.get("RANK", "0") != "0":
            return
        if not calls_seen(counts):
            return
        # A run that may not write is not in the ledger, which explains misses.
        why = _explain(cache) if counts.misses and not counts.hits and cache.policy.writes and cache.told else []
        ranks = int(os.environ.get("WORLD_SIZE", "1") or 1)
        _tell(format_summary(counts, str(cache.ledger_path), why=why, ranks=ranks, evicted=cache.evicted))


def enable(
    directory: str | os.PathLike[str] | None = None,
    *,
    policy: str | None = None,
    match: str | None = None,
    components: bool | None = None,
) -> Session:
    """Serve every transformers model of this process from the cache, from here on. One line in a script, or a ``with`` block.

    May stand before or after ``import transformers``. There is one session per process: a second call returns the first one's,
    and may still choose its settings as long as no model has been met.

    Args:
        directory: cache folder; None means ``EVALCACHE_DIR`` or the user's cache folder.
        policy: ``use``, ``refresh``, ``read_only``, ``replay`` or ``off``; None means ``EVALCACHE`` or ``use``.
        match: ``portable`` or ``strict``; None means ``EVALCACHE_MATCH`` or ``portable``.
        components: whether a forward may begin above the layers that are the same as in a model that has read the row before;
            None means ``EVALCACHE_COMPONENTS``, or not.

    Raises:
        EvalCacheError: the settings given here are not ones, or differ from those the cache has already been opened with.

    >>> with enable(policy="off") as session:
    ...     session.cache is None
    True
    """
    global _current
    session = _current
    settings = {"directory": directory, "policy": policy, "match": match, "components": components}
    given = {name: value for name, value in settings.items() if value is not None}
    _check(given)
    if session is None:
        session = Session(directory, policy, match, components)
        _current = session
        if not session.off:
            _start(session)
        return session
    changed = {name: value for name, value in given.items() if value != getattr(session, name)}
    if changed and session._cache is not None and not session._cache.untouched:
        from evalcache.errors import EvalCacheError

        names = ", ".join(changed)
        raise EvalCacheError(
            f"evalcache is already running with another {names}", hint="call evalcache.disable() first", found=changed
        )
    for name, value in changed.items():
        setattr(session, name, value)
    if changed:
        session.reopen()
    return session


def disable() -> None:
    """End this process's session: put everything back, end the run, print the line. Harmless where there is none."""
    if _current is not None:
        _end(_current, "ok", None)


def current() -> Session | None:
    """This process's session, if `enable` has been called."""
    return _current


def session_cache() -> Cache | None:
    """The cache of this process's session, which is started (without a hook on other models) where there is none."""
    global _current
    if _current is None:
        _current = Session(None, None, None)
        if not _current.off:
            _start(_current, watch=False)
    return _current.cache


def _start(session: Session, watch: bool = True) -> None:
    watch_exit(lambda: _progress(session))
    atexit.register(_at_exit, session)
    if watch:
        for hook in session._hooks:
            hook.install()


def _end(session: Session, status: str, exit_code: int | None) -> None:
    global _current
    session.close(status, exit_code)
    atexit.unregister(_at_exit)
    unwatch_exit()
    if _current is session:
        _current = None


def _at_exit(session: Session) -> None:
    status, code = how_it_ended()
    if (ended_with := getattr(getattr(session._cache, "meter", None), "ended_with", None)) is not None:
        status, code = "interrupted", ended_with
    session.close(status, code)
    if status == "interrupted":
        stay_interrupted()


def _progress(session: Session) -> int:
    if session._cache is None:
        return 0
    from evalcache.summary import calls_seen

    return calls_seen(session._cache.counts)


def _check(given: dict[str, Any]) -> None:
    """Refuse wrong arguments where they were written, and not when the first model is met."""
    choices = {"policy": ("use", "refresh", "read_only", "replay", "off"), "match": ("portable", "strict")}
    for name, allowed in choices.items():
        value = getattr(given.get(name), "value", given.get(name))
        if value is not None and value not in allowed:
            from evalcache.errors import EvalCacheError

            raise EvalCacheError(f"unknown {name} {value!r}", hint=f"one of {', '.join(allowed)}", found=value)


def _explain(cache: Cache) -> list[str]:
    try:
        from evalcache.ledger import Ledger
        from evalcache.misses import explain_misses

        return explain_misses(Ledger(cache.ledger_path), cache.run_id)
    except Exception as error:  # the reason is a courtesy: a locked ledger must not cost the line
        return [f"(not known: {say(error)})"]


def say(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def warn(text: str) -> None:
    """One line on stderr, as everything that this process has to say."""
    _tell(f"evalcache: warning: {text}")


def _tell(line: str) -> None:
    stream = sys.stderr
    if stream is None:
        return
    from evalcache.visible import visible  # here: a process that has nothing to say needs none of it

    try:
        print(visible(line), file=stream, flush=True)
    except (OSError, ValueError):
        return  # closed, or its reader is gone: there is nobody to tell
    except RuntimeError:  # a signal came while the script was writing there
        with contextlib.suppress(OSError, ValueError):
            os.write(stream.fileno(), f"{line}\n".encode(errors="replace"))
