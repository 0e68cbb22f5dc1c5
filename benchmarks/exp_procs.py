"""One folder, and 1, 2, 4 or 8 processes that read, write and bring its ledger up to date without a rest.

A get is of 8 keys that some process has acknowledged; a put is of 8 entries with a run's events, in one durable transaction; each
process syncs about once a second. What every get returns is compared with what has to be there. More processes than cores wait
for a core: the longest that a process which only sleeps was kept waiting is told beside.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from harness import Report, arguments, hardware, hardware_line

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # what is measured is what is tested

from crowd import run_crowd

_SHARES = (0.5, 0.95, 0.99)


def main() -> None:
    chosen = arguments("exp_procs", __doc__ or "").parse_args()
    seconds = 4.0 if chosen.quick else 30.0
    report = Report("exp_procs", chosen.quick, hardware(["diskcache", "duckdb"]))
    print(hardware_line(report.hardware))
    print(f"{'':10} {'get, ms':>29} {'put, ms':>29} {'sync, ms':>19}")
    heads = [f"p{share * 100:.0f}" for share in _SHARES]
    print(f"{'processes':10} " + " ".join(f"{head:>9}" for head in [*heads, *heads, "p50", "most"]) + f" {'a second':>10}")
    faults, longest_s = 0, 0.0
    for workers in (1, 2, 4, 8):
        with tempfile.TemporaryDirectory(prefix="exp_procs") as folder:
            crowd = run_crowd(Path(folder) / "cache", workers, seconds)
        faults += len(crowd.faults)
        row = []
        for what in ("gets", "puts"):
            taken = crowd.all(what)
            for share, head in zip(_SHARES, heads, strict=True):
                row.append(taken[min(len(taken) - 1, int(share * len(taken)))] * 1e3)
                report.figures[f"{workers} processes: {what}, {head}, ms"] = row[-1]
            longest_s = max(longest_s, taken[-1] if what == "gets" else 0.0)
        waits = crowd.all("waits")
        row += [waits[len(waits) // 2] * 1e3, waits[-1] * 1e3]
        report.figures |= {f"{workers} processes: sync, p50, ms": row[-2], f"{workers} processes: sync, most, ms": row[-1]}
        rate = 8 * (len(crowd.all("gets")) + len(crowd.all("puts"))) / seconds
        report.figures[f"{workers} processes: entries read and written a second"] = rate
        report.figures[f"{workers} processes: the machine stalled, ms"] = crowd.stalled_s * 1e3
        print(f"{workers:<10} " + " ".join(f"{value:9.2f}" for value in row) + f" {rate:10,.0f}", flush=True)
    report.target("lost, wrong or twice", faults, "<=", 0)
    report.target("the longest get, s", longest_s, "<=", 1)
    report.write(chosen.json)


if __name__ == "__main__":
    main()
