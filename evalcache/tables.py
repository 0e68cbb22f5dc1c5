"""Events, entries and manifests → rows of the ledger's tables. Pure: no database, no store. Level 3.5.

Rows are tuples in the order of `schema.columns`. JSON is for reading: bytes stand in it as hex and not-a-number as text, so what
has to come back exactly is kept beside it in canonical CBOR.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from evalcache.canonical import digest_canonical, encode_trusted
from evalcache.digest import SIZE_BYTES, Digest, digest_bytes
from evalcache.frame import Question
from evalcache.journal import (
    DocumentsSeen,
    Event,
    LookedUp,
    Measured,
    ModelLoaded,
    ModelSeen,
    Overhead,
    Resumed,
    RunEnded,
    RunStarted,
    Scored,
    TaskSeen,
)
from evalcache.manifest import Manifest, ModuleRecord
from evalcache.records import Entry, digest_answer
from evalcache.schema import columns

ARRAYS_LIMIT_BYTES = 1 << 20
"""Tensors of one output beyond this stay in the store alone: full scores of one row are hundreds of megabytes."""

COLUMNS = columns()
Row = tuple[Any, ...]


def render_json(value: Any) -> str:
    """``value`` as JSON for reading: bytes as hex, floats that JSON lacks as text."""
    return json.dumps(_readable(value), ensure_ascii=False, allow_nan=False)


def event_rows(store: str, seq: int, event: Event) -> dict[str, list[Row]]:
    """Table → rows of one journal event. `Stored` has none: its entries are read from the store.

    Args:
        store: id of the store. seq: the event's number.
    """
    match event:
        case RunStarted(run, at, command, client, client_version, versions, commit, host, policy, how, tags):
            told = render_json(dict(versions))
            return {
                "runs": [(store, seq, run, at, command, client, client_version, told, commit, host, policy, how)],
                "run_tags": [(store, seq, run, tag) for tag in dict.fromkeys(tags)],
            }
        case RunEnded(run, at, status, code):
            return {"run_ends": [(store, seq, run, at, status, code)]}
        case ModelSeen(run, root, name, role):
            return {"model_names": [(store, seq, run, root.hex(), name, role)]}
        case ModelLoaded(run, root, seconds):
            return {"model_loads": [(store, seq, run, root.hex() or None, seconds)]}
        case Overhead(run, at, seconds):
            return {"overheads": [(store, seq, run, at, kind, spent) for kind, spent in seconds.items()]}
        case Measured(run, at, device, count, peak, joules):
            return {"measurements": [(store, seq, run, at, device, count, peak, joules)]}
        case Resumed(run, at, model, depth, layers, rows, seconds, device, why):
            return {"resumptions": [(store, seq, run, at, model.hex(), depth, layers, rows, seconds, device, why or None)]}
        case LookedUp():
            return {"lookups": _lookup_rows(store, seq, event)}
        case TaskSeen(_, client, task, version, settings):
            return {"tasks": [(client, task, version, render_json(dict(settings)))]}
        case DocumentsSeen(_, client, task):
            told = zip(event.documents, event.digests, event.contents, strict=True)
            return {"documents": [(client, task, name, _uuid(digest), content or None) for name, digest, content in told]}
        case Scored():
            return {"scores": _score_rows(store, seq, event)}
    return {}


def request_row(key: Digest, question: Question, read: Callable[[Digest], str | None]) -> Row:
    """One row of ``requests``.

    Args:
        read: digest of settings or an environment → its JSON, None where the store has lost it.
    """
    inputs = dict(question.inputs)
    asked = digest_bytes(encode_trusted([question.kind, question.settings.value, question.tokens, inputs]))
    prompt = digest_bytes(encode_trusted([question.kind, question.tokens, inputs]))
    return (
        key.hex,
        asked.hex,
        prompt.hex,
        question.kind,
        question.model.hex,
        question.settings.hex,
        read(question.settings),
        question.environment.hex,
        read(question.environment),
        np.frombuffer(question.tokens, dtype="<i4"),
        render_json(inputs),
        encode_trusted(inputs) if inputs else None,
    )


def output_row(entry: Entry, recorded: Mapping[str, Any], dtype: str | None) -> Row:
    """One row of ``outputs``."""
    result, cost = entry.result, entry.result.cost
    scalars, recorded = dict(result.scalars), dict(recorded)
    arrays = None
    if result.arrays and sum(len(array.data) for array in result.arrays.values()) <= ARRAYS_LIMIT_BYTES:
        arrays = encode_trusted({name: [a.dtype, list(a.shape), a.data] for name, a in result.arrays.items()})
    logprobs = np.frombuffer(result.logprobs, dtype="<f8")
    exact = [scalars, recorded] if scalars or recorded else []
    if np.isnan(logprobs).any() and np.where(np.isnan(logprobs), np.nan, logprobs).tobytes() != result.logprobs:
        exact = [scalars, recorded, result.logprobs]  # there is more than one not-a-number, and the column tells of one
    return (
        entry.key.hex,
        result.text,
        np.frombuffer(result.tokens, dtype="<i4"),
        logprobs,
        render_json(scalars),
        result.finish_reason,
        cost.prompt_tokens if cost else None,
        cost.completion_tokens if cost else None,
        cost.seconds if cost else None,
        cost.device if cost else None,
        cost.batch_size if cost else None,
        dtype,
        render_json(recorded),
        entry.run,
        entry.created_at,
        encode_trusted(exact) if exact else None,
        arrays,
        digest_answer(result).hex,
    )


def model_rows(manifest: Manifest, data: bytes, seen_at: float) -> dict[str, list[Row]]:
    """Rows of ``models`` and ``modules``. ``data``: the manifest's bytes; ``seen_at``: Unix seconds."""
    about, root = manifest.about, manifest.root.hex
    parent = about.get("parent")
    return {
        "models": [
            (
                root,
                str(about.get("class") or manifest.modules[""].class_name),
                None if about.get("config") is None else render_json(about["config"]),
                parent.hex() if isinstance(parent, bytes) and len(parent) == 16 else None,
                str(about.get("adapter") or ""),
                str(about.get("quantisation") or ""),
                about.get("parameters"),
                manifest.size_bytes,
                len(manifest.modules),
                data,
                seen_at,
            )
        ],
        "modules": [
            (
                root,
                path,
                module.digest.hex,
                module.class_name,
                len(module.tensors),
                sum(tensor.size_bytes for tensor in module.tensors.values()),
                *_own_digests(module),
            )
            for path, module in manifest.modules.items()
        ],
    }


def _own_digests(module: ModuleRecord) -> tuple[str, str]:
    """Of a module without its children, and of its tensors alone."""
    weights = digest_canonical({name: tensor.digest.value for name, tensor in module.tensors.items()})
    parts = {kind: digest.value for kind, digest in module.parts.items()}
    return digest_canonical([module.class_name, parts, weights.value]).hex, weights.hex


def _lookup_rows(store: str, seq: int, event: LookedUp) -> list[Row]:
    none = ("",) * len(event.keys)
    model = event.model.hex() or None
    rows = []
    told = zip(
        event.keys,
        event.outcomes,
        event.reasons,
        event.seconds,
        event.tasks or none,
        event.documents or none,
        event.devices or none,
        event.origins or none,
        strict=True,
    )
    for n, (key, outcome, why, seconds, task, document, device, origin) in enumerate(told):
        reason, _, detail = why.partition(": ")
        asked = (store, seq, n, event.run, event.at, key.hex() or None, model, event.client, event.role, task, document)
        rows.append((*asked, outcome, reason or None, detail or None, seconds, device or None, origin or None))
    return rows


def _score_rows(store: str, seq: int, event: Scored) -> list[Row]:
    rows = []
    told = zip(event.requests, event.documents, event.metrics, event.values, event.clusters, strict=True)
    for n, (request, document, metric, value, cluster) in enumerate(told):
        answered = (store, seq, n, event.run, _uuid(request), event.client, event.task, document, event.role)
        rows.append((*answered, metric, _finite(value), cluster or None))
    return rows


def _uuid(digest: bytes) -> str | None:
    return digest.hex() if len(digest) == SIZE_BYTES else None


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _readable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _readable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
