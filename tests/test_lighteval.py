"""lighteval's accelerate backend: what the bare client answers, from the store where it is known."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
import words
from counted import Told, cached
from harness_tasks import TEXTS, make_model, make_tasks
from opened import Opened, needs_inotify

import evalcache
from evalcache.integrations.clients import LIGHTEVAL, version_of_client

pytest.importorskip("lighteval", reason="needs lighteval (llm-evalcache[lighteval])")

from lighteval.models.model_input import GenerationParameters
from lighteval.models.transformers import transformers_model
from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
from lighteval.tasks.requests import Doc, SamplingMethod

_WORDS = sorted({word for sentence in words.SENTENCES for word in sentence.split()})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("lighteval") / "model")


def load(folder: Path, cls: type = TransformersModel, *, batch_size: int | None = 4, **settings: Any) -> Any:
    settings = {"dtype": "float32", "override_chat_template": False} | settings
    return cls(TransformersModelConfig(model_name=str(folder), batch_size=batch_size, **settings))


def text_of(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(count))


def choices(count: int = 10, seed: int = 0) -> list[Any]:
    """Documents with several tokens a choice, and with letters."""
    draw = random.Random(seed)
    docs = []
    for place in range(count):
        letters = place % 3 == 0
        tails = [" A", " B", " C", " D"] if letters else [" " + text_of(draw, draw.randint(1, 6)) for _ in range(3)]
        query = f"Question: {text_of(draw, draw.randint(2, 20))} Answer:" + (" " if place % 4 == 1 else "")
        docs.append(Doc(query, tails, 0, id=str(place), task_name="letters|0" if letters else "mc|0"))
    return docs


def prompts(count: int = 10, seed: int = 0, longest: int = 14, **settings: Any) -> list[Any]:
    draw = random.Random(seed)
    settings = {"generation_size": 12, "stop_sequences": ["\n\n", "e"]} | settings
    return [
        Doc(f"Question: {text_of(draw, draw.randint(2, longest))} Answer:", [""], 0, id=str(place), task_name="gen|0", **settings)
        for place in range(count)
    ]


def bare(folder: Path, method: str, docs: list[Any], **settings: Any) -> list[Any]:
    """The bare client's answers, without what its own cache remembers."""
    forget(folder)
    try:
        return getattr(load(folder, **settings), method)(docs)
    finally:
        forget(folder)


def forget(folder: Path) -> None:
    for one in folder.iterdir():
        if one.is_dir():
            shutil.rmtree(one)


def remembered(folder: Path) -> list[Path]:
    """What lighteval's own cache has written."""
    return list(folder.rglob("*.parquet"))


def assert_same(left: list[Any], right: list[Any], but: str = "") -> None:
    """All fields of all responses: log-probabilities to 1e-5, everything else exactly, types included."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        mine, theirs = asdict(one), asdict(other)
        assert mine.pop("logprobs") == pytest.approx(theirs.pop("logprobs"), rel=1e-5, abs=1e-5)
        mine.pop(but, None), theirs.pop(but, None)
        assert mine == theirs


def run(store: Path, folder: Path, method: str, docs: list[Any], **settings: Any) -> tuple[list[Any], Told]:
    with cached(store) as told:
        answers = getattr(load(folder, **settings), method)(docs)
        assert not remembered(folder)
        return answers, told()


# --- log-likelihoods ------------------------------------------------------------------------------------------------------


def test_log_likelihoods_as_the_bare_client(model: Path, store_folder: Path) -> None:
    docs = choices()
    for batch_size in (4, 96, None):
        expected = bare(model, "loglikelihood", docs, batch_size=batch_size)
        after = torch.get_rng_state()
        answers, told = run(store_folder, model, "loglikelihood", docs, batch_size=batch_size)
        assert_same(answers, expected)
        assert told.uncacheable == {} and (told.misses == 0) is (batch_size != 4)
        answers, told = run(store_folder, model, "loglikelihood", docs, batch_size=batch_size)
        assert_same(answers, expected)
        assert (told.hits, told.misses, told.loads) == (sum(len(doc.choices) for doc in docs), 0, 0)
        assert not torch.equal(after, torch.get_rng_state())  # each pass draws, as the bare one's


def test_the_generator_goes_on_as_after_the_bare_call(model: Path, store_folder: Path) -> None:
    calls = {"loglikelihood": choices(), "greedy_until": prompts()}
    for method, docs in calls.items():
        torch.manual_seed(7)
        bare(model, method, docs)
        after = torch.get_rng_state()
        for _ in range(2):
            torch.manual_seed(7)
            run(store_folder, model, method, docs)
            assert torch.equal(torch.get_rng_state(), after)


def test_truncation_and_choices_without_tokens(model: Path, store_folder: Path) -> None:
    docs = choices()
    docs[4].choices[1] = ""
    for max_length in (40, 17):
        expected = bare(model, "loglikelihood", docs, max_length=max_length)
        for _ in range(2):
            answers, told = run(store_folder, model, "loglikelihood", docs, max_length=max_length)
            assert_same(answers, expected)
        assert told.misses == told.loads == 0 and told.uncacheable == {}


def test_some_documents_are_stored(model: Path, store_folder: Path) -> None:
    docs = choices(14)
    run(store_folder, model, "loglikelihood", docs[:5])
    answers, told = run(store_folder, model, "loglikelihood", docs, batch_size=64)
    assert told.hits == sum(len(doc.choices) for doc in docs[:5]) and told.misses > 0
    assert_same(answers, bare(model, "loglikelihood", docs, batch_size=64))


def test_single_documents_and_none(model: Path, store_folder: Path) -> None:
    for method, docs in (("loglikelihood", choices(1)), ("greedy_until", prompts(1))):
        expected = bare(model, method, docs)
        for _ in range(2):
            answers, told = run(store_folder, model, method, docs)
            assert_same(answers, expected)
        assert told.misses == told.loads == 0
        assert run(store_folder, model, method, [])[0] == []


def test_lm_eval_shares_its_entries(model: Path, store_folder: Path) -> None:
    HFLM = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm_eval (llm-evalcache[lm-eval])").HFLM
    docs = choices()
    with cached(store_folder) as told:
        lm = load(model)
        answers = lm.loglikelihood(docs)
        pairs = [lm.tok_encode_pair(doc.query, doc.choices, pairwise=True) for doc in docs]
        requests = [(None, *pair) for contexts, tails in pairs for pair in zip(contexts, tails, strict=True)]
        computed = told().misses
    with cached(store_folder) as told:
        scores = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)._loglikelihood_tokens(requests)
        # Of requests with one input and unequal continuations the harness says other things: those are its own.
        assert (told().hits + told().uncacheable.get("unsupported", 0), told().misses) == (len(requests), 0)
        assert told().hits > 0.9 * computed
    flat = [one for answer in answers for one in answer.logprobs]
    assert sum(abs(one - score) < 1e-5 for one, (score, _) in zip(flat, scores, strict=True)) >= told().hits


# --- generations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_generations_as_the_bare_client(model: Path, store_folder: Path, batch_size: int) -> None:
    docs = [*prompts(7), *prompts(5, seed=1, stop_sequences=[], generation_size=6)]
    for place, doc in enumerate(docs):
        doc.id = str(place)
    expected = bare(model, "greedy_until", docs, batch_size=batch_size)
    assert len({answer.text[0] for answer in expected}) > 6
    for turn in range(2):
        answers, told = run(store_folder, model, "greedy_until", docs, batch_size=batch_size)
        assert_same(answers, expected)
        assert (told.hits, told.misses, told.loads) == ((0, 12, 1) if turn == 0 else (12, 0, 0))


def test_a_larger_run_computes_the_rest_only(model: Path, store_folder: Path) -> None:
    docs = prompts(20)
    run(store_folder, model, "greedy_until", docs[:9])
    answers, told = run(store_folder, model, "greedy_until", docs)
    assert (told.hits, told.misses) == (9, 11)
    # Behind its stop string a row goes on for as long as its neighbours do, who were others when it was computed.
    assert_same(answers, bare(model, "greedy_until", docs), but="output_tokens")
    assert_same(run(store_folder, model, "greedy_until", docs)[0], answers)
    with cached(store_folder, match="strict") as told:
        assert_same(load(model).greedy_until(docs), bare_inside(model, docs))
        assert told().hits == 0


def bare_inside(folder: Path, docs: list[Any]) -> list[Any]:
    with contextlib.ExitStack() as stack:
        from evalcache.integrations import lighteval

        adapter, lighteval._adapter = lighteval._adapter, None
        stack.callback(setattr, lighteval, "_adapter", adapter)
        session = evalcache.session.current()
        policy, session.cache.policy = session.cache.policy, evalcache.records.Policy.OFF
        stack.callback(setattr, session.cache, "policy", policy)
        return bare(folder, "greedy_until", docs)


def test_the_tokens_that_a_row_may_have_depend_on_its_batch(model: Path, store_folder: Path) -> None:
    """Beside a long row there is less room."""
    docs = prompts(8, longest=40, stop_sequences=[], generation_size=64)
    lengths = []
    for batch_size in (8, 1):
        settings = {"batch_size": batch_size, "max_length": 100}
        expected = bare(model, "greedy_until", docs, **settings)
        lengths.append([len(answer.output_tokens[0]) for answer in expected])
        for _ in range(2):
            answers, told = run(store_folder, model, "greedy_until", docs, **settings)
            assert_same(answers, expected)
        assert told.misses == 0
    assert lengths[0] != lengths[1]


def test_an_automatic_batch_size_is_found_once(model: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_model, "STARTING_BATCH_SIZE", 8)
    docs = prompts(10)
    expected = bare(model, "greedy_until", docs, batch_size=None)
    for turn in range(2):
        answers, told = run(store_folder, model, "greedy_until", docs, batch_size=None)
        assert_same(answers, expected)
        assert told.loads == (turn == 0)


def test_a_script_shares_generations_that_only_the_end_id_stops(model: Path, store_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    docs = prompts(6, stop_sequences=[])
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    with cached(store_folder) as told:
        script = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        batch = tokenizer([doc.query for doc in docs], return_tensors="pt", padding=True)
        script.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=12,
            do_sample=False,
            renormalize_logits=True,  # as lighteval has it
            pad_token_id=tokenizer.eos_token_id,
        )
        assert told().misses == len(docs)
    answers, told = run(store_folder, model, "greedy_until", docs)
    assert (told.hits, told.misses) == (len(docs), 0)
    assert_same(answers, bare(model, "greedy_until", docs))


@pytest.mark.parametrize("samples", [1, 3])
def test_samples_are_one_call(model: Path, store_folder: Path, tmp_path: Path, samples: int) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True}))
    docs = prompts(6, num_samples=samples)
    how = {"generation_parameters": GenerationParameters(temperature=0.9, top_p=0.95)}
    torch.manual_seed(3)
    expected = bare(folder, "greedy_until", docs, **how)
    after = torch.rand(3)
    assert all(len(answer.text) == samples for answer in expected)
    for turn in range(2):
        torch.manual_seed(3)
        answers, told = run(store_folder, folder, "greedy_until", docs, **how)
        assert torch.equal(torch.rand(3), after)
        assert_same(answers, expected)
        assert (told.hits, told.misses, told.loads) == ((0, 1, 1) if turn == 0 else (1, 0, 0))
    torch.manual_seed(4)
    assert run(store_folder, folder, "greedy_until", docs, **how)[1].misses == 1


def test_chats(model: Path, store_folder: Path) -> None:
    calls = {"loglikelihood": choices(), "greedy_until": prompts()}
    for method, docs in calls.items():
        expected = bare(model, method, docs, override_chat_template=True, system_prompt="the cache keeps")
        for turn in range(2):
            answers, told = run(store_folder, model, method, docs, override_chat_template=True, system_prompt="the cache keeps")
            assert_same(answers, expected)
            assert told.uncacheable == {} and (told.misses == told.loads == 0) is (turn == 1)


def test_equal_documents_are_computed_once(model: Path, store_folder: Path) -> None:
    for method, make in (("loglikelihood", choices), ("greedy_until", prompts)):
        docs = [*make(5), *make(5)]
        for place, doc in enumerate(docs):
            doc.id = str(place)
        answers, told = run(store_folder, model, method, docs)
        assert told.misses <= told.duplicates > 0
        assert_same(answers, bare(model, method, docs), but="output_tokens" if method == "greedy_until" else "")


# --- what must not be served ----------------------------------------------------------------------------------------------


@needs_inotify
def test_the_weights_are_not_read_where_nothing_misses(model: Path, store_folder: Path) -> None:
    time.sleep(2.1)  # what is known of a file that is younger is not trusted, and read again
    calls = {"loglikelihood": choices(), "greedy_until": prompts()}
    cold = {method: run(store_folder, model, method, docs)[0] for method, docs in calls.items()}
    (file,) = model.glob("*.safetensors")
    with Opened(file) as opened:
        for method, docs in calls.items():
            answers, told = run(store_folder, model, method, docs)
            assert opened.count() == told.misses == told.loads == 0
            assert_same(answers, cold[method])
        load(model)
        assert opened.count() > 0  # the bare client does


def test_another_model_under_the_same_name_is_another_model(model: Path, store_folder: Path, tmp_path: Path) -> None:
    """The bare client serves the first one's answers as the second one's, for its own cache goes by names."""
    folder, docs = tmp_path / "model", choices()
    shutil.copytree(model, folder)
    run(store_folder, folder, "loglikelihood", docs)
    first = load(folder).loglikelihood(docs)
    assert remembered(folder)
    make_model(folder, seed=1)
    assert_same(load(folder).loglikelihood(docs), first)
    kept = {path: path.read_bytes() for path in remembered(folder)}
    with cached(store_folder) as told:
        answers = load(folder).loglikelihood(docs)
        assert told().hits == 0
    assert {path: path.read_bytes() for path in remembered(folder)} == kept
    expected = bare(folder, "loglikelihood", docs)
    assert_same(answers, expected)
    assert answers[0].logprobs != pytest.approx(first[0].logprobs)


class Halved(TransformersModel):
    """Answers in its own way."""

    def tok_encode_pair(self, context: str, continuations: list[str], pairwise: bool = False) -> Any:
        return super().tok_encode_pair("the " + context, continuations, pairwise)

    def tok_decode(self, tokens: Any) -> list[str]:
        return [text.upper() for text in super().tok_decode(tokens)]


def test_a_subclass_runs_bare(model: Path, store_folder: Path) -> None:
    for method, docs in (("loglikelihood", choices()), ("greedy_until", prompts())):
        expected = bare(model, method, docs, cls=Halved)
        run(store_folder, model, method, docs)
        answers, told = run(store_folder, model, method, docs, cls=Halved)
        assert_same(answers, expected)
        assert told.hits == told.misses == 0 and set(told.uncacheable) == {"unsupported"}


def test_a_patched_client_runs_bare(model: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = prompts()
    run(store_folder, model, "greedy_until", docs)
    monkeypatch.setattr(transformers_model.MultiTokenEOSCriteria, "__call__", lambda *_, **__: False)
    expected = bare(model, "greedy_until", docs)
    answers, told = run(store_folder, model, "greedy_until", docs)
    assert_same(answers, expected)
    assert (told.hits, told.uncacheable) == (0, {"unsupported": len(docs)})


@pytest.mark.parametrize("stops", [["<s>"], ["bcd", "ab"], ["abc", "b"], ["."]])
def test_text_that_depends_on_its_neighbours_runs_bare(model: Path, store_folder: Path, stops: list[str]) -> None:
    docs = prompts(6, stop_sequences=stops)
    expected = bare(model, "greedy_until", docs)
    for _ in range(2):
        answers, told = run(store_folder, model, "greedy_until", docs)
        assert_same(answers, expected)
        assert told.uncacheable == ({} if stops == ["."] else {"criterion": len(docs)})
    # Alone, a row has none.
    assert run(store_folder, model, "greedy_until", docs, batch_size=1)[1].uncacheable == {}


def test_rolling_log_likelihoods_are_the_clients_own(model: Path, store_folder: Path) -> None:
    """The tested version computes some, at the wrong places, and its own cache then drops them."""
    docs = [Doc("", [words.SENTENCES[0]], 0, id="0", task_name="ppl|0", sampling_methods=[SamplingMethod.PERPLEXITY])]
    expected = bare(model, "loglikelihood_rolling", docs, batch_size=1)
    with cached(store_folder) as told:
        assert load(model, batch_size=1).loglikelihood_rolling(docs) == expected == []
        assert (told().misses, told().uncacheable) == (0, {"unsupported": 1})
    forget(model)


def test_errors_come_out_as_they_are(model: Path, store_folder: Path) -> None:
    wrong = [
        ("loglikelihood", [Doc("the model", [" ".join(TEXTS * 3)], 0, id="0", task_name="mc|0")]),
        ("loglikelihood", [Doc("the model", [], 0, id="0", task_name="mc|0")]),
        ("greedy_until", prompts(3, num_samples=2)),
    ]
    for method, docs in wrong:
        with pytest.raises(Exception) as expected:
            bare(model, method, docs)
        with pytest.raises(type(expected.value)) as ours:
            run(store_folder, model, method, docs)
        assert str(ours.value) == str(expected.value)


def test_a_prepared_model_is_served_too(model: Path, store_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = TransformersModelConfig(model_name=str(model), batch_size=64, dtype="float32", device="cpu")
    calls = {"loglikelihood": choices(), "greedy_until": prompts()}
    for method, docs in calls.items():
        make = lambda: TransformersModel.from_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)  # noqa: E731
        forget(model)
        expected = getattr(make(), method)(docs)
        forget(model)
        for turn in range(2):
            with cached(store_folder) as told:
                assert_same(getattr(make(), method)(docs), expected)
                assert told().uncacheable == {} and (told().misses == told().loads == 0) is (turn == 1)


def test_a_seam_that_has_moved_is_one_warning(model: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = choices(2)
    expected = bare(model, "loglikelihood", docs)
    seams = LIGHTEVAL.seams["models/transformers/transformers_model.py"]
    monkeypatch.setitem(seams, "TransformersModel._generate", "self batch")
    with (
        pytest.warns(
            evalcache.EvalCacheWarning, match=r"lighteval .* runs without its adapter: TransformersModel._generate takes"
        ),
        cached(store_folder) as told,
    ):
        assert_same(load(model).loglikelihood(docs), expected)
        assert told().hits == told().misses == 0
    forget(model)


def test_the_seams_of_the_tested_version_are_where_they_were() -> None:
    assert version_of_client(LIGHTEVAL) in LIGHTEVAL.tested
    assert LIGHTEVAL.faults() == []


# --- the command that people type -----------------------------------------------------------------------------------------


def command(model: Path, documents: Path, output: Path, *before: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("lighteval_cli.py")
    environment = os.environ | {"LIGHTEVAL_DOCUMENTS": str(documents), "HF_DATASETS_OFFLINE": "1"}
    arguments = f"model_name={model},dtype=float32,batch_size=4,override_chat_template=False"
    tasks = "tiny_mc|0,tiny_letters|0,tiny_gen|0"
    options = ["--custom-tasks", str(script), "--output-dir", str(output), "--save-details"]
    whole = [*before, sys.executable, str(script), "accelerate", arguments, tasks, *options]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def written(output: Path) -> tuple[Any, dict[str, list[Any]]]:
    """Its results, and the details of each document."""
    import pandas

    (results,) = output.rglob("results_*.json")
    found = json.loads(results.read_text())
    details = {}
    for path in output.rglob("details_*.parquet"):
        rows = pandas.read_parquet(path).to_dict("records")
        details[path.name.split("_20")[0]] = json.loads(json.dumps(rows, default=lambda value: value.tolist()))
    return {name: found[name] for name in ("results", "versions")}, details


def assert_close(left: Any, right: Any) -> None:
    if isinstance(left, (list, tuple, dict)):
        assert type(left) is type(right) and len(left) == len(right)
        for name in left if isinstance(left, dict) else range(len(left)):
            assert_close(left[name], right[name])
    else:
        assert left == (pytest.approx(right, rel=1e-5, abs=1e-5) if isinstance(left, float) else right)


def test_the_command_line(model: Path, store_folder: Path, tmp_path: Path) -> None:
    make_tasks(tmp_path / "tasks")
    for name in ("tiny_mc", "tiny_letters", "tiny_gen"):
        (tmp_path / "documents" / name).mkdir(parents=True)
        shutil.copy(tmp_path / "tasks" / f"{name}.jsonl", tmp_path / "documents" / name / "test.jsonl")
    command(model, tmp_path / "documents", tmp_path / "bare")
    expected = written(tmp_path / "bare")
    assert set(expected[1]) == {"details_tiny_mc|0", "details_tiny_letters|0", "details_tiny_gen|0"}
    forget(model)
    for name in ("cold", "warm"):
        done = command(model, tmp_path / "documents", tmp_path / name, sys.executable, "-m", "evalcache", "run", "--")
        assert_close(written(tmp_path / name), expected)
        assert not remembered(model) and "evalcache" not in done.stdout
    assert "64 hits, 0 misses, 0 uncacheable" in done.stderr
    with duckdb.connect(str(store_folder / "ledger.duckdb"), read_only=True) as ledger:
        (run,) = ledger.execute("SELECT run FROM runs ORDER BY started_at DESC LIMIT 1").fetchone()
        assert ledger.execute("SELECT count(*) FROM model_loads WHERE run = ?", [run]).fetchone() == (0,)
        means = ledger.execute("SELECT task, avg(value) FROM scores WHERE run = ? GROUP BY task", [run]).fetchall()
        for task, mean in means:
            (score,) = [value for name, value in expected[0]["results"][task].items() if not name.endswith("_stderr")]
            assert mean == pytest.approx(score)
        counted = dict(ledger.execute("SELECT task, count(*) FROM documents GROUP BY task").fetchall())
        assert counted == {"tiny_mc|0": 8, "tiny_letters|0": 6, "tiny_gen|0": 8}
        asked = ledger.execute("SELECT count(DISTINCT document) FROM lookups WHERE run = ? AND task = 'tiny_mc|0'", [run])
        assert asked.fetchone() == (8,)
        assert ledger.execute("SELECT DISTINCT client FROM runs").fetchall() == [("lighteval",)]
