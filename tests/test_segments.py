"""Machines that share a cache folder over the network: each with a store on its own disk, exchanging files that never change.

Two machines are two folders here, with ``EVALCACHE_NETWORK=1`` in the place of a network file system: a stand-in in all but the
last test, which mounts one with sshfs where it is installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from opened import Opened, needs_inotify
from test_cache import Engine, ask, expected
from test_failing_folders import long

from evalcache import segments
from evalcache.cache import Cache
from evalcache.errors import EvalCacheWarning
from evalcache.exchange import import_entries
from evalcache.folder import local_folder
from evalcache.store import Store

FIRST, SECOND, THIRD = ([(base + place, 7) for place in range(20)] for base in (100, 200, 300))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_folder: Path):
    """Moves this process to a machine: gives the folder on its disk."""
    monkeypatch.setenv("EVALCACHE_NETWORK", "1")

    def at(name: str) -> Path:
        monkeypatch.setenv("EVALCACHE_LOCAL_DIR", str(tmp_path / name))
        return local_folder(store_folder)

    return at


def run(prompts: list[tuple[int, ...]], engine: Engine | None = None) -> int:
    """One run on this machine; how many prompts it computed."""
    engine = engine or Engine()
    cache = Cache()
    assert ask(cache, engine, prompts) == expected(engine, prompts)
    cache.close()
    return len(engine.asked)


def shared_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def nothing_is_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvalCacheWarning)
        yield


def test_what_one_machine_computed_the_other_has(machine, store_folder: Path, tmp_path: Path) -> None:
    with nothing_is_said():
        machine("a")
        assert run(FIRST) == 20
        (given,) = shared_files(store_folder)
        assert given.startswith("segments/") and given.endswith(".segment"), "no database lies in the shared folder"
        there = machine("b")
        assert run(FIRST + SECOND) == 20, "the rest is had from the other"
        second = next(name for name in shared_files(store_folder) if name != given)
        with Store(tmp_path / "apart") as apart:
            assert import_entries(apart, store_folder / second).new == 20, "what is new alone is given"
        machine("a")
        assert run(FIRST + SECOND) == 0
        assert len(shared_files(store_folder)) == 2, "what came from elsewhere is not given again"
    for path in [store_folder / "segments", *(store_folder / "segments").iterdir(), there]:
        assert path.stat().st_mode & 0o077 == 0, "for the owner alone"
    with Store(there / "store") as store:
        assert not store.check() and store.stats().entries == 40


def test_opening_reads_only_what_is_new(machine, monkeypatch) -> None:
    machine("a")
    for base in range(3):
        run([(base, 5)])
    machine("b")
    read = []

    def reading(store, path, **more):
        read.append(path)
        return import_entries(store, path, **more)

    monkeypatch.setattr(segments, "import_entries", reading)
    run([(0, 5)])
    assert len(read) == 3
    machine("a")
    run([(99, 5)])
    machine("b")
    read.clear()
    run([(99, 5)])
    assert len(read) == 1
    read.clear()
    run([(99, 5)])
    assert not read


@pytest.mark.parametrize("damage", ["flipped", "newer", *long("cut", "empty", "foreign")])
def test_a_damaged_file_is_skipped_whole(machine, store_folder: Path, damage: str) -> None:
    machine("a")
    run(FIRST)
    (one,) = (store_folder / "segments").iterdir()
    run(SECOND)
    good = one.read_bytes()
    place = good.index(b"PAR1") + 200
    one.write_bytes(
        {
            "flipped": good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :],
            "cut": good[: len(good) // 2],
            "empty": b"",
            "foreign": b"PK\x03\x04" + bytes(500),
            "newer": good.replace(b'"version": 1', b'"version": 2'),
        }[damage]
    )
    machine("b")
    with pytest.warns(EvalCacheWarning, match=one.name) as told:
        assert run(FIRST + SECOND) == 20, "all of the good one, nothing of the damaged one"
    assert len(told) == 1
    one.write_bytes(good)
    machine("c")
    with nothing_is_said():
        assert run(FIRST + SECOND) == 0


def test_files_that_were_left_unfinished_are_ignored_and_go_one_day(machine, store_folder: Path) -> None:
    folder = store_folder / "segments"
    folder.mkdir(parents=True)
    fresh, old = folder / ".unfinished-fresh", folder / ".unfinished-old"
    for path in (fresh, old):
        path.write_bytes(b"PK")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    machine("a")
    with nothing_is_said():
        run(FIRST)
    assert fresh.exists() and not old.exists()


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from evalcache import segments, transfers
    import pathlib
    from test_segments import FIRST, run
    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)
    if {where!r} == "before the rename":
        pathlib.Path.replace, replace = (lambda self, target: kill() if str(self.name).startswith(".unfinished") else
                                         replace(self, target)), pathlib.Path.replace
    elif {where!r} == "after it":
        transfers.Transfers.gave = kill
    else:
        segments.Segments.push = kill
    run(FIRST)
"""


@pytest.mark.parametrize("where", ["before the rename", "after it", *long("before all")])
def test_a_kill_while_giving_loses_and_doubles_nothing(machine, store_folder: Path, tmp_path: Path, where: str) -> None:
    machine("a")
    code = textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent), where=where))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    before = shared_files(store_folder)
    assert any(name.endswith(".segment") for name in before) is (where == "after it")
    assert run(FIRST) == 0
    given = [name for name in shared_files(store_folder) if name.endswith(".segment")]
    assert len(given) == 1 and (where != "after it" or given == before), "the same file, if it was there already"
    machine("b")
    assert run(FIRST) == 0


def test_a_folder_that_vanishes_costs_a_warning_and_gets_all_of_it_later(machine, store_folder: Path) -> None:
    machine("a")
    run(FIRST)
    shutil.rmtree(store_folder)
    store_folder.write_text("no folder any more")
    with pytest.warns(EvalCacheWarning, match="could be had.*mounted") as told:
        assert run(FIRST + SECOND) == 20
    assert len(told) == 1
    store_folder.unlink()
    with nothing_is_said():
        assert run(FIRST + THIRD) == 20
        machine("b")
        assert run(FIRST + SECOND + THIRD) == 0, "what had been given in files that are gone was given again"


def test_another_answer_from_elsewhere_is_a_finding(machine, store_folder: Path) -> None:
    class Other(Engine):
        """Answers otherwise under the same fingerprint, as no engine should."""

        def compute(self, prompts):
            return super().compute([tuple(token + 1 for token in prompt) for prompt in prompts])

    machine("a")
    run(FIRST)
    (store_folder / "segments").rename(store_folder / "hidden")
    there = machine("b")
    cache = Cache()
    ask(cache, Other(), FIRST[:3])
    cache.close()
    (given,) = (store_folder / "segments").iterdir()
    shutil.move(given, store_folder / "hidden")
    shutil.rmtree(store_folder / "segments")
    (store_folder / "hidden").rename(store_folder / "segments")
    run(SECOND)
    with Store(there / "store") as store:
        assert len(list(store.conflicts())) == 3


AT_ONCE = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_cache import Engine, ask, expected
    from evalcache.cache import Cache
    base = int(sys.argv[1])
    for turn in range(2):
        engine, cache = Engine(), Cache()
        prompts = [(base, turn, place) for place in range(25)] + [(0, turn, place) for place in range(25)]
        assert ask(cache, engine, prompts) == expected(engine, prompts)
        cache.close()
"""


def test_machines_at_once_lose_nothing(machine, store_folder: Path, tmp_path: Path) -> None:
    """Two processes on each of two machines, giving and taking at the same time."""
    code = textwrap.dedent(AT_ONCE.format(tests=str(Path(__file__).parent)))
    workers = []
    for number in range(4):
        machine("ab"[number % 2])
        command = [sys.executable, "-W", "error", "-c", code, str(number + 1)]
        workers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert (worker.returncode, said) == (0, "")
    everything = [(base, turn, place) for base in range(5) for turn in range(2) for place in range(25)]
    for name in "abc":
        machine(name)
        with nothing_is_said():
            assert run(everything) == 0
    with Store(machine("c") / "store") as store:
        assert store.stats().entries == 250 and not store.check() and not list(store.conflicts())


@needs_inotify
def test_the_ranks_of_a_launch_take_once_and_say_one_line(machine, store_folder: Path, tmp_path: Path) -> None:
    machine("a")
    run(FIRST)
    here = machine("b")
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_segments import FIRST, Engine, ask
            import evalcache
            engine = Engine()
            print("up", flush=True)
            ask(evalcache.enable().cache, engine, FIRST)
            print(len(engine.asked))
            """
        )
    )
    opened = Opened(*(store_folder / "segments").iterdir())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "evalcache", "run", "--", sys.executable, str(script)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "3", "EVALCACHE_RUN": "ab" * 16},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    with opened:
        with FileLock(here / "segments.lock"):  # until all of them are at it
            assert [rank.stdout.readline() for rank in ranks] == ["up\n"] * 3
            time.sleep(1)
        said = [rank.communicate(timeout=120) for rank in ranks]
        assert opened.count() == 1, "one of them reads it for all"
    assert [out for out, _ in said] == ["0\n"] * 3, "each of them has what the other machine computed"
    lines = "".join(error for _, error in said).splitlines()
    assert len(lines) == 1 and lines[0].startswith("evalcache (rank 0 of 3"), lines
    from evalcache.ledger import Ledger

    ledger = Ledger(here / "ledger.duckdb")
    assert ledger.query("SELECT count(*), count(DISTINCT key) FROM outputs").rows == [(20, 20)], "taken once"
    assert ledger.query("SELECT hits, misses FROM hits_by_run").rows == [(60, 0)], "one run"


def test_the_verbs_ask_the_store_of_this_machine(machine, store_folder: Path, capsys) -> None:
    from evalcache.cli import main

    def verb(*words: str) -> str:
        with pytest.raises(SystemExit) as ending:
            main(words)
        assert not ending.value.code
        return capsys.readouterr().out

    machine("a")
    run(FIRST)
    here = machine("b")
    assert verb("path").strip() == str(store_folder)
    assert verb("query", "SELECT count(*) AS n FROM outputs").split() == ["n", "20"], "what others gave is there"
    assert str(here) in verb("stats") and "good" in verb("verify")
    exported = store_folder.parent / "entries"
    machine("c")
    verb("export", str(exported))
    assert "new" in verb("import", str(exported))
    shutil.rmtree(store_folder)
    elsewhere = store_folder.parent / "elsewhere"
    os.environ["EVALCACHE_DIR"] = str(elsewhere)  # put back by the fixture
    assert "new" in verb("import", str(exported))
    assert len(shared_files(elsewhere)) == 1, "what was imported by hand is given, too"


def test_a_run_that_may_not_write_gives_nothing(machine, store_folder: Path) -> None:
    machine("a")
    cache = Cache(policy="read_only")
    ask(cache, Engine(), FIRST)
    cache.close()
    assert shared_files(store_folder) == []


@pytest.mark.campaign
@pytest.mark.skipif(not all(map(shutil.which, ("sshfs", "sshd", "ssh-keygen"))), reason="needs sshfs and sshd")
def test_a_real_network_file_system(tmp_path: Path, monkeypatch, store_folder: Path) -> None:
    """Loopback sshfs, told by its type alone; the files go through a server of its own."""
    keys, served, mounted = tmp_path / "keys", tmp_path / "served", tmp_path / "mounted"
    for folder in (keys, served, mounted):
        folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    (keys / "served").write_text(
        f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        "Subsystem sftp internal-sftp\n"
    )
    (keys / "asked").write_text(
        f"Host here\nProxyCommand {shutil.which('sshd')} -i -f {keys}/served\nIdentityFile {keys}/user\n"
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    os.makedirs("/run/sshd", exist_ok=True)
    mount = ["sshfs", "-F", str(keys / "asked"), f"here:{served}", str(mounted)]
    subprocess.run(mount, check=True, timeout=30)
    try:
        monkeypatch.setenv("EVALCACHE_DIR", str(mounted / "cache"))
        for name, prompts, asked in (("a", FIRST, 20), ("b", FIRST + SECOND, 20), ("a", FIRST + SECOND, 0)):
            monkeypatch.setenv("EVALCACHE_LOCAL_DIR", str(tmp_path / name))
            with nothing_is_said():
                assert run(prompts) == asked
        assert len(shared_files(served / "cache")) == 2
        assert all(name.endswith(".segment") for name in shared_files(served / "cache"))
    finally:
        subprocess.run(["fusermount3", "-u", str(mounted)], check=False)
