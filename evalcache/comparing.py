"""Comparing: a stored answer with the same one computed again. Level 3; runs no model.

Kernels round differently in batches of another shape, so that an answer may have *drifted* without being wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evalcache.records import Result, unpack_logprobs, unpack_tokens

TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}
"""How far a log-probability may be from the stored one, in nats. In float32 batches of other shapes have differed by 1.1e-5, a
wrong answer by far more; in the short ones, by as much as their rounding grows to in a deep model."""
EXACT = ("float64", "float32")


def compare_scores(stored: Result, now: Result, dtype: str) -> tuple[str, str, float | None]:
    """``exact``, ``drifted``, ``flips`` or ``wrong``; what is wrong; and how far the log-probabilities are apart."""
    one, other = unpack_logprobs(stored.logprobs).tolist(), unpack_logprobs(now.logprobs).tolist()
    if len(one) != len(other):
        return "wrong", f"{len(one)} log-probabilities are stored, {len(other)} were computed", None
    tolerance = TOLERANCE.get(dtype, 0.0)
    steps = [_apart(a, b) for a, b in zip(one, other, strict=True)]
    total = _apart(stored.scalars.get("sum"), now.scalars.get("sum"))
    drift = max([*steps, total])
    if not all(step <= tolerance for step in steps) or not total <= tolerance * max(1, len(one)):
        return "wrong", f"log-probabilities are {drift:.3g} nats apart", drift if math.isfinite(drift) else None
    if stored.scalars.get("is_greedy") != now.scalars.get("is_greedy"):
        said = f"is_greedy is stored as {stored.scalars.get('is_greedy')}"
        return ("wrong" if dtype in EXACT else "flips"), said, drift
    return ("exact" if drift == 0 else "drifted"), "", drift


def what_differs(stored: Result, now: Result) -> str:
    """What is wrong with a stored generation apart from its tokens' ids, empty where nothing is."""
    one, other = unpack_tokens(stored.tokens).tolist(), unpack_tokens(now.tokens).tolist()
    if one == other:
        rest = stored.finish_reason == now.finish_reason and stored.scalars == now.scalars and stored.text == now.text
        return "" if rest else "the tokens are the same, and what is told of them is not"
    if first_difference(one, other) == min(len(one), len(other)):
        return f"{len(one)} tokens are stored, of which the same go on to {len(other)}"
    return ""


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place at which two sequences differ, which may be the end of the shorter one."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _apart(one: Any, other: Any) -> float:
    """How far two numbers are apart; two that are no numbers are not."""
    if one == other or (one != one and other != other):
        return 0.0
    return math.inf if one is None or other is None else abs(one - other)
