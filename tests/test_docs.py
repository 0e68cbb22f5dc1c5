"""The README says what is true: its command line is the real one, and its code runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from evalcache.cli import commands
from evalcache.key import KEY_VERSION

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = (
    "Install", "Sixty seconds", "How the key is made", "Clients", "Layers in common", "Audit", "Looking after a cache",
    "Command line", "What we promise, and how it is tested", "Measured", "Limits", "Key-format history",
)  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def evalcache(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evalcache", *arguments]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_the_sections_stand_in_their_order():
    assert tuple(re.findall(r"^## (.*)$", README, re.MULTILINE)) == SECTIONS


def test_the_generated_parts_are_fresh():
    spec = spec_from_loader("readme_script", SourceFileLoader("readme_script", str(ROOT / "scripts" / "readme")))
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.fill_generated(README) == README, "run scripts/readme"


@pytest.mark.parametrize("verb", ["", *commands.commands])
def test_every_verb_is_documented_as_it_is(verb, tmp_path):
    shown = evalcache(*verb.split(), "--help", cwd=tmp_path, COLUMNS="140")
    assert shown.returncode == 0
    heading = f"### `{f'evalcache {verb}'.strip()}`"
    assert f"{heading}\n\n```text\n{shown.stdout}```\n" in README


def test_the_key_version_has_a_line_of_history():
    history = README.split("## Key-format history")[1]
    assert re.findall(r"^\| (\d+) \|", history, re.MULTILINE)[-1] == str(KEY_VERSION)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the README's ``my-model`` and ``my_eval.py``."""
    from tiny import build
    from words import train_tokenizer

    folder = tmp_path_factory.mktemp("readme")
    build("llama").save_pretrained(folder / "my-model")
    train_tokenizer().save_pretrained(folder / "my-model")
    script = next(block for block in blocks("python") if block.startswith("# my_eval.py"))
    (folder / "my_eval.py").write_text(script)
    return folder


def test_sixty_seconds_and_the_queries(workplace, store_folder):
    bare = subprocess.run([sys.executable, "my_eval.py"], cwd=workplace, capture_output=True, text=True, timeout=120)
    assert bare.returncode == 0, bare.stderr
    lines = []
    for _ in range(2):
        done = evalcache("run", "--", "python", "my_eval.py", cwd=workplace)
        assert (done.returncode, done.stdout) == (0, bare.stdout), done.stderr
        lines.append(done.stderr.splitlines()[-1])
    assert lines[0].startswith("evalcache: 0 hits, 3 misses, 0 uncacheable"), lines
    assert lines[1].startswith("evalcache: 3 hits, 0 misses, 0 uncacheable"), lines
    verbs = "stats|query|audit|explain-run|verify|prune|export|import|conflicts"
    for line in blocks("console"):
        for command in re.findall(rf"^\$ evalcache ({verbs}) (.*)$", line, re.MULTILINE):
            done = evalcache(command[0], *shlex.split(command[1], comments=True), cwd=workplace)
            assert done.returncode == 0, done.stderr
    for sql in blocks("sql"):
        done = evalcache("query", sql, "--json", cwd=workplace)
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), list)


def test_the_other_python_blocks_run(workplace, store_folder):
    code = "\n".join(block for block in blocks("python") if not block.startswith("# my_eval.py"))
    check = "assert len(scores) == 2\n"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=workplace, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
