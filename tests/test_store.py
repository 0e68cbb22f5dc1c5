"""Store: an acknowledged commit is there, a half one is not, and nothing damaged is ever served."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from evalcache.canonical import decode
from evalcache.digest import Digest, digest_bytes
from evalcache.errors import CanonicalError, CorruptEntryWarning, FrameError, StoreError
from evalcache.frame import SEGMENT_LIMIT_BYTES
from evalcache.journal import Overhead, RunStarted, Stored
from evalcache.key import key_of
from evalcache.records import Action, Cost, Entry, Environment, Fields, Request, Result, pack_tokens
from evalcache.store import Store

MODEL = digest_bytes(b"model")
SETTINGS = Fields({"max_new_tokens": 8})
ENVIRONMENT = Environment(Fields({"dtype": "float32"}), {"device": "cpu"})

Item = tuple[Digest, Action, Result]


def make_item(number: int, text: str = "") -> Item:
    action = Action(MODEL, Request("generate", pack_tokens([number, number + 1]), SETTINGS), ENVIRONMENT)
    result = Result(pack_tokens([number]), text or f"answer {number}", b"", "stop", {}, {}, Cost(0.5, 2, 1, "cpu", 1))
    return key_of(action), action, result


def make_items(count: int, start: int = 0) -> list[Item]:
    return [make_item(number) for number in range(start, start + count)]


def commit(store: Store, items: list[Item], *events: object) -> None:
    store.commit(items, events, {}, run="r", created_at=1.0)


def alter(store: Store, key: Digest | str, sql: str, *values: object) -> None:
    """Change a row behind the store's back; ``sql`` is the new value, with the old one as ``value``."""
    connection = sqlite3.connect(store.directory / "cache.db")
    name = key.value if isinstance(key, Digest) else key
    changed = connection.execute(f"UPDATE Cache SET value = {sql} WHERE key = ?", (*values, name)).rowcount
    connection.commit()
    connection.close()
    assert changed == 1


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_is_committed_is_served(store: Store) -> None:
    items = make_items(2500)
    commit(store, items)
    absent = make_item(9999)[0]
    found = store.get_many([key for key, _, _ in items] + [absent, items[0][0]])
    assert found == {key: Entry(key, result, "r", 1.0) for key, _, result in items}
    assert (store.get(items[3][0]), store.get(absent)) == (found[items[3][0]], None)
    assert store.get_many([]) == {}
    assert (store.corrupt_count, store.check()) == (0, [])


def test_a_bulk_lookup_finds_the_same_as_single_ones(store: Store) -> None:
    """Many keys at once are read by their place in the file: absent, repeated, damaged and replaced ones as ever."""
    items = make_items(6000)
    commit(store, items)
    commit(store, [make_item(10, "another answer")])
    alter(store, items[20][0], "substr(value, 1, 40)")
    keys = [key for key, _, _ in reversed(items)]
    asked = [*keys, *keys[:50], *(key for key, _, _ in make_items(500, 10_000))]
    with pytest.warns(CorruptEntryWarning):
        found = store.get_many(asked)
    assert found.keys() == set(keys)
    assert isinstance(found.pop(items[20][0]), FrameError)
    assert found[items[10][0]].result.text == "another answer"
    assert all(found[key].result == result for key, _, result in items if key in found and key != items[10][0])
    assert len(store.get_many(asked)) == 5999


def test_another_process_sees_it(store: Store) -> None:
    items = make_items(3)
    commit(store, items)
    with Store(store.directory) as other:
        assert other.waiting.id() == store.waiting.id()
        assert len(other.get_many([key for key, _, _ in items])) == 3


def test_the_last_writer_of_a_key_wins(store: Store) -> None:
    key, action, result = make_item(1)
    commit(store, [(key, action, result)])
    commit(store, [make_item(1, "first"), make_item(1, "refreshed")])
    assert store.get(key).result.text == "refreshed"
    assert (store.stats().entries, store.check()) == (1, [])


def test_questions_settings_and_objects_are_there_for_the_ledger(store: Store) -> None:
    items = make_items(2)
    store.commit(items, (), {"model/aa": b"manifest"}, run="r", created_at=1.0)
    store.commit([], (), {"model/aa": b"another", "model/bb": b""}, run="r", created_at=1.0)
    question = store.get_question(items[1][0])
    assert (question.tokens, question.model) == (pack_tokens([1, 2]), MODEL)
    assert decode(store.get_object(f"fields/{question.settings.hex}")) == dict(SETTINGS)
    assert decode(store.get_object(f"fields/{question.environment.hex}")) == dict(ENVIRONMENT.keyed)
    assert (store.get_object("model/aa"), store.get_object("model/bb"), store.get_object("model/cc")) == (b"manifest", b"", None)
    assert store.get_question(make_item(7)[0]) is None
    assert {key for key, _ in store.frames()} == {key for key, _, _ in items}


def test_frames_are_all_walked(store: Store) -> None:
    items = make_items(1200)
    commit(store, items)
    walked = [key.value for key, _ in store.frames()]
    assert walked == sorted(key.value for key, _, _ in items)


class TestJournal:
    def test_events_come_back_in_order_and_are_forgotten(self, store: Store) -> None:
        items = make_items(2)
        commit(store, items, RunStarted("r", 1.0, "eval"), Overhead("r", 2.0, {"keys": 0.5}))
        commit(store, [], Overhead("r", 3.0, {}))
        rows = store.waiting.read()
        assert [number for number, _ in rows] == [1, 2, 3, 4]
        assert rows[2][1] == Stored("r", tuple(sorted(key.value for key, _, _ in items)))
        assert store.waiting.read(after=1, limit=2) == rows[1:3]
        store.waiting.forget(3)
        assert (store.waiting.read(), store.waiting.count()) == (rows[3:], 1)

    def test_numbers_rise_after_everything_was_forgotten(self, store: Store) -> None:
        commit(store, [], Overhead("r", 1.0, {}))
        store.waiting.forget(1)
        commit(Store(store.directory), [], Overhead("r", 2.0, {}))
        assert [number for number, _ in store.waiting.read()] == [2]

    def test_a_damaged_row_is_set_aside_and_the_rest_goes_on(self, store: Store) -> None:
        for at in range(5):
            commit(store, [], Overhead("r", float(at), {}))
        for number in (1, 2, 4):
            alter(store, f"journal/{number:020d}", "CAST(x'00' || substr(value, 2) AS BLOB)")
        with pytest.warns(CorruptEntryWarning):
            assert [number for number, _ in store.waiting.read(limit=2)] == [3]
        assert [number for number, _ in store.waiting.read(after=3, limit=1)] == [5]
        assert (store.waiting.count(), store.stats().aside) == (2, 3)

    def test_a_damaged_state_draws_a_new_id_and_no_number_twice(self, store: Store) -> None:
        commit(store, [], Overhead("r", 1.0, {}), Overhead("r", 2.0, {}))
        before = store.waiting.id()
        alter(store, "store/state", "x'00'")
        with pytest.warns(CorruptEntryWarning, match="new id"):
            commit(store, [], Overhead("r", 3.0, {}))
        assert store.waiting.id() != before
        assert [number for number, _ in store.waiting.read()] == [1, 2, 3]


class TestDamage:
    @pytest.mark.parametrize(
        "value",
        [
            "NULL",
            "'text'",
            "17",
            "x''",
            "substr(value, 1, length(value) - 1)",
            "CAST(value || x'00' AS BLOB)",
            "CAST(x'ff' || value AS TEXT)",
        ],
    )
    def test_a_bad_frame_is_set_aside_and_counted(self, store: Store, value: str) -> None:
        items = make_items(40)
        commit(store, items)
        bad = items[7][0]
        alter(store, bad, value)
        assert len(store.check()) == 1
        with pytest.warns(CorruptEntryWarning, match="1 bad rows"):
            found = store.get_many([key for key, _, _ in items])
        assert isinstance(found.pop(bad), FrameError)
        assert found == {key: Entry(key, result, "r", 1.0) for key, _, result in items if key != bad}
        assert store.corrupt_count == 1
        if "TEXT" not in value:  # SQLite cannot hand that one over, so it stays where it is until it is replaced
            assert (store.get(bad), store.stats().aside) == (None, 1)
        commit(store, [items[7]])
        assert store.get(bad).result == items[7][2]
        assert store.check() == []

    def test_swapped_rows_are_two_bad_frames(self, store: Store) -> None:
        items = make_items(2)
        commit(store, items)
        (_, first), (_, second) = ((key, dict(store.frames())[key]) for key, _, _ in items)
        alter(store, items[0][0], "?", second)
        alter(store, items[1][0], "?", first)
        with pytest.warns(CorruptEntryWarning, match="belongs to another key"):
            found = store.get_many([key for key, _, _ in items])
        assert [type(value) for value in found.values()] == [FrameError, FrameError]

    def test_a_damaged_question_or_object_is_absent(self, store: Store) -> None:
        items = make_items(1)
        store.commit(items, (), {"model/aa": b"manifest"}, run="r", created_at=1.0)
        alter(store, items[0][0], "CAST(x'00' || substr(value, 2) AS BLOB)")
        alter(store, "object/model/aa", "CAST(x'00' || substr(value, 2) AS BLOB)")
        with pytest.warns(CorruptEntryWarning):
            assert store.get_question(items[0][0]) is None
        with pytest.warns(CorruptEntryWarning):
            assert store.get_object("model/aa") is None
        store.commit(items, (), {"model/aa": b"manifest"}, run="r", created_at=1.0)
        assert store.get_object("model/aa") == b"manifest"
        assert store.check() == []

    def test_rows_that_cannot_be_set_aside_are_reported_all_the_same(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "s", timeout_s=0.05)
        items = make_items(1)
        commit(store, items)
        alter(store, items[0][0], "x'00'")
        other = sqlite3.connect(store.directory / "cache.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.warns(CorruptEntryWarning, match="left where"):
            assert isinstance(store.get(items[0][0]), FrameError)
        other.close()

    def test_strange_rows_are_named_by_check(self, store: Store) -> None:
        connection = sqlite3.connect(store.directory / "cache.db")
        insert = "INSERT INTO Cache (key, raw, store_time, access_time, mode, value) VALUES (?, ?, 1, 1, ?, x'00')"
        connection.executemany(insert, [(b"short", 1, 1), ("other", 1, 1), (7, 1, 1), (b"pickled key", 0, 4)])
        connection.commit()
        connection.close()
        assert len(store.check()) == 4
        assert list(store.frames()) == []


class TestAllOrNothing:
    def test_a_bad_item_in_the_middle_writes_nothing(self, store: Store) -> None:
        good = make_items(3)
        key, action, _ = make_item(50)
        huge = Result(bytes(SEGMENT_LIMIT_BYTES + 4))
        for bad, error in ((Result(scalars={"x": object()}), CanonicalError), (huge, StoreError)):
            with pytest.raises(error):
                store.commit([*good, (key, action, bad)], [Overhead("r", 1.0, {})], {"model/aa": b"m"}, run="r", created_at=1.0)
        assert (store.stats().entries, store.stats().objects, store.waiting.count()) == (0, 0, 0)

    def test_a_full_disk_writes_nothing_and_is_survived(self, store: Store) -> None:
        commit(store, make_items(5))
        pages = store._rows.query("PRAGMA page_count")[0][0]
        store._rows.query(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StoreError, match="full"):
            commit(store, make_items(500, start=100))
        store._rows.query("PRAGMA max_page_count = 1000000")
        assert (store.stats().entries, store.waiting.count()) == (5, 1)
        commit(store, make_items(500, start=100))
        assert (store.stats().entries, [number for number, _ in store.waiting.read()], store.check()) == (505, [1, 2], [])

    def test_no_reader_sees_entries_without_their_event(self, store: Store) -> None:
        done = threading.Event()

        def write() -> None:
            for batch in range(40):
                commit(store, make_items(5, start=batch * 5))
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        seen = "SELECT SUM(typeof(key) = 'blob'), SUM(key LIKE 'journal/%') FROM Cache"
        while not done.is_set():
            entries, events = store._rows.query(seen)[0]
            assert (entries or 0) == 5 * (events or 0)
        thread.join()


WRITER = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import Store, commit, make_items
store, start, batches, size = Store(sys.argv[1]), *map(int, sys.argv[2:5])
for batch in range(batches):
    commit(store, make_items(size, start=start + batch * size))
    os.write(1, b"%d\\n" % batch)
"""


def start_writer(folder: Path, start: int, batches: int, size: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(folder), str(start), str(batches), str(size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})


def test_four_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "s"  # made by whichever of them comes first
    writers = [start_writer(folder, start * 1000, 25, 8) for start in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    for writer in writers:
        writer.stdout.close()
    store = Store(folder)
    expected = {key: result for start in range(4) for key, _, result in make_items(200, start=start * 1000)}
    assert {key: entry.result for key, entry in store.get_many(list(expected)).items()} == expected
    assert [number for number, _ in store.waiting.read()] == list(range(1, 101))
    assert {key for _, event in store.waiting.read() for key in event.keys} == {key.value for key in expected}
    assert store.check() == []


def test_a_killed_writer_loses_at_most_what_was_not_acknowledged(tmp_path: Path) -> None:
    folder, size = tmp_path / "s", 8
    Store(folder).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may even look damaged
        for round_ in range(12):
            writer = start_writer(folder, round_ * 100_000, 10_000, size)
            acknowledged = -1
            while acknowledged < 3 + round_ * 2:
                acknowledged = int(writer.stdout.readline())
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.stdout.read().split()
            writer.stdout.close()
            writer.wait()
            acknowledged = int(rest[-1]) if rest else acknowledged
            store = Store(folder)
            keys = [key for key, _, _ in make_items((acknowledged + 2) * size, start=round_ * 100_000)]
            found = store.get_many(keys)
            assert all(key in found for key in keys[: (acknowledged + 1) * size]), "an acknowledged commit is gone"
            assert len(found) % size == 0, "half a commit is there"
            assert store.waiting.count() * size == store.stats().entries
            store.close()
    assert Store(folder).check() == []
