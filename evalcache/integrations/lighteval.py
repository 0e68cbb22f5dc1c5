"""lighteval: the requests of its ``accelerate`` backend, served where its pipeline hands them to the model.

Our store stands in the place of its `SampleCache`, which knows a sample by its number and a model by its name, writes into the
model's folder, and has served one model's answers as another's: here it neither serves nor writes. The form in which it hands
answers back (lists, rounded to ten digits) is kept, since that is what the bare client's scores are made of.

Only a model whose methods are lighteval's own is served: a subclass may do anything in between.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from evalcache.cache import Cache
from evalcache.code import ORIGINAL, origin_of
from evalcache.errors import UncacheableError
from evalcache.integrations import lazy
from evalcache.integrations.clients import LIGHTEVAL, version_of_client
from evalcache.integrations.generators import generator_states, restore_generators
from evalcache.integrations.lighteval_generation import Generations
from evalcache.integrations.lighteval_scores import score_documents
from evalcache.integrations.lighteval_tasks import ScoreWatch
from evalcache.integrations.patching import Patches
from evalcache.integrations.seam import not_again
from evalcache.records import Policy

CLIENT = LIGHTEVAL.name
_METHODS = (
    "greedy_until loglikelihood _loglikelihood_tokens _padded_greedy_until _generate _generate_padded _get_batch_size "
    "prepare_batch_logprob pad_and_gather tok_encode tok_encode_pair tok_decode tokenizer add_special_tokens max_length device "
    "disable_tqdm"
).split()
_FUNCTIONS = ("stop_sequences_criteria", "LoglikelihoodDataset", "GenerativeTaskDataset", "MultiTokenEOSCriteria")

_log = logging.getLogger("lighteval.evalcache")
_patches = Patches()
_adapter: Adapter | None = None


def install(cache: Cache) -> None:
    """Serve lighteval's transformers models from ``cache``. Their module has been imported.

    A version whose seams have moved is left alone, with one warning.
    """
    global _adapter
    uninstall()
    if faults := LIGHTEVAL.faults():
        cache.warn(f"lighteval {version_of_client(LIGHTEVAL)} runs without its adapter: {'; '.join(faults)}")
        return
    from lighteval.logging.info_loggers import DetailsLogger, MetricsLogger
    from lighteval.models.transformers import transformers_model

    _adapter = Adapter(cache, transformers_model)
    for name in ("greedy_until", "loglikelihood", "loglikelihood_rolling"):
        _patches.replace(transformers_model.TransformersModel, name, _through(name))
    _patches.replace(transformers_model, "calculate_maximum_sizes", _size_unless_asleep)
    scores = ScoreWatch(_told, CLIENT)
    _patches.replace(DetailsLogger, "log", scores.noting)
    _patches.replace(MetricsLogger, "aggregate", scores.telling)


def uninstall() -> None:
    """Put back what `install` replaced."""
    global _adapter
    _adapter = None
    _patches.undo()


def _told() -> Cache | None:
    return None if _adapter is None or _adapter.cache.policy is Policy.OFF else _adapter.cache


def _through(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def patched(self: Any, docs: Any, *args: Any, **kwargs: Any) -> Any:
            adapter = _adapter
            if adapter is None or adapter.cache.policy is Policy.OFF:
                return original(self, docs, *args, **kwargs)
            return getattr(adapter, name)(self, original, docs, *args, **kwargs)

        return patched

    return make


def _size_unless_asleep(original: Callable[..., Any]) -> Callable[..., Any]:
    """lighteval measures a model when it is made, and has no use for the number: a sleeping one is not woken for it."""

    def calculate_maximum_sizes(model: Any) -> Any:
        return (0, (0, [])) if lazy.is_asleep(model) else original(model)

    return calculate_maximum_sizes


class Adapter:
    """Serves one process's lighteval from one cache."""

    def __init__(self, cache: Cache, module: Any) -> None:
        self.cache = cache
        self.cache.clients[CLIENT] = version_of_client(LIGHTEVAL)
        self._module = module
        self._generations = Generations(cache, CLIENT, module)

    def loglikelihood(self, lm: Any, original: Callable[..., Any], docs: Any) -> Any:
        """Log-probabilities of each document's choices."""
        listed = _listed(docs)

        def serve() -> list[Any]:
            return score_documents(self.cache, CLIENT, lm, self._module, listed)

        return self._answer(lm, original, listed, serve, sum(len(doc.choices or ()) for doc in listed))

    def greedy_until(self, lm: Any, original: Callable[..., Any], docs: Any) -> Any:
        """Generated text for each document."""
        listed = _listed(docs)

        def serve() -> list[Any]:
            if lm.continuous_batching:
                raise UncacheableError("unsupported", "continuous batching")
            return self._generations.serve(lm, listed)

        return self._answer(lm, original, listed, serve, len(listed))

    def loglikelihood_rolling(self, lm: Any, original: Callable[..., Any], docs: Any) -> Any:
        """As it is: the tested version's own answers are not usable, and its cache drops them all."""
        error = UncacheableError("unsupported", "lighteval's rolling log-likelihoods")
        with self.cache.bypassed(error, requests=max(1, len(_listed(docs))), client=CLIENT):
            return original(lm, docs)

    # --- inside --------------------------------------------------------------------------------------------------------

    def _answer(
        self, lm: Any, original: Callable[..., Any], docs: list[Any], serve: Callable[[], list[Any]], count: int
    ) -> list[Any]:
        bare = original.__wrapped__  # type: ignore[attr-defined]  # below lighteval's own cache
        if not docs:
            return bare(lm, docs)
        device = torch.device(lm.device)
        states = generator_states(device)
        try:
            self._refuse_others(lm)
            responses = serve()
        except UncacheableError as error:
            refused = error.with_traceback(None)
        else:
            return as_lighteval_reads(lm, docs, responses)
        # What was drawn on the way (each pass over its batches draws a number) is drawn again.
        restore_generators(states, device)
        _log.info(f"evalcache: {count} requests run uncached: {refused}")
        # Once, here: `generate` beneath refuses lighteval's stop criteria anyway.
        with not_again(), self.cache.bypassed(refused, requests=max(1, count), client=CLIENT):
            return as_lighteval_reads(lm, docs, bare(lm, docs))

    def _refuse_others(self, lm: Any) -> None:
        """Raises UncacheableError: ``lm`` may answer otherwise than lighteval's own class would."""
        cls, theirs = type(lm), self._module.TransformersModel
        for name in _METHODS:
            mine = inspect.getattr_static(cls, name)
            function = getattr(mine, "fget", None) or getattr(mine, ORIGINAL, mine)
            if name in vars(lm) or mine is not inspect.getattr_static(theirs, name) or origin_of(function) != "lighteval":
                raise UncacheableError("unsupported", f"{cls.__name__}.{name} is not lighteval's own")
        for name in _FUNCTIONS:
            found = getattr(self._module, name)
            function = found.__init__ if isinstance(found, type) else found
            if not found.__module__.startswith("lighteval.") or origin_of(function) != "lighteval":
                raise UncacheableError("unsupported", f"{name} is not lighteval's own")
        if origin_of(self._module.MultiTokenEOSCriteria.__call__) != "lighteval":
            raise UncacheableError("unsupported", "MultiTokenEOSCriteria is not lighteval's own")
        if lm.accelerator is not None and lm.accelerator.num_processes > 1:
            raise UncacheableError("unsupported", "lighteval on several processes")


def as_lighteval_reads(lm: Any, docs: Sequence[Any], responses: Sequence[Any]) -> list[Any]:
    """Responses as lighteval's own cache hands them back when it has just written them; untouched where it has none.

    Scores are made of these: numbers have ten digits behind the point, and tensors have become lists.
    """
    own = getattr(lm, "_cache", None)
    if own is None:
        return list(responses)
    from datasets import Dataset

    places: dict[str, list[int]] = {}
    for place, doc in enumerate(docs):
        places.setdefault(doc.task_name, []).append(place)
    read: dict[int, Any] = {}
    for mine in places.values():
        rows = [{"sample_id": docs[place].id, "sample": own._dump_sample(responses[place])} for place in mine]
        frame = Dataset.from_list(rows).to_pandas().set_index("sample_id")
        read |= {place: own._load_sample(frame.iloc[number]) for number, place in enumerate(mine)}
    return [read[place] for place in range(len(docs))]


def _listed(docs: Any) -> list[Any]:
    from lighteval.utils.utils import as_list

    return list(as_list(docs))
