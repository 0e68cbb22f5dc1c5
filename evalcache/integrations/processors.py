"""Logits processors, stopping criteria and tokenizers that a caller passes in → canonical values, or Uncacheable.

Only transformers' own classes are known: their code is covered by the library's version, their state by their attributes. A
user's own may hold anything, and state per row (the stop criteria of lm_eval and lighteval do).
"""

from __future__ import annotations

from typing import Any

import torch

from evalcache.canonical import digest_canonical
from evalcache.digest import digest_bytes
from evalcache.errors import UncacheableError
from evalcache.weights import tensor_bytes

_CRITERIA = frozenset({"EosTokenCriteria", "MaxLengthCriteria"})


def describe_processors(processors: Any) -> list[Any]:
    """Canonical value of a list of logits processors; empty for None.

    Raises:
        UncacheableError: ``processor``, one is not transformers' own or holds what has no canonical form.
    """
    return [_describe(one, "processor", "transformers.generation.logits_process") for one in processors or ()]


def describe_criteria(criteria: Any) -> list[Any]:
    """Canonical value of a list of stopping criteria; empty for None.

    Raises:
        UncacheableError: ``criterion``, or ``max_time`` for one that looks at the clock.
    """
    described = []
    for one in criteria or ():
        if type(one).__name__ == "MaxTimeCriteria":
            raise UncacheableError("max_time")
        if type(one).__name__ not in _CRITERIA:
            raise UncacheableError("criterion", type(one).__name__)
        described.append(_describe(one, "criterion", "transformers.generation.stopping_criteria"))
    return described


def tokenizer_digest(tokenizer: Any) -> bytes:
    """Digest of what a tokenizer does, needed where stop strings are matched against its vocabulary.

    Raises:
        UncacheableError: ``criterion``, it is no fast tokenizer, whose content can be read whole.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        raise UncacheableError("criterion", f"stop strings with a {type(tokenizer).__name__}")
    text = backend.to_str()
    # What stands before the added tokens is how the last prompts were padded and cut, which changes from call to call.
    text = text[max(0, text.find('"added_tokens"')) :]
    decoding = [type(tokenizer).__qualname__, str(getattr(tokenizer, "clean_up_tokenization_spaces", None))]
    return digest_canonical([*decoding, digest_bytes(text.encode()).value]).value


def _describe(one: Any, reason: str, module: str) -> list[Any]:
    if type(one).__module__ != module:
        raise UncacheableError(reason, f"{type(one).__module__}.{type(one).__qualname__}")
    return [type(one).__qualname__, {name: _value(value, reason) for name, value in sorted(vars(one).items())}]


def _value(value: Any, reason: str) -> Any:
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), digest_bytes(tensor_bytes(value)).value]
    if isinstance(value, (list, tuple)):
        return [_value(item, reason) for item in value]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _value(item, reason) for key, item in value.items()}
    raise UncacheableError(reason, f"holds a {type(value).__name__}")
