"""Eval clients as people run them, in processes of their own: bare, cold, warm, and warm under the client's own cache.

For each client: wall seconds, evalcache's own share of them, how often weights were opened, and what happens after one layer of
the model was edited in place: how many of the old model's answers the client's own cache serves as the new one's. A client that
has no cache of its own has no such figures.

The client's fixed cost is a bare run of one document a task: imports, tasks, loading. Lookups are compared in one process, over
the same requests: evalcache's keys and reads beside the loop of lm_eval's ``--use_cache``.

A quick run has two clients at work at the same time, and one bare run of each: it fills the client's own cache, too, and stands
for the fixed cost. Drawn answers that take runs of their own are left to the long run.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clients import CLIENTS
from clients.process import Ask, Client, Ran, differing
from harness import Report, arguments, hardware, hardware_line

LOOKUP = ("keys", "lookup", "decode")  # of our overhead: from token ids to the answers that the harness gets
AT_ONCE = 2  # runs whose seconds do not count


class Measured:
    """All runs of one client, then what they say."""

    def __init__(self, client: Client, repeats: int, *, quick: bool) -> None:
        self.client = client
        self.folder = client.folder
        own = ("own",) if client.has_own_cache else ()
        self.runs: dict[str, list[Ran]] = {kind: [] for kind in ("fixed", "bare", "cold", "warm", *own)}
        first = self._run("first", own=client.has_own_cache) if own or quick else None
        for repeat in range(repeats):
            for kind, found in self.runs.items():
                if quick and first and kind in ("fixed", "bare"):
                    found.append(first)
                    continue
                store = f"store-{repeat}" if kind in ("cold", "warm") else None
                found.append(self._run(f"{kind}-{repeat}", store=store, own=kind == "own", one=kind == "fixed"))
        self._check()
        self.sampled = self._draw() if client.samples_apart and not quick else None
        self._edit()

    def _run(self, out: str, *, store: str | None = None, own: bool = False, one: bool = False, sampled: bool = False) -> Ran:
        folders = (self.folder / store if store else None, self.folder / "own-cache" if own else None)
        return self.client.run(Ask(self.folder / out, *folders, one, sampled))

    def _check(self) -> None:
        """Ends the experiment where a run that was measured is not what it is called."""
        name, runs = self.client.name, self.runs
        for kind in set(runs) - {"fixed", "bare"}:
            if any(differing(one.answers, runs["bare"][0].answers) for one in runs[kind]):
                raise SystemExit(f"{name}: the {kind} run answers otherwise than the bare one")
        if any(one.told["hits"] or not one.told["misses"] for one in runs["cold"]):
            raise SystemExit(f"{name}: a cold run hit, or asked nothing")
        if any(one.told["misses"] or one.told["uncacheable"] or not one.told["hits"] for one in runs["warm"]):
            raise SystemExit(f"{name}: a warm run missed: {runs['warm'][0].told}")

    def _draw(self) -> tuple[Ran, Ran, Ran]:
        """Runs whose answers are drawn: bare, cold, warm. Their seconds do not count."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            bare = pool.submit(self._run, "sampled-bare", sampled=True)
            cold = self._run("sampled-cold", store="store-sampled", sampled=True)
            return bare.result(), cold, self._run("sampled-warm", store="store-sampled", sampled=True)

    def _edit(self) -> None:
        """Edit the model, and see who serves the old one's answers. Seconds do not count."""
        self.client.edit()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            truth = pool.submit(self._run, "edited-bare")
            ours = pool.submit(self._run, "edited", store="store-0")
            theirs = pool.submit(self._run, "edited-own", own=True) if self.client.has_own_cache else None
            self.wrong = differing(ours.result().answers, truth.result().answers)
            self.wrong_own = differing(theirs.result().answers, truth.result().answers) if theirs else None

    def tell(self, report: Report) -> None:
        """The figures, after all runs side by side."""
        name, runs = self.client.name, self.runs
        print(f"{name:<12}{'wall s':>10}{'cpu s':>10}{'ours s':>10}{'loaded':>10}")
        for kind, found in runs.items():
            ours = f"{statistics.median(one.overhead_s for one in found):.3f}" if found[0].told else ""
            loaded = "" if found[0].opened is None else "no" if not any(one.opened for one in found) else "yes"
            walls, cpus = ([getattr(one, which) for one in found] for which in ("wall_s", "cpu_s"))
            print(f"  {kind:<10}{statistics.median(walls):10.2f}{statistics.median(cpus):10.2f}{ours:>10}{loaded:>10}")
        for kind, found in runs.items():
            report.add(f"{name}_{kind}_s", statistics.median(one.wall_s for one in found))
            report.add(f"{name}_{kind}_cpu_s", statistics.median(one.cpu_s for one in found))
            if found[0].told:
                report.add(f"{name}_{kind}_overhead_s", statistics.median(one.overhead_s for one in found))
            if found[0].opened is not None and kind != "fixed":
                report.add(f"{name}_{kind}_weights_opened", max(one.opened or 0 for one in found))
        pairs = list(zip(runs["warm"], runs["fixed"], strict=True))
        report.add(f"{name}_warm_minus_fixed_s", statistics.median(warm.wall_s - fixed.wall_s for warm, fixed in pairs))
        report.add(f"{name}_warm_minus_fixed_cpu_s", statistics.median(warm.cpu_s - fixed.cpu_s for warm, fixed in pairs))
        shares = [warm.overhead_s / fixed.wall_s for warm, fixed in pairs]
        report.target(f"{name}_warm_overhead_share_of_fixed_cost", statistics.median(shares), "<=", 0.05)
        report.target(f"{name}_warm_model_loads", max(one.told["model_loads"] for one in runs["warm"]), "<=", 0)
        if self.sampled:
            bare, cold, warm = self.sampled
            report.add(f"{name}_sampled_calls", cold.told["misses"])
            report.add(f"{name}_sampled_calls_warm_hits", warm.told["hits"])
            unlike = sum(differing(one.answers, bare.answers) for one in (cold, warm))
            report.add(f"{name}_sampled_answers_unlike_bare", unlike)
        report.add(f"{name}_answers", sum(map(len, runs["bare"][0].answers.values())))
        report.target(f"{name}_wrong_after_an_edit", self.wrong, "<=", 0)
        if self.wrong_own is not None:
            report.add(f"{name}_wrong_after_an_edit_own_cache", self.wrong_own)


def measure_lookups(report: Report, folder: Path, count: int) -> None:
    """µs a request that is stored: ours, and those of lm_eval's ``--use_cache``, which need no token ids."""
    import words
    from harness_tasks import make_model
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook, CachingLM
    from lm_eval.models.huggingface import HFLM

    import evalcache

    model = make_model(folder / "lookups")
    draw = random.Random(0)
    known = sorted({word for sentence in words.SENTENCES for word in sentence.split()})
    texts = [" ".join(draw.choices(known, k=24)) for _ in range(count)]
    asked = [Instance("loglikelihood", {}, (text, f" {draw.choice(known)}"), 0, ("task", 0, 1)) for text in texts]
    ratios, ours_us, call_us, own_us = [], [], [], []
    with evalcache.enable(folder / "lookups-store") as session:
        lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=64)
        above = CachingLM(lm, str(folder / "lookups.db"))
        above.loglikelihood(asked)
        above.dbdict.commit(blocking=True)
        lm.set_cache_hook(CacheHook(None))  # what is answered beneath is not to be written there again
        assert session.cache is not None
        session.cache.flush()
        overhead = session.cache.counts.overhead
        for _ in range(3):
            before = sum(overhead[kind] for kind in LOOKUP)
            call_us.append(seconds_of(lambda: lm.loglikelihood(asked, disable_tqdm=True)) / count * 1e6)
            ours_us.append((sum(overhead[kind] for kind in LOOKUP) - before) / count * 1e6)
            own_us.append(seconds_of(lambda: above.loglikelihood(asked)) / count * 1e6)
            ratios.append(own_us[-1] / ours_us[-1])
    report.add("lookup_evalcache_us", statistics.median(ours_us))
    report.add("lookup_evalcache_with_tokenizing_us", statistics.median(call_us))
    report.add("lookup_lm_eval_use_cache_us", statistics.median(own_us))
    report.target("lookup_use_cache_over_evalcache", statistics.median(ratios), ">=", 20)


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of a call without Python's garbage collection, which comes when it likes and takes as long as 8,000 lookups."""
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    try:
        call()
        return time.perf_counter() - began
    finally:
        gc.enable()


def main() -> None:
    """Run the experiment."""
    parser = arguments("exp_clients", __doc__.splitlines()[0])
    parser.add_argument("--client", choices=CLIENTS, action="append", help="only this one; may be given again")
    options = parser.parse_args()
    names = options.client or list(CLIENTS)
    repeats, documents = (1, 8) if options.quick else (3, 100)
    found = hardware(["torch", "transformers", "lm_eval", "inspect_ai", "lighteval"])
    print(hardware_line(found))
    report = Report("exp_clients", options.quick, found)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "EVALCACHE_QUIET": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        if "lm_eval" in names:
            measure_lookups(report, Path(scratch), 2000 if options.quick else 20000)

        def measure(name: str) -> Measured:
            folder = Path(scratch) / name
            folder.mkdir()
            return Measured(CLIENTS[name](folder, documents), repeats, quick=options.quick)

        with ThreadPoolExecutor(AT_ONCE if options.quick else 1) as pool:
            for measured in pool.map(measure, names):
                measured.tell(report)
    report.write(options.json)


if __name__ == "__main__":
    main()
