"""Journal events: what a run tells the ledger. Written beside the entries in the store's own transaction, read by sync.

An event is a small frozen record; on disk it is ``[name, {field: value}]`` in canonical CBOR. Outputs are not repeated
here: `Stored` names their keys and the sync reads them from the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evalcache.canonical import decode, encode_canonical
from evalcache.errors import CanonicalError


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run began. ``run`` is its id (UUID hex); ``versions`` maps package → version; times are Unix seconds."""

    run: str
    started_at: float
    command: str
    client: str = ""
    client_version: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    host: str = ""
    policy: str = "use"
    match: str = "portable"


@dataclass(frozen=True, slots=True)
class RunEnded:
    """A run ended. ``status``: ``ok``, ``failed`` or ``interrupted``; a run without this event was killed."""

    run: str
    ended_at: float
    status: str
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """A run met a model: the store's object ``model/<root hex>`` holds its manifest. ``name`` as the caller named it."""

    run: str
    root: bytes
    name: str = ""
    role: str = ""


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    """Weights were loaded, which took ``seconds``; zero such events in a run mean that the model stayed asleep."""

    run: str
    root: bytes
    seconds: float


@dataclass(frozen=True, slots=True)
class Stored:
    """Entries committed in this transaction, by key."""

    run: str
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class LookedUp:
    """Lookups of one call, as columns of equal length.

    Args:
        keys: 16 bytes each, empty where there was no key (uncacheable).
        outcomes: ``hit``, ``miss``, ``uncacheable`` or ``duplicate`` (merged with an equal request of the same run).
        reasons: of a miss or an uncacheable, else empty.
        seconds: credited to a hit or a duplicate (what its entry cost), spent by a miss or an uncacheable; None if not measured.
        tasks, documents: of the eval client, empty where there is none.
    """

    run: str
    at: float
    model: bytes
    client: str
    role: str
    keys: tuple[bytes, ...]
    outcomes: tuple[str, ...]
    reasons: tuple[str, ...]
    seconds: tuple[float | None, ...]
    tasks: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds that evalcache itself took since the last such event, by kind (`OVERHEAD_KINDS`)."""

    run: str
    at: float
    seconds: Mapping[str, float]


OVERHEAD_KINDS = ("fingerprint", "probe", "checks", "keys", "lookup", "decode", "write", "sync")

Event = RunStarted | RunEnded | ModelSeen | ModelLoaded | Stored | LookedUp | Overhead
_EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (RunStarted, RunEnded, ModelSeen, ModelLoaded, Stored, LookedUp, Overhead)
}


def encode_event(event: Event) -> bytes:
    """The canonical bytes of an event."""
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(event):
        value = getattr(event, spec.name)
        values[spec.name] = dict(value) if isinstance(value, Mapping) else value
    return encode_canonical([type(event).__name__, values])


def decode_event(data: bytes) -> Event:
    """The event that `encode_event` wrote.

    Raises:
        CanonicalError: the bytes are not an event that this version knows.
    """
    try:
        name, values = decode(data)
        kind = _EVENTS[name]
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise CanonicalError(f"not a journal event: {error}", path="event", found=type(error).__name__) from error
