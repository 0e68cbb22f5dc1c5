"""A value's canonical bytes: deterministic CBOR. The only import of cbor2.

Two values are keyed alike exactly when their canonical bytes are equal, so there is no `repr`, no default, no pickling: a
type that is not on the list raises. ``1``, ``1.0``, ``True``, ``"1"`` and ``b"1"`` all differ; dict order does not matter;
list and tuple are the same array.

Source: RFC 8949 §4.2.1 (core deterministic encoding). Maps have text keys only, for which cbor2's length-first order and the
RFC's bytewise order are the same.
"""

from __future__ import annotations

import struct
from typing import Any

import cbor2

from evalcache.digest import Digest, digest_bytes
from evalcache.errors import CanonicalError

_SCALARS = frozenset({type(None), bool, float, str, bytes})
_INT_LIMIT = 1 << 64
_SHORT = tuple(bytes([0x40 + size]) for size in range(24))
_LENGTHS = [(0x58 + place, struct.Struct(f">B{size}")) for place, size in enumerate("BHIQ")]


def check_canonical(value: Any, path: str = "value") -> None:
    """Raise `CanonicalError` naming the first part of ``value`` that has no canonical encoding."""
    kind = type(value)
    if kind in _SCALARS:
        return
    if kind is int:
        # Larger integers would be CBOR bignums (tagged byte strings); nothing that we key needs them.
        if not -_INT_LIMIT <= value < _INT_LIMIT:
            raise CanonicalError(f"{path} is an integer outside 64 bits", path=path, found=value)
    elif kind is list or kind is tuple:
        for index, item in enumerate(value):
            if type(item) not in _SCALARS:
                check_canonical(item, f"{path}[{index}]")
    elif kind is dict:
        for name, item in value.items():
            if type(name) is not str:
                raise CanonicalError(f"{path} has a key that is not text: {name!r}", path=path, found=type(name).__name__)
            if type(item) not in _SCALARS:
                check_canonical(item, f"{path}.{name}")
    else:
        raise CanonicalError(
            f"{path} has no canonical encoding: {kind.__module__}.{kind.__qualname__}", path=path, found=kind.__name__
        )


def encode_canonical(value: Any) -> bytes:
    """The canonical bytes of ``value``.

    Args:
        value: None, bool, int of 64 bits, float, str, bytes, and lists, tuples and text-keyed dicts of these.

    Raises:
        CanonicalError: some part has another type; its path is in the message.

    >>> encode_canonical({"b": 1, "a": [True, 1.0]}).hex()
    'a2616182f5f93c00616201'
    """
    check_canonical(value)
    return cbor2.dumps(value, canonical=True)


def encode_trusted(value: Any) -> bytes:
    """`encode_canonical` for a value that this package built itself and knows to be canonical: no walk over it."""
    return cbor2.dumps(value, canonical=True)


def encode_bytes(data: bytes) -> bytes:
    """`encode_canonical` of bytes, at a third of its cost: keys are made of little else."""
    size = len(data)
    if size < 24:
        return _SHORT[size] + data
    for mark, form in _LENGTHS:
        if not size >> 8 * (form.size - 1):
            return form.pack(mark, size) + data
    raise CanonicalError("more bytes than can be said", path="value", found=size)


def digest_canonical(value: Any) -> Digest:
    """The digest of a value's canonical bytes."""
    return digest_bytes(encode_canonical(value))


def digest_trusted(value: Any) -> Digest:
    """`digest_canonical` for a value that this package built itself, as `encode_trusted`."""
    return digest_bytes(encode_trusted(value))


def decode(data: bytes) -> Any:
    """The value that `encode_canonical` wrote.

    Raises:
        CanonicalError: the bytes are not one CBOR value.
    """
    try:
        return cbor2.loads(data)
    except (cbor2.CBORDecodeError, ValueError, TypeError, RecursionError) as error:
        raise CanonicalError(f"not canonical bytes: {error}", path="value", found=type(error).__name__) from error
