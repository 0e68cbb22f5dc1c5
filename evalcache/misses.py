"""Why a run missed: what had been stored before, and in what the requests that missed differ from the nearest of it.

The causes are those of the view `misses_explained`; here they get their details and examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from evalcache.differences import compare_fields, find_nearest_model, read_fields, read_manifest, say_differences
from evalcache.key import KEY_VERSION
from evalcache.ledger import Ask, Ledger
from evalcache.manifest import Manifest
from evalcache.names import find_run
from evalcache.schema import quoted

_OTHER_KEYS = f"keys have another form now: KEY_VERSION is {KEY_VERSION}"
_MOST_TOKENS = 24  # of a prompt, side by side


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
    "gone": "this very request was stored before and is not in the store any more (pruned, say), or it is another store",
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
    return "; ".join(said) or _OTHER_KEYS


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
    return read_manifest(found[0][0]) if found else None


def _name_of(ask: Ask, root: str) -> str:
    """A model's latest name, with the beginning of its digest."""
    found = ask("SELECT name FROM model_names WHERE model = ? AND name <> '' ORDER BY seq DESC LIMIT 1", [root]).rows
    return f"{found[0][0]} ({root[:8]})" if found else root[:12]


# --- why nothing was hit -------------------------------------------------------------------------------------------------


def _compare_models(ask: Ask, run: str, model: str) -> str:
    """A model that was never asked before: what is different in it from the nearest one that was."""
    this = ask("SELECT manifest, class FROM ledger.models WHERE digest = ? LIMIT 1", [model]).rows
    manifest = read_manifest(this[0][0]) if this else None
    if manifest is None:
        return f"a model that was never asked before ({model[:12]}…)"
    nearest = find_nearest_model(ask, manifest, this[0][1], "SELECT model FROM earlier")
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
    gone = ask("SELECT count(*) FROM mine SEMI JOIN earlier USING (key)").rows[0][0]
    if gone:
        said.append(f"stored before, and not in the store any more{_share(gone, total)}")
    ask("CREATE OR REPLACE TEMP TABLE mine AS SELECT * FROM mine ANTI JOIN earlier USING (key)")
    again = ask(f"SELECT count(DISTINCT m.key) FROM mine m JOIN {past} e ON e.request = m.request", [model]).rows[0][0]
    if again:
        changes = _commonest(ask, "environment", "e.request = m.request", model)
        what = f"another environment: {changes}" if changes else _OTHER_KEYS
        said.append(f"{what}{_share(again, total)}")
    # The request is the same apart from its settings.
    other = f"{same_prompt} AND m.request NOT IN (SELECT request FROM {past})"
    reset = ask(f"SELECT count(DISTINCT m.key) FROM mine m JOIN {past} e ON {other}", [model, model]).rows[0][0]
    if reset:
        changes = _commonest(ask, "settings", other, model, model)
        said.append(f"other settings: {changes}{_share(reset, total)}")
        environment = _commonest(ask, "environment", other, model, model)
        if environment and not again:
            said.append(f"another environment: {environment}")
    if gone + again + reset < total:
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
    return read_fields(stored[0][0]) if stored else None


def _differences(ask: Ask, left: str, right: str) -> str:
    """The fields in which two settings or environments differ: ``torch 2.12 → 2.13``."""
    fields = [_fields_of(ask, digest) for digest in (left, right)]
    if fields[0] is None or fields[1] is None:
        return "(not known)"
    return say_differences(list(compare_fields("", fields[0], fields[1])))


def _share(part: int, total: int) -> str:
    return "" if part == total else f" ({part:,} of {total:,} requests)"
