"""The audit: what a run reused and what that saved, and, where nothing was reused, why not.

Only measured seconds count. A hit is credited with what its entry cost when it was computed; what evalcache itself took is
subtracted, so ``saved_seconds`` may be negative. Requests that were merged with an equal one of the same run saved something,
too, but not through the store: they are a line of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from evalcache.canonical import decode
from evalcache.digest import Digest
from evalcache.errors import CanonicalError, UnknownNameError
from evalcache.ledger import Ask, Ledger
from evalcache.manifest import Manifest, ManifestDiff
from evalcache.records import unpack_tokens
from evalcache.store import Store

_MODULES = "model.modules"
_MOST_FIELDS = 4  # differing fields that are named in one sentence
_MOST_MODELS = 50  # elder models that are compared with a new one, the latest first


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What one run asked, reused, spent and saved; all its processes together.

    Args:
        status: ``ok``, ``failed``, ``interrupted``, or ``unfinished`` (still going on, or killed).
        saved_seconds: ``credited_seconds - overhead_seconds``. May be negative.
        credited_seconds: what the entries that were hit cost when they were computed.
        unmeasured_hits: hits whose entries have no measured cost; they are credited nothing.
        duplicate_seconds: likewise credited to requests that were merged with an equal one of this run.
        spent_seconds: what misses and uncacheable requests took.
        overhead: seconds that evalcache itself took, by kind.
        model_digest: of the model that was met first; model_digests: of all, in that order.
        hit_rate: hits over hits, misses and uncacheables; None where there were none. hit_rate_by_seconds: the same by cost.
    """

    run: str
    status: str
    command: str | None
    started_at: str | None
    ended_at: str | None
    hits: int
    misses: int
    uncacheable: int
    uncacheable_reasons: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    model_loads: int = 0
    saved_seconds: float = 0.0
    credited_seconds: float = 0.0
    unmeasured_hits: int = 0
    duplicate_seconds: float = 0.0
    spent_seconds: float = 0.0
    overhead_seconds: float = 0.0
    overhead: Mapping[str, float] = field(default_factory=dict)
    model_digest: str | None = None
    model_digests: tuple[str, ...] = ()
    hit_rate: float | None = None
    hit_rate_by_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields by name, for `json.dumps`."""
        return {spec.name: _listed(getattr(self, spec.name)) for spec in dataclasses.fields(self)}


class Difference(NamedTuple):
    """One keyed field in which two entries differ; None where a side does not have it."""

    field: str
    left: Any
    right: Any

    def __str__(self) -> str:
        if self.field == _MODULES:  # one sentence about both sides
            return f"{self.field}: {self.right}"
        return f"{self.field}: {_said(self.left)} → {_said(self.right)}"


def summarise(ledger: Ledger, run: str = "last") -> RunSummary:
    """Sum up one run.

    Args:
        ledger: brought up to date before, else what waits in the journal is missing. run: id, the start of one, or ``last``.

    Raises:
        UnknownNameError: there is no such run, or more than one.
        LedgerLockedError: another program has the ledger open.
    """
    with ledger.reading() as ask:
        run = _find_run(ask, run)
        table = ask("SELECT * FROM hits_by_run WHERE run = ?", [run])
        found = dict(zip(table.columns, table.rows[0], strict=True))
        own = ask(
            "SELECT kind, sum(seconds) FROM (SELECT DISTINCT ON (store, seq, kind) * FROM overheads) WHERE run = ? "
            "GROUP BY kind ORDER BY kind",
            [run],
        )
        reasons = ask("SELECT reason, requests FROM uncacheable_by_reason WHERE run = ? ORDER BY requests DESC, reason", [run])
        models = ask(
            "SELECT model FROM (SELECT model, seq FROM model_names WHERE run = $1 UNION ALL "
            "SELECT model, seq FROM lookups WHERE run = $1 AND model IS NOT NULL) GROUP BY model ORDER BY min(seq), model",
            [run],
        )
    digests = tuple(str(Digest.parse(row[0])) for row in models.rows)
    given = {name: found[name] for name in (spec.name for spec in dataclasses.fields(RunSummary)) if name in found}
    for name in ("started_at", "ended_at"):
        given[name] = None if found[name] is None else f"{found[name].isoformat()}Z"
    return RunSummary(
        **given,
        uncacheable_reasons={reason or "": count for reason, count in reasons.rows},
        overhead=dict(own.rows),
        model_digest=digests[0] if digests else None,
        model_digests=digests,
    )


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
        manifests = [_manifest(store.get_object(f"model/{root.hex}")) for root in (one.model, other.model)]
        if manifests[0] and manifests[1]:
            found.append(Difference(_MODULES, None, str(manifests[0].diff(manifests[1]))))
    for name in ("settings", "environment"):
        digests = (getattr(one, name), getattr(other, name))
        if digests[0] != digests[1]:
            fields = [_fields(store.get_object(f"fields/{digest.hex}")) for digest in digests]
            if fields[0] is None or fields[1] is None:
                found.append(Difference(name, digests[0].hex, digests[1].hex))
            else:
                found.extend(_walk(name, fields[0], fields[1]))
    found.extend(_compare_tokens(unpack_tokens(one.tokens), unpack_tokens(other.tokens)))
    found.extend(_walk("inputs", dict(one.inputs), dict(other.inputs)))
    if not found and left != right:
        found.append(Difference("key version", left.hex, right.hex))
    return found


def explain_misses(ledger: Ledger, run: str = "last") -> list[str]:
    """Why a run hit nothing, in a person's words; an empty list where it hit something or missed nothing.

    Args:
        ledger: brought up to date before. run: id, the start of one, or ``last``.

    Raises:
        As `summarise`.
    """
    with ledger.reading() as ask:
        run = _find_run(ask, run)
        outcomes = dict(
            ask(
                "SELECT CASE outcome WHEN 'miss' THEN reason ELSE outcome END, count(*) FROM lookups "
                "WHERE run = ? AND outcome IN ('hit', 'miss') GROUP BY ALL",
                [run],
            ).rows
        )
        if not outcomes or "hit" in outcomes:
            return []
        said = []
        if "refresh" in outcomes:
            said.append("the policy was refresh, which computes everything again")
        if "corrupt" in outcomes:
            damaged = outcomes["corrupt"]
            said.append(f"{damaged:,} stored {'entry was' if damaged == 1 else 'entries were'} damaged")
        if "absent" not in outcomes:
            return said
        # What was stored before this run began; a second run at the same time is no reason.
        ask(
            "CREATE TEMP TABLE earlier AS SELECT DISTINCT r.* FROM ledger.requests r JOIN ledger.outputs o USING (key) "
            "WHERE o.run <> $1 AND o.created_at < "
            "coalesce((SELECT min(started_at) FROM ledger.runs WHERE run = $1), TIMESTAMP 'infinity')",
            [run],
        )
        if not ask("SELECT count(*) FROM earlier").rows[0][0]:
            return [*said, "nothing was stored before"]
        models = ask(
            "SELECT model, min(seq) FROM ledger.lookups WHERE run = ? AND outcome = 'miss' AND model IS NOT NULL "
            "GROUP BY model ORDER BY 2",
            [run],
        )
        for model, _ in models.rows:
            asked_before = ask("SELECT count(*) FROM earlier WHERE model = ?", [model]).rows[0][0]
            said.extend(_compare_requests(ask, run, model) if asked_before else [_compare_models(ask, run, model)])
        return list(dict.fromkeys(said))


# --- why nothing was hit -------------------------------------------------------------------------------------------------


def _compare_models(ask: Ask, run: str, model: str) -> str:
    """A model that was never asked before: what is different in it from the nearest one that was."""
    this = ask("SELECT manifest, class FROM ledger.models WHERE digest = ? LIMIT 1", [model]).rows
    manifest = _manifest(this[0][0]) if this else None
    if manifest is None:
        return f"a model that was never asked before ({model[:12]}…)"
    others = ask(
        "SELECT manifest, digest FROM ledger.models WHERE class = ? AND digest <> ? AND digest IN (SELECT model FROM earlier) "
        "ORDER BY first_seen DESC LIMIT ?",
        [this[0][1], model, _MOST_MODELS],
    )
    nearest: tuple[ManifestDiff, str] | None = None
    for data, digest in others.rows:
        other = _manifest(data)
        if other is None:
            continue
        diff = other.diff(manifest)
        if nearest is None or _size(diff) < _size(nearest[0]):
            nearest = diff, digest
    if nearest is None:
        return f"a new model: no {this[0][1]} was asked anything before"
    diff, digest = nearest
    names = "SELECT name, run FROM ledger.model_names WHERE model = ? AND run <> ? ORDER BY seq DESC LIMIT 1"
    seen = ask(names, [digest, run]).rows
    elder = f"{seen[0][0] or digest[:12]} as met in run {seen[0][1][:8]}" if seen else f"model {digest[:12]}…"
    if diff.tensors:
        return f"new weights: {diff} differ from {elder}"
    return f"the weights are those of {elder}, but these differ: {diff}"


def _compare_requests(ask: Ask, run: str, model: str) -> list[str]:
    """A model that was asked before: whether environment, settings or prompts are what is new."""
    ask(
        "CREATE OR REPLACE TEMP TABLE mine AS SELECT DISTINCT r.* FROM ledger.requests r JOIN ledger.lookups l USING (key) "
        "WHERE l.run = ? AND l.outcome = 'miss' AND r.model = ?",
        [run, model],
    )
    total = ask("SELECT count(*) FROM mine").rows[0][0]
    if not total:  # nothing was stored in this run: read_only, or refused
        return ["these requests were never asked of this model with these settings"]
    said = []
    past = "(SELECT * FROM earlier WHERE model = ?)"
    same_prompt = "e.kind = m.kind AND e.prompt_token_ids = m.prompt_token_ids AND e.inputs::VARCHAR = m.inputs::VARCHAR"
    again = ask(f"SELECT count(DISTINCT m.key) FROM mine m JOIN {past} e ON e.request = m.request", [model]).rows[0][0]
    if again:
        changes = _commonest(ask, "environment", "e.request = m.request", model)
        said.append(f"another environment: {changes}{_share(again, total)}")
    # The request is the same apart from its settings.
    other = f"{same_prompt} AND m.request NOT IN (SELECT request FROM {past})"
    reset = ask(f"SELECT count(DISTINCT m.key) FROM mine m JOIN {past} e ON {other}", [model, model]).rows[0][0]
    if reset:
        changes = _commonest(ask, "settings", other, model, model)
        said.append(f"other settings: {changes}{_share(reset, total)}")
        environment = _commonest(ask, "environment", other, model, model)
        if environment and not again:
            said.append(f"another environment: {environment}")
    if again + reset < total:
        said.append(f"new prompts{_share(total - again - reset, total)}")
    return said


def _commonest(ask: Ask, name: str, on: str, *params: str) -> str:
    """The fields in which settings or environments of most pairs differ (``torch 2.12 → 2.13``); empty if they are equal."""
    pairs = ask(
        f"SELECT e.{name}_digest, m.{name}_digest, count(*) FROM mine m JOIN (SELECT * FROM earlier WHERE model = ?) e ON {on} "
        "GROUP BY ALL ORDER BY 3 DESC, 1, 2 LIMIT 1",
        params,
    ).rows
    if not pairs or pairs[0][0] == pairs[0][1]:
        return ""
    fields = []
    for digest in pairs[0][:2]:
        stored = ask("SELECT canonical FROM ledger.fields WHERE digest = ? LIMIT 1", [digest]).rows
        fields.append(_fields(stored[0][0]) if stored else None)
    if fields[0] is None or fields[1] is None:
        return "(not known)"
    found = list(_walk("", fields[0], fields[1]))
    more = f" and {len(found) - _MOST_FIELDS} more" if len(found) > _MOST_FIELDS else ""
    return ", ".join(f"{name} {_said(left)} → {_said(right)}" for name, left, right in found[:_MOST_FIELDS]) + more


def _share(part: int, total: int) -> str:
    return "" if part == total else f" ({part:,} of {total:,} requests)"


def _size(diff: ManifestDiff) -> int:
    return len(diff.tensors) + len(diff.parts)


# --- reading -------------------------------------------------------------------------------------------------------------


def _find_run(ask: Ask, run: str) -> str:
    if run == "last":
        found = ask("SELECT run FROM hits_by_run ORDER BY started_at DESC NULLS LAST, run LIMIT 1").rows
    else:
        found = ask("SELECT run FROM hits_by_run WHERE run = ?", [run]).rows
        found = found or ask("SELECT run FROM hits_by_run WHERE starts_with(run, ?)", [run.replace("-", "").lower()]).rows
    if len(found) == 1 and run:
        return found[0][0]
    if len(found) > 1:
        raise UnknownNameError(f"{len(found)} runs start with {run!r}", hint="give more digits", found=run)
    raise UnknownNameError(f"no run {run!r} in the ledger", hint="`evalcache runs` lists them", found=run)


def _question(store: Store, key: Digest) -> Any:
    question = store.get_question(key)
    if question is None:
        raise UnknownNameError(f"no good entry under {key}", hint="`evalcache verify` says what is damaged", found=str(key))
    return question


def _manifest(data: bytes | None) -> Manifest | None:
    try:
        return None if data is None else Manifest.from_bytes(data)
    except CanonicalError:
        return None


def _fields(data: bytes | None) -> dict[str, Any] | None:
    try:
        fields = None if data is None else decode(data)
    except CanonicalError:
        return None
    return fields if isinstance(fields, dict) else None


def _walk(path: str, left: Any, right: Any) -> Iterator[Difference]:
    """Differing fields, nested maps field by field."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted(left.keys() | right.keys()):
            yield from _walk(f"{path}.{name}" if path else name, left.get(name), right.get(name))
    elif type(left) is not type(right) or left != right:
        yield Difference(path, left, right)


def _compare_tokens(left: np.ndarray, right: np.ndarray) -> Iterator[Difference]:
    shorter = min(len(left), len(right))
    places = np.flatnonzero(left[:shorter] != right[:shorter])
    if len(places):
        place = int(places[0])
        yield Difference(f"tokens[{place}]", int(left[place]), int(right[place]))
    if len(left) != len(right):
        yield Difference("tokens.length", len(left), len(right))


def _said(value: Any) -> str:
    if value is None:
        return "–"
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
