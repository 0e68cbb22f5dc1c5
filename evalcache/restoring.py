"""Restoring: entries of the store, rebuilt from what the ledger knows of them. Level 5.

Nothing is believed: an entry is rebuilt where the key of the rebuilt question *is* its key, and the digest of the rebuilt answer
is the one that the ledger took when it was told. What is not proven so (tensors that were too large for the ledger, an answer of
which an elder version kept no digest, a row that somebody has altered) is not rebuilt, and counted with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evalcache.canonical import decode
from evalcache.digest import Digest
from evalcache.errors import CanonicalError, EvalCacheError
from evalcache.frame import encode_frame
from evalcache.key import key_of
from evalcache.ledger import Ask, Ledger
from evalcache.manifest import Manifest
from evalcache.records import Action, Array, Cost, Environment, Fields, Request, Result, digest_answer
from evalcache.store import Store
from evalcache.structs import Frozen, field

NO_QUESTION = "the ledger's question has another key"
NO_ANSWER = "the ledger's answer is another one"
NO_SETTINGS = "the ledger has lost its settings or environment"
NO_PROOF = "an elder version of the ledger kept no digest of the answer"
TOO_LARGE = "the ledger's answer is not the whole one: tensors beyond a megabyte stay in the store"

_KEYS = 1000  # in memory at once
_ROWS = """
SELECT r.key, r.kind, r.model, r.settings_digest, r.environment_digest, r.prompt_token_ids, r.inputs_canonical,
    o.text, o.token_ids, o.logprobs, o.finish_reason, o.prompt_tokens, o.completion_tokens, o.seconds, o.device, o.batch_size,
    o.run, epoch_us(o.created_at), o.exact, o.arrays, o.answer
FROM (SELECT * FROM requests WHERE key IN (SELECT unnest(split(?, ','))::UUID)
    QUALIFY row_number() OVER (PARTITION BY key) = 1) r
JOIN (SELECT * FROM outputs WHERE key IN (SELECT unnest(split(?, ','))::UUID)
    QUALIFY row_number() OVER (PARTITION BY key ORDER BY created_at DESC, run) = 1) o USING (key)
"""


class Restored(Frozen):
    """What came back. ``refused``: key → why it did not."""

    entries: int = 0
    objects: int = 0
    refused: Mapping[Digest, str] = field(default_factory=dict)

    @property
    def reasons(self) -> Counter[str]:
        """How many did not come back, by reason."""
        return Counter(self.refused.values())


class _Refusal(Exception):
    """Why an entry is not rebuilt."""


def restore_entries(
    ledger: Ledger, store: Store, keys: Sequence[Digest], progress: Callable[[int, int], None] = lambda done, total: None
) -> Restored:
    """Rebuild these entries from the ledger, with what they name; an entry that the store has stays as it is.

    Cost: for every thousand keys a pass over the ledger's columns of keys.

    Raises:
        LedgerError: the ledger cannot be read. StoreError: the store cannot be written; what was restored before is in it.
    """
    refused: dict[Digest, str] = {}
    named: set[Digest] = set()
    entries = 0
    with ledger.reading() as ask:
        fields = _Fields(ask)
        for start in range(0, len(keys), _KEYS):
            some = keys[start : start + _KEYS]
            frames, told = [], ",".join(key.hex for key in some)
            rows = {row[0]: row[1:] for row in ask(_ROWS, [told, told]).rows}
            for key in some:
                try:
                    frame, action = rebuild_frame(key, rows.get(key.hex), fields)
                except _Refusal as refusal:
                    refused[key] = str(refusal)
                else:
                    frames.append((key, frame))
                    named |= {action.model, action.request.settings.digest, action.environment.keyed.digest}
            entries += store.take_in(frames, {}, told=False).new
            progress(start + len(some), len(keys))
        objects = restore_objects(ask, store, named)
    return Restored(entries, objects, refused)


def restore_objects(ask: Ask, store: Store, digests: set[Digest] | None = None) -> int:
    """Put back the settings, environments and manifests that the store lacks; returns how many.

    Args:
        digests: of those that are named; None means of all entries.
    """
    if digests is None:
        digests = set()
        for key, _ in store.frames():
            if question := store.get_question(key):
                digests |= {question.model, question.settings, question.environment}
    have = {name.rpartition("/")[2] for name, _ in store.objects()}
    missing = ",".join(sorted(digest.hex for digest in digests if digest.hex not in have))
    if not missing:
        return 0
    objects: dict[str, bytes] = {}
    wanted = "IN (SELECT unnest(split(?, ','))::UUID)"
    for digest, data in ask(f"SELECT DISTINCT ON (digest) digest, canonical FROM fields WHERE digest {wanted}", [missing]).rows:
        if data is not None and _fields(data, digest) is not None:
            objects[f"fields/{digest}"] = data
    for digest, data in ask(f"SELECT DISTINCT ON (digest) digest, manifest FROM models WHERE digest {wanted}", [missing]).rows:
        if data is not None and _is_manifest(data, digest):
            objects[f"model/{digest}"] = data
    store.take_in([], objects)
    return len(objects)


def rebuild_frame(key: Digest, row: Sequence[Any] | None, read: Callable[[str], Fields | None]) -> tuple[bytes, Action]:
    """The frame of one entry, proven, and what it answers.

    Args:
        row: of `_ROWS`, without its key. read: digest (hex) of settings or an environment → these.
    """
    if row is None:
        raise _Refusal(NO_QUESTION)
    kind, model, settings_digest, environment_digest, prompt, inputs, *answered = row
    text, tokens, logprobs, finish, read_tokens, made, seconds, device, batch, run, created_us, exact, arrays, proof = answered
    settings, environment = read(settings_digest), read(environment_digest)
    if settings is None or environment is None:
        raise _Refusal(NO_SETTINGS)
    if proof is None:
        raise _Refusal(NO_PROOF)
    try:
        scalars, recorded, *odd = decode(exact) if exact is not None else ({}, {})
        tensors = {} if arrays is None else {name: Array(one[0], tuple(one[1]), one[2]) for name, one in decode(arrays).items()}
        request = Request(kind, _ids(prompt), settings, {} if inputs is None else decode(inputs))
        action = Action(Digest.parse(model), request, Environment(environment, recorded))
        if key_of(action) != key:
            raise _Refusal(NO_QUESTION)
        cost = None if seconds is None else Cost(seconds, read_tokens, made, device, batch)
        scores = np.array([np.nan if value is None else value for value in logprobs], dtype="<f8").tobytes()
        result = Result(_ids(tokens), text, *(odd or [scores]), finish, scalars, tensors, cost)
        if digest_answer(result).hex != proof:
            raise _Refusal(NO_ANSWER if arrays is not None else TOO_LARGE)
        return encode_frame(key, action, result, run, created_us / 1e6), action
    except (EvalCacheError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise _Refusal(NO_ANSWER) from error


class _Fields:
    """Settings and environments of the ledger, each read once, proven by their digest."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._read: dict[str, Fields | None] = {}

    def __call__(self, digest: str) -> Fields | None:
        if digest not in self._read:
            rows = self._ask("SELECT canonical FROM fields WHERE digest = ? AND canonical IS NOT NULL LIMIT 1", [digest]).rows
            self._read[digest] = _fields(rows[0][0], digest) if rows else None
        return self._read[digest]


def _fields(data: bytes, digest: str) -> Fields | None:
    try:
        fields = Fields(decode(data))
    except (CanonicalError, TypeError, ValueError):
        return None
    return fields if fields.digest.hex == digest and fields.canonical == data else None


def _is_manifest(data: bytes, digest: str) -> bool:
    try:
        return Manifest.from_bytes(data).root.hex == digest
    except (CanonicalError, KeyError):
        return False


def _ids(values: Sequence[int]) -> bytes:
    return np.array(values, dtype="<i4").tobytes()
