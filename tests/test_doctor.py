"""`evalcache doctor`: what it says of a sound installation, and of each thing that can be wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import evalcache.doctor as doctor
from evalcache.cache import Cache
from evalcache.integrations.clients import CLIENTS, LM_EVAL
from evalcache.ledger import Ledger


def look(folder):
    return {check.name: check for check in doctor.examine(folder)}


@pytest.fixture
def folder(tmp_path):
    """A cache folder with a store and a ledger."""
    with_run = Cache(tmp_path / "cache")
    with_run.uncacheable("streamer", requests=2)
    with_run.close()
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def enough_room(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 1)


def test_a_sound_folder(folder):
    checks = doctor.examine(folder)
    assert doctor.is_good(checks), [check for check in checks if check.state == "wrong"]
    found = {check.name: check for check in checks}
    assert "1 runs" in found["ledger"].found and found["journal"].found.startswith("0 rows")
    assert found["torch"].found == importlib.metadata.version("torch")
    for client in CLIENTS:
        assert client.name in found
    assert not [check for check in checks if check.state == "ok" and check.hint]


def test_nothing_is_made(tmp_path):
    found = look(tmp_path / "not" / "there")
    assert found["folder"].state == "ok" and "not made yet" in found["folder"].found
    assert "not made yet" in found["store"].found and "not made yet" in found["ledger"].found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_others_may_read(folder):
    folder.chmod(0o755)
    assert look(folder)["rights"].state == "wrong" and "chmod 700" in look(folder)["rights"].hint


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    found = look(tmp_path / "file")
    assert found["folder"].state == "wrong" and "EVALCACHE_DIR" in found["folder"].hint
    assert look(tmp_path / "file" / "below")["folder"].state == "wrong"


def test_little_room(folder, monkeypatch):
    free = shutil.disk_usage(folder).free
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", free + (1 << 40))
    assert look(folder)["free disk"].state == "wrong"
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 1)
    with open(folder / "store" / "cache.db-of-test", "wb") as sparse:  # a store of more than half of what is free
        sparse.truncate(free)
    assert look(folder)["free disk"].state == "wrong"


def test_a_folder_that_machines_share(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("EVALCACHE_NETWORK", "1")
    monkeypatch.setenv("EVALCACHE_LOCAL_DIR", str(tmp_path / "local"))
    found = look(folder)
    assert found["file system"].state == "ok" and str(tmp_path / "local") in found["file system"].found
    assert "import" in found["former store"].hint and "not made yet" in found["store"].found
    monkeypatch.setenv("EVALCACHE_NETWORK", "0")
    monkeypatch.setattr(doctor, "is_remote", lambda path: True)
    assert look(folder)["file system"].state == "wrong"


def test_a_damaged_store_and_ledger(folder):
    (folder / "store" / "cache.db").write_bytes(b"not a database" * 1000)
    (folder / "ledger.duckdb").write_bytes(b"neither" * 1000)
    found = look(folder)
    assert found["store"].state == "wrong" and found["ledger"].state == "wrong" and found["ledger"].hint


def test_a_ledger_that_somebody_holds_is_named_with_its_holder(folder):
    code = (
        f"import duckdb, time; c = duckdb.connect({str(folder / 'ledger.duckdb')!r}); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        found = look(folder)["ledger"]
        assert found.state == "note" and f"process {holder.pid}" in found.found, found
        assert "nothing is lost" in found.hint
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert look(folder)["ledger"].state == "ok"


def test_a_store_that_somebody_writes_for_long(folder):
    code = f"""
import sqlite3, time
c = sqlite3.connect({str(folder / "store" / "cache.db")!r}, isolation_level=None)
c.execute("BEGIN IMMEDIATE"); print("held", flush=True); time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        found = look(folder)["store"]
        assert found.state == "note" and f"by process {holder.pid}" in found.found, found
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_rows_that_wait_for_a_ledger_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Ledger, "sync", lambda *_, **__: None)
    cache = Cache(tmp_path / "cache")
    cache.uncacheable("streamer")
    cache.close()
    assert not look(tmp_path / "cache")["journal"].found.startswith("0 rows")


def test_a_client_whose_seam_has_moved_and_one_of_another_version(tmp_path, monkeypatch):
    if LM_EVAL.folder() is None:
        pytest.skip("needs lm_eval (llm-evalcache[lm-eval])")
    assert doctor._client(LM_EVAL).state in ("ok", "note")
    moved = type(LM_EVAL)(LM_EVAL.name, LM_EVAL.distribution, LM_EVAL.tested, {"models/huggingface.py": {"HFLM.gone": "self"}})
    found = doctor._client(moved)
    assert found.state == "wrong" and "HFLM.gone is not in huggingface.py" in found.found and "uncached" in found.hint
    other = type(LM_EVAL)(LM_EVAL.name, LM_EVAL.distribution, ("0.0.1",), LM_EVAL.seams)
    assert doctor._client(other).state == "note"
    absent = type(LM_EVAL)("no_such_client", "no-such-client", ("1",), {})
    assert doctor._client(absent).found == "not installed"


def test_versions_that_are_too_old_or_missing(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "2.5.1+cu124", "duckdb": None}.get(name, real(name)))
    found = {check.name: check for check in doctor._packages()}
    assert found["torch"].state == "wrong" and "2.6 or later" in found["torch"].hint
    assert found["duckdb"].state == "wrong" and found["transformers"].state == "ok"


def test_the_least_versions_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["transformers"]]
    wanted = dict(re.match(r"([\w-]+)>=([\d.]+)$", one).groups() for one in named if re.match(r"[\w-]+>=", one))
    for name, least in doctor.LEAST.items():
        assert wanted[name] == ".".join(map(str, least))


def test_what_is_in_the_way_on_pythonpath(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = {check.name: check for check in doctor._python()}
    assert found["PYTHONPATH"].state == "note" and str(tmp_path) in found["PYTHONPATH"].found
    (tmp_path / "evalcache.py").write_text("")
    assert {check.name: check for check in doctor._python()}["PYTHONPATH"].state == "wrong"


def test_another_python_on_path_and_a_driver_that_fails(tmp_path, monkeypatch):
    for name, code in (("python", "exit 1"), ("nvidia-smi", "echo no devices were found; exit 6")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = {check.name: check for check in [*doctor._python(), *doctor._gpu()]}
    assert found["python on PATH"].state == "note" and str(tmp_path) in found["python on PATH"].found
    assert found["GPU"].state == "note" and "no devices were found" in found["GPU"].found


def run(*arguments, **more):
    command = [sys.executable, "-m", "evalcache", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | more)


def test_the_verb(folder):
    done = run("--dir", str(folder), "--json")
    told = json.loads(done.stdout)
    room = next(check for check in told["checks"] if check["name"] == "free disk")["state"] == "ok"
    assert done.returncode == (0 if room else 1) and told["good"] is room, done.stdout
    folder.chmod(0o777)
    done = run("--dir", str(folder), EVALCACHE="off")
    assert done.returncode == 1 and done.stderr == ""
    assert f"wrong: rights: 0777\n  others may look in: chmod 700 {folder}" in done.stdout
    assert "note: EVALCACHE: off" in done.stdout


def test_it_does_not_import_torch(folder):
    code = f"""
import sys
from evalcache.doctor import examine
examine({str(folder)!r})
print(sorted({{"torch", "transformers", "lm_eval", "inspect_ai", "lighteval"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
