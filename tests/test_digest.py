"""Digests: literal values that must not change, and equality that knows the algorithm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalcache.digest import ALGORITHM, Digest, Hasher, checksum, digest_bytes

GOLDEN = {
    b"": "99aa06d3014798d86001c324468d497f",
    b"evalcache": "76f36abe25f55f6c628e561af2b8e684",
    bytes(1000): "3fb94aea6d09b97224c1ea6074dd588c",
}


@pytest.mark.parametrize("data", GOLDEN)
def test_the_hash_is_what_it_was(data: bytes) -> None:
    """Added to, never edited: every stored key and manifest hangs on them."""
    assert digest_bytes(data).hex == GOLDEN[data]
    assert checksum(data).hex() == GOLDEN[data]
    assert Hasher().update(data).digest() == digest_bytes(data)


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_the_split_into_updates_does_not_matter(parts: list[bytes]) -> None:
    hasher = Hasher()
    for part in parts:
        hasher.update(part)
    assert hasher.digest() == hasher.digest() == digest_bytes(b"".join(parts))


@given(st.binary(min_size=16, max_size=16))
def test_a_digest_is_read_as_it_was_printed(value: bytes) -> None:
    digest = Digest(value)
    dashed = "-".join((digest.hex[:8], digest.hex[8:12], digest.hex[12:16], digest.hex[16:20], digest.hex[20:]))
    assert {Digest.parse(text) for text in (str(digest), digest.hex, digest.hex.upper(), dashed)} == {digest}
    assert str(digest) == f"{ALGORITHM}:{digest.hex}"


@pytest.mark.parametrize("text", ["", "xx", "00" * 15, "00" * 17, "sha256:" + "00" * 16, ALGORITHM, ":".join(["00" * 8] * 2)])
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Digest.parse(text)


def test_a_digest_is_its_bytes() -> None:
    value = bytes(range(16))
    digest = Digest(value)
    assert digest == value and type(digest.value) is bytes and digest.value == value
    assert {value: 1}[digest] == 1 and len({digest, Digest(value), Digest(bytes(16))}) == 2
    assert eval(repr(digest)) == digest
    with pytest.raises(AttributeError):
        digest.value = b""


def test_any_buffer_is_hashed_by_its_bytes() -> None:
    array = np.arange(64, dtype="<i4")
    assert digest_bytes(array) == digest_bytes(memoryview(array)) == digest_bytes(array.tobytes())
    assert digest_bytes(array) != digest_bytes(array[::-1].copy())
