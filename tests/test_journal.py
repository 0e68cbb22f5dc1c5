"""Journal events: what is written is read, field for field, and nothing else is taken for an event."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalcache.canonical import encode_canonical
from evalcache.errors import CanonicalError
from evalcache.journal import (
    OVERHEAD_KINDS,
    DocumentsSeen,
    Event,
    LookedUp,
    Measured,
    ModelLoaded,
    ModelSeen,
    Overhead,
    Removed,
    Resumed,
    RunEnded,
    RunStarted,
    Scored,
    Stored,
    TaskSeen,
    decode_event,
    encode_event,
)

LOOKED_UP = LookedUp(
    run="r",
    at=2.5,
    model=bytes(16),
    client="lm_eval",
    role="candidate",
    keys=(bytes(16), b"", bytes(range(16))),
    outcomes=("hit", "uncacheable", "miss"),
    reasons=("", "streamer", "absent"),
    seconds=(0.5, None, 1.25),
    tasks=("gsm8k",) * 3,
    documents=("1", "2", "3"),
    devices=("cpu", "", "NVIDIA H200"),
    origins=("o", "", ""),
)
EVENTS = [
    RunStarted("r", 1.0, "python eval.py", "transformers", "5.23.0", {"torch": "2.13.0"}, "abc", "host", "use", "strict"),
    RunStarted("r", 1.0, "python eval.py"),
    RunStarted("r", 1.0, "python eval.py", tags=("nightly", "naïve")),
    RunEnded("r", 2.0, "failed", 3),
    RunEnded("r", 2.0, "interrupted"),
    ModelSeen("r", bytes(16), "gpt2", "judge"),
    ModelLoaded("r", bytes(16), 12.5),
    Stored("r", (bytes(16), bytes(range(16)))),
    Stored("r", ()),
    Removed("r", 2.5, (bytes(16), bytes(range(16))), "pruned"),
    LOOKED_UP,
    Overhead("r", 3.0, dict.fromkeys(OVERHEAD_KINDS, 0.25)),
    Measured("r", 3.0, "NVIDIA H200", 2, 1 << 36, 12.5),
    Measured("r", 3.0, "cpu", 1),
    Resumed("r", 3.5, bytes(range(16)), 23, 32, 128, 4.25, "NVIDIA H200"),
    Resumed("r", 3.5, bytes(range(16)), 23, 32, 0, 0.0, "cpu", "not exact"),
    TaskSeen("r", "lm_eval", "gsm8k"),
    TaskSeen("r", "lm_eval", "gsm8k", "3.0", {"shots": 5, "split": "test", "stop": ["\n", "Q:"], "filter": {"group": -1}}),
    DocumentsSeen("r", "lm_eval", "gsm8k", ("0", "naïve"), (bytes(16), bytes(range(16))), ('{"question": "2 + 2?"}', "")),
    DocumentsSeen("r", "lm_eval", "gsm8k", (), (), ()),
    Scored("r", "lm_eval", "gsm8k", "judge", ("0", "1"), ("acc",) * 2, (0.5, float("-inf")), ("", "a"), (b"", bytes(16))),
]


def test_every_kind_of_event_is_tried() -> None:
    assert {type(event) for event in EVENTS} == set(typing.get_args(Event))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_what_is_written_is_read(event: Event) -> None:
    encoded = encode_event(event)
    assert decode_event(encoded) == event
    assert type(decode_event(encoded)) is type(event)
    assert encode_event(decode_event(encoded)) == encoded


@given(st.lists(st.tuples(st.binary(max_size=16), st.sampled_from(["hit", "miss"]), st.none() | st.floats(0, 1e6)), max_size=20))
def test_columns_come_back_as_columns(rows: list[tuple[bytes, str, float | None]]) -> None:
    keys, outcomes, seconds = (tuple(column) for column in zip(*rows, strict=True)) if rows else ((), (), ())
    event = LookedUp("r", 1.0, bytes(16), "", "", keys, outcomes, ("",) * len(rows), seconds)
    assert decode_event(encode_event(event)) == event


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        encode_canonical(None),
        encode_canonical([]),
        encode_canonical(["Stored"]),
        encode_canonical(["Unknown", {}]),
        encode_canonical(["Stored", {"run": "r"}]),
        encode_canonical(["Stored", {"run": "r", "keys": [], "more": 1}]),
        encode_canonical(["Stored", [1, 2]]),
        encode_canonical([["Stored"], {}]),
        encode_canonical(["object", {}]),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(CanonicalError):
        decode_event(data)


def test_text_that_is_not_unicode_is_written_all_the_same() -> None:
    event = DocumentsSeen("r", "c\ud800", "t", ("1", "\udcff"), (b"\xff" * 16, bytes(16)), ('"é\udcff"', ""))
    told = DocumentsSeen("r", "c?", "t", ("1", "?"), (b"\xff" * 16, bytes(16)), ('"é?"', ""))
    assert decode_event(encode_event(event)) == told
    task = TaskSeen("r", "c", "t", "1", {"stop\ud800": ["\ud800", 1, None]})
    assert decode_event(encode_event(task)) == TaskSeen("r", "c", "t", "1", {"stop?": ["?", 1, None]})


def test_an_event_that_cannot_be_written_exactly_is_refused() -> None:
    with pytest.raises(CanonicalError):
        encode_event(Overhead("r", 1.0, {"keys": object()}))
