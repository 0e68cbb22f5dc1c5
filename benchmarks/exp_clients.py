"""Eval clients as people run them, in processes of their own: bare, cold, warm, and warm under the client's own cache.

For each client: wall seconds, evalcache's own share of them, how often weights were loaded, and what happens after one layer of
the model was edited in place: whether the client's own cache goes on to serve the old model's answers.

The client's fixed cost is a bare run of one document a task: imports, tasks, loading. Lookups are compared in one process, over
the same requests: evalcache's keys and reads beside the loop of lm_eval's ``--use_cache``.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Report, arguments, hardware, hardware_line

# The tests' local tasks and tiny models: what is measured is what is tested.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

BIN = Path(sys.executable).parent
LIMIT_ONE = ["--limit", "1"]


@dataclass
class Ran:
    """One process of a client: wall seconds, the scores in its results, and what evalcache says of the run."""

    wall_s: float
    scores: Any
    told: dict[str, Any]


class LmEval:
    """``lm_eval run``, with its ``--use_cache`` as the cache of its own."""

    name = "lm_eval"

    def __init__(self, folder: Path, documents: int) -> None:
        from harness_tasks import make_model, make_tasks

        self.folder = folder
        self.model = make_model(folder / "model", hidden_size=256, intermediate_size=768, num_hidden_layers=6)
        self.tasks = make_tasks(folder / "tasks", documents=documents)

    def command(self, out: Path, own: Path | None) -> list[str]:
        named = f"pretrained={self.model},dtype=float32"
        command = [str(BIN / "lm_eval"), "run", "--model", "hf", "--model_args", named, "--device", "cpu", "--batch_size", "8"]
        command += ["--tasks", "tiny_mc,tiny_letters,tiny_gen", "--include_path", str(self.tasks), "--output_path", str(out)]
        return [*command, "--log_samples", *(["--use_cache", str(own)] if own else [])]

    def scores(self, out: Path) -> Any:
        found = {}
        for file in sorted(out.rglob("samples_*.jsonl")):
            found[file.name.split("_2")[0]] = [json.loads(line)["resps"] for line in file.read_text().splitlines()]
        return found

    def edit(self) -> None:
        """One layer, in place: the same folder, another model."""
        from safetensors.torch import load_file, save_file

        (file,) = self.model.glob("*.safetensors")
        tensors = load_file(file)
        tensors["model.layers.5.mlp.down_proj.weight"].mul_(-1)
        save_file(tensors, file, metadata={"format": "pt"})


CLIENTS = (LmEval,)


def run(client: Any, place: Path, *, store: Path | None = None, own: Path | None = None, more: list[str] | None = None) -> Ran:
    """One process of a client; ``store`` is evalcache's folder, None for bare."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EVALCACHE")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*client.command(place, own), *(more or [])]
    if store is not None:
        environment["EVALCACHE_DIR"] = str(store)
        command = [str(BIN / "evalcache"), "run", "--", *command]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    told: dict[str, Any] = {}
    if store is not None:
        stats = [str(BIN / "evalcache"), "stats", "--run", "last", "--json"]
        told = json.loads(subprocess.run(stats, env=environment, capture_output=True, text=True, check=True).stdout)
    return Ran(wall_s, client.scores(place), told)


def same(left: Any, right: Any) -> bool:
    """Equal but for the last bits of floats."""
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    try:  # as text in the harness's files
        return abs(float(left) - float(right)) <= 1e-4 * max(1.0, abs(float(left)))
    except (TypeError, ValueError):
        return left == right


def measure(report: Report, client: Any, folder: Path, repeats: int) -> None:
    """Bare, cold, warm and the client's own cache, side by side; then all again after an edit."""
    name = client.name
    runs: dict[str, list[Ran]] = {kind: [] for kind in ("fixed", "bare", "cold", "warm", "own")}
    run(client, folder / "first", own=folder / "own-cache")  # fills the client's own cache
    for repeat in range(repeats):
        store = folder / f"store-{repeat}"
        runs["fixed"].append(run(client, folder / f"fixed-{repeat}", more=LIMIT_ONE))
        runs["bare"].append(run(client, folder / f"bare-{repeat}"))
        runs["cold"].append(run(client, folder / f"cold-{repeat}", store=store))
        runs["warm"].append(run(client, folder / f"warm-{repeat}", store=store))
        runs["own"].append(run(client, folder / f"own-{repeat}", own=folder / "own-cache"))
    for kind in ("cold", "warm", "own"):
        if not same(runs[kind][0].scores, runs["bare"][0].scores):
            raise SystemExit(f"{name}: the {kind} run answers otherwise than the bare one")
    if any(one.told["misses"] for one in runs["warm"]):
        raise SystemExit(f"{name}: a warm run missed")
    for kind, found in runs.items():
        report.add(f"{name}_{kind}_s", statistics.median(one.wall_s for one in found))
    share = [warm.told["overhead_seconds"] / fixed.wall_s for warm, fixed in zip(runs["warm"], runs["fixed"], strict=True)]
    report.add(f"{name}_warm_model_loads", max(one.told["model_loads"] for one in runs["warm"]))
    report.target(f"{name}_warm_overhead_share_of_fixed_cost", statistics.median(share), "<=", 0.05)
    client.edit()
    truth = run(client, folder / "edited-bare").scores
    ours = run(client, folder / "edited", store=folder / "store-0").scores
    own = run(client, folder / "edited-own", own=folder / "own-cache").scores
    report.target(f"{name}_wrong_after_an_edit_evalcache", float(not same(ours, truth)), "<=", 0)
    report.add(f"{name}_wrong_after_an_edit_own_cache", float(not same(own, truth)))


def measure_lookups(report: Report, folder: Path, count: int) -> None:
    """µs a request that is stored: ours, and those of lm_eval's ``--use_cache``."""
    import words
    from harness_tasks import make_model
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM
    from lm_eval.models.huggingface import HFLM

    import evalcache

    model = make_model(folder / "lookups")
    draw = random.Random(0)
    known = sorted({word for sentence in words.SENTENCES for word in sentence.split()})
    texts = [" ".join(draw.choices(known, k=24)) for _ in range(count)]
    asked = [Instance("loglikelihood", {}, (text, f" {draw.choice(known)}"), 0, ("task", 0, 1)) for text in texts]
    ratios, ours_us, own_us = [], [], []
    with evalcache.enable(folder / "lookups-store") as session:
        lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=64)
        above = CachingLM(lm, str(folder / "lookups.db"))
        above.loglikelihood(asked)
        assert session.cache is not None
        session.cache.flush()
        overhead = session.cache.counts.overhead
        for _ in range(3):
            before = overhead["keys"] + overhead["lookup"]
            lm.loglikelihood(asked, disable_tqdm=True)
            ours_us.append((overhead["keys"] + overhead["lookup"] - before) / count * 1e6)
            began = time.perf_counter()
            above.loglikelihood(asked)
            own_us.append((time.perf_counter() - began) / count * 1e6)
            ratios.append(own_us[-1] / ours_us[-1])
    report.add("lookup_evalcache_us", statistics.median(ours_us))
    report.add("lookup_lm_eval_use_cache_us", statistics.median(own_us))
    report.target("lookup_use_cache_over_evalcache", statistics.median(ratios), ">=", 20)


def main() -> None:
    """Run the experiment."""
    options = arguments("exp_clients", __doc__.splitlines()[0]).parse_args()
    repeats, documents = (1, 8) if options.quick else (3, 100)
    found = hardware(["torch", "transformers", "lm_eval"])
    print(hardware_line(found))
    report = Report("exp_clients", options.quick, found)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "EVALCACHE_QUIET": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        measure_lookups(report, Path(scratch), 2000 if options.quick else 20000)
        for kind in CLIENTS:
            folder = Path(scratch) / kind.name
            folder.mkdir()
            measure(report, kind(folder, documents), folder, repeats)
    report.write(options.json)


if __name__ == "__main__":
    main()
