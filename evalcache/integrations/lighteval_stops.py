"""lighteval: what its stop strings do to rows that are generated together.

Its criteria end a batch when all rows have said a stop string, so a row that was done goes on beside slower neighbours. Its text
is cut at the stop strings afterwards, one after the other in their order. Is that cut the same however far the row went on?
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from evalcache.errors import UncacheableError


def ends_by_id(tokenizer: Any, stops: Sequence[str], end_ids: Collection[int]) -> bool:
    """Whether the end id alone stops rows, so that any script's answer is lighteval's too."""
    end = tokenizer.eos_token
    alone = set(stops) == {end} and tokenizer.encode(end, add_special_tokens=False) == [tokenizer.eos_token_id]
    return alone and tokenizer.eos_token_id in end_ids


def refuse_leaks(tokenizer: Any, stops: Sequence[str], end_ids: Collection[int]) -> None:
    """Refuse what would show in a row's text that its neighbours were not done yet.

    Raises:
        UncacheableError: a stop string that the text does not show and at which the engine does not stop; or one that can overlap
            with another, end after it, and is looked for first.
    """
    hidden = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | {*tokenizer.all_special_tokens}
    for stop in stops:
        ends = stop in hidden and tokenizer.convert_tokens_to_ids(stop) in end_ids
        if not stop or (any(token in stop for token in hidden) and not ends):
            raise UncacheableError("criterion", f"the engine does not stop at {stop!r}")
    for place, later in enumerate(stops):
        if any(earlier not in hidden and _can_outlast(earlier, later) for earlier in stops[:place]):
            raise UncacheableError("criterion", f"stop strings that overlap with {later!r}")


def _can_outlast(first: str, second: str) -> bool:
    """Whether ``first`` can overlap with ``second`` in a text, begin elsewhere, and end after it."""
    for start in range(1 - len(first), len(second)):
        over = range(max(0, start), min(len(second), start + len(first)))
        if start and start + len(first) > len(second) and all(second[at] == first[at - start] for at in over):
            return first != second
    return False
