"""In what two things differ: two stored entries, two sets of fields, two models. Level 5.

Whatever says why something was not served compares here: `evalcache explain`, `explain-run`, `plan`, and the end of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from evalcache.canonical import decode
from evalcache.digest import Digest
from evalcache.errors import CanonicalError, UnknownNameError
from evalcache.ledger import Ask
from evalcache.manifest import Manifest, ManifestDiff
from evalcache.records import unpack_tokens
from evalcache.store import Store

_MODULES = "model.modules"
_MOST_FIELDS = 4  # differing fields that are named in one sentence
_MOST_MODELS = 50  # elder models that are compared with a new one, the latest first


class Difference(NamedTuple):
    """One keyed field in which two entries differ; None where a side does not have it."""

    field: str
    left: Any
    right: Any

    def __str__(self) -> str:
        if self.field == _MODULES:  # one sentence about both sides
            return f"{self.field}: {self.right}"
        return f"{self.field}: {_said(self.left)} → {_said(self.right)}"


def explain_keys(store: Store, left: Digest, right: Digest) -> list[Difference]:
    """In which keyed fields two stored entries differ; an empty list where the keys are equal.

    Raises:
        UnknownNameError: there is no good entry under one of the keys.
    """
    one, other = (_question(store, key) for key in (left, right))
    found = []
    if one.kind != other.kind:
        found.append(Difference("kind", one.kind, other.kind))
    if one.model != other.model:
        found.append(Difference("model", one.model.hex, other.model.hex))
        manifests = [read_manifest(store.get_object(f"model/{root.hex}")) for root in (one.model, other.model)]
        if manifests[0] and manifests[1]:
            found.append(Difference(_MODULES, None, str(manifests[0].diff(manifests[1]))))
    for name in ("settings", "environment"):
        digests = (getattr(one, name), getattr(other, name))
        if digests[0] != digests[1]:
            fields = [read_fields(store.get_object(f"fields/{digest.hex}")) for digest in digests]
            if fields[0] is None or fields[1] is None:
                found.append(Difference(name, digests[0].hex, digests[1].hex))
            else:
                found.extend(compare_fields(name, fields[0], fields[1]))
    found.extend(_compare_tokens(unpack_tokens(one.tokens), unpack_tokens(other.tokens)))
    found.extend(compare_fields("inputs", dict(one.inputs), dict(other.inputs)))
    if not found and left != right:
        found.append(Difference("key version", left.hex, right.hex))
    return found


def compare_fields(path: str, left: Any, right: Any) -> Iterator[Difference]:
    """Differing fields, nested maps field by field, with their paths."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted(left.keys() | right.keys()):
            yield from compare_fields(f"{path}.{name}" if path else name, left.get(name), right.get(name))
    elif type(left) is not type(right) or left != right:
        yield Difference(path, left, right)


def say_differences(found: Sequence[Difference]) -> str:
    """Differing fields in one sentence: ``torch 2.12 → 2.13, dtype bfloat16 → float32 and 2 more``."""
    more = f" and {len(found) - _MOST_FIELDS} more" if len(found) > _MOST_FIELDS else ""
    return ", ".join(f"{name} {_said(one)} → {_said(other)}" for name, one, other in found[:_MOST_FIELDS]) + more


def find_nearest_model(ask: Ask, manifest: Manifest, class_name: str, among: str) -> tuple[ManifestDiff, str] | None:
    """The model of one class that differs least from this one, with in what: (difference, digest); None where there is none.

    Args:
        among: a query for the models that are looked at, the latest of them.
    """
    others = ask(
        f"SELECT manifest, digest FROM ledger.models WHERE class = ? AND digest <> ? AND digest IN ({among}) "
        "ORDER BY first_seen DESC LIMIT ?",
        [class_name, manifest.root.hex, _MOST_MODELS],
    )
    nearest: tuple[ManifestDiff, str] | None = None
    for data, digest in others.rows:
        if (other := read_manifest(data)) is not None:
            diff = other.diff(manifest)
            if nearest is None or _size(diff) < _size(nearest[0]):
                nearest = diff, digest
    return nearest


def read_manifest(data: bytes | None) -> Manifest | None:
    """A manifest from its bytes; None where there are none, or they are damaged."""
    try:
        return None if data is None else Manifest.from_bytes(bytes(data))
    except CanonicalError:
        return None


def read_fields(data: bytes | None) -> dict[str, Any] | None:
    """Settings or an environment from their canonical bytes; None where there are none, or they are damaged."""
    try:
        fields = None if data is None else decode(bytes(data))
    except CanonicalError:
        return None
    return fields if isinstance(fields, dict) else None


# --- parts ---------------------------------------------------------------------------------------------------------------


def _question(store: Store, key: Digest) -> Any:
    question = store.get_question(key)
    if question is None:
        raise UnknownNameError(f"no good entry under {key}", hint="`evalcache verify` says what is damaged", found=str(key))
    return question


def _compare_tokens(left: np.ndarray, right: np.ndarray) -> Iterator[Difference]:
    shorter = min(len(left), len(right))
    places = np.flatnonzero(left[:shorter] != right[:shorter])
    if len(places):
        place = int(places[0])
        yield Difference(f"tokens[{place}]", int(left[place]), int(right[place]))
    if len(left) != len(right):
        yield Difference("tokens.length", len(left), len(right))


def _size(diff: ManifestDiff) -> int:
    return len(diff.tensors) + len(diff.parts)


def _said(value: Any) -> str:
    if value is None:
        return "–"
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
