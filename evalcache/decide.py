"""Decision: what a policy makes of what the store answered. Pure, so that every case is a line in a test.

`policy_of` alone looks outside: the name of a policy may stand in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from evalcache.digest import Digest
from evalcache.errors import EvalCacheError, FrameError, ReplayMissError
from evalcache.records import Entry, Lookup, Miss, Policy, Uncacheable


def decide(policy: Policy, key: Digest, found: Entry | FrameError | None) -> Lookup:
    """Turn a policy and what the store holds under ``key`` into a Lookup.

    Args:
        found: the entry, None where there is none, or the fault met while reading it.

    Raises:
        ReplayMissError: the policy is ``replay`` and there is no good entry.
    """
    if policy is Policy.OFF:
        return Uncacheable("off")
    if policy is Policy.REFRESH:
        return Miss("refresh")
    if isinstance(found, Entry):
        return found
    miss = Miss("absent" if found is None else "corrupt")
    if policy is Policy.REPLAY:
        raise ReplayMissError(
            f"replay: {key} is not in the store ({miss.reason})",
            hint="run once with EVALCACHE=use, or compare the two with `evalcache explain`",
            key=key,
            reason=miss.reason,
        )
    return miss


def decide_all(policy: Policy, keys: Sequence[Digest], found: Mapping[Digest, Entry | FrameError]) -> dict[Digest, Lookup]:
    """`decide` of each key. Raises: as that."""
    if policy.reads and len(found) == len(keys) and all(type(one) is Entry for one in found.values()):
        return dict(found)  # every one a hit: the common case, in bulk
    return {key: decide(policy, key, found.get(key)) for key in keys}


def policy_of(given: Policy | str | None) -> Policy:
    """The policy of this name; None means ``EVALCACHE``, or ``use``.

    Raises:
        EvalCacheError: there is none of this name.
    """
    name = given if given is not None else os.environ.get("EVALCACHE") or "use"
    try:
        return Policy(name)
    except ValueError:
        names = ", ".join(one.value for one in Policy)
        raise EvalCacheError(f"unknown policy {name!r}", hint=f"EVALCACHE is one of {names}", found=name) from None
