"""lm-evaluation-harness below `evalcache plan`: its requests are looked up, and it ends before it scores anything.

It asks for one kind of requests after the other, so each gets answers of the right form, which mean nothing and reach nobody: the
process ends when the harness turns to its scores, and the harness's own cache is kept from them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from evalcache.errors import UncacheableError
from evalcache.integrations import lm_eval
from evalcache.integrations.clients import LM_EVAL
from evalcache.integrations.lm_eval import Adapter, labels_of
from evalcache.integrations.lm_eval_requests import Asked, canonical_settings, read_request, refuse_mixtures
from evalcache.integrations.planning import PlanSeam
from evalcache.integrations.seam import Seam
from evalcache.planning import Looked, PlanCache, WouldLoad
from evalcache.records import Fields
from evalcache.serving import Labels

_OTHER_LOADERS = ("autogptq", "gptqmodel", "tp_plan")
_put_back: list[tuple[Any, str, Any]] = []


def install(cache: PlanCache) -> None:
    """Look up what the harness's ``hf`` models are asked. Their module has been imported."""
    if faults := LM_EVAL.faults():
        cache.end(f"lm_eval is another version than the tested ones: {'; '.join(faults)}")
    lm_eval.install(cache)
    if lm_eval._evaluator is not None:
        lm_eval._evaluator.remove()  # nothing is scored, and `watch_evaluator` waits for the same module
    lm_eval._adapter = PlanAdapter(cache, sys.modules["lm_eval.models.huggingface"].HFLM)


def uninstall() -> None:
    """Put everything back."""
    lm_eval.uninstall()
    while _put_back:
        owner, name, original = _put_back.pop()
        setattr(owner, name, original)


def watch_evaluator(cache: PlanCache) -> None:
    """End the harness where it would begin with another model than ``hf``, or with its scores. Its evaluator was imported."""
    evaluator = sys.modules["lm_eval.evaluator"]
    asked, evaluated = evaluator.simple_evaluate, evaluator.evaluate

    def simple_evaluate(model: Any, *args: Any, **kwargs: Any) -> Any:
        if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
            cache.end("several processes share the requests: plan with one, its requests are the same")
        if isinstance(model, str):
            from lm_eval.api.registry import get_model

            _refuse_model(cache, get_model(model), model)
        given = kwargs.get("model_args", args[0] if args else None)
        if isinstance(given, str):
            from lm_eval.utils import simple_parse_args_string

            given = simple_parse_args_string(given)
        for name in _OTHER_LOADERS:
            if isinstance(given, dict) and given.get(name):
                cache.end(f"{name}= loads the model in a way of its own")
        return asked(model, *args, **kwargs)

    def evaluate(lm: Any, task_dict: Any, *args: Any, **kwargs: Any) -> Any:
        from lm_eval.api.model import CacheHook, CachingLM

        inner = lm.lm if isinstance(lm, CachingLM) else lm
        _refuse_model(cache, type(inner), type(inner).__name__)
        cache.facts["own_cache"] = inner is not lm
        inner.set_cache_hook(CacheHook(None))
        tasks = task_dict.get("tasks") if isinstance(task_dict, dict) else None
        if not isinstance(tasks, dict):
            cache.end("the harness was handed its tasks in a form that is not known")
        for task in tasks.values():
            task.apply_filters = lambda *_, **__: cache.end()
        evaluated(inner, task_dict, *args, **kwargs)
        cache.end()

    for name, ours in (("simple_evaluate", simple_evaluate), ("evaluate", evaluate)):
        _put_back.append((evaluator, name, getattr(evaluator, name)))
        setattr(evaluator, name, ours)


def _refuse_model(cache: PlanCache, kind: type, name: str) -> None:
    from lm_eval.models.huggingface import HFLM

    if not issubclass(kind, HFLM):
        cache.end(f"the harness's model {name} is not served by evalcache: all that it is asked runs")


class PlanAdapter(Adapter):
    """Notes what would become of the harness's requests."""

    cache: PlanCache

    def loglikelihood_rolling(self, lm: Any, original: Callable[..., Any], requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Look up the windows of all requests."""
        kind = "loglikelihood_rolling"
        try:
            self._refuse_others(lm)
            windows, labels = lm_eval._windows(lm, requests)
            asked = [(None, *window) for window in windows]
            if lm_eval._odd(lm, asked):
                raise UncacheableError("unsupported")
        except UncacheableError as error:
            self.cache.refused(kind, "loglikelihood", labels_of(requests).tasks, error.reason)
        else:
            self._look_rows(lm, kind, asked, range(len(asked)), labels)
        return [0.0] * len(requests)

    def _loglikelihood_tokens(self, lm: Any, original: Callable[..., Any], requests: Any, *args: Any, **kwargs: Any) -> Any:
        asked = list(requests)
        labels = getattr(self._state, "labels", None) or Labels([""] * len(asked), [""] * len(asked))
        try:
            self._refuse_others(lm)
        except UncacheableError as error:
            self.cache.refused("loglikelihood", "loglikelihood", labels.tasks, error.reason)
        else:
            odd = lm_eval._odd(lm, asked)
            self.cache.refused("loglikelihood", "loglikelihood", [labels.tasks[place] for place in odd], "unsupported")
            even = sorted(set(range(len(asked))) - set(odd))
            self._look_rows(lm, "loglikelihood", asked, even, labels)
        return [(0.0, False)] * len(asked)

    def generate_until(self, lm: Any, original: Callable[..., Any], requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Look up the greedy requests, and the sampled ones."""
        labels = labels_of(requests)
        try:
            self._refuse_others(lm)
            asked = [read_request(lm, one) for one in requests]
            refuse_mixtures(asked)
        except UncacheableError as error:
            self.cache.refused("generate_until", "generate_until", labels.tasks, error.reason)
            return [""] * len(requests)
        for sampled in (False, True):
            places = [place for place, one in enumerate(asked) if one.sampled == sampled]
            if places:
                part = Labels([labels.tasks[place] for place in places], [labels.documents[place] for place in places])
                some = [requests[place] for place in places]
                self._look_generations(lm, original, some, [asked[place] for place in places], part, sampled)
        return [""] * len(requests)

    def _look_rows(self, lm: Any, kind: str, asked: Sequence[Any], places: Sequence[int], labels: Labels) -> None:
        tasks = [labels.tasks[place] for place in places]
        if not places:
            return
        try:
            with self._seam(lm).expecting():
                # The tokens that one forward reads: the last one is only predicted.
                self._score(lm, asked, places, disable_tqdm=True)
        except UncacheableError as error:
            self.cache.refused(kind, "loglikelihood", tasks, error.reason)
        except Looked as looked:
            sizes = [
                (len(one.request.tokens) // 4 + len(one.request.inputs["continuation"]) // 4 - 1, 0) for one in looked.actions
            ]
            self.cache.found(kind, looked, sizes, tasks)
        except WouldLoad:
            rows = [(tuple(asked[place][1]), tuple(asked[place][2])) for place in places]
            limit = lm.max_length
            sizes = [(min(len(context), limit + 1 - len(tail)) + len(tail) - 1, 0) for context, tail in rows]
            self._runs(kind, "loglikelihood", rows, sizes, tasks)

    def _look_generations(
        self, lm: Any, original: Callable[..., Any], requests: Any, asked: Sequence[Asked], labels: Labels, sampled: bool
    ) -> None:
        kind = "generate_until"
        tasks = list(labels.tasks)
        together = ", ".join(dict.fromkeys(tasks))
        name = "generate_until, sampled" if sampled else kind
        limits = [int(one.kwargs["max_gen_toks"]) for one in asked]
        try:
            with self._seam(lm).expecting():
                self._generations.serve(lm, original, requests, labels, lm_eval._around(lm), True)
        except UncacheableError as error:
            self.cache.refused(name, kind, tasks, error.reason)
        except Looked as looked:
            if sampled:  # all of them are one
                prompts = sum(len(tokens) // 4 for tokens, _ in looked.actions[0].request.inputs["requests"])
                self.cache.found(name, looked, [(prompts, sum(limits))], [together])
                self.cache.group(name, kind, together).samples += len(asked)
            else:
                sizes = [(len(one.request.tokens) // 4, limit) for one, limit in zip(looked.actions, limits, strict=True)]
                self.cache.found(name, looked, sizes, tasks)
        except WouldLoad:
            prompts = [min(len(lm.tok_encode(one.text)), lm.max_length - one.kwargs["max_gen_toks"]) for one in asked]
            if sampled:
                self.cache.runs(name, "generate_until_call", [(sum(prompts), sum(limits))], [together])
                self.cache.group(name, kind, together).samples += len(asked)
            else:
                same = [(one.text, Fields(canonical_settings(one.kwargs)).canonical, one.until) for one in asked]
                self._runs(name, kind, same, list(zip(prompts, limits, strict=True)), tasks)

    def _runs(self, kind: str, stored: str, same: Sequence[Any], sizes: Sequence[tuple[int, int]], tasks: Sequence[str]) -> None:
        """All of them run, equal ones once."""
        first: dict[Any, int] = {}
        for place, one in enumerate(same):
            if first.setdefault(one, place) != place:
                self.cache.group(kind, stored, tasks[place]).duplicates += 1
        places = list(first.values())
        self.cache.runs(kind, stored, [sizes[place] for place in places], [tasks[place] for place in places])

    def _seam(self, lm: Any) -> PlanSeam:
        """Note what model is asked, and where it would answer."""
        seam = Seam.of(self.cache)
        assert isinstance(seam, PlanSeam)
        self.cache.model.update(seam.about(lm._model))
        self.cache.facts.update(client="lm_eval", batch_size=str(lm.batch_size))
        try:
            with seam.expecting(), lm_eval._around(lm)():
                manifest, environment = seam.look(lm._model, seam.watch(lm._model))
        except (UncacheableError, WouldLoad):
            self.cache.facts["device"] = _device_name(lm)
        else:
            self.cache.model.setdefault("root", manifest.root.hex)
            self.cache.meet_environment(environment)
        return seam

    def _bare(self, error: UncacheableError, count: int, original: Callable[[], Any]) -> Any:
        self.cache.end(f"{count} requests would run: {error}")


def _device_name(lm: Any) -> str:
    from evalcache.environment import device_name

    return device_name(lm.device.type)
