"""Folders that fail while a wrapped command uses them: it goes on and ends as it would, and one warning says what to do.

The faults are real ones: small file systems that are mounted and filled, rights that are taken away, folders that are deleted.
Only the clock is a stand-in: `time.time` is replaced, since a machine's clock is not a test's to set. The engine is the one of
`test_cache`, which needs no torch; everything of evalcache between it and the folder is the real thing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from recorded import make_action, make_result, write

from evalcache.sidetable import SideTable
from evalcache.store import Store

EVAL = """
    import contextlib, os, subprocess, sys, time
    sys.path.insert(0, {tests!r})
    from test_cache import Engine, ask
    from evalcache.watch import Watch

    way = os.environ.get("WAY", "run")
    if way == "cache":
        from evalcache.cache import Cache
        cache = Cache()
    else:
        import evalcache
        cache = evalcache.enable().cache
    engine = Engine()
    watch = cache and cache.watch(Watch(engine.manifest, "engine"))
    for step in range(6):
        if command := os.environ.get(f"AT_{{step}}"):
            subprocess.run(["sh", "-c", command], check=True)
        if "CLOCK" in os.environ and step == 3:
            now, now_ns = time.time, time.time_ns
            time.time, time.time_ns = lambda: now() - 3600, lambda: now_ns() - 3600 * 10**9
        prompts = [(100 * step + row,) * 50 for row in range(20)]
        made = ask(cache, engine, prompts, watch) if cache else [[token + 1 for token in prompt] for prompt in prompts]
        print(step, made)
    print("asked", len(engine.asked), file=sys.stderr)
    if way == "cache":
        cache.close()
    sys.exit(7)
"""
RIGHT = "".join(f"{step} {[[100 * step + row + 1] * 50 for row in range(20)]}\n" for step in range(6))
POWERLESS = "setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-dac_override,-dac_read_search"
"""Root without the right to ignore modes."""


def can_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-ec", "mount -t tmpfs -o size=1m tmpfs /mnt && command -v setpriv"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def long(*cases: str) -> list[Any]:
    """Cases for the long campaign."""
    return [pytest.param(case, marks=pytest.mark.campaign) for case in cases]


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs a mount namespace of its own")


@dataclass
class Ran:
    """What one process said and how it ended. ``asked``: how many requests its engine was asked."""

    code: int
    out: str
    err: str

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if "Warning: " in line or line.startswith("evalcache: warning:")]

    @property
    def asked(self) -> int:
        return int(self.err.partition("asked ")[2].split()[0])

    def is_right(self) -> bool:
        """Whether a user would see nothing but a warning: the same answers and the same end."""
        return self.code == 7 and self.out == RIGHT and "Traceback" not in self.err


@dataclass
class Place:
    """A small disk within a mount namespace, and the commands that use it, in order."""

    folder: Path
    lines: list[str]

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.disk = self.folder / "disk"
        self.disk.mkdir()
        (self.folder / "eval.py").write_text(textwrap.dedent(EVAL.format(tests=str(Path(__file__).parent))))
        self.ran = 0

    def run(self, *, way: str = "run", powerless: bool = False, options: str = "", **at: str) -> None:
        """One eval; ``at`` are commands that run before a step of it (``at_3="rm …"``)."""
        words = [sys.executable, *options.split(), str(self.folder / "eval.py")]
        if way == "run":
            words = [sys.executable, "-m", "evalcache", "run", "--", *words]
        self.do(" ".join(words), way, powerless, **at)

    def verb(self, *words: str) -> None:
        """One verb of the command line."""
        self.do(" ".join([sys.executable, "-m", "evalcache", *words]))

    def do(self, command: str, way: str = "", powerless: bool = False, **at: str) -> None:
        """One command, whose outcome is kept."""
        told = " ".join([f"WAY={way}", *(f"{step.upper()}='{what}'" for step, what in at.items())])
        name = self.folder / str(self.ran)
        self.lines.append(f"code=0; env {told} {POWERLESS if powerless else ''} {command} >{name}.out 2>{name}.err || code=$?")
        self.lines.append(f"echo $code >{name}.code")
        self.ran += 1

    def play(self) -> list[Ran]:
        """Do all of it."""
        script = "\n".join(["set -e", f"cd {self.folder}", *self.lines])
        environment = os.environ | {"EVALCACHE_DIR": str(self.disk / "cache")}
        subprocess.run(["unshare", "-rm", "sh", "-c", script], env=environment, check=True, timeout=120)
        names = [self.folder / str(number) for number in range(self.ran)]
        return [
            Ran(int(Path(f"{name}.code").read_text()), Path(f"{name}.out").read_text(), Path(f"{name}.err").read_text())
            for name in names
        ]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Nothing mounted yet."""
    return Place(tmp_path / "place", [])


def mount(place: Place, size: str) -> None:
    place.lines.append(f"mount -t tmpfs -o size={size} tmpfs {place.disk}")


def fill(place: Place) -> str:
    return f"cat /dev/zero >{place.disk}/fill 2>/dev/null || true"


@needs_mounts
@pytest.mark.parametrize("way", ["run", "strict warnings", *long("enable", "cache")])
def test_a_disk_that_fills_up(place: Place, way: str) -> None:
    mount(place, "5m")
    if way == "strict warnings":
        place.run(options="-W error", at_3=fill(place))
    else:
        place.run(way=way, at_3=fill(place))
    place.lines.append(f"ls -R {place.disk} >{place.folder}/left; rm {place.disk}/fill")
    place.run()
    place.verb("verify")
    first, second, verified = place.play()
    assert first.is_right() and first.asked == 120
    assert len(first.warnings) == 1, first.err
    assert "database or disk is full" in first.warnings[0] and "EVALCACHE_DIR" in first.warnings[0]
    left = (place.folder / "left").read_text()
    assert ".ledger" not in left and ".tmp" not in left, "nothing is left half-written"
    assert second.is_right() and not second.warnings and second.asked == 60, "what was stored before the fault is there"
    assert verified.code == 0, verified.out


@needs_mounts
@pytest.mark.parametrize("way", ["run", *long("cache")])
def test_room_that_comes_back_gets_what_was_held(place: Place, way: str) -> None:
    mount(place, "9m")
    place.run(way=way, at_2=fill(place), at_5=f"rm {place.disk}/fill")
    place.run()
    place.verb("verify")
    place.verb("query", "'SELECT hits, misses, status FROM hits_by_run ORDER BY started_at'", "--json")
    first, second, verified, asked = place.play()
    assert first.is_right() and len(first.warnings) == 1, first.err
    assert second.is_right() and not second.warnings and second.asked == 0, "everything was stored at the end"
    assert verified.code == 0, verified.out
    status = "ok" if way == "cache" else "failed"  # with 7, which `Cache.close` is not told
    told = [{"hits": 0, "misses": 120, "status": status}, {"hits": 120, "misses": 0, "status": "failed"}]
    assert json.loads(asked.out) == told, "and everything was told"


@needs_mounts
@pytest.mark.parametrize("size", long("300k", "700k", "1m", "1500k"))
def test_a_disk_that_is_too_small_for_the_end(place: Place, size: str) -> None:
    """The store fits, more or less; the ledger, which is made at the end, does not."""
    mount(place, size)
    place.run()
    place.lines.append(f"mount -o remount,size=20m {place.disk}")
    place.run()
    place.verb("verify")
    first, second, verified = place.play()
    assert first.is_right() and len(first.warnings) == 1, first.err
    assert second.is_right() and not second.warnings, second.err
    assert verified.code == 0, verified.out


@needs_mounts
@pytest.mark.parametrize("fault", ["full", "read-only", *long("forbidden", "limited", "a file")])
def test_a_folder_that_cannot_be_used_from_the_start(place: Place, fault: str) -> None:
    mount(place, "9m")
    ready = {
        "full": f"{fill(place)}",
        "read-only": f"mount -o remount,ro {place.disk}",
        "forbidden": f"mkdir {place.disk}/cache; chmod 0 {place.disk}/cache",
        "limited": "ulimit -f 80",
        "a file": f"touch {place.disk}/cache",
    }[fault]
    if fault == "limited":
        place.lines.append("(" + ready)
    else:
        place.lines.append(ready)
    place.run(powerless=fault == "forbidden")
    if fault == "limited":
        place.lines.append(")")
    (first,) = place.play()
    assert first.is_right() and len(first.warnings) == 1, first.err
    assert "cannot open the cache" in first.warnings[0] or "does not answer" in first.warnings[0]
    assert "EVALCACHE_DIR" in first.warnings[0], first.err


@needs_mounts
def test_rights_that_are_taken_away_meanwhile(place: Place) -> None:
    place.run(powerless=True, at_3=f"chmod 0 {place.disk}/cache/store {place.disk}/cache")
    place.lines.append(f"chmod 700 {place.disk}/cache {place.disk}/cache/store")
    place.run(powerless=True)
    place.verb("verify")
    first, second, verified = place.play()
    assert first.is_right() and len(first.warnings) == 1, first.err
    assert second.is_right() and not second.warnings and second.asked < 120
    assert verified.code == 0, verified.out


@needs_mounts
def test_a_ledger_that_cannot_be_made_costs_a_warning_and_nothing_is_lost(place: Place) -> None:
    place.lines.append(f"mkdir -p {place.disk}/cache/ledger.duckdb")
    place.run()
    place.lines.append(f"rmdir {place.disk}/cache/ledger.duckdb")
    place.run()
    place.verb("query", "'SELECT hits, misses FROM hits_by_run ORDER BY started_at'", "--json")
    first, second, asked = place.play()
    assert first.is_right() and len(first.warnings) == 1 and "ledger" in first.warnings[0], first.err
    assert second.is_right() and not second.warnings and second.asked == 0
    assert json.loads(asked.out) == [{"hits": 0, "misses": 120}, {"hits": 120, "misses": 0}]


@pytest.mark.parametrize("way", ["run", *long("cache")])
def test_a_folder_that_is_deleted_meanwhile(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "cache"
    first = evaluate(tmp_path, way, AT_3=f"rm -rf {folder}")
    assert first.is_right() and first.asked == 120
    assert len(first.warnings) == 1 and "was deleted" in first.warnings[0], first.err
    second = evaluate(tmp_path, way)
    assert second.is_right() and not second.warnings and second.asked == 60, "what came after is in a store made anew"
    assert json.loads(verb(tmp_path, "verify", "--json").out)["good"]
    runs = json.loads(verb(tmp_path, "query", "SELECT hits, misses, command FROM hits_by_run ORDER BY started_at", "--json").out)
    # The new one was told of the run's beginning, of its model, and of what was asked since.
    assert [(run["hits"], run["misses"]) for run in runs] == [(0, runs[0]["misses"]), (60, 60)] and runs[0]["command"]
    assert 60 <= runs[0]["misses"] < 120
    models = json.loads(verb(tmp_path, "query", "SELECT count(*) AS n FROM models WHERE manifest IS NOT NULL", "--json").out)
    assert models == [{"n": 1}]


@pytest.mark.campaign
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0 or not shutil.which("mkfs.btrfs"), reason="needs root and mkfs.btrfs")
@pytest.mark.parametrize("fault", ["quota", "full"])
def test_a_file_system_that_copies_what_is_written(tmp_path: Path, fault: str) -> None:
    """btrfs, on a loop device: SQLite's mapped index would end the process there (SIGBUS) where the room or a quota runs out."""
    image, disk = tmp_path / "image", tmp_path / "cache"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.btrfs", "-q", image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    try:
        if fault == "quota":
            for words in (["quota", "enable", disk], ["qgroup", "limit", "5M", disk]):
                subprocess.run(["btrfs", *words], check=True, capture_output=True)
        first = evaluate(tmp_path, "run", AT_3=f"cat /dev/zero >{disk}/fill || true; sync")
        assert first.is_right() and len(first.warnings) == 1, (first.code, first.err)
        (disk / "fill").unlink()
        os.sync()
        if fault == "quota":
            subprocess.run(["btrfs", "qgroup", "limit", "none", disk], check=True)
        second = evaluate(tmp_path, "run")
        assert second.is_right() and second.asked <= 60 and verb(tmp_path, "verify").code == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_no_file_is_mapped_where_writing_to_it_might_need_room(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("evalcache.folder._statfs_type", lambda path: 0x9123683E)  # a stand-in for btrfs
    store = Store(tmp_path / "store")
    table = SideTable(tmp_path / "files.sqlite")
    action, result = make_action(), make_result()
    (key,) = write(store, "ab" * 16, 1.0, [(action, result)])
    assert table.put(b"key", b"value") and table.get(b"key") == b"value"
    assert store.get(key).result == result and not store.check()
    assert not [path.name for path in tmp_path.rglob("*-shm")]


REAL = """
    import os, subprocess, sys
    sys.path.insert(0, {tests!r})
    import torch, transformers, tiny
    torch.set_num_threads(1)
    if not os.path.isdir("model"):
        tiny.build("llama").save_pretrained("model")
    for step in range(4):
        if command := os.environ.get(f"AT_{{step}}"):
            subprocess.run(["sh", "-c", command], check=True)
        model = transformers.AutoModelForCausalLM.from_pretrained("model", dtype="float32")
        print(model.generate(**tiny.prompts(seed=step), max_new_tokens=8, do_sample=False).tolist())
    sys.exit(7)
"""


@needs_mounts
@pytest.mark.campaign
@pytest.mark.parametrize("fault", ["full", "full from the start", "deleted"])
def test_a_real_model_on_a_failing_folder(place: Place, fault: str) -> None:
    """A checkpoint is loaded, fingerprinted and asked: store, ledger and side tables all lie in the folder that fails."""
    (place.folder / "eval.py").write_text(textwrap.dedent(REAL.format(tests=str(Path(__file__).parent))))
    mount(place, "3m")
    if fault == "full from the start":
        place.lines.append(fill(place))
    place.do(f"{sys.executable} {place.folder}/eval.py")
    at = {"full": {"at_2": fill(place)}, "deleted": {"at_2": f"rm -rf {place.disk}/cache"}}.get(fault, {})
    place.do(f"{sys.executable} -m evalcache run -- {sys.executable} {place.folder}/eval.py", **at)
    bare, ours = place.play()
    assert (bare.code, ours.code, ours.out) == (7, 7, bare.out) and len(bare.out.splitlines()) == 4
    assert len(ours.warnings) == 1 and "EVALCACHE_DIR" in ours.warnings[0], ours.err


def test_a_clock_that_is_moved_back(tmp_path: Path) -> None:
    """An hour, in the middle of a run: by replacing `time.time`, as is said above."""
    first = evaluate(tmp_path, "run", CLOCK="1")
    second = evaluate(tmp_path, "run")
    assert first.is_right() and second.is_right() and not (first.warnings or second.warnings)
    assert (first.asked, second.asked) == (120, 0)
    assert json.loads(verb(tmp_path, "verify", "--json").out)["good"]
    sql = "SELECT count(*) AS n, count(DISTINCT seq) AS seqs, count(DISTINCT run) AS runs FROM lookups WHERE outcome = 'miss'"
    assert json.loads(verb(tmp_path, "query", sql, "--json").out) == [{"n": 120, "seqs": 6, "runs": 1}]


def evaluate(folder: Path, way: str, **more: str) -> Ran:
    script = folder / "eval.py"
    script.write_text(textwrap.dedent(EVAL.format(tests=str(Path(__file__).parent))))
    start = [sys.executable, "-m", "evalcache", "run", "--"] if way == "run" else []
    return process(folder, [*start, sys.executable, str(script)], WAY=way, **more)


def verb(folder: Path, *words: str) -> Ran:
    return process(folder, [sys.executable, "-m", "evalcache", *words])


def process(folder: Path, command: list[str], **more: str) -> Ran:
    environment = os.environ | {"EVALCACHE_DIR": str(folder / "cache"), **more}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)
