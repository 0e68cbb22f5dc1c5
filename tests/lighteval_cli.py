"""lighteval's command line on local tasks, with what its version 0.13.0 needs beside today's libraries: three shims.

1. ``lighteval.tasks.tasks.tiny_benchmarks.main`` downloads a pickle when it is imported: it gets an empty one.
2. ``huggingface_hub.list_models(model_name=)`` has no such argument any more.
3. ``xxhash.xxh64(str)``: today's takes bytes only.

As a module of custom tasks (``--custom-tasks lighteval_cli.py``) it holds the tasks; documents lie in ``LIGHTEVAL_DOCUMENTS``.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any


def shim() -> None:
    """Make lighteval 0.13.0 start."""
    import huggingface_hub
    import requests
    import xxhash

    get, list_models, xxh64 = requests.get, huggingface_hub.HfApi.list_models, xxhash.xxh64

    def get_nothing(url: Any, *args: Any, **kwargs: Any) -> Any:
        if "tinyBenchmarks.pkl" not in str(url):
            return get(url, *args, **kwargs)
        answer = requests.Response()
        answer.status_code, answer._content = 200, pickle.dumps({})
        return answer

    def list_by_name(self: Any, *args: Any, model_name: Any = None, **kwargs: Any) -> Any:
        return list_models(self, *args, **({"search": model_name} if model_name else {}), **kwargs)

    requests.get = get_nothing
    huggingface_hub.HfApi.list_models = list_by_name
    huggingface_hub.list_models = lambda *args, **kwargs: list_by_name(huggingface_hub.HfApi(), *args, **kwargs)
    xxhash.xxh64 = lambda data=b"", *args, **kwargs: xxh64(data.encode() if isinstance(data, str) else data, *args, **kwargs)


def make_tasks() -> list[Any]:
    """Choices of several tokens, single letters, and generation up to a stop string."""
    from lighteval.metrics.metrics import Metrics
    from lighteval.tasks.lighteval_task import LightevalTaskConfig
    from lighteval.tasks.requests import Doc

    def choices(line: dict[str, Any], task_name: str | None = None) -> Any:
        query = f"Question: {line['question']} Answer:"
        return Doc(task_name=task_name, query=query, choices=[" " + one for one in line["choices"]], gold_index=line["answer"])

    def letters(line: dict[str, Any], task_name: str | None = None) -> Any:
        query = f"{line['question']} (A) {line['A']} (B) {line['B']} (C) {line['C']} (D) {line['D']} Answer:"
        return Doc(task_name=task_name, query=query, choices=[" A", " B", " C", " D"], gold_index=line["answer"])

    def text(line: dict[str, Any], task_name: str | None = None) -> Any:
        return Doc(task_name=task_name, query=f"Question: {line['question']} Answer:", choices=[line["answer"]], gold_index=0)

    def task(name: str, function: Any, metric: Any, **settings: Any) -> Any:
        return LightevalTaskConfig(
            name=name,
            prompt_function=function,
            hf_repo=os.path.join(os.environ["LIGHTEVAL_DOCUMENTS"], name),
            hf_subset="default",
            hf_avail_splits=("test",),
            evaluation_splits=("test",),
            few_shots_split=None,
            few_shots_select=None,
            metrics=[metric],
            **settings,
        )

    return [
        task("tiny_mc", choices, Metrics.loglikelihood_acc, generation_size=1),
        task("tiny_letters", letters, Metrics.loglikelihood_acc, generation_size=1),
        task("tiny_gen", text, Metrics.exact_match, generation_size=16, stop_sequence=["."]),
    ]


if __name__ == "__main__":
    shim()
    from lighteval.__main__ import app

    sys.exit(app())
elif "LIGHTEVAL_DOCUMENTS" in os.environ:
    TASKS_TABLE = make_tasks()
