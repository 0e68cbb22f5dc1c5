"""The bytes of a boundary state in its file. They are believed in nothing: what is not whole and unaltered is no state.

| bytes | field |
|---|---|
| 0–3 | magic ``evcs`` |
| 4–7 | `STATE_VERSION`, little-endian like every number here |
| 8–23 | **its own key** |
| 24–31 | length of the header |
| 32–39 | length of the whole |
| 40–… | the header in canonical CBOR: what is known of the making, then name, dtype, shape and length of each tensor |
| …–… | the tensors' bytes, each from a multiple of 16 on |
| last 16 | xxh3_128 over everything before |

safetensors was rejected: it has neither key nor checksum, and its header takes as long to read as a small state.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from evalcache.canonical import decode, encode_canonical
from evalcache.digest import SIZE_BYTES, Digest, Hasher, checksum
from evalcache.errors import CanonicalError, FrameError
from evalcache.records import Array
from evalcache.structs import Frozen, field

STATE_VERSION = 1
MAGIC = b"evcs"

_HEAD = struct.Struct("<4sI16sQQ")
HEAD_BYTES = _HEAD.size
"""So many bytes `check_head` needs."""
_SIZE_LIMIT = 1 << 63
_ALIGNMENT = 16  # as memory is allocated: so are tensors aligned that are views of a file's bytes


class State(Frozen):
    """What enters a layer, for one row: tensors by name, whose ``data`` may be any bytes-like object.

    ``about``: who made it, in canonical values.
    """

    tensors: Mapping[str, Array]
    about: Mapping[str, Any] = field(default_factory=dict)


def size_bytes_of(state: State) -> int:
    """How long a state's frame is. Cost: some microseconds.

    Raises:
        TypeError: a name, dtype or shape is not one, or a tensor's data are no bytes.
    """
    _, size_bytes = _plan(state)
    return size_bytes


def encode_state(key: Digest, state: State) -> list[Any]:
    """The frame of a state, as parts to write one after the other. Cost: one pass over the tensors' bytes, and no copy.

    Raises:
        TypeError: a name, dtype or shape is not one, or a tensor's data are no bytes.
    """
    header, size_bytes = _plan(state)
    parts: list[Any] = [
        _HEAD.pack(MAGIC, STATE_VERSION, key.value, len(header), size_bytes),
        header,
        _padding(len(header) + HEAD_BYTES),
    ]
    for array in state.tensors.values():
        parts += array.data, _padding(_length(array))
    hasher = Hasher()
    for part in parts:
        hasher.update(part)
    return [*parts, hasher.digest().value]


def check_head(key: Digest, head: bytes, size_bytes: int) -> int:
    """The length of the header, if the first `HEAD_BYTES` of a frame are those of ``key`` and of one that is so long.

    Raises:
        FrameError: they are not; says what was expected and found.
    """
    if len(head) != HEAD_BYTES:
        raise _fault(key, "the state is cut short", HEAD_BYTES, len(head))
    magic, version, owner, header_bytes, whole_bytes = _HEAD.unpack(head)
    if (magic, version) != (MAGIC, STATE_VERSION):
        raise _fault(key, "not a state, or of another version", (MAGIC, STATE_VERSION), (magic, version))
    if owner != key:
        raise _fault(key, "the state belongs to another key", key.hex, owner.hex())
    if whole_bytes != size_bytes or not HEAD_BYTES + header_bytes + SIZE_BYTES <= size_bytes:
        raise _fault(key, "the state's lengths do not add up", whole_bytes, size_bytes)
    return int(header_bytes)


def decode_state(key: Digest, frame: bytes) -> State:
    """The state in a frame; its tensors are views of these bytes. Cost: one pass over them.

    Raises:
        FrameError: the bytes are not a whole, unaltered state of this very key; says what was expected and found.
    """
    header_bytes = check_head(key, frame[:HEAD_BYTES], len(frame))
    view = memoryview(frame)
    expected = checksum(view[:-SIZE_BYTES])
    if not frame.endswith(expected):
        raise _fault(key, "the state was altered", expected.hex(), frame[-SIZE_BYTES:].hex())
    at, end = HEAD_BYTES + header_bytes, len(frame) - SIZE_BYTES
    tensors: dict[str, Array] = {}
    try:
        about, fields = decode(frame[HEAD_BYTES:at])
        if not isinstance(about, dict):
            raise TypeError("nothing is said about it")
        for name, dtype, shape, size_bytes in fields:
            _check_fields(name, dtype, shape, size_bytes)
            if name in tensors:
                raise ValueError("a name stands twice")
            at += len(_padding(at))
            tensors[name] = Array(dtype, tuple(shape), view[at : at + size_bytes])  # type: ignore[arg-type]
            at += size_bytes
    except (CanonicalError, TypeError, ValueError) as error:
        raise _fault(key, f"the header is not one of tensors: {error}", "four fields each", header_bytes) from error
    if at + len(_padding(at)) != end:
        raise _fault(key, "the tensors do not fill the state", end, at)
    return State(MappingProxyType(tensors), MappingProxyType(about))


def _plan(state: State) -> tuple[bytes, int]:
    """The header, and the length of the whole."""
    fields = [[name, array.dtype, list(array.shape), _length(array)] for name, array in state.tensors.items()]
    for one in fields:
        _check_fields(*one)
    header = encode_canonical([dict(state.about), fields])
    whole = 0
    for length in (HEAD_BYTES + len(header), *(one[-1] for one in fields)):
        whole += length + len(_padding(length))
    return header, whole + SIZE_BYTES


def _check_fields(name: Any, dtype: Any, shape: Any, size_bytes: Any) -> None:
    if type(name) is not str or type(dtype) is not str or type(shape) is not list:
        raise TypeError("not a name, a dtype and a shape")
    if any(type(size) is not int or not 0 <= size < _SIZE_LIMIT for size in [*shape, size_bytes]):
        raise TypeError("a size is not a whole number from 0 on")


def _length(array: Array) -> int:
    return memoryview(array.data).nbytes


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % _ALIGNMENT)


def _fault(key: Digest, message: str, expected: Any, found: Any) -> FrameError:
    return FrameError(f"{key}: {message}: expected {expected!r}, found {found!r}", key=key, expected=expected, found=found)
