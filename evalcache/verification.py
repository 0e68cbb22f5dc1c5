"""Verification: what a check of a whole cache found, and the store and the ledger against each other."""

from __future__ import annotations

from typing import Any

from evalcache.ledger import Ledger
from evalcache.store import Store
from evalcache.structs import Frozen

_NAMED = 5


class Verification(Frozen):
    """What was found.

    Args:
        entries: entries in the store. outputs: distinct keys that the ledger knows, without those that left the store.
        damaged: one sentence for each row of the store that fails its checks.
        only_in_store, only_in_ledger: keys (hex) that the other of the two lacks.
        waiting: journal rows that the ledger has not been told yet, so that ``only_in_store`` may be right to have some.
        broken: one sentence for each file that cannot be read as a whole; nothing else is known then.
        remedies: what `verify --fix` would do about these files.
    """

    entries: int = 0
    outputs: int = 0
    damaged: tuple[str, ...] = ()
    only_in_store: tuple[str, ...] = ()
    only_in_ledger: tuple[str, ...] = ()
    waiting: int = 0
    broken: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether nothing is wrong: no damage, and both know the same entries."""
        return not (self.broken or self.damaged or self.only_in_store or self.only_in_ledger)

    @property
    def problems(self) -> list[str]:
        """What is wrong, one sentence each."""
        said = [*self.broken, *self.damaged]
        for keys, where, other in ((self.only_in_store, "store", "ledger"), (self.only_in_ledger, "ledger", "store")):
            if keys:
                more = f" and {len(keys) - _NAMED:,} more" if len(keys) > _NAMED else ""
                said.append(f"only in the {where}, missing in the {other}: {', '.join(keys[:_NAMED])}{more}")
        return said

    @property
    def fixes(self) -> list[str]:
        """What `verify --fix` would do about it, one sentence each."""
        said = list(self.remedies)
        if self.damaged:
            said.append("set the damaged rows aside, and restore those of them that the ledger can prove")
        if self.only_in_store:
            said.append("tell the ledger what the store has")
        if self.only_in_ledger:
            said.append("restore from the ledger what it can prove, and note the rest as lost")
        return said

    def to_json(self) -> dict[str, Any]:
        """Stable field names."""
        return {
            "good": self.good,
            "entries": self.entries,
            "outputs": self.outputs,
            "journal_rows": self.waiting,
            "broken": list(self.broken),
            "damaged": list(self.damaged),
            "only_in_store": list(self.only_in_store),
            "only_in_ledger": list(self.only_in_ledger),
            "fixes": self.fixes,
        }


def verify_cache(store: Store, ledger: Ledger) -> Verification:
    """Check every row of the store, and compare its entries with the ledger's outputs.

    Args:
        ledger: brought up to date before, else what waits in the journal counts as missing in it.

    Cost: a pass over the whole store and over the ledger's keys.
    """
    return compare(store, ledger, tuple(store.check()))


def compare(store: Store, ledger: Ledger, damaged: tuple[str, ...] = ()) -> Verification:
    """The store's entries against the ledger's outputs. ``damaged``: what is known to be wrong with the store's rows."""
    kept = {key.hex for key, _ in store.frames()}
    with ledger.reading() as ask:
        known = {row[0] for row in ask("SELECT DISTINCT key FROM outputs WHERE key IS NOT NULL").rows}
        known -= {row[0] for row in ask("SELECT key FROM entries_gone").rows}
    return Verification(
        entries=len(kept),
        outputs=len(known),
        damaged=damaged,
        only_in_store=tuple(sorted(kept - known)),
        only_in_ledger=tuple(sorted(known - kept)),
        waiting=store.stats().journal_rows,
    )
