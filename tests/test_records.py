"""Records: frozen values, and fields that are digested once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalcache.canonical import encode_canonical
from evalcache.digest import digest_bytes
from evalcache.errors import CanonicalError
from evalcache.records import (
    NO_FIELDS,
    UNCACHEABLE_REASONS,
    Action,
    Cost,
    Entry,
    Environment,
    Fields,
    Miss,
    Request,
    Result,
    Uncacheable,
    pack_logprobs,
    pack_tokens,
    unpack_logprobs,
    unpack_tokens,
)
from evalcache.structs import names_of

KEY = digest_bytes(b"key")


class TestFields:
    def test_order_does_not_matter_and_types_do(self) -> None:
        left, right = Fields({"a": 1, "b": [True]}), Fields({"b": [True], "a": 1})
        assert (left, hash(left), left.digest) == (right, hash(right), right.digest)
        assert left != Fields({"a": 1.0, "b": [True]}) != Fields({"a": True, "b": [True]})
        assert left != {"a": 1, "b": [True]}
        assert left.canonical == encode_canonical({"a": 1, "b": [True]})
        assert (dict(left), len(left), left["a"], list(NO_FIELDS)) == ({"a": 1, "b": [True]}, 2, 1, [])

    def test_the_callers_dict_is_copied(self) -> None:
        values = {"a": 1}
        fields = Fields(values)
        values["a"] = 2
        assert fields["a"] == 1
        with pytest.raises(TypeError):
            fields["a"] = 2

    def test_what_cannot_be_keyed_is_refused(self) -> None:
        with pytest.raises(CanonicalError, match=r"value\.processor"):
            Fields({"processor": object()})


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_tokens_come_back(ids: list[int]) -> None:
    for form in (ids, tuple(ids), np.array(ids, dtype=np.int64)):
        packed = pack_tokens(form)
        assert len(packed) == 4 * len(ids)
        assert unpack_tokens(packed).tolist() == ids


@pytest.mark.parametrize("ids", [[2**31], [0, -(2**31) - 1]])
def test_ids_outside_32_bits_are_refused(ids: list[int]) -> None:
    with pytest.raises(OverflowError):
        pack_tokens(ids)


def test_tokens_are_little_endian_on_every_machine() -> None:
    assert pack_tokens(np.array([1, 258], dtype=">i8")) == b"\x01\x00\x00\x00\x02\x01\x00\x00"


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=50))
def test_float32_logprobs_come_back_exactly(values: list[float]) -> None:
    assert unpack_logprobs(pack_logprobs(np.array(values, dtype=np.float32))).tolist() == values


@pytest.mark.parametrize("seconds", [-1e-9, math.nan, math.inf, -math.inf])
def test_a_cost_is_measured_or_it_is_none(seconds: float) -> None:
    with pytest.raises(ValueError):
        Cost(seconds, 1, 1, "cpu", 1)


def test_records_are_frozen() -> None:
    request = Request("generate", b"")
    action = Action(KEY, request, Environment(NO_FIELDS))
    entry = Entry(KEY, Result(), "run", 1.0)
    for record in (request, action, entry, Miss("absent"), Uncacheable("off"), Cost(0.0, 0, 0, "", 1), entry.result):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(record, names_of(record)[0], None)


def test_every_reason_is_said_in_words() -> None:
    assert "off" in UNCACHEABLE_REASONS
    assert all(reason and meaning for reason, meaning in UNCACHEABLE_REASONS.items())
    assert len(set(UNCACHEABLE_REASONS.values())) == len(UNCACHEABLE_REASONS)
    with pytest.raises(TypeError):
        UNCACHEABLE_REASONS["more"] = "x"
