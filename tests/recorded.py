"""Runs written into a real store event by event, with numbers that can be added up in the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evalcache.digest import Digest, digest_bytes
from evalcache.journal import Event, LookedUp, ModelLoaded, ModelSeen, Overhead, RunEnded, RunStarted
from evalcache.key import key_of
from evalcache.ledger import Ledger
from evalcache.manifest import Manifest, ModuleRecord, TensorRecord
from evalcache.records import Action, Array, Cost, Environment, Fields, Request, Result, pack_logprobs, pack_tokens
from evalcache.store import Store

FIRST, SECOND, THIRD = "1" * 32, "2" * 32, "3" * 32
NOON = 1_700_000_000.25
ENVIRONMENT = {"dtype": "float32", "torch": "2.13.0", "transformers": "5.22.0"}
SETTINGS = {"max_new_tokens": 8}


def make_model(weights: Mapping[str, bytes], class_name: str = "TinyLM", **about: Any) -> Manifest:
    """A manifest with one module of eight bytes per name, whose digest depends on the given bytes alone."""
    modules = {"": ModuleRecord(digest_bytes(b"".join(weights.values())), f"tiny.{class_name}")}
    for path, content in weights.items():
        tensor = TensorRecord(digest_bytes(content), "float32", (2,), 8)
        modules[path] = ModuleRecord(digest_bytes(b"module" + content), "tiny.Linear", {"weight": tensor})
    return Manifest(modules, about={"class": class_name, "parameters": 2 * len(weights), **about})


BASE = make_model({"embed": b"e", "layers.0": b"0", "layers.1": b"1"})
TUNED = make_model({"embed": b"e", "layers.0": b"0", "layers.1": b"other"})


def make_action(
    model: Manifest = BASE,
    prompt: Sequence[int] = (1, 2, 3),
    settings: Mapping[str, Any] = SETTINGS,
    environment: Mapping[str, Any] = ENVIRONMENT,
    **inputs: Any,
) -> Action:
    """What is asked, by parts."""
    request = Request("generate", pack_tokens(prompt), Fields(settings), inputs)
    return Action(model.root, request, Environment(Fields(environment), {"batch_size": 2}))


def make_result(tokens: Sequence[int] = (7, 8), seconds: float | None = 2.0, **parts: Any) -> Result:
    """An answer that cost ``seconds``."""
    cost = None if seconds is None else Cost(seconds, 3, len(tokens), "cpu", 2)
    return Result(pack_tokens(tokens), cost=cost, finish_reason="stop", **parts)


def full_result() -> Result:
    """An answer that uses every field."""
    array = Array("float32", (2,), b"\x00\x01\x02\x03\x04\x05\x06\x07")
    scalars = {"sum": -1.5, "is_greedy": True, "raw": b"\xff"}
    return make_result(
        text="naïve\n\x00😀", logprobs=pack_logprobs([-0.1, float("-inf"), 1 / 3]), scalars=scalars, arrays={"scores": array}
    )


def begin(run: str, at: float, model: Manifest | None = BASE, name: str = "base", **fields: Any) -> list[Event]:
    """The events with which a run begins."""
    started = RunStarted(run, at, fields.pop("command", "python eval.py"), versions={"torch": "2.13.0"}, **fields)
    return [started] if model is None else [started, ModelSeen(run, model.root.value, name)]


def look(run: str, at: float, asked: Sequence[tuple[Digest | None, str, str, float | None]], model: Manifest = BASE) -> LookedUp:
    """One call: (key, outcome, reason, seconds) of each request."""
    keys, outcomes, reasons, seconds = zip(*asked, strict=True)
    told = tuple(key.value if key else b"" for key in keys)
    return LookedUp(run, at, model.root.value, "", "", told, outcomes, reasons, seconds)


def write(
    store: Store,
    run: str,
    at: float,
    entries: Sequence[tuple[Action, Result]] = (),
    events: Sequence[Event] = (),
    *models: Manifest,
) -> list[Digest]:
    """Commit entries, events and manifests; returns the keys."""
    keyed = [(key_of(action), action, result) for action, result in entries]
    objects = {f"model/{model.root.hex}": model.to_bytes() for model in models}
    store.commit(keyed, events, objects, run=run, created_at=at)
    return [key for key, _, _ in keyed]


def ask_all(
    store: Store, run: str, at: float, entries: Sequence[tuple[Action, Result]], model: Manifest = BASE, name: str = "base"
) -> list[Digest]:
    """A run that misses and stores everything, and ends well."""
    keys = [key_of(action) for action, _ in entries]
    costs = [result.cost.seconds if result.cost else None for _, result in entries]
    asked = [(key, "miss", "absent", cost) for key, cost in zip(keys, costs, strict=True)]
    events = [*begin(run, at, model, name), look(run, at + 1, asked, model), RunEnded(run, at + 9, "ok", 0)]
    write(store, run, at + 2, entries, events, model)
    return keys


PROMPTS = ((1, 2, 3), (4, 5, 6))


def ask_after_base(
    store: Store,
    ledger: Ledger,
    model: Manifest = BASE,
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    settings: Mapping[str, Any] = SETTINGS,
    environment: Mapping[str, Any] = ENVIRONMENT,
) -> None:
    """A run in which `BASE` is asked the usual, and one that asks this, of ``model`` under the name ``mine``."""
    ask_all(store, FIRST, NOON, [(make_action(prompt=prompt), make_result()) for prompt in PROMPTS])
    entries = [(make_action(model, prompt, settings, environment), make_result()) for prompt in prompts]
    ask_all(store, SECOND, NOON + 100, entries, model, "mine")
    ledger.sync(store)


def cold_and_warm(store: Store) -> list[Digest]:
    """Two runs over three prompts: all missed (1, 2 and 4 s; a load, a duplicate), then hits, an uncacheable and an overhead."""
    entries = [(make_action(prompt=(1, 2, n)), make_result((7, n), 2.0**n)) for n in range(3)]
    keys = ask_all(store, FIRST, NOON, entries)
    events: list[Event] = [
        ModelLoaded(FIRST, BASE.root.value, 5.0),
        look(FIRST, NOON + 3, [(keys[2], "duplicate", "", 4.0)]),
        Overhead(FIRST, NOON + 4, {"fingerprint": 0.5, "write": 0.25}),
        *begin(SECOND, NOON + 100),
        look(SECOND, NOON + 101, [(keys[0], "hit", "", 1.0), (keys[1], "hit", "", 2.0), (keys[2], "hit", "", None)]),
        look(
            SECOND, NOON + 102, [(None, "uncacheable", "streamer: a TextStreamer", 3.0), (None, "uncacheable", "training", None)]
        ),
        look(SECOND, NOON + 102, [(None, "uncacheable", "streamer: another", 3.0)]),
        Overhead(SECOND, NOON + 103, {"fingerprint": 0.5, "lookup": 0.125}),
        Overhead(SECOND, NOON + 104, {"fingerprint": 0.5}),
        RunEnded(SECOND, NOON + 105, "failed", 1),
    ]
    write(store, SECOND, NOON + 106, (), events)
    return keys


def open_pair(folder: Path) -> tuple[Store, Ledger]:
    """A store and a ledger of one folder."""
    return Store(folder / "store"), Ledger(folder / "ledger.duckdb")
