"""transformers without a harness, which has no cache of its own: a plain script, and ``transformers serve``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from clients.harnesses import prompts
from clients.process import BIN, Ask, Client


class Script(Client):
    """A script that loads a model, generates in batches and draws one batch more. It knows nothing of evalcache."""

    name = "script"
    _SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, texts, out = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[4]
texts = texts[: int(sys.argv[3])]
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder).eval()

def ask(texts, **settings):
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    made = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=16, **settings)
    return tokenizer.batch_decode(made[:, batch.input_ids.shape[1]:], skip_special_tokens=True)

greedy = [answer for at in range(0, len(texts), 8) for answer in ask(texts[at : at + 8], do_sample=False)]
torch.manual_seed(1)
json.dump({"greedy": greedy, "sampled": ask(texts[:8], do_sample=True, temperature=0.8)}, open(out, "w"))
"""

    def __init__(self, folder: Path, documents: int) -> None:
        super().__init__(folder, documents)
        (folder / "ask.py").write_text(self._SCRIPT)
        (folder / "texts.json").write_text(json.dumps(prompts(documents)))

    def command(self, ask: Ask) -> list[str]:
        count = 1 if ask.one else self.documents
        return [sys.executable, "ask.py", str(self.model), "texts.json", str(count), str(ask.out / "answers.json")]

    def answers(self, ask: Ask) -> dict[str, list[Any]]:
        return json.loads((ask.out / "answers.json").read_text())


class Serve(Client):
    """``transformers serve``, from its start to its end by SIGTERM, asked one chat after the other."""

    name = "serve"
    exit_code = -signal.SIGTERM

    def __init__(self, folder: Path, documents: int) -> None:
        super().__init__(folder, documents)
        self._ports: dict[Path, int] = {}

    def command(self, ask: Ask) -> list[str]:
        self._ports[ask.out] = free_port()
        command = [str(BIN / "transformers"), "serve", str(self.model), "--device", "cpu", "--dtype", "float32"]
        return [*command, "--port", str(self._ports[ask.out])]

    def converse(self, ask: Ask, process: subprocess.Popen[bytes]) -> None:
        port = self._ports[ask.out]
        while True:
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            with contextlib.suppress(urllib.error.URLError, OSError):
                fetch(port, "/health")
                break
            time.sleep(0.05)
        said = [self._chat(port, text) for text in prompts(1 if ask.one else self.documents)]
        (ask.out / "answers.json").write_text(json.dumps({"chat": said}))
        process.send_signal(signal.SIGTERM)

    def answers(self, ask: Ask) -> dict[str, list[Any]]:
        return json.loads((ask.out / "answers.json").read_text())

    def _chat(self, port: int, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        asked = {"model": str(self.model), "messages": messages, "max_tokens": 16, "temperature": 0}
        answer = json.loads(fetch(port, "/v1/chat/completions", json.dumps(asked).encode()))
        return answer["choices"][0]["message"]["content"]


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def fetch(port: int, path: str, body: bytes | None = None) -> bytes:
    """What the server answers; with a body it is a POST."""
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return answer.read()
