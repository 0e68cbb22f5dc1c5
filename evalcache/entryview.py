"""One stored entry as plain named values: what was asked, what was answered, what it cost, and who made it.

And two entries that answer one question: in what they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from evalcache.canonical import decode
from evalcache.digest import Digest
from evalcache.errors import FrameError, UnknownNameError
from evalcache.records import Entry, Result, digest_answer, unpack_logprobs, unpack_tokens
from evalcache.store import Store
from evalcache.structs import names_of


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


def describe_conflict(mine: Entry, other: Entry) -> dict[str, Any]:
    """Two answers to one question: in what they differ, and what each says there."""
    one, two = mine.result, other.result
    names = [name for name in names_of(one) if name != "cost"]
    told = [[digest_answer(Result(**{name: getattr(result, name)})) for name in names] for result in (one, two)]
    differs = [name for name, here, there in zip(names, *told, strict=True) if here != there]
    said = [
        "; ".join(_said(name, getattr(result, name)) for name in differs if name not in ("arrays", "tokens") or differs == [name])
        for result in (one, two)
    ]
    return {
        "key": str(mine.key),
        "differs": ", ".join(differs),
        "here": said[0],
        "there": said[1],
        "run_here": mine.run,
        "run_there": other.run,
    }


def _said(name: str, value: Any) -> str:
    if name in ("tokens", "logprobs"):
        return str((unpack_tokens if name == "tokens" else unpack_logprobs)(value).tolist())
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
