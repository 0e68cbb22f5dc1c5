"""`evalcache run --ab -- CMD`: the same command with evalcache and without, and what was claimed beside what the clock says.

The cached run comes first: its output is the command's, and it is given as ever. Where it had to compute anything it has filled
the store, and a second cached run follows; the last cached run is the one that is compared. Then comes the bare run, with
``EVALCACHE=off``. The output of all runs but the first goes to files, and all read an empty stdin.

What can be compared is seconds of whole processes. The clock says ``bare − cached``: what the bare run took longer, from start to
end of the process, start-up and imports in both. What is claimed for the same difference is

    credited + merged + loads − overhead

seconds that were measured when the entries were first computed, of requests that were hits (credited; imported ones, too) and of
those that were merged with an equal one or hit what the run itself had computed (merged: the bare run asks for each of them),
seconds that loading a model took when it was last loaded on the same device, of models that stayed asleep (loads), less the
seconds that evalcache itself took in the cached run (overhead). Two things are on the clock and in no claim: importing evalcache,
and what a client does for a request only where it is computed (padding, tokens to text). Both runs pay for what was missed or
could not be cached.

Three runs are not judged: one that reused nothing; one of several processes, whose requests save seconds in each while the clock
sees them once; and one for which claim and clock both say less than `LEAST_SHARE` of the bare run, which is too little to tell
apart from start-up times that vary. Where there is no quiet machine, ask it to do more: the clock is only as good as its noise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evalcache.errors import EvalCacheError
from evalcache.folder import default_folder, local_folder
from evalcache.launch import cannot_run, is_off, launch_environment, warn_unreachable
from evalcache.ledger import Ledger
from evalcache.store import Store
from evalcache.structs import Frozen, asdict, field, names_of
from evalcache.summary import format_seconds

TOLERANCE = 0.15
"""How far the claim may be from what the clock says, as a share of the latter."""
LEAST_SHARE = 0.2
"""Of the bare run's seconds. `TOLERANCE` of less is less than 3 % of a process's time, which is what it varies by anyway."""

_CLAIM = """
SELECT a.*, (SELECT count(DISTINCT (store, seq)) FROM runs WHERE run = $1) AS processes FROM audit_by_run a WHERE run = $1
"""


class Claim(Frozen):
    """What the ledger says that one run has saved, in seconds, by the lines of its view ``audit_by_run``.

    Args:
        duplicate_seconds: of requests that were merged, or that hit what the run itself had computed.
        avoided_load_seconds: of models that were not loaded, at their last load on the same device; unmeasured_loads: how many of
            these were not loaded there before.
        overhead_seconds: that evalcache itself took. processes: how many have told of the run.
    """

    hits: int = 0
    misses: int = 0
    uncacheable: int = 0
    duplicates: int = 0
    unmeasured_hits: int = 0
    avoided_loads: int = 0
    unmeasured_loads: int = 0
    credited_seconds: float = 0.0
    imported_seconds: float = 0.0
    duplicate_seconds: float = 0.0
    avoided_load_seconds: float = 0.0
    overhead_seconds: float = 0.0
    processes: int = 0

    @property
    def seconds(self) -> float:
        """What the bare run should have taken longer."""
        reused_s = self.credited_seconds + self.imported_seconds + self.duplicate_seconds
        return reused_s + self.avoided_load_seconds - self.overhead_seconds


class Comparison(Frozen):
    """One command, cached and bare. Seconds are of whole processes.

    Args:
        run: id of the cached run that is compared. filled: id of the one before it, which filled the store; None if none had to.
        folder: where the output of all but the first run is.
    """

    run: str
    filled: str | None
    bare_seconds: float
    cached_seconds: float
    claim: Claim
    folder: Path
    command: Sequence[str] = field(default=())

    @property
    def clock_seconds(self) -> float:
        """What the clock says was saved."""
        return self.bare_seconds - self.cached_seconds

    @property
    def ratio(self) -> float | None:
        """Claim over clock; None where the clock says that nothing was saved."""
        return self.claim.seconds / self.clock_seconds if self.clock_seconds > 0 else None

    @property
    def why_not(self) -> str:
        """Why the two figures cannot be compared; empty where they can."""
        if not self.claim.hits + self.claim.duplicates:
            return "the cached run reused nothing"
        if self.claim.processes > 1:
            return f"{self.claim.processes} processes shared the run: their seconds add up, and the clock counts them once"
        least_s = LEAST_SHARE * self.bare_seconds
        if abs(self.claim.seconds) < least_s and abs(self.clock_seconds) < least_s:
            return f"both are below {LEAST_SHARE:.0%} of the bare run, of which a clock cannot tell {TOLERANCE:.0%}"
        return ""

    @property
    def inside(self) -> bool | None:
        """Whether the claim is within `TOLERANCE` of what the clock says; None where they cannot be compared."""
        if self.why_not:
            return None
        return abs(self.claim.seconds - self.clock_seconds) <= TOLERANCE * self.clock_seconds

    @property
    def exit_code(self) -> int:
        """0, or 1 where the claim is not what the clock says."""
        return int(self.inside is False)

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "command": list(self.command),
            "run": self.run,
            "filled_by_run": self.filled,
            "bare_seconds": self.bare_seconds,
            "cached_seconds": self.cached_seconds,
            "clock_seconds": self.clock_seconds,
            "claimed_seconds": self.claim.seconds,
            "ratio": self.ratio,
            "tolerance": TOLERANCE,
            "inside": self.inside,
            "not_compared": self.why_not or None,
            "claim": asdict(self.claim),
            "outputs": str(self.folder),
        }

    def lines(self) -> list[str]:
        """The comparison for people."""
        claim = self.claim
        reused_s = claim.credited_seconds + claim.imported_seconds
        found = [
            f"A/B: bare {format_seconds(self.bare_seconds)}, cached {format_seconds(self.cached_seconds)}: "
            f"the clock says {format_seconds(self.clock_seconds)} saved (whole processes)",
            f"A/B: claimed {format_seconds(claim.seconds)} = {format_seconds(reused_s)} credited to {claim.hits:,} hits "
            f"+ {format_seconds(claim.duplicate_seconds)} merged + {format_seconds(claim.avoided_load_seconds)} of "
            f"{claim.avoided_loads} model loads avoided − {format_seconds(claim.overhead_seconds)} overhead (view audit_by_run)",
        ]
        if claim.unmeasured_hits:
            found.append(f"A/B: {claim.unmeasured_hits:,} hits were never measured, and are claimed as nothing")
        if claim.unmeasured_loads:
            found.append(
                f"A/B: {claim.unmeasured_loads} avoided loads were never measured on this device: they are claimed as nothing"
            )
        if self.why_not:
            found.append(f"A/B: nothing to compare: {self.why_not}")
        else:
            ratio = "none" if self.ratio is None else f"{self.ratio:.2f}"
            found.append(f"A/B: ratio {ratio}: {'inside' if self.inside else 'OUTSIDE'} {TOLERANCE:.0%}")
        found.append(f"A/B: output of the runs that were not shown: {self.folder}")
        return found

    def tell(self, json_path: str | os.PathLike[str] | None = None) -> int:
        """Print the comparison on stderr, write its figures where they are wanted, and give the exit code."""
        for line in self.lines():
            _tell(line)
        if json_path is not None:
            Path(json_path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        return self.exit_code


def run_compared(
    command: Sequence[str],
    *,
    directory: str | os.PathLike[str] | None = None,
    policy: str | None = None,
    match: str | None = None,
    tags: Sequence[str] = (),
) -> Comparison | int:
    """Run ``command`` cached (twice, if the first has to fill the store) and bare, and compare.

    Returns:
        What was found; or the exit code of the command where one of its runs failed, after which nothing more is run.

    Raises:
        CommandError: the command cannot be started.
        EvalCacheError: the policy is ``off``.
        LedgerLockedError: another program has the ledger open.
    """
    environment = launch_environment(command, os.environ, directory=directory, policy=policy, match=match, tags=tags)
    if is_off(environment):
        raise EvalCacheError("--ab compares a command with and without evalcache, which is off", hint="leave EVALCACHE=off out")
    place = local_folder(Path(environment.get("EVALCACHE_DIR") or default_folder()))
    warn_unreachable(command)

    def cached(output: Path | None) -> tuple[str, float, int]:
        run = uuid.uuid4().hex
        return run, *_timed(command, environment | {"EVALCACHE_RUN": run}, output)

    def claimed(run: str) -> Claim:
        ledger = Ledger(place / "ledger.duckdb")
        ledger.sync(Store(place / "store"))
        return read_claim(ledger, run)

    run, cached_s, code = cached(None)
    if code:
        return code
    folder = place / "ab" / run
    folder.mkdir(mode=0o700, parents=True)
    claim, filled = claimed(run), None
    if claim.misses:
        _tell(f"A/B: {claim.misses:,} requests were computed and are stored now: a second cached run is the one to compare")
        filled = run
        run, cached_s, code = cached(folder / "cached")
        if code:
            _tell(f"A/B: the second cached run ended with exit code {code}; its output: {folder}")
            return code
        claim = claimed(run)
    _tell("A/B: the bare run")
    bare = launch_environment(command, os.environ, directory=directory, policy="off")
    bare_s, code = _timed(command, bare, folder / "bare")
    if code:
        _tell(f"A/B: the bare run ended with exit code {code}; its output: {folder}")
        return code
    return Comparison(run, filled, bare_s, cached_s, claim, folder, tuple(command))


def read_claim(ledger: Ledger, run: str) -> Claim:
    """What the ledger says that a run has saved; nothing for a run that it does not know."""
    table = ledger.query(_CLAIM, [run])
    known = set(names_of(Claim))
    return Claim(**{name: value for row in table.rows for name, value in zip(table.columns, row, strict=True) if name in known})


def _timed(command: Sequence[str], environment: Mapping[str, str], output: Path | None) -> tuple[float, int]:
    """Seconds of one process from start to end, and its exit code as a shell has it."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL}
    if output is not None:
        streams |= {"stdout": output.with_suffix(".out").open("wb"), "stderr": output.with_suffix(".err").open("wb")}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        began = time.perf_counter()
        code = subprocess.run(command, env=environment, check=False, **streams).returncode
        took_s = time.perf_counter() - began
    except OSError as error:
        raise cannot_run(command, error) from error
    finally:
        for stream in ("stdout", "stderr"):
            if stream in streams:
                streams[stream].close()
    return took_s, code if code >= 0 else 128 - code


def _tell(line: str) -> None:
    print(f"evalcache: {line}", file=sys.stderr, flush=True)
