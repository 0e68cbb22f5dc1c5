"""Frames: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import struct

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from evalcache.digest import Digest, checksum, digest_bytes
from evalcache.errors import CanonicalError, FrameError
from evalcache.frame import (
    FRAME_VERSION,
    MAGIC,
    SEGMENT_LIMIT_BYTES,
    decode_entry,
    decode_question,
    encode_frame,
    seal,
    unseal,
)
from evalcache.key import key_of
from evalcache.records import Action, Array, Cost, Entry, Environment, Fields, Request, Result, pack_logprobs, pack_tokens

MODEL = digest_bytes(b"model")
SETTINGS = Fields({"do_sample": False, "max_new_tokens": 64})
ENVIRONMENT = Environment(Fields({"dtype": "float32"}), {"device": "cpu", "batch_size": 4})
HEADER = struct.Struct("<4sI16s4I")


def make_action(tokens: list[int], **inputs: object) -> Action:
    return Action(MODEL, Request("generate", pack_tokens(tokens), SETTINGS, inputs), ENVIRONMENT)


ACTION = make_action(list(range(300)), mask=b"\x01\x00")
KEY = key_of(ACTION)
FULL = Result(
    tokens=pack_tokens([5, 6, 7]),
    text="straße und mehr " * 100,
    logprobs=pack_logprobs([-0.5, -1.25, -float("inf")]),
    finish_reason="stop",
    scalars={"sum": -1.75, "is_greedy": True},
    arrays={"scores": Array("bfloat16", (2, 3), bytes(12)), "states": Array("uint8", (), b"\x07")},
    cost=Cost(0.125, 300, 3, "cpu", 4),
)
FRAME = encode_frame(KEY, ACTION, FULL, "run", 12.5)


def reseal(body: bytes) -> bytes:
    """A frame whose checksum is right, whatever its contents: what a bug or an attacker would write."""
    return body + checksum(body)


results = st.builds(
    Result,
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=40).map(pack_tokens),
    text=st.none() | st.text(max_size=2000),
    logprobs=st.lists(st.floats(allow_nan=False), max_size=20).map(pack_logprobs),
    finish_reason=st.sampled_from(["stop", "length", None]),
    scalars=st.dictionaries(st.text(max_size=5), st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False), max_size=3),
    arrays=st.dictionaries(
        st.text(max_size=5),
        st.builds(Array, st.just("float32"), st.lists(st.integers(0, 9), max_size=3).map(tuple), st.binary(max_size=50)),
        max_size=2,
    ),
    cost=st.none() | st.builds(Cost, st.floats(0, 1e9), st.integers(0, 9), st.integers(0, 9), st.just("cpu"), st.integers(1, 9)),
)


@given(results, st.text(max_size=40), st.floats(0, 1e10), st.lists(st.integers(0, 99), max_size=50))
def test_what_goes_in_comes_out(result: Result, run: str, created_at: float, tokens: list[int]) -> None:
    action = make_action(tokens, further=[1, None])
    key = key_of(action)
    frame = encode_frame(key, action, result, run, created_at)
    entry = decode_entry(key, frame)
    assert entry == Entry(key, result, run, created_at)
    assert (type(entry), type(entry.result)) == (Entry, Result)
    assert frame == encode_frame(key, action, entry.result, run, created_at)


def test_a_decoded_entry_is_as_frozen_as_any_other() -> None:
    entry = decode_entry(KEY, FRAME)
    for record, name in ((entry, "run"), (entry.result, "text"), (entry.result.cost, "seconds")):
        with pytest.raises(AttributeError):
            setattr(record, name, 1)
    assert hash(entry.result.cost) == hash(FULL.cost)
    bare = decode_entry(KEY, encode_frame(KEY, ACTION, Result(), "run", 1.0)).result
    with pytest.raises(TypeError):
        bare.scalars["added"] = 1  # shared by all results that have none


def test_the_question_can_be_read_from_the_frame_alone() -> None:
    question = decode_question(KEY, FRAME)
    assert (question.kind, question.model, question.tokens) == ("generate", MODEL, ACTION.request.tokens)
    assert (question.settings, question.environment) == (SETTINGS.digest, ENVIRONMENT.keyed.digest)
    assert (question.inputs, question.recorded) == ({"mask": b"\x01\x00"}, dict(ENVIRONMENT.recorded))


@settings(max_examples=400)
@given(st.data())
def test_no_bit_flip_is_ever_served(data: st.DataObject) -> None:
    places = data.draw(st.sets(st.integers(0, len(FRAME) * 8 - 1), min_size=1, max_size=4))
    damaged = bytearray(FRAME)
    for place in places:
        damaged[place // 8] ^= 1 << place % 8
    for read in (decode_entry, decode_question):
        with pytest.raises(FrameError):
            read(KEY, bytes(damaged))


def test_every_single_bit_of_the_header_matters_even_under_a_good_checksum() -> None:
    """Whoever can compute checksums can forge frames; but no *header* field is decoration."""
    for place in range(HEADER.size * 8):
        damaged = bytearray(FRAME[:-16])
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(FrameError):
            decode_entry(KEY, reseal(bytes(damaged)))
            decode_question(KEY, reseal(bytes(damaged)))


@pytest.mark.parametrize("length", [0, 1, 40, 55, 56, len(FRAME) // 2, len(FRAME) - 1])
def test_a_truncated_frame_is_refused(length: int) -> None:
    with pytest.raises(FrameError):
        decode_entry(KEY, FRAME[:length])
    with pytest.raises(FrameError):
        decode_entry(KEY, FRAME + bytes(max(1, length)))


def test_another_keys_frame_is_refused_by_name() -> None:
    other = digest_bytes(b"other")
    with pytest.raises(FrameError, match="another key") as caught:
        decode_entry(other, FRAME)
    assert (caught.value.key, caught.value.expected, caught.value.found) == (other, other.hex, KEY.hex)


def test_what_was_expected_and_found_is_in_the_error() -> None:
    for changed, expected, found in (
        (b"evcg" + FRAME[4:-16], MAGIC, b"evcg"),
        (FRAME[:4] + struct.pack("<I", 9) + FRAME[8:-16], FRAME_VERSION, 9),
    ):
        with pytest.raises(FrameError) as caught:
            decode_entry(KEY, reseal(changed))
        assert (caught.value.expected, caught.value.found) == (expected, found)
    for value in (None, "text", 7, 1.5):
        with pytest.raises(FrameError, match="no bytes"):
            decode_entry(KEY, value)


def frame_of(answer: bytes, raw_bytes: int) -> bytes:
    return reseal(HEADER.pack(MAGIC, FRAME_VERSION, KEY.value, len(answer), raw_bytes, 0, 0) + answer)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    """zstd allocates what its own header claims: 2 GB from a few kilobytes, unless somebody asks first."""
    packer = zstandard.ZstdCompressor(level=19).compressobj(size=2 << 30)
    zeros = bytes(1 << 20)
    bomb = b"".join(packer.compress(zeros) for _ in range(2 << 10)) + packer.flush()
    for claimed in (1000, SEGMENT_LIMIT_BYTES):
        with pytest.raises(FrameError, match="two lengths differ"):
            decode_entry(KEY, frame_of(bomb, claimed))
    with pytest.raises(FrameError, match="larger than any"):
        decode_entry(KEY, frame_of(bomb, 2 << 30))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(5000))
    with pytest.raises(FrameError):
        decode_entry(KEY, frame_of(unsized, 5000))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff\xff",
        b"\x80",
        b"\x89" + b"\xf6" * 9,
        b"\xa0",
        bytes.fromhex("894060604060a0a0f66172f6")[:5],
        b"\x89\x40\xf6\x40\xf6\xa0\xa0\x85\xfb\x7f\xf8\x00\x00\x00\x00\x00\x00\x01\x01\x60\x01\x60\x01",  # cost of NaN seconds
    ],
)
def test_a_good_checksum_over_something_else_is_refused(answer: bytes) -> None:
    with pytest.raises(FrameError):
        decode_entry(KEY, frame_of(answer, len(answer)))


def test_what_cannot_be_written_down_exactly_is_refused() -> None:
    with pytest.raises(CanonicalError):
        encode_frame(KEY, ACTION, Result(scalars={"sum": object()}), "run", 1.0)
    huge = Result(tokens=bytes(SEGMENT_LIMIT_BYTES + 4))  # untouched zero pages: no memory is used
    with pytest.raises(FrameError, match="larger than one entry"):
        encode_frame(KEY, ACTION, huge, "run", 1.0)


@given(st.binary(max_size=100), st.integers(0, 10_000))
def test_a_sealed_row_is_tied_to_its_name(data: bytes, place: int) -> None:
    sealed = seal("object/a", data)
    assert unseal("object/a", sealed) == data
    damaged = bytearray(sealed)
    damaged[place // 8 % len(sealed)] ^= 1 << place % 8
    for name, found in (("object/b", sealed), ("object/a", bytes(damaged)), ("object/a", sealed[:10]), ("object/a", None)):
        with pytest.raises(FrameError):
            unseal(name, found)


def test_the_format_stays_readable() -> None:
    """A frame written by the first version: this text is added to and never edited."""
    key = Digest(bytes(range(16)))
    golden = bytes.fromhex(GOLDEN)
    assert decode_entry(key, golden) == Entry(
        key, Result(pack_tokens([1, 2]), "ab", b"", "stop", {"sum": -1.0}, {}, Cost(0.5, 3, 2, "cpu", 1)), "r1", 1000.0
    )
    assert decode_question(key, golden).tokens == pack_tokens([7, 8, 9])


GOLDEN = (
    "6576636601000000000102030405060708090a0b0c0d0e0f2d0000002d0000004c0000004c00000089480100000002000000"
    "626162406473746f70a16373756df9bc00a085f9380003026363707501627231f963d0876867656e65726174655004ee436e"
    "0ebbb533bcfba3fcf40ae9bd5097e471de436bd0a72b98bb92609bd6f85097e471de436bd0a72b98bb92609bd6f84c070000"
    "000800000009000000a0a0e9eab9bb336710985241bd934a6e0422"
)
