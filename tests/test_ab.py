"""`evalcache run --ab`: real commands, cached and bare; what is claimed, what the clock says, and the exit code that follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evalcache.ab import LEAST_SHARE, TOLERANCE, Claim, Comparison, read_claim
from evalcache.ledger import Ledger

RUN = [sys.executable, "-m", "evalcache", "run"]

# Asks an engine whose every answer takes as long as a file says, which is no part of the key.
SCRIPT = """
import sys, time
import evalcache

def compute(requests):
    with open("pause") as file:
        pause_s = float(file.read())
    for place, request in enumerate(requests):
        time.sleep(pause_s)
        yield place, request[::-1]

asked = [f"request {place}" for place in range(int(sys.argv[1]))] + ["request 0"] * int(sys.argv[2])
answers = evalcache.run(asked, model=evalcache.named("a clock", version="1"), compute=compute)
print("answered", len(answers), answers[-1], repr(sys.stdin.read()))
print("said on stderr", file=sys.stderr)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "pause").write_text("0.08")
    path = tmp_path / "ask.py"
    path.write_text(SCRIPT)
    return path


def ab(folder: Path, *command: str, options: tuple[str, ...] = (), **more: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EVALCACHE")}
    environment |= {"EVALCACHE_DIR": str(folder / "cache"), **more}
    figures = folder / "ab.json"
    figures.unlink(missing_ok=True)
    done = subprocess.run(
        [*RUN, "--ab", "--json", str(figures), *options, "--", *command],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, input="never read",
    )  # fmt: skip
    return done, json.loads(figures.read_text()) if figures.exists() else {}


def test_a_cold_run_fills_the_store_and_is_followed_by_a_warm_one(script: Path, tmp_path: Path) -> None:
    done, found = ab(tmp_path, sys.executable, "ask.py", "60", "20", options=("--tag", "one", "--tag", "two"))
    assert done.stdout == "answered 80 0 tseuqer ''\n"  # of the first run alone
    assert done.stderr.count("said on stderr") == 1 and "ratio" in done.stderr
    claim = found["claim"]
    assert (claim["hits"], claim["misses"], claim["duplicates"]) == (60, 0, 20)
    # Shared by the length of the answers, of which the repeated one is among the shortest.
    assert claim["credited_seconds"] >= 60 * 0.08 and claim["duplicate_seconds"] >= 20 * 0.06
    assert found["claimed_seconds"] == pytest.approx(
        claim["credited_seconds"] + claim["duplicate_seconds"] + claim["avoided_load_seconds"] - claim["overhead_seconds"]
    )
    assert found["clock_seconds"] == pytest.approx(found["bare_seconds"] - found["cached_seconds"])
    # What a clock says on a busy machine is nobody's promise; the verdict follows from it.
    assert found["not_compared"] is None and found["ratio"] == pytest.approx(found["claimed_seconds"] / found["clock_seconds"])
    assert found["inside"] is (abs(found["ratio"] - 1) <= TOLERANCE) and done.returncode == int(not found["inside"])
    assert ("inside 15%" if found["inside"] else "OUTSIDE 15%") in done.stderr
    for name in ("cached", "bare"):
        assert (Path(found["outputs"]) / f"{name}.out").read_text() == done.stdout
        assert "said on stderr" in (Path(found["outputs"]) / f"{name}.err").read_text()
    ledger = Ledger(tmp_path / "cache" / "ledger.duckdb")
    assert ledger.query("SELECT run, hits, misses FROM audit_by_run ORDER BY started_at").rows == [
        (found["filled_by_run"], 0, 60),
        (found["run"], 60, 0),
    ]
    tags = ledger.query("SELECT DISTINCT run, tag FROM run_tags ORDER BY run, tag").rows
    assert {tag for _, tag in tags} == {"one", "two"} and len(tags) == 4


@pytest.mark.campaign  # needs a machine with nothing else to do
def test_a_claim_that_the_clock_does_not_bear_out_is_a_finding(script: Path, tmp_path: Path) -> None:
    ask = (sys.executable, "ask.py", "60", "0")
    assert ab(tmp_path, *ask)[0].returncode == 0
    (tmp_path / "pause").write_text("0.03")  # what was computed in 4.8 s takes 1.8 s now
    done, found = ab(tmp_path, *ask)
    assert done.returncode == 1 and "OUTSIDE 15%" in done.stderr
    assert found["filled_by_run"] is None and found["inside"] is False and found["ratio"] > 1.3
    assert found["claimed_seconds"] > 4 > found["clock_seconds"]
    for seconds in ("claimed_seconds", "clock_seconds"):
        assert f"{found[seconds]:.2f} s" in done.stderr


def test_the_exit_code_of_a_failing_command_comes_first(script: Path, tmp_path: Path) -> None:
    done, found = ab(tmp_path, sys.executable, "-c", "print('once'); raise SystemExit(7)")
    assert (done.returncode, done.stdout, found) == (7, "once\n", {})
    only_bare = "import os, sys; sys.exit(5 if os.environ.get('EVALCACHE') == 'off' else 0)"
    done, found = ab(tmp_path, sys.executable, "-c", only_bare)
    assert (done.returncode, found) == (5, {}) and "bare run ended with exit code 5" in done.stderr
    killed = "import os; os.kill(os.getpid(), 9)"
    assert ab(tmp_path, sys.executable, "-c", killed)[0].returncode == 137


def test_a_command_without_a_model_has_nothing_to_compare(tmp_path: Path) -> None:
    done, found = ab(tmp_path, sys.executable, "-c", "print(1)")
    assert done.returncode == 0 and done.stdout == "1\n"
    assert found["inside"] is None and "reused nothing" in found["not_compared"] and "nothing to compare" in done.stderr


def test_wrong_usage(tmp_path: Path) -> None:
    assert ab(tmp_path, "no-such-command-at-all")[0].returncode == 127
    done, _ = ab(tmp_path, sys.executable, "-c", "", EVALCACHE="off")
    assert done.returncode == 2 and "which is off" in done.stderr
    for options in (["--json", "x"], ["--tag", "a,b"], ["--tag", " "]):
        done = subprocess.run([*RUN, *options, "--", "true"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "Error" in done.stderr


def compared(*, bare_s: float, cached_s: float, **claim: Any) -> Comparison:
    return Comparison("run", None, bare_s, cached_s, Claim(**({"hits": 1, "processes": 1} | claim)), Path("outputs"))


@pytest.mark.parametrize(
    ("claimed_s", "inside"),
    [(100.0, True), (115.0, True), (115.1, False), (85.0, True), (84.9, False), (0.0, False), (-5.0, False)],
)
def test_inside_is_within_fifteen_percent_of_the_clock(claimed_s: float, inside: bool) -> None:
    found = compared(bare_s=120.0, cached_s=20.0, credited_seconds=claimed_s)
    assert (found.inside, found.exit_code, found.ratio) == (inside, int(not inside), pytest.approx(claimed_s / 100))


def test_a_claim_where_the_clock_saw_a_loss_is_outside() -> None:
    found = compared(bare_s=10.0, cached_s=12.0, credited_seconds=8.0)
    assert (found.inside, found.exit_code, found.ratio) == (False, 1, None)
    assert any("ratio none: OUTSIDE" in line for line in found.lines())


def test_what_cannot_be_judged_says_why() -> None:
    small = LEAST_SHARE * 10 - 0.1
    assert "a clock cannot tell" in compared(bare_s=10.0, cached_s=10.0 - small, credited_seconds=small).why_not
    # One of the two is enough to be judged: a claim of nothing where much was saved, or of much where nothing was.
    assert compared(bare_s=10.0, cached_s=5.0, credited_seconds=small).inside is False
    assert compared(bare_s=10.0, cached_s=10.0, credited_seconds=5.0).inside is False
    several = compared(bare_s=10.0, cached_s=5.0, credited_seconds=10.0, processes=2)
    assert several.inside is None and several.exit_code == 0 and "2 processes" in several.why_not
    assert compared(bare_s=10.0, cached_s=5.0, hits=0).why_not == "the cached run reused nothing"


def test_the_claim_is_the_sum_of_the_audits_lines() -> None:
    claim = Claim(
        credited_seconds=10.0, imported_seconds=5.0, duplicate_seconds=2.0, avoided_load_seconds=1.0, overhead_seconds=0.5
    )
    assert claim.seconds == 17.5


def test_a_run_that_the_ledger_does_not_know_claims_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.duckdb")
    assert read_claim(ledger, "0" * 32) == Claim()
