"""Stored answers, computed again by the model itself: what is right is found right, and a planted answer is found."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import FIRST, NOON, make_action, make_result, write
from transformers import AutoModelForCausalLM

import evalcache
from evalcache.cache import Cache
from evalcache.canonical import decode
from evalcache.cli import main
from evalcache.comparing import TOLERANCE, compare_scores, what_differs
from evalcache.digest import Digest
from evalcache.drawing import bound_of_share, draw
from evalcache.errors import CheckpointError, UnknownNameError
from evalcache.integrations.scoring import Scoring, score_rows
from evalcache.ledger import Ledger
from evalcache.one_model import wrap
from evalcache.recompute import verify_checkpoint
from evalcache.records import (
    Action,
    Environment,
    Fields,
    Request,
    Result,
    pack_logprobs,
    pack_tokens,
    unpack_logprobs,
    unpack_tokens,
)
from evalcache.serving import Labels
from evalcache.store import Store

SAMPLED = "a batch that shares its key: sampling, scores, or settings that reach over rows"

ANOTHER = "computed in another environment: versions, dtype, device or kernels"


def fill(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A cache with greedy rows under several settings, log-likelihoods of two tasks, and one sampled batch."""
    model = tiny.build(name).to(dtype)
    cache = Cache(folder)
    wrap(model, cache)
    prompts = tiny.prompts(rows=5, width=10)
    model.generate(**prompts, max_new_tokens=8, do_sample=False)
    model.generate(**prompts, max_new_tokens=8, do_sample=False, repetition_penalty=1.3)
    model.generate(**tiny.prompts(rows=2, width=6, seed=3), max_new_tokens=4, min_new_tokens=2, num_beams=2)
    model.generate(**prompts, max_new_tokens=4, do_sample=True)
    if name != "t5":
        rows = [([3, 4, n], [n, 5, 6]) for n in range(10, 30)]
        score_rows(cache, model, rows, Scoring(), labels=Labels(["mmlu"] * 15 + ["arc"] * 5, [str(n) for n in range(20)]))
    cache.close()
    return model


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("recompute")
    return folder, fill(folder)


@pytest.fixture
def copied(filled, tmp_path) -> tuple[Path, torch.nn.Module]:
    """A copy that a test may spoil."""
    folder, model = filled
    with Store(folder / "store") as store:
        store.rows.query("PRAGMA wal_checkpoint(TRUNCATE)")
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy", model


def plant(folder: Path, kind: str, spoil) -> Digest:
    """Put another answer under the key of one entry of a kind, as a wrong hit would: frame and checksum are good."""
    with Store(folder / "store") as store:
        for key, _ in store.frames():
            question, entry = store.get_question(key), store.get(key)
            settings = Fields(decode(store.get_object(f"fields/{question.settings.hex}")))
            if question.kind != kind or settings.get("repetition_penalty", 1.0) != 1.0 or settings.get("num_beams", 1) != 1:
                continue
            environment = Environment(Fields(decode(store.get_object(f"fields/{question.environment.hex}"))), question.recorded)
            action = Action(question.model, Request(kind, question.tokens, settings, question.inputs), environment)
            store.commit([(key, action, spoil(entry.result))], run=entry.run, created_at=entry.created_at)
            return key
    raise AssertionError(kind)


def other_token(result: Result) -> Result:
    tokens = unpack_tokens(result.tokens).tolist()
    return Result(pack_tokens([*tokens[:2], (tokens[2] + 7) % 100 + 3, *tokens[3:]]), finish_reason=result.finish_reason)


def other_score(result: Result) -> Result:
    values = [-3.0] * (len(result.logprobs) // 8)
    return Result(logprobs=pack_logprobs(values), scalars=dict(result.scalars) | {"sum": sum(values)})


def other_greedy(result: Result) -> Result:
    return Result(logprobs=result.logprobs, scalars=dict(result.scalars) | {"is_greedy": not result.scalars["is_greedy"]})


def cut_short(result: Result) -> Result:
    return Result(result.tokens[:-4], finish_reason=result.finish_reason)


def other_reason(result: Result) -> Result:
    return Result(result.tokens, finish_reason="none")


# --- with a live model --------------------------------------------------------------------------------------------------------


def test_what_is_right_is_found_right_and_what_cannot_be_asked_again_is_counted(filled):
    folder, model = filled
    before = Store(folder / "store").stats().entries
    found = evalcache.verify(model, recompute=100, directory=folder)
    assert (found.entries, found.drawn, found.exact + found.drifted) == (33, 33, 32)
    assert found.refused == Counter({SAMPLED: 1}) and found.good and found.flips == 0
    assert found.max_drift <= TOLERANCE["float32"] and found.mean_drift <= found.max_drift and found.bound == 3 / 32
    told = found.to_json()
    assert (told["recomputed"], told["wrong"], told["not_recomputable"]) == (32, {}, {SAMPLED: 1})
    ledger = Ledger(folder / "ledger.duckdb")
    with Store(folder / "store") as store:
        assert store.stats().entries == before, "what was computed again is stored nowhere"
        ledger.sync(store)
    booked = ledger.query("SELECT seconds FROM overheads WHERE kind = 'recompute'").rows
    assert booked and booked[-1][0] == pytest.approx(found.seconds) and not ledger.query(
        "SELECT 1 FROM hits_by_run WHERE run IN (SELECT run FROM overheads WHERE kind = 'recompute') AND hits + misses > 0"
    ).rows  # fmt: skip


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_other_architectures(tmp_path, name):
    found = evalcache.verify(fill(tmp_path, name), directory=tmp_path)
    assert found.good and found.recomputed == found.entries - 1 and found.flips == 0


@pytest.mark.parametrize(
    ("kind", "spoil", "why"),
    [
        ("generate", other_token, "nats more likely"),
        ("generate", cut_short, "the same go on to"),
        ("generate", other_reason, "what is told of them"),
        ("loglikelihood", other_score, "nats apart"),
        ("loglikelihood", other_greedy, "is_greedy is stored"),
    ],
)
def test_a_planted_answer_is_found(copied, kind, spoil, why):
    folder, model = copied
    key = plant(folder, kind, spoil)
    found = evalcache.verify(model, directory=folder)
    assert not found.good and list(found.wrong) == [key] and why in found.wrong[key]
    assert found.bound == pytest.approx(bound_of_share(1, 32)) and found.recomputed == 32


def test_a_short_dtype_is_told_apart_too(tmp_path):
    model = fill(tmp_path, dtype=torch.bfloat16)
    found = evalcache.verify(model, directory=tmp_path)
    assert found.good and found.recomputed == 32
    key = plant(tmp_path, "generate", other_token)
    assert list(evalcache.verify(model, directory=tmp_path).wrong) == [key]


def test_what_another_batch_rounds_otherwise_is_drift(copied):
    folder, model = copied

    def rounded(result: Result) -> Result:
        return Result(logprobs=pack_logprobs(unpack_logprobs(result.logprobs) + 2e-6), scalars=result.scalars)

    plant(folder, "loglikelihood", rounded)
    found = evalcache.verify(model, directory=folder)
    assert found.good and found.drifted == 1 and found.max_drift == pytest.approx(2e-6, rel=0.1)


def test_inside_of_a_session_the_model_is_asked_and_not_the_session(copied, monkeypatch):
    folder, model = copied
    key = plant(folder, "generate", other_token)
    with evalcache.enable(str(folder)):
        found = evalcache.verify(model, directory=folder)
        assert list(found.wrong) == [key]


def test_another_model_has_no_entries_here(filled):
    with pytest.raises(UnknownNameError, match="no entry of this model"):
        evalcache.verify(tiny.build("llama", seed=1), directory=filled[0])


def test_another_environment_is_not_compared(copied):
    folder, model = copied
    torch.set_flush_denormal(True)
    try:
        found = evalcache.verify(model, directory=folder)
    finally:
        torch.set_flush_denormal(False)
    if torch.tensor(1e-310, dtype=torch.float64).item():  # where the processor has that setting
        assert found.recomputed == 0 and found.bound is None and found.good
        assert found.refused[ANOTHER] == 32 and found.refused[SAMPLED] == 1


def test_a_call_that_cannot_be_rebuilt_is_never_a_match(tmp_path):
    model = tiny.build("llama")
    cache = Cache(tmp_path)
    wrap(model, cache)
    prompts = tiny.prompts(rows=2, width=6)
    positions = prompts["attention_mask"].cumsum(1) + 3
    model.generate(**prompts, position_ids=positions, max_new_tokens=4, do_sample=False)
    cache.close()
    found = evalcache.verify(model, directory=tmp_path)
    assert (found.drawn, found.recomputed, found.refused) == (2, 0, {"its call cannot be rebuilt: another key came of it": 2})


def test_entries_of_others_are_left_out(copied):
    folder, model = copied
    with Store(folder / "store") as store:
        write(store, FIRST, NOON, [(make_action(prompt=(n,)), make_result()) for n in range(3)])
    found = evalcache.verify(model, recompute=4, seed=7, directory=folder)
    assert (found.entries, found.other_models, found.drawn) == (33, 3, 4)


# --- the draw and its bound ---------------------------------------------------------------------------------------------------


def test_the_draw_is_seeded_and_each_task_has_its_share():
    keys = [Digest(n.to_bytes(16, "big")) for n in range(1000)]
    tasks = {key.hex: "mmlu" if n < 700 else "arc" if n < 900 else "" for n, key in enumerate(keys)}
    drawn = draw(keys, 50, 3, tasks)
    assert Counter(tasks[key.hex] for key in drawn) == {"mmlu": 35, "arc": 10, "": 5} and len(set(drawn)) == 50
    assert draw(keys[::-1], 50, 3, tasks) == drawn and draw(keys, 50, 4, tasks) != drawn
    assert set(draw(keys, 5000, 0, tasks)) == set(keys)


@given(st.dictionaries(st.integers(0, 10**6), st.sampled_from(["a", "b", ""]), min_size=1, max_size=60), st.integers(1, 70))
def test_as_many_are_drawn_as_were_asked_for(numbers, count):
    keys = [Digest(n.to_bytes(16, "big")) for n in numbers]
    drawn = draw(keys, count, 0, {Digest(n.to_bytes(16, "big")).hex: task for n, task in numbers.items()})
    assert len(set(drawn)) == len(drawn) == min(count, len(keys)) and set(drawn) <= set(keys)


@given(st.integers(1, 400), st.data())
def test_the_bound_is_that_of_clopper_and_pearson(of, data):
    wrong = data.draw(st.integers(0, of))
    share = bound_of_share(wrong, of)
    assert wrong / of <= share <= 1
    if 0 < wrong < of:  # so few or fewer would then be seen once in twenty times
        chance = sum(torch.distributions.Binomial(of, torch.tensor(share, dtype=torch.float64)).log_prob(
            torch.arange(wrong + 1, dtype=torch.float64)).exp().tolist())  # fmt: skip
        assert chance == pytest.approx(0.05, rel=1e-3)


def test_numbers_that_are_none_are_compared():
    nan, inf = float("nan"), float("-inf")
    one = Result(logprobs=pack_logprobs([nan, inf]), scalars={"sum": nan, "is_greedy": False})
    assert compare_scores(one, one, "float32")[0] == "exact"
    for values in ([0.0, inf], [nan, 0.0], [nan]):
        assert compare_scores(one, Result(logprobs=pack_logprobs(values), scalars=one.scalars), "bfloat16")[0] == "wrong"
    assert what_differs(Result(pack_tokens([1, 2])), Result(pack_tokens([1, 3]))) == ""


# --- the verb -----------------------------------------------------------------------------------------------------------------


def test_the_verb_loads_the_model_as_it_was(tmp_path, store_folder, capsys):
    checkpoint = tmp_path / "checkpoint"
    tiny.build("llama").save_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    cache = Cache(store_folder)
    wrap(model, cache)
    model.generate(**tiny.prompts(rows=2, width=3), max_new_tokens=6, do_sample=False)
    cache.close()
    found = verify_checkpoint(None, 9, 0, store_folder, lambda done, total: None)
    assert found.recomputed == found.exact == 2 and found.bound == 1.0, "the folder that runs loaded it from is known"
    key = plant(store_folder, "generate", other_token)
    # In this process, whose settings of torch, whoever made them, are a part of what the entries were computed in.
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--recompute", "9", "--json", "--model", str(checkpoint)])
    assert ended.value.code == 1 and list(json.loads(capsys.readouterr().out)["wrong"]) == [str(key)]
    tiny.build("llama", seed=2).save_pretrained(tmp_path / "other")
    for folder, error in ((tmp_path / "other", UnknownNameError), (tmp_path / "absent", CheckpointError)):
        with pytest.raises(error):
            verify_checkpoint(str(folder), 9, 0, store_folder, lambda done, total: None)
    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(UnknownNameError, match="still there"):
        verify_checkpoint(None, 9, 0, store_folder, lambda done, total: None)
