"""An eval loop of one's own: what is asked of the engine, what is kept, and what makes another answer."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from tiny import build, prompts
from words import train_tokenizer

import evalcache
import evalcache.asked as asked
from evalcache.audit import audit, summarise
from evalcache.cache import Cache
from evalcache.environment import device_name
from evalcache.errors import EvalCacheError
from evalcache.integrations import lazy
from evalcache.ledger import Ledger
from evalcache.prices import read_prices
from evalcache.store import Store

MODEL = evalcache.named("an-engine", version="1")


class Engine:
    """An engine of one's own: says a prompt backwards, and counts what it was asked. A library's object to whoever hashes it."""

    __slots__ = ("calls", "style")

    def __init__(self, style="-"):
        self.calls = []
        self.style = style

    def say(self, requests):
        self.calls.append(list(requests))
        return [f"{json.dumps(request)[::-1]}{self.style}" for request in requests]


ENGINE = Engine()


@pytest.fixture
def engine():
    ENGINE.calls.clear()
    return ENGINE


@pytest.fixture
def cache(tmp_path):
    opened = Cache(tmp_path / "cache")
    yield opened
    opened.close()


def say(requests):
    return ENGINE.say(requests)


def ask(cache, requests, **more):
    options = {"model": MODEL, "compute": say, "version": "1", "cache": cache} | more
    return evalcache.run(requests, **options)


REQUESTS = ["one", "two", "one", [{"role": "user", "content": "é?"}], {"b": 1, "a": [True, 1.0, None]}]


def test_only_what_is_missing_is_asked_equal_ones_once_in_order(tmp_path, engine, cache):
    bare = engine.say(REQUESTS)
    engine.calls.clear()
    assert ask(cache, REQUESTS) == bare
    assert engine.calls == [["one", "two", REQUESTS[3], REQUESTS[4]]]
    assert (cache.counts.hits, cache.counts.misses, cache.counts.duplicates) == (0, 4, 1)
    cache.close()
    again = Cache(tmp_path / "cache")
    assert ask(again, ["new", *REQUESTS]) == engine.say(["new"]) + bare
    assert engine.calls[1:] == [["new"], ["new"]]
    assert (again.counts.hits, again.counts.misses, again.counts.duplicates) == (4, 1, 1)
    assert again.counts.credited_seconds == pytest.approx(cache.counts.spent_seconds)
    again.close()


def test_all_hit_empty_and_single(cache, engine):
    assert ask(cache, []) == [] and engine.calls == []
    assert ask(cache, ["x"]) == ask(cache, ["x"])
    assert ask(cache, iter(["x"])) == ask(cache, ["x"])
    assert engine.calls == [["x"]]


@pytest.mark.parametrize(
    "other",
    [
        {"model": evalcache.named("an-engine", version="2")},
        {"model": evalcache.named("another", version="1")},
        {"settings": {"temperature": 0.5}},
        {"settings": {"temperature": None}},
        {"version": "2"},
        {"engine": "numpy"},
        {"compute": lambda requests: list(ENGINE.say(requests))},
    ],
    ids=["version of the model", "name", "setting", "setting of None", "version", "engine", "code"],
)
def test_whatever_shapes_the_answer_is_keyed(cache, engine, other):
    ask(cache, ["x"])
    ask(cache, ["x"], **other)
    ask(cache, ["x"], **other)
    assert len(engine.calls) == 2


@pytest.mark.parametrize(
    "left, right", [(1, 1.0), (1, True), ("1", 1), ([1], 1), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ("[1]", [1])]
)
def test_requests_that_are_not_the_same_share_nothing(cache, engine, left, right):
    ask(cache, [left])
    ask(cache, [right])
    assert len(engine.calls) == 2


def make(template, limit=3, tail=""):
    def fill(text):
        return template.format(text)

    def compute(requests):
        return [fill(request)[:limit] + tail for request in requests]

    return compute


def test_an_edited_template_and_anything_else_that_the_function_reaches_makes_it_another(cache):
    def of(compute):
        return ask(cache, ["word"], compute=compute, version=None)

    assert of(make("{}!!")) == ["wor"] and cache.counts.misses == 1
    assert of(make("{}!!")) == ["wor"] and (cache.counts.hits, cache.counts.misses) == (1, 1)
    for number, other in enumerate([make("say {}"), make("{}!!", 5), make("{}!!", tail="?")], 2):
        assert of(other) == other(["word"])
        assert cache.counts.misses == number


def test_an_object_that_cannot_be_hashed_needs_somebody_who_vouches_for_it(cache, engine):
    connection = socket.socket()

    def compute(requests):
        connection.getsockname()
        return requests

    with pytest.raises(EvalCacheError, match=r"an object of type socket\.socket") as refused:
        ask(cache, ["x"], compute=compute, version=None)
    assert "version=" in refused.value.hint
    assert ask(cache, ["x"], compute=compute, version="1") == ["x"]
    connection.close()
    with pytest.raises(EvalCacheError, match="version="):
        ask(cache, ["x"], version=" ")


def test_a_mere_name_is_never_a_model(cache, engine, tmp_path):
    with pytest.raises(EvalCacheError, match="no checkpoint here") as refused:
        ask(cache, ["x"], model="gpt-5")
    assert "evalcache.named('gpt-5', version='…')" in refused.value.hint
    with pytest.raises(EvalCacheError, match="not a Engine"):
        ask(cache, ["x"], model=engine)
    with pytest.raises(TypeError):
        evalcache.named("gpt-5")
    with pytest.raises(EvalCacheError, match="needs a version"):
        evalcache.named("gpt-5", version="")
    with pytest.raises(EvalCacheError, match="not installed"):
        ask(cache, ["x"], engine="no_such_engine")
    assert engine.calls == []


def test_answers_are_committed_as_they_are_yielded_and_kept_when_it_fails(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(asked, "COMMIT_S", 0.0)

    def compute(requests):
        for index in (2, 0, 1):
            if requests[index] == "b":
                raise ZeroDivisionError("the engine fell over")
            yield index, {"said": [requests[index], 1.5]}

    with pytest.raises(ZeroDivisionError, match="fell over"):
        ask(cache, ["a", "b", "c"], compute=compute)
    other = Cache(tmp_path / "cache")
    assert other.store.stats().entries == 2

    def fixed(requests):
        raise AssertionError(f"asked for {requests}")

    found = ask(other, ["c", "a"], compute=compute)
    assert found == [{"said": ["c", 1.5]}, {"said": ["a", 1.5]}]
    with pytest.raises(AssertionError):
        ask(other, ["a"], compute=fixed)
    other.close()


LOOP = """
import asyncio, json, sys, time
import evalcache
from evalcache.cache import Cache

mode, folder, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
asked = []


def slow(requests):
    asked.extend(requests)
    for index, request in enumerate(requests):
        time.sleep(0.05)
        yield index, f"answer to {request}"


async def slow_async(requests):
    asked.extend(requests)
    for index, request in enumerate(requests):
        await asyncio.sleep(0.05)
        yield index, f"answer to {request}"


async def ask_and_tick(requests, options):
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.02)

    beside = asyncio.create_task(tick())
    found = await evalcache.run_async(requests, compute=slow_async, **options)
    beside.cancel()
    assert max(b - a for a, b in zip(ticks, ticks[1:])) < 2.0, "the event loop was stopped"
    return found


requests = [f"question {number}" for number in range(first, last)]
cache = Cache(folder)
options = {"model": evalcache.named("an-engine", version="1"), "version": "1", "cache": cache}
print("READY", flush=True)
sys.stdin.readline()
found = asyncio.run(ask_and_tick(requests, options)) if mode == "async" else evalcache.run(requests, compute=slow, **options)
cache.close()
assert found == [f"answer to {request}" for request in requests]
print("DONE", json.dumps(asked), flush=True)
"""


@pytest.mark.parametrize("mode", ["plain", "async"])
def test_what_another_process_computes_is_left_to_it(tmp_path, mode):
    """Two loops with shared requests begin together: each request is computed by one of them."""
    (script := tmp_path / "loop.py").write_text(LOOP)
    Store(tmp_path / "cache" / "store").close()
    command = [sys.executable, str(script), mode, str(tmp_path / "cache")]
    loops = [
        subprocess.Popen([*command, *part], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for part in (("0", "40"), ("20", "60"))
    ]
    for loop in loops:
        assert loop.stdout.readline() == "READY\n", loop.communicate()[1]
    ended = [_begin(loop) for loop in loops]
    asked = []
    for loop, (out, err) in zip(loops, [loop.communicate(timeout=120) for loop in ended], strict=True):
        assert loop.returncode == 0, err
        asked += json.loads(out.split("DONE ")[1])
    assert sorted(asked) == sorted(f"question {number}" for number in range(60))


def _begin(loop):
    loop.stdin.write("go\n")
    loop.stdin.flush()
    return loop


def test_equal_requests_do_not_share_one_object(cache):
    first = ask(cache, ["a", "a"], compute=lambda requests: [["list"] for _ in requests])
    first[0].append("more")
    assert first == [["list", "more"], ["list"]]


@pytest.mark.parametrize(
    "compute, message",
    [
        (lambda requests: ["only one"], "returned 1 answers for 2"),
        (lambda requests: "ab", "returned a str"),
        (lambda requests: None, "returned a NoneType"),
        (lambda requests: ["a", None], "no answer to request 1"),
        (lambda requests: ["a", ("tuple",)], "a builtins.tuple"),
        (lambda requests: ["a", {1: 2}], "a builtins.dict"),
        (lambda requests: iter(["a", "b"]), "yielded a str"),
        (lambda requests: iter([(0, "a"), (0, "b")]), "answered request 0 of 2 twice"),
        (lambda requests: iter([(0, "a"), (2, "b")]), "answered request 2 of 2"),
        (lambda requests: iter([(1, "b")]), "answered 1 of 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_compute_that_breaks_its_word_is_told_so(cache, compute, message):
    with pytest.raises(EvalCacheError, match=message):
        ask(cache, ["x", "y"], compute=compute)


def test_requests_and_settings_that_are_no_json_are_refused_before_anything_is_asked(cache, engine):
    for request in (("a", "b"), {1: "a"}, {"image": object()}, b"bytes"):
        with pytest.raises(EvalCacheError, match="request 1"):
            ask(cache, ["x", request])
    with pytest.raises(EvalCacheError, match="settings"):
        ask(cache, ["x"], settings={"stop": ("a",)})
    assert engine.calls == []


def test_odd_text_comes_back_exactly(cache):
    odd = ["", "\ud800", "\0", "é\u2028", float("inf"), -0.0, 1 << 80, {"b": 1, "a": 2}, False, []]

    def echo(requests):
        return requests

    for _ in range(2):
        found = ask(cache, odd, compute=echo)
        assert json.dumps(found) == json.dumps(odd)  # the order of names, too
    assert cache.counts.hits == len(odd)


def test_draws_are_kept_each_under_its_number(cache):
    drawn = iter(range(100))
    model = evalcache.named("dice", version="1")

    def throw(requests, /, draw=drawn.__next__):
        return [f"{request} {draw()}" for request in requests]

    options = {"model": model, "compute": throw, "version": "1"}
    assert ask(cache, ["a", "b", "a"], **options) == ["a 0", "b 1", "a 0"]
    assert ask(cache, ["a", "b"], samples=2, **options) == [["a 0", "a 2"], ["b 1", "b 3"]]
    assert ask(cache, ["b", "a"], samples=3, **options) == [["b 1", "b 3", "b 4"], ["a 0", "a 2", "a 5"]]
    assert ask(cache, ["a"], samples=1, **options) == [["a 0"]]
    with pytest.raises(EvalCacheError, match="samples=0"):
        ask(cache, ["a"], samples=0)


def test_an_async_engine(cache):
    calls = []
    model = evalcache.named("async", version="1")

    async def compute(requests, calls=None):
        await asyncio.sleep(0)
        return [request.upper() for request in requests]

    async def stream(requests):
        for index, request in enumerate(requests):
            await asyncio.sleep(0)
            yield index, request.upper() + "!"

    assert ask(cache, ["a", "b"], model=model, compute=compute) == ["A", "B"]
    assert ask(cache, ["a", "b"], model=model, compute=stream) == ["A!", "B!"]

    async def main():
        options = {"model": model, "version": "1", "cache": cache}
        found = await asyncio.gather(*(evalcache.run_async([name, "a"], compute=compute, **options) for name in "cde"))
        with pytest.raises(EvalCacheError, match="event loop"):
            evalcache.run(["new"], compute=compute, **options)
        return found, await evalcache.run_async(["a", "z"], compute=stream, **options)

    assert asyncio.run(main()) == ([["C", "A"], ["D", "A"], ["E", "A"]], ["A!", "Z!"])
    assert cache.counts.misses == 2 + 2 + 3 + 1 and not calls


def test_the_decorator(cache, engine):
    @evalcache.cached(model=MODEL, version="1", cache=cache)
    def answer(requests, *, loud=False):
        """Says it."""
        return [text.upper() if loud else text for text in ENGINE.say(requests)]

    assert answer.__doc__ == "Says it." and answer.__name__ == "answer"
    assert answer(["x"]) == answer(["x"]) == ['"x"-']
    assert answer(["x"], loud=True) == answer(["x"], loud=True) == ['"X"-']
    assert len(engine.calls) == 2

    @evalcache.cached(model=lambda: MODEL, version="1", cache=cache, samples=2)
    async def later(requests):
        return ENGINE.say(requests)

    assert asyncio.run(later(["y"])) == [['"y"-', '"y"-']]


def test_a_live_module_is_its_weights_and_is_checked_before_and_after(cache, tmp_path):
    model = build("llama")
    batch = prompts(1)

    def generate(requests):
        ids = torch.tensor(requests)
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).tolist()

    asking = batch["input_ids"].tolist()
    first = ask(cache, asking, model=model, compute=generate, version=None)
    assert first == generate(asking)
    assert ask(cache, asking, model=model, compute=generate, version=None) == first and cache.counts.hits == 1
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    ask(cache, asking, model=model, compute=generate, version=None)
    assert (cache.counts.hits, cache.counts.misses) == (1, 2)
    model.generation_config.repetition_penalty = 1.5  # what a call without settings falls back to
    changed = ask(cache, asking, model=model, compute=generate, version=None)
    assert changed == generate(asking) and cache.counts.misses == 3

    def meddle(requests):
        with torch.no_grad():
            model.lm_head.weight.data[0, 0] += 1
        return ["meddled"] * len(requests)

    assert ask(cache, asking, model=model, compute=meddle, version=None) == ["meddled"]
    cache.flush()
    assert cache.counts.uncacheable == {"changed": 1}
    model.train()
    assert ask(cache, asking, model=model, compute=lambda requests: ["training"], version=None) == ["training"]
    assert cache.counts.uncacheable == {"changed": 1, "training": 1}


def test_the_device_is_known_of_a_live_model_alone(tmp_path):
    cache = Cache(tmp_path / "cache")
    ask(cache, ["of a live model"], model=build("llama"), compute=lambda requests: [str(one) for one in requests], version=None)
    ask(cache, ["of an engine"])
    cache.close()
    ledger = Ledger(tmp_path / "cache" / "ledger.duckdb")
    here = device_name("cpu")
    told = ledger.query("SELECT DISTINCT device FROM audit_requests WHERE outcome = 'miss' ORDER BY ALL").rows
    assert told == [(here,), (None,)]  # the engine's seconds are not taken for the model's device
    assert ledger.query("SELECT device, device_count FROM run_devices").rows == [(here, 1)]
    report = audit(ledger, by="device", prices=read_prices([f"{here}=1 EUR"]))
    assert report.missing_prices == ["device not known"] and report.total.figures["money_spent"] is None
    assert {row.group for row in report.rows} >= {here, None}


def test_the_seam_below_is_out_of_the_way(tmp_path):
    model = build("llama")
    ids = prompts(1)["input_ids"].tolist()

    def generate(requests):
        return model.generate(input_ids=torch.tensor(requests), max_new_tokens=2, do_sample=False).tolist()

    with evalcache.enable() as session:
        evalcache.run(ids, model=model, compute=generate)
        evalcache.run(ids, model=model, compute=generate)
        assert (session.cache.counts.hits, session.cache.counts.misses) == (1, 1)
        generate(ids)  # the user's own call is served again
        assert session.cache.counts.misses == 2


def save(folder, seed=0):
    build("llama", seed).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_is_its_files(cache, tmp_path, engine):
    folder = save(tmp_path / "model")
    ask(cache, ["x"], model=str(folder))
    ask(cache, ["x"], model=folder)
    ask(cache, ["x"], model=shutil.copytree(folder, tmp_path / "copy"))
    assert len(engine.calls) == 1
    (tmp_path / "copy" / "0123").mkdir()
    (tmp_path / "copy" / "0123" / "results.json").write_text("{}")
    ask(cache, ["x"], model=tmp_path / "copy")
    assert len(engine.calls) == 1
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    ask(cache, ["x"], model=folder)
    assert len(engine.calls) == 2
    ask(cache, ["x"], model=save(tmp_path / "other", seed=1))
    assert len(engine.calls) == 3


def test_a_file_is_its_bytes(cache, tmp_path, engine):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    ask(cache, ["x"], model=file)
    ask(cache, ["x"], model=shutil.copy(file, tmp_path / "copy.gguf"))
    assert len(engine.calls) == 1
    file.write_bytes(b"GGUF" + bytes(99) + b"\1")
    ask(cache, ["x"], model=file)
    assert len(engine.calls) == 2


def test_files_that_change_while_it_computes_store_nothing(cache, tmp_path):
    folder = save(tmp_path / "model")

    def swap(requests):
        save(folder, seed=1)
        return ["swapped"] * len(requests)

    assert ask(cache, ["x"], model=folder, compute=swap) == ["swapped"]
    cache.flush()
    assert cache.counts.uncacheable == {"changed": 1} and cache.store.stats().entries == 0


def test_two_models_in_two_roles_and_another_judge_keeps_the_candidates_hits(tmp_path):
    candidate = evalcache.named("candidate", version="1")

    def answer(requests):
        time.sleep(0.03)
        return [f"{request} is 4" for request in requests]

    def judge(requests):
        time.sleep(0.01)
        return [{"score": float(len(request["answer"]))} for request in requests]

    def evaluate(cache, judge_version):
        questions = ["2+2", "1+3"]
        answers = evalcache.run(questions, model=candidate, compute=answer, role="candidate", tasks="sums", cache=cache)
        pairs = [{"question": question, "answer": one} for question, one in zip(questions, answers, strict=True)]
        whose = evalcache.named("judge", version=judge_version)
        return evalcache.run(pairs, model=whose, compute=judge, role="judge", tasks="sums", documents=questions, cache=cache)

    told = []
    for version in ("1", "1", "2"):
        cache = Cache(tmp_path / "cache")
        assert evaluate(cache, version) == [{"score": 8.0}, {"score": 8.0}]
        told.append((cache.counts.hits, cache.counts.misses))
        assert len(cache.counts.models) == 2
        cache.close()
    assert told == [(0, 4), (4, 0), (2, 2)]
    ledger = Ledger(tmp_path / "cache" / "ledger.duckdb")
    rows = ledger.query(
        "SELECT role, count(DISTINCT model), count(*), min(seconds), any_value(task) FROM lookups "
        "WHERE run = (SELECT run FROM hits_by_run ORDER BY started_at DESC LIMIT 1) GROUP BY role ORDER BY role"
    ).rows
    assert [row[:3] for row in rows] == [("candidate", 1, 2), ("judge", 1, 2)]
    assert rows[0][3] > 0.014 and 0.004 < rows[1][3] < 0.014 and {row[4] for row in rows} == {"sums"}
    assert summarise(ledger, "last").hits == 2
    texts = ledger.query("SELECT DISTINCT text FROM outputs ORDER BY text").rows
    assert ("2+2 is 4",) in texts and ('{"score":8.0}',) in texts


def test_off_and_read_only_and_refresh(tmp_path, engine):
    off = Cache(tmp_path / "cache", policy="off")
    assert ask(off, ["x"]) == ask(off, ["x"]) and len(engine.calls) == 2
    assert sum(off.counts.uncacheable.values()) == 2
    off.close()
    for policy, calls in (("use", 3), ("read_only", 3), ("refresh", 4), ("replay", 4)):
        one = Cache(tmp_path / "cache", policy=policy)
        assert ask(one, ["x"]) == ['"x"-']
        assert len(engine.calls) == calls, policy
        one.close()


def test_strict_matching_keys_the_whole_call(tmp_path, engine):
    cache = Cache(tmp_path / "cache", match="strict")
    ask(cache, ["a", "b"])
    ask(cache, ["a", "b"])
    ask(cache, ["a"])
    assert engine.calls == [["a", "b"], ["a"]]
    cache.close()


SCRIPT = """
import sys
import evalcache
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()

@evalcache.cached(model=model, settings={"max_new_tokens": 6})
def answer(questions):
    batch = tokenizer(questions, return_tensors="pt", padding=True)
    output = model.generate(**batch, max_new_tokens=6, do_sample=False)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)

print(answer(["the model is", "what is the answer"]))
"""


def test_a_script_run_twice_hits_and_the_model_stays_asleep(tmp_path):
    folder = save(tmp_path / "model")
    script = tmp_path / "mine.py"
    script.write_text(textwrap.dedent(SCRIPT))
    said = []
    for _ in range(2):
        command = [sys.executable, "-m", "evalcache", "run", "--", sys.executable, str(script), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said.append((done.stdout, done.stderr.splitlines()[-1]))
    assert said[0][0] == said[1][0]
    assert said[0][1].startswith("evalcache: 0 hits, 2 misses, 0 uncacheable"), said
    assert said[1][1].startswith("evalcache: 2 hits, 0 misses, 0 uncacheable"), said
    from evalcache.folder import default_folder

    ledger = Ledger(default_folder() / "ledger.duckdb")
    assert summarise(ledger, "last").model_loads == 0


def test_what_wakes_as_another_model_is_asked_again(tmp_path):
    folder, other = save(tmp_path / "model"), save(tmp_path / "other", seed=5)
    from transformers import AutoModelForCausalLM

    def compute(requests):
        return ["said"] * len(requests)

    with evalcache.enable() as session:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        evalcache.run(["a"], model=model, compute=compute)
        sleeping = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert lazy.is_asleep(sleeping)
        assert evalcache.run(["a"], model=sleeping, compute=compute) == ["said"] and lazy.is_asleep(sleeping)
        shutil.copytree(other, folder, dirs_exist_ok=True)  # while it sleeps, as somebody else would, unseen
        hits = session.cache.counts.hits
        assert evalcache.run(["a", "b"], model=sleeping, compute=compute) == ["said", "said"]
        assert session.cache.counts.hits == hits  # of the promised model: not of this one
        assert session.cache.counts.misses == 1 + 2


def test_a_cache_that_cannot_be_opened_costs_nothing_but_the_reuse(tmp_path, monkeypatch, engine, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVALCACHE_DIR", str(tmp_path / "file"))
    try:
        found = evalcache.run(["x", "x"], model=MODEL, compute=say, version="1", samples=2)
    finally:
        evalcache.disable()
    assert found == [['"x"-', '"x"-']] * 2 and engine.calls == [["x", "x", "x", "x"]]
    assert "cannot open the cache" in capsys.readouterr().err
