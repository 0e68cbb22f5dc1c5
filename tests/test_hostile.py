"""What somebody plants in a cache stays data: in the store's settings and schema, in names, in whatever a terminal shows.

More attacks stand where the formats are: pickled rows (`test_rows`), frames (`test_frame`), exported files (`test_exchange`),
headers of tensor files (`test_tensorfile`, `test_torchfile`), SQL of one's own (`test_ledger`, `test_ui_asking`).
"""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from recorded import full_result, make_action, make_model, make_result, write
from test_rows import Bomb

from evalcache.cli import main
from evalcache.errors import StoreError
from evalcache.exchange import export_entries, import_entries
from evalcache.journal import DocumentsSeen, LookedUp, Measured, ModelSeen, Overhead, RunEnded, RunStarted, Scored, TaskSeen
from evalcache.key import key_of
from evalcache.ledger import Ledger
from evalcache.records import Cost, Result
from evalcache.store import Store

RUNS = ("ab" * 16, "cd" * 16)


# --- the store's database ----------------------------------------------------------------------------------------------------


def in_database(folder: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    connection = sqlite3.connect(folder / "cache.db")
    for statement, values in statements:
        connection.execute(statement, values)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "name, value",
    [
        ("eviction_policy", "least-recently-used"),
        ("cull_limit", 1000),
        ("size_limit", 1),
        ("statistics", 1),
        ("tag_index", 1),
        ("disk_min_file_size", 0),
        ("disk_pickle_protocol", None),
        ("sqlite_journal_mode", "off"),
        ("sqlite_writable_schema", 1),
        ("disk", None),
        ("directory", "/"),
    ],
)
def test_settings_that_were_planted_take_no_effect(tmp_path: Path, name: str, value: object) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    with Store(tmp_path / "store") as store:
        keys = write(store, RUNS[0], 1.0, [(make_action(prompt=(place,)), make_result()) for place in range(50)])
    planted = "INSERT OR REPLACE INTO Settings VALUES (?, ?)"
    in_database(tmp_path / "store", (planted, (name, bomb if value is None else value)))
    if name in ("disk", "directory"):  # diskcache's own attributes, which it would set
        with pytest.raises(StoreError, match="cannot be opened"):
            Store(tmp_path / "store")
        assert not mark.exists()
        return
    with Store(tmp_path / "store") as store:
        more = write(store, RUNS[0], 1.0, [(make_action(prompt=(place,)), make_result()) for place in range(50, 100)])
        assert len(store.get_many([*keys, *more])) == 100, "nothing is evicted"
        assert store.check() == []
        assert not [path for path in (tmp_path / "store").iterdir() if not path.name.startswith("cache.db")], "no values in files"
    assert not mark.exists()


def test_a_planted_value_under_an_entrys_key_is_computed_again(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    store = Store(tmp_path / "store")
    action = make_action()
    (key,) = write(store, RUNS[0], 1.0, [(action, make_result())])
    (tmp_path / "store" / "bomb.val").write_bytes(bomb)
    plants = [
        ("UPDATE Cache SET value = ?, mode = 4 WHERE key = ?", (bomb, key.value)),
        ("UPDATE Cache SET value = NULL, mode = 4, filename = 'bomb.val' WHERE key = ?", (key.value,)),
        ("UPDATE Cache SET value = NULL, mode = 3, filename = '../../etc/passwd' WHERE key = ?", (key.value,)),
        ("UPDATE Cache SET tag = ?, expire_time = 1 WHERE key = ?", (bomb, key.value)),
    ]
    for statement in plants[:3]:
        in_database(tmp_path / "store", statement)
        with pytest.warns(match="bad rows"):
            assert not hasattr(store.get(key), "result")
        write(store, RUNS[0], 1.0, [(action, make_result())])
        assert store.get(key).result == make_result()
    in_database(tmp_path / "store", plants[3])
    assert store.get(key).result == make_result(), "a tag is never read, and nothing expires"
    assert not mark.exists()


def test_a_trigger_that_was_planted_swaps_no_answer(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first, second = make_action(prompt=(1,)), make_action(prompt=(2,))
    (one,) = write(store, RUNS[0], 1.0, [(first, make_result((1,)))])
    trigger = (
        "CREATE TRIGGER evil AFTER INSERT ON Cache BEGIN UPDATE Cache SET value = (SELECT value FROM Cache WHERE key = x'{}')"
    )
    in_database(tmp_path / "store", (f"{trigger.format(one.hex)} WHERE rowid = new.rowid AND typeof(new.key) = 'blob'; END", ()))
    (two,) = write(store, RUNS[0], 1.0, [(second, make_result((2,)))])
    with pytest.warns(match="another key"):
        assert not hasattr(store.get(two), "result")


# --- names and texts ---------------------------------------------------------------------------------------------------------

NASTY = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\r\b'; DROP TABLE outputs; --\" <script>alert(1)</script> \ud800".replace(
    "\ud800", ""
)
ESCAPES = {"\x1b", "\x07", "\x9b", "\u202e", "\r", "\b"}
MODELS = tuple(make_model({f"layer {NASTY}": content}, class_name=f"LM{NASTY}", name=NASTY) for content in (b"a", b"b"))
SETTINGS, ENVIRONMENT = {"max_new_tokens": 8, NASTY: NASTY}, {"dtype": "float32", NASTY: NASTY}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which every text that somebody else chooses is an attack. Made once: the verbs do not change it."""
    folder = tmp_path_factory.mktemp("nasty")
    store = Store(folder / "store")
    full = full_result()
    result = Result(
        full.tokens,
        NASTY,
        full.logprobs,
        "stop",
        {NASTY: 1.0},
        {NASTY: next(iter(full.arrays.values()))},
        Cost(2.0, 3, 2, NASTY, 1),
    )
    for place, run in enumerate(RUNS):
        model, at = MODELS[place], time.time() - 100 + 10 * place
        actions = [
            make_action(model, (1, 2, n), {"max_new_tokens": 8, NASTY: NASTY}, {"dtype": "float32", NASTY: NASTY})
            for n in range(2)
        ]
        keys = [key_of(action).value for action in actions]
        columns = (("miss", "miss", "uncacheable"), ("absent", "absent", f"streamer: {NASTY}"), (2.0, 2.0, None))
        names = ((NASTY,) * 3,) * 2
        events = [
            RunStarted(run, at, f"python {NASTY}", NASTY, NASTY, {NASTY: NASTY}, NASTY, NASTY, tags=(NASTY,)),
            ModelSeen(run, model.root.value, NASTY, NASTY),
            TaskSeen(run, NASTY, NASTY, NASTY, {NASTY: NASTY}),
            DocumentsSeen(run, NASTY, NASTY, (NASTY,), (bytes(16),), (json.dumps({NASTY: NASTY}),)),
            LookedUp(run, at + 1, model.root.value, NASTY, NASTY, (*keys, b""), *columns, *names, (NASTY,) * 3, ("",) * 3),
            Scored(run, NASTY, NASTY, NASTY, (NASTY,), (NASTY,), (float(place),), (NASTY,), (b"",)),
            Measured(run, at + 1, NASTY, 1, 5, 2.0),
            Overhead(run, at + 1, {NASTY: 0.25, "lookup": 0.25}),
            RunEnded(run, at + 2, NASTY, 0),
        ]
        write(store, run, at, [(action, result) for action in actions], events, model)
    # Another machine had another answer.
    with Store(folder / "other") as other:
        changed = Result(full.tokens, f"{NASTY} changed", scalars={NASTY: 2.0})
        write(other, RUNS[0], 1.0, [(actions[0], changed)], (), MODELS[1])
        export_entries(other, folder / "file")
    import_entries(store, folder / "file")
    Ledger(folder / "ledger.duckdb").sync(store)
    store.close()
    return folder


@pytest.fixture
def nasty(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the cache folder."""
    monkeypatch.setenv("EVALCACHE_DIR", str(made))
    return made


def lines() -> dict[str, list[str]]:
    """Every verb that shows what somebody else chose, in every form that it has."""
    keys = [key_of(make_action(model, (1, 2, 0), SETTINGS, ENVIRONMENT)).hex for model in MODELS]
    audits = {f"audit by {by}": ["audit", "--by", by] for by in "run task tag model role client device day".split()}
    return {
        "stats": ["stats"],
        "stats of a run": ["stats", "--run", "last"],
        "runs": ["runs"],
        "show": ["show", keys[0]],
        "explain": ["explain", *keys],
        "explain-run": ["explain-run"],
        "explain-run against": ["explain-run", "--against", RUNS[0]],
        "diff": ["diff", *(model.root.hex for model in MODELS)],
        "audit": ["audit"],
        "audit of a run": ["audit", "last"],
        "audit as CSV": ["audit", "--csv"],
        "audit as Markdown": ["audit", "--md"],
        **audits,
        "query": ["query", "FROM outputs"],
        "query of names": ["query", f"""SELECT command, 1 AS "{NASTY.replace('"', '""')}" FROM runs"""],
        "a query that fails": ["query", f"SELECT {NASTY}"],
        "conflicts": ["conflicts"],
        "a name that is none": ["show", NASTY],
        "a run that is none": ["stats", "--run", NASTY],
        "a folder": ["stats", "--dir", f"/proc/{NASTY.replace('/', '')}"],
        "a price": ["audit", "--price", f"{NASTY}=x"],
    }


@pytest.mark.parametrize("name", lines())
def test_no_text_of_others_reaches_the_terminal_as_it_is(nasty: Path, capsys, name: str) -> None:
    with pytest.raises(SystemExit) as ending:
        main(lines()[name])
    said = capsys.readouterr()
    both = said.out + said.err
    assert ending.value.code in (0, 1, 2) and "Traceback" not in both
    assert both.strip() and not ESCAPES & set(both), "control signs are shown, not sent"
    tables = Ledger(nasty / "ledger.duckdb").query("SELECT count(*) FROM outputs JOIN requests USING (key)").rows
    assert tables == [(4,)], "what looked like SQL was a name"


def test_the_page_of_a_report_holds_no_markup_of_others(nasty: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["report", "--html", str(tmp_path / "page.html")])
    assert not ending.value.code
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and not (ESCAPES - {"\r"}) & set(page)


def test_the_line_at_the_end_shows_control_signs(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_cache import Engine, ask
        import evalcache
        from evalcache.watch import Watch
        session = evalcache.enable()
        engine = Engine(weight=int(sys.argv[1]))
        ask(session.cache, engine, watch=session.cache.watch(Watch(engine.manifest, {NASTY!r})))
        session.cache.warn({NASTY!r})
        """
    )
    (tmp_path / "e.py").write_text(script)
    for weight in ("1", "2"):  # the second says that another model was asked before, by name
        done = subprocess.run([sys.executable, tmp_path / "e.py", weight], capture_output=True, text=True, timeout=60, check=True)
    assert "no hits: " in done.stderr and "\\x1b[2J" in done.stderr
    assert not ESCAPES & set(done.stderr)


# --- who may read --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="files have no modes here")
@pytest.mark.parametrize("umask, network, made", [(0o022, "0", 0o755), (0o000, "1", None)])
def test_what_a_run_and_its_verbs_make_is_for_the_owner_alone(tmp_path: Path, umask: int, network: str, made: int | None) -> None:
    """Not only in the end: a thread watches what others could open, in a folder that the user has made for everybody to see."""
    script = textwrap.dedent(
        f"""
        import os, sys, threading
        os.umask({umask})
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_cache import Engine, ask
        import evalcache
        from evalcache.sidetable import SideTable
        seen, exposed, over = set(), set(), threading.Event()
        def look(folder):
            with os.scandir(folder) as found:
                for one in found:
                    try:
                        mode = one.stat().st_mode
                        seen.add(one.path)
                        if mode & 0o077:
                            exposed.add(one.path)
                        if one.is_dir() and (mode & 0o011 or "segments" in one.path):
                            look(one.path)
                    except (FileNotFoundError, NotADirectoryError):
                        pass
        def watch():
            while not over.is_set():
                for top in ("cache", "local"):
                    if os.path.isdir(top):
                        look(top)
        watcher = threading.Thread(target=watch)
        watcher.start()
        session = evalcache.enable()
        ask(session.cache, Engine())
        SideTable(session.cache.directory / "files.sqlite").put(b"k", b"v")
        session.cache.flush()
        session.cache.sync()
        ask(session.cache, Engine(), [(9, n) for n in range(50)])
        evalcache.disable()
        from evalcache.cli import main
        for line in (["export", "cache/file"], ["verify"], ["query", "FROM outputs"], ["import", "cache/file"], ["audit"]):
            try:
                main(line)
            except SystemExit as ending:
                assert not ending.code, line
        over.set()
        watcher.join()
        assert any(name.startswith("cache/") for name in seen)
        assert not exposed, exposed
        """
    )
    if made is not None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(made)
        (tmp_path / "local").mkdir()
        (tmp_path / "local").chmod(made)
    environment = os.environ | {"EVALCACHE_DIR": "cache", "EVALCACHE_LOCAL_DIR": "local", "EVALCACHE_NETWORK": network}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    left = [path for top in ("cache", "local") for path in (tmp_path / top).rglob("*")]
    assert len(left) > 3 and not [path for path in left if stat.S_IMODE(path.stat().st_mode) & 0o077]
