"""`evalcache plan` and `run --budget`: what was planned happens, no model is loaded for it, and a spent budget loses nothing."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_tasks import REQUESTS, make_model, make_tasks

import evalcache
from evalcache import plan as plans
from evalcache import session as sessions
from evalcache.budget import Budget, BudgetCache, BudgetMeter, budget_environment
from evalcache.errors import BUDGET_EXIT_CODE, BudgetError
from evalcache.ledger import Ledger
from evalcache.measuring import Busy
from evalcache.plan import Part
from evalcache.prices import read_prices
from evalcache.store import Store

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval (llm-evalcache[lm-eval])")

from harness_client import Here, evaluate, with_tasks  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Here:
    folder = tmp_path_factory.mktemp("harness")
    return with_tasks(make_tasks(folder / "tasks"), make_model(folder / "model"))


def run(here: Here, folder: Path, model: Any = None, **more: Any) -> Any:
    """The real thing: (results, counts)."""
    with evalcache.enable(folder) as session:
        results = evaluate(here, model, **more)
        session.cache.flush()
    return results, session.cache.counts


class Planned(dict[str, Any]):
    """What a process below `evalcache plan` has written down."""

    def count(self, name: str) -> dict[str, int]:
        """Requests by task."""
        found: dict[str, int] = {}
        for group in self["groups"]:
            found[group["task"]] = found.get(group["task"], 0) + group[name]
        return {task: number for task, number in found.items() if number}

    def part(self, folder: Path) -> Part:
        """With estimates and reasons."""
        store, ledger = Store(folder / "store"), Ledger(folder / "ledger.duckdb")
        ledger.sync(store)
        return plans._estimate(ledger, store, self)


def parameters() -> list[Any]:
    """All that are in memory."""
    return [one for one in gc.get_objects() if isinstance(one, torch.nn.Parameter)]


@pytest.fixture
def planned(store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans an evaluation in this process, after which there are no more weights in memory and no more entries in the store."""

    def make(here: Here, model: Any = None, policy: str | None = None, **more: Any) -> Planned:
        folder = tmp_path / f"plan{time.monotonic_ns()}"
        folder.mkdir()
        before = Store(store_folder / "store").stats()
        with monkeypatch.context() as patch:
            patch.setenv("EVALCACHE_PLAN", str(folder))
            # Other clients may be there already, for other tests; in a process of its own each would end the plan.
            patch.setattr(sessions, "CLIENTS", {"lm_eval": sessions.CLIENTS["lm_eval"]})
            alive = len(parameters())
            session = evalcache.enable(store_folder, policy=policy)
            try:
                with pytest.raises(SystemExit) as ended:
                    evaluate(here, model, **more)
            finally:
                sys.modules["evalcache.integrations.lm_eval_plan"].uninstall()
                session.__exit__(None, None, None)
                sessions._current = None
        after = Store(store_folder / "store").stats()
        assert (after.entries, after.journal_rows) == (before.entries, before.journal_rows)
        assert ended.value.code == 0 and session._cache.counts.model_loads == 0 and len(parameters()) <= alive
        (file,) = folder.glob("*.json")
        return Planned(json.loads(file.read_text()))

    return make


def lookups(folder: Path, outcome: str) -> dict[str, int]:
    """Of the last run, by task."""
    ledger = Ledger(folder / "ledger.duckdb")
    last = ledger.query("SELECT run FROM hits_by_run ORDER BY started_at DESC LIMIT 1").rows[0][0]
    sql = "SELECT task, count(*) FROM lookups WHERE run = ? AND outcome = ? GROUP BY 1"
    return dict(ledger.query(sql, [last, outcome]).rows)


# --- what was planned is what happens ---------------------------------------------------------------------------------------


def test_a_model_that_was_never_loaded_and_then_one_that_was(here: Here, store_folder: Path, planned: Any) -> None:
    found = planned(here)
    assert found["reason"] == "" and found["model"]["state"] == "stranger"
    part = found.part(store_folder)
    assert part.why == ("the model was never loaded here: everything runs",)
    assert all(line.estimate is None for line in part.lines) and part.loading is None and part.seconds is None
    run(here, store_folder)
    assert found.count("runs") == lookups(store_folder, "miss") and found.count("hits") == {}
    assert found.count("runs") | {"tiny_ppl": 0} == REQUESTS | {"tiny_ppl": 0}

    found = planned(here)
    assert found["model"]["state"] == "known" and found.count("runs") == {}
    _, counts = run(here, store_folder)
    assert counts.misses == counts.model_loads == 0
    assert found.count("hits") == lookups(store_folder, "hit")
    assert sum(group["hit_seconds"] for group in found["groups"]) == pytest.approx(counts.credited_seconds)
    part = found.part(store_folder)
    assert part.why == () and part.loading is None and part.seconds.seconds == 0

    found = planned(here, policy="refresh")
    assert found.count("hits") == {} and found.count("runs") == lookups(store_folder, "hit")
    assert "refresh" in found.part(store_folder).why[0]


def test_some_are_stored(here: Here, store_folder: Path, planned: Any) -> None:
    run(here, store_folder, limit=3)
    found = planned(here)
    assert found.count("hits").keys() == {"tiny_mc", "tiny_letters", "tiny_ppl", "tiny_gen"}
    run(here, store_folder)
    assert found.count("hits") == lookups(store_folder, "hit")
    assert found.count("runs") == lookups(store_folder, "miss")
    part = found.part(store_folder)
    (gen,) = (line for line in part.lines if line.task == "tiny_gen")
    assert gen.estimate is not None and gen.estimate.like == "this task, this model"


def test_a_model_of_the_same_size_is_estimated_by_the_costs_of_the_other(
    here: Here, store_folder: Path, planned: Any, tmp_path: Path
) -> None:
    """The same requests again: estimated is exactly what they took."""
    _, counts = run(here, store_folder)
    other = make_model(tmp_path / "other", seed=1)
    part = planned(here, other).part(store_folder)
    took = dict(
        Ledger(store_folder / "ledger.duckdb").query(
            "SELECT task, sum(seconds) FROM lookups GROUP BY 1"
        ).rows
    )  # fmt: skip
    for line in part.lines:
        assert line.estimate is not None and line.estimate.seconds == pytest.approx(took[line.task], rel=1e-6)
        assert line.estimate.low_seconds <= line.estimate.seconds <= line.estimate.high_seconds
        assert line.estimate.like.endswith("models of this size")
    assert part.loading is not None and part.loading.seconds == pytest.approx(counts.model_load_seconds)
    assert part.seconds.seconds == pytest.approx(counts.spent_seconds + counts.model_load_seconds)
    money = plans.Plan((), (part,)).money(read_prices([f"{part.device}=3600 EUR"]))
    assert money is not None and money[:2] == ("EUR", pytest.approx(part.seconds.seconds))
    assert plans.Plan((), (part,)).to_json(read_prices())["money"] is None
    # A budget that loading takes up would never get anywhere, and is refused before it begins.
    prices, load_s = read_prices([f"{part.device}=3600 EUR"]), part.loading.low_seconds
    for budget in (Budget(load_s), Budget(load_s / 2), Budget(load_s, "EUR")):
        with pytest.raises(BudgetError, match="less than it takes to load the model") as refused:
            plans._refuse_hopeless(budget, part, prices)
        assert refused.value.exit_code == 2
    plans._refuse_hopeless(Budget(load_s * 1.01), part, prices)
    # A larger one is not like it.
    larger = make_model(tmp_path / "larger", hidden_size=96)
    part = planned(here, larger).part(store_folder)
    assert all(line.estimate is None for line in part.lines) and part.seconds is None
    assert plans.Plan((), (part,)).to_json(read_prices())["estimated"] is None


def test_other_settings_and_other_versions(
    here: Here, store_folder: Path, planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(here, store_folder, tasks=("tiny_gen", "tiny_mc"))
    longer = {"generation_kwargs": {"until": ["\n\n", "."], "max_gen_toks": 32, "do_sample": False}}
    part = planned(
        with_tasks(make_tasks(tmp_path / "tasks", tiny_gen=longer), here.model), tasks=("tiny_gen", "tiny_mc")
    ).part(store_folder)  # fmt: skip
    assert part.why == ("tiny_gen (generate_until): other settings: max_new_tokens 16 → 32",) and part.warnings == ()
    (gen,) = (line for line in part.lines if line.task == "tiny_gen")
    rows = Ledger(store_folder / "ledger.duckdb").query(
        "SELECT o.seconds, o.completion_tokens FROM outputs o JOIN requests USING (key) WHERE kind = 'generate_until'"
    )
    expected = sum(seconds * (2 if made == 16 else 1) for seconds, made in rows.rows)
    assert gen.estimate.seconds == pytest.approx(expected)

    import evalcache.integrations.loading as loading
    import evalcache.integrations.planning as planning

    now = loading.runtime()
    for name, warns in (("torch", True), ("accelerate", False)):
        for module in (loading, planning):
            monkeypatch.setattr(module, "runtime", lambda name=name: [{**now[0], name: "99.0"}, *now[1:]])
        found = planned(here, tasks=("tiny_gen", "tiny_mc"))
        part = found.part(store_folder)
        assert found.count("hits") == {} and f"{name} {now[0][name]} → 99.0" in part.why[0]
        assert [f"because a library was changed: {name}" in warning for warning in part.warnings] == [True] * warns


# --- it is in nobody's way --------------------------------------------------------------------------------------------------


def test_the_harness_own_cache_is_kept_from_what_means_nothing(
    here: Here, store_folder: Path, planned: Any, tmp_path: Path
) -> None:
    own = str(tmp_path / "own")
    found = planned(here, tasks=("tiny_mc", "tiny_gen"), use_cache=own)
    assert found["own_cache"] and any("--use_cache" in one for one in found.part(store_folder).warnings)
    bare = evaluate(here, tasks=("tiny_mc", "tiny_gen"))
    results = evaluate(here, tasks=("tiny_mc", "tiny_gen"), use_cache=own)
    assert results["results"]["tiny_mc"] == bare["results"]["tiny_mc"]
    assert [one["resps"] for one in results["samples"]["tiny_gen"]] == [one["resps"] for one in bare["samples"]["tiny_gen"]]


class Halved(HFLM):
    """Answers in its own way."""

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        return super()._model_call(*args, **kwargs) / 2


@pytest.mark.parametrize(
    "more, reason",
    [({"model": "dummy"}, "dummy is not served"), ({"model_args": "pretrained=x,autogptq=True"}, "autogptq= loads")],
    ids=["another model", "another loader"],
)
def test_what_cannot_be_planned_ends_with_its_reason(
    here: Here, store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any, reason: str
) -> None:
    monkeypatch.setenv("EVALCACHE_PLAN", str(tmp_path))
    monkeypatch.setattr(sessions, "CLIENTS", {"lm_eval": sessions.CLIENTS["lm_eval"]})  # as above
    session = evalcache.enable(store_folder)
    try:
        with pytest.raises(SystemExit):
            lm_eval.simple_evaluate(**{"model": "hf", "tasks": ["tiny_mc"], "task_manager": here.manager, **more})
    finally:
        sys.modules["evalcache.integrations.lm_eval_plan"].uninstall()
        session.__exit__(None, None, None)
        sessions._current = None
    (file,) = tmp_path.glob("*.json")
    assert reason in json.loads(file.read_text())["reason"]


SCRIPT = """
    import sys
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("asks")
    ids = tokenizer("the model is asked", return_tensors="pt")
    for count in (4, 5, 6):
        model.generate(**ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    print("scores")
"""


def cli(folder: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evalcache", *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"EVALCACHE_DIR": str(folder)},
    )  # fmt: skip


def test_a_plain_script_cannot_be_planned_and_has_a_budget_all_the_same(here: Here, store_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = cli(store_folder, "plan", "--", sys.executable, script, here.model)
    assert (done.returncode, done.stdout) == (2, "") and "asks\n" in done.stderr and "scores" not in done.stderr
    assert "a script asks its model one call after another" in done.stderr
    done = cli(store_folder, "plan", "--", sys.executable, "-c", "print('nothing')")
    assert done.returncode == 2 and "asked nothing that evalcache serves" in done.stderr
    # Loading takes longer than that: to run it again and again would be of no use.
    done = cli(store_folder, "run", "--budget", "0.0001s", "--", sys.executable, script, here.model)
    assert (done.returncode, done.stdout) == (2, "asks\n"), done.stderr
    assert "no plan:" in done.stderr and "0.0001 s was spent before anything was computed" in done.stderr


def harness_command(here: Here) -> list[Any]:
    program = str(Path(sys.executable).parent / "lm_eval")
    return [
        *(program, "run", "--model", "hf", "--model_args", f"pretrained={here.model},dtype=float32", "--device", "cpu"),
        *("--batch_size", "4", "--tasks", "tiny_mc,tiny_gen", "--include_path", here.tasks),
    ]


def test_the_command_that_people_type(here: Here, store_folder: Path) -> None:
    command = harness_command(here)
    done = cli(store_folder, "plan", "--json", "--", *command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["hits"], found["runs"], found["estimated"], found["not_estimated"]) == (0, 40, None, 40)
    done = cli(store_folder, "run", "--budget", "20EUR", "--", *command)
    assert done.returncode == 2 and "has no price in EUR" in done.stderr and "Running loglikelihood requests" not in done.stdout


@pytest.mark.campaign
def test_a_budget_that_suffices_changes_nothing(here: Here, store_folder: Path) -> None:
    command = harness_command(here)
    done = cli(store_folder, "run", "--budget", "20EUR", "--price", "*=1 EUR", "--", *command)
    assert done.returncode == 0, done.stderr
    done = cli(store_folder, "plan", "--", *command)
    assert done.returncode == 0 and "plan: 40 hit, 0 run" in done.stdout
    more = [str(one).replace("tiny_mc,tiny_gen", "tiny_letters") for one in command]
    done = cli(store_folder, "run", "--budget", "0.001s", "--", *more)  # loading has taken longer than that
    assert done.returncode == 2 and "less than it takes to load the model" in done.stderr, done.stderr
    assert "Running loglikelihood requests" not in done.stdout


# --- budgets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, budget",
    [
        ("2h", Budget(7200)), ("90min", Budget(5400)), ("1h30m", Budget(5400)), ("1.5 h", Budget(5400)), ("45s", Budget(45)),
        ("20EUR", Budget(20, "EUR")), ("0.5 usd", Budget(0.5, "USD")), ("10min", Budget(600)),
    ],
)  # fmt: skip
def test_what_a_person_types_for_a_budget(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "2", "h", "2x", "0s", "-1h", "20 EUROS", "2h20EUR", "EUR20", "nan EUR", "1hm"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(BudgetError):
        Budget.parse(text)


class Ended(BaseException):
    pass


def end(*_: Any) -> None:
    raise Ended


def test_processes_of_a_run_share_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "spent"
    path.touch()
    one, other = (BudgetMeter(Budget(10), read_prices(), str(path), lambda: 0.0, end) for _ in range(2))
    one.spend(6.0)
    other.check()
    other.spend(3.5, computed=True)
    one.check()
    one.spend(0.5)
    with pytest.raises(Ended):
        other.check()
    assert other.ended_with == BUDGET_EXIT_CODE and one.ended_with is None
    with pytest.raises(Ended):
        one.check()
    assert one.ended_with == BUDGET_EXIT_CODE  # the other one has computed something


def test_a_run_that_spends_its_budget_on_loading_is_no_run_to_go_on_with(tmp_path: Path) -> None:
    meter = BudgetMeter(Budget(10), read_prices(), None, lambda: 12.0, end)
    with pytest.raises(Ended), meter.computing(Busy("GPU")):
        raise AssertionError("a batch was begun")
    assert meter.ended_with == 2
    with pytest.raises(Ended), BudgetMeter(Budget(1, "EUR"), read_prices(), None, lambda: 0.0, end).computing(Busy("")):
        raise AssertionError("computed where nobody knows what it costs")


def test_a_loop_of_ones_own_has_a_budget(tmp_path: Path) -> None:
    cache = BudgetCache(tmp_path, budget=Budget(0.05), prices=read_prices(), path=None)
    model = evalcache.named("somewhere", version="1")

    def compute(requests: list[str]) -> list[str]:
        time.sleep(0.06)
        return requests

    assert evalcache.run(["a"], model=model, compute=compute, cache=cache) == ["a"]
    assert evalcache.run(["a"], model=model, compute=compute, cache=cache) == ["a"]  # a hit computes nothing
    with pytest.raises(SystemExit) as ended:
        evalcache.run(["b"], model=model, compute=compute, cache=cache)
    assert ended.value.code == BUDGET_EXIT_CODE
    cache.close()
    assert Store(tmp_path / "store").stats().entries == 1


def test_money_is_seconds_times_devices_times_the_price(tmp_path: Path) -> None:
    ours = [0.0]
    meter = BudgetMeter(Budget(1, "EUR"), read_prices(["GPU=360 EUR"]), None, lambda: ours[0], end)
    meter.spend(3.0)
    with meter.computing(Busy("GPU", ("cuda:0", "cuda:1"))):
        ours[0] += 4.0
    assert meter.spent() == pytest.approx(7 * 2 * 360 / 3600, rel=0.01)  # what came before the price was known counts, too
    with pytest.raises(Ended), meter.computing(Busy("GPU", ("cuda:0", "cuda:1"))):
        raise AssertionError("a batch was begun")
    meter = BudgetMeter(Budget(1, "EUR"), read_prices(["GPU=360 USD"]), None, lambda: 0.0, end)
    with pytest.raises(Ended), meter.computing(Busy("GPU")):
        raise AssertionError("a batch was begun")
    assert meter.ended_with == 2


@pytest.mark.parametrize("task", ["tiny_mc", "tiny_gen"])
def test_a_run_whose_budget_is_spent_goes_on_when_it_is_run_again(
    here: Here, store_folder: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Each batch takes a hundred seconds by a clock of ours: the third one is not begun."""
    bare = evaluate(here, tasks=(task,), batch_size=2)
    for name, value in budget_environment("150s", [], []).items():
        monkeypatch.setenv(name, value)

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            cls.now += 100
            return cls.now

    with monkeypatch.context() as patch:
        patch.setattr("evalcache.budget.time", Clock)
        with pytest.raises(SystemExit) as ended, evalcache.enable(store_folder):
            evaluate(here, tasks=(task,), batch_size=2)
    sessions._current = None
    assert ended.value.code == BUDGET_EXIT_CODE
    stored = Store(store_folder / "store").stats().entries
    assert 4 <= stored <= 8  # two batches of two rows; rows of one input are answered together
    monkeypatch.delenv("EVALCACHE_BUDGET")
    results, counts = run(here, store_folder, tasks=(task,), batch_size=2)
    assert (counts.hits, counts.misses) == (stored, REQUESTS[task] - stored)
    assert results["results"][task] == pytest.approx(bare["results"][task])
    for one, other in zip(results["samples"][task], bare["samples"][task], strict=True):
        assert one["filtered_resps"] == pytest.approx(other["filtered_resps"]) if task == "tiny_gen" else True
