"""The bytes of a boundary state: what is read is what was written under that very key, or nothing."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalcache.canonical import encode_canonical
from evalcache.digest import checksum, digest_bytes
from evalcache.errors import FrameError
from evalcache.records import Array
from evalcache.stateframe import HEAD_BYTES, MAGIC, State, check_head, decode_state, encode_state, size_bytes_of

KEY, OTHER = digest_bytes(b"key"), digest_bytes(b"other")
STATE = State(
    {
        "hidden": Array("bfloat16", (1, 3, 5), bytes(range(30))),
        "mask": Array("bool", (), b"\x01"),
        "none": Array("float32", (2, 0), b""),
    },
    {"run": "one", "seconds": 0.5},
)


def frame_of(key: Any, state: State) -> bytes:
    return b"".join(bytes(part) for part in encode_state(key, state))


FRAME = frame_of(KEY, STATE)


def forge(header: Any, data: bytes = b"", *, magic: bytes = MAGIC, version: int = 1, short_bytes: int = 0) -> bytes:
    """A frame with a good checksum over whatever it says."""
    packed = header if type(header) is bytes else encode_canonical([{}, header])
    body = packed + bytes(-(HEAD_BYTES + len(packed)) % 16) + data
    whole_bytes = HEAD_BYTES + len(body) + 16
    body = struct.pack("<4sI16sQQ", magic, version, KEY, len(packed), whole_bytes - short_bytes) + body
    return body + checksum(body)


arrays = st.builds(
    lambda dtype, shape, data, kind: Array(dtype, tuple(shape), kind(data)),
    st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "bool", "int64", "complex64"]),
    st.lists(st.integers(0, 2**40), max_size=5),
    st.binary(max_size=200),
    st.sampled_from([bytes, bytearray, memoryview]),
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), arrays, max_size=5))
def test_what_comes_back_is_what_was_written(tensors: dict[str, Array]) -> None:
    frame = frame_of(KEY, State(tensors))
    found = decode_state(KEY, frame).tensors
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert bytes(found[name].data) == bytes(array.data)
        assert memoryview(found[name].data).readonly
    assert len(frame) == size_bytes_of(State(tensors))


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    for place in range(len(FRAME) * 8):
        damaged = bytearray(FRAME)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(FrameError):
            decode_state(KEY, bytes(damaged))
    for length in range(len(FRAME)):
        with pytest.raises(FrameError):
            decode_state(KEY, FRAME[:length])
    with pytest.raises(FrameError):
        decode_state(KEY, FRAME + bytes(16))


def test_another_keys_state_is_refused_by_name() -> None:
    with pytest.raises(FrameError, match="another key") as caught:
        decode_state(OTHER, FRAME)
    assert (caught.value.key, caught.value.expected, caught.value.found) == (OTHER, OTHER.hex, KEY.hex)


def test_the_forger_can_forge() -> None:
    """Else the next test would prove nothing."""
    assert decode_state(KEY, forge([["a", "uint8", [2], 2]], bytes(16))).tensors["a"].data == bytes(2)


@pytest.mark.parametrize(
    "frame",
    [
        forge([], magic=b"evcf"),
        forge([], version=2),
        forge([], short_bytes=1),
        forge([], bytes(16)),  # bytes that are no tensor's
        forge([["a", "uint8", [2], 2]]),  # a tensor past the end
        forge([["a", "uint8", [2], 17]], bytes(16)),
        forge([["a", "uint8", [2], 1 << 62]], bytes(16)),
        forge([["a", "uint8", [2], -1]], bytes(16)),
        forge([["a", "uint8", [-2], 2]], bytes(16)),
        forge([["a", "uint8", [2.0], 2]], bytes(16)),
        forge([["a", "uint8", [2], True]], bytes(16)),
        forge([["a", "uint8", 2, 2]], bytes(16)),
        forge([["a", 8, [2], 2]], bytes(16)),
        forge([[1, "uint8", [2], 2]], bytes(16)),
        forge([["a", "uint8", [2]]], bytes(16)),
        forge([["a", "uint8", [2], 2]] * 2, bytes(32)),  # one name twice
        forge({"a": 1}),
        forge(None),
        forge(7),
        forge(b""),
        forge(b"\xff\xff"),
        forge(encode_canonical([[], []])),
        forge(encode_canonical([{}])),
        forge(b"\x9b\x10" + bytes(7)),  # a list of 2**60
        forge(b"\x5b\x10" + bytes(7)),  # 2**60 bytes
        forge(b"\x81" * 5000),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_asked_for(frame: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(FrameError):
        decode_state(KEY, frame)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_the_head_alone_tells_whose_state_it_is_and_how_long() -> None:
    assert check_head(KEY, FRAME[:HEAD_BYTES], len(FRAME)) > 0
    for head, size_bytes in ((FRAME[: HEAD_BYTES - 1], len(FRAME)), (FRAME[:HEAD_BYTES], 1 << 60), (b"", 0)):
        with pytest.raises(FrameError):
            check_head(KEY, head, size_bytes)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": Array("uint8", (1.0,), b"a")},
        {"a": Array("uint8", (-1,), b"a")},
        {"a": Array(None, (1,), b"a")},
        {"a": Array("uint8", (1,), 7)},  # of which Python would make seven bytes
        {"a": Array("uint8", (1,), "a")},
        {1: Array("uint8", (1,), b"a")},
    ],
)
def test_what_is_no_tensor_cannot_be_written(tensors: Any) -> None:
    for write in (size_bytes_of, lambda state: encode_state(KEY, state)):
        with pytest.raises(TypeError):
            write(State(tensors))


def test_the_format_stays_readable() -> None:
    """A frame written by the first version: this text is added to and never edited."""
    assert decode_state(KEY, bytes.fromhex(GOLDEN)) == STATE
    assert bytes.fromhex(GOLDEN) == FRAME


GOLDEN = (
    "6576637301000000a4bdf4e564564cf8bbea0d63a05165e34c00000000000000c00000000000000082a26372756e636f6e65677365636f6e6473f938"
    "0083846668696464656e6862666c6f6174313683010305181e84646d61736b64626f6f6c800184646e6f6e6567666c6f617433328202000000000000"
    "0000000000000000000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d00000100000000000000000000000000000056b0d4c8"
    "8f4f456eebeebe6926bdb07d"
)
