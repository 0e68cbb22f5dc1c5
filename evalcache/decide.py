"""Pure decision: what a policy makes of what the store answered. No I/O, so that every case is a line in a test."""

from __future__ import annotations

from evalcache.digest import Digest
from evalcache.errors import FrameError, ReplayMissError
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
