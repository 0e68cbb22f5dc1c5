"""lm-evaluation-harness: the requests of its ``hf`` models, served where it hands them to the model.

Its requests arrive in one call per kind, so hits are taken out before batches are made, and the model sleeps where nothing is
left. Log-likelihoods are scored by our own loop over its `_model_call` and stored by token ids: one entry for all clients.
Generations are computed by its own `generate_until` (`lm_eval_generation.py`).

Only a model whose methods are the harness's own is served here: a subclass may do anything in between.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from evalcache.cache import Cache
from evalcache.code import ORIGINAL, origin_of
from evalcache.collector import paused_for
from evalcache.errors import UncacheableError
from evalcache.importhook import ImportHook
from evalcache.integrations.clients import LM_EVAL, version_of_client
from evalcache.integrations.lm_eval_generation import Generations
from evalcache.integrations.lm_eval_tasks import watch_scores
from evalcache.integrations.patching import Patches
from evalcache.integrations.scoring import Scoring, score_rows
from evalcache.integrations.seam import not_again
from evalcache.records import Policy, Result, unpack_logprobs
from evalcache.serving import Labels

CLIENT = LM_EVAL.name
_METHODS = (
    "loglikelihood loglikelihood_rolling generate_until _loglikelihood_tokens _model_call _model_generate _select_cont_toks "
    "_encode_pair tok_encode tok_batch_encode tok_decode max_length max_gen_toks batch_size prefix_token_id eot_token_id model"
).split()

_log = logging.getLogger("lm_eval.evalcache")
_patches = Patches()
_adapter: Adapter | None = None
_evaluator: ImportHook | None = None


def install(cache: Cache) -> None:
    """Serve the harness's ``hf`` models from ``cache``. Its module has been imported.

    A version whose seams have moved is left alone, with one warning.
    """
    global _adapter, _evaluator
    uninstall()
    if faults := LM_EVAL.faults():
        cache.warn(f"lm_eval {version_of_client(LM_EVAL)} runs without its adapter: {'; '.join(faults)}")
        return
    from lm_eval.models.huggingface import HFLM

    _adapter = Adapter(cache, HFLM)
    for name in ("loglikelihood", "loglikelihood_rolling", "_loglikelihood_tokens", "generate_until"):
        _patches.replace(HFLM, name, _through(name))
    _patches.replace(HFLM, "get_model_info", _with_block)
    _evaluator = ImportHook(("lm_eval.evaluator",), _watch_evaluator)  # anew: it may have been imported since
    _evaluator.install()


def uninstall() -> None:
    """Put back what `install` replaced."""
    global _adapter
    _adapter = None
    if _evaluator is not None:
        _evaluator.remove()
    _patches.undo()


def _watch_evaluator() -> None:
    # Its import may not be over yet, and the package does not have it until then.
    evaluator = sys.modules["lm_eval.evaluator"]
    _patches.replace(evaluator, "evaluate", lambda original: watch_scores(original, _told, CLIENT))


def _told() -> Cache | None:
    return None if _adapter is None or _adapter.cache.policy is Policy.OFF else _adapter.cache


def _through(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def patched(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
            adapter = _adapter
            if adapter is None or adapter.cache.policy is Policy.OFF:
                return original(self, requests, *args, **kwargs)
            return getattr(adapter, name)(self, original, requests, *args, **kwargs)

        return patched

    return make


def _with_block(original: Callable[..., Any]) -> Callable[..., Any]:
    """The results' JSON says what was served."""

    def get_model_info(self: Any) -> dict[str, Any]:
        told = original(self)
        if _adapter is not None and isinstance(told, dict):
            told["evalcache"] = _adapter.cache.block()
        return told

    return get_model_info


class Adapter:
    """Serves one process's harness from one cache."""

    def __init__(self, cache: Cache, hflm: type) -> None:
        self.cache = cache
        self.cache.clients[CLIENT] = version_of_client(LM_EVAL)
        self._hflm = hflm
        self._state = threading.local()
        self._generations = Generations(cache, CLIENT)

    # --- the harness's methods -----------------------------------------------------------------------------------------

    def loglikelihood(self, lm: Any, original: Callable[..., Any], requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Remember what the requests are called, for `_loglikelihood_tokens`, which is told only their ids."""
        with self._labelled(labels_of(requests)):
            return original(lm, requests, *args, **kwargs)

    def loglikelihood_rolling(self, lm: Any, original: Callable[..., Any], requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Score all windows of all requests at once; the harness then does the rest, and finds them answered."""
        try:
            self._refuse_others(lm)
            windows, labels = _windows(lm, requests)
            if _odd(lm, [(None, *window) for window in windows]):
                raise UncacheableError("unsupported")
            with self._labelled(labels):
                answers = self._score(lm, [(None, *window) for window in windows], range(len(windows)), disable_tqdm=True)
        except UncacheableError:  # counted where the harness asks for the windows, batch by batch
            return original(lm, requests, *args, **kwargs)
        self._state.known = {_window_key(*window): answer for window, answer in zip(windows, answers, strict=True)}
        detects = str(lm.batch_size).startswith("auto")
        if detects:  # nothing is left to be computed: the size of a batch is of no use, and would wake the model
            lm._detect_batch_size = lambda *_: lm.max_batch_size
        try:
            return original(lm, requests, *args, **kwargs)
        finally:
            self._state.known = None
            if detects:
                del lm._detect_batch_size

    def _loglikelihood_tokens(self, lm: Any, original: Callable[..., Any], requests: Any, *args: Any, **kwargs: Any) -> Any:
        known = getattr(self._state, "known", None) or {}
        asked = list(requests)
        found = [known.get(_window_key(context, tail)) for _, context, tail in asked] if known else [None]
        if None not in found:
            return found
        try:
            self._refuse_others(lm)
            with paused_for(len(asked)):
                with self.cache.counts.taking("keys"):
                    odd = _odd(lm, asked)
                    even = [place for place in range(len(asked)) if place not in odd]
                answers = dict(zip(even, self._score(lm, asked, even, *args, **kwargs), strict=True))
        except UncacheableError as error:
            return self._bare(error, len(asked), lambda: original(lm, requests, *args, **kwargs))
        for place in even:
            if (text := asked[place][0]) is not None:  # windows are told of by the request that they belong to
                lm.cache_hook.add_partial("loglikelihood", text, answers[place])
        if odd:
            mixed = [asked[place] for place in odd]
            why = UncacheableError("unsupported", "requests of one input and different lengths, which the harness mixes up")
            answers |= zip(odd, self._bare(why, len(odd), lambda: original(lm, mixed, *args, **kwargs)), strict=True)
        return [answers[place] for place in range(len(asked))]

    def generate_until(self, lm: Any, original: Callable[..., Any], requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Serve what is stored, have the harness compute the others."""
        try:
            self._refuse_others(lm)
            return self._generations.serve(lm, original, requests, labels_of(requests), _around(lm), *args, **kwargs)
        except UncacheableError as error:
            return self._bare(error, len(requests), lambda: original(lm, requests, *args, **kwargs))

    # --- inside --------------------------------------------------------------------------------------------------------

    def _score(
        self,
        lm: Any,
        asked: Sequence[tuple[Any, list[int], list[int]]],
        places: Sequence[int],
        disable_tqdm: bool = False,
        override_bs: Any = None,
    ) -> list[tuple[float, bool]]:
        """Answers to the requests at ``places``."""
        with self.cache.counts.taking("keys"):
            rows = _rows(lm, [asked[place] for place in places])
        if not rows:
            return []
        if not (lm.softmax_dtype is None or isinstance(lm.softmax_dtype, torch.dtype)):
            raise UncacheableError("argument", f"softmax_dtype {lm.softmax_dtype!r}")
        with contextlib.ExitStack() as shown:
            bar: Any = None

            def announce(stored: int, missing: int) -> None:
                nonlocal bar
                _log.info(f"evalcache: loglikelihood {stored}/{stored + missing} stored, {missing} to run")
                if missing:
                    bar = _bar(missing, disable_tqdm or lm.rank != 0)
                    shown.callback(bar.close)

            scoring = Scoring(
                softmax_dtype=lm.softmax_dtype,
                batch_rows=lambda inputs: _batch_rows(lm, inputs),
                forward=lambda _model, ids, _mask: lm._model_call(ids),
                reads="ids",
                around=_around(lm),
                alone=False,
                announce=announce,
                tick=lambda count: bar.update(count),
            )
            labels = getattr(self._state, "labels", None)
            if labels is not None:
                known = len(labels.tasks) == len(asked)
                labels = Labels([labels.tasks[p] for p in places], [labels.documents[p] for p in places]) if known else None
            results = score_rows(self.cache, lm._model, rows, scoring, client=CLIENT, labels=labels)
        with self.cache.counts.taking("decode"):
            return _answers(results)

    def _refuse_others(self, lm: Any) -> None:
        """Raises UncacheableError: ``lm`` may answer otherwise than the harness's own class would."""
        cls = type(lm)
        for name in _METHODS:
            mine, theirs = inspect.getattr_static(cls, name), inspect.getattr_static(self._hflm, name)
            function = getattr(mine, "fget", None) or getattr(mine, ORIGINAL, mine)
            if name in vars(lm) or mine is not theirs or origin_of(function) != "lm_eval":
                raise UncacheableError("unsupported", f"{cls.__name__}.{name} is not the harness's own")
        if lm.backend != "causal":
            raise UncacheableError("unsupported", "an encoder–decoder model at the harness's requests")
        if lm.world_size > 1 and str(lm.batch_size).startswith("auto"):
            raise UncacheableError("unsupported", "an automatic batch size agreed on by several processes")

    def _bare(self, error: UncacheableError, count: int, original: Callable[[], Any]) -> Any:
        _log.info(f"evalcache: {count} requests run uncached: {error}")
        # Not once more at `generate`, where the harness's stop criteria are Uncacheable anyway.
        with self.cache.bypassed(error, requests=count, client=CLIENT), not_again():
            return original()

    @contextlib.contextmanager
    def _labelled(self, labels: Labels) -> Any:
        self._state.labels = labels
        try:
            yield
        finally:
            self._state.labels = None


def labels_of(requests: Sequence[Any]) -> Labels:
    """Tasks and documents of the harness's instances."""
    return Labels([str(one.task_name or "") for one in requests], [_document(one) for one in requests])


def _document(instance: Any) -> str:
    return "" if instance.doc_id is None else str(instance.doc_id)


def _odd(lm: Any, asked: Sequence[tuple[Any, list[int], list[int]]]) -> list[int]:
    """Places of requests that the harness answers from one row though their continuations are not of one length: of the shorter
    ones it reads the wrong places, so the answer belongs to the call and not to the request."""
    if not lm.logits_cache:
        return []
    rough: dict[tuple[int, int | None, int | None], list[int]] = {}
    for place, (_, context, tail) in enumerate(asked):
        ends = context[0] if context else None, tail[-2] if len(tail) > 1 else context[-1] if context else None
        rough.setdefault((len(context) + len(tail), *ends), []).append(place)
    found = []
    for places in rough.values():
        if len(places) > 1 and len({len(asked[place][2]) for place in places}) > 1:
            groups: dict[tuple[int, ...], list[int]] = {}
            for place in places:
                groups.setdefault(tuple(asked[place][1] + asked[place][2][:-1]), []).append(place)
            found += [same for same in groups.values() if len({len(asked[place][2]) for place in same}) > 1]
    return sorted(place for same in found for place in same)


def _windows(lm: Any, requests: Sequence[Any]) -> tuple[list[tuple[list[int], list[int]]], Labels]:
    """The windows in which the harness reads long texts, with what they belong to."""
    from lm_eval import utils

    windows, tasks, documents = [], [], []
    for one in requests:
        (text,) = one.args
        found = utils.get_rolling_token_windows(
            token_list=lm.tok_encode(text), prefix_token=lm.prefix_token_id, max_seq_len=lm.max_length, context_len=1
        )
        mine = [utils.make_disjoint_window(window) for window in found]
        windows += mine
        tasks += [str(one.task_name or "")] * len(mine)
        documents += [_document(one)] * len(mine)
    return windows, Labels(tasks, documents)


def _window_key(context: Sequence[int], tail: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(context), tuple(tail)


def _rows(lm: Any, asked: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Context and continuation of each request, as much of them as the model can read."""
    limit = lm.max_length
    rows = []
    for _, context, tail in asked:
        if not context or not tail or len(tail) > limit:
            raise UncacheableError("argument", "a request that the harness refuses")
        if len(context) + len(tail) <= limit + 1:
            rows.append((context, tail))
        else:
            # As the harness says it, of those that are computed and of those that are stored.
            logging.getLogger("lm_eval.models.huggingface").warning(
                f"Combined length of context ({len(context)}) and continuation ({len(tail)}) exceeds model's maximum length "
                f"({limit}). Truncating {len(context) + len(tail) - limit + 1} tokens from the left."
            )
            rows.append((context[-(limit + 1 - len(tail)) :], tail))
    return rows


def _answers(results: Sequence[Result]) -> list[tuple[float, bool]]:
    """As the harness adds up: in the dtype of the log-probabilities, so that short dtypes round as they would have.

    Rows of one length are added up together: one by one, that would take as long as finding them.
    """
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(results)
    alike: dict[tuple[str, int], list[int]] = {}
    for place, result in enumerate(results):
        alike.setdefault((result.scalars["dtype"], len(result.logprobs)), []).append(place)
    for (dtype, _), places in alike.items():
        logprobs = unpack_logprobs(b"".join(results[place].logprobs for place in places)).reshape(len(places), -1)
        sums = torch.from_numpy(logprobs.copy()).to(getattr(torch, dtype)).sum(dim=1).tolist()
        for place, total in zip(places, sums, strict=True):
            answers[place] = (total, bool(results[place].scalars["is_greedy"]))
    return answers


def _around(lm: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if lm.mixed_precision_dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device_type=lm.device.type, dtype=lm.mixed_precision_dtype)


def _batch_rows(lm: Any, inputs: Sequence[tuple[int, ...]]) -> int:
    if lm.batch_size != "auto":
        return int(lm.batch_size)
    lm.batch_sizes = {}
    return int(lm._batch_scheduler(0, [(None, list(one), [0]) for one in inputs]))


def _bar(total: int, disable: bool) -> Any:
    from lm_eval.models.huggingface import tqdm

    return tqdm(total=total, disable=disable, desc="Running loglikelihood requests")
