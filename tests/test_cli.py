"""The command line on a real store and ledger: what each verb prints, for people and for programs, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

from evalcache.cli import commands, main
from evalcache.digest import Digest, digest_bytes
from evalcache.journal import LookedUp, ModelSeen, Overhead, RunEnded, RunStarted
from evalcache.key import key_of
from evalcache.manifest import Manifest, ModuleRecord, TensorRecord
from evalcache.records import Action, Cost, Environment, Fields, Request, Result, pack_logprobs, pack_tokens
from evalcache.store import Store

RUNS = ("11" * 16, "22" * 16)
NASTY = "clear\x1b[2J\x1b]0;title\x07 the \u202escreen"


def manifest_of(norm: bytes) -> Manifest:
    weights = {name: TensorRecord(digest_bytes(data), "float32", (1,), 4) for name, data in (("layer", b"same"), ("norm", norm))}
    modules = {name: ModuleRecord(tensor.digest, "torch.nn.Linear", {"weight": tensor}) for name, tensor in weights.items()}
    return Manifest({"": ModuleRecord(digest_bytes(norm), "tiny.Model"), **modules}, about={"class": "tiny.Model"})


MODELS = (manifest_of(b"one"), manifest_of(b"two"))


def action(model: Manifest, tokens: list[int], max_new_tokens: int = 4) -> Action:
    settings = Fields({"max_new_tokens": max_new_tokens})
    environment = Environment(Fields({"dtype": "float32", "transformers": "5.23.0"}), {"device_name": "cpu"})
    return Action(model.root, Request("generate", pack_tokens(tokens), settings), environment)


ACTIONS = (action(MODELS[0], [1, 2, 3]), action(MODELS[0], [1, 2, 3], 8), action(MODELS[1], [1, 2, 3]))
KEYS = tuple(key_of(one) for one in ACTIONS)


@pytest.fixture
def filled(store_folder: Path) -> Path:
    """A cache folder with three entries, two models and two runs: one cold, one warm."""
    now = time.time()
    store = Store(store_folder / "store")
    cost = Cost(2.0, 3, 2, "cpu", 1)
    result = Result(pack_tokens([7, 8]), NASTY, pack_logprobs([-0.5, -1.5]), "stop", {"sum": -2.0}, cost=cost)
    root = MODELS[0].root.value
    first, second = KEYS[0].value, KEYS[1].value
    lookups = [
        (("miss", "miss", "uncacheable"), ("absent", "absent", "streamer"), (first, second, b""), (2.0, 2.0, None)),
        (("hit", "hit", "duplicate"), ("", "", ""), (first, second, second), (2.0, 2.0, 2.0)),
    ]
    for place, (run, (outcomes, reasons, keys, seconds)) in enumerate(zip(RUNS, lookups, strict=True)):
        at = now - 100 + 10 * place
        events = [
            RunStarted(run, at, "python eval.py", versions={"transformers": "5.23.0"}),
            ModelSeen(run, root, "tiny"),
            LookedUp(run, at + 1, root, "transformers", "", keys, outcomes, reasons, seconds),
            Overhead(run, at + 1, {"checks": 0.25, "lookup": 0.25}),
            RunEnded(run, at + 2, "ok", 0),
        ]
        entries = [(key, one, result) for key, one in zip(KEYS, ACTIONS, strict=True)] if place == 0 else []
        objects = {f"model/{model.root.hex}": model.to_bytes() for model in MODELS}
        store.commit(entries, events, objects, run=run, created_at=at)
    store.close()
    return store_folder


@pytest.fixture
def evalcache(capsys):
    """Runs one verb in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ending:
            main(arguments)
        captured = capsys.readouterr()
        return ending.value.code, captured.out, captured.err

    return call


@pytest.fixture
def asked(evalcache):
    """Runs one verb with --json: (exit code, the document)."""

    def call(*arguments: str):
        code, out, err = evalcache(*arguments, "--json")
        assert err == ""
        assert out.isascii()
        return code, json.loads(out)

    return call


def test_path(evalcache, asked, store_folder, tmp_path):
    assert evalcache("path") == (0, f"{store_folder}\n", "")
    assert evalcache("path", "--dir", str(tmp_path)) == (0, f"{tmp_path}\n", "")
    code, found = asked("path")
    assert (code, found["ledger"]) == (0, str(store_folder / "ledger.duckdb"))
    assert not store_folder.exists()


def test_stats_of_the_cache(evalcache, asked, filled):
    code, found = asked("stats")
    assert code == 0
    assert (found["entries"], found["set_aside"], found["directory"]) == (3, 0, str(filled))
    assert found["store_bytes"] > 0
    assert "entries" in evalcache("stats")[1]


@pytest.mark.parametrize("name", ["last", RUNS[1], RUNS[1][:8]])
def test_stats_of_a_run(asked, evalcache, filled, name):
    code, found = asked("stats", "--run", name)
    assert code == 0
    assert (found["hits"], found["misses"], found["duplicates"], found["model_loads"]) == (2, 0, 1, 0)
    assert found["saved_seconds"] == pytest.approx(3.5)
    assert found["overhead_seconds"] == pytest.approx(0.5)
    assert found["model_digest"] == str(MODELS[0].root)
    assert evalcache("stats", "--run", name)[0] == 0


def test_stats_of_a_cold_run(asked, filled):
    _, found = asked("stats", "--run", RUNS[0])
    assert (found["hits"], found["misses"]) == (0, 2)
    assert found["uncacheable"] == {"streamer": 1} or found["uncacheable"] == 1


def test_runs(asked, evalcache, filled):
    code, found = asked("runs")
    assert code == 0
    assert [row["run"].replace("-", "") for row in found] == list(reversed(RUNS))
    assert len(asked("runs", "--limit", "1")[1]) == 1
    assert "python eval.py" in evalcache("runs")[1]


def test_show(asked, evalcache, filled):
    code, found = asked("show", str(KEYS[0]))
    assert code == 0
    assert (found["key"], found["text"], found["tokens"]) == (str(KEYS[0]), NASTY, [7, 8])
    assert found["settings"] == {"max_new_tokens": 4}
    assert found["cost"]["seconds"] == 2.0
    code, out, _ = evalcache("show", KEYS[0].hex[:12])
    assert code == 0
    assert "\\x1b[2J" in out and "\\u202e" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)


def test_explain(asked, evalcache, filled):
    code, found = asked("explain", str(KEYS[0]), str(KEYS[1]))
    assert code == 0
    assert any("max_new_tokens" in str(reason) for reason in found["differences"])
    assert "norm" in evalcache("explain", KEYS[0].hex, KEYS[2].hex)[1]


def test_diff(asked, evalcache, filled):
    code, found = asked("diff", str(MODELS[0].root), MODELS[1].root.hex)
    assert (code, found["equal"], found["tensors"], found["tensors_total"]) == (1, False, ["norm.weight"], 2)
    assert evalcache("diff", MODELS[0].root.hex, MODELS[1].root.hex)[1] == f"{found['summary']}\n"
    assert evalcache("diff", MODELS[0].root.hex, MODELS[0].root.hex) == (0, "no difference\n", "")
    assert evalcache("diff", MODELS[0].root.hex[:10], MODELS[1].root.hex[:10])[0] == 1


def test_query(asked, evalcache, filled):
    code, found = asked("query", "SELECT count(*) AS n, 'a' AS letter FROM outputs")
    assert (code, found) == (0, [{"n": 3, "letter": "a"}])
    assert evalcache("query", "SELECT 1 WHERE false")[1] == "no rows\n"
    code, out, _ = evalcache("query", "SELECT text FROM outputs")
    assert code == 0
    assert "\x1b" not in out
    code, out, err = evalcache("query", "SELECT nothing FROM nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("evalcache: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("sql", ["SELECT * FROM read_text('/etc/hostname')", "DROP TABLE runs", "COPY (SELECT 1) TO 'x.csv'"])
def test_query_neither_writes_nor_reads_files(evalcache, filled, sql):
    assert evalcache("query", sql)[0] == 2
    assert evalcache("query", "SELECT count(*) FROM runs")[0] == 0


def test_a_locked_ledger_is_exit_code_3(evalcache, filled):
    assert evalcache("query", "SELECT 1")[0] == 0
    connect = f"c = duckdb.connect({str(filled / 'ledger.duckdb')!r})"
    hold = f"import duckdb, sys; {connect}; print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        code, out, err = evalcache("query", "SELECT 1")
        assert (code, out) == (3, "")
        assert len(err.splitlines()) == 2, "a message and a hint"
        assert evalcache("stats")[0] == 0
    finally:
        holder.communicate("")
    assert evalcache("query", "SELECT 1")[0] == 0


def test_verify(asked, evalcache, filled):
    code, found = asked("verify")
    assert (code, found["good"], found["entries"], found["outputs"], found["damaged"]) == (0, True, 3, 3, [])
    assert evalcache("verify")[0] == 0
    damage(filled, KEYS[1])
    code, found = asked("verify")
    assert (code, found["good"], len(found["damaged"])) == (1, False, 1)
    assert KEYS[1].hex in evalcache("verify")[1]


def test_verify_compares_the_store_with_the_ledger(asked, filled):
    assert asked("verify")[0] == 0
    with duckdb.connect(str(filled / "ledger.duckdb")) as connection:
        connection.execute("DELETE FROM outputs WHERE replace(CAST(key AS VARCHAR), '-', '') = ?", [KEYS[0].hex])
    code, found = asked("verify")
    assert (code, found["only_in_store"], found["only_in_ledger"]) == (1, [KEYS[0].hex], [])


def damage(folder: Path, key: Digest) -> None:
    import sqlite3

    with sqlite3.connect(folder / "store" / "cache.db") as connection:
        ((frame,),) = connection.execute("SELECT value FROM Cache WHERE key = ?", (key.value,)).fetchall()
        connection.execute("UPDATE Cache SET value = ? WHERE key = ?", (frame[:-1] + bytes([frame[-1] ^ 1]), key.value))


@pytest.mark.parametrize(
    "line",
    [
        f"show {'ab' * 16}", "show not-a-key", "show ab", f"explain {'ab' * 16} {'cd' * 16}", "diff nowhere nothing",
        "stats --run never", "stats --nonsense", "nonsense", "fingerprint nowhere", "run", "query",
    ],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2_and_one_message(evalcache, filled, line):
    code, out, err = evalcache(*line.split())
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err


def test_fingerprint(asked, evalcache, tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        tensors = {"norm.weight": np.full(4, value, np.float32), "layers.0.weight": np.ones((4, 4), np.float32)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    code, found = asked("fingerprint", str(tmp_path / "a"))
    assert (code, found["tensors"], found["size_bytes"]) == (0, 2, 80)
    assert "modules" not in found
    modules = asked("fingerprint", str(tmp_path / "a"), "--modules")[1]["modules"]
    assert {row["path"] for row in modules} >= {"norm", "layers.0"}
    assert found["digest"] in evalcache("fingerprint", str(tmp_path / "a"))[1]
    assert evalcache("fingerprint", str(tmp_path / "a"), "--modules")[0] == 0
    code, difference = asked("diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert (code, difference["tensors"]) == (1, ["norm.weight"])
    assert evalcache("diff", str(tmp_path / "a"), str(tmp_path / "a"))[0] == 0


def test_every_verb_that_asks_speaks_json():
    for name, verb in commands.commands.items():
        options = {option for parameter in verb.params for option in parameter.opts}
        assert ("--json" in options) == (name != "report"), name  # which writes a page


def test_a_reader_that_leaves_is_no_fault(filled):
    command = f"'{sys.executable}' -m evalcache query 'SELECT range FROM range(100000)' --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=os.environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_no_verb_imports_torch(filled):
    code = f"""
import sys
from evalcache.cli import main
for arguments in (["stats"], ["runs"], ["query", "SELECT 1"], ["verify"], ["show", {KEYS[0].hex!r}],
                  ["explain", {KEYS[0].hex!r}, {KEYS[1].hex!r}], ["diff", {MODELS[0].root.hex!r}, {MODELS[1].root.hex!r}],
                  ["stats", "--run", "last"]):
    try:
        main(arguments)
    except SystemExit as ending:
        assert ending.code in (0, 1), arguments
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
