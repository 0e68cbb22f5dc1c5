"""Canonical bytes: equal exactly for equal values, the same in every process, and a refusal for everything else."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalcache.canonical import check_canonical, decode, digest_canonical, encode_bytes, encode_canonical, encode_trusted
from evalcache.errors import CanonicalError

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=12
)


def sameness(value: Any) -> Any:
    """What should decide whether two values are keyed alike: type and value, dict order and list kind apart."""
    if isinstance(value, list | tuple):
        return ["list", [sameness(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", sorted((name.encode("utf-8", "surrogatepass"), sameness(item)) for name, item in value.items())]
    if type(value) is float:
        return ["float", struct.pack("<d", value)]
    return [type(value).__name__, repr(value)]


@given(values)
def test_what_goes_in_comes_out(value: Any) -> None:
    assert sameness(decode(encode_canonical(value))) == sameness(value)
    assert encode_trusted(value) == encode_canonical(value)


@given(values, values)
def test_two_values_have_equal_bytes_exactly_when_they_are_the_same(left: Any, right: Any) -> None:
    assert (encode_canonical(left) == encode_canonical(right)) == (sameness(left) == sameness(right))


@given(st.dictionaries(st.text(max_size=8), scalars, max_size=6), st.randoms())
def test_the_order_of_a_dict_does_not_matter(value: dict[str, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert encode_canonical(dict(items)) == encode_canonical(value)


def test_neighbours_differ() -> None:
    numbers = [None, False, True, 0, 1, 0.0, -0.0, 1.0, math.inf, -math.inf]
    neighbours = [*numbers, "1", b"1", "", b"", [], {}, [1], ["1"], [[1]], {"1": 1}]
    encoded = [encode_canonical(value) for value in neighbours]
    assert len(set(encoded)) == len(neighbours)
    assert encode_canonical((1, 2)) == encode_canonical([1, 2])
    assert encode_canonical("é") != encode_canonical("e\u0301")  # no Unicode normalisation: other bytes, other tokens


def test_map_keys_are_in_the_order_of_their_encoded_bytes() -> None:
    assert list(decode(encode_canonical({"b": 1, "aa": 2, "a": 3, "": 4, "é": 5}))) == ["", "a", "b", "aa", "é"]


class Text(str):
    """A subclass may say anything about itself, so it is none of the known types."""


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), "value"),
        ({1, 2}, "value"),
        (1j, "value"),
        (bytearray(b"x"), "value"),
        (Text("x"), "value"),
        (np.float64(1.0), "value"),
        (np.int64(1), "value"),
        (np.zeros(2), "value"),
        (OrderedDict(a=1), "value"),
        ({"a": [1, {"b": print}]}, "value.a[1].b"),
        ([0, 2**64], "value[1]"),
        (-(2**64) - 1, "value"),
        ({1: "a"}, "value"),
        ({"x": {b"a": 1}}, "value.x"),
        (math, "value"),
        (int, "value"),
    ],
)
def test_what_is_not_on_the_list_is_refused_with_its_place(value: Any, path: str) -> None:
    for refuse in (encode_canonical, check_canonical, digest_canonical):
        with pytest.raises(CanonicalError) as caught:
            refuse(value)
        assert caught.value.path == path


@pytest.mark.parametrize("damaged", [b"", b"\xff", b"\x82\x01", b"\x61", b"\xa1\x01", b"\x7f\x61", b"\x61\xff", b"\x81" * 5000])
def test_bytes_that_are_no_value_are_refused(damaged: bytes) -> None:
    with pytest.raises(CanonicalError):
        decode(damaged)


GOLDEN = {
    "f6": None,
    "f5": True,
    "1819": 25,
    "3863": -100,
    "1bffffffffffffffff": 2**64 - 1,
    "f93e00": 1.5,
    "fb3ff199999999999a": 1.1,
    "f97c00": math.inf,
    "6161": "a",
    "420102": b"\x01\x02",
    "83010203": [1, 2, 3],
    "a26161016162820203": {"b": [2, 3], "a": 1},
}


@pytest.mark.parametrize("encoded", GOLDEN)
def test_the_encoding_is_the_standards(encoded: str) -> None:
    """Examples of RFC 8949, appendix A. Added to, never edited: every stored key hangs on them."""
    assert encode_canonical(GOLDEN[encoded]).hex() == encoded


def test_the_encoding_does_not_depend_on_the_process() -> None:
    script = "from evalcache.canonical import *; print(digest_canonical({c: [c, 1.5, None] for c in 'zyxabc'}))"
    printed = set()
    for seed in ("0", "1", "12345"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        printed.add(subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True).stdout)
    assert printed == {f"{digest_canonical({c: [c, 1.5, None] for c in 'abcxyz'})}\n".encode()}


@pytest.mark.parametrize("size", [0, 1, 23, 24, 255, 256, 65535, 65536, 70000])
def test_bytes_alone_are_encoded_alike(size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    assert encode_bytes(data) == encode_canonical(data)
