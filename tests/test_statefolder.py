"""The folder of states: other processes, damaged files, folders that fail, processes that are killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from test_failing_folders import needs_mounts
from test_states import ALWAYS, LIMIT, files_in, key_of, state_of

from evalcache import statefolder
from evalcache.errors import CorruptEntryWarning
from evalcache.stateframe import size_bytes_of
from evalcache.states import States

TESTS = str(Path(__file__).parent)


def open_states(folder: Path, disk_bytes: int = LIMIT) -> States:
    """With files only, so that each answer is read."""
    return States(folder, memory_bytes=0, disk_bytes=disk_bytes)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs ``code`` with this file's names and sys.argv[1:]."""
    code = (
        f"import sys, time, warnings; sys.path.insert(0, {TESTS!r}); from test_states import *; from pathlib import Path\n{code}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one state, number 0."""
    made = tmp_path / "cache" / "states"
    assert open_states(made).put(key_of(0), state_of(0), seconds=1)
    return made


def the_file(folder: Path) -> Path:
    (name,) = files_in(folder)
    return folder / name


def test_files_are_their_owners_alone_and_say_their_worth(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    assert the_file(folder).stat().st_mode & 0o777 == 0o600
    assert the_file(folder).name == f"{key_of(0).hex}-1000000"


def test_asking_makes_no_folder(tmp_path: Path) -> None:
    states = open_states(tmp_path / "states")
    assert states.get(key_of(0)) is None
    assert not states.has(key_of(0))
    assert not (tmp_path / "states").exists()


def test_every_flipped_bit_and_every_cut_is_absent_deleted_and_counted(folder: Path) -> None:
    path = the_file(folder)
    frame = path.read_bytes()
    draw = random.Random(7)
    damages = [frame[:length] for length in range(len(frame))] + [frame + b"\0", frame * 2]
    for _ in range(300):
        damaged = bytearray(frame)
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            damaged[draw.randrange(len(frame))] ^= 1 << draw.randrange(8)
        damages.append(bytes(damaged))
    for damaged in damages:
        path.write_bytes(damaged)
        states = open_states(folder)
        with pytest.warns(CorruptEntryWarning, match="check the disk"):
            found = states.get(key_of(0))
        if damaged == frame:  # flipped there and back
            assert found == state_of(0)
            continue
        assert found is None
        assert not path.exists()
        assert (states.counts.damaged, states.counts.on_disk) == (1, 0)
        assert not states.has(key_of(0))


def test_damage_is_told_once(folder: Path) -> None:
    for number in range(1, 4):
        open_states(folder).put(key_of(number), state_of(number), seconds=1)
    for name in files_in(folder):
        (folder / name).write_bytes(b"evcs")
    states = open_states(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [states.get(key_of(number)) for number in range(4)] == [None] * 4
    assert len(told) == 1
    assert states.counts.damaged == 4


def test_another_keys_file_under_this_keys_name_is_refused(folder: Path) -> None:
    path = the_file(folder)
    path.rename(folder / path.name.replace(key_of(0).hex, key_of(1).hex))
    states = open_states(folder)
    with pytest.warns(CorruptEntryWarning, match="another key"):
        assert states.get(key_of(1)) is None
    assert not files_in(folder)


def test_what_else_lies_there_is_left_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / f"{key_of(1).hex}-0").write_text("of no worth")
    (folder / f"{key_of(2).hex}-5").mkdir()
    (folder / f"{key_of(3).hex}-5").symlink_to(the_file_named(folder, 0))
    os.mkfifo(folder / f"{key_of(4).hex}-5")
    states = open_states(folder, disk_bytes=1)
    assert [states.get(key_of(number)) for number in range(5)] == [None] * 5
    assert sorted(os.listdir(folder)) == sorted(
        ["notes.txt", *(f"{key_of(n).hex}-{w}" for n, w in ((1, 0), (2, 5), (3, 5), (4, 5)))]
    )


def the_file_named(folder: Path, number: int) -> Path:
    (path,) = folder.glob(f"{key_of(number).hex}-*")
    return path


def test_a_smaller_limit_deletes_the_least_worth(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    for number in range(10):
        open_states(folder).put(key_of(number), state_of(number), seconds=1 + number)
    size_bytes = sum(files_in(folder).values()) // 10
    states = open_states(folder, disk_bytes=3 * size_bytes)
    assert [number for number in range(10) if states.has(key_of(number))] == [7, 8, 9]
    assert sum(files_in(folder).values()) == 3 * size_bytes
    assert states.counts.evicted == 7


def test_what_nobody_has_read_for_a_day_makes_room(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    states = open_states(folder)
    for number in range(3):
        states.put(key_of(number), state_of(number), seconds=100)
        long_ago = time.time() - statefolder.UNUSED_S - 1
        os.utime(the_file_named(folder, number), (long_ago, long_ago))
    states = open_states(folder, disk_bytes=sum(files_in(folder).values()))
    assert states.get(key_of(1)) == state_of(1)  # and now somebody has
    assert time.time() - the_file_named(folder, 1).stat().st_mtime < 60, "which other processes see"
    assert states.put(key_of(3), state_of(3), seconds=1)
    assert states.put(key_of(4), state_of(4), seconds=1)
    assert not states.put(key_of(5), state_of(5), seconds=1)
    assert [number for number in range(6) if states.has(key_of(number))] == [1, 3, 4]
    assert open_states(folder).get(key_of(1)) == state_of(1)


def test_of_two_files_of_one_key_one_stays(folder: Path) -> None:
    other = folder / f"{key_of(0).hex}-2000000"
    other.write_bytes(the_file(folder).read_bytes())
    assert open_states(folder).get(key_of(0)) == state_of(0)
    assert list(files_in(folder)) == [other.name]


def test_what_killed_processes_left_is_swept_and_what_others_write_counts(folder: Path) -> None:
    left, fresh = folder / f".unfinished-1-{'a' * 32}", folder / f".unfinished-1-{'b' * 32}"
    for path in (left, fresh):
        path.write_bytes(bytes(1000))
    os.utime(left, (time.time() - 3700,) * 2)
    states = open_states(folder)
    assert states.has(key_of(0))
    assert states.counts.on_disk_bytes == 1000 + the_file_named(folder, 0).stat().st_size
    assert not left.exists() and fresh.exists()


def test_a_file_that_another_process_deleted_is_a_miss(folder: Path) -> None:
    states = open_states(folder)
    assert states.has(key_of(0))
    the_file(folder).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert states.get(key_of(0)) is None
        assert not states.has(key_of(0))
        assert states.put(key_of(0), state_of(0), seconds=1)
        assert states.get(key_of(0)) == state_of(0)


def test_two_processes_see_each_others_states(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    states = open_states(folder)
    assert not states.has(key_of(1))  # the folder was looked at, and will be again
    states.put(key_of(0), state_of(0), seconds=1)
    code = """
states = States(Path(sys.argv[1]), memory_bytes=0, disk_bytes=LIMIT)
assert states.get(key_of(0)) == state_of(0)
assert states.put(key_of(1), state_of(1), seconds=1)
"""
    process = start(code, folder)
    until = time.monotonic() + 60
    while states.get(key_of(1)) is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.communicate() == ("", "")
    assert states.get(key_of(1)) == state_of(1)


def test_a_change_within_one_step_of_the_file_systems_clock_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ALWAYS.items():
        monkeypatch.setattr(statefolder, name, value)
    states = open_states(folder)
    assert not states.has(key_of(1))
    looked_at = folder.stat()
    open_states(folder).put(key_of(1), state_of(1), seconds=1)
    os.utime(folder, ns=(looked_at.st_atime_ns, looked_at.st_mtime_ns))
    assert states.get(key_of(1)) == state_of(1)


def test_a_look_in_the_middle_of_a_write_counts_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ALWAYS.items():
        monkeypatch.setattr(statefolder, name, value)
    states = open_states(tmp_path / "states", disk_bytes=2 * size_bytes_of(state_of(0)))
    replace = os.replace

    def replace_and_look(source: str, target: str) -> None:
        replace(source, target)
        thread = threading.Thread(target=states.has, args=(key_of(9),))
        thread.start()
        thread.join()

    monkeypatch.setattr(os, "replace", replace_and_look)
    for number in range(2):
        assert states.put(key_of(number), state_of(number), seconds=1)
    assert [states.has(key_of(number)) for number in range(2)] == [True, True]
    assert states.counts.evicted == 0


def test_the_limit_of_two_processes_that_write(tmp_path: Path) -> None:
    """Kept together, but for the part that each may write between two looks; and kept to the byte when they are done."""
    folder = tmp_path / "states"
    code = """
states, draw = States(Path(sys.argv[1]), memory_bytes=0, disk_bytes=2_000_000), random.Random(sys.argv[2])
until = time.monotonic() + 1.0
while time.monotonic() < until:
    number = draw.randrange(10_000)
    states.put(key_of(number), state_of(number, 50_000), seconds=draw.random())
    found = states.get(key_of(number))
    assert found is None or found == state_of(number, 50_000)
"""
    processes = [start(code, folder, seed) for seed in range(2)]
    most_bytes = 0
    while any(process.poll() is None for process in processes):
        most_bytes = max(most_bytes, sum(files_in(folder).values()))
        time.sleep(0.005)
    assert 1_500_000 < most_bytes < 2_500_000
    for process in processes:
        assert process.communicate() == ("", "")
        assert process.returncode == 0
    states = open_states(folder, disk_bytes=2_000_000)
    numbers = [number for number in range(10_000) if states.has(key_of(number))]
    assert 30 <= len(numbers) <= 40
    assert sum(files_in(folder).values()) == states.counts.on_disk_bytes <= 2_000_000
    assert all(states.get(key_of(number)) == state_of(number, 50_000) for number in numbers)


BIG = bytes(range(256)) * (1 << 16)


def test_a_process_killed_while_writing_leaves_nothing_half_done(tmp_path: Path) -> None:
    code = """
states, big = States(Path(sys.argv[1]), memory_bytes=0, disk_bytes=LIMIT), bytes(range(256)) * (1 << 16)
print("begun", flush=True)
for number in range(1000):
    states.put(key_of(number), State({**state_of(number).tensors, "big": Array("uint8", (len(big),), big)}), seconds=1)
"""
    draw, finished, unfinished = random.Random(1), 0, 0
    for turn in range(4):
        folder = tmp_path / str(turn)
        process = start(code, folder)
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(0.02 + draw.random() / 10)
        process.kill()
        process.communicate()
        names = files_in(folder)
        states = open_states(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for number in range(sum(not name.startswith(".") for name in names)):
                found = states.get(key_of(number))
                assert found is not None and found.tensors["hidden"] == state_of(number).tensors["hidden"]
                assert found.tensors["big"].data == BIG
                finished += 1
        left = [folder / name for name in names if name.startswith(".")]
        assert len(left) <= 1
        for path in left:
            unfinished += 1
            os.utime(path, (time.time() - 3700,) * 2)
            assert open_states(folder).has(key_of(0)) == (len(names) > 1)
            assert not path.exists()
    assert finished and unfinished, "kills came in the middle"


def test_a_folder_that_is_deleted_is_made_again(folder: Path) -> None:
    states = open_states(folder)
    assert states.has(key_of(0))
    the_file(folder).unlink()
    folder.rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert states.get(key_of(0)) is None
        assert states.put(key_of(1), state_of(1), seconds=1)
        assert states.get(key_of(1)) == state_of(1)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_folders_place_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("in the way")
    states = States(tmp_path / "states", memory_bytes=1000, disk_bytes=LIMIT)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert states.put(key_of(0), state_of(0), seconds=1)
        assert not states.put(key_of(1), state_of(1, 2000), seconds=1)
        assert states.get(key_of(1)) is None
        assert states.get(key_of(0)) == state_of(0), "memory goes on"
        states.close()
    assert len(told) == 1
    assert "EVALCACHE_DIR" in str(told[0].message)
    assert (tmp_path / "states").read_text() == "in the way"


@needs_mounts
def test_a_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    code = """
import subprocess
warnings.simplefilter("always")
disk = Path(sys.argv[1])
states = States(disk / "cache" / "states", memory_bytes=0, disk_bytes=LIMIT)
size = 200_000
kept = [number for number in range(10) if states.put(key_of(number), state_of(number, size), seconds=1)]
assert kept == [0, 1, 2, 3, 4], kept
assert not any(name.startswith(".") for name in files_in(states._folder.directory))
assert all(states.get(key_of(number)) == state_of(number, size) for number in kept)
assert not states.would_keep(size, seconds=1), "left alone for a while"
next((disk / "cache" / "states").glob("*")).unlink()
states = States(disk / "cache" / "states", memory_bytes=0, disk_bytes=LIMIT)
assert states.put(key_of(9), state_of(9, size), seconds=1), "there is room again"
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
assert not states.put(key_of(8), state_of(8), seconds=1)
states = States(disk / "cache" / "states", memory_bytes=0, disk_bytes=1)
assert states.get(key_of(9)) in (None, state_of(9, size))  # too much is there, and cannot be deleted
states = States(disk / "cache" / "states", memory_bytes=0, disk_bytes=LIMIT)
assert states.get(key_of(9)) == state_of(9, size)
print("done")
"""
    script = tmp_path / "script.py"
    script.write_text(f"import sys, time, warnings; sys.path.insert(0, {TESTS!r}); from test_states import *\n{code}")
    (tmp_path / "disk").mkdir()
    commands = f"mount -t tmpfs -o size=1100k tmpfs {tmp_path}/disk; {sys.executable} {script} {tmp_path}/disk"
    done = subprocess.run(["unshare", "-rm", "sh", "-ec", commands], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr.count("Warning: ") == 1, done.stderr
    assert "No space left" in done.stderr and "EVALCACHE_DIR" in done.stderr
