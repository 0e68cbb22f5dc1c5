"""The same model has the same root: in another process, under another hash seed, in threads, saved and loaded again."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NAMES, build, prompts
from torch import nn

from evalcache.weights import Fingerprinter, fingerprint

ARCHITECTURES = ("llama", "gemma3", "mixtral", "mamba2", "t5")
# A saved tuple comes back as a list, and the stacks' own configs are made anew: such a model has one root once it was loaded.
LOADED_DIFFERS = {
    "mamba2": "attributes of backbone.layers.0.mixer, backbone.layers.1.mixer",
    "t5": "encoder.config, decoder.config",
}
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from tiny import build
from evalcache.weights import fingerprint
{before}
for name in {names!r}:
    print(name, fingerprint(build(name)).root)
"""


def other_process(before: str = "", names: tuple[str, ...] = ARCHITECTURES, **environment: str) -> subprocess.Popen[str]:
    script = SCRIPT.format(tests=str(Path(__file__).parent), names=names, before=before)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | environment)


def roots_of(run: subprocess.Popen[str]) -> dict[str, str]:
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    return dict(line.split(" ") for line in output.splitlines() if "xxh3_128:" in line)


def test_another_process_and_hash_seed_give_the_same_roots() -> None:
    # This process has met many other models, libraries and patches; they start bare, and in another order.
    runs = [
        other_process("import peft, torch._dynamo", names=ARCHITECTURES[::-1], PYTHONHASHSEED="2"),
    ]
    here = {name: str(fingerprint(build(name)).root) for name in ARCHITECTURES}
    for run in runs:
        assert roots_of(run) == here


def test_what_else_a_process_has_done_does_not_matter() -> None:
    model = build("llama")
    before = fingerprint(model).root
    for name in ("qwen3_moe", "jamba", "bart"):
        other = build(name)
        fingerprint(other)
        other.generate(**prompts(2, 6), max_new_tokens=2, do_sample=True)
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    compiled(torch.ones(2))
    model.generate(**prompts(2, 6), max_new_tokens=3, num_beams=2, do_sample=False)
    model.generate(**prompts(2, 6), max_new_tokens=3, cache_implementation="static")
    assert fingerprint(model).root == before


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("rwkv", "phi3_longrope", "llama_dynamic")])
def test_a_forward_leaves_the_root_alone(name: str) -> None:
    model = build(name)
    checks = Fingerprinter(model)
    before = checks.manifest()
    model.generate(**prompts(2, 6), max_new_tokens=2, do_sample=False)
    assert str(before.diff(checks.manifest())) == "no difference"


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    load = type(model).from_pretrained
    whole, sharded = (fingerprint(load(tmp_path / folder, dtype=torch.float32).eval()) for folder in ("whole", "sharded"))
    assert str(whole.diff(sharded)) == "no difference"
    assert whole.root == sharded.root
    assert str(fingerprint(model).diff(whole)) == LOADED_DIFFERS.get(name, "no difference")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_a_bin_file_is_the_same_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "new")
    model.config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    new, old = (type(model).from_pretrained(tmp_path / folder).eval() for folder in ("new", "old"))
    assert fingerprint(old).root == fingerprint(new).root == fingerprint(model).root


def test_layout_in_memory_does_not_matter() -> None:
    model = build("llama")
    before = fingerprint(model).root
    for parameter in model.parameters():
        if parameter.dim() == 2:
            wide = torch.empty(parameter.shape[1], parameter.shape[0]).t()
            parameter.data = wide.copy_(parameter.data)
    assert not model.lm_head.weight.is_contiguous()
    assert fingerprint(model).root == before


def test_threads_may_fingerprint_at_once() -> None:
    models = [build(name) for name in ("llama", "gpt2", "llama", "t5")]
    alone = [fingerprint(model).root for model in models]
    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(fingerprint, models * 5)]
    assert [manifest.root for manifest in together] == alone * 5


def test_order_of_attributes_and_copies_do_not_matter() -> None:
    import copy

    def holder(*names: str) -> Any:
        module = nn.Linear(2, 2).eval()
        for name in names:
            setattr(module, name, {"size": len(name)})
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        return module

    assert fingerprint(holder("one", "three")).root == fingerprint(holder("three", "one")).root
    model = build("llama")
    assert fingerprint(copy.deepcopy(model)).root == fingerprint(model).root
