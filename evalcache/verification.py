"""Verification: every byte of a cache checked, and the store and the ledger against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evalcache.ledger import Ledger
from evalcache.store import Store

_NAMED = 5


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found.

    Args:
        entries: entries in the store. outputs: distinct keys that the ledger knows.
        damaged: one sentence for each row of the store that fails its checks.
        only_in_store, only_in_ledger: keys (hex) that the other of the two lacks.
        waiting: journal rows that the ledger has not been told yet, so that ``only_in_store`` may be right to have some.
    """

    entries: int
    outputs: int
    damaged: tuple[str, ...]
    only_in_store: tuple[str, ...]
    only_in_ledger: tuple[str, ...]
    waiting: int

    @property
    def good(self) -> bool:
        """Whether nothing is wrong: no damage, and both know the same entries."""
        return not (self.damaged or self.only_in_store or self.only_in_ledger)

    @property
    def problems(self) -> list[str]:
        """What is wrong, one sentence each."""
        said = list(self.damaged)
        for keys, where, other in ((self.only_in_store, "store", "ledger"), (self.only_in_ledger, "ledger", "store")):
            if keys:
                more = f" and {len(keys) - _NAMED:,} more" if len(keys) > _NAMED else ""
                said.append(f"only in the {where}, missing in the {other}: {', '.join(keys[:_NAMED])}{more}")
        return said

    def to_json(self) -> dict[str, Any]:
        """Stable field names."""
        return {
            "good": self.good,
            "entries": self.entries,
            "outputs": self.outputs,
            "journal_rows": self.waiting,
            "damaged": list(self.damaged),
            "only_in_store": list(self.only_in_store),
            "only_in_ledger": list(self.only_in_ledger),
        }


def verify_cache(store: Store, ledger: Ledger) -> Verification:
    """Check every row of the store, and compare its entries with the ledger's outputs.

    Args:
        ledger: brought up to date before, else what waits in the journal counts as missing in it.

    Cost: a pass over the whole store and over the ledger's keys.
    """
    damaged = tuple(store.check())
    kept = {key.hex for key, _ in store.frames()}
    known = {str(row[0]).replace("-", "") for row in ledger.query("SELECT DISTINCT key FROM outputs").rows}
    return Verification(
        entries=len(kept),
        outputs=len(known),
        damaged=damaged,
        only_in_store=tuple(sorted(kept - known)),
        only_in_ledger=tuple(sorted(known - kept)),
        waiting=store.stats().journal_rows,
    )
