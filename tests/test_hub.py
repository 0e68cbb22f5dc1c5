"""Models by their name on a hub: its branch moves, and a model that sleeps must be the one that a load would bring.

The hub here is a mock, for none can be reached: it answers what huggingface_hub asks for a repository with one branch.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

SCRIPT = """
import json, sys
import evalcache
import torch
import transformers

session = evalcache.enable()
load = getattr(transformers, sys.argv[1]).from_pretrained
model = load("somebody/model")
ids = torch.arange(3, 11).view(2, 4)
out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
counts = session.cache.counts
print(json.dumps([out.tolist(), counts.hits, counts.misses, counts.model_loads]))
"""


class Hub:
    """One repository with one branch. ``move`` sets what the branch is now."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                parts = self.path.split("?")[0].strip("/").split("/")
                data, kind = None, "application/octet-stream"
                if parts[:2] == ["api", "models"]:
                    data, kind = (
                        json.dumps({"id": "somebody/model", "sha": hub.commit, "siblings": []}).encode(),
                        "application/json",
                    )
                    if len(parts) > 4 and parts[4] == "tree":
                        data = b"[]"
                elif parts[2:3] == ["resolve"] and (file := hub.folder / "/".join(parts[4:])).is_file():
                    data = file.read_bytes()
                self.send_response(404 if data is None else 200)
                self.send_header("X-Repo-Commit", hub.commit)
                if data is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                else:
                    self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
                    self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                if body and data:
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def move(self, folder: Path) -> None:
        """The branch is now what lies in ``folder``."""
        self.folder, self.commit = folder, hashlib.sha1(str(folder).encode()).hexdigest()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    one = Hub()
    one.move(_saved(tmp_path / "first", 1))
    yield one
    one.close()


def _saved(folder: Path, sign: int) -> Path:
    model = tiny.build("llama")
    model.lm_head.weight.data.mul_(sign)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cls", [pytest.param("AutoModelForCausalLM", marks=pytest.mark.campaign), "LlamaForCausalLM"])
def test_a_branch_that_moved_is_another_model(hub: Hub, tmp_path: Path, cls: str) -> None:
    def ask(store: str) -> list[Any]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("EVALCACHE", "HF_"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "EVALCACHE_DIR": str(tmp_path / store)}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT, cls], capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr + "\n".join(hub.asked)
        return json.loads(done.stdout)

    cold = ask("store")
    assert cold[1:] == [0, 2, 1]
    assert ask("store") == [cold[0], 2, 0, 0]
    hub.move(_saved(tmp_path / "second", -1))
    moved = ask("store")
    assert moved[1:] == [0, 2, 1] and moved[0] != cold[0]
    assert moved[0] == ask("another store")[0]
