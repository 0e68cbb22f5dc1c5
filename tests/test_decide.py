"""decide: every policy against everything a store can answer."""

from __future__ import annotations

import pytest

from evalcache.decide import decide
from evalcache.digest import digest_bytes
from evalcache.errors import FrameError, ReplayMissError
from evalcache.records import Entry, Miss, Policy, Result, Uncacheable

KEY = digest_bytes(b"key")
ENTRY = Entry(KEY, Result(text="answer"), "run", 1.0)
FAULT = FrameError("altered", key=KEY)
REPLAY_MISS = object()

CASES = {
    (Policy.USE, "entry"): ENTRY,
    (Policy.USE, "nothing"): Miss("absent"),
    (Policy.USE, "fault"): Miss("corrupt"),
    (Policy.READ_ONLY, "entry"): ENTRY,
    (Policy.READ_ONLY, "nothing"): Miss("absent"),
    (Policy.READ_ONLY, "fault"): Miss("corrupt"),
    (Policy.REFRESH, "entry"): Miss("refresh"),
    (Policy.REFRESH, "nothing"): Miss("refresh"),
    (Policy.REFRESH, "fault"): Miss("refresh"),
    (Policy.REPLAY, "entry"): ENTRY,
    (Policy.REPLAY, "nothing"): "absent",
    (Policy.REPLAY, "fault"): "corrupt",
    (Policy.OFF, "entry"): Uncacheable("off"),
    (Policy.OFF, "nothing"): Uncacheable("off"),
    (Policy.OFF, "fault"): Uncacheable("off"),
}
FOUND = {"entry": ENTRY, "nothing": None, "fault": FAULT}


def test_every_case_is_listed() -> None:
    assert set(CASES) == {(policy, found) for policy in Policy for found in FOUND}


@pytest.mark.parametrize(("policy", "found"), CASES)
def test_the_table(policy: Policy, found: str) -> None:
    expected = CASES[policy, found]
    if isinstance(expected, str):
        with pytest.raises(ReplayMissError) as caught:
            decide(policy, KEY, FOUND[found])
        assert (caught.value.key, caught.value.reason) == (KEY, expected)
        assert str(KEY) in str(caught.value)
    else:
        assert decide(policy, KEY, FOUND[found]) == expected


def test_reading_and_writing_are_what_the_table_says() -> None:
    assert {policy for policy in Policy if policy.reads} == {Policy.USE, Policy.READ_ONLY, Policy.REPLAY}
    assert {policy for policy in Policy if policy.writes} == {Policy.USE, Policy.REFRESH}
    for policy in Policy:
        served = CASES[policy, "entry"]
        assert policy.reads == isinstance(served, Entry)
