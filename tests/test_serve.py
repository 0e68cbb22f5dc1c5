"""`evalcache run -- transformers serve`: a real server, asked as its clients ask it, and ended as people end it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import build
from words import train_tokenizer

from evalcache.audit import summarise
from evalcache.ledger import Ledger
from evalcache.store import Store

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("uvicorn", "fastapi", "openai")),
    reason="needs a server and who asks it (llm-evalcache[test])",
)

ASKED = [{"role": "user", "content": "what is the answer to the first question"}]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def serving(model, folder, *prefix):
    """A server of its own; yields its client and, once it has ended, its exit code and what it said last."""
    port = free_port()
    command = [*prefix, str(Path(sys.executable).parent / "transformers"), "serve", str(model), "--device", "cpu"]
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--dtype", "float32", "--port", str(port)], stdout=out, stderr=subprocess.STDOUT, cwd=folder
        )
    ended = {}
    try:
        from openai import OpenAI

        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            time.sleep(0.2)
        yield OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60), ended
        server.send_signal(signal.SIGTERM)
        ended["code"] = server.wait(60)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        ended["log"] = log.read_text()
    said = [line for line in ended["log"].splitlines() if line.startswith("evalcache")]
    ended["said"] = said


def ask(client, model, turn):
    """What a client gets: texts, why they ended, how the stream was cut."""
    chat = {"model": str(model), "messages": ASKED, "max_tokens": 24, "temperature": 0}
    text = {"model": str(model), "prompt": "the cache keeps", "max_tokens": 12, "temperature": 0}
    plain = client.chat.completions.create(**chat)
    told = [plain.choices[0].message.content, plain.choices[0].finish_reason, plain.usage.prompt_tokens]
    told.append(plain.usage.completion_tokens)
    parts = list(client.chat.completions.create(**chat, stream=True))
    told.append([part.choices[0].delta.content for part in parts if part.choices])
    told.append([part.choices[0].finish_reason for part in parts if part.choices])
    stopped = client.completions.create(**text, stop=["e"])
    told += [stopped.choices[0].text, stopped.choices[0].finish_reason]
    # Streamed first, plain after it.
    told.append([part.choices[0].text for part in client.completions.create(**text, stream=True) if part.choices])
    told.append(client.completions.create(**text).choices[0].text)

    def one(number):
        asked = [{"role": "user", "content": f"question {number}"}]
        return client.chat.completions.create(**chat | {"messages": asked, "max_tokens": 8}).choices[0].message.content

    with ThreadPoolExecutor(3) as pool:
        told.append(list(pool.map(one, range(3))))
    return told


DISTINCT = 1 + 1 + 1 + 3  # of the nine requests of a turn, two are streamed twins


def leave_early(client, model):
    """Reads the first words of a stream, and goes. Says what the whole answer would have been."""
    asked = {"model": str(model), "prompt": "nothing is kept", "max_tokens": 200, "temperature": 0}
    stream = client.completions.create(**asked, stream=True)
    next(iter(stream))
    stream.close()
    return asked


def test_a_server_cold_and_warm(tmp_path, store_folder):
    model = tmp_path / "model"
    build("llama").save_pretrained(model)
    train_tokenizer().save_pretrained(model)
    config = model / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 127}))  # which it hardly ever says
    ours = (sys.executable, "-m", "evalcache", "run", "--")
    assert "EVALCACHE_RUN" not in os.environ

    with serving(model, tmp_path) as (client, ended):
        bare = ask(client, model, 0)
        whole = client.completions.create(**leave_early(client, model)).choices[0].text
    assert ended["code"] == -signal.SIGTERM and ended["said"] == []

    with serving(model, tmp_path, *ours) as (client, ended):
        assert ask(client, model, 0) == bare
        asked = leave_early(client, model)
        time.sleep(1)
        assert ask(client, model, 1) == bare
        with contextlib.closing(Store(store_folder / "store")) as store:
            assert store.stats().entries == DISTINCT, "the answer that nobody waited for was stored"
        assert client.completions.create(**asked).choices[0].text == whole
    assert ended["code"] == -signal.SIGTERM, "it ends as it would have"
    assert len(ended["said"]) == 1, ended["log"]
    assert ended["said"][0].startswith(f"evalcache: {2 + 8} hits, {DISTINCT + 1} misses, 0 uncacheable, 0 dup"), ended["said"]

    with serving(model, tmp_path, *ours) as (client, ended):
        assert ask(client, model, 0) == bare
        parts = list(client.completions.create(**asked, stream=True))
        assert "".join(part.choices[0].text or "" for part in parts if part.choices) == whole
    assert ended["code"] == -signal.SIGTERM
    assert ended["said"][0].startswith("evalcache: 9 hits, 0 misses, 0 uncacheable"), ended["log"]
    found = summarise(Ledger(store_folder / "ledger.duckdb"), "last")  # nobody has synced since
    assert (found.status, found.hits, found.misses, found.model_loads) == ("interrupted", 9, 0, 0)


def test_asking_for_what_a_model_does_not_have_leaves_it_asleep(tmp_path, store_folder):
    from transformers import AutoModelForCausalLM

    import evalcache
    from evalcache.integrations.lazy import is_asleep

    build("llama").save_pretrained(tmp_path / "model")
    with evalcache.enable():
        real = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert is_asleep(model)
        assert not hasattr(model, "has_talker") and not hasattr(model, "__wrapped__") and is_asleep(model)
        with pytest.raises(AttributeError) as bare:
            real.has_talker  # noqa: B018
        with pytest.raises(AttributeError) as asleep:
            model.has_talker  # noqa: B018
        assert str(bare.value) == str(asleep.value) and is_asleep(model)
        assert hasattr(model, "lm_head") and not is_asleep(model)
        assert not hasattr(model, "has_talker")
