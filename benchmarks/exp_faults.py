"""Faults that really happen, many times: kill -9, flipped bits and files cut short, and many processes at once.

* **kill**: a process of its own does one thing (put, sync, prune, export, …) over a real store and ledger and is killed, half of
  the times at moments spread over its duration, half of the times at lines of evalcache's code; then everything is looked at, by
  content: what was acknowledged, what is half there or there twice, and whether store and ledger agree after the next sync.
* **damage**: one bit, or the end, of the store's and the ledger's files and of their logs; then everything is read, checked,
  computed again where it is missing, and read once more. A sample is mended by ``verify --fix``.
* **crowd**: eight processes that write, read and sync on one folder, of whom now and then one is killed.

What is done and how it is looked at stands in ``tests/killed.py``, ``flipped.py`` and ``crowd.py``: the suite does the same, less
often.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from harness import Report, arguments, hardware, hardware_line

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # what is measured is what is tested

from crowd import run_crowd
from flipped import GOOD, MENDED, OUTCOMES, TARGETS, Flips
from killed import Campaign
from phases import PHASES, prepare

KILLS, DAMAGES, MENDS, SECONDS = 34, 2200, 40, 60.0
QUICK = 0.04
_HEAD = f"{'fault':<44} {'rounds':>7}  {'lost':>5} {'wrong':>5} {'other':>5}  what came of it"


def main() -> None:
    chosen = arguments("exp_faults", __doc__ or "").parse_args()
    report = Report("exp_faults", chosen.quick, hardware(["diskcache", "duckdb", "filelock"]))
    print(hardware_line(report.hardware))
    share = QUICK if chosen.quick else 1.0
    found: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="exp_faults") as folder:
        scratch = Path(folder)
        print(_HEAD)
        prepared = prepare(scratch / "prepared")
        for phase in PHASES:
            campaign = Campaign(phase, scratch / f"kill {phase}", prepared)
            campaign.run(max(2, int(KILLS * share)))
            kinds = Counter(fault.kind for fault in campaign.faults)
            told = f"{campaign.rounds - campaign.late} in the middle, {campaign.late} after the end"
            note(report, found, f"kill -9 in {phase}", campaign.rounds, kinds["lost"], kinds["wrong"], len(campaign.faults), told)
            tell_first(str(fault) for fault in campaign.faults)
            found["kills"] += campaign.rounds
        for target in TARGETS:
            flips = Flips(target, scratch / f"flip {target}")
            flips.run(int(DAMAGES * share), seed=1)
            note_damages(report, found, f"damage to {target}", flips)
            found["damages"] += flips.outcomes.total()
        for target in MENDED:
            flips = Flips(target, scratch / f"mend {target}")
            flips.run(max(2, int(MENDS * share)), seed=2, mending=True)
            note_damages(report, found, f"verify --fix after damage to {target}", flips)
        crowd = run_crowd(scratch / "crowd", 8, max(5.0, SECONDS * share), kills=max(1, int(12 * share)))
    kinds = Counter(fault.kind for fault in crowd.faults)
    operations = sum(len(crowd.all(what)) for what in ("gets", "puts", "waits"))
    told = f"{crowd.kills} killed, longest get {crowd.all('gets')[-1]:.2f} s, longest sync {crowd.all('waits')[-1]:.1f} s"
    note(report, found, "8 processes at once", operations, kinds["lost"], kinds["wrong"], len(crowd.faults), told)
    tell_first(str(fault) for fault in crowd.faults)
    report.add("kills", found["kills"])
    report.add("damages", found["damages"])
    report.add("minutes", (time.monotonic() - began) / 60)
    report.target("lost", found["lost"], "<=", 0)
    report.target("wrong", found["wrong"], "<=", 0)
    report.target("other faults", found["other"], "<=", 0)
    report.target("longest get beside 8 processes, s", crowd.all("gets")[-1], "<=", 1)
    report.write(chosen.json)


def note_damages(report: Report, found: Counter[str], name: str, flips: Flips) -> None:
    """One line of the table, and the first damages of which came what may not."""
    came = flips.outcomes
    told = ", ".join(f"{came[outcome]} {OUTCOMES[outcome]}" for outcome in OUTCOMES if came[outcome] and outcome in GOOD)
    note(report, found, name, came.total(), came["unnoticed"], came["wrong"], len(flips.bad), told)
    tell_first(f"{damage}: {outcome} {said}" for damage, outcome, said in flips.bad)


def note(report: Report, found: Counter[str], name: str, rounds: int, lost: int, wrong: int, faults: int, told: str) -> None:
    """Print and keep one line of the table."""
    other = faults - lost - wrong
    print(f"{name:<44} {rounds:>7,}  {lost:>5} {wrong:>5} {other:>5}  {told}", flush=True)
    found.update({"lost": lost, "wrong": wrong, "other": other})
    report.figures |= {f"{name}: rounds": rounds, f"{name}: lost": lost, f"{name}: wrong": wrong, f"{name}: other": other}


def tell_first(texts: object, count: int = 3) -> None:
    """The first few of what was found."""
    for text, _ in zip(texts, range(count), strict=False):  # type: ignore[call-overload]
        print(f"    {text}")


if __name__ == "__main__":
    main()
