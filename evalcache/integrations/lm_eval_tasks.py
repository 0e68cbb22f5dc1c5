"""lm-evaluation-harness: its tasks, documents and scores, for the ledger. Nothing in here changes a result."""

from __future__ import annotations

import contextlib
import json
import numbers
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from evalcache.cache import Cache
from evalcache.digest import digest_bytes
from evalcache.journal import DocumentsSeen, Scored, TaskSeen

_ROWS = 2000  # of one event
_CONTENT_LIMIT_BYTES = 64 << 10
_SETTINGS = (
    "output_type",
    "num_fewshot",
    "test_split",
    "validation_split",
    "fewshot_split",
    "repeats",
    "dataset_path",
    "dataset_name",
)


def watch_scores(original: Callable[..., Any], cache: Callable[[], Cache | None], client: str) -> Callable[..., Any]:
    """The harness's ``evaluate``, which tells the ledger what each document scored.

    Args:
        cache: the cache to tell, None where there is none.
    """

    def evaluate(lm: Any, task_dict: Any, *args: Any, **kwargs: Any) -> Any:
        told = cache()
        tasks = task_dict.get("tasks") if isinstance(task_dict, dict) else None
        if told is None or not isinstance(tasks, dict):
            return original(lm, task_dict, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            watches = [stack.enter_context(_watched(name, task)) for name, task in tasks.items()]
            results = original(lm, task_dict, *args, **kwargs)
        for watch in watches:
            try:
                watch.tell(told, client)
            except Exception as error:  # the ledger's questions must not cost the run
                told.warn(f"scores of {watch.name} are not in the ledger: {type(error).__name__}: {error}")
        return results

    return evaluate


@contextlib.contextmanager
def _watched(name: str, task: Any) -> Iterator[_Watch]:
    watch = _Watch(name, task)
    original = task.process_results

    def process_results(doc: Any, results: Any) -> Any:
        metrics = original(doc, results)
        watch.note(doc, metrics)
        return metrics

    task.process_results = process_results
    try:
        yield watch
    finally:
        del task.process_results


class _Watch:
    """What one task's documents scored."""

    def __init__(self, name: str, task: Any) -> None:
        self.name = name
        self._task = task
        self._scored: list[tuple[Any, Any]] = []

    def note(self, doc: Any, metrics: Any) -> None:
        if isinstance(metrics, dict):
            self._scored.append((doc, dict(metrics)))

    def tell(self, cache: Cache, client: str) -> None:
        task, run = self._task, cache.run_id
        names, contents = {}, {}
        for instance in task.instances:
            content = _content(instance.doc)
            names.setdefault(content, str(instance.doc_id))
        cache.note(TaskSeen(run, client, self.name, str(task.VERSION), _settings(task)))
        # Each document is scored once for each filter, in the order of the filters.
        filters = list(task.instances[0].filtered_resps) if task.instances else []
        seen: Counter[str] = Counter()
        rows: list[tuple[str, str, float]] = []
        for doc, metrics in self._scored:
            content = _content(doc)
            document = names.get(content, "")
            kind = filters[seen[content]] if seen[content] < len(filters) else ""
            seen[content] += 1
            contents[document] = content
            rows += [
                (document, f"{metric},{kind}", float(value))
                for metric, value in metrics.items()
                if isinstance(value, (numbers.Real, bool))
            ]
        known = list(contents.items())
        for start in range(0, len(known), _ROWS):
            part = known[start : start + _ROWS]
            digests = tuple(digest_bytes(content.encode()).value for _, content in part)
            short = tuple(content if len(content) <= _CONTENT_LIMIT_BYTES else "" for _, content in part)
            cache.note(DocumentsSeen(run, client, self.name, tuple(document for document, _ in part), digests, short))
        for start in range(0, len(rows), _ROWS):
            documents, metrics_, values = zip(*rows[start : start + _ROWS], strict=True)
            empty = ("",) * len(documents)
            cache.note(Scored(run, client, self.name, "", documents, metrics_, values, empty, (b"",) * len(documents)))


def _content(doc: Any) -> str:
    return json.dumps(doc, sort_keys=True, ensure_ascii=False, default=str)


def _settings(task: Any) -> dict[str, Any]:
    found = {name: getattr(task.config, name, None) for name in _SETTINGS}
    return {name: value for name, value in found.items() if isinstance(value, (str, int))}
