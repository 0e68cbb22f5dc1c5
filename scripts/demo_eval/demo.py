"""The demo: one evaluation bare, cold, warm, under another name and after fine-tuning a layer; and what evalcache made of it.

Fails when an output of the wrapped evaluation differs from the bare one's, or when an answer came from the wrong place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent.parent / ".demo"
PYTHON = sys.executable
EVALCACHE = str(Path(PYTHON).with_name("evalcache"))  # the environment's own command, whatever the PATH says

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("EVALCACHE")}
ENVIRONMENT["EVALCACHE_DIR"] = str(FOLDER / "store")

console = Console()


@dataclass
class Outcome:
    """One run of the evaluation: what it printed, how long it took, and evalcache's own account of it (none for a bare run)."""

    name: str
    stdout: str
    wall_seconds: float
    stats: dict[str, Any] = field(default_factory=dict)


def call(name: str, command: list[str], *, shown: bool = False) -> str:
    """Runs a command to its good end and returns its stdout; stderr goes to ``.demo/<name>.log``, or to the terminal if shown."""
    log = FOLDER / f"{name}.log"
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(
            command, cwd=FOLDER, env=ENVIRONMENT, text=True, check=False, stdout=subprocess.PIPE, stderr=None if shown else errors
        )
    said = [] if shown else log.read_text(encoding="utf-8").splitlines()
    if done.returncode != 0:
        console.print("\n".join(said[-30:]), markup=False, highlight=False)
        sys.exit(f"demo: {name} ended with exit code {done.returncode}: {' '.join(command)}")
    for line in said:
        if line.startswith("evalcache"):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return done.stdout


def evaluate(name: str, model: str, *, wrapped: bool) -> Outcome:
    """Runs `python eval.py MODEL` in the demo's folder, bare or behind `evalcache run --`."""
    command = [PYTHON, str(HERE / "eval.py"), model]
    console.print(f"[bold]{name}[/]: {'evalcache run -- ' if wrapped else ''}python eval.py {model}")
    started = time.perf_counter()
    stdout = call(name, [EVALCACHE, "run", "--", *command] if wrapped else command)
    wall_seconds = time.perf_counter() - started
    (FOLDER / f"{name}.out").write_text(stdout, encoding="utf-8")
    console.print(f"  {stdout.splitlines()[-2]}", markup=False, highlight=False)
    stats = json.loads(call(f"{name}-stats", [EVALCACHE, "stats", "--run", "last", "--json"])) if wrapped else {}
    return Outcome(name, stdout, wall_seconds, stats)


def prepare() -> None:
    """Trains what is not there yet, and begins with an empty store, so that cold is cold."""
    FOLDER.mkdir(exist_ok=True)
    if not (FOLDER / "questions.json").is_file():
        console.print("training a small model on the documentation of the Python standard library (once, up to two minutes)")
        console.print(call("train", [PYTHON, str(HERE / "train.py"), "."], shown=True).strip(), highlight=False)
    if not (FOLDER / "model-tuned" / "config.json").is_file():
        console.print("fine-tuning its last layer")
        call("finetune", [PYTHON, str(HERE / "finetune.py"), "model", "model-tuned"], shown=True)
    shutil.rmtree(FOLDER / "model-copy", ignore_errors=True)
    shutil.copytree(FOLDER / "model", FOLDER / "model-copy")
    shutil.rmtree(FOLDER / "store", ignore_errors=True)


def table_of(outcomes: list[Outcome]) -> Table:
    """One row a run; seconds saved are evalcache's own net figure, wall seconds are the whole command's, start-up included."""
    table = Table(title="What was reused, and what it saved", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("run", "wall s", "hits", "misses", "uncacheable", "loads", "saved s", "overhead s"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for outcome in outcomes:
        stats = outcome.stats
        counts = [f"{stats[name]}" if stats else "–" for name in ("hits", "misses", "uncacheable", "model_loads")]
        seconds = [f"{stats[name]:.2f}" if stats else "–" for name in ("saved_seconds", "overhead_seconds")]
        table.add_row(outcome.name, f"{outcome.wall_seconds:.1f}", *counts, *seconds)
    return table


def findings(outcomes: dict[str, Outcome]) -> list[str]:
    """What is not as promised, in words; nothing if all is."""
    found = []
    for name, model in {
        "cold": "bare",
        "warm": "bare",
        "copy": "bare",
        "tuned": "bare-tuned",
        "tuned-warm": "bare-tuned",
    }.items():
        if outcomes[name].stdout != outcomes[model].stdout:
            found.append(f"the output of {name} differs from that of {model}: diff .demo/{model}.out .demo/{name}.out")
    asked = int(outcomes["bare"].stdout.split()[-1])
    expected = {"cold": (0, asked), "warm": (asked, 0), "copy": (asked, 0), "tuned": (0, asked), "tuned-warm": (asked, 0)}
    for name, (hits, misses) in expected.items():
        stats = outcomes[name].stats
        if (stats["hits"], stats["misses"]) != (hits, misses):
            found.append(f"{name}: {stats['hits']} hits and {stats['misses']} misses, where {hits} and {misses} were right")
        if stats["uncacheable"]:
            found.append(f"{name}: {stats['uncacheable']} requests were uncacheable")
        if hits and stats["model_loads"]:
            found.append(f"{name}: the model was loaded although every answer was known")
    return found


def main() -> None:
    prepare()
    runs = [
        evaluate("bare", "model", wrapped=False),
        evaluate("cold", "model", wrapped=True),
        evaluate("warm", "model", wrapped=True),
        evaluate("copy", "model-copy", wrapped=True),
        evaluate("bare-tuned", "model-tuned", wrapped=False),
        evaluate("tuned", "model-tuned", wrapped=True),
        evaluate("tuned-warm", "model-tuned", wrapped=True),
    ]
    console.print("\n[bold]evalcache diff model model-tuned[/]")
    # Exit code 1 is its finding that they differ.
    subprocess.run([EVALCACHE, "diff", "model", "model-tuned"], cwd=FOLDER, env=ENVIRONMENT, check=False)
    console.print(table_of(runs))
    found = findings({outcome.name: outcome for outcome in runs})
    for finding in found:
        console.print(f"demo: {finding}", style="bold red", markup=False)
    if found:
        sys.exit(1)
    console.print("Every output was equal to the bare run's, and every answer came from where it should.")
    console.print(f"Ask the ledger: EVALCACHE_DIR={FOLDER / 'store'} {EVALCACHE} runs", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
