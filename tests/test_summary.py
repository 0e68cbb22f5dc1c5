"""Every form of the one line."""

from __future__ import annotations

from collections import Counter

import pytest

from evalcache.counts import Counts
from evalcache.digest import Digest
from evalcache.pruning import Amount
from evalcache.summary import calls_seen, format_reasons, format_seconds, format_summary

ONE = Digest(bytes.fromhex("ab12cd34ef56" + 20 * "0"))
OTHER = Digest(bytes.fromhex("99" * 16))


def test_the_whole_line():
    counts = Counts(hits=1512, misses=1, uncacheable=Counter(training=1, streamer=2), duplicates=4, credited_seconds=12.5)
    counts.overhead.update(checks=0.15, lookup=0.05)
    counts.models = {"a": ONE}
    assert format_summary(counts, "/c/ledger.duckdb", why=["never shown beside a hit"]) == (
        "evalcache: 1,512 hits, 1 miss, 3 uncacheable (2 streamer, 1 training), 4 duplicates merged; "
        "saved 12.3 s (measured when first computed; 0.20 s overhead subtracted); "
        "model xxh3_128:ab12cd34ef56…; ledger /c/ledger.duckdb"
    )


def test_nothing_hit_says_why_and_owns_up_to_the_loss():
    counts = Counts(misses=2, models={"a": ONE, "b": OTHER, "a again": ONE}, overhead=Counter(checks=0.5))
    line = format_summary(counts, "l", why=["transformers 5.22 → 5.23", "temperature 0.7 → 0.8"])
    assert "0 hits, 2 misses, 0 uncacheable, 0 duplicates merged; saved -0.50 s" in line
    assert "; no hits: transformers 5.22 → 5.23; temperature 0.7 → 0.8; " in line
    assert "models xxh3_128:ab12cd34ef56…, xxh3_128:999999999999…" in line
    assert "\n" not in line


def test_what_was_evicted_is_said():
    line = format_summary(Counts(hits=1), "l", evicted=Amount(1234, 5_600_000, 40.5))
    assert "; evicted 1,234 entries (5.6 MB, 40.5 s to compute again) to keep to EVALCACHE_MAX_SIZE; ledger l" in line
    assert "evicted" not in format_summary(Counts(hits=1), "l", evicted=Amount())


def test_the_line_of_a_launch_says_whose_it_is():
    assert format_summary(Counts(hits=1), "l", ranks=8).startswith("evalcache (rank 0 of 8; ")


def test_what_counts_as_a_call():
    assert calls_seen(Counts()) == 0
    assert calls_seen(Counts(hits=1, misses=2, duplicates=3, uncacheable=Counter(off=4))) == 10


def test_reasons_are_ordered_by_frequency():
    assert format_reasons({"b": 1, "a": 1, "c": 7}) == "9 uncacheable (7 c, 1 a, 1 b)"
    assert format_reasons({}) == "0 uncacheable"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.00 s"), (9.994, "9.99 s"), (59.96, "60.0 s"), (-150, "-2 min 30 s"), (3599.9, "59 min 59 s"), (36000, "10 h 00 min")],
)
def test_seconds(seconds, said):
    assert format_seconds(seconds) == said
