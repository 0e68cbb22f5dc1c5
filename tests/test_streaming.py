"""Streamed calls: what a streamer is shown of a stored answer is what the engine would have shown it."""

from __future__ import annotations

import threading

import pytest
import torch
from served import assert_same, served
from tiny import build, prompts
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer
from words import train_tokenizer

WORDS = train_tokenizer()
ONE = prompts(1)
SHOWN = []


@pytest.fixture
def shown(monkeypatch):
    """What every TextStreamer was shown, in order; the classes stay transformers' own."""
    SHOWN.clear()
    put, end = TextStreamer.put, TextStreamer.end

    def put_seen(self, value):
        SHOWN.append((value.dtype, tuple(value.shape), value.device.type, value.tolist()))
        return put(self, value)

    def end_seen(self):
        SHOWN.append("end")
        return end(self)

    monkeypatch.setattr(TextStreamer, "put", put_seen)
    monkeypatch.setattr(TextStreamer, "end", end_seen)
    return SHOWN


CALLS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0},
    "a stop string": {"do_sample": False, "stop_strings": ["e"], "tokenizer": WORDS},
    "a dict with scores": {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
    "one token": {"do_sample": False, "max_new_tokens": 1},
}


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("name", CALLS)
def test_a_stored_answer_is_shown_as_the_engine_shows_it(tmp_path, shown, capsys, architecture, name):
    model = build(architecture)

    def call(**more):
        torch.manual_seed(3)
        return model.generate(**ONE, **({"max_new_tokens": 8} | CALLS[name]), **more)

    bare = call(streamer=TextStreamer(WORDS))
    expected, printed = list(shown), capsys.readouterr().out
    assert expected[0][1] == tuple(ONE["input_ids"].shape) if architecture == "llama" else expected[0][1] == (1, 1)
    assert expected[-1] == "end" and len(expected) > 2
    with served(tmp_path) as cache:
        _, told = cache.ask(call)  # not streamed
        assert told.misses == 1
        for _ in range(2):
            shown.clear()
            answer, told = cache.ask(call, streamer=TextStreamer(WORDS))
            assert (told.hits, told.misses, told.uncacheable) == (1, 0, {})
            assert_same(bare, answer)
            assert shown == expected and capsys.readouterr().out == printed


def test_a_streamed_call_is_stored_and_answers_the_plain_one(tmp_path, shown):
    model = build("llama")
    with served(tmp_path) as cache:
        streamed, told = cache.ask(model.generate, **ONE, max_new_tokens=8, do_sample=False, streamer=TextStreamer(WORDS))
        assert told.misses == 1 and shown
        plain, told = cache.ask(model.generate, **ONE, max_new_tokens=8, do_sample=False)
        assert told.hits == 1 and torch.equal(streamed, plain)


def test_an_iterator_in_another_thread_is_told_the_end(tmp_path):
    model = build("llama")
    said = []
    with served(tmp_path) as cache:
        for _ in range(2):
            streamer = TextIteratorStreamer(WORDS, skip_prompt=True, timeout=20)
            arguments = {**ONE, "streamer": streamer, "max_new_tokens": 8, "do_sample": False}
            thread = threading.Thread(target=model.generate, kwargs=arguments)
            thread.start()
            said.append("".join(streamer))
            thread.join()
        cache.cache.flush()
        assert said[0] == said[1] and cache.cache.counts.hits == 1


class Left(Exception):
    """The reader of a stream is gone."""


@pytest.mark.parametrize("after", [1, 3, 99])
def test_a_cancelled_generation_is_not_stored_and_what_the_streamer_raises_comes_out(tmp_path, monkeypatch, after):
    model = build("llama")
    seen = []
    put = TextStreamer.put

    def leave(self, value):
        seen.append(value)
        if len(seen) > after:
            raise Left
        return put(self, value)

    def stream():
        seen.clear()
        return model.generate(**ONE, max_new_tokens=8, do_sample=False, streamer=TextStreamer(WORDS))

    monkeypatch.setattr(TextStreamer, "put", leave)
    with served(tmp_path) as cache:
        if after < 99:
            with pytest.raises(Left) as raised:
                cache.ask(stream)
            assert raised.value.__context__ is None
            cache.cache.flush()
            assert cache.cache.store.stats().entries == 0
            _, told = cache.ask(model.generate, **ONE, max_new_tokens=8, do_sample=False)
            assert (told.hits, told.misses) == (0, 1)
            with pytest.raises(Left):  # from the store, likewise
                cache.ask(stream)
        else:
            cache.ask(stream)
            assert cache.cache.store.stats().entries == 1


class Mine(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


def test_what_is_not_known_to_only_show_runs_bare(tmp_path):
    model = build("llama")
    patched = TextStreamer(WORDS)
    patched.put = lambda value: None
    with served(tmp_path) as cache:
        for streamer in (Mine(), patched, type("TextStreamer", (TextStreamer,), {})(WORDS)):
            _, told = cache.ask(model.generate, **ONE, max_new_tokens=4, do_sample=False, streamer=streamer)
            assert told.uncacheable == {"streamer": 1}


def test_what_the_engine_refuses_to_stream_fails_as_it_would(tmp_path):
    model = build("llama")
    calls = [({**ONE, "num_beams": 2}, "beam"), (prompts(2), "batch size 1")]
    with served(tmp_path) as cache:
        for arguments, message in calls:
            cache.ask(model.generate, **arguments, max_new_tokens=4, do_sample=False)
            with pytest.raises(ValueError, match=message):
                cache.ask(model.generate, **arguments, max_new_tokens=4, do_sample=False, streamer=TextStreamer(WORDS))
