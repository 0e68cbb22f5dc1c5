"""Journal events: what a run tells the ledger. Written beside the entries in the store's own transaction, read by sync.

An event is a small frozen record; on disk it is ``[name, {field: value}]`` in canonical CBOR. Outputs are not repeated
here: `Stored` names their keys and the sync reads them from the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from evalcache.canonical import decode, encode_canonical
from evalcache.errors import CanonicalError, NewerEventError
from evalcache.structs import Frozen, Struct, asdict, field, names_of


class RunStarted(Frozen):
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
    tags: tuple[str, ...] = ()


class RunEnded(Frozen):
    """A run ended. ``status``: ``ok``, ``failed`` or ``interrupted``; a run without this event was killed."""

    run: str
    ended_at: float
    status: str
    exit_code: int | None = None


class ModelSeen(Frozen):
    """A run met a model: the store's object ``model/<root hex>`` holds its manifest. ``name`` as the caller named it."""

    run: str
    root: bytes
    name: str = ""
    role: str = ""


class ModelLoaded(Frozen):
    """Weights were loaded, which took ``seconds``; zero such events in a run mean that the model stayed asleep."""

    run: str
    root: bytes
    seconds: float


class Stored(Frozen):
    """Entries committed in this transaction, by key."""

    run: str
    keys: tuple[bytes, ...]


class Removed(Frozen):
    """Entries that left the store in this transaction, by key. ``why``: as in the ledger's table ``removals``.

    ``run``: the run that removed them, empty where it was none.
    """

    run: str
    at: float
    keys: tuple[bytes, ...]
    why: str


class LookedUp(Frozen):
    """Lookups of one call, as columns of equal length.

    Args:
        keys: 16 bytes each, empty where there was no key (uncacheable).
        outcomes: ``hit``, ``miss``, ``uncacheable`` or ``duplicate`` (merged with an equal request of the same run).
        reasons: of a miss or an uncacheable; ``own`` of a hit whose entry this very run computed, which is no saving; else empty.
        seconds: credited to a hit or a duplicate (what its entry cost), spent by a miss or an uncacheable; None if not measured.
        tasks, documents: of the eval client, empty where there is none.
        devices: where the seconds were measured, by name; empty where that is not known.
        origins: of a hit or its duplicates, the run that computed the entry; else empty.
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
    devices: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class Overhead(Frozen):
    """Seconds that evalcache itself took since the last such event, by kind (`OVERHEAD_KINDS`)."""

    run: str
    at: float
    seconds: Mapping[str, float]


class Measured(Frozen):
    """What a process of a run saw of a device since the last such event; one that measures nothing tells nothing.

    Args:
        device: its name, as in `Cost`. device_count: how many of them the process uses.
        peak_bytes: the most memory that was in use on one of them, over the whole process.
        energy_joules: that they took; None where there is no meter, which is not the same as zero.
    """

    run: str
    at: float
    device: str
    device_count: int
    peak_bytes: int | None = None
    energy_joules: float | None = None


class Resumed(Frozen):
    """Forwards of a model that began above its first layer, since the last such event of this process.

    Args:
        model: manifest root. depth: after so many of its ``layers``. rows: of the batches.
        seconds: what the layers below take, as last measured on ``device``, less what it took to read their states.
        why: forwards that begin there were found not to be exact, or fail: what was seen; empty where all is well.
    """

    run: str
    at: float
    model: bytes
    depth: int
    layers: int
    rows: int
    seconds: float
    device: str
    why: str = ""


class TaskSeen(Frozen):
    """A run evaluates a task. A task that the ledger knows in this version and with these settings is not written again.

    The store keeps no tasks, documents and scores once the ledger has them: a ledger that is lost loses them.

    Args:
        client, task: the eval framework, and the task's name in it, as in `LookedUp`.
        version: of the task's definition, empty where it has none.
        settings: what else its scores depend on (shots, template, split, output type, …), in canonical values.
    """

    run: str
    client: str
    task: str
    version: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


class DocumentsSeen(Frozen):
    """Documents of one task, as columns of equal length. Those that the ledger knows by name and digest are not written again.

    An event is held in memory as a whole: at most a few thousand documents and a few megabytes each; more are several events.

    Args:
        documents: names within the task, as in `LookedUp`.
        digests: 16 bytes each, over the content.
        contents: JSON text (question, choices, target), empty where it is too large to keep.
    """

    run: str
    client: str
    task: str
    documents: tuple[str, ...]
    digests: tuple[bytes, ...]
    contents: tuple[str, ...]


class Scored(Frozen):
    """What answers of one task were worth, as columns of equal length: one row for each document and metric.

    An event is held in memory as a whole: at most a few thousand rows; more are several events.

    Args:
        role: of the model that was scored, as in `LookedUp`.
        documents: names within the task. A name that stands there again for a metric is another try, averaged with the first;
            without a name (empty) each row counts as a document of its own.
        metrics: ``acc``, ``exact_match``, …
        values: what is not finite is known to the ledger as NULL.
        clusters: name of the group that the document belongs to, for standard errors; empty where there is none.
        requests: 16 bytes each, as ``request`` in the ledger's table ``requests``; empty where it is not known.
    """

    run: str
    client: str
    task: str
    role: str
    documents: tuple[str, ...]
    metrics: tuple[str, ...]
    values: tuple[float, ...]
    clusters: tuple[str, ...]
    requests: tuple[bytes, ...]


OVERHEAD_KINDS = (
    "start", "fingerprint", "probe", "checks", "keys", "lookup", "decode", "write", "sync", "last_sync", "prune", "recompute",
)  # fmt: skip

Event = (
    RunStarted | RunEnded | ModelSeen | ModelLoaded | Stored | Removed | LookedUp | Overhead | Measured | Resumed
    | TaskSeen | DocumentsSeen | Scored
)  # fmt: skip
_EVENTS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


def encode_event(event: Event) -> bytes:
    """The canonical bytes of an event. Lone surrogates, which have none, are written as ``?``: names and contents are a client's.

    Raises:
        CanonicalError: some part has a type that has no canonical bytes.
    """
    values: dict[str, Any] = {}
    for name, value in asdict(event).items():
        values[name] = dict(value) if isinstance(value, Mapping) else value
    try:
        return encode_canonical([type(event).__name__, values])
    except UnicodeEncodeError:
        return encode_canonical([type(event).__name__, _as_text(values)])


def _as_text(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_as_text(name): _as_text(item) for name, item in value.items()}
    return [_as_text(item) for item in value] if isinstance(value, (list, tuple)) else value


def decode_event(data: bytes) -> Event:
    """The event that `encode_event` wrote.

    Raises:
        NewerEventError: they are one of an evalcache that knows more events, or more of them.
        CanonicalError: the bytes are not an event.
    """
    try:
        name, values = decode(data)
        if type(name) is str and type(values) is dict and not set(values) <= set(names_of(_EVENTS.get(name, Struct))):
            hint = "upgrade: nothing is lost, it waits for the ledger"
            raise NewerEventError(f"the journal holds {name!r} of a newer evalcache", hint=hint, found=name)
        kind = _EVENTS[name]
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise CanonicalError(f"not a journal event: {error}", path="event", found=type(error).__name__) from error
