"""What the page tells, asked of the ledger in one opening of it, so that all of it is of one moment.

The figures are those of `audit.audit`. What is drawn or listed is capped here; each cap is said on the page.
"""

from __future__ import annotations

import collections
import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evalcache.audit import audit
from evalcache.figures import Report
from evalcache.ledger import Ask, Ledger
from evalcache.prices import Prices
from evalcache.structs import Frozen

MOST_FAMILIES = 4
MOST_STEPS = 24  # checkpoints of a family, the latest
MOST_BLOCKS = 120
MOST_MODELS = 6  # the latest, of which pairs are made: all pairs of many checkpoints would be millions of rows
MOST_PAIRS = 3  # of models whose answers are shown side by side
MOST_ANSWERS = 8  # of each pair


class Family(Frozen):
    """Checkpoints of one family, each against the one before it.

    Args:
        class_name: of the models. steps: (digests of both, names of both), in the order in which they were met.
        blocks: names, in the order of their numbers. cells: (step's place, block) → row of ``model_blocks_changed``.
        left_out: steps and blocks that are not shown.
    """

    class_name: str
    steps: Sequence[tuple[str, str, str, str]]
    blocks: Sequence[str]
    cells: dict[tuple[int, str], dict[str, Any]]
    left_out: tuple[int, int]


class Pair(Frozen):
    """Two models that were asked the same. shared: requests that both answered; same: those that they answered alike.

    answers: rows of ``outputs_side_by_side`` that differ, with client, task and document of a lookup of theirs, and content, the
    document's.
    """

    name_a: str
    name_b: str
    model_a: str
    model_b: str
    shared: int
    same: int
    answers: Sequence[dict[str, Any]]


class Gathered(Frozen):
    """All that the page tells. span: when the first of the runs began and the last one did; None where there are none."""

    by_task: Report
    by_model: Report
    by_day: Report
    span: tuple[str, str] | None
    families: Sequence[Family]
    families_left_out: int
    pairs: Sequence[Pair]
    pairs_left_out: int


def gather(ledger: Ledger, *, since: str | None = None, prices: Prices | None = None, grid: float | None = None) -> Gathered:
    """Ask for everything. Args and errors: as `audit.audit`. Cost: a few seconds for a million requests."""
    with ledger.reading() as ask:
        # The audit's groupings ask these several times; a temporary table goes before the view of its name.
        for view in ("audit_requests", "audit_loads", "misses_explained"):
            ask(f"CREATE TEMP TABLE {view} AS SELECT * FROM ledger.{view}")
        opened = _Opened(ledger, ask)
        by_task, by_model, by_day = (
            audit(opened, since=since, by=by, prices=prices, grid=grid) for by in ("task", "model", "day")
        )
        began = "WHERE started_at >= ?" if by_task.since else ""
        ask(
            f"CREATE TEMP TABLE chosen AS SELECT run, started_at FROM run_spans {began}", [by_task.since] if by_task.since else []
        )
        ask(
            "CREATE TEMP TABLE met AS SELECT DISTINCT model FROM audit_requests SEMI JOIN chosen USING (run) UNION "
            "SELECT model FROM model_names SEMI JOIN chosen USING (run)"
        )
        first, last = ask("SELECT min(started_at), max(started_at) FROM chosen").rows[0]
        names = _names(ask)
        families, families_left_out = _families(ask, names)
        pairs, pairs_left_out = _pairs(ask, names)
        return Gathered(
            by_task=by_task,
            by_model=by_model,
            by_day=by_day,
            span=None if first is None else (str(first)[:16], str(last)[:16]),
            families=families,
            families_left_out=families_left_out,
            pairs=pairs,
            pairs_left_out=pairs_left_out,
        )


class _Opened(Ledger):
    """A ledger that is open already: what several audits make in it for themselves is gone after each."""

    def __init__(self, ledger: Ledger, ask: Ask) -> None:
        super().__init__(ledger.path)
        self._ask = ask

    @contextlib.contextmanager
    def reading(self, *, unsafe: bool = False) -> Iterator[Ask]:
        tables = "SELECT table_name FROM duckdb_tables() WHERE temporary"
        before = {name for (name,) in self._ask(tables).rows}
        yield self._ask
        for (name,) in self._ask(tables).rows:
            if name not in before:
                self._ask(f"DROP TABLE temp.{name}")


# --- what changed between checkpoints ------------------------------------------------------------------------------------


def _families(ask: Ask, names: Mapping[str, str]) -> tuple[list[Family], int]:
    table = ask("SELECT * FROM model_blocks_changed WHERE model_b IN (SELECT model FROM met) ORDER BY place")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    found: dict[tuple[str, str], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    of_model: dict[str, tuple[str, str]] = {}  # a model → its family, by the first of it
    for row in rows:
        family = of_model.setdefault(row["model_a"], (row["class"], row["model_a"]))
        of_model[row["model_b"]] = family
        found.setdefault(family, {}).setdefault((row["model_a"], row["model_b"]), []).append(row)
    latest = sorted(found, key=lambda family: -max(row["place"] for step in found[family].values() for row in step))
    shown = [_family(name, found[(name, first)], names) for name, first in latest[:MOST_FAMILIES]]
    return shown, max(0, len(latest) - MOST_FAMILIES)


def _family(class_name: str, steps: dict[tuple[str, str], list[dict[str, Any]]], names: Mapping[str, str]) -> Family:
    shown = list(steps)[-MOST_STEPS:]
    cells = {(place, row["block"]): row for place, step in enumerate(shown) for row in steps[step]}
    telling = {block for (_, block), row in cells.items() if row["bytes"] or row["modules_changed"]}
    blocks = sorted(telling, key=_by_number)
    left_out = len(steps) - len(shown), max(0, len(blocks) - MOST_BLOCKS)
    named = [(*step, names[step[0]], names[step[1]]) for step in shown]
    return Family(class_name, named, blocks[:MOST_BLOCKS], cells, left_out)


def _by_number(block: str) -> tuple[int, list[tuple[int, int | str]]]:
    """Embeddings, then layers (``layers.2`` before ``layers.10``), then the rest."""
    kind = 0 if "embed" in block else 1 if re.search(r"[.]\d", block) else 2
    return kind, [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"[.]", block)]


def _names(ask: Ask) -> dict[str, str]:
    """Models as a person calls them, with the beginning of the digest where that name is not one model's alone."""
    known = {
        digest: ", ".join(filter(None, names or [])) for digest, names in ask("SELECT digest, names FROM models_in_order").rows
    }
    often = collections.Counter(known.values())
    return {
        digest: digest[:12] if not name else name if often[name] == 1 else f"{digest[:8]} {name}"
        for digest, name in known.items()
    }


# --- answers side by side ------------------------------------------------------------------------------------------------


def _pairs(ask: Ask, names: Mapping[str, str]) -> tuple[list[Pair], int]:
    latest = [
        digest
        for (digest,) in ask(
            "SELECT digest FROM models_in_order WHERE digest IN (SELECT model FROM requests) ORDER BY place DESC LIMIT ?",
            [MOST_MODELS],
        ).rows
    ]
    ask(
        "CREATE TEMP TABLE compared AS SELECT model_a, model_b, key_a, key_b, same, text_a IS NOT NULL AND text_b IS NOT NULL "
        "AS texts FROM outputs_side_by_side WHERE model_b IN (SELECT model FROM met) "
        "AND model_a IN (SELECT unnest($1::UUID[])) AND model_b IN (SELECT unnest($1::UUID[]))",
        [latest],
    )
    counted = ask(
        "SELECT c.model_a, c.model_b, count(*), count(*) FILTER (same) FROM compared c "
        "JOIN models_in_order a ON a.digest = model_a JOIN models_in_order b ON b.digest = model_b GROUP BY model_a, model_b "
        "ORDER BY bool_or(texts) DESC, any_value(b.place) DESC, any_value(a.place) DESC"
    ).rows
    shown = counted[:MOST_PAIRS]
    table = ask(
        "SELECT * FROM outputs_side_by_side WHERE (key_a, key_b) IN (SELECT (key_a, key_b) FROM compared WHERE NOT same "
        "AND (model_a::VARCHAR || model_b) IN (SELECT unnest(?::VARCHAR[])) "
        "QUALIFY row_number() OVER (PARTITION BY model_a, model_b ORDER BY texts DESC, key_a, key_b) <= ?) "
        "ORDER BY text_a IS NULL OR text_b IS NULL, key_a, key_b",
        [[f"{uuid.UUID(row[0])}{uuid.UUID(row[1])}" for row in shown], MOST_ANSWERS],
    )
    answers = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    asked = _asked(ask, [row[side] for row in answers for side in ("key_a", "key_b")])
    nothing = {"client": "", "task": "", "document": "", "content": None}
    pairs = []
    for model_a, model_b, shared, same in shown:
        rows = [row for row in answers if (row["model_a"], row["model_b"]) == (model_a, model_b)]
        rows = [row | (asked.get(row["key_b"]) or asked.get(row["key_a"]) or nothing) for row in rows]
        pairs.append(Pair(names[model_a], names[model_b], model_a, model_b, shared, same, rows))
    return pairs, max(0, len(counted) - MOST_PAIRS)


def _asked(ask: Ask, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Key → for which document of which task it was asked, and what that says, where this is known."""
    table = ask(
        "SELECT l.key, any_value(l.client) AS client, any_value(l.task) AS task, any_value(l.document) AS document, "
        "any_value(d.content)::VARCHAR AS content FROM (SELECT key, client, task, document FROM lookups "
        "WHERE key IN (SELECT unnest(?::UUID[])) AND task <> '' "
        "QUALIFY row_number() OVER (PARTITION BY key ORDER BY seq, n) = 1) l "
        "LEFT JOIN documents d ON d.client = l.client AND d.task = l.task AND d.document = l.document GROUP BY l.key",
        [list(keys)],
    )
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}
