"""inspect_ai: its tasks, samples and scores, for the ledger. Nothing in here changes a result.

Not by inspect_ai's own hooks: those are announced on the screen, and evals with hooks log more than those without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from evalcache.cache import Cache
from evalcache.digest import digest_bytes
from evalcache.integrations.patching import Patches
from evalcache.journal import DocumentsSeen, Scored, TaskSeen

_ROWS = 2000  # of one event
_CONTENT_LIMIT_BYTES = 64 << 10
_WORDS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}  # as `value_to_float` reads
_NOTED = "evalcache_noted"


def watch_scores(patches: Patches, logger: type, cache: Callable[[], Cache | None], client: str) -> None:
    """Have inspect_ai's log of a task tell the ledger, when the task ends, what each sample scored.

    Args:
        logger: its ``TaskLogger``. cache: the cache to tell, None where there is none.
    """

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def _record_sample_outcome(self: Any, sample: Any) -> Any:
            if cache() is not None:
                # By sample and epoch: one that is run again takes the place of its first result.
                vars(self).setdefault(_NOTED, {})[str(sample.id), sample.epoch] = sample
            return original(self, sample)

        return _record_sample_outcome

    def telling(original: Callable[..., Any]) -> Callable[..., Any]:
        async def log_finish(self: Any, *args: Any, **kwargs: Any) -> Any:
            noted, told = vars(self).pop(_NOTED, {}), cache()
            if noted and told is not None:
                try:
                    _tell(told, client, self.eval, list(noted.values()))
                except Exception as error:  # the ledger's questions must not cost the run
                    told.warn(f"scores of {self.eval.task} are not in the ledger: {type(error).__name__}: {error}")
            return await original(self, *args, **kwargs)

        return log_finish

    patches.replace(logger, "_record_sample_outcome", noting)
    patches.replace(logger, "log_finish", telling)


def _tell(cache: Cache, client: str, spec: Any, samples: list[Any]) -> None:
    run, task = cache.run_id, str(spec.task)
    cache.note(TaskSeen(run, client, task, str(spec.task_version), _settings(spec)))
    contents = {str(sample.id): _content(sample) for sample in samples}
    known = list(contents.items())
    for start in range(0, len(known), _ROWS):
        part = known[start : start + _ROWS]
        digests = tuple(digest_bytes(content.encode("utf-8", "replace")).value for _, content in part)
        short = tuple(content if len(content) <= _CONTENT_LIMIT_BYTES else "" for _, content in part)
        cache.note(DocumentsSeen(run, client, task, tuple(name for name, _ in part), digests, short))
    rows = [(str(sample.id), metric, value) for sample in samples for metric, value in _scores(sample)]
    for start in range(0, len(rows), _ROWS):
        documents, metrics, values = zip(*rows[start : start + _ROWS], strict=True)
        empty = ("",) * len(documents)
        cache.note(Scored(run, client, task, _role(cache, spec), documents, metrics, values, empty, (b"",) * len(documents)))


_first: dict[tuple[str, str], str] = {}


def _role(cache: Cache, spec: Any) -> str:
    """Empty for the first model that a run scores on a task: another one's scores must not be taken for more tries of it."""
    model = str(spec.model)
    return "" if _first.setdefault((cache.run_id, str(spec.task)), model) == model else model


def _settings(spec: Any) -> dict[str, Any]:
    """What the scores depend on beside the model."""
    settings = {
        "solver": spec.solver or "",
        "scorers": [one.name for one in spec.scorers or ()],
        "dataset": spec.dataset.name or "",
    }
    epochs = getattr(spec.config, "epochs", None)
    settings["epochs"] = epochs if isinstance(epochs, int) else 1
    if spec.task_args:
        settings["task_args"] = _json(spec.task_args)
    return settings


def _content(sample: Any) -> str:
    asked = sample.input if isinstance(sample.input, str) else [[message.role, message.text] for message in sample.input]
    return _json({"input": asked, "choices": sample.choices, "target": sample.target})


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _scores(sample: Any) -> Iterator[tuple[str, float]]:
    for scorer, score in (sample.scores or {}).items():
        yield from _numbers(str(scorer), score.value)


def _numbers(metric: str, value: Any) -> Iterator[tuple[str, float]]:
    """What a scorer said, as numbers; text that is none counts as nothing."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(f"{metric}/{name}", item)
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _numbers(f"{metric}/{place}", item)
    elif isinstance(value, (bool, int, float)):
        yield metric, float(value)
    elif isinstance(value, str):
        number = _WORDS.get(value, _WORDS.get(value.lower()) if len(value) > 1 else None)
        if number is None:
            try:
                number = float(value)
            except ValueError:
                return
        if math.isfinite(number):
            yield metric, number
