"""Every exception and warning that evalcache raises, each with the fields a program needs to act on it.

Three rules, kept by the rest of the package:

* what cannot be keyed raises `FingerprintError` or `UncacheableError`, and the wrapped call runs as if we were not there;
* a fault while *reading* the store becomes `Miss("corrupt")` and a `CorruptEntryWarning`, never an exception;
* a fault while *writing* becomes an `EvalCacheWarning`; the answer is still returned.
"""

from __future__ import annotations

from typing import Any


class EvalCacheError(Exception):
    """Base of all errors raised by evalcache.

    Args:
        message: what was wrong and where, in one sentence.
        hint: what to do about it, in one sentence.
        fields: the values concerned (``path``, ``key``, ``expected``, ``found``, …), also set as attributes.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None, **fields: Any) -> None:
        self.message = message
        self.hint = hint
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)
        super().__init__(f"{message} ({hint})" if hint else message)


class CanonicalError(EvalCacheError):
    """A value has no canonical encoding. Fields: ``path`` (where in the value), ``found`` (its type)."""


class UncacheableError(EvalCacheError):
    """This call cannot be keyed exactly. Fields: ``reason`` (one of `records.UNCACHEABLE_REASONS`), ``detail``."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason, reason=reason, detail=detail)
        self.reason = reason
        self.detail = detail


class FingerprintError(UncacheableError):
    """A module holds something that cannot be hashed exactly. Fields: ``module`` (its path), ``reason``, ``problem``."""

    def __init__(self, module: str, detail: str, reason: str = "unhashable") -> None:
        super().__init__(reason, f"module {module}: {detail}" if module else detail)
        self.module = module
        self.problem = detail


class CheckpointError(EvalCacheError):
    """A checkpoint folder or file is not what it claims to be. Fields: ``path``, ``expected``, ``found``."""


class FrameError(EvalCacheError):
    """Stored bytes are not a valid entry. Fields: ``key``, ``expected``, ``found``."""


class NewerFrameError(FrameError):
    """An entry that a newer evalcache wrote: it stays where it is, for that one. Fields: as `FrameError`."""


class NewerEventError(CanonicalError):
    """A journal's event that a newer evalcache wrote: it waits, and all that follows it, for that one. Fields: ``found``."""


class StoreError(EvalCacheError):
    """The store folder cannot be used. Fields: ``path``."""


class StoreGoneError(StoreError):
    """The store's files were deleted or replaced while they were in use. Fields: ``path``."""


class LedgerError(EvalCacheError):
    """The ledger cannot be used, or a query is wrong. Fields: ``path``."""


class LedgerLockedError(LedgerError):
    """Another process holds the ledger; nothing is lost, the journal keeps what is waiting. Fields: ``path``."""

    exit_code = 3


class ReplayMissError(EvalCacheError):
    """Policy ``replay`` met a request that is not in the store. Fields: ``key``, ``reason``."""


class UnknownNameError(EvalCacheError):
    """A run, key or checkpoint was named that does not exist here. Fields: ``found`` (the name given)."""


class AmountError(EvalCacheError):
    """A time, a size, a date or a range of versions cannot be read. Fields: ``found`` (what was given)."""


class AuditError(EvalCacheError):
    """An audit was asked for something that it cannot tell. Fields: ``found`` (what was given)."""


class PriceError(EvalCacheError):
    """A price or a table of prices cannot be read. Fields: ``path`` or ``found``."""


class CommandError(EvalCacheError):
    """The command of ``evalcache run`` cannot be started. Fields: ``path`` (the command), ``exit_code`` (127 or 126)."""


class PlanError(EvalCacheError):
    """No plan can be made of a command: its requests are not known before it runs."""


class ExchangeError(EvalCacheError):
    """A file of entries cannot be written, or is not one. Fields: ``path``."""


class ReportError(EvalCacheError):
    """The page of a report cannot be made: what draws it is not installed."""


class ServerError(EvalCacheError):
    """The page cannot be served at the port. Fields: ``found`` (the port)."""


class BudgetError(EvalCacheError):
    """A budget is none, or its price is not known. Fields: ``found``."""


BUDGET_EXIT_CODE = 4
"""With which a run ends whose budget is spent. What was computed is stored: the same command goes on from there."""


class EvalCacheWarning(UserWarning):
    """Something went wrong that costs time but neither the run nor a right answer."""


class CorruptEntryWarning(EvalCacheWarning):
    """A stored entry failed its checks, was set aside and is recomputed."""
