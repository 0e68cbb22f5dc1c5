"""The one line that a run ends with: counts → text. Pure, so that every form of it is a line in a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from evalcache.digest import ALGORITHM, Digest

_DIGITS = 12


class Counts(Protocol):
    """What is counted while a run goes on; seconds are measured ones. Kept by `Cache`."""

    hits: int
    misses: int
    uncacheable: Mapping[str, int]
    duplicates: int
    credited_seconds: float
    overhead: Mapping[str, float]
    models: Mapping[str, Digest]
    components: Components


class Components(Protocol):
    """What forwards that began above the first layer spared."""

    resumed: int
    whole: int
    spared_seconds: float
    declined: int
    refused: Mapping[str, int]


def calls_seen(counts: Counts) -> int:
    """How many requests a run has met at all, whatever became of them."""
    return counts.hits + counts.misses + counts.duplicates + sum(counts.uncacheable.values())


class Evicted(Protocol):
    """What left the store, because a size limit was passed."""

    entries: int
    size_bytes: int
    seconds: float


def format_summary(
    counts: Counts, ledger: str, *, why: Sequence[str] = (), ranks: int = 1, evicted: Evicted | None = None
) -> str:
    """The line, without its line end.

    Args:
        counts: what the run met.
        ledger: path of the ledger, as it is shown.
        why: reasons for having hit nothing; shown only where there were misses and no hits.
        ranks: processes of the launch; the line of a launch says that it is one process's.
        evicted: what left the store at the end.
    """
    overhead_s = sum(counts.overhead.values())
    parts = [
        f"{_number(counts.hits, 'hit')}, {_number(counts.misses, 'miss', 'misses')}, {format_reasons(counts.uncacheable)}, "
        f"{_number(counts.duplicates, 'duplicate')} merged",
        f"saved {format_seconds(counts.credited_seconds - overhead_s)} "
        f"(measured when first computed; {format_seconds(overhead_s)} overhead subtracted)",
    ]
    parts += _said_components(counts.components)
    if counts.misses and not counts.hits and why:
        parts.append(f"no hits: {'; '.join(why)}")
    digests = list(dict.fromkeys(counts.models.values()))
    if digests:
        shown = ", ".join(f"{ALGORITHM}:{digest.hex[:_DIGITS]}…" for digest in digests)
        parts.append(f"{'model' if len(digests) == 1 else 'models'} {shown}")
    if evicted is not None and evicted.entries:
        size = f"{evicted.size_bytes / 1e6:,.1f} MB, {format_seconds(evicted.seconds)} to compute again"
        parts.append(f"evicted {_number(evicted.entries, 'entry', 'entries')} ({size}) to keep to EVALCACHE_MAX_SIZE")
    parts.append(f"ledger {ledger}")
    rank = f" (rank 0 of {ranks}; `evalcache stats --run last` adds all up)" if ranks > 1 else ""
    return f"evalcache{rank}: {'; '.join(parts)}"


def _said_components(told: Components) -> list[str]:
    """What was decided about layers that are the same in another model, and why; nothing where that is switched off."""
    if not (told.resumed or told.whole or told.refused):
        return []
    said = f"{format_seconds(told.spared_seconds)} spared in {told.resumed:,} of {told.resumed + told.whole:,} rows that ran"
    if told.declined:
        said += f", {_number(told.declined, 'batch', 'batches')} whole because that is quicker"
    if told.refused:
        said += f", not used: {'; '.join(told.refused)}"
    return [f"layers below the first changed one: {said}"]


def format_reasons(uncacheable: Mapping[str, int]) -> str:
    """``3 uncacheable (2 streamer, 1 training)``, the most frequent reason first."""
    total = sum(uncacheable.values())
    said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(uncacheable.items(), key=lambda item: (-item[1], item[0])))
    return f"{total:,} uncacheable ({said})" if total else "0 uncacheable"


def format_seconds(seconds: float) -> str:
    """Seconds as a person reads them; may be negative. Hours and minutes from two minutes on.

    >>> format_seconds(12.34), format_seconds(-0.004), format_seconds(4000)
    ('12.3 s', '-0.00 s', '1 h 06 min')
    """
    size = abs(seconds)
    sign = "-" if seconds < 0 else ""
    if size < 10:
        return f"{sign}{size:.2f} s"
    if size < 120:
        return f"{sign}{size:.1f} s"
    if size < 3600:
        return f"{sign}{int(size // 60)} min {int(size % 60):02d} s"
    return f"{sign}{int(size // 3600)} h {int(size % 3600 // 60):02d} min"


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
