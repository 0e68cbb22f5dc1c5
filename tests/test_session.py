"""One process with evalcache in it: how it starts, what it says at the end, and that its faults stay its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import evalcache
from evalcache import session as sessions
from evalcache.errors import EvalCacheError
from evalcache.ledger import Ledger

# A request that is counted, without the seconds that torch and a model would take.
CALL = "import evalcache; session = evalcache.enable(); session.cache.uncacheable('streamer', requests=2)\n"


def python(code: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=cwd, env=os.environ | more, capture_output=True, text=True, timeout=120)


def recorded(folder: Path) -> list[tuple[str, int | None]]:
    rows = Ledger(folder / "ledger.duckdb").query("SELECT status, exit_code FROM run_ends ORDER BY ended_at").rows
    return [tuple(row) for row in rows]


@pytest.fixture(autouse=True)
def no_session():
    yield
    sessions.disable()


@pytest.mark.parametrize(
    ("ending", "code", "status"),
    [
        ("", 0, ("ok", None)),
        ("import sys; sys.exit(3)", 3, ("failed", 3)),
        ("import sys; sys.exit()", 0, ("ok", 0)),
        ("import sys; sys.exit('told')", 1, ("failed", 1)),
        ("raise ValueError('oh')", 1, ("failed", 1)),
        ("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -signal.SIGINT, ("interrupted", 130)),
        ("import sys\ntry: sys.exit(3)\nexcept SystemExit: session.cache.uncacheable('training')", 0, ("ok", None)),
        ("import sys\ntry: sys.exit(3)\nexcept SystemExit: pass\nraise ValueError", 1, ("failed", 1)),
    ],
)
def test_one_line_at_the_end_however_it_ends(tmp_path, store_folder, ending, code, status):
    bare = python(ending.replace("session.cache.uncacheable('training')", "pass"), tmp_path)
    ours = python(CALL + ending, tmp_path)
    assert (ours.returncode, ours.stdout) == (code, bare.stdout) == (bare.returncode, bare.stdout)
    *before, line = ours.stderr.splitlines()
    # The traceback is the script's own, one line further down because of the line above it.
    assert len(before) == len(bare.stderr.splitlines())
    assert line.startswith("evalcache: 0 hits, 0 misses, ")
    assert " uncacheable (2 streamer" in line
    assert line.endswith(f"; ledger {store_folder / 'ledger.duckdb'}")
    assert recorded(store_folder) == [status]


def test_the_exceptions_own_hook_is_left_alone(tmp_path):
    code = CALL + "import sys\nsys.excepthook = lambda *_: print('mine')\nraise ValueError"
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout) == (1, "mine\n")
    assert len(done.stderr.splitlines()) == 1


def test_nothing_is_said_or_made_where_no_model_was_met(tmp_path, store_folder):
    done = python("import evalcache; evalcache.enable()", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not store_folder.exists()


def test_quiet_and_other_ranks_say_nothing(tmp_path):
    assert python(CALL, tmp_path, EVALCACHE_QUIET="1").stderr == ""
    assert python(CALL, tmp_path, RANK="1", WORLD_SIZE="2").stderr == ""
    assert python(CALL, tmp_path, RANK="0", WORLD_SIZE="2").stderr.startswith("evalcache (rank 0 of 2; ")


def test_a_forked_child_does_not_end_the_run(tmp_path, store_folder):
    done = python(CALL + "import os, sys\nif os.fork() == 0: sys.exit(0)\nos.wait()", tmp_path)
    assert len(done.stderr.splitlines()) == 1
    assert recorded(store_folder) == [("ok", None)]


def test_a_closed_stderr_is_no_fault(tmp_path, store_folder):
    done = python(CALL + "import sys; sys.stderr.close()", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert recorded(store_folder) == [("ok", None)]


@pytest.mark.parametrize("setting", ["EVALCACHE_DIR=/dev/null/nowhere", "EVALCACHE=sometimes", "EVALCACHE_MATCH=loose"])
def test_a_cache_that_cannot_be_opened_costs_one_line(tmp_path, setting):
    name, value = setting.split("=")
    done = python("import evalcache; s = evalcache.enable(); print(s.cache, s.cache)", tmp_path, **{name: value})
    assert (done.returncode, done.stdout) == (0, "None None\n")
    assert done.stderr.startswith("evalcache: warning: cannot open the cache (")
    assert len(done.stderr.splitlines()) == 1


def test_off_installs_nothing(monkeypatch, store_folder):
    finders, leave = list(sys.meta_path), sys.exit
    monkeypatch.setenv("EVALCACHE", "off")
    session = sessions.enable()
    assert (session.off, session.cache, sys.meta_path, sys.exit) == (True, None, finders, leave)
    assert not store_folder.exists()


def test_a_block_ends_its_session_and_says_its_line(capsys, store_folder):
    leave = sys.exit
    with sessions.enable() as session:
        assert sessions.current() is session
        session.cache.uncacheable("training")
    assert sessions.current() is None
    assert sys.exit is leave
    assert "1 uncacheable (1 training)" in capsys.readouterr().err
    with pytest.raises(KeyError), sessions.enable() as session:
        session.cache.uncacheable("training")
        raise KeyError
    assert recorded(store_folder) == [("ok", None), ("failed", None)]


def test_there_is_one_session_and_its_settings_can_be_chosen_until_it_is_used(tmp_path):
    first = sessions.enable()
    assert sessions.enable(tmp_path / "other", policy="refresh") is first
    assert first.cache.directory == tmp_path / "other"
    assert first.cache.policy.value == "refresh"
    assert sessions.enable(policy="refresh") is first
    first.cache.uncacheable("training")
    with pytest.raises(EvalCacheError, match="already running with another policy"):
        sessions.enable(policy="use")


@pytest.mark.parametrize("wrong", [{"policy": "sometimes"}, {"match": "loose"}])
def test_wrong_arguments_are_refused_where_they_were_written(wrong):
    with pytest.raises(EvalCacheError, match="unknown"):
        sessions.enable(**wrong)
    assert sessions.current() is None


def test_a_real_model_is_met_whenever_transformers_is_imported(tmp_path, store_folder):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import evalcache
        with evalcache.enable() as session:
            assert "torch" not in sys.modules
            import transformers
            assert "torch" not in sys.modules
            from transformers.generation.utils import GenerationMixin
            import tiny
            model, batch = tiny.build("llama"), tiny.prompts()
            cold = model.generate(**batch, max_new_tokens=4, do_sample=False)
            ours = GenerationMixin.generate
        theirs = GenerationMixin.generate
        assert theirs is not ours and theirs.__module__ == ours.__module__
        bare = model.generate(**batch, max_new_tokens=4, do_sample=False)
        session = evalcache.enable()
        assert GenerationMixin.generate is not theirs
        warm = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert cold.tolist() == bare.tolist() == warm.tolist()
        raise KeyboardInterrupt
    """
    # -SIGINT, unless something of torch's own that runs at the exit makes Python forget how it ended.
    bare = python("from transformers.generation.utils import GenerationMixin\nraise KeyboardInterrupt", tmp_path)
    done = python(code, tmp_path)
    assert done.returncode == bare.returncode, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("evalcache")]
    assert len(said) == 2, done.stderr
    assert said[0].startswith("evalcache: 0 hits, 4 misses, 0 uncacheable, ")
    assert said[1].startswith("evalcache: 4 hits, 0 misses, 0 uncacheable, ")
    assert recorded(store_folder) == [("ok", None), ("interrupted", 130)]


def test_what_cannot_be_wrapped_is_handed_back_with_a_warning(capsys):
    thing = object()
    assert evalcache.wrap(thing) is thing
    assert "warning: cannot wrap this model" in capsys.readouterr().err


def test_the_public_names_are_there():
    for name in evalcache.__all__:
        assert getattr(evalcache, name) is not None
    assert set(evalcache.__all__) <= set(dir(evalcache))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        evalcache.nothing  # noqa: B018
