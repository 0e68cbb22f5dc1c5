"""Selection: which stored entries are meant, by what a person says of them. Level 5.2.

The entries themselves tell their model, run and time; names, tasks and versions are the ledger's to know.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Set

from evalcache.amounts import parse_date, parse_seconds, parse_versions
from evalcache.digest import Digest
from evalcache.errors import UnknownNameError
from evalcache.frame import Question
from evalcache.ledger import Ask, Ledger
from evalcache.names import find_models, find_run
from evalcache.records import Entry
from evalcache.structs import Frozen


class Selection(Frozen):
    """Entries for which all of this holds; None says nothing.

    Args:
        models: roots. runs: that computed them. keys: as hex. since: created at this or after; before: earlier (Unix seconds).
    """

    models: Set[Digest] | None = None
    runs: Set[str] | None = None
    keys: Set[str] | None = None
    since: float | None = None
    before: float | None = None

    def holds(self, entry: Entry, question: Question) -> bool:
        """Whether an entry is meant."""
        return (
            (self.models is None or question.model in self.models)
            and (self.runs is None or entry.run in self.runs)
            and (self.keys is None or entry.key.hex in self.keys)
            and (self.since is None or entry.created_at >= self.since)
            and (self.before is None or entry.created_at < self.before)
        )


def select(
    ledger: Ledger,
    *,
    model: str | None = None,
    run: str | None = None,
    task: str | None = None,
    since: str | None = None,
    older_than: str | None = None,
    producer: str | None = None,
) -> Selection:
    """What a person says, as a selection.

    Args:
        ledger: brought up to date; opened only for what entries do not know themselves.
        model: name under which runs met it, or digest (or at least four digits of it). run: id, the start of one, or ``last``.
        task: of the eval. since: date or time (UTC). older_than: a length of time (``30d``).
        producer: versions of evalcache (``<0.2``) or of another package (``torch<2.13``) that the computing run told.

    Raises:
        UnknownNameError: there is no such model, run or task. AmountError: a time or version cannot be read.
    """
    begin = None if since is None else parse_date(since).replace(tzinfo=datetime.UTC).timestamp()
    before = None if older_than is None else time.time() - parse_seconds(older_than)
    is_meant = None if producer is None else parse_versions(producer)
    if model is run is task is is_meant is None:
        return Selection(since=begin, before=before)
    with ledger.reading() as ask:
        models = None if model is None else find_models(ask, model)
        runs = None if run is None else {find_run(ask, run)}
        if is_meant is not None:
            package, fits = is_meant
            told = ask("SELECT DISTINCT run, versions::VARCHAR FROM runs WHERE versions IS NOT NULL").rows
            made = {name for name, versions in told if fits(str(json.loads(versions).get(package, "")))}
            runs = made if runs is None else runs & made
        keys = None if task is None else _find_task(ask, task)
    return Selection(models, runs, keys, begin, before)


def _find_task(ask: Ask, task: str) -> set[str]:
    """Keys of all that was asked for a task."""
    keys = {row[0] for row in ask("SELECT DISTINCT key FROM lookups WHERE task = ? AND key IS NOT NULL", [task]).rows}
    if not keys:
        hint = "`evalcache query 'SELECT DISTINCT task FROM lookups'` lists them"
        raise UnknownNameError(f"no task {task!r} in the ledger", hint=hint, found=task)
    return keys
