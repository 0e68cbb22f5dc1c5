"""lm-evaluation-harness: its ``generate_until`` requests as the harness itself reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evalcache.errors import UncacheableError
from evalcache.records import Fields
from evalcache.structs import Frozen


class Numbered(str):
    """A prompt that knows its place: the harness sorts its requests, and hands each prompt back with its answer."""

    place: int

    @classmethod
    def of(cls, text: str, place: int) -> Numbered:
        numbered = cls(text)
        numbered.place = place
        return numbered


class Asked(Frozen):
    """One request: its settings as the harness reads them, what stops it, and whether the end id alone does."""

    text: str
    given: dict[str, Any]
    kwargs: dict[str, Any]
    until: tuple[str, ...]

    @property
    def sampled(self) -> bool:
        return bool(self.kwargs.get("do_sample"))


def read_request(lm: Any, instance: Any) -> Asked:
    """One of the harness's instances, its settings as the harness reads them."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    text, given = instance.args
    if type(text) is not str or not isinstance(given, dict):
        raise UncacheableError("argument", "a request that is not (text, settings)")
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, lm.max_gen_toks))
    eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
    if not all(type(term) is str for term in until):
        raise UncacheableError("argument", "a stop string that is none")
    return Asked(text, given, kwargs, tuple(until))


def refuse_mixtures(asked: Sequence[Asked]) -> None:
    """The harness answers a group of requests by the settings of its first, and takes some for equal that are not.

    Raises:
        UncacheableError: there are such settings.
    """
    from lm_eval.models.utils import Collator

    groups = Collator.group(list(enumerate(asked)), fn=lambda item: item[1].given, group_by="gen_kwargs")
    for members in groups.values():
        if len({Fields(canonical_settings(one.given)).canonical for _, one in members}) > 1:
            raise UncacheableError("argument", "different generation settings that the harness takes for equal")


def canonical_settings(value: Any) -> Any:
    """Generation settings as a canonical value.

    Raises:
        UncacheableError: one is of another kind than JSON's.
    """
    if isinstance(value, dict):
        return {str(name): canonical_settings(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical_settings(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UncacheableError("argument", f"a generation setting of type {type(value).__name__}")
