"""An audit of a large ledger: 10,000 runs with a million lookups, 200,000 stored requests, 50 models.

The rows are made in SQL. Timed is `evalcache.audit.audit` as `evalcache audit` calls it, each on a fresh opening of the file, the
ledger's pages in the system's cache; the median of five.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from harness import Report, arguments, hardware, hardware_line

from evalcache.audit import audit
from evalcache.ledger import Ledger
from evalcache.misses import explain_run

TARGET_S = 2.0
_AT = "make_timestamp(1700000000000000 + {0} * 600000000 + {1} * 1000000)"  # run {0} begins every ten minutes

ROWS = {
    "runs": (
        "SELECT 's', r * 20, md5(r::VARCHAR), {begin}, 'python eval.py', 'lm_eval', '0.4', '{{}}', NULL, 'host', 'use', "
        "'portable' FROM range({runs}) t(r)"
    ),
    "run_ends": "SELECT 's', r * 20 + 19, md5(r::VARCHAR), {end}, 'ok', 0 FROM range({runs}) t(r)",
    "run_tags": "SELECT 's', r * 20, md5(r::VARCHAR), 'tag' || r % 5 FROM range({runs}) t(r)",
    "overheads": (
        "SELECT 's', r * 20 + 18, md5(r::VARCHAR), {end}, kind, 0.125 FROM range({runs}) t(r), "
        "(VALUES ('fingerprint'), ('checks'), ('keys'), ('lookup'), ('write'), ('sync')) k(kind)"
    ),
    "measurements": "SELECT 's', r * 20 + 17, md5(r::VARCHAR), {end}, 'NVIDIA H200', 1, 1000, 5.0 FROM range({runs}) t(r)",
    "models": (
        "SELECT md5('m' || m)::UUID, 'Llama', NULL, NULL, '', '', 1000, 1000, 3, NULL, make_timestamp(1700000000000000 + m) "
        "FROM range(50) t(m)"
    ),
    "model_names": (
        "SELECT 's', r * 20 + 1, md5(r::VARCHAR), md5('m' || r % 50)::UUID, 'model' || r % 50, '' FROM range({runs}) t(r)"
    ),
    "model_loads": "SELECT 's', r * 20 + 2, md5(r::VARCHAR), md5('m' || r % 50)::UUID, 3.5 FROM range({runs} // 2) t(r)",
    # 60 % hits, 35 % misses, duplicates and uncacheables; of each run, a hundred requests in ten tasks.
    "lookups": (
        "SELECT 's', r * 20 + 3, n, md5(r::VARCHAR), {asked}, md5('k' || (r * 7919 + n) % {keys})::UUID, "
        "md5('m' || r % 50)::UUID, 'lm_eval', '', 'task' || n % 10, n::VARCHAR, "
        "CASE WHEN o < 600 THEN 'hit' WHEN o < 950 THEN 'miss' WHEN o < 970 THEN 'duplicate' ELSE 'uncacheable' END, "
        "CASE WHEN o < 600 THEN NULL WHEN o < 950 THEN 'absent' WHEN o < 970 THEN NULL ELSE 'streamer' END, NULL, 0.25, "
        "'NVIDIA H200', CASE WHEN o < 600 THEN md5((r // 2)::VARCHAR) END "
        "FROM (SELECT r, n, hash(r * 1000003 + n) % 1000 AS o FROM range({runs}) a(r), range(100) b(n))"
    ),
    "requests": (
        "SELECT md5('k' || k)::UUID, md5('r' || k // 4)::UUID, md5('p' || k // 8)::UUID, 'generate', md5('m' || k % 4)::UUID, "
        "md5('s' || k % 2)::UUID, '{{}}', md5('e')::UUID, '{{}}', [k // 4 + j FOR j IN range(60)]::INTEGER[], '{{}}', NULL "
        "FROM range({keys}) t(k)"
    ),
    "outputs": (
        "SELECT md5('k' || k)::UUID, 'text', [1, 2], [], '{{}}', 'stop', 60, 2, 0.25, 'NVIDIA H200', 8, 'float32', '{{}}', "
        "md5((k % {runs})::VARCHAR), {stored}, NULL, NULL, NULL FROM range({keys}) t(k)"
    ),
}
"""Table → its rows; digests are made from numbers."""


def make_ledger(path: Path, runs: int) -> Ledger:
    """A ledger with a hundred lookups a run."""
    names = {"begin": ("r", 0), "asked": ("r", 60), "end": ("r", 500)}
    places = {name: _AT.format(*place) for name, place in names.items()}
    keys = 20 * runs
    places["stored"] = _AT.format(f"(k % {runs})", 100)
    ledger = Ledger(path)
    with ledger.reading(unsafe=True) as ask:
        for table, sql in ROWS.items():
            ask(f"INSERT INTO ledger.{table} {sql.format(runs=runs, keys=keys, **places)}")
    return ledger


def main() -> None:
    """Make the ledger, time the audits, print and write the figures."""
    given = arguments("exp_ledger", __doc__ or "").parse_args()
    runs = 1000 if given.quick else 10_000
    report = Report("exp_ledger", given.quick, hardware(["duckdb"]))
    print(hardware_line(report.hardware))
    with tempfile.TemporaryDirectory() as folder:
        ledger = make_ledger(Path(folder) / "ledger.duckdb", runs)
        report.add("ledger_mib", ledger.path.stat().st_size / 2**20)
        cases = {f"audit_by_{by}_s": lambda by=by: audit(ledger, by=by) for by in ("run", "task", "model", "tag")}
        cases["audit_of_one_run_s"] = lambda: audit(ledger, "last")
        cases["explain_run_s"] = lambda: explain_run(ledger, "last")
        for name, case in cases.items():
            seconds = []
            for _ in range(5):
                began = time.perf_counter()
                case()
                seconds.append(time.perf_counter() - began)
            report.target(name, statistics.median(seconds), "<=", TARGET_S)
    report.write(given.json)


if __name__ == "__main__":
    main()
