"""The frozen records that everything else passes around: what is asked, what else shapes the answer, what came back.

They hold values and do nothing. Token ids are always little-endian int32 bytes: a third of the cost of a list to encode, and
exactly what is stored.
"""

from __future__ import annotations

import enum
import math
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from evalcache.canonical import encode_canonical, encode_trusted
from evalcache.digest import Digest, digest_bytes
from evalcache.structs import Frozen, field

UNCACHEABLE_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "adapter_names": "adapter_names= chooses an adapter per row inside the call",
        "argument": "an argument of the call is not on the list of known ones",
        "assistant": "assisted decoding draws on a second model",
        "changed": "the model changed while it was computing, or between two checks",
        "code": "code that shapes the answer cannot be hashed exactly",
        "criterion": "a stopping criterion is unknown or keeps state per row",
        "gradients": "the call builds a graph for backward",
        "hook": "a foreign forward hook, or a torch function or dispatch mode, is active",
        "internal": "evalcache itself failed while keying the call; the warning says how",
        "max_time": "the answer depends on the clock",
        "off": "the policy is off",
        "output": "the call asks for outputs that are not stored (attentions, hidden states, past key values)",
        "past_key_values": "a key-value cache comes in or goes out with the call",
        "patched": "a method or function is not where its class or module says",
        "processor": "a logits processor or prefix function is unknown",
        "sharded": "this process sees one shard of the model only",
        "streamer": "a streamer that is not known watches the tokens as they are made, or several rows are streamed at once",
        "threads": "sampled calls from several threads share one generator",
        "too_large": "the result is larger than one entry may be",
        "training": "the model is in training mode",
        "unhashable": "a tensor or attribute of the model cannot be hashed exactly",
        "unsupported": "this kind of model or call is not supported yet",
    }
)
"""Every reason for which a call runs as if evalcache were not there, with its meaning."""


class Fields(Mapping[str, Any]):
    """An immutable map of canonical values, digested once however many requests share it.

    Raises:
        CanonicalError: a value has no canonical encoding.
    """

    __slots__ = ("_bytes", "_digest", "_values")

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._bytes = encode_canonical(self._values)
        self._digest = digest_bytes(self._bytes)

    @property
    def canonical(self) -> bytes:
        """The canonical bytes, as stored beside the entries."""
        return self._bytes

    @property
    def digest(self) -> Digest:
        """The digest of the canonical bytes."""
        return self._digest

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fields) and self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"Fields({self._values!r})"


NO_FIELDS = Fields({})


class Request(Frozen):
    """One thing asked of a model.

    Args:
        kind: ``generate``, ``generate_batch``, ``loglikelihood``, …; what the other fields mean depends on it.
        tokens: input token ids where the mask is 1, little-endian int32 bytes.
        settings: the effective settings, as the engine resolved them, inactive ones dropped.
        inputs: whatever else this row is asked with (mask holes, position ids, continuation ids, digests of further tensors).
    """

    kind: str
    tokens: bytes
    settings: Fields = NO_FIELDS
    inputs: Mapping[str, Any] = field(default_factory=dict)


class Environment(Frozen):
    """What else shapes the answer.

    Args:
        keyed: part of the key (dtype, attention kernel, library versions, …).
        recorded: stored with the entry only (device name, batch size, padded width), unless matching is strict.
    """

    keyed: Fields
    recorded: Mapping[str, Any] = field(default_factory=dict)


class Action(Frozen):
    """All that determines a Result. ``model`` is the manifest's root."""

    model: Digest
    request: Request
    environment: Environment


class Actions(Sequence[Action]):
    """Actions that differ in their rows alone. Each is built when it is asked for: of stored ones that is never.

    Args:
        model, kind, settings, environment: of all of them.
        tokens, inputs: of each, as in `Request`.
    """

    __slots__ = ("environment", "inputs", "kind", "model", "settings", "tokens")

    def __init__(
        self,
        model: Digest,
        kind: str,
        settings: Fields,
        environment: Environment,
        tokens: Sequence[bytes],
        inputs: Sequence[Mapping[str, Any]],
    ) -> None:
        self.model, self.kind, self.settings, self.environment = model, kind, settings, environment
        self.tokens, self.inputs = tokens, inputs

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, place: Any) -> Any:
        return Action(self.model, Request(self.kind, self.tokens[place], self.settings, self.inputs[place]), self.environment)


class Cost(Frozen):
    """What it took to compute one Result, measured.

    Args:
        seconds: this row's share of its batch's busy wall seconds; the shares of a batch add up to what was measured.
        prompt_tokens: tokens read; completion_tokens: tokens made; None where nobody counted them.
        device: name of the device that was busy, e.g. ``cpu`` or ``NVIDIA H200``.
        batch_size: rows computed together.
    """

    seconds: float
    prompt_tokens: int | None
    completion_tokens: int | None
    device: str
    batch_size: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.seconds) or self.seconds < 0:
            raise ValueError(f"cost in seconds must be finite and not negative, found {self.seconds!r}")


class Array(Frozen):
    """A tensor without its library: dtype by torch's name (``float32``, ``bfloat16``), shape, row-major little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Result(Frozen):
    """What came back for one Request.

    Args:
        tokens: new token ids up to the row's own end, little-endian int32 bytes.
        text: what a client made of them, where a client was asked for text.
        logprobs: log-probability of each scored token, little-endian float64 bytes.
        finish_reason: ``stop``, ``length`` or None where the question does not arise.
        scalars: canonical named values (``sum``, ``is_greedy``, …).
        arrays: named tensors (scores, logits, generator states).
        cost: what computing it took; None where it was not measured.
        made: how it was computed, in canonical values: recorded with its environment where it is stored, and not read back.
    """

    tokens: bytes = b""
    text: str | None = None
    logprobs: bytes = b""
    finish_reason: str | None = None
    scalars: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    cost: Cost | None = None
    made: Mapping[str, Any] | None = None


class Entry(Frozen):
    """A stored Result and who made it: a hit, where it is what a lookup finds. What it answers is read by
    `Store.get_question`, only on demand.

    Args:
        key: the Action's key.
        result: the answer. run: id of the run that computed it. created_at: Unix seconds.
    """

    key: Digest
    result: Result
    run: str
    created_at: float


def digest_answer(result: Result) -> Digest:
    """Digest over all that a Result answers: what it cost does not count."""
    arrays = {name: [array.dtype, list(array.shape), array.data] for name, array in result.arrays.items()}
    parts = [result.tokens, result.text, result.logprobs, result.finish_reason, dict(result.scalars), arrays]
    return digest_bytes(encode_trusted(parts))


class Taken(Frozen):
    """What became of entries from elsewhere: taken, ``known`` here already, or here with another answer (``conflicts``)."""

    new: int = 0
    known: int = 0
    conflicts: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.new + self.known + self.conflicts

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.new + other.new, self.known + other.known, self.conflicts + other.conflicts)


class Miss(Frozen):
    """The request has to be computed. ``reason``: ``absent``, ``corrupt``, ``refresh``, or ``batch`` (a neighbour missed)."""

    reason: str


class Uncacheable(Frozen):
    """The request is computed and not stored. ``reason``: one of `UNCACHEABLE_REASONS`; ``detail``: what exactly."""

    reason: str
    detail: str = ""


Lookup = Entry | Miss | Uncacheable
"""What becomes of a request: the stored entry answers it, or it is computed."""


class Policy(enum.Enum):
    """What a run may do with the store. Never part of a key.

    ``use`` reads and writes, ``refresh`` computes everything and writes, ``read_only`` reads and never writes, ``replay``
    reads and makes a miss an error, ``off`` does nothing at all.
    """

    USE = "use"
    REFRESH = "refresh"
    READ_ONLY = "read_only"
    REPLAY = "replay"
    OFF = "off"

    @property
    def reads(self) -> bool:
        """Whether stored entries may be served."""
        return self in (Policy.USE, Policy.READ_ONLY, Policy.REPLAY)

    @property
    def writes(self) -> bool:
        """Whether computed results may be stored."""
        return self in (Policy.USE, Policy.REFRESH)


def pack_tokens(ids: Any) -> bytes:
    """Token ids (a sequence or array of ints) as little-endian int32 bytes.

    Raises:
        OverflowError: an id does not fit in 32 bits.
    """
    if type(ids) is list or type(ids) is tuple:
        packed = array("i", ids)
        if sys.byteorder != "little":
            packed.byteswap()
        return packed.tobytes()
    wide = np.asarray(ids, dtype=np.int64)
    narrow = wide.astype("<i4")
    if not np.array_equal(wide, narrow):
        raise OverflowError("token id outside 32 bits")
    return narrow.tobytes()


def unpack_tokens(data: bytes) -> np.ndarray:
    """The ids that `pack_tokens` wrote. Shape: ``(n,) int32``, read-only view."""
    return np.frombuffer(data, dtype="<i4")


def pack_logprobs(values: Any) -> bytes:
    """Log-probabilities as little-endian float64 bytes, which hold float32 values exactly."""
    return np.asarray(values, dtype="<f8").tobytes()


def unpack_logprobs(data: bytes) -> np.ndarray:
    """The values that `pack_logprobs` wrote. Shape: ``(n,) float64``, read-only view."""
    return np.frombuffer(data, dtype="<f8")
