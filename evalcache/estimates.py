"""What requests that would run should take: from the measured costs of like requests, with their range. Level 5.

Like are, in this order: requests of the same task to the same model, of the same task to models of its class and size, any to the
same model, any to models of its class and size; all of them on one device. Where nothing is like it there is no estimate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from evalcache.ledger import Ask
from evalcache.structs import Frozen, replace

_SIZES = (0.8, 1.25)  # models within these shares of parameters are of one size
_KINDS = {
    "generate_until": (("generate_until", "generate"),),
    "generate_until_call": (("generate_until_call",), ("generate_until", "generate")),
}

# Each computed entry with what it took on one device, and the tasks that have asked for it.
_MEASURED = """
CREATE TEMP TABLE measured AS
SELECT r.kind, r.model, coalesce(t.tasks, []) AS tasks, o.seconds, o.prompt_tokens AS read, o.completion_tokens AS made,
    try_cast(r.settings ->> 'max_new_tokens' AS INTEGER) AS most
FROM (SELECT DISTINCT ON (key, run, created_at) * FROM ledger.outputs WHERE device = ? AND seconds IS NOT NULL) o
JOIN (SELECT DISTINCT ON (key) key, kind, model, settings FROM ledger.requests) r USING (key)
LEFT JOIN (SELECT key, list(DISTINCT task) AS tasks FROM ledger.lookups WHERE task <> '' GROUP BY key) t USING (key)
"""
_PER_TOKEN = """
SELECT count(*), sum(seconds) / sum(read), quantile_cont(seconds / read, 0.1), quantile_cont(seconds / read, 0.9)
FROM measured WHERE read > 0 AND """
# As many new tokens as it made, up to the limit of now. One that ended at a lower limit than that would have gone on.
_PER_REQUEST = """
SELECT count(*), avg(s), quantile_cont(s, 0.1), quantile_cont(s, 0.9) FROM (
    SELECT seconds * CASE WHEN most < $1 AND made >= most THEN $1 ELSE least(made, $1) END / greatest(made, 1) AS s
    FROM measured WHERE made IS NOT NULL AND """
_LOADS = """
SELECT count(*), avg(seconds), min(seconds), max(seconds) FROM loads_once
WHERE list_contains($1, model::VARCHAR) AND list_contains(devices, $2)
"""


class Seconds(Frozen):
    """An estimate with its range: the 10th and the 90th percentile of the like requests, for all of them alike.

    Args:
        like: what it was estimated from. like_count: how many of these.
    """

    seconds: float
    low_seconds: float
    high_seconds: float
    like: str = ""
    like_count: int = 0


class Estimates:
    """Estimates for one model on one device.

    Args:
        ask: of a ledger that is being read.
        root: of the model, or of its files when they were last loaded; empty where it is not known.
        parameters: how many it has; None or 0 where it is not known, and then no other model is like it.
    """

    def __init__(self, ask: Ask, device: str, root: str, class_name: str, parameters: int | None) -> None:
        self._ask = ask
        self._model = "-".join((root[:8], root[8:12], root[12:16], root[16:20], root[20:])) if root else ""
        self._device = device
        self._family: list[str] = []
        ask(_MEASURED, [device])
        if parameters:
            found = ask(
                "SELECT DISTINCT digest::VARCHAR FROM ledger.models WHERE class = ? AND parameters BETWEEN ? AND ?",
                [class_name, int(_SIZES[0] * parameters), int(_SIZES[1] * parameters)],
            )
            self._family = [str(digest) for (digest,) in found.rows]

    def of_group(self, group: Mapping[str, Any]) -> Seconds | None:
        """What would run of a group of requests (`planning.Group`), by the costs of those that are most like it."""
        task, stored = group["task"], group["kind"]
        for kinds in _KINDS.get(stored, ((stored,),)):
            for like, where, params in (
                ("this task, this model", "list_contains(tasks, {}) AND model::VARCHAR = {}", [task, self._model]),
                (
                    "this task, models of this size", "list_contains(tasks, {}) AND list_contains({}, model::VARCHAR)",
                    [task, self._family],
                ),
                ("this model", "model::VARCHAR = {}", [self._model]),
                ("models of this size", "list_contains({}, model::VARCHAR)", [self._family]),
            ):  # fmt: skip
                if (found := self._measured(group, kinds, where, params)) is not None:
                    return replace(found, like=f"{like}{'' if stored in kinds else ', asked one by one'}")
        return None

    def of_loading(self) -> Seconds | None:
        """What loading the model would take: what it took on that device before."""
        for like, models in (("this model", [self._model]), ("models of this size", self._family)):
            ((count, *each),) = self._ask(_LOADS, [models, self._device]).rows
            if count:
                return replace(_ordered(*each, count=count), like=like)
        return None

    def _measured(self, group: Mapping[str, Any], kinds: Sequence[str], where: str, params: list[Any]) -> Seconds | None:
        named = ", ".join(f"'{kind}'" for kind in kinds)
        whole = kinds == ("generate_until_call",)
        if whole or group["kind"] == "loglikelihood":
            sql = f"{_PER_TOKEN} kind IN ({named}) AND {where.format(*(f'${place}' for place in range(1, len(params) + 1)))}"
            ((count, *each),) = self._ask(sql, params).rows
            tokens = sum(group["prompt_tokens"])
            return _ordered(*(one * tokens for one in each), count=count) if count else None
        found = []
        requests = Counter(group["limits"])
        if group["kind"] == "generate_until_call":  # asked one by one
            number = max(group["samples"], 1)
            requests = Counter({max(1, sum(group["limits"]) // number): number})
        for limit, number in requests.items():
            sql = f"{_PER_REQUEST} kind IN ({named}) AND {where.format(*(f'${place}' for place in range(2, len(params) + 2)))})"
            ((count, *each),) = self._ask(sql, [limit, *params]).rows
            if not count:
                return None
            found.append(_ordered(*(one * number for one in each), count=count))
        return add_seconds(found)


def add_seconds(found: Sequence[Seconds]) -> Seconds:
    """Their sum, end by end of their ranges."""
    return Seconds(
        sum(one.seconds for one in found),
        sum(one.low_seconds for one in found),
        sum(one.high_seconds for one in found),
        found[0].like if found else "",
        max((one.like_count for one in found), default=0),
    )


def _ordered(point: float, low: float, high: float, *, count: int) -> Seconds:
    return Seconds(point, min(low, point), max(high, point), like_count=count)
