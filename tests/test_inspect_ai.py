"""inspect_ai through its own entry points: what the bare `hf` provider answers, from the store where it is known."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import words
from harness_tasks import TEXTS, make_model
from opened import Opened

import evalcache
from evalcache.code import ORIGINAL
from evalcache.integrations.clients import INSPECT_AI, version_of_client

inspect_ai = pytest.importorskip("inspect_ai", reason="needs inspect_ai (llm-evalcache[inspect])")

import inspect_ai.model._providers.hf as hf  # noqa: E402
from inspect_ai import Task  # noqa: E402
from inspect_ai._eval.task.log import TaskLogger  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import GenerateConfig, get_model  # noqa: E402
from inspect_ai.scorer import includes, match  # noqa: E402
from inspect_ai.solver import generate  # noqa: E402

STOPS = ["what", "an", "s "]
KINDS = ("plain", "stopped")
COUNT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_model(tmp_path_factory.mktemp("inspect") / "model")
    time.sleep(2.1)  # what is known of a file that is younger is not trusted, and read again
    return made


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    yield
    for place, name in ((hf, "batched_generate"), (hf, "_generate_batch"), (TaskLogger, "log_finish")):
        assert not hasattr(getattr(place, name), ORIGINAL)


def prompts(count: int = COUNT) -> list[str]:
    """Of different lengths, so that batches are padded."""
    return [" ".join(TEXTS[(place + step) % 6] for step in range(1 + place % 3)) + f" {place}" for place in range(count)]


def task(kind: str = "plain", count: int = COUNT, **config: Any) -> Task:
    settings = {"max_tokens": 16, "max_connections": count} | ({"stop_seqs": STOPS} if kind == "stopped" else {}) | config
    samples = [Sample(id=place, input=text, target="9") for place, text in enumerate(prompts(count))]
    return Task(name=kind, dataset=samples, solver=generate(), scorer=[includes(), match()], config=GenerateConfig(**settings))


@dataclasses.dataclass
class Ran:
    """What an eval wrote, and what evalcache counted."""

    log: Any
    hits: int = 0
    misses: int = 0
    loads: int = 0
    duplicates: int = 0
    uncacheable: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def answers(self) -> list[Any]:
        """Everything that an answer may change."""
        return [
            (
                one.id,
                one.epoch,
                one.output.completion,
                one.output.choices[0].logprobs,
                {n: s.value for n, s in one.scores.items()},
            )
            for one in self.log.samples
        ]

    @property
    def marks(self) -> list[Any]:
        """How the log marks each call of the model: ``read`` or None."""
        return [event.cache for one in self.log.samples for event in one.events if event.event == "model"]

    @property
    def used(self) -> list[tuple[int, int]]:
        return [(one.output.usage.input_tokens, one.output.usage.output_tokens) for one in self.log.samples]


def provider(path: Path, name: str = "hf/local", seed: int | None = None, **model_args: Any) -> Any:
    settings = {"model_path": str(path), "device": "cpu", "do_sample": False} | model_args
    given = {name: value for name, value in settings.items() if value is not None}
    return get_model(name, memoize=False, config=GenerateConfig(seed=seed), **given)


def bare(path: Path, what: Task | list[Task], folder: Path, name: str = "hf/local", **more: Any) -> list[Ran]:
    answering = provider(path, name, more.pop("seed", None), **more.pop("model_args", {}))
    logs = inspect_ai.eval(what, model=answering, display="none", log_dir=str(folder / "logs"), max_tasks=4, **more)
    return [Ran(log) for log in logs]


def run(path: Path, what: Task | list[Task], folder: Path, policy: str | None = None, **more: Any) -> list[Ran]:
    """The same with evalcache on; every `Ran` has the counts of the whole run."""
    with evalcache.enable(policy=policy) as session:
        ran = bare(path, what, folder, **more)
        session.cache.flush()
        counts = session.cache.counts
        for one in ran:
            one.hits, one.misses, one.loads = counts.hits, counts.misses, counts.model_loads
            one.duplicates, one.uncacheable = counts.duplicates, dict(counts.uncacheable)
    return ran


def rows(path: Path, texts: list[str], **settings: Any) -> tuple[list[list[int]], Callable[..., Any]]:
    """A plain script: each prompt for itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if "stop_strings" in settings:
        settings["tokenizer"] = tokenizer
    found = []
    for text in texts:
        ids = tokenizer([text], return_tensors="pt")
        made = model.generate(
            input_ids=ids.input_ids, attention_mask=ids.attention_mask, do_sample=False, max_new_tokens=16, **settings
        )
        found.append(made[0, ids.input_ids.shape[1] :].tolist())
    return found, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def as_typed(path: Path, text: str) -> str:
    """A prompt as the provider makes it of one user message."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path).apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


def tasks() -> list[Task]:
    return [task(kind) for kind in KINDS]


# --- the main job -------------------------------------------------------------------------------------------------------


def test_cold_and_warm_answer_as_the_bare_provider(model: Path, tmp_path: Path) -> None:
    expected = bare(model, tasks(), tmp_path)
    assert expected[0].answers != expected[1].answers
    cold = run(model, tasks(), tmp_path)
    assert [one.answers for one in cold] == [one.answers for one in expected]
    assert [one.used for one in cold] == [one.used for one in expected]
    assert (cold[0].hits, cold[0].misses, cold[0].uncacheable) == (0, 2 * COUNT, {})
    with Opened(*model.glob("*.safetensors")) as opened:
        warm = run(model, tasks(), tmp_path)
        assert opened.count() == 0
    assert [one.log.status for one in warm] == ["success"] * 2
    assert [one.answers for one in warm] == [one.answers for one in expected]
    assert (warm[0].hits, warm[0].misses, warm[0].loads, warm[0].uncacheable) == (2 * COUNT, 0, 0, {})
    for before, after in zip(cold, warm, strict=True):
        assert set(before.marks) == {None} and set(after.marks) == {"read"}
        # A batch counts its own width for each of its rows; a row that was stored counts its own tokens.
        assert all(mine[0] <= theirs[0] and mine[1] <= theirs[1] for mine, theirs in zip(after.used, before.used, strict=True))
        assert max(mine[0] for mine in after.used) == before.used[0][0]
        assert [one.output.stop_reason for one in after.log.samples] == [one.output.stop_reason for one in before.log.samples]
        assert [event for one in after.log.samples for event in one.events if event.event == "logger"] == []


def test_no_answer_waits_in_the_queue(model: Path, tmp_path: Path) -> None:
    run(model, task(count=3), tmp_path)
    (warm,) = run(model, task(count=3), tmp_path)
    times = [event.working_time for one in warm.log.samples for event in one.events if event.event == "model"]
    assert warm.hits == 3 and max(times) < 0.9  # the queue is asked once a second


def test_some_are_stored_and_epochs_ask_again(model: Path, tmp_path: Path) -> None:
    (first,) = run(model, task(count=1), tmp_path)
    assert (first.hits, first.misses) == (0, 1)
    expected = bare(model, task(), tmp_path)[0].answers
    (ran,) = run(model, task(), tmp_path, epochs=2)
    assert (ran.misses, ran.hits + ran.duplicates) == (COUNT - 1, COUNT + 1)
    assert sorted((i, text) for i, _, text, *_ in ran.answers) == sorted([(i, text) for i, _, text, *_ in expected] * 2)
    assert ran.marks.count("read") == COUNT + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_script_and_an_eval_share_their_rows(model: Path, tmp_path: Path, kind: str) -> None:
    settings = {"stop_strings": STOPS} if kind == "stopped" else {}
    texts = [as_typed(model, text) for text in prompts(8)]
    expected, decode = rows(model, texts, **settings)
    if kind == "stopped":
        assert any(row[-1] != 2 and len(row) < 16 for row in expected), "no row is stopped by a string"
    (ran,) = run(model, task(kind, 8), tmp_path)
    assert [text for _, _, text, *_ in ran.answers] == [decode(row) for row in expected]
    with evalcache.enable() as session:
        found, _ = rows(model, texts, **settings)
        assert (session.cache.counts.hits, session.cache.counts.misses, session.cache.counts.model_loads) == (8, 0, 0)
    assert found == expected
    shutil.rmtree(os.environ["EVALCACHE_DIR"])
    with evalcache.enable():
        rows(model, texts, **settings)
    (ran,) = run(model, task(kind, 8), tmp_path)
    assert (ran.hits, ran.misses) == (8, 0)
    assert [text for _, _, text, *_ in ran.answers] == [decode(row) for row in expected]


# --- what must not be served row by row ----------------------------------------------------------------------------------


def test_samples_are_drawn_as_bare(model: Path, tmp_path: Path) -> None:
    """They belong to their batch and its generator: none is served to another batch."""
    ask = {"model_args": {"do_sample": None}, "seed": 7}  # sampling is what the provider does by default
    one, two = task(count=4, temperature=0.8), task(count=3, temperature=0.8)
    (expected,) = bare(model, one, tmp_path, **ask)
    for _ in range(2):
        (ran,) = run(model, one, tmp_path, **ask)
        assert ran.answers == expected.answers and set(ran.marks) == {None}
        assert ran.uncacheable == {}
    assert ran.misses == 0  # the same batch with the same generator, as a whole
    (other,) = run(model, two, tmp_path, **ask)
    assert other.hits == 0 and other.answers == bare(model, two, tmp_path, **ask)[0].answers
    (seeded,) = run(model, one, tmp_path, **(ask | {"seed": 8}))
    assert seeded.hits == 0 and seeded.answers != expected.answers


def test_log_probabilities_are_exact(tmp_path: Path) -> None:
    # A token for every id, whose names the provider asks for.
    model = make_model(tmp_path / "model", vocab_size=len(words.train_tokenizer(TEXTS, 384)))
    what = task(count=4, logprobs=True, top_logprobs=2)
    (expected,) = bare(model, what, tmp_path)
    assert expected.answers[0][3] is not None
    run(model, task(count=4), tmp_path)  # the same rows without
    for _ in range(2):
        (ran,) = run(model, what, tmp_path)
        assert ran.answers == expected.answers and set(ran.marks) == {None}


def test_another_model_under_the_same_name_is_another_model(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(model, place)
    run(place, task(count=3), tmp_path)
    shutil.rmtree(place)
    make_model(place, seed=1)
    (ran,) = run(place, task(count=3), tmp_path)
    assert (ran.hits, ran.misses) == (0, 3)
    assert ran.answers == bare(place, task(count=3), tmp_path)[0].answers


def edited(model: Path, folder: Path, **settings: Any) -> Path:
    """A copy whose generation config has other settings."""
    shutil.copytree(model, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_padding_that_shows_in_texts_is_left_to_the_batch(model: Path, tmp_path: Path) -> None:
    """The provider decodes whole rows of a batch: with such padding a text says how long its neighbours were."""
    shown = edited(model, tmp_path / "shown", pad_token_id=70, eos_token_id=[2, *range(100, 160)])
    (expected,) = bare(shown, task(count=6), tmp_path)
    assert len({len(text) for _, _, text, *_ in expected.answers}) > 1
    for _ in range(2):
        (ran,) = run(shown, task(count=6), tmp_path)
        assert ran.answers == expected.answers and set(ran.marks) <= {None, "read"}


def test_stop_strings_without_an_end_id_run_bare(model: Path, tmp_path: Path) -> None:
    endless = edited(model, tmp_path / "endless", eos_token_id=None)
    config = json.loads((endless / "config.json").read_text()) | {"eos_token_id": None}
    (endless / "config.json").write_text(json.dumps(config))
    (expected,) = bare(endless, task("stopped", 6), tmp_path)
    for _ in range(2):
        (ran,) = run(endless, task("stopped", 6), tmp_path)
        assert ran.answers == expected.answers
        assert (ran.hits, ran.misses, ran.uncacheable) == (0, 0, {"criterion": 6})


def test_errors_come_out_as_they_are(model: Path) -> None:
    def fail() -> str:
        with pytest.raises(ValueError) as raised:
            asyncio.run(
                provider(model, do_sample=True).generate("the cache", config=GenerateConfig(max_tokens=4, temperature=0.0))
            )
        assert raised.value.__context__ is None
        return str(raised.value)

    expected = fail()
    assert "temperature" in expected
    with evalcache.enable():
        assert fail() == expected


def test_a_replayed_miss_is_an_error_of_its_sample(model: Path, tmp_path: Path) -> None:
    run(model, task(count=2), tmp_path)
    (ran,) = run(model, task(count=3), tmp_path, policy="replay", fail_on_error=False)
    assert [one.error is None for one in ran.log.samples] == [True, True, False]
    assert "ReplayMissError" in ran.log.samples[2].error.traceback and ran.loads == 0


# --- the provider by name ------------------------------------------------------------------------------------------------


def test_the_provider_by_name_serves_its_own_model_only(model: Path, tmp_path: Path) -> None:
    import evalcache.inspect_provider

    (expected,) = bare(model, task(), tmp_path)
    for number in range(2):
        with Opened(*model.glob("*.safetensors")) as opened:
            (ran,) = bare(model, task(), tmp_path, name="evalcache/hf/local")
            assert (opened.count() == 0) == bool(number)
        assert ran.answers == expected.answers and ran.log.eval.model == "evalcache/hf/local"
        assert set(ran.marks) == {"read" if number else None}
        if number:
            assert set(bare(model, task(count=2), tmp_path)[0].marks) == {None}  # another one, loaded by its own name
        session = evalcache.session.current()
        assert (session.cache.counts.hits, session.cache.counts.misses) == ((COUNT, 0) if number else (0, COUNT))
        evalcache.disable()
    with pytest.raises(Exception, match="evalcache serves the hf provider"):
        get_model("evalcache/openai/x", memoize=False)
    evalcache.disable()


def test_the_entry_point_is_declared() -> None:
    import importlib
    import tomllib

    declared = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    (module,) = declared["project"]["entry-points"]["inspect_ai"].values()
    assert importlib.import_module(module)


# --- the ledger, the seams -----------------------------------------------------------------------------------------------


def test_the_ledger_knows_tasks_samples_and_scores(model: Path, tmp_path: Path, store_folder: Path) -> None:
    run(model, task(), tmp_path, epochs=2)
    (ran,) = run(model, task(), tmp_path, epochs=2)
    with duckdb.connect(str(store_folder / "ledger.duckdb"), read_only=True) as ledger:
        (last,) = ledger.execute("SELECT run FROM runs ORDER BY started_at DESC LIMIT 1").fetchone()
        assert ledger.execute("SELECT DISTINCT client FROM runs").fetchall() == [("inspect_ai",)]
        means = dict(ledger.execute("SELECT metric, avg(value) FROM scores WHERE run = ? GROUP BY metric", [last]).fetchall())
        assert means == {s.name: pytest.approx(s.metrics["accuracy"].value) for s in ran.log.results.scores}
        assert 0 < means["includes"] < 1
        (scored,) = ledger.execute("SELECT count(*) FROM scores WHERE run = ?", [last]).fetchone()
        assert scored == 2 * 2 * COUNT
        labelled = "SELECT run = ?, task, count(DISTINCT document) FROM lookups GROUP BY ALL ORDER BY ALL"
        assert ledger.execute(labelled, [last]).fetchall() == [(False, "plain", COUNT), (True, "plain", COUNT)]
        assert ledger.execute("SELECT count(*) FROM documents").fetchone() == (COUNT,)


def test_a_seam_that_has_moved_is_one_warning(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INSPECT_AI.seams["model/_providers/hf.py"], "batched_generate", "request")
    with pytest.warns(evalcache.EvalCacheWarning, match=r"inspect_ai .* runs without its adapter: batched_generate takes"):
        (ran,) = run(model, task(count=2), tmp_path)
    assert (ran.log.status, ran.misses) == ("success", 2)  # `generate` itself is served


def test_the_seams_of_the_tested_version_are_where_they_were() -> None:
    assert version_of_client(INSPECT_AI) in INSPECT_AI.tested
    assert INSPECT_AI.faults() == []


# --- processes --------------------------------------------------------------------------------------------------------------

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def tiny():
    samples = [Sample(id=n, input=text, target="9") for n, text in enumerate({texts!r})]
    return Task(dataset=samples, solver=generate(), scorer=includes(), config=GenerateConfig(max_tokens=16))
"""
LAUNCH = "import sys; from evalcache.cli import main; main(['run', '--', *sys.argv[1:]])"


def test_the_command_that_people_type(model: Path, tmp_path: Path, store_folder: Path) -> None:
    (tmp_path / "tiny.py").write_text(TASK.format(texts=prompts(4)))
    program = Path(sys.executable).parent / "inspect"
    command = [str(program), "eval", "tiny.py", "--model", "hf/local", "--display", "plain"]
    command += ["-M", f"model_path={model}", "-M", "device=cpu", "-M", "do_sample=false"]
    expected = run(model, task(count=4), tmp_path)[0]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, *command],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env=os.environ | {"EVALCACHE_DIR": str(store_folder), "INSPECT_LOG_DIR": str(tmp_path / "typed")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "evalcache" not in done.stdout
    assert re.fullmatch(r"evalcache: 4 hits, 0 misses.*", done.stderr.strip().splitlines()[-1])
    from inspect_ai.log import list_eval_logs, read_eval_log

    (written,) = list_eval_logs(str(tmp_path / "typed"))
    ran = Ran(read_eval_log(written))
    assert [answer[2] for answer in ran.answers] == [answer[2] for answer in expected.answers]
    assert ran.marks == ["read"] * 4
    with duckdb.connect(str(store_folder / "ledger.duckdb"), read_only=True) as ledger:
        (last,) = ledger.execute("SELECT run FROM runs ORDER BY started_at DESC LIMIT 1").fetchone()
        assert ledger.execute("SELECT count(*) FROM scores WHERE run = ?", [last]).fetchone() == (4,)
