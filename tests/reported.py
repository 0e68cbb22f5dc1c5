"""A ledger full of attacks, and its report: two checkpoints and what they answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recorded import BASE, FIRST, NOON, SECOND, THIRD, TUNED, begin, make_action, make_result, open_pair, write

from evalcache.digest import digest_bytes
from evalcache.journal import DocumentsSeen, LookedUp, Measured, Overhead, RunEnded
from evalcache.key import key_of
from evalcache.ledger import Ledger
from evalcache.manifest import Manifest
from evalcache.prices import Price, Prices
from evalcache.report import page
from evalcache.store import Store

PRICES = Prices([Price("cpu", 360.0, "EUR", 10.0)])
DAY = 86_400.0
ATTACK = "<script>hacked=1</script><img src=//evil.example/x onerror=hacked=1>\"'></style></svg>{{7*7}}{% raw %}"
HIDDEN = "\x1b[2J\x07 a\u202eb\u200dc \x00"
TASKS = ("arith", ATTACK, "long " * 60, HIDDEN, "السلام")
TEXTS = {  # prompt → what BASE said, what TUNED said
    0: ("the answer is four, because two and two are four", "the answer is five, because two and three are five"),
    1: (f"{ATTACK} one", f"{ATTACK} two {ATTACK}"),
    2: (f"plain {HIDDEN}", f"plain {HIDDEN} more"),
    3: ("same", "same"),
    4: ("word " * 900, "words " * 900),
}


def ask_tasks(store: Store, run: str, at: float, model: Manifest, name: str, outcome: str, origin: str = "") -> None:
    """A run that asks each prompt under its task: all missed and stored, or all hit."""
    side = 0 if model is BASE else 1
    entries = [
        (make_action(model, prompt=(5, n)), make_result((7, n), 2.0**n, text=texts[side]))
        for n, texts in TEXTS.items()
    ]  # fmt: skip
    write(store, run, at, entries if outcome == "miss" else (), (), model)
    keys = [key_of(action) for action, _ in entries]
    documents = tuple(f"{n}{ATTACK}" for n in TEXTS)
    told = LookedUp(
        run, at + 1, model.root.value, "lm_eval", "", tuple(key.value for key in keys), (outcome,) * 5,
        ("absent" if outcome == "miss" else "",) * 5, tuple(2.0**n for n in TEXTS),
        tasks=TASKS, documents=documents,
        devices=("cpu",) * 5, origins=(origin,) * 5,
    )  # fmt: skip
    contents = tuple(json.dumps({"question": f"{n} {ATTACK}"}) for n in TEXTS)
    seen = DocumentsSeen(
        run, "lm_eval", TASKS[0], documents, tuple(digest_bytes(each.encode()).value for each in contents), contents
    )  # fmt: skip
    events = [
        *begin(run, at, model, name, client="lm_eval"), told, seen, Overhead(run, at + 2, {"keys": 0.5, "checks": 0.25}),
        Measured(run, at + 2, "cpu", 1), RunEnded(run, at + 3, "ok", 0),
    ]  # fmt: skip
    write(store, run, at + 3, (), events)


def fill(folder: Path) -> Ledger:
    """Two checkpoints, each asked everything; then the first again, a day later, which hits."""
    store, ledger = open_pair(folder)
    ask_tasks(store, FIRST, NOON, BASE, f"base {ATTACK}", "miss")
    ask_tasks(store, SECOND, NOON + DAY, TUNED, "tuned", "miss")
    ask_tasks(store, THIRD, NOON + 2 * DAY, BASE, f"base {ATTACK}", "hit", FIRST)
    ledger.sync(store)
    return ledger


def write_page(folder: Path) -> tuple[Path, Ledger]:
    """The page of that ledger, in a file, and the ledger."""
    ledger = fill(folder)
    path = folder / "report.html"
    path.write_text(page(ledger.path, prices=PRICES, grid=300.0), encoding="utf-8")
    return path, ledger


def cells(shown: Any, caption: str) -> list[list[str]]:
    """The rows of the table with this caption."""
    return shown.evaluate(
        "caption => [...document.querySelectorAll('table')].find(t => t.caption.textContent.startsWith(caption))"
        ".querySelectorAll('tbody tr').values().map(row => [...row.cells].map(cell => cell.textContent.trim())).toArray()",
        caption,
    )
