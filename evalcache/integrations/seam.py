"""A model's calls of `generate`, served from one cache: from the store, computed, or untouched.

A call that cannot be keyed runs untouched and is counted. Clients' seams, which stand higher, look, resolve and wake through it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from evalcache.cache import Cache
from evalcache.canonical import decode, encode_canonical
from evalcache.code import ORIGINAL, is_ours
from evalcache.environment import describe_environment, device_name
from evalcache.errors import UncacheableError
from evalcache.integrations import generation, lazy, loading, outputs, streaming
from evalcache.integrations.enginelogs import Told, buffered_logs
from evalcache.integrations.generation import Call, Traits
from evalcache.integrations.probe import probe
from evalcache.integrations.timing import busy, measured, share
from evalcache.manifest import Manifest
from evalcache.records import Action, Environment, Policy, Result
from evalcache.structs import replace
from evalcache.watch import Watch
from evalcache.weights import Fingerprinter, unwrap

CLIENT = "transformers"

_inside = threading.local()


class Seam:
    """Serves calls of ``generate`` from one cache."""

    installed: ClassVar[Seam | None] = None
    """What serves every model of this process."""
    sampling_thread: ClassVar[threading.Thread | None] = None

    @classmethod
    def of(cls, cache: Cache) -> Seam:
        """The seam that serves from ``cache``: the installed one, if it does."""
        return Seam.installed if Seam.installed is not None and Seam.installed.cache is cache else cls(cache)

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._watches: weakref.WeakKeyDictionary[Any, Watch] = weakref.WeakKeyDictionary()
        self._known: dict[str, Any] = {}

    def watch(self, model: Any) -> Watch:
        """The watch of one model."""
        watch = self._watches.get(model)
        if watch is None:
            name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
            watch = self._watches[model] = self.cache.watch(Watch(_fingerprint_of(model), name, subject=model))
        return watch

    def load(self, cls: type, original: Callable[..., Any], path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``from_pretrained``: asleep where the checkpoint is known."""

        def load(*args: Any, **kwargs: Any) -> Any:
            if self.cache.let_go():
                gc.collect()  # modules with hooks are cycles, which the script itself could not collect while we held them
            return original(*args, **kwargs)

        return self.asleep(loading.load(self.cache, cls, load, path, args, kwargs))

    def asleep(self, model: Any) -> Any:
        """A model, if it sleeps with a ``generate`` that is served."""
        if lazy.is_asleep(model):

            def bare(*args: Any, **kwargs: Any) -> Any:
                real = lazy.awake(model)
                if not hasattr(type(real), "generate"):  # PEFT's model of no task hands it on
                    real = unwrap(real)
                return _bare_generate(real)(real, *args, **kwargs)

            vars(model)["generate"] = functools.partial(self._generate_asleep, model, bare)
            resize = getattr(lazy.sleep_of(model).cls, "resize_token_embeddings", None)
            if is_ours(resize):  # not where a class has its own
                vars(model)["resize_token_embeddings"] = functools.partial(resize, model)
        return model

    def _generate_asleep(self, model: Any, bare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.generate(model, bare, args, kwargs) if Seam.installed is self else bare(*args, **kwargs)

    def generate(self, model: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of ``generate``: from the store, computed, or untouched."""
        if getattr(_inside, "active", False) or self.cache.policy is Policy.OFF:
            return original(*args, **kwargs)
        with not_again():
            try:
                arguments = generation.bind(args, kwargs)
                watch = self.watch(model)
                with watch.lock:
                    try:
                        return self._serve(model, watch, original, arguments)
                    except AnotherModelError:  # what woke is not what was promised: ask again, of what is there
                        return self._serve(model, watch, original, arguments)
            except _Unstorable as made:
                self.cache.uncacheable(made.error.reason, made.error.detail, requests=made.rows, client=CLIENT)
                return made.output
            except UncacheableError as error:
                refused = error.with_traceback(None)
            # Outside of the except block: what the bare call raises must not name our refusal as its context.
            return self._untouched(refused, original, args, kwargs)

    def _untouched(
        self, error: UncacheableError, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        known = isinstance(ids, torch.Tensor)
        began = time.perf_counter()
        with self.cache.meter.computing(busy((ids.device,))) if known else contextlib.nullcontext():
            output = original(*args, **kwargs)
        rows = int(ids.shape[0]) if known and ids.dim() else 1
        self.cache.uncacheable(error.reason, error.detail, requests=rows, seconds=time.perf_counter() - began, client=CLIENT)
        return output

    def look(self, model: Any, watch: Watch) -> tuple[Manifest, Environment]:
        """Check a model, and describe the environment in which it would answer now.

        Raises:
            UncacheableError: it cannot be keyed.
        """
        try:
            with self.cache.counts.taking("keys"):
                manifest = self.cache.open(watch)  # may wake it
                if lazy.is_asleep(model):
                    sleep = lazy.sleep_of(model)
                    hollow, device, dtype = sleep.hollow, sleep.device.type, sleep.dtype
                    return manifest, describe_environment(hollow, self.cache.match, device=device, dtype=dtype)
                return manifest, describe_environment(lazy.awake(model), self.cache.match)
        except UncacheableError:
            raise
        except Exception as error:
            raise self._refusal(error) from error

    def wake(self, model: Any, watch: Watch, manifest: Manifest) -> None:
        """Load a sleeping model before it computes, and see that it is the one that was promised.

        Raises:
            AnotherModelError: it is not.
        """
        if lazy.is_asleep(model):
            lazy.awake(model)
            if self.cache.open(watch).root != manifest.root:
                name = lazy.sleep_of(model).hollow.name_or_path
                self.cache.warn(f"{name} has changed on disk since it was asked for, and is loaded as it is now")
                raise AnotherModelError
            watch.check_seconds = 0.0  # the first reading of what has been loaded is no check

    def resolve(
        self, model: Any, original: Callable[..., Any], manifest: Manifest, environment: Environment, arguments: dict[str, Any]
    ) -> tuple[Call, Told]:
        """Resolve a call of a model that was looked at, asleep or awake.

        Raises:
            UncacheableError: it cannot be keyed; whatever fails in here, the bare call still runs.
        """
        try:
            with self.cache.counts.taking("keys"):
                return self._resolve(model, original, manifest, environment, arguments)
        except UncacheableError:
            raise
        except Exception as error:
            raise self._refusal(error) from error

    def _resolve(
        self, model: Any, original: Callable[..., Any], manifest: Manifest, environment: Environment, arguments: dict[str, Any]
    ) -> tuple[Call, Told]:
        asleep = lazy.is_asleep(model)
        inner = model if asleep else unwrap(lazy.awake(model))
        engine = lazy.sleep_of(model).hollow if asleep else generation.engine_of(lazy.awake(model), arguments)
        traits = self._find_traits(inner, original, manifest, environment)
        with buffered_logs() as told:
            try:
                call = generation.resolve(engine, arguments, traits)
            except UncacheableError:
                if not lazy.is_asleep(model):
                    raise
                # Perhaps only because a hollow model has no modules to ask.
                call = generation.resolve(generation.engine_of(lazy.awake(model), arguments), arguments, traits)
        if call.samples:
            _one_sampling_thread()
        return call, told

    def _refusal(self, error: Exception) -> UncacheableError:
        self.cache.warn(f"this call runs uncached, evalcache failed on it: {type(error).__name__}: {error}")
        return UncacheableError("internal", f"{type(error).__name__}: {error}")

    def _serve(self, model: Any, watch: Watch, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        cache = self.cache
        manifest, environment = self.look(model, watch)
        call, told = self.resolve(model, original, manifest, environment, arguments)
        actions = [Action(manifest.root, request, self._strictly(environment, call)) for request in call.requests]
        computed: list[Any] = []

        def compute(missing: Sequence[int]) -> Iterator[tuple[int, Result]]:
            self.wake(model, watch, manifest)
            output, results = self._compute(call, unwrap(lazy.awake(model)), original, missing)
            computed.append((missing, output))
            return zip(missing, results, strict=True)

        results = cache.serve(watch, actions, compute, client=CLIENT, all_or_none=cache.match == "strict")
        if computed and len(computed[0][0]) == len(actions):
            return computed[0][1]  # everything was computed: what the engine returned, untouched
        with cache.counts.taking("decode"):
            output = outputs.assemble_batch(call, results[0]) if call.whole else outputs.assemble_rows(call, results)
        if not computed:
            told.repeat()
            generation.warn_as_computed(call, outputs.sequences(output).shape[1])
            streaming.replay(arguments.get("streamer"), call.prefix, outputs.sequences(output))
        return output

    def _compute(self, call: Call, inner: Any, original: Callable[..., Any], missing: Sequence[int]) -> tuple[Any, list[Result]]:
        device = call.ids.device
        chosen = call.arguments if call.whole else generation.select_rows(call, missing)
        with measured(inner, device, self.cache.meter) as watch:
            output = original(**chosen)
        try:
            with self.cache.counts.taking("write"):
                return output, self._results(call, output, missing, watch)
        except UncacheableError as error:
            raise _Unstorable(output, error, call.rows) from error
        except Exception as error:
            # The script has its answer, whatever we failed at: where all of it was computed, this one.
            self.cache.warn(f"this call is not stored, evalcache failed on it: {type(error).__name__}: {error}")
            failed = UncacheableError("internal", f"{type(error).__name__}: {error}")
            if call.whole or len(missing) == call.rows:
                raise _Unstorable(output, failed, call.rows) from error
            raise failed from error

    def _results(self, call: Call, output: Any, missing: Sequence[int], watch: Any) -> list[Result]:
        name = device_name(call.ids.device.type)
        if call.whole:
            result = outputs.batch_result(call, output)
            cost = share(watch, [int(call.mask.sum())], [len(result.tokens) // 4], name)[0]
            return [replace(result, cost=replace(cost, batch_size=call.rows))]
        results = outputs.row_results(call, output, len(missing))
        prompts = [int(call.mask[row].sum()) for row in missing]
        costs = share(watch, prompts, [outputs.tokens_made(result) for result in results], name)
        return [replace(result, cost=cost) for result, cost in zip(results, costs, strict=True)]

    def _strictly(self, environment: Environment, call: Call) -> Environment:
        """Under strict matching a row's batch is part of its key: its neighbours and the padded width, in order."""
        recorded = dict(environment.recorded) | {"batch_rows": call.rows, "width": int(call.ids.shape[1])}
        if self.cache.match != "strict":
            return Environment(environment.keyed, recorded)
        batch = generation.batch_digest(call)
        return Environment(type(environment.keyed)(dict(environment.keyed) | {"batch": batch}), recorded)

    def _find_traits(self, inner: Any, original: Callable[..., Any], manifest: Manifest, environment: Environment) -> Traits:
        def ask() -> list[bool]:
            with buffered_logs():
                found = probe(unwrap(lazy.awake(inner)), functools.partial(original))
            return [found.rows, found.left, found.right, found.draws, found.steady]

        return Traits(*self.once([manifest.root.value, environment.keyed.digest.value], ask))

    def once(self, parts: Sequence[Any], ask: Callable[[], Any]) -> Any:
        """What ``ask`` says of a model: asked once per set of weights and environment, which ``parts`` name, and stored.

        Not per class: in a fresh model, say, embeddings of positions may still be zero.
        """
        name = generation.traits_name(parts)
        if name not in self._known:
            stored = self.cache.get_object(name)
            if stored is None:
                with self.cache.counts.taking("probe"):
                    stored = encode_canonical(ask())
                self.cache.put_object(name, stored)
            self._known[name] = decode(stored)
        return self._known[name]


def _one_sampling_thread() -> None:
    """Samples of several threads draw from one generator in an order that nobody can repeat; one after another they may."""
    mine = threading.current_thread()
    if Seam.sampling_thread is None or not Seam.sampling_thread.is_alive():
        Seam.sampling_thread = mine
    if Seam.sampling_thread is not mine:
        raise UncacheableError("threads")


@contextlib.contextmanager
def not_again() -> Iterator[None]:
    """While one call is served, the seams below it are out of the way."""
    _inside.active = True
    try:
        yield
    finally:
        _inside.active = False


class _Unstorable(Exception):
    """A whole batch was computed, and holds what cannot be stored: its caller has it all the same."""

    def __init__(self, output: Any, error: UncacheableError, rows: int) -> None:
        super().__init__(str(error))
        self.rows = rows
        self.output = output
        self.error = error


class AnotherModelError(Exception):
    """A checkpoint woke as another model than it was when it was met first."""


def _fingerprint_of(model: Any) -> Callable[[], Manifest]:
    """How to read a model: a sleeping one by what is known of it, as long as nothing speaks against that."""
    fingerprinter: Fingerprinter | None = None
    found = weakref.ref(model)

    def read() -> Manifest:
        nonlocal fingerprinter
        model = found()
        if lazy.is_asleep(model):
            manifest = lazy.sleep_of(model).manifest()
            if manifest is not None:
                return manifest
        if fingerprinter is None:
            fingerprinter = Fingerprinter(lazy.awake(model))
        return fingerprinter.manifest()

    return read


def _bare_generate(model: Any) -> Callable[..., Any]:
    """The untouched ``generate`` of a model's class."""
    generate = type(model).generate
    return getattr(generate, ORIGINAL, generate)
