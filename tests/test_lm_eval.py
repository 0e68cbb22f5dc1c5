"""lm-evaluation-harness through its own entry points: what the bare harness answers, from the store where it is known."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
import words
from counted import Told, cached
from harness_tasks import ALL, DOCUMENTS, REQUESTS, make_model, make_tasks
from opened import Opened, needs_inotify

import evalcache
from evalcache.code import ORIGINAL
from evalcache.integrations.clients import LM_EVAL
from evalcache.session import current
from evalcache.store import Store

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval (llm-evalcache[lm-eval])")

from harness_client import Here, assert_same, evaluate, with_tasks  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Here:
    folder = tmp_path_factory.mktemp("harness")
    return with_tasks(make_tasks(folder / "tasks"), make_model(folder / "model"))


def answers(results: Any) -> list[Any]:
    """What a run said about each document, and its scores."""
    found = []
    for task, samples in sorted(results["samples"].items()):
        for one in samples:
            found.append([task, one["doc_id"], one["filter"], one["resps"], {name: one[name] for name in one["metrics"]}])
    return found


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    yield
    evaluator = sys.modules.get("lm_eval.evaluator")
    assert not hasattr(HFLM.generate_until, ORIGINAL) and not hasattr(getattr(evaluator, "evaluate", None), ORIGINAL)


def run(here: Here, folder: Path, model: Any = None, **more: Any) -> tuple[Any, Told]:
    with cached(folder) as told:
        results = evaluate(here, model, **more)
        return results, told()


def windows(told: Told) -> int:
    """How many windows the long texts had."""
    return told.misses + told.hits - sum(REQUESTS.values())


# --- the main job -------------------------------------------------------------------------------------------------------


def test_cold_and_warm_answer_as_the_bare_harness(here: Here, store_folder: Path) -> None:
    bare = evaluate(here)
    cold, told = run(here, store_folder)
    assert_same(answers(cold), answers(bare))
    assert (told.hits, told.loads, told.uncacheable, told.duplicates) == (0, 1, {}, 0)
    assert windows(told) > DOCUMENTS["tiny_ppl"]
    whole = told.misses
    for batch_size in (4, 1, 16):
        # Sampled batches of another size draw otherwise: they are another Action, and the harness answers otherwise too.
        warm, told = run(here, store_folder, batch_size=batch_size, tasks=ALL if batch_size == 4 else ALL[:-1])
        assert (told.hits, told.misses, told.uncacheable) == (whole if batch_size == 4 else whole - 1, 0, {})
        assert told.loads == 0
        assert_same(answers(warm), [one for one in answers(cold) if batch_size == 4 or one[0] != "tiny_sampled"])


@needs_inotify
def test_the_weights_are_not_read_where_nothing_misses(here: Here, store_folder: Path) -> None:
    time.sleep(2.1)  # what is known of a file that is younger is not trusted, and read again
    cold, _ = run(here, store_folder)
    (file,) = here.model.glob("*.safetensors")
    with Opened(file) as opened:
        warm, told = run(here, store_folder)
        assert opened.count() == told.misses == told.loads == 0
        assert_same(answers(warm), answers(cold))
        evaluate(here, tasks=("tiny_mc",))
        assert opened.count() > 0  # the bare harness does


def test_some_are_stored_and_the_draws_go_on(here: Here, store_folder: Path) -> None:
    """A short run first: the long one computes the rest, in other batches, and later draws are as in the bare run."""
    run(here, store_folder, limit=3, tasks=ALL[:-1])
    bare = evaluate(here)
    after = torch.rand(3)
    results, told = run(here, store_folder)
    assert torch.equal(torch.rand(3), after)
    assert_same(answers(results), answers(bare))
    assert told.hits >= 3 * 4 + 3 * 4 + 3 + 3 and told.misses > 0
    warm, told = run(here, store_folder)
    assert told.misses == 0 and torch.equal(torch.rand(3), after)
    assert_same(answers(warm), answers(bare))


@pytest.mark.parametrize("limit", [1, 0.5])
def test_single_requests_and_none(here: Here, store_folder: Path, limit: float) -> None:
    bare = evaluate(here, limit=limit)
    for _ in range(2):
        results, told = run(here, store_folder, limit=limit)
        assert_same(answers(results), answers(bare))
    assert told.misses == 0
    lm = HFLM(pretrained=str(here.model), dtype="float32", device="cpu")
    with cached(store_folder):
        assert lm.loglikelihood([]) == lm.generate_until([]) == lm.loglikelihood_rolling([]) == []


def test_a_prepared_model_and_chats(here: Here, store_folder: Path) -> None:
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 2, "tasks": ("tiny_mc", "tiny_gen")}
    bare = evaluate(here, **chat)
    for hits in (0, 40):
        with cached(store_folder) as told:
            lm = HFLM(pretrained=str(here.model), dtype="float32", device="cpu", batch_size=4)
            results = evaluate(here, lm, **chat)
            assert_same(answers(results), answers(bare))
            assert told().hits == hits and told().uncacheable == {}


# --- one evaluation, whatever the client ---------------------------------------------------------------------------------


def test_a_script_and_the_harness_share_log_likelihoods(here: Here, store_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    results, _ = run(here, store_folder, tasks=("tiny_mc", "tiny_letters"))
    pairs, expected = [], []
    for samples in results["samples"].values():
        for one in samples:
            for arguments, ((score, greedy),) in zip(one["arguments"], one["resps"], strict=True):
                pairs.append(tuple(arguments))
                expected.append((score, greedy))
    with cached(store_folder) as told:
        model = AutoModelForCausalLM.from_pretrained(here.model, dtype=torch.float32)
        scores = evalcache.loglikelihood(model, AutoTokenizer.from_pretrained(here.model), pairs, max_length=128)
        assert (told().hits, told().misses) == (len(pairs), 0)
    assert [score.is_greedy for score in scores] == [greedy for _, greedy in expected]
    assert [score.logprob for score in scores] == pytest.approx([score for score, _ in expected], rel=1e-5)


def test_a_script_and_the_harness_share_generations_that_only_an_end_id_stops(
    here: Here, store_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tasks = make_tasks(tmp_path / "tasks", tiny_gen={"generation_kwargs": {"until": [], "max_gen_toks": 12, "do_sample": False}})
    open_end = Here(tasks, here.model, TaskManager(include_path=str(tasks), include_defaults=False))
    bare = evaluate(open_end, tasks=("tiny_gen",))
    tokenizer = AutoTokenizer.from_pretrained(here.model)
    prompts = [one["arguments"][0][0] for one in bare["samples"]["tiny_gen"]]
    with cached(store_folder) as told:
        model = AutoModelForCausalLM.from_pretrained(here.model, dtype=torch.float32)
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert told().misses == len(prompts)
    results, told = run(open_end, store_folder, tasks=("tiny_gen",))
    assert (told.hits, told.misses) == (len(prompts), 0)
    assert_same(answers(results), answers(bare))


# --- what must not be served ---------------------------------------------------------------------------------------------


def test_another_model_under_the_same_name_is_another_model(here: Here, store_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(here.model, place)
    run(here, store_folder, place)
    make_model(place, seed=1)
    bare = evaluate(here, place)
    results, told = run(here, store_folder, place)
    assert told.hits == 0
    assert_same(answers(results), answers(bare))


def test_a_model_with_another_last_norm_runs_what_lies_above_its_layers(here: Here, store_folder: Path, tmp_path: Path) -> None:
    tasks = ("tiny_mc", "tiny_ppl")
    place = tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(here.model, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(shutil.copytree(here.model, place))
    bare = evaluate(here, place, tasks=tasks)
    for folder in (here.model, place):
        with cached(store_folder, components=True):
            results = evaluate(here, folder, tasks=tasks)
            told = current().cache.counts.components
    assert_same(answers(results), answers(bare))
    assert told.resumed > 0 and told.whole == 0 and not told.refused


class Halved(HFLM):
    """Answers in its own way."""

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        return super()._model_call(*args, **kwargs) / 2


def test_a_subclass_runs_bare(here: Here, store_folder: Path) -> None:
    tasks = ("tiny_mc", "tiny_ppl")
    make = lambda: Halved(pretrained=str(here.model), dtype="float32", device="cpu", batch_size=4)  # noqa: E731
    bare = evaluate(here, make(), tasks=tasks)
    run(here, store_folder, tasks=tasks)
    with cached(store_folder) as told:
        results = evaluate(here, make(), tasks=tasks)
        assert told().hits == 0 and set(told().uncacheable) == {"unsupported"}
    assert_same(answers(results), answers(bare))


def test_a_patched_harness_runs_bare(here: Here, store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(here, store_folder, tasks=("tiny_mc",))
    original = HFLM._model_call
    monkeypatch.setattr(HFLM, "_model_call", lambda self, *args, **kwargs: original(self, *args, **kwargs) / 2)
    bare = evaluate(here, tasks=("tiny_mc",))
    results, told = run(here, store_folder, tasks=("tiny_mc",))
    assert told.hits == 0 and told.uncacheable == {"unsupported": 32}
    assert_same(answers(results), answers(bare))


def instance(kind: str, *arguments: Any, place: int = 0) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("task", place, 1))


def test_requests_that_the_harness_mixes_up_are_not_stored(here: Here, store_folder: Path) -> None:
    """Of two continuations that end the same text, the harness scores the shorter one at the wrong places."""
    lm = HFLM(pretrained=str(here.model), dtype="float32", device="cpu", batch_size=4)
    mixed = [
        instance("loglikelihood", "the cache keeps", " what the model said"),
        instance("loglikelihood", "the cache keeps what the model", " said"),
        instance("loglikelihood", "what is the answer", " to the first question"),
    ]
    together, alone = lm.loglikelihood(mixed), [lm.loglikelihood([one])[0] for one in mixed]
    assert together[1] != pytest.approx(alone[1])
    for hits in (0, 1):
        with cached(store_folder) as told:
            assert_same(lm.loglikelihood(mixed), together)
            assert (told().hits, told().uncacheable) == (hits, {"unsupported": 2})
    with cached(store_folder) as told:
        assert_same([lm.loglikelihood([one])[0] for one in mixed], alone)


@pytest.mark.parametrize(
    "gen_kwargs, reason",
    [
        ({"until": ["<s>"], "max_gen_toks": 8}, "criterion"),  # its text does not show it, and the engine goes on behind it
        ({"until": ["."], "max_gen_toks": 8, "max_length": 60}, "unsupported"),
        ({"until": ["."], "max_gen_toks": 8, "logits_processor": [object()]}, "argument"),
    ],
)
def test_generations_that_depend_on_their_batch_run_bare(here: Here, store_folder: Path, gen_kwargs: Any, reason: str) -> None:
    lm = HFLM(pretrained=str(here.model), dtype="float32", device="cpu", batch_size=4)
    if "logits_processor" in gen_kwargs:
        from transformers import TemperatureLogitsWarper

        gen_kwargs["logits_processor"] = [TemperatureLogitsWarper(0.5)]
    requests = [instance("generate_until", text, dict(gen_kwargs), place=place) for place, text in enumerate(words.SENTENCES)]
    bare = lm.generate_until(requests)
    for _ in range(2):
        with cached(store_folder) as told:
            assert lm.generate_until(requests) == bare
            assert told().uncacheable == {reason: len(requests)}


def test_errors_come_out_as_they_are(here: Here, store_folder: Path) -> None:
    lm = HFLM(pretrained=str(here.model), dtype="float32", device="cpu", batch_size=4)
    wrong = [instance("loglikelihood", "the model", ""), instance("generate_until", "the model", {"max_gen_toks": 500})]
    for one in wrong:
        call = getattr(lm, one.request_type)
        with pytest.raises(Exception) as bare:
            call([one])
        with cached(store_folder), pytest.raises(type(bare.value)) as ours:
            call([one])
        assert str(ours.value) == str(bare.value)


# --- beside and beneath other things --------------------------------------------------------------------------------------


def test_its_own_cache_may_stand_above(here: Here, store_folder: Path, tmp_path: Path) -> None:
    bare = evaluate(here)
    for turn in range(2):
        results, told = run(here, store_folder, use_cache=str(tmp_path / "own"))
        assert_same(answers(results), answers(bare))
        # The second time, the harness's cache answers all but the samples, which it never keeps.
        assert (told.hits > 0) is (turn == 1) and told.uncacheable == {}
    results, told = run(here, store_folder)
    assert told.misses == 0
    assert_same(answers(results), answers(bare))


def test_the_results_and_the_ledger_say_what_was_reused(here: Here, store_folder: Path) -> None:
    run(here, store_folder)
    results, told = run(here, store_folder)
    block = results["config"]["evalcache"]
    assert (block["hits"], block["misses"], block["model_loads"]) == (told.hits, 0, 0)
    assert next(iter(block["models"].values())).startswith("xxh3_128:")
    with duckdb.connect(str(store_folder / "ledger.duckdb"), read_only=True) as ledger:
        assert dict(ledger.execute("SELECT task, count(*) FROM documents GROUP BY task").fetchall()) == DOCUMENTS
        assert {task for (task,) in ledger.execute("SELECT task FROM tasks").fetchall()} == set(ALL)
        mine = ledger.execute(
            "SELECT task, avg(value) FROM scores WHERE run = ? AND metric LIKE 'acc,%' GROUP BY task", [block["run"]]
        )
        for task, mean in mine.fetchall():
            assert mean == pytest.approx(results["results"][task]["acc,none"])
        labelled = "SELECT task, count(DISTINCT document) FROM lookups WHERE run = ? AND task <> '' GROUP BY task"
        assert dict(ledger.execute(labelled, [block["run"]]).fetchall())["tiny_mc"] == DOCUMENTS["tiny_mc"]
        assert ledger.execute("SELECT DISTINCT client FROM runs").fetchall() == [("lm_eval",)]


def test_a_seam_that_has_moved_is_one_warning(here: Here, store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = evaluate(here, tasks=("tiny_mc",))
    monkeypatch.setitem(LM_EVAL.seams["models/huggingface.py"], "HFLM._model_call", "self inputs")
    with pytest.warns(evalcache.EvalCacheWarning, match=r"lm_eval .* runs without its adapter: HFLM._model_call takes"):
        results, told = run(here, store_folder, tasks=("tiny_mc",))
    assert (told.hits, told.misses) == (0, 0)
    assert_same(answers(results), answers(bare))


def test_the_seams_of_the_tested_version_are_where_they_were() -> None:
    from evalcache.integrations.clients import version_of_client

    assert version_of_client(LM_EVAL) in LM_EVAL.tested
    assert LM_EVAL.faults() == []


# --- processes --------------------------------------------------------------------------------------------------------------

LAUNCH = "import sys; from evalcache.cli import main; main(['run', '--', *sys.argv[1:]])"


def command(here: Here, out: Path, model: Path | None = None, tasks: tuple[str, ...] = ALL) -> list[str]:
    program = str(Path(sys.executable).parent / "lm_eval")
    return [
        *(program, "run", "--model", "hf", "--model_args", f"pretrained={model or here.model},dtype=float32", "--device", "cpu"),
        *("--batch_size", "4", "--tasks", ",".join(tasks), "--include_path", str(here.tasks)),
        *("--output_path", str(out), "--log_samples"),
    ]


def test_the_command_that_people_type(here: Here, store_folder: Path, tmp_path: Path) -> None:
    tasks = ("tiny_mc", "tiny_gen")
    environment = os.environ | {"EVALCACHE_DIR": str(store_folder)}
    printed = []
    for name, before in (("bare", []), ("cold", [sys.executable, "-c", LAUNCH]), ("warm", [sys.executable, "-c", LAUNCH])):
        done = subprocess.run(
            [*before, *command(here, tmp_path / name, tasks=tasks)], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
        (file,) = (tmp_path / name).rglob("results*.json")
        block = json.loads(file.read_text())["config"].get("evalcache")
        assert (block is None) is (name == "bare")
    assert printed[0] == printed[1] == printed[2]
    assert (block["hits"], block["misses"], block["model_loads"]) == (40, 0, 0)
    assert "evalcache: loglikelihood 32/32 stored, 0 to run" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("evalcache: 40 hits, 0 misses")


EVALUATE = """
import sys
import evalcache
import lm_eval
from lm_eval.tasks import TaskManager

tasks, model = sys.argv[1:]
session = evalcache.enable()
manager = TaskManager(include_path=tasks, include_defaults=False)
lm_eval.simple_evaluate(
    model="hf", model_args=f"pretrained={model},dtype=float32", tasks=["tiny_gen", "tiny_mc"], task_manager=manager,
    batch_size=2, device="cpu", bootstrap_iters=0,
)
print("DONE", session.cache.counts.misses, session.cache.counts.hits)
"""


@pytest.mark.campaign
def test_killed_with_four_processes_and_ended_with_two(tmp_path: Path, store_folder: Path) -> None:
    documents = 60
    generation = {"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 48, "do_sample": False}}
    tasks = make_tasks(tmp_path / "tasks", documents=documents, tiny_gen=generation)
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=768, num_hidden_layers=6)
    command = [sys.executable, "-c", EVALUATE, str(tasks), str(model)]
    distinct = documents * 5
    store = Store(store_folder / "store")
    first = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    while store.stats().entries < 0.6 * distinct:
        assert all(process.poll() is None for process in first), [process.communicate()[1] for process in first]
        time.sleep(0.05)
    for process in first:
        process.send_signal(signal.SIGKILL)
    for process in first:
        process.communicate()
    stored = store.stats().entries
    assert 0.6 * distinct <= stored < distinct
    second = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [process.communicate(timeout=600) for process in second]
    assert [process.returncode for process in second] == [0, 0], ended
    misses, hits = zip(*(map(int, out.split("DONE ")[1].split()) for out, _ in ended), strict=True)
    assert store.stats().entries == distinct
    # They computed what the four had not stored, once, and found each other's answers as well as those of the dead.
    assert distinct - stored <= sum(misses) <= 1.05 * (distinct - stored) + 1
    assert sum(misses) + sum(hits) == 2 * distinct
