"""Stores of earlier versions open and hit for ever; what a newer version wrote is left to it, with a word about what to do.

``stores/*.tar.xz`` were written by the version that each is named after (`stores/make.py`), and are never written again. Keys
hold the versions of torch and transformers and digests of code, so a live model of today asks for other keys: a *hit* here is
that the key of what was asked, put together anew from JSON, is the stored one, and that the store gives the recorded answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import duckdb
import pytest
from recorded import FIRST, NOON, cold_and_warm, make_action, make_result, open_pair, write
from stores.make import restored
from test_cache import Engine, ask, expected
from test_frame import reseal

from evalcache.cache import Cache
from evalcache.canonical import encode_canonical
from evalcache.digest import Digest
from evalcache.errors import EvalCacheWarning, ExchangeError, NewerEventError
from evalcache.exchange import export_entries, import_entries
from evalcache.frame import FRAME_VERSION, seal
from evalcache.journal import Event
from evalcache.key import KEY_VERSION, key_of
from evalcache.manifest import Manifest
from evalcache.mending import verify_folder
from evalcache.misses import explain_misses
from evalcache.records import Action, Environment, Fields, Request, Result
from evalcache.store import Store
from evalcache.watch import Watch

KEPT = sorted((Path(__file__).parent / "stores").glob("*.tar.xz"))
OLD = "this store does not {} any more: whatever changed has to raise {}, with a line of history and a new kept store"


@pytest.fixture(params=KEPT, ids=lambda path: path.name.removesuffix(".tar.xz"))
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A cache folder as that version left it."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param.name.removesuffix(".tar.xz")


def asked_in(folder: Path) -> dict:
    return json.loads((folder / "asked.json").read_text())


def action_of(told: dict) -> Action:
    request = Request(told["kind"], restored(told["tokens"]), Fields(restored(told["settings"])), restored(told["inputs"]))
    environment = Environment(Fields(restored(told["environment"])), restored(told["recorded"]))
    return Action(Digest(bytes.fromhex(told["model"])), request, environment)


def same_answer(result: Result, told: dict) -> bool:
    arrays = {name: [one.dtype, list(one.shape), one.data.hex()] for name, one in result.arrays.items()}
    parts = {name: restored(told[name]) for name in ("tokens", "logprobs", "scalars")}
    return (
        parts == {"tokens": result.tokens, "logprobs": result.logprobs, "scalars": dict(result.scalars)}
        and (told["text"], told["finish_reason"]) == (result.text, result.finish_reason)
        and told["arrays"] == arrays
    )


def test_there_is_one_of_this_version() -> None:
    with contextlib.ExitStack() as stack:
        versions = [
            json.load(stack.enter_context(tarfile.open(path)).extractfile(f"{path.name.removesuffix('.tar.xz')}/asked.json"))[
                "versions"
            ]
            for path in KEPT
        ]
    assert KEY_VERSION in [one["key"] for one in versions], "make one with stores/make.py"
    assert FRAME_VERSION in [one["frame"] for one in versions], "make one with stores/make.py"


def assert_said_to_have_other_keys(kept: Path, actions: list[Action]) -> None:
    """Its entries stay, and are never served; whoever asks why is told."""
    store, ledger = open_pair(kept)
    ledger.sync(store)
    before = store.stats().entries
    cache = Cache(kept, run="f" * 32)
    manifest = Manifest.from_bytes(cache.store.get_object(f"model/{actions[0].model.hex}"))
    watch = cache.watch(Watch(lambda: manifest, "kept"))
    cache.open(watch)
    mine = [action for action in actions if action.model == manifest.root]
    cache.serve(watch, mine, lambda missing: [(place, make_result()) for place in missing])
    cache.close()
    assert cache.counts.hits == 0 and cache.counts.misses == len(mine)
    assert store.stats().entries == before + len(mine)
    assert explain_misses(ledger, "f" * 32) == [f"keys have another form now: KEY_VERSION is {KEY_VERSION}"]


def test_it_hits(kept: Path) -> None:
    told = asked_in(kept)
    actions = {key: action_of(one) for key, one in told["entries"].items()}
    if told["versions"]["key"] != KEY_VERSION:
        assert_said_to_have_other_keys(kept, list(actions.values()))
        return
    assert len(actions) >= 9 and len({action.request.kind for action in actions.values()}) >= 3
    for key, action in actions.items():
        assert key_of(action).hex == key, OLD.format("hit", "KEY_VERSION")
    # Through the cache, which may compute nothing: the model is its manifest, as the store keeps it.
    cache = Cache(kept, policy="replay")
    for root in {action.model for action in actions.values()}:
        manifest = Manifest.from_bytes(cache.store.get_object(f"model/{root.hex}"))
        assert manifest.root == root, OLD.format("know its models", "KEY_VERSION")
        mine = {key: action for key, action in actions.items() if action.model == root}
        results = cache.serve(cache.watch(Watch(lambda manifest=manifest: manifest, "kept")), list(mine.values()), compute=None)
        for key, result in zip(mine, results, strict=True):
            assert same_answer(result, told["entries"][key]["result"]), OLD.format("give its answers", "FRAME_VERSION")
    assert cache.counts.hits == len(actions) and not cache.counts.misses
    cache.close()


def test_its_ledger_and_its_journal_are_read(kept: Path) -> None:
    told = asked_in(kept)
    store, ledger = open_pair(kept)
    waiting = [type(event).__name__ for _, event in store.waiting.read()]
    assert waiting == told["waiting"], OLD.format("tell what waited", "nothing: events keep their names and fields")
    ledger.sync(store)
    assert store.waiting.count() == 0
    runs = ledger.query("SELECT misses, uncacheable, status FROM hits_by_run ORDER BY started_at").rows
    assert runs == [(0, 1, "ok"), (len(told["entries"]), 0, "ok")], "the run that waited, and the one that computed"
    answered = ledger.query("SELECT count(*), count(DISTINCT key) FROM answers").rows
    assert answered == [(len(told["entries"]),) * 2]
    scores = ledger.query("SELECT task, document, value FROM scores JOIN documents USING (client, task, document)").rows
    assert scores == [("task", "document", 1.0)]
    assert verify_folder(kept).good


def test_its_export_is_taken(kept: Path, tmp_path: Path) -> None:
    told = asked_in(kept)
    with Store(tmp_path / "new") as store:
        if told["versions"]["key"] != KEY_VERSION:
            with pytest.raises(ExchangeError, match=f"KEY_VERSION is {KEY_VERSION} now"):
                import_entries(store, kept / "entries.export")
            assert store.stats().entries == 0
            return
        assert import_entries(store, kept / "entries.export").new == len(told["entries"])
        for key, one in told["entries"].items():
            assert same_answer(store.get(Digest(bytes.fromhex(key))).result, one["result"])


# --- what a newer version wrote --------------------------------------------------------------------------------------------


def test_an_entry_of_a_newer_version_is_computed_again_and_stays(tmp_path: Path) -> None:
    engine, cache = Engine(), Cache(tmp_path)
    ask(cache, engine, [(1,), (2,)])
    cache.close()
    store = Store(tmp_path / "store")
    key, frame = next(store.frames())
    newer = reseal(frame[:4] + struct.pack("<I", FRAME_VERSION + 1) + frame[8:-16] + b"more that is new")
    with store._rows.transaction("making it newer"):
        store._rows.put([(key.value, newer)])
    store.close()
    engine, cache = Engine(), Cache(tmp_path)
    with pytest.warns(EvalCacheWarning, match="newer evalcache") as told:
        assert ask(cache, engine, [(1,), (2,)]) == expected(engine, [(1,), (2,)])
        cache.close()
    assert len(told) == 1 and "upgrade" in str(told[0].message) and len(engine.asked) == 1
    with Store(tmp_path / "store") as store:
        assert dict(store.frames())[key] == newer, "it is there for who wrote it"
        assert store.stats().aside == 0 and store.check() == []


def test_events_of_a_newer_version_wait_for_it_with_all_that_follow(tmp_path: Path, monkeypatch) -> None:
    store, ledger = open_pair(tmp_path)
    cold_and_warm(store)
    before = store.waiting.count()
    newer = encode_canonical(["Foreseen", {"run": FIRST, "at": 1.0}])
    with store._rows.transaction("as a newer version would"):
        store_id, last = store.waiting.state()
        row = f"journal/{last + 1:020d}"
        store._rows.put([(row, seal(row, newer))])
        store.waiting._set_state(store_id, last + 1)
    write(store, FIRST, NOON, [(make_action(prompt=(9,)), make_result())])
    with pytest.raises(NewerEventError, match="upgrade"):
        ledger.sync(store)
    assert store.waiting.count() == before + 2, "nothing of it is forgotten"
    cache = Cache(tmp_path)
    with pytest.warns(EvalCacheWarning, match="upgrade") as told:
        assert ask(cache, Engine()) == expected(Engine())
        cache.close()
    assert len(told) == 1

    def decode_as_newer(data: bytes) -> Event:  # a stand-in: there is no newer version yet
        return None if data == newer else decode_event(data)

    from evalcache.journal import decode_event

    monkeypatch.setattr("evalcache.waiting.decode_event", decode_as_newer)
    monkeypatch.setattr("evalcache.intake.event_rows", lambda *told: {} if told[2] is None else event_rows(*told))
    from evalcache.tables import event_rows

    ledger.sync(store)
    assert store.waiting.count() == 0 and ledger.query("SELECT count(*) FROM outputs").rows == [(7,)]


def test_a_ledger_of_a_newer_schema_costs_a_run_one_warning(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    ask(cache, Engine())
    cache.close()
    with duckdb.connect(str(tmp_path / "ledger.duckdb")) as connection:
        connection.execute("INSERT INTO schema_version SELECT max(version) + 1, now()::TIMESTAMP FROM schema_version")
    cache = Cache(tmp_path)
    with pytest.warns(EvalCacheWarning, match="schema .*upgrade evalcache") as told:
        assert ask(cache, Engine(), [(7,)]) == expected(Engine(), [(7,)])
        cache.close()
    assert len(told) == 1
    with Store(tmp_path / "store") as store:
        assert store.waiting.count() > 0 and store.stats().entries == 4, "the store goes on, and what is new waits"


# --- two versions of duckdb --------------------------------------------------------------------------------------------------

OTHER = """
    import sys
    sys.path.insert(0, {tests!r})
    import duckdb
    assert duckdb.__version__.startswith({version!r}), duckdb.__version__
    from pathlib import Path
    from recorded import FIRST, NOON, make_action, make_result, open_pair, write
    from evalcache.exchange import export_entries, import_entries
    from evalcache.mending import verify_folder
    from evalcache.store import Store
    folder = Path({folder!r})
    store, ledger = open_pair(folder)
    print(ledger.query("SELECT count(*) FROM outputs").rows)
    if {number}:
        write(store, FIRST, NOON, [(make_action(prompt=(77, {number})), make_result())])
        ledger.sync(store)
        assert import_entries(Store(folder / "new{number}"), folder / "exported{before}").new
        export_entries(store, folder / "exported{number}")
        assert verify_folder(folder).good
"""


@pytest.mark.campaign
@pytest.mark.skipif("DUCKDB_2" not in os.environ, reason="DUCKDB_2=FOLDER, of pip install --target FOLDER duckdb==2.0.0")
def test_two_versions_of_duckdb_open_what_either_wrote(tmp_path: Path) -> None:
    store, ledger = open_pair(tmp_path)
    cold_and_warm(store)
    ledger.sync(store)
    export_entries(store, tmp_path / "exported0")
    store.close()
    other = os.environ["DUCKDB_2"]
    for number, path in ((1, other), (2, None), (3, other), (4, None)):
        told = {"number": number, "before": number - 1, "version": "2." if path else "1.", "folder": str(tmp_path)}
        code = textwrap.dedent(OTHER.format(tests=str(Path(__file__).parent), **told))
        paths = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH"), str(Path(__file__).parent.parent)]))
        environment, command = os.environ | {"PYTHONPATH": paths}, [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"[({2 + number},)]\n"), done.stderr
    with duckdb.connect(str(tmp_path / "ledger.duckdb"), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM outputs").fetchall() == [(7,)]
