"""The audit: what was reused, what that saved, and what our part of it cost, in figures that add up.

Only measured seconds count. A hit is credited with what its entry cost when it was computed; what evalcache itself took is
subtracted, so what is saved may be negative. Every figure comes from a view of the ledger (`auditviews.py`), which it names, so
that anybody can check it; prices are applied here and never stored.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from evalcache.amounts import parse_date
from evalcache.auditviews import SUMS
from evalcache.digest import Digest
from evalcache.errors import AmountError, AuditError
from evalcache.figures import NO_LOADS, Counted, Report, Row
from evalcache.ledger import Ask, Ledger
from evalcache.misses import explain_causes
from evalcache.names import find_run
from evalcache.prices import Prices, read_prices
from evalcache.schema import quoted
from evalcache.structs import Frozen, field, names_of

MOST_EXPENSIVE = 20


class RunSummary(Frozen):
    """What one run asked, reused, spent and saved; all its processes together.

    Args:
        status: ``ok``, ``failed``, ``interrupted``, or ``unfinished`` (still going on, or killed).
        saved_seconds: ``credited_seconds - overhead_seconds``. May be negative.
        credited_seconds: what the entries that were hit cost when earlier runs computed them.
        unmeasured_hits: hits whose entries have no measured cost; they are credited nothing.
        duplicate_seconds: likewise credited to requests that were merged with an equal one of this run, or computed by it.
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
    unmeasured_hits: int = 0
    model_loads: int = 0
    saved_seconds: float = 0.0
    credited_seconds: float = 0.0
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
        return {name: _listed(getattr(self, name)) for name in names_of(self)}


def summarise(ledger: Ledger, run: str = "last") -> RunSummary:
    """Sum up one run.

    Args:
        ledger: brought up to date before, else what waits in the journal is missing. run: id, the start of one, or ``last``.

    Raises:
        UnknownNameError: there is no such run, or more than one.
        LedgerLockedError: another program has the ledger open.
    """
    with ledger.reading() as ask:
        run = find_run(ask, run)
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
    given = {name: found[name] for name in names_of(RunSummary) if name in found}
    for name in ("started_at", "ended_at"):
        given[name] = _said_time(found[name])
    return RunSummary(
        **given,
        uncacheable_reasons={reason or "": count for reason, count in reasons.rows},
        overhead=dict(own.rows),
        model_digest=digests[0] if digests else None,
        model_digests=digests,
    )


# --- the report ----------------------------------------------------------------------------------------------------------


class _By(Frozen):
    """How one grouping is asked.

    Args:
        request: SQL over ``audit_requests`` r.
        load, energy: over ``audit_loads`` or ``run_devices`` r and a run's row s; empty where these cannot be told apart by it,
            so that their figures are null.
        about: a query (group, name) for what a person calls a group. tags: whether each run's tags t are needed.
    """

    request: str
    load: str = ""
    energy: str = ""
    about: str = ""
    tags: bool = False

    @property
    def most_first(self) -> bool:
        """Whether the groups have no order of their own."""
        return self.request != "r.run" and "asked_at" not in self.request


_NAMES = "SELECT model, string_agg(DISTINCT name, ', ' ORDER BY name) FROM model_names GROUP BY model"
BY: Mapping[str, _By] = {
    "run": _By("r.run", load="r.run", energy="r.run", about="SELECT run, command FROM run_spans SEMI JOIN chosen USING (run)"),
    "task": _By("CASE WHEN r.task <> '' THEN concat_ws(':', nullif(r.client, ''), r.task) END"),
    "tag": _By("t.tag", load="t.tag", energy="t.tag", tags=True),
    "model": _By("r.model", load="r.model", about=_NAMES),
    "role": _By("nullif(r.role, '')"),
    "client": _By("nullif(r.client, '')"),
    "device": _By("CASE WHEN r.outcome IS NULL THEN r.run_device ELSE r.device END", energy="r.device"),
    "day": _By("strftime(r.asked_at, '%Y-%m-%d')", load="strftime(s.started_at, '%Y-%m-%d')",
               energy="strftime(s.started_at, '%Y-%m-%d')"),
}  # fmt: skip
"""What figures may be grouped by."""


def audit(
    ledger: Ledger,
    run: str | None = None,
    *,
    since: str | None = None,
    by: str | None = None,
    prices: Prices | None = None,
    grid: float | None = None,
) -> Report:
    """The figures of one run, of all runs since a date, or of all.

    Args:
        ledger: brought up to date before. run: id, the start of one, ``last``, or None for all.
        since: ISO date or time (UTC); runs that began before are left out.
        by: one of `BY`; None means by task for one run, by run for several.
        prices: None means the project's table. grid: grams of CO₂e per kWh; None leaves carbon out.

    Cost: two seconds for a million requests.

    Raises:
        UnknownNameError: there is no such run. AuditError: ``since`` is no date, ``by`` is unknown, or ``grid`` no factor.
    """
    by = by or ("run" if run is None else "task")
    if by not in BY:
        raise AuditError(f"unknown grouping {by!r}", hint=f"one of {', '.join(BY)}", found=by)
    if grid is not None and not 0 <= grid < 1e6:
        raise AuditError(f"not a grid factor: {grid}", hint="grams of CO₂e per kWh, 0 or more", found=grid)
    begin = _parse_since(since)
    prices = prices or read_prices()
    with ledger.reading() as ask:
        run = None if run is None else find_run(ask, run)
        where, params = ("WHERE run = ?", [run]) if run else ("WHERE started_at >= ?", [begin]) if begin else ("", [])
        ask(f"CREATE TEMP TABLE chosen AS SELECT run, started_at, client FROM run_spans {where}", params)
        runs = ask("SELECT count(*) FROM chosen").rows[0][0]
        counted = Counted(prices, grid)
        rows, total = _figures(ask, BY[by], counted, run)
        if len(counted.currencies) > 1:  # amounts that have no sum
            rows, total = [row.without_money() for row in rows], total.without_money()
        return Report(
            by=by,
            run=run,
            since=begin,
            runs=runs,
            rows=rows,
            total=total,
            uncacheable=_uncacheable(ask),
            misses=explain_causes(ask, run),
            expensive=_expensive(ask),
            currency=counted.currencies[0] if len(counted.currencies) == 1 else None,
            missing_prices=sorted(counted.missing_prices),
            missing_watts=sorted(counted.missing_watts),
            prices=list(counted.used),
            grid=grid,
            components=_components(ask),
        )


def _components(ask: Ask) -> tuple[int, float]:
    found = ask("SELECT sum(row_count)::BIGINT, sum(seconds) FROM components_by_run SEMI JOIN chosen USING (run)").rows[0]
    return found[0] or 0, found[1] or 0.0


def _figures(ask: Ask, by: _By, counted: Counted, run: str | None) -> tuple[list[Row], Row]:
    tags = "LEFT JOIN (SELECT DISTINCT run, tag FROM run_tags) t USING (run)" if by.tags else ""
    devices = "device, device_count, run_device, run_device_count"
    only = "TRUE" if run is None else f"r.run = {quoted(run)}"  # the join alone would have the views read all

    def sums(group: str) -> dict[str | None, list[dict[str, Any]]]:
        table = ask(
            f"SELECT {group} AS grp, {devices}, {SUMS} FROM audit_requests r SEMI JOIN chosen USING (run) "
            f"WHERE {only} GROUP BY ALL ORDER BY ALL"
        )
        found: dict[str | None, list[dict[str, Any]]] = {}
        for row in table.rows:
            found.setdefault(_group(row[0]), []).append(dict(zip(table.columns[1:], row[1:], strict=True)))
        return found

    def parts(sql: str) -> dict[str | None, tuple[Any, ...]]:
        return {_group(row[0]): row[1:] for row in ask(sql).rows}

    def first(group: str, joined: str) -> dict[str | None, tuple[Any, ...]]:
        return parts(
            f"SELECT grp, sum(seconds) FROM (SELECT {group} AS grp, key, max(seconds) AS seconds FROM lookups_once r "
            f"SEMI JOIN chosen USING (run) {joined} "
            f"WHERE {only} AND outcome = 'hit' AND reason IS DISTINCT FROM 'own' GROUP BY ALL) GROUP BY grp"
        )

    def loads(group: str) -> dict[str | None, tuple[Any, ...]]:
        return parts(
            f"SELECT {group} AS grp, sum(loads)::BIGINT, sum(load_seconds), sum(avoided_loads)::BIGINT, "
            f"coalesce(sum(avoided_load_seconds), 0), sum(unmeasured_loads)::BIGINT FROM audit_loads r JOIN chosen s USING (run) "
            f"{tags if 't.' in group else ''} GROUP BY grp"
        )

    def energy(group: str) -> dict[str | None, tuple[Any, ...]]:
        return parts(
            f"SELECT {group} AS grp, sum(energy_joules) FROM run_devices r JOIN chosen s USING (run) "
            f"{tags if 't.' in group else ''} GROUP BY grp"
        )

    found = sums("r.run" if by.tags else by.request)
    every = [subrow for subrows in found.values() for subrow in subrows]
    if by.tags:
        of_run, found = found, {}
        for name, tag in ask(f"SELECT run, t.tag FROM chosen {tags} ORDER BY t.tag, run").rows:
            found.setdefault(tag, []).extend(of_run.get(name, []))
    elif by.request == "r.run":  # the latest first, and those that asked nothing, too
        latest = ask("SELECT run FROM chosen ORDER BY started_at DESC NULLS LAST, run").rows
        found = {name: found.get(name, []) for (name,) in latest}
    once = first(by.request if by is not BY["device"] else "r.device", tags)
    loaded = loads(by.load) if by.load else None
    joules = energy(by.energy) if by.energy else None
    for others in (loaded, joules):  # a group that has asked nothing but loaded something
        for name in others or ():
            found.setdefault(name, [])
    names = {_group(row[0]): row[1] for row in ask(by.about).rows} if by.about else {}
    rows = [
        Row(
            group,
            names.get(group),
            counted.figures(
                subrows,
                (once.get(group) or (0.0,))[0] or 0.0,
                None if loaded is None else loaded.get(group, NO_LOADS),
                None if joules is None else (joules.get(group) or (None,))[0],
            ),
        )
        for group, subrows in found.items()
    ]
    if by.most_first:
        rows.sort(key=lambda row: -(row.figures["spent_seconds"] + row.figures["reused_seconds"]))
    total = counted.figures(
        every,
        (first("''", "").get("") or (0.0,))[0] or 0.0,
        loads("''").get("", NO_LOADS),
        (energy("''").get("") or (None,))[0],
    )
    return rows, Row(None, "total", total)


def _group(value: Any) -> str | None:
    return None if value is None else str(value)


def _uncacheable(ask: Ask) -> list[dict[str, Any]]:
    table = ask(
        "SELECT reason, sum(requests)::BIGINT AS requests, sum(seconds) AS seconds, min(example) AS example "
        "FROM uncacheable_by_reason SEMI JOIN chosen USING (run) GROUP BY reason ORDER BY requests DESC, reason"
    )
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def _expensive(ask: Ask) -> list[dict[str, Any]]:
    table = ask(
        "SELECT run, client, task, document, role, model, outcome, reason, detail, seconds, device, key FROM lookups_once "
        "SEMI JOIN chosen USING (run) WHERE outcome IN ('miss', 'uncacheable') AND seconds IS NOT NULL "
        "ORDER BY seconds DESC, run, store, seq, n LIMIT ?",
        [MOST_EXPENSIVE],
    )
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def _parse_since(since: str | None) -> str | None:
    try:
        return None if since is None else parse_date(since).isoformat(" ")
    except AmountError as error:
        raise AuditError(error.message, hint=error.hint, found=since) from error


def _said_time(value: datetime.datetime | None) -> str | None:
    return None if value is None else f"{value.isoformat()}Z"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
