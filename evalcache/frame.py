"""The frame: an entry's bytes. Level 3: knows the records and nothing of the place where frames are kept.

| bytes | field |
|---|---|
| 0–3 | magic ``evcf`` |
| 4–7 | `FRAME_VERSION`, little-endian like every number here |
| 8–23 | **its own key**: a store's index can be damaged so that a good frame is found under another frame's key |
| 24–39 | packed and raw length of the answer, packed and raw length of the question |
| 40–… | the answer: the Result's fields, run and creation time in canonical CBOR, under zstd |
| …–… | the question: kind, digests of model, settings and environment, tokens, inputs, recorded; likewise |
| last 16 | xxh3_128 over everything before |

Magic, version and checksum stay where they are in every later version: so is an entry of a newer evalcache told from a damaged
one.

A segment whose packed and raw lengths are equal is stored as it is. A hit reads the answer only; the question is there so that
the ledger can be rebuilt from the store alone. One segment for both was rejected: a hit would unpack three times what it needs.

`seal` and `unseal` are the little brother for rows that are not entries (shared objects, journal rows).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping
from sys import intern
from types import MappingProxyType
from typing import Any

import zstandard

from evalcache.canonical import decode, encode_canonical
from evalcache.digest import SIZE_BYTES, Digest, checksum
from evalcache.errors import CanonicalError, FrameError, NewerFrameError
from evalcache.records import Action, Array, Cost, Entry, Result
from evalcache.structs import Frozen, field

MAGIC = b"evcf"
FRAME_VERSION = 1
SEGMENT_LIMIT_BYTES = 512 << 20
"""Most raw bytes of one segment. Bounds what a reader will ever allocate for one row, whatever its header claims."""

_HEADER = struct.Struct("<4sI16s4I")
_HEADER_BYTES = _HEADER.size
_MIN_ANSWER_BYTES = 1024  # below this zstd saves some 150 bytes and costs a hit a third of its time
_MIN_QUESTION_BYTES = 96  # read by the ledger's sync alone; below this zstd's own header eats what it saves
_SMALL_BYTES = 4096
_NOTHING: Mapping[str, Any] = MappingProxyType({})  # most results have no scalars or no arrays: one for all of them
_LEVEL = 1  # level 3 saves another 2 % of a typical entry for twice the time


class Question(Frozen):
    """What an entry answers, as far as the frame holds it; settings and environment are shared objects of the store.

    Args:
        kind: the request's kind. model: manifest root.
        settings, environment: digests of `Fields.canonical`, found in the store as ``fields/<hex>``.
        tokens: little-endian int32 bytes. inputs: further keyed inputs. recorded: unkeyed facts of the environment.
    """

    kind: str
    model: Digest
    settings: Digest
    environment: Digest
    tokens: bytes
    inputs: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Any] = field(default_factory=dict)


class _Codec(threading.local):
    """One zstd context per thread: contexts are not thread-safe, and making one costs more than a small entry."""

    def __init__(self) -> None:
        self.pack = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress
        self.unpack = zstandard.ZstdDecompressor().decompress


_codec = _Codec()


def encode_frame(key: Digest, action: Action, result: Result, run: str, created_at: float) -> bytes:
    """The bytes of an entry. Deterministic for one version of zstd.

    Args:
        key: the Action's key. run: id of the run that computed the result. created_at: Unix seconds.

    Raises:
        CanonicalError: a field of the action or the result has no canonical encoding.
        FrameError: a segment is larger than `SEGMENT_LIMIT_BYTES`.
    """
    size_bytes = size_bytes_of(result)
    if size_bytes > SEGMENT_LIMIT_BYTES:  # before encoding, which would copy it all
        raise _fault(key, "the result is larger than one entry may be", SEGMENT_LIMIT_BYTES, size_bytes)
    cost = result.cost
    answer = encode_canonical(
        [
            result.tokens,
            result.text,
            result.logprobs,
            result.finish_reason,
            dict(result.scalars),
            {name: [array.dtype, list(array.shape), array.data] for name, array in result.arrays.items()},
            None if cost is None else [cost.seconds, cost.prompt_tokens, cost.completion_tokens, cost.device, cost.batch_size],
            run,
            created_at,
        ]
    )
    request, environment = action.request, action.environment
    question = encode_canonical(
        [
            request.kind,
            action.model.value,
            request.settings.digest.value,
            environment.keyed.digest.value,
            request.tokens,
            dict(request.inputs),
            dict(environment.recorded),
        ]
    )
    packed_answer, packed_question = _pack(key, answer, _MIN_ANSWER_BYTES), _pack(key, question, _MIN_QUESTION_BYTES)
    header = _HEADER.pack(MAGIC, FRAME_VERSION, key.value, len(packed_answer), len(answer), len(packed_question), len(question))
    body = b"".join((header, packed_answer, packed_question))
    return body + checksum(body)


def size_bytes_of(result: Result) -> int:
    """How large a result is, apart from its text and scalars."""
    return len(result.tokens) + len(result.logprobs) + sum(len(array.data) for array in result.arrays.values())


def decode_entry(key: Digest, frame: bytes) -> Entry:
    """The entry under ``key``; the question stays packed. Cost: about 2 µs for 64 new tokens and their text.

    Raises:
        FrameError: the bytes are not a whole, unaltered entry of this very key; says what was expected and found.
    """
    packed, raw, _, _ = _open(key, frame)
    content = _content(key, frame, _HEADER_BYTES, packed, raw)
    try:
        tokens, text, logprobs, finish_reason, scalars, arrays, cost, run, created_at = content
        if not (type(tokens) is bytes and type(logprobs) is bytes and type(scalars) is dict and type(run) is str):
            raise TypeError("a field has another type")
        if cost is not None:
            cost = Cost(*cost)
        if arrays:
            arrays = {name: Array(dtype, tuple(shape), data) for name, (dtype, shape, data) in arrays.items()}
        # Interned: a bulk of entries of one run holds its id once.
        result = Result(
            tokens, text, logprobs, finish_reason and intern(finish_reason), scalars or _NOTHING, arrays or _NOTHING, cost
        )
        return Entry(key, result, intern(run), created_at)
    except (ValueError, TypeError, AttributeError) as error:
        raise _fault(key, f"the answer is not a result: {error}", "nine fields", type(content).__name__) from error


def decode_question(key: Digest, frame: bytes) -> Question:
    """What the entry under ``key`` answers.

    Raises:
        FrameError: as for `decode_entry`.
    """
    packed_answer, _, packed, raw = _open(key, frame)
    content = _content(key, frame, _HEADER_BYTES + packed_answer, packed, raw)
    try:
        kind, model, settings, environment, tokens, inputs, recorded = content
        if not (type(kind) is str and type(tokens) is bytes and type(inputs) is dict and type(recorded) is dict):
            raise TypeError("a field has another type")
        if any(type(value) is not bytes or len(value) != SIZE_BYTES for value in (model, settings, environment)):
            raise ValueError("a digest is not 16 bytes")
        return Question(kind, Digest(model), Digest(settings), Digest(environment), tokens, inputs, recorded)
    except (ValueError, TypeError) as error:
        raise _fault(key, f"the question is not one: {error}", "seven fields", type(content).__name__) from error


def seal(name: str, data: bytes) -> bytes:
    """``data`` with a checksum over its name and itself, for rows that are not entries."""
    return checksum(name.encode() + b"\0" + data) + data


def unseal(name: str, sealed: Any) -> bytes:
    """The bytes given to `seal` under the same name.

    Raises:
        FrameError: these are not they.
    """
    if type(sealed) is not bytes or len(sealed) < SIZE_BYTES:
        raise FrameError(f"row {name!r} is not sealed bytes", key=name, expected="bytes", found=type(sealed).__name__)
    data, found = sealed[SIZE_BYTES:], sealed[:SIZE_BYTES]
    expected = checksum(name.encode() + b"\0" + data)
    if found != expected:
        raise FrameError(f"row {name!r} was altered", key=name, expected=expected.hex(), found=found.hex())
    return data


def _pack(key: Digest, raw: bytes, least_bytes: int) -> bytes:
    if len(raw) > SEGMENT_LIMIT_BYTES:
        raise _fault(key, "a segment is larger than one entry may hold", SEGMENT_LIMIT_BYTES, len(raw))
    if len(raw) < least_bytes:
        return raw
    packed = _codec.pack(raw)
    return packed if len(packed) < len(raw) else raw


def _open(key: Digest, frame: Any) -> tuple[int, int, int, int]:
    """Everything that can be checked without unpacking: magic, version, lengths, checksum, key. Returns the four lengths."""
    if type(frame) is not bytes:
        raise _fault(key, "the row holds no bytes", "bytes", type(frame).__name__)
    size = len(frame)
    if size < _HEADER_BYTES + SIZE_BYTES:
        raise _fault(key, "the frame is too short", _HEADER_BYTES + SIZE_BYTES, size)
    magic, version, owner, packed_answer, answer, packed_question, question = _HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise _fault(key, "the row is not a frame", MAGIC, magic)
    if version > FRAME_VERSION and frame.endswith(checksum(frame[:-SIZE_BYTES])):  # these ends stay, whatever is between them
        fault = _fault(key, "a newer evalcache wrote this entry", FRAME_VERSION, version)
        raise NewerFrameError(fault.message, hint="upgrade", **fault.fields)
    if version != FRAME_VERSION:
        raise _fault(key, "the frame has another version", FRAME_VERSION, version)
    if _HEADER_BYTES + packed_answer + packed_question + SIZE_BYTES != size:
        raise _fault(key, "the frame's lengths do not add up", _HEADER_BYTES + packed_answer + packed_question + SIZE_BYTES, size)
    # Of a few kilobytes a copy is cheaper than a view.
    expected = checksum(frame[:-SIZE_BYTES] if size < _SMALL_BYTES else memoryview(frame)[:-SIZE_BYTES])
    if not frame.endswith(expected):
        raise _fault(key, "the frame was altered", expected.hex(), frame[-SIZE_BYTES:].hex())
    if owner != key:
        raise _fault(key, "the frame belongs to another key", key.hex, owner.hex())
    return packed_answer, answer, packed_question, question


def _content(key: Digest, frame: bytes, start: int, packed: int, raw: int) -> Any:
    """Unpack one segment, allocating at most what its header promised and never more than the limit."""
    if raw > SEGMENT_LIMIT_BYTES:
        raise _fault(key, "a segment claims to be larger than any may be", SEGMENT_LIMIT_BYTES, raw)
    segment = frame[start : start + packed]
    try:
        if packed != raw:
            # zstd allocates what its *own* header claims and ignores max_output_size where that is given: so ask first.
            claimed = zstandard.frame_content_size(segment)
            if claimed != raw:
                raise _fault(key, "a segment's two lengths differ", raw, claimed)
            segment = _codec.unpack(segment, allow_extra_data=False)
        return decode(segment)
    except (zstandard.ZstdError, CanonicalError, OverflowError) as error:
        raise _fault(key, f"a segment cannot be read: {error}", "zstd over canonical CBOR", type(error).__name__) from error


def _fault(key: Digest, message: str, expected: Any, found: Any) -> FrameError:
    return FrameError(f"{key}: {message}: expected {expected!r}, found {found!r}", key=key, expected=expected, found=found)
