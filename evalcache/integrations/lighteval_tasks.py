"""lighteval: its tasks, documents and scores, for the ledger. Nothing in here changes a result."""

from __future__ import annotations

import json
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from evalcache.cache import Cache
from evalcache.digest import digest_bytes
from evalcache.journal import DocumentsSeen, Scored, TaskSeen

_ROWS = 2000  # of one event
_CONTENT_LIMIT_BYTES = 64 << 10
_SETTINGS = ("hf_repo", "hf_subset", "hf_revision", "num_fewshots", "few_shots_split", "few_shots_select", "generation_size")
_CONTENT = ("query", "choices", "gold_index", "instruction", "specific")


class ScoreWatch:
    """Sees what each document scored as lighteval logs it, and tells the ledger when it adds the scores up.

    Args:
        cache: the cache to tell, None where there is none.
    """

    def __init__(self, cache: Callable[[], Cache | None], client: str) -> None:
        self._cache = cache
        self._client = client
        self._scored: dict[str, list[tuple[Any, Mapping[str, Any]]]] = {}

    def noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``DetailsLogger.log``, which is told each document with its metrics."""

        def log(details: Any, task_name: str, doc: Any, model_response: Any, metrics: Any) -> Any:
            if self._cache() is not None and isinstance(metrics, Mapping):
                self._scored.setdefault(task_name, []).append((doc, dict(metrics)))
            return original(details, task_name, doc, model_response, metrics)

        return log

    def telling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``MetricsLogger.aggregate``, which is told the tasks."""

        def aggregate(metrics: Any, task_dict: Any, *args: Any, **kwargs: Any) -> Any:
            done = original(metrics, task_dict, *args, **kwargs)
            cache, scored = self._cache(), self._scored
            self._scored = {}
            for name, rows in scored.items() if cache is not None else ():
                try:
                    self._tell(cache, name, task_dict.get(name), rows)
                except Exception as error:  # the ledger's questions must not cost the run
                    cache.warn(f"scores of {name} are not in the ledger: {type(error).__name__}: {error}")
            return done

        return aggregate

    def _tell(self, cache: Cache, name: str, task: Any, scored: list[tuple[Any, Mapping[str, Any]]]) -> None:
        run, client = cache.run_id, self._client
        config = getattr(task, "config", None)
        cache.note(TaskSeen(run, client, name, str(getattr(task, "version", "")), _settings(config)))
        contents = {str(doc.id): _content(doc) for doc, _ in scored}
        known = list(contents.items())
        for start in range(0, len(known), _ROWS):
            part = known[start : start + _ROWS]
            digests = tuple(digest_bytes(content.encode()).value for _, content in part)
            short = tuple(content if len(content) <= _CONTENT_LIMIT_BYTES else "" for _, content in part)
            cache.note(DocumentsSeen(run, client, name, tuple(document for document, _ in part), digests, short))
        rows = [
            (str(doc.id), str(metric), float(value))
            for doc, metrics in scored
            for metric, value in metrics.items()
            if isinstance(value, (numbers.Real, bool)) or type(value).__name__ in ("bool_", "bool")
        ]
        for start in range(0, len(rows), _ROWS):
            documents, metrics_, values = zip(*rows[start : start + _ROWS], strict=True)
            empty = ("",) * len(documents)
            cache.note(Scored(run, client, name, "", documents, metrics_, values, empty, (b"",) * len(documents)))


def _content(doc: Any) -> str:
    return json.dumps({name: getattr(doc, name, None) for name in _CONTENT}, sort_keys=True, ensure_ascii=False, default=str)


def _settings(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in _SETTINGS}
    found["evaluation_splits"] = ",".join(str(split) for split in getattr(config, "evaluation_splits", None) or ())
    return {name: value for name, value in found.items() if isinstance(value, (str, int))}
