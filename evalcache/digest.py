"""Digest and Hasher: the one place that knows which hash function is used. The only import of xxhash.

xxh3_128 runs at memory speed, which lets every check read *all* bytes of a model. It protects against change and
accident, not against an adversary who crafts collisions: a store that strangers can write to is outside its promise.

Source: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc.Buffer from Python 3.12 on

ALGORITHM = "xxh3_128"
SIZE_BYTES = 16


class Digest(bytes):
    """A hash value: its 16 bytes, big-endian as xxhash prints them.

    A kind of ``bytes``, because a lookup in bulk puts each of them into dictionaries five times.

    >>> str(digest_bytes(b"evalcache"))
    'xxh3_128:76f36abe25f55f6c628e561af2b8e684'
    """

    __slots__ = ()

    @property
    def value(self) -> bytes:
        """The same as plain bytes, which databases and encoders take."""
        return bytes(self)

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read ``xxh3_128:<32 hex digits>``; bare hex (with or without UUID dashes) is taken as xxh3_128.

        Raises:
            ValueError: the text is not a digest of a known algorithm.
        """
        algorithm, _, digits = text.rpartition(":")
        value = bytes.fromhex(digits.replace("-", ""))
        if algorithm not in ("", ALGORITHM) or len(value) != SIZE_BYTES:
            raise ValueError(f"not a {ALGORITHM} digest: {text!r}")
        return cls(value)

    @property
    def hex(self) -> str:  # type: ignore[override]
        """The 32 hexadecimal digits, without the algorithm."""
        return bytes.hex(self)

    def __str__(self) -> str:
        return f"{ALGORITHM}:{self.hex}"

    def __repr__(self) -> str:
        return f"Digest.parse('{self}')"


class Hasher:
    """Incremental xxh3_128. Releases the GIL on large buffers; one thread reads at about memory speed."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: Buffer) -> Hasher:
        """Feed bytes; the split into calls does not matter. Callers frame variable-length parts themselves."""
        self._state.update(data)
        return self

    def digest(self) -> Digest:
        """The digest of everything fed so far."""
        return Digest(self._state.digest())


def digest_bytes(data: Buffer) -> Digest:
    """Digest of one buffer, without a `Hasher`."""
    return Digest(xxhash.xxh3_128_digest(data))


def digest_near(place: bytes, data: Buffer) -> Digest:
    """Digest of one buffer that begins with ``place`` and not with bytes of its own: in order, such digests lie together."""
    return Digest(place + xxhash.xxh3_128_digest(data)[len(place) :])


def checksum(data: Buffer) -> bytes:
    """The 16 raw bytes used as a frame's checksum."""
    return xxhash.xxh3_128_digest(data)
