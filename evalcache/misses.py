"""Why a run missed: what had been stored before, and in what the requests that missed differ from the nearest of it.

The causes are those of the view `misses_explained`; here they get their details and examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from evalcache.canonical import decode
from evalcache.digest import Digest
from evalcache.errors import CanonicalError, UnknownNameError
from evalcache.ledger import Ask, Ledger
from evalcache.manifest import Manifest, ManifestDiff
from evalcache.names import find_run
from evalcache.records import unpack_tokens
from evalcache.schema import quoted
from evalcache.store import Store

_MODULES = "model.modules"
_MOST_FIELDS = 4  # differing fields that are named in one sentence
_MOST_TOKENS = 24  # of a prompt, side by side
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
        run = find_run(ask, run)
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


# --- causes --------------------------------------------------------------------------------------------------------------

CAUSES = {
    "model": "another model: the same prompt was asked of one with other weights, code or config",
    "settings": "other settings: the same prompt was asked of the same model with others",
    "environment": "another environment: the same request was asked of the same model in another one",
    "prompt": "a new prompt: it was never asked before",
    "first": "nothing was stored before",
    "gone": "this very request was stored before and is not in the store any more, or it is another store",
    "refresh": "the policy was refresh, which computes everything again",
    "corrupt": "the stored entry was damaged",
    "batch": "a neighbour in the same batch missed, and the batch is computed as a whole",
    "unstored": "what was computed was not stored, so that nothing is known of the request",
}
"""The causes of `misses_explained`, in a person's words."""

_DETAILED = ("model", "settings", "environment")
_MOST_DETAILS = 3


def explain_causes(ask: Ask, run: str | None = None) -> list[dict[str, Any]]:
    """Causes of the misses of the runs in the temporary table ``chosen``, the most frequent first, with what had changed.

    Each has cause, meaning, requests, seconds, share (of all misses), example (a key), and changed: what was different in the
    runs and models that have most of them. run: the only one of them, which is then found at less cost.
    """
    ask(
        "CREATE TEMP TABLE explained AS SELECT run, client, task, model, key, seconds, cause FROM misses_explained "
        + ("SEMI JOIN chosen USING (run)" if run is None else f"WHERE run = {quoted(run)}")
    )
    table = ask(
        "SELECT cause, count(*) AS requests, coalesce(sum(seconds), 0) AS seconds, count(*) / sum(count(*)) OVER () AS share, "
        "arg_max(key, (coalesce(seconds, 0), key)) AS example FROM explained GROUP BY cause ORDER BY requests DESC, cause"
    )
    found = []
    for row in table.rows:
        told = dict(zip(table.columns, row, strict=True))
        groups = ask(
            "SELECT run, arg_max(key, (coalesce(seconds, 0), key)) FROM explained WHERE cause = ? GROUP BY run, model "
            "ORDER BY count(*) DESC, run, model LIMIT ?",
            [told["cause"], _MOST_DETAILS if told["cause"] in _DETAILED else 0],
        )
        changes = [_change(ask, told["cause"], key, nearest_key(ask, told["cause"], key, run)) for run, key in groups.rows]
        told |= {"meaning": CAUSES.get(told["cause"], ""), "changed": list(dict.fromkeys(filter(None, changes)))}
        found.append(told)
    return found


def explain_run(ledger: Ledger, run: str = "last", against: str | None = None) -> dict[str, Any]:
    """Why a run missed, task by task. JSON.

    Args:
        ledger: brought up to date before. run: id, the start of one, or ``last``.
        against: another run; then what that run asked is what the misses are compared with, and nothing else.

    Returns:
        run, against, misses, and tasks: client, task, requests, misses, and causes: cause, meaning, requests, share (of the
        task's misses), seconds, changed (in what), example: key, nearest, and fields (field, left, right) of both side by side,
        the elder on the left.

    Raises:
        As `find_run`.
    """
    with ledger.reading() as ask:
        run = find_run(ask, run)
        against = None if against is None else find_run(ask, against)
        if against is None:
            ask("CREATE TEMP TABLE explained AS SELECT * FROM misses_explained WHERE run = ?", [run])
        else:
            ask(_AGAINST, [run, against])
        asked = ask("SELECT client, task, count(*) FROM lookups_once WHERE run = ? GROUP BY client, task", [run])
        requests = {(client, task): count for client, task, count in asked.rows}
        table = ask(
            "SELECT client, task, cause, count(*), coalesce(sum(seconds), 0), arg_max(key, (coalesce(seconds, 0), key)), "
            "sum(count(*)) OVER (PARTITION BY client, task) FROM explained GROUP BY client, task, cause "
            "ORDER BY 7 DESC, client, task, 4 DESC, cause"
        )
        tasks: dict[tuple[str, str], dict[str, Any]] = {}
        for client, task, cause, count, seconds, example, misses in table.rows:
            here = tasks.setdefault(
                (client, task),
                {
                    "client": client,
                    "task": task,
                    "requests": requests.get((client, task), 0),
                    "misses": int(misses),
                    "causes": [],
                },
            )
            nearest = nearest_key(ask, cause, example, run, against)
            change = _change(ask, cause, example, nearest)
            here["causes"].append(
                {
                    "cause": cause,
                    "meaning": CAUSES.get(cause, ""),
                    "requests": count,
                    "share": count / misses,
                    "seconds": seconds,
                    "changed": change,
                    "example": {"key": example, "nearest": nearest, "fields": _side_by_side(ask, nearest, example)},
                }
            )
        return {
            "run": run,
            "against": against,
            "misses": sum(task["misses"] for task in tasks.values()),
            "tasks": list(tasks.values()),
            "views": ["misses_explained", "miss_reasons", "model_modules_changed"],
        }


# The causes as in `misses_explained`, where what another run asked takes the place of all that was stored before.
_AGAINST = """
CREATE TEMP TABLE explained AS
WITH asked AS (
    SELECT key, any_value(prompt) AS prompt, any_value(request) AS request, any_value(model) AS model FROM requests GROUP BY key
), theirs AS (
    SELECT * FROM asked SEMI JOIN (SELECT DISTINCT key FROM lookups WHERE run = $2) USING (key)
)
SELECT m.run, m.client, m.task, m.model, m.key, m.seconds,
    CASE WHEN m.reason <> 'absent' THEN m.reason WHEN a.key IS NULL THEN 'unstored'
        WHEN m.key IN (SELECT key FROM theirs) THEN 'gone'
        WHEN EXISTS (SELECT 1 FROM theirs t WHERE t.request = a.request AND t.model = a.model) THEN 'environment'
        WHEN EXISTS (SELECT 1 FROM theirs t WHERE t.prompt = a.prompt AND t.model = a.model) THEN 'settings'
        WHEN EXISTS (SELECT 1 FROM theirs t WHERE t.prompt = a.prompt) THEN 'model'
        WHEN EXISTS (SELECT 1 FROM theirs) THEN 'prompt' ELSE 'first' END AS cause
FROM lookups_once m LEFT JOIN asked a USING (key) WHERE m.run = $1 AND m.outcome = 'miss'
"""


def nearest_key(ask: Ask, cause: str, key: str | None, run: str, against: str | None = None) -> str | None:
    """The stored request that comes nearest to one that missed for this cause: the one that differs least, the latest of these.

    Args:
        against: a run; only what it asked is looked at. None: all that was stored before ``run`` began.
    """
    if cause not in _DETAILED or key is None:
        return None
    if against is None:
        among = ("o.created_at < coalesce((SELECT min(started_at) FROM runs WHERE run = $2), TIMESTAMP 'infinity')", run)
    else:
        among = ("r.key IN (SELECT key FROM lookups WHERE run = $2)", against)
    found = ask(
        "WITH mine AS (SELECT * FROM requests WHERE key = $1 LIMIT 1) "
        "SELECT r.key FROM requests r JOIN outputs o USING (key), mine WHERE r.prompt = mine.prompt AND r.key <> mine.key "
        f"AND {among[0]} ORDER BY r.model = mine.model DESC, r.request = mine.request DESC, "
        "r.environment_digest = mine.environment_digest DESC, o.created_at DESC, r.key LIMIT 1",
        [key, among[1]],
    ).rows
    return found[0][0] if found else None


def _change(ask: Ask, cause: str, key: str | None, nearest: str | None) -> str:
    """In what a request differs from the nearest one, in one sentence; empty where nothing is known."""
    if key is None or nearest is None:
        return ""
    columns = "model, settings_digest, environment_digest"
    one, other = (ask(f"SELECT {columns} FROM requests WHERE key = ? LIMIT 1", [each]).rows[0] for each in (nearest, key))
    said = []
    if one[0] != other[0]:
        manifests = [_manifest_of(ask, root) for root in (one[0], other[0])]
        names = [_name_of(ask, root) for root in (one[0], other[0])]
        if manifests[0] and manifests[1]:
            diff = manifests[0].diff(manifests[1])
            said.append(f"{'weights' if diff.tensors else 'code or config'} of {names[1]} against {names[0]}: {diff}")
        else:
            said.append(f"{names[1]} instead of {names[0]}")
    for name, left, right in (("settings", one[1], other[1]), ("environment", one[2], other[2])):
        if left != right:
            said.append(f"{name}: {_differences(ask, left, right)}")
    return "; ".join(said)


def _side_by_side(ask: Ask, left: str | None, right: str | None) -> list[dict[str, Any]]:
    """The keyed fields of two requests, nested ones by their path; null where a side does not have them."""
    sides = [{} if key is None else _keyed_fields(ask, key) for key in (left, right)]
    return [
        {"field": name, "left": sides[0].get(name), "right": sides[1].get(name)} for name in dict.fromkeys([*sides[0], *sides[1]])
    ]


def _keyed_fields(ask: Ask, key: str) -> dict[str, Any]:
    found = ask(
        "SELECT kind, model, settings_digest, environment_digest, prompt_token_ids, inputs FROM requests WHERE key = ? LIMIT 1",
        [key],
    ).rows
    if not found:
        return {}
    kind, model, settings, environment, prompt, inputs = found[0]
    fields: dict[str, Any] = {"kind": kind, "model": model, "model.names": _name_of(ask, model)}
    for name, digest in (("settings", settings), ("environment", environment)):
        held = _fields_of(ask, digest)
        fields |= {name: digest} if held is None else dict(_flat(name, held))
    fields["tokens.length"] = len(prompt)
    fields["tokens"] = " ".join(map(str, prompt[:_MOST_TOKENS])) + (" …" if len(prompt) > _MOST_TOKENS else "")
    fields["inputs"] = inputs
    return fields


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name in sorted(value):
            yield from _flat(f"{path}.{name}", value[name])
    else:
        yield path, value


def _manifest_of(ask: Ask, root: str) -> Manifest | None:
    found = ask("SELECT manifest FROM models WHERE digest = ? AND manifest IS NOT NULL LIMIT 1", [root]).rows
    return _manifest(bytes(found[0][0])) if found else None


def _name_of(ask: Ask, root: str) -> str:
    """A model's latest name, with the beginning of its digest."""
    found = ask("SELECT name FROM model_names WHERE model = ? AND name <> '' ORDER BY seq DESC LIMIT 1", [root]).rows
    return f"{found[0][0]} ({root[:8]})" if found else root[:12]


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
    return _differences(ask, *pairs[0][:2])


def _fields_of(ask: Ask, digest: str) -> dict[str, Any] | None:
    """Settings or an environment by digest."""
    stored = ask("SELECT canonical FROM fields WHERE digest = ? LIMIT 1", [digest]).rows
    return _fields(stored[0][0]) if stored else None


def _differences(ask: Ask, left: str, right: str) -> str:
    """The fields in which two settings or environments differ: ``torch 2.12 → 2.13``."""
    fields = [_fields_of(ask, digest) for digest in (left, right)]
    if fields[0] is None or fields[1] is None:
        return "(not known)"
    found = list(_walk("", fields[0], fields[1]))
    more = f" and {len(found) - _MOST_FIELDS} more" if len(found) > _MOST_FIELDS else ""
    return ", ".join(f"{name} {_said(one)} → {_said(other)}" for name, one, other in found[:_MOST_FIELDS]) + more


def _share(part: int, total: int) -> str:
    return "" if part == total else f" ({part:,} of {total:,} requests)"


def _size(diff: ManifestDiff) -> int:
    return len(diff.tensors) + len(diff.parts)


# --- reading -------------------------------------------------------------------------------------------------------------


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
