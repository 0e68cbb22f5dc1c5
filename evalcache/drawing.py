"""Drawing: a random sample of stored entries, and what it says of all of them. Level 2."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from evalcache.digest import Digest


def draw(keys: Sequence[Digest], count: int, seed: int, tasks: Mapping[str, str]) -> list[Digest]:
    """Keys at random, from each task as many as is its share of all, by largest remainders.

    Args:
        tasks: key (hex) → task.
    """
    strata: dict[str, list[Digest]] = {}
    for key in sorted(keys):
        strata.setdefault(tasks.get(key.hex, ""), []).append(key)
    count = min(count, len(keys))
    shares = {task: count * len(some) / len(keys) for task, some in strata.items()}
    taken = {task: int(share) for task, share in shares.items()}
    rest = sorted(strata, key=lambda task: (taken[task] - shares[task], task))
    for task in rest[: count - sum(taken.values())]:
        taken[task] += 1
    numbers = random.Random(seed)
    return [key for task in sorted(strata) for key in numbers.sample(strata[task], taken[task])]


def bound_of_share(wrong: int, of: int) -> float:
    """The largest share of which so many of a sample or fewer are wrong with a probability of 5 %: Clopper and Pearson's bound.

    For none of them it is 3 / of, the rule of three, which is a little larger.

    >>> bound_of_share(0, 100), round(bound_of_share(1, 100), 4), bound_of_share(4, 4)
    (0.03, 0.0466, 1.0)
    """
    if wrong == 0:
        return min(1.0, 3 / of)
    if wrong == of:
        return 1.0
    low, high = wrong / of, 1.0
    for _ in range(60):
        share = (low + high) / 2
        chosen = [math.lgamma(of + 1) - math.lgamma(n + 1) - math.lgamma(of - n + 1) for n in range(wrong + 1)]
        logs = [ways + n * math.log(share) + (of - n) * math.log1p(-share) for n, ways in enumerate(chosen)]
        low, high = (share, high) if sum(map(math.exp, logs)) > 0.05 else (low, share)
    return high
