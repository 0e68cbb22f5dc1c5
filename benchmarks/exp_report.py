"""The report of a large ledger: 10,000 runs with a million lookups, 50 checkpoints of 227 modules, 200,000 answers with texts.

Timed are the making of the page, as `evalcache report --html` makes it, and its opening in chromium without a window, from the
navigation to the end of the load event and to the first contentful paint; the median of five. The target is for the opening.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from exp_ledger import make_ledger
from harness import Report, arguments, hardware, hardware_line

from evalcache.ledger import Ledger
from evalcache.prices import read_prices
from evalcache.report import page

TARGET_S = 2.0

_LAYERS = "SELECT 'model.layers.' || l || '.' || part AS path, l AS layer FROM range(32) a(l), (VALUES {parts}) p(part)"
_PARTS = "('attn.q_proj'), ('attn.k_proj'), ('attn.v_proj'), ('attn.o_proj'), ('mlp.gate'), ('mlp.up'), ('mlp.down')"
_WORDS = "['the', 'answer', 'to', 'this', 'question', 'is', 'forty', 'two', 'because', 'every', 'sum', 'of', 'parts', 'holds']"

MORE = (
    # Of each checkpoint, one layer in four and the head are new; every tenth is trained as a whole.
    "INSERT INTO ledger.modules SELECT md5('m' || m)::UUID, path, md5(made)::UUID, 'Linear', 1, 8388608, md5(made)::UUID, "
    "md5(made)::UUID FROM (SELECT m, path, path || CASE WHEN layer IS NULL OR m % 10 = 0 OR layer % 4 = m % 4 THEN m "
    f"ELSE m - (m - layer) % 4 END AS made FROM range(50) c(m), ({_LAYERS.format(parts=_PARTS)} UNION ALL "
    "SELECT unnest(['model.embed_tokens', 'model.norm', 'lm_head']), NULL))",
    # Four models answer each request; one word in ten of an answer is the model's own.
    f"UPDATE ledger.outputs SET text = list_aggregate([{_WORDS}[1 + (CASE WHEN hash(key, n) % 10 = 0 THEN hash(key, n + 100) "
    "ELSE n * 7 END % 14)::INTEGER] FOR n IN range(60)], 'string_agg', ' ')",
)
"""What the report shows beyond the audit of `exp_ledger`."""


def make_large_ledger(path: Path, runs: int) -> Ledger:
    """The ledger of `exp_ledger` with modules and texts."""
    ledger = make_ledger(path, runs)
    with ledger.reading(unsafe=True) as ask:
        for sql in MORE:
            ask(sql)
    return ledger


def open_in_chromium(made: Path, times: int) -> dict[str, list[float]]:
    """Seconds to the first paint with content and to the end of the load event, of several openings."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from browser import launch_chromium

    found: dict[str, list[float]] = {"paint": [], "load": []}
    with launch_chromium() as browser:
        for _ in range(times):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            shown = context.new_page()
            shown.goto(made.as_uri(), wait_until="load")
            shown.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
            found["load"].append(shown.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000)
            found["paint"].append(shown.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000)
            context.close()
    return found


def main() -> None:
    """Make the ledger and the page, open it, print and write the figures."""
    given = arguments("exp_report", __doc__ or "").parse_args()
    runs = 1000 if given.quick else 10_000
    report = Report("exp_report", given.quick, hardware(["duckdb"]))
    print(hardware_line(report.hardware))
    with tempfile.TemporaryDirectory() as folder:
        ledger = make_large_ledger(Path(folder) / "ledger.duckdb", runs)
        prices = read_prices()
        seconds, text = [], ""
        for _ in range(3):
            began = time.perf_counter()
            text = page(ledger.path, prices=prices)
            seconds.append(time.perf_counter() - began)
        report.add("make_page_s", statistics.median(seconds))
        made = Path(folder) / "report.html"
        made.write_text(text, encoding="utf-8")
        report.add("page_kib", made.stat().st_size / 2**10)
        opened = open_in_chromium(made, 5)
        report.target("first_paint_s", statistics.median(opened["paint"]), "<=", TARGET_S)
        report.target("open_s", statistics.median(opened["load"]), "<=", TARGET_S)
    report.write(given.json)


if __name__ == "__main__":
    main()
