"""States: limits that hold, what is worth least goes first, and what comes back is what was put there."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
import unittest.mock as mock
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalcache import statefolder
from evalcache.digest import Digest, digest_bytes
from evalcache.records import Array
from evalcache.stateframe import size_bytes_of
from evalcache.states import State, States

LIMIT = 1 << 30
ALWAYS = {"LOOK_S": 0.0, "LOOK_SHARE": 1e9}
"""The folder is looked at whenever it could be."""


def key_of(number: int) -> Digest:
    return digest_bytes(b"%d" % number)


def state_of(number: int, size_bytes: int = 100, kind: Any = bytes) -> State:
    """A state that tells whose it is."""
    data = (key_of(number) * (size_bytes // 16 + 1))[:size_bytes]
    return State({"hidden": Array("uint8", (size_bytes,), kind(data))})


def files_in(folder: Path) -> dict[str, int]:
    """Name → size of all that lies there."""
    found = {}
    for name in os.listdir(folder) if folder.exists() else ():
        try:
            found[name] = (folder / name).stat().st_size
        except FileNotFoundError:
            continue
    return found


class Plain:
    """The rule in a few lines: a place takes something if what is worth less can make room, the least per byte first."""

    def __init__(self, memory_bytes: int, disk_bytes: int) -> None:
        self.limits = {"memory": memory_bytes, "disk": disk_bytes}
        self.places: dict[str, dict[Digest, tuple[int, int]]] = {"memory": {}, "disk": {}}

    def place(self, where: str, key: Digest, size: int, spared: int) -> bool:
        there = self.places[where]
        if where == "disk" and key in there:
            return True
        room = self.limits[where] - sum(size for size, _ in there.values())
        going = []
        for other in sorted(there, key=lambda one: (there[one][1] / there[one][0], one)):
            if size <= room:
                break
            if there[other][1] / there[other][0] >= spared / size:
                return False
            going.append(other)
            room += there[other][0]
        if size > room:
            return False
        gone = [(other, *there.pop(other)) for other in going]
        if where == "memory":
            for other in gone:
                self.place("disk", *other)
        there[key] = size, spared
        return True

    def put(self, key: Digest, size: int, spared: int) -> bool:
        if any(key in there for there in self.places.values()):
            return True
        return self.place("memory", key, size, spared) or self.place("disk", key, size, spared)

    def get(self, key: Digest) -> bool:
        if key in self.places["memory"]:
            return True
        if key not in self.places["disk"]:
            return False
        self.place("memory", key, *self.places["disk"][key])
        return True


numbers = st.integers(0, 15)
puts = st.tuples(st.just("put"), numbers, st.integers(0, 900), st.integers(1, 30))
gets = st.tuples(st.just("get"), numbers, st.just(0), st.just(0))


@settings(max_examples=150)
@given(st.lists(puts | gets, max_size=40), st.integers(0, 3000), st.integers(0, 4000), st.booleans(), st.booleans())
def test_limits_hold_and_the_least_worth_goes_first(
    steps: list[tuple[str, int, int, int]], memory_bytes: int, disk_bytes: int, on_disk: bool, looks: bool
) -> None:
    with mock.patch.dict(vars(statefolder), ALWAYS if looks else {}), tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "states"
        states = States(folder if on_disk else None, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
        plain = Plain(memory_bytes, disk_bytes if on_disk else 0)
        put: dict[int, State] = {}
        for what, number, size, spared in steps:
            key = key_of(number)
            if what == "put":
                state = put.setdefault(number, state_of(number, size))
                expected = plain.put(key, size_bytes_of(state), spared)
                assert states.put(key, state, seconds=spared / 1e6) == expected
            else:
                expected = plain.get(key)
                assert states.has(key) == expected
                assert states.get(key) == (put[number] if expected else None)
            counts, files = states.counts, files_in(folder)
            assert set(states._memory.held) == set(plain.places["memory"])
            assert {name.partition("-")[0] for name in files} == {one.hex for one in plain.places["disk"]}
            assert counts.in_memory_bytes == sum(size for size, _ in plain.places["memory"].values()) <= memory_bytes
            assert counts.on_disk_bytes == sum(files.values()) <= disk_bytes
            assert states.size_bytes == counts.in_memory_bytes + counts.on_disk_bytes


def test_would_keep_says_what_put_does() -> None:
    states = States(None, memory_bytes=2000, disk_bytes=0)
    assert states.put(key_of(0), state_of(0, 1000), seconds=2.0)
    for size_bytes, seconds in ((500, 0.1), (1500, 0.1), (1500, 2.9), (1500, 9.0), (3000, 99.0), (500, 0.0), (1, float("nan"))):
        one = States(None, memory_bytes=2000, disk_bytes=0)
        one.put(key_of(0), state_of(0, 1000), seconds=2.0)
        state = state_of(1, size_bytes)
        assert one.would_keep(size_bytes_of(state), seconds=seconds) == one.put(key_of(1), state, seconds=seconds)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_what_spares_nothing_is_not_kept(seconds: float) -> None:
    states = States(None, memory_bytes=LIMIT, disk_bytes=0)
    assert not states.put(key_of(0), state_of(0), seconds=seconds)
    assert states.get(key_of(0)) is None
    assert states.counts.refused == 1


@pytest.mark.parametrize("kind", [bytearray, lambda data: memoryview(bytearray(data))])
def test_what_is_kept_does_not_change_with_what_it_was_made_of(kind: Any) -> None:
    states = States(None, memory_bytes=LIMIT, disk_bytes=0)
    given = state_of(0, kind=kind)
    states.put(key_of(0), given, seconds=1)
    memoryview(given.tensors["hidden"].data)[:10] = bytes(10)
    given.tensors["other"] = given.tensors["hidden"]  # type: ignore[index]
    found = states.get(key_of(0))
    assert found == state_of(0)
    with pytest.raises(TypeError):
        found.tensors["hidden"] = None  # type: ignore[index, union-attr]


def test_what_memory_holds_is_there_for_the_next_process(tmp_path: Path) -> None:
    states = States(tmp_path / "states", memory_bytes=LIMIT, disk_bytes=1000)
    for number in range(10):
        states.put(key_of(number), state_of(number, 200), seconds=1 + number)
    assert not files_in(tmp_path / "states")
    states.close()
    assert states.counts.evicted == 0, "the most valuable first"
    states.close()
    assert states.counts.in_memory == 0
    later = States(tmp_path / "states", memory_bytes=LIMIT, disk_bytes=1000)
    kept = [number for number in range(10) if later.get(key_of(number)) == state_of(number, 200)]
    assert kept == [7, 8, 9], "as many as there is room for"
    assert later.get(key_of(9)) == state_of(9, 200)
    assert (later.counts.hits, later.counts.disk_hits, later.counts.misses) == (4, 3, 7)


def test_closing_ends_in_time(tmp_path: Path) -> None:
    states = States(tmp_path / "states", memory_bytes=LIMIT, disk_bytes=LIMIT)
    states.put(key_of(0), state_of(0), seconds=1)
    states.close(within_s=0)
    assert not states.has(key_of(0))


def test_threads_get_the_very_state_and_both_limits_hold_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ALWAYS.items():
        monkeypatch.setattr(statefolder, name, value)
    folder = tmp_path / "states"
    states = States(folder, memory_bytes=200_000, disk_bytes=300_000)
    until, wrong, hits = time.monotonic() + 1.0, [], []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            number = draw.randrange(60)
            if draw.random() < 0.5:
                states.put(key_of(number), state_of(number, 20_000 - number), seconds=draw.random())
            elif (found := states.get(key_of(number))) is not None:
                hits.append(number)
                if found != state_of(number, 20_000 - number):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        counts = states.counts
        assert counts.in_memory_bytes <= 200_000
        assert counts.on_disk_bytes <= 300_000
    for thread in threads:
        thread.join()
    assert not wrong
    counts = states.counts
    assert hits and counts.disk_hits and counts.evicted, "the limits were felt"
    assert counts.on_disk_bytes == sum(files_in(folder).values()) <= 300_000
    assert counts.in_memory_bytes == sum(one.size_bytes for one in states._memory.held.values())


def test_what_is_kept_is_found_at_every_moment_of_its_way_to_the_disk(tmp_path: Path) -> None:
    states = States(tmp_path / "states", memory_bytes=50_000, disk_bytes=LIMIT)
    kept, missed, done = [], [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            for number in kept[-4:]:
                if states.get(key_of(number)) != state_of(number, 20_000):
                    missed.append(number)

    thread = threading.Thread(target=ask)
    thread.start()
    for number in range(300):
        assert states.put(key_of(number), state_of(number, 20_000), seconds=1 + number)  # and the one before last leaves memory
        kept.append(number)
    done.set()
    thread.join()
    assert not missed
    assert states.counts.hits and states.counts.on_disk > 250


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_goes_on_with_what_it_inherited(tmp_path: Path) -> None:
    states = States(tmp_path / "states", memory_bytes=3000, disk_bytes=LIMIT)
    states.put(key_of(0), state_of(0), seconds=1e6)
    stop = threading.Event()

    def work() -> None:
        number = 10
        while not stop.is_set():
            states.get(key_of(0))
            states.put(key_of(number), state_of(number, 1500), seconds=number / 1000)
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(8):  # at some moment the thread holds the lock
            child = os.fork()
            if not child:
                signal.alarm(20)
                right = states.get(key_of(0)) == state_of(0)
                right &= states.put(key_of(1), state_of(1, 5000), seconds=1) and states.get(key_of(1)) == state_of(1, 5000)
                os._exit(0 if right and not states._leaving and not states._folder._underway else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()
