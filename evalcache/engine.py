"""An eval loop of one's own, on any engine: `run` asks for answers that are not in the store, whatever it is that makes them.

Keyed are: the model (a live module, a checkpoint's files, or a name that somebody vouches for: `sources.py`), the request as
exact JSON, the settings that the caller names, the code of ``compute`` with all that it reaches, the versions of what it imports
(`compute.py`), and the number of the draw where a request is answered more than once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from evalcache.asked import Asked
from evalcache.cache import Cache
from evalcache.compute import describe_compute
from evalcache.errors import EvalCacheError, UncacheableError
from evalcache.journal import TaskSeen
from evalcache.manifest import Manifest
from evalcache.measuring import Busy
from evalcache.records import Environment, Fields
from evalcache.session import session_cache
from evalcache.sources import Source, find_source

CLIENT = "run"


def run(
    requests: Iterable[Any],
    *,
    model: Any,
    compute: Callable[[list[Any]], Any],
    settings: Mapping[str, Any] | None = None,
    samples: int | None = None,
    engine: str = "",
    version: str | None = None,
    role: str = "",
    tasks: str | Sequence[str] = (),
    documents: Sequence[str] = (),
    cache: Cache | None = None,
) -> list[Any]:
    """Answers to requests, from the store where they are known; ``compute`` makes the others.

    Args:
        requests: strings, chats (lists of dicts), or whatever JSON can say.
        model: whose answers they are: a live module, a checkpoint's folder or file, or `sources.named`.
        compute: given the requests that have no answer yet, equal ones once, in first-seen order; those that another process
            computes right now are left to it, and waited for. Returns a list of answers in that order, or yields
            ``(index, answer)`` as they are made, which are kept every few seconds. An answer is a string, or whatever JSON can
            say but null. May be async.
        settings: all that shapes the answers and does not stand in the code of ``compute``. JSON.
        samples: None means one answer for each request; n means a list of n, each of which is kept under its number. A request
            that lacks several is given to ``compute`` as often.
        engine: the package that computes (``vllm``); its installed version is keyed.
        version: stands for objects of libraries that ``compute`` reaches and that cannot be hashed: a client, an engine. A
            promise: change it whenever they would answer otherwise.
        role: candidate, judge, …: where several models answer in one run.
        tasks, documents: names for the ledger, one for each request; one task may stand for all.
        cache: where to look and store; None means this process's session, as in `one_model.wrap`.

    Returns:
        One answer for each request, in order; with ``samples``, one list each.

    Raises:
        EvalCacheError: a request or an answer is not JSON, the model is a mere name, or ``compute`` cannot be keyed or breaks
            its word. What ``compute`` raises comes out as it is. What was answered before is kept in either case.

    Cost: one check of the model before and after. The seconds that ``compute`` takes are shared by the length of the answers; the
    device that they were measured on is known of a live model alone.
    """
    requests = list(requests)
    cache = cache if cache is not None else session_cache()
    asked = Asked(requests, samples, tasks, documents)
    with _opened(cache, asked, model, compute, settings, engine, version, role) as computing:
        for portion in asked.portions():
            with computing(), _out_of_the_way():
                made = compute(portion)
                if inspect.isawaitable(made) or hasattr(made, "__aiter__"):
                    _run_until_done(made, asked)
                else:
                    asked.take(made)
    return asked.answers()


async def run_async(requests: Iterable[Any], *, compute: Callable[[list[Any]], Any], **options: Any) -> list[Any]:
    """`run` where an event loop is running already; ``compute`` is an async function or generator. Options as there."""
    requests = list(requests)
    given = inspect.signature(run).bind(requests, compute=compute, **options)
    given.apply_defaults()
    chosen = given.arguments
    cache = chosen["cache"] if chosen["cache"] is not None else session_cache()
    asked = Asked(requests, chosen["samples"], chosen["tasks"], chosen["documents"])
    names = ("model", "compute", "settings", "engine", "version", "role")
    with _opened(cache, asked, *(chosen[name] for name in names)) as computing:
        portions = asked.portions()
        # In a thread: to wait for another process must not stop the loop.
        while (portion := await asyncio.to_thread(next, portions, None)) is not None:
            with computing():
                await _drain(compute(portion), asked)
    return asked.answers()


def cached(
    function: Callable[..., Any] | None = None,
    *,
    model: Any,
    settings: Mapping[str, Any] | None = None,
    samples: int | None = None,
    engine: str = "",
    version: str | None = None,
    role: str = "",
    cache: Cache | None = None,
) -> Any:
    """Make a function that maps a list of requests to answers incremental: the function itself is the ``compute`` of `run`.

    Called as before; keyword arguments of a call are settings, and are handed on. An async function stays one.

    Args:
        model: as in `run`, or a function without arguments that gives it when it is needed.
        settings, samples, engine, version, role, cache: as in `run`.
    """
    if function is None:
        return functools.partial(
            cached, model=model, settings=settings, samples=samples, engine=engine, version=version, role=role, cache=cache
        )

    def options(given: dict[str, Any]) -> dict[str, Any]:
        keyed = dict(settings or {}) | ({"arguments": given} if given else {})
        return {
            "model": model() if isinstance(model, types.FunctionType) else model,
            "compute": functools.partial(function, **given) if given else function, "settings": keyed,
            "samples": samples, "engine": engine, "version": version, "role": role, "cache": cache,
        }  # fmt: skip

    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def ask_async(requests: Iterable[Any], /, **given: Any) -> list[Any]:
            return await run_async(requests, **options(given))

        return ask_async

    @functools.wraps(function)
    def ask(requests: Iterable[Any], /, **given: Any) -> list[Any]:
        return run(requests, **options(given))

    return ask


@contextlib.contextmanager
def _opened(
    cache: Cache | None,
    asked: Asked,
    model: Any,
    compute: Any,
    settings: Mapping[str, Any] | None,
    engine: str,
    version: str | None,
    role: str,
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """The way of a call through the cache; the block computes what is missing, each part of it within what it is given.
    Without a cache it computes everything."""
    if cache is None:
        yield contextlib.nullcontext
        return
    source = find_source(cache, model, role, engine)
    keyed = describe_compute(compute, source.model, settings, version)
    for task in dict.fromkeys(asked.labels.tasks):
        cache.note(TaskSeen(cache.run_id, CLIENT, task))
    for last in (False, True):
        try:
            looked = source.look(cache)
        except UncacheableError as error:
            refused = error.with_traceback(None)
            break
        try:
            with _serving(cache, asked, source, looked, keyed, last):
                busy = _busy(source) if asked.missing_count else Busy("")
                asked.device = busy.device
                yield functools.partial(cache.meter.computing, busy)
            return
        except _AnotherModelError:  # what woke is not what was promised: ask again, of what is there
            continue
    with cache.bypassed(refused, requests=asked.missing_count, client=CLIENT):
        yield contextlib.nullcontext


def _busy(source: Source) -> Busy:
    """Where ``compute`` computes: where a live model lies. What an engine does with files, or a server, nobody here can ask."""
    first = None if source.model is None else next(iter(source.model.parameters()), None)
    if first is None:
        return Busy("")
    from evalcache.integrations.timing import busy, devices_of

    return busy(devices_of(source.model, first.device))


@contextlib.contextmanager
def _serving(
    cache: Cache, asked: Asked, source: Source, looked: tuple[Manifest, Environment], keyed: Fields, last: bool
) -> Iterator[None]:
    manifest, environment = looked
    strict = cache.match == "strict"
    actions = asked.actions(manifest.root, keyed, environment, strict)
    with cache.serving(source.watch, actions, client=CLIENT, labels=asked.labels, all_or_none=strict) as serving:
        asked.serve(serving)
        if asked.missing_count and source.wake(cache) != manifest.root and not last:
            raise _AnotherModelError
        try:
            yield
        finally:
            asked.keep()


class _AnotherModelError(Exception):
    """A checkpoint woke as another model than it was when it was met first."""


@contextlib.contextmanager
def _out_of_the_way() -> Iterator[None]:
    """While ``compute`` runs, the seams below are out of the way: its answers are kept here."""
    below = sys.modules.get("evalcache.integrations.seam")
    with contextlib.nullcontext() if below is None else below.not_again():
        yield


async def _drain(made: Any, asked: Asked) -> None:
    if hasattr(made, "__aiter__"):
        async for pair in made:
            asked.put(pair)
    else:
        asked.take(await made if inspect.isawaitable(made) else made)


def _run_until_done(made: Any, asked: Asked) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(_drain(made, asked))
        return
    if inspect.iscoroutine(made):
        made.close()
    raise EvalCacheError("an event loop is running already", hint="await evalcache.run_async(…) instead", found="async compute")
