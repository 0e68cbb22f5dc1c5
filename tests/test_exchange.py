"""Entries as one file: what comes back is what went in, and nothing of a file is believed."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import duckdb
import filelock
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import (
    BASE,
    FIRST,
    NOON,
    SECOND,
    TUNED,
    ask_all,
    begin,
    full_result,
    look,
    make_action,
    make_result,
    open_pair,
    write,
)

from evalcache.audit import audit
from evalcache.digest import Digest, Hasher
from evalcache.entryview import describe_conflict
from evalcache.errors import ExchangeError
from evalcache.exchange import export_entries, import_entries
from evalcache.frame import encode_frame
from evalcache.journal import LookedUp
from evalcache.key import key_of, key_of_question
from evalcache.records import Array, Cost, Result, Taken, pack_logprobs, pack_tokens
from evalcache.selection import select
from evalcache.store import Store

ENTRIES = [(make_action(prompt=(1, 2, n), holes=[n]), make_result((7, n))) for n in range(5)]
ENTRIES += [(make_action(TUNED), full_result())]


def filled(folder: Path) -> Store:
    store, ledger = open_pair(folder)
    ask_all(store, FIRST, NOON, ENTRIES)
    write(store, FIRST, NOON, [], [], TUNED)
    ledger.sync(store)
    return store


def held(store: Store) -> tuple[dict[Digest, bytes], dict[str, bytes]]:
    return dict(store.frames()), dict(store.objects())


def test_what_went_in_comes_out_and_coming_again_changes_nothing(tmp_path):
    here, there = filled(tmp_path / "here"), Store(tmp_path / "there" / "store")
    made = export_entries(here, tmp_path / "x.evalcache")
    assert (made.entries, made.objects, made.damaged) == (6, 4, 0)
    assert stat.S_IMODE((tmp_path / "x.evalcache").stat().st_mode) == 0o600
    assert import_entries(there, tmp_path / "x.evalcache") == Taken(new=6)
    assert held(there) == held(here)
    assert import_entries(there, tmp_path / "x.evalcache") == import_entries(here, tmp_path / "x.evalcache") == Taken(known=6)
    assert held(there) == held(here) and list(there.conflicts()) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here", "there", "x.evalcache"], "nothing is left behind"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts | st.binary(max_size=20)
numbers = st.none() | st.integers(0, 9)
arrays = st.builds(Array, texts, st.lists(st.integers(0, 9)).map(tuple), st.binary(max_size=64))
results = st.builds(
    Result,
    tokens=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9).map(pack_tokens),
    text=st.none() | texts,
    logprobs=st.lists(st.floats(), max_size=4).map(pack_logprobs),
    finish_reason=st.none() | st.sampled_from(["stop", "length"]),
    scalars=st.dictionaries(texts, plain, max_size=3),
    arrays=st.dictionaries(texts, arrays, max_size=2),
    cost=st.none() | st.builds(Cost, st.floats(0, 1e9), numbers, numbers, texts, st.integers(1, 9)),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(results, min_size=1, max_size=5))
def test_everything_that_a_result_can_hold_comes_back(tmp_path_factory, answers):
    folder = tmp_path_factory.mktemp("round")
    here, there = Store(folder / "here"), Store(folder / "there")
    keys = write(here, FIRST, NOON, [(make_action(prompt=(n,)), answer) for n, answer in enumerate(answers)])
    export_entries(here, folder / "file")
    import_entries(there, folder / "file")
    assert [there.get(key).result for key in keys] == answers
    assert {key_of_question(question) for question in there.get_questions(keys).values()} == set(keys)


@pytest.mark.parametrize(
    "one, other, is_another", [(float("nan"), float("nan"), False), (0.0, -0.0, True), (1, 1.0, True), (1, True, True)]
)
def test_answers_are_told_apart_by_their_bytes(tmp_path, one, other, is_another):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    for store, value in ((here, one), (there, other)):
        write(store, FIRST, NOON, [(make_action(), make_result(scalars={"sum": value}))])
    export_entries(here, tmp_path / "file")
    assert import_entries(there, tmp_path / "file") == (Taken(conflicts=1) if is_another else Taken(known=1))
    assert [describe_conflict(*pair)["differs"] for pair in there.conflicts()] == ["scalars"] * is_another


def test_another_answer_is_kept_beside_the_one_that_is_served(tmp_path, store_folder):
    here, there = Store(tmp_path / "here"), Store(store_folder / "store")
    action = make_action()
    (key,) = write(here, FIRST, NOON, [(action, make_result((7, 8), text="this"))])
    write(there, SECOND, NOON, [(action, make_result((7, 9), text="that"))])
    export_entries(here, tmp_path / "file")
    for _ in range(2):
        assert import_entries(there, tmp_path / "file") == Taken(conflicts=1)
    assert there.get(key).result.text == "that"
    ((mine, other),) = there.conflicts()
    assert (mine.result.text, mine.run, other.result.text, other.run) == ("that", SECOND, "this", FIRST)
    assert there.check() == []
    done = subprocess.run([sys.executable, "-m", "evalcache", "conflicts", "--json"], capture_output=True, text=True, timeout=60)
    (told,) = json.loads(done.stdout)
    assert done.returncode == 1 and told["differs"] == "tokens, text" and (told["here"], told["there"]) == ("that", "this")


def test_the_same_answer_at_another_price_is_the_same(tmp_path):
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    write(here, FIRST, NOON, [(make_action(), make_result(seconds=1.0))])
    write(there, SECOND, NOON, [(make_action(), make_result(seconds=9.0))])
    export_entries(here, tmp_path / "file")
    assert import_entries(there, tmp_path / "file") == Taken(known=1)


def test_what_is_meant_goes_and_what_it_names(tmp_path):
    store, ledger = open_pair(tmp_path / "here")
    mine = ask_all(store, FIRST, NOON, [(make_action(prompt=(n,)), make_result((n,))) for n in range(4)])
    tuned = ask_all(
        store, SECOND, NOON + 86_400, [(make_action(TUNED, (n,), {"x": 1}), make_result((n,))) for n in range(3)], TUNED, "tuned"
    )
    keys, hits = (mine[0].value, mine[3].value), (("hit",) * 2, ("",) * 2, (1.0,) * 2)
    told = LookedUp(SECOND, NOON, BASE.root.value, "lm_eval", "", keys, *hits, ("gsm8k", "mmlu"), ("0", "1"))
    write(
        store,
        SECOND,
        NOON,
        [],
        [told, LookedUp(SECOND, NOON, b"", "", "", (b"",), ("uncacheable",), ("hook",), (None,), ("mmlu",), ("2",))],
    )
    store.commit([], (), {"probe/00": b"what a probe found", "fields/" + "0" * 32: b"of nobody"}, run=SECOND, created_at=NOON)
    ledger.sync(store)

    def carried(**said: str) -> tuple[set[Digest], int]:
        there = Store(tmp_path / f"there-{len(list(tmp_path.iterdir()))}")
        made = export_entries(store, tmp_path / "file", select(ledger, **said).holds)
        assert import_entries(there, tmp_path / "file").new == made.entries
        return set(held(there)[0]), made.objects

    assert carried() == ({*mine, *tuned}, 5)
    assert carried(model="tuned") == carried(run=SECOND) == carried(since="2023-11-15") == (set(tuned), 3)
    assert carried(task="gsm8k") == ({mine[0]}, 3) and carried(task="mmlu", run=FIRST) == ({mine[3]}, 3)
    assert carried(task="mmlu", run=SECOND) == (set(), 0)
    there = Store(tmp_path / "there")
    write(there, SECOND, NOON, [(make_action(prompt=(0,)), make_result((8,)))])
    export_entries(store, tmp_path / "file", select(ledger, task="mmlu").holds)
    assert import_entries(there, tmp_path / "file") == Taken(new=1)
    export_entries(store, tmp_path / "file", select(ledger, run=FIRST).holds)
    assert import_entries(there, tmp_path / "file") == Taken(new=2, known=1, conflicts=1)


def test_a_damaged_entry_stays_behind(tmp_path):
    here = filled(tmp_path / "here")
    key, frame = next(here.frames())
    here._rows._cache._sql("UPDATE Cache SET value = ? WHERE key = ?", (frame[:-1] + bytes([frame[-1] ^ 1]), key.value))
    made = export_entries(here, tmp_path / "file")
    assert (made.entries, made.damaged) == (5, 1)
    assert import_entries(Store(tmp_path / "there"), tmp_path / "file").new == 5


def test_totals_stay_what_they_were(tmp_path):
    """Carrying entries over changes no total, there or here; a hit on one of them is a line of its own."""
    here = filled(tmp_path / "here")
    there, ledger = open_pair(tmp_path / "there")
    ask_all(there, SECOND, NOON, [(make_action(prompt=(9,)), make_result())])
    ledger.sync(there)
    before = audit(ledger, by="run").total.figures
    export_entries(here, tmp_path / "file")
    import_entries(there, tmp_path / "file")
    ledger.sync(there)
    assert audit(ledger, by="run").total.figures == before
    key = key_of(ENTRIES[0][0])
    run = "3" * 32
    write(there, run, NOON + 9, [], [*begin(run, NOON + 9), look(run, NOON + 9, [(key, "hit", "", 2.0)])])
    ledger.sync(there)
    after = audit(ledger, by="run").total.figures
    assert ledger.query("SELECT count(*) FROM outputs WHERE key = ?", [key.hex]).rows == [(1,)], "the ledger knows its answer"
    assert after["spent_seconds"] == before["spent_seconds"] and after["requests"] == before["requests"] + 1


# --- hostile files ----------------------------------------------------------------------------------------------------------


def members(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(file: Path, parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> None:
    """A file with these members, and a manifest that fits them."""
    told = json.loads(parts["manifest.json"])
    for name in told["members"]:
        if name in parts:
            told["members"][name]["xxh3_128"] = Hasher().update(parts[name]).digest().hex
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, data in {**parts, "manifest.json": json.dumps(told).encode()}.items():
            archive.writestr(name, data)


def table(tmp_path: Path, sql: str, how: str = "uncompressed") -> bytes:
    target = tmp_path / "made.parquet"
    duckdb.execute(f"COPY ({sql}) TO '{target}' (FORMAT parquet, COMPRESSION {how})")
    return target.read_bytes()


def entry_sql(key: bytes, frame: bytes) -> str:
    written = ["".join(f"\\x{byte:02X}" for byte in data) for data in (key, frame)]
    return f"SELECT '{written[0]}'::BLOB AS key, '{written[1]}'::BLOB AS frame"


def with_rows(parts: dict[str, bytes], member: str, rows: int) -> bytes:
    told = json.loads(parts["manifest.json"])
    told["members"][member]["rows"] = rows
    return json.dumps(told).encode()


@pytest.fixture
def exported(tmp_path):
    file = tmp_path / "x.evalcache"
    export_entries(filled(tmp_path / "here"), file)
    return file


def planted(tmp_path, parts, key=None, frame=None, **more):
    """Another answer's frame under a key that is not its own, by whoever knows how frames are made."""
    action, other = make_action(), make_action(prompt=(4, 4))
    key = key or key_of(action)
    frame = frame or encode_frame(key, other, make_result((6, 6)), FIRST, NOON)
    parts["entries.parquet"] = table(tmp_path, entry_sql(key.value, frame))
    parts["manifest.json"] = with_rows(parts, "entries.parquet", 1)


def bomb(tmp_path, parts):
    parts["entries.parquet"] = table(
        tmp_path, "SELECT unhex(md5(range::VARCHAR)) AS key, repeat('a', 100000)::BLOB AS frame FROM range(3000)"
    )
    parts["manifest.json"] = with_rows(parts, "entries.parquet", 3000)


def packed_table(tmp_path, parts):
    parts["entries.parquet"] = table(tmp_path, entry_sql(bytes(16), b"x" * 99), "zstd")
    parts["manifest.json"] = with_rows(parts, "entries.parquet", 1)


def objects_of(name, data):
    def attack(tmp_path, parts):
        written = "".join(f"\\x{byte:02X}" for byte in data)
        parts["objects.parquet"] = table(tmp_path, f"SELECT '{name}' AS name, '{written}'::BLOB AS data")
        parts["manifest.json"] = with_rows(parts, "objects.parquet", 1)

    return attack


def another_version(tmp_path, parts):
    parts["manifest.json"] = parts["manifest.json"].replace(b'"version": 1', b'"version": 2')


def of_another_key(tmp_path, parts):
    key = Digest(bytes(16))
    planted(tmp_path, parts, key, encode_frame(key_of(make_action()), make_action(), make_result(), FIRST, NOON))


def replaced(**members):
    """Members by name, without their ending, replaced."""

    def attack(tmp_path, parts):
        endings = {"manifest": ".json"}
        parts |= {f"{name}{endings.get(name, '.parquet')}": data for name, data in members.items()}

    return attack


def other_columns(tmp_path, parts):
    parts["entries.parquet"] = table(tmp_path, "SELECT 1 AS key, 'x' AS frame")


def other_count(tmp_path, parts):
    parts["manifest.json"] = with_rows(parts, "entries.parquet", 7)


ATTACKS = {
    "planted": (planted, "stands for what has the key"),
    "a frame of another key": (of_another_key, "belongs to another key"),
    "no frame": (lambda folder, parts: planted(folder, parts, frame=b"\x80\x04pickle"), "too short"),
    "bomb": (bomb, "unpacks to"),
    "packed": (packed_table, "entries is packed"),
    "a member outside": (lambda folder, parts: parts.update({"../../evil": b"x"}), "it holds"),
    "a missing table": (lambda folder, parts: parts.pop("objects.parquet"), "it holds"),
    "no table": (replaced(entries=b"PAR1 not really"), "cannot be read"),
    "other columns": (other_columns, "the columns of entries"),
    "another count": (other_count, "should have 7"),
    "other settings": (objects_of("fields/" + "0" * 32, b"\xa0"), "has the digest"),
    "a path for a name": (objects_of("fields/../../x", b"\xa0"), "no object of ours"),
    "state of the store": (objects_of("store/state", b"\xa0"), "no object of ours"),
    "no manifest of a model": (objects_of("model/" + "0" * 32, b"\xa0"), "not a manifest"),
    "a newer version": (another_version, "version 2"),
    "no members": (replaced(manifest=b'{"format": "evalcache entries", "version": 1, "members": {}}'), "manifest cannot be read"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_of_a_hostile_file_is_taken(exported, tmp_path, name):
    attack, why = ATTACKS[name]
    parts = members(exported)
    attack(tmp_path, parts)
    pack(exported, parts)
    there = Store(tmp_path / "there")
    with pytest.raises(ExchangeError, match=why):
        import_entries(there, exported)
    assert held(there) == ({}, {}) and not (tmp_path / "evil").exists() and not (tmp_path.parent / "evil").exists()


def test_a_packed_archive_and_a_shorter_one_are_refused(exported, tmp_path):
    there, whole = Store(tmp_path / "there"), exported.read_bytes()
    pack(exported, members(exported), zipfile.ZIP_DEFLATED)
    with pytest.raises(ExchangeError, match="packed"):
        import_entries(there, exported)
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        exported.write_bytes(whole[:length])
        with pytest.raises(ExchangeError):
            import_entries(there, exported)
    with pytest.raises(ExchangeError):
        import_entries(there, tmp_path / "absent")
    assert held(there) == ({}, {})


def test_a_flipped_bit_is_found(exported, tmp_path):
    there, whole = Store(tmp_path / "there"), exported.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        exported.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            import_entries(there, exported)
        except ExchangeError:
            assert held(there) == ({}, {})
        else:  # a bit of the archive's own that means nothing, such as a date
            assert held(there) == held(Store(tmp_path / "here" / "store"))
            there = Store(tmp_path / f"there-{place}")


def test_a_length_that_lies_allocates_nothing(exported, tmp_path):
    """A local header that promises 4 GiB: the archive's own directory and checksum decide."""
    data = bytearray(exported.read_bytes())
    struct.pack_into("<II", data, 18, 0xFFFFFFF0, 0xFFFFFFF0)
    exported.write_bytes(bytes(data))
    there = Store(tmp_path / "there")
    try:
        import_entries(there, exported)
    except ExchangeError:
        assert held(there) == ({}, {})


def test_a_file_that_cannot_be_written_is_one_error(tmp_path):
    here = filled(tmp_path / "here")
    with pytest.raises(ExchangeError, match="cannot be written"):
        export_entries(here, tmp_path / "absent" / "x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ExchangeError, match="cannot be written"):
        export_entries(here, tmp_path / "taken")


def test_what_a_killed_export_left_is_cleared_away_by_the_next_one(tmp_path):
    here = filled(tmp_path / "here")
    left, alive, theirs = (tmp_path / f".x.evalcache.{name}" for name in ("left", "alive", "theirs"))
    for folder in (left, alive):
        folder.mkdir()
        (folder / "export.lock").touch()
        os.utime(folder / "export.lock", (0, 0))
        (folder / "entries.duckdb").write_bytes(b"half a table")
    theirs.mkdir()
    with filelock.FileLock(alive / "export.lock"):
        export_entries(here, tmp_path / "x.evalcache")
    assert [folder.exists() for folder in (left, alive, theirs)] == [False, True, True]


def test_the_verbs(tmp_path, store_folder):
    filled(store_folder)

    def evalcache(*arguments: str, folder: Path = store_folder) -> dict:
        command = [sys.executable, "-m", "evalcache", *arguments, "--dir", str(folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    file = str(tmp_path / "all.evalcache")
    assert evalcache("export", file, "--model", "base", "--since", "2000-01-01")["entries"] == 5
    assert evalcache("export", file, "--model", TUNED.root.hex)["entries"] == 1
    assert evalcache("export", file)["entries"] == 6
    assert evalcache("import", file, file, folder=tmp_path / "there") == {"new": 6, "known": 6, "conflicts": 0}
    assert evalcache("verify", folder=tmp_path / "there")["good"]
    assert evalcache("conflicts", folder=tmp_path / "there") == []
    named = evalcache("query", "SELECT DISTINCT model FROM requests", folder=tmp_path / "there")
    assert {row["model"] for row in named} == {BASE.root.hex, TUNED.root.hex}
