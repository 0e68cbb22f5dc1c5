"""inspect_ai: the requests of its ``hf`` provider, served above the queue in which it gathers batches.

A request waits a second or two there, however fast its batch is: a stored answer must not stand in that queue. So each request is
looked up where the provider would put it in (`batched_generate`), and what is not stored takes the provider's own way. A batch
is computed in its own thread with its own width, and each of its rows is stored as a row of its own (`inspect_ai_batches.py`).

Everything above, from the chat template to the parsing of tool calls, and the decoding of token ids, is the provider's own code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from evalcache.cache import Cache
from evalcache.errors import ReplayMissError, UncacheableError
from evalcache.integrations.clients import INSPECT_AI, version_of_client
from evalcache.integrations.inspect_ai_batches import CLIENT, Asked, encode_one, model_of, serve_batch, text_of
from evalcache.integrations.inspect_ai_scores import watch_scores
from evalcache.integrations.patching import Patches
from evalcache.integrations.seam import Seam, not_again
from evalcache.records import Action, Policy, Result
from evalcache.serving import Labels, Serving

# Its own logger. At `debug`, because whatever is said louder becomes an event of the sample in whose context it is said.
_log = logging.getLogger("inspect_ai.evalcache")
_PAUSE_S = 0.05  # between two attempts to look at a model that computes
_patches = Patches()
_adapter: Adapter | None = None


def install(cache: Cache, only: Any = None) -> None:
    """Serve the ``hf`` provider's models from ``cache``. Its module has been imported.

    A version whose seams have moved is left alone, with one warning.

    Args:
        only: a model: serve it, and no other that has not been named so. None means every model.
    """
    global _adapter
    if only is not None and _adapter is not None and _adapter.cache is cache:
        _adapter.admit(only)
        return
    uninstall()
    if faults := INSPECT_AI.faults():
        cache.warn(f"inspect_ai {version_of_client(INSPECT_AI)} runs without its adapter: {'; '.join(faults)}")
        return
    import inspect_ai._eval.task.log as task_log
    import inspect_ai.model._providers.hf as hf

    _adapter = Adapter(cache, None if only is None else weakref.WeakSet([only]))
    _patches.replace(hf, "batched_generate", _above_the_queue)
    _patches.replace(hf, "_generate_batch", _below_the_queue)
    watch_scores(_patches, task_log.TaskLogger, lambda: None if (adapter := _current()) is None else adapter.cache, CLIENT)


def uninstall() -> None:
    """Put back what `install` replaced."""
    global _adapter
    _adapter = None
    _patches.undo()


def _current() -> Adapter | None:
    return None if _adapter is None or _adapter.cache.policy is Policy.OFF else _adapter


def _above_the_queue(original: Callable[..., Any]) -> Callable[..., Any]:
    async def batched_generate(input: Any) -> Any:
        adapter = _current()
        if adapter is None:
            return await original(input)
        one = adapter.ask(input)
        if one is None:
            return await original(input)
        await adapter.look_up(one)
        if one.error is not None:
            raise one.error
        output = one.output
        if output is None:
            input.evalcache_asked = one  # for the batch that it will be in
            output = await original(input)
        if one.served:
            _mark_as_read()
        return output

    return batched_generate


def _below_the_queue(original: Callable[..., Any]) -> Callable[..., Any]:
    def _generate_batch(batch: Any) -> Any:
        adapter = _current()
        return original(batch if adapter is None else adapter.prepare(batch))

    return _generate_batch


def _mark_as_read() -> None:
    """As inspect_ai marks what its own cache answers: in the event of the log, and for whom successes of a model count."""
    from inspect_ai.log import _samples
    from inspect_ai.util import _concurrency

    with contextlib.suppress(AttributeError):  # private names: another version may mark otherwise
        if (event := _samples._active_model_event.get()) is not None:
            event.cache = "read"
        _concurrency._request_was_cache_hit.set(True)


class Adapter:
    """Serves one process's ``hf`` models from one cache.

    Args:
        only: the models that are served; None means all.
    """

    def __init__(self, cache: Cache, only: weakref.WeakSet[Any] | None = None) -> None:
        self.cache = cache
        self.cache.clients[CLIENT] = version_of_client(INSPECT_AI)
        self._only = only
        self._own = Seam(cache)
        self._waiting: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self._looking = threading.Lock()
        # A fast tokenizer refuses to be set up by one thread while another one uses it.
        self._encoding = threading.RLock()

    def admit(self, model: Any) -> None:
        """Serve one more model."""
        if self._only is not None:
            self._only.add(model)

    # --- above the queue -----------------------------------------------------------------------------------------------

    def ask(self, input: Any) -> Asked | None:
        """What a request asks of a model that is served here; None for any other."""
        model = model_of(input.generator)
        if model is None or (self._only is not None and model not in self._only):
            return None
        from inspect_ai.log._samples import sample_active

        sample = sample_active()
        task, document = ("", "") if sample is None else (str(sample.task), str(sample.sample.id))
        return Asked(input, model, task, document)

    async def look_up(self, one: Asked) -> None:
        """Look a request up, together with those that wait to be looked up: a model is checked once for all of them.

        In a thread: reading a model's weights must not hold up the event loop.
        """
        # Draws belong to the whole batch and its generator; under strict matching, every row belongs to its batch.
        if one.input.generator.keywords.get("do_sample") or self.cache.match == "strict":
            return
        import anyio
        import anyio.to_thread

        self._waiting.put(one)
        # Again and again where its model is busy with a batch: a request that is given up must not wait for that.
        while not await anyio.to_thread.run_sync(self._look_up_waiting, one):
            await anyio.sleep(_PAUSE_S)

    def _look_up_waiting(self, one: Asked) -> bool:
        """Look up what waits and can be looked up now; says whether ``one`` has been."""
        with self._looking:
            if one.looked_up:
                return True
            groups: dict[int, list[Asked]] = {}
            with contextlib.suppress(queue.Empty):
                while True:
                    asked = self._waiting.get_nowait()
                    groups.setdefault(id(asked.model), []).append(asked)
            for members in groups.values():
                try:
                    done = self._look_up_of_one_model(members)
                except UncacheableError:
                    done = True  # counted where it is computed
                except Exception as error:  # it runs as if it were not stored
                    self.cache.warn(f"requests are not looked up: {type(error).__name__}: {error}")
                    done = True
                for asked in members:
                    asked.looked_up = done
                    if not done:
                        self._waiting.put(asked)
            return one.looked_up

    def _look_up_of_one_model(self, asked: list[Asked]) -> bool:
        """False where the model computes a batch: nothing has been done."""
        began = time.perf_counter()
        model = asked[0].model
        seam = self._seam()
        watch = seam.watch(model)
        if not watch.lock.acquire(blocking=False):
            return False
        with contextlib.ExitStack() as held:
            held.callback(watch.lock.release)
            held.enter_context(not_again())
            manifest, environment = seam.look(model, watch)
            keyed = []
            for one in asked:
                try:
                    with self._encoding:
                        one.row = encode_one(one, seam, manifest, environment)
                    keyed.append((one, Action(manifest.root, one.row.request, environment)))
                except UncacheableError:
                    continue  # likewise
            try:
                self._take_hits(watch, keyed)
            except ReplayMissError:
                for pair in keyed:  # each request has its own answer, or its own error
                    try:
                        self._take_hits(watch, [pair])
                    except ReplayMissError as error:
                        pair[0].error = error
        found = [one for one in asked if one.output is not None]
        for one in found:
            one.output.time = (time.perf_counter() - began) / len(found)
        _log.debug(f"evalcache: generate {len(found)}/{len(asked)} stored, {len(asked) - len(found)} to run")
        return True

    def _take_hits(self, watch: Any, keyed: list[tuple[Asked, Action]]) -> None:
        """Answers from the store; of what is missing nothing is told, it will be asked for again by its batch."""
        missing: set[Any] = set()
        with contextlib.suppress(_LookedOnly), self._serving(watch, keyed) as serving:
            missing = {_name(keyed[place][1]) for place in serving.missing}
            if missing:
                raise _LookedOnly
        hits = [pair for pair in keyed if _name(pair[1]) not in missing]
        if missing and hits:
            with self._serving(watch, hits) as serving:
                pass
        for (one, _), result in zip(hits, serving.results() if hits else (), strict=True):
            self._answer(one, result)

    def _serving(self, watch: Any, keyed: list[tuple[Asked, Action]]) -> contextlib.AbstractContextManager[Serving]:
        labels = Labels([one.task for one, _ in keyed], [one.document for one, _ in keyed])
        return self.cache.serving(watch, [action for _, action in keyed], client=CLIENT, labels=labels)

    def _answer(self, one: Asked, result: Result) -> None:
        from inspect_ai.model._providers.hf import GenerateOutput

        with self._encoding:
            text, count = text_of(one, result)
        width = one.row.prompt_tokens
        one.output = GenerateOutput(text, width, count, width + count, logprobs=None, hidden_states=None, time=0.0)
        one.served = True

    # --- below the queue -----------------------------------------------------------------------------------------------

    def prepare(self, batch: list[Any]) -> list[Any]:
        """The same batch, whose rows are served and stored one by one."""
        first = batch[0].input
        model = model_of(first.generator)
        if model is None or (self._only is not None and model not in self._only) or self.cache.match == "strict":
            return batch
        asked = [getattr(item.input, "evalcache_asked", None) for item in batch]
        generator = functools.partial(self._generate, first.generator, first.tokenizer, asked)
        input = dataclasses.replace(
            first, generator=generator, tokenizer=self._locked(first.tokenizer), decoder=self._locked(first.decoder)
        )
        return [dataclasses.replace(batch[0], input=input), *batch[1:]]

    def _generate(self, generator: Any, tokenizer: Any, asked: list[Asked | None], **prompt: Any) -> Any:
        seam = self._seam()
        try:
            return serve_batch(self.cache, seam, generator, tokenizer, asked, prompt)
        except UncacheableError as error:
            refused = error.with_traceback(None)
        # Outside of the except block: what the bare call raises must not name our refusal as its context.
        if seam is not self._own:
            return generator(**prompt)  # `generate` itself may serve the batch as a whole, else it counts it
        with self.cache.bypassed(refused, requests=len(asked), client=CLIENT), not_again():
            return generator(**prompt)

    def _locked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._encoding:
                return function(*args, **kwargs)

        return locked

    def _seam(self) -> Seam:
        """The seam of `generate`, which serves what is not served here; one of our own where that is not installed."""
        installed = Seam.installed
        return installed if installed is not None and installed.cache is self.cache else self._own


class _LookedOnly(Exception):
    """Some requests are missing: nothing is told of the others before they are answered."""


def _name(action: Action) -> tuple[bytes, bytes]:
    """What tells requests of one model apart, which have nothing but tokens and settings."""
    return action.request.tokens, action.request.settings.digest.value
