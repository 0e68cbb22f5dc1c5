"""Flipped bits and files cut short, in every file of a cache folder: never a wrong answer, never a fault of another kind.

The long campaign is `benchmarks/exp_faults.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from flipped import MENDED, TARGETS, Flips
from numbered import SIZE, entry_of, key_of_number, put_batch
from recorded import open_pair

from evalcache.digest import Digest
from evalcache.store import Store

COUNTS = {"store": 240, "store and its log": 120, "ledger": 60, "ledger and its log": 60, "side table": 60}  # 540
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
@pytest.mark.parametrize("target", TARGETS)
def test_no_damage_makes_a_wrong_answer(tmp_path: Path, target: str) -> None:
    flips = Flips(target, tmp_path)
    assert flips.run(COUNTS[target]) == []
    assert flips.outcomes["right"] < COUNTS[target], "no damage hit anything"


@needs_fork
@pytest.mark.parametrize("target", ["store", "ledger"])
def test_what_is_damaged_is_mended(tmp_path: Path, target: str) -> None:
    assert Flips(target, tmp_path).run(4, mending=True) == []


@needs_fork
@pytest.mark.campaign
@pytest.mark.parametrize("target", MENDED)
def test_all_that_is_damaged_is_mended(tmp_path: Path, target: str) -> None:
    assert Flips(target, tmp_path).run(60, seed=1, mending=True) == []


@needs_fork
@pytest.mark.campaign
@pytest.mark.parametrize("target", TARGETS)
def test_no_damage_of_many_makes_a_wrong_answer(tmp_path: Path, target: str) -> None:
    assert Flips(target, tmp_path).run(10 * COUNTS[target], seed=1) == []


def damage_index(store: Store, key: Digest, byte: bytes, *, before: int = 0) -> None:
    """Change one byte of a key's record in the index alone, or before it: of the types of its columns."""
    store._rows.query("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    database = store.directory / "cache.db"
    content = bytearray(database.read_bytes())
    places = [place for place in range(len(content)) if content.startswith(key.value, place)]
    (place,) = [place for place in places if content[place - 3 : place - 1] == b"\x2c\x09"]  # 16 bytes, and the number 1
    content[place - before : place - before + 1] = byte
    database.write_bytes(content)


def test_an_index_that_leads_to_another_row_is_a_miss_and_not_a_fault(tmp_path: Path) -> None:
    store, _ = open_pair(tmp_path / "whole")
    put_batch(store, 0)
    keys = [key_of_number(number) for number in range(SIZE)]
    for number, key in enumerate(keys):
        damaged = Store(shutil.copytree(tmp_path / "whole", tmp_path / str(number)) / "store")
        damage_index(damaged, key, bytes([key.value[0] ^ 0x80]))
        found = damaged.get_many(keys)
        assert all(found.get(key_of_number(other)) in (None, entry_of(other)) for other in range(SIZE))
        assert key not in found
        assert damaged.leases.claim(keys) == set(keys)
        assert damaged.check()


def test_what_is_found_does_not_depend_on_who_listens(tmp_path: Path) -> None:
    """SQLite's findings reach us as warnings: silenced or heard before, they are told all the same."""
    store, _ = open_pair(tmp_path)
    put_batch(store, 0)
    damage_index(store, key_of_number(3), b"\x0d", before=2)  # the type of a column of the index
    for action in ("ignore", "once", "error"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            assert any("missing from index" in problem for problem in store.check()), action


def test_a_damaged_ledger_is_one_clear_message(tmp_path: Path, store_folder: Path) -> None:
    store, ledger = open_pair(store_folder)
    put_batch(store, 0)
    ledger.sync(store)
    put_batch(store, 1)
    content = bytearray(ledger.path.read_bytes())
    for place in range(12_288, len(content), 4096):
        content[place] ^= 1
    ledger.path.write_bytes(content)
    for verb in (["verify"], ["query", "SELECT * FROM outputs"], ["audit"]):
        done = subprocess.run([sys.executable, "-m", "evalcache", *verb], capture_output=True, text=True, timeout=60)
        assert done.returncode in (1, 2), (verb, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Corrupt database file" in done.stdout + done.stderr and "evalcache verify --fix" in done.stdout + done.stderr
    assert store.get(key_of_number(9)) == entry_of(9)
