"""One stored entry as plain named values: what was asked, what was answered, what it cost, and who made it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from evalcache.canonical import decode
from evalcache.digest import Digest
from evalcache.errors import FrameError, UnknownNameError
from evalcache.records import unpack_logprobs, unpack_tokens
from evalcache.store import Store


def describe_entry(store: Store, key: Digest) -> dict[str, Any]:
    """The entry under ``key`` with stable field names; settings or an environment that the store has lost are None.

    Raises:
        UnknownNameError: there is no such entry. FrameError: it is damaged.
    """
    entry, question = store.get(key), store.get_question(key)
    if isinstance(entry, FrameError):
        raise entry
    if entry is None or question is None:
        raise UnknownNameError(f"no entry under {key}", hint="`evalcache query 'FROM outputs'` lists them", found=str(key))
    result = entry.result
    cost = result.cost
    return {
        "key": key,
        "kind": question.kind,
        "model": question.model,
        "text": result.text,
        "tokens": unpack_tokens(result.tokens).tolist(),
        "logprobs": unpack_logprobs(result.logprobs).tolist(),
        "finish_reason": result.finish_reason,
        "scalars": dict(result.scalars),
        "arrays": {name: {"dtype": array.dtype, "shape": array.shape} for name, array in result.arrays.items()},
        "prompt_tokens": unpack_tokens(question.tokens).tolist(),
        "inputs": dict(question.inputs),
        "settings": _fields(store, question.settings),
        "environment": _fields(store, question.environment),
        "recorded": dict(question.recorded),
        "cost": None
        if cost is None
        else {
            "seconds": cost.seconds,
            "prompt_tokens": cost.prompt_tokens,
            "completion_tokens": cost.completion_tokens,
            "device": cost.device,
            "batch_size": cost.batch_size,
        },
        "run": entry.run,
        "created_at": datetime.fromtimestamp(entry.created_at, UTC).isoformat(timespec="seconds"),
    }


def _fields(store: Store, digest: Digest) -> Any:
    data = store.get_object(f"fields/{digest.hex}")
    return None if data is None else decode(data)
