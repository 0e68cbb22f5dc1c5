"""lm-evaluation-harness where it is launched in several processes that share the requests of one evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import make_model, make_tasks

from evalcache.audit import summarise
from evalcache.ledger import Ledger

pytest.importorskip("lm_eval", reason="needs lm_eval (llm-evalcache[lm-eval])")

from harness_client import assert_same

BIN = Path(sys.executable).parent
TASKS = ("tiny_mc", "tiny_gen")


def launched(command: list[Any], folder: Path, store: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``command``, under evalcache where a store is given. Its output goes through files: children may outlive a pipe."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EVALCACHE")}
    environment |= {"TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}
    if store is not None:
        environment["EVALCACHE_DIR"] = str(store)
        command = [BIN / "evalcache", "run", "--", *command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def told(store: Path) -> dict[str, Any]:
    """What evalcache says of the last run."""
    return summarise(Ledger(store / "ledger.duckdb"), "last").to_json()


def test_accelerate_launch(tmp_path: Path, store_folder: Path) -> None:
    model, tasks = make_model(tmp_path / "model"), make_tasks(tmp_path / "tasks")
    asked = ["run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "4"]
    asked += ["--tasks", ",".join(TASKS), "--include_path", str(tasks)]
    launcher = [BIN / "accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--cpu", "-m", "lm_eval"]
    cold = launched([*launcher, *asked], tmp_path, store_folder)
    assert (told(store_folder)["hits"], told(store_folder)["misses"]) == (0, 40)
    warm = launched([*launcher, *asked], tmp_path, store_folder)
    assert [told(store_folder)[name] for name in ("hits", "misses", "model_loads")] == [40, 0, 0]
    bare = launched([sys.executable, "-m", "lm_eval", *asked], tmp_path)
    assert cold.stdout == warm.stdout == bare.stdout and "tiny_mc" in bare.stdout


RANKS = """
import json, sys
from accelerate import Accelerator
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

model, tasks, out = sys.argv[1:]
lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=4)
# As the harness sets itself up where there are several GPUs; on CPUs it does not.
lm.accelerator = Accelerator(cpu=True)
lm._rank, lm._world_size = lm.accelerator.local_process_index, lm.accelerator.num_processes
results = lm_eval.simple_evaluate(
    model=lm, tasks=["tiny_mc", "tiny_gen"], task_manager=TaskManager(include_path=tasks, include_defaults=False),
    device="cpu", bootstrap_iters=0,
)
if lm.rank == 0:
    samples = {task: sorted((one["doc_id"], one["resps"]) for one in found) for task, found in results["samples"].items()}
    with open(out, "w") as file:
        json.dump([results["results"], samples], file)
print("END", lm.rank, lm.world_size, flush=True)
"""


def test_a_rank_that_hits_everything_joins_the_others(tmp_path: Path, store_folder: Path) -> None:
    """The harness gathers at the end what its ranks have found: one that computes nothing must not be missed there."""
    model, tasks = make_model(tmp_path / "model"), make_tasks(tmp_path / "tasks")
    (tmp_path / "ranks.py").write_text(RANKS)
    # Of eight documents a rank of two has every other one: those of the first rank, asked by one process.
    halves = make_tasks(tmp_path / "half")
    for name in TASKS:
        (file,) = halves.glob(f"{name}.jsonl")
        file.write_text("".join(file.read_text().splitlines(keepends=True)[::2]))
    one = [sys.executable, "ranks.py", str(model)]
    launched([*one, str(halves), "half.json"], tmp_path, store_folder)
    assert told(store_folder)["misses"] == 20
    two = [BIN / "torchrun", "--nproc_per_node", "2", *one[1:], str(tasks)]
    done = launched([*two, "cached.json"], tmp_path, store_folder)
    assert "END 0 2" in done.stdout and "END 1 2" in done.stdout
    assert (told(store_folder)["hits"], told(store_folder)["misses"]) == (20, 20)
    launched([*one, str(tasks), "bare.json"], tmp_path)
    assert_same(*(json.loads((tmp_path / name).read_text()) for name in ("cached.json", "bare.json")))
