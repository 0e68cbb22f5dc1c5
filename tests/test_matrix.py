"""All variants of a model × all clients, from one store that they fill in any order: outputs and counts of each cell.

Each client answers in a process of its own (`matrix_client.py`). What a cell must show is derived from what it asks, without
asking evalcache (`matrix_cells.py`); ``matrix.md`` is the whole table.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from matrix_cells import CLIENTS, NOT_POSSIBLE, Cell, Counts, cells, expected, requests
from matrix_model import QUESTIONS, train_model
from variants import ONE_OF_EACH_KIND, VARIANTS, make

TABLE = Path(__file__).with_name("matrix.md")
HERE = Path(__file__).parent
NEEDED = ("lm_eval", "lighteval", "inspect_ai", "peft", "fastapi", "uvicorn")
PACKAGES = ("torch", "transformers", "lm_eval", "lighteval", "inspect_ai", "peft")
REVERSED = tuple(reversed(CLIENTS))
NEVER_ASLEEP = {("inspect_ai", "LoRA adapter")}  # transformers' own loading of an adapter's folder
# Which of a client's answers are not made in the batches of the bare client: in bfloat16 their last bits differ.
OTHER_BATCHES = {"lighteval": ("scores",), "script": ("scores",)}


class Client:
    """A client's process, which answers one cell after the other."""

    def __init__(self, name: str, log: Path) -> None:
        self.name, self._log = name, log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EVALCACHE")}
        command = [sys.executable, str(HERE / "matrix_client.py"), name]
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=log.parent
            )

    def ask(self, name: str, folder: Path, store: Path | None) -> dict[str, Any]:
        """Answers to a variant, bare or from a store."""
        variant = VARIANTS[name]
        asked = {
            "folder": str(folder),
            "dtype": variant.dtype,
            "adapter": str(folder / "adapter") if variant.adapter else None,
            "store": None if store is None else str(store),
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"{self.name} ended:\n{self._log.read_text()[-3000:]}"
        told: dict[str, Any] = json.loads(line)
        assert "error" not in told, f"{self.name}, {name}:\n{told['error']}"
        return told

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class Matrix:
    """The variants' folders, what the bare clients answer, and what was found to be wrong."""

    folder: Path
    names: Sequence[str]

    def __post_init__(self) -> None:
        original = train_model(self.folder / "model")
        self.folders = {name: make(name, original, self.folder / f"variant {place}") for place, name in enumerate(self.names)}
        self._bare: dict[Cell, Any] = {}
        self._seen: set[Any] = set()  # models that a client has loaded
        self._wrong: list[str] = []
        time.sleep(2.1)  # what is known of a file that is younger is not trusted, and read again

    @contextmanager
    def client(self, name: str) -> Iterator[Client]:
        one = Client(name, self.folder / f"{name}.log")
        try:
            yield one
        finally:
            one.close()

    def bare(self, client: Client, name: str) -> Any:
        cell = (client.name, name)
        if cell not in self._bare:
            self._bare[cell] = client.ask(name, self.folders[name], None)["answers"]
        return self._bare[cell]

    def fill(self, client: Client, name: str, store: Path, counts: Counts) -> Any:
        """One cell, from a store in which others' answers may be; returns what it showed."""
        told = client.ask(name, self.folders[name], store)
        cell = (client.name, name)
        self._check(cell, store, told, counts)
        if VARIANTS[name].dtype == "float32":
            self.same(cell, told["answers"], self.bare(client, name))
        return told

    def ask_again(self, client: Client, name: str, store: Path, first: Any) -> None:
        """The same cell once more: everything is stored, and nothing of the model is needed."""
        told = client.ask(name, self.folders[name], store)
        cell = (client.name, name)
        self._check(cell, store, told, Counts(first["counts"]["hits"] + first["counts"]["misses"], 0))
        self.same(cell, told["answers"], first["answers"])

    def cold(self, client: Client, name: str) -> None:
        """From an empty store: the same batches as the bare client's, so that any dtype says the same."""
        store = self.folder / f"store of {client.name} alone"
        told = client.ask(name, self.folders[name], store)
        cell = (client.name, name)
        self._check(cell, store, told, Counts(0, sum(told["counts"][kind] for kind in ("hits", "misses"))))
        others = OTHER_BATCHES.get(client.name, ())
        mine, bare = ({part: answers[part] for part in answers if part not in others} for answers in (
            told["answers"], self.bare(client, name),
        ))  # fmt: skip
        self.same(cell, mine, bare)

    def _check(self, cell: Cell, store: Path, told: dict[str, Any], counts: Counts) -> None:
        found, variant = told["counts"], VARIANTS[cell[1]]
        if (found["hits"], found["misses"]) != (counts.hits, counts.misses):
            self.wrong(cell, f"{found['hits']} hits and {found['misses']} misses, where {counts} were right")
        if found["uncacheable"] or found["duplicates"]:
            self.wrong(cell, f"{found['uncacheable']} uncacheable, {found['duplicates']} duplicates")
        # A client loads in its own way: what another one has loaded is looked at once more.
        seen = (cell[0], store, variant.model or cell[1], variant.dtype, variant.penalty)
        if found["loads"] and not found["misses"] and seen in self._seen and cell not in NEVER_ASLEEP:
            self.wrong(cell, "the model was loaded although it was known, and everything stored")
        self._seen.add(seen)

    def same(self, cell: Cell, mine: Any, theirs: Any) -> None:
        for difference in differences(mine, theirs):
            self.wrong(cell, f"answers differ from the expected ones: {difference}")
            return

    def wrong(self, cell: Cell, what: str) -> None:
        self._wrong.append(f"{cell[0]}, {cell[1]}: {what}")

    def finish(self) -> None:
        """Fail, if any cell was wrong; and if the variants answer alike, since their answers then prove nothing."""
        assert not self._wrong, "\n".join(self._wrong)
        telling = [name for name in self.names if name.endswith(("tuned", "rope_theta", "generation_config.json", "adapter"))]
        originals = {client: answers for (client, name), answers in self._bare.items() if name == "original"}
        for (client, name), answers in self._bare.items():
            if name in telling:
                assert any(differences(answers, originals[client])), f"{client} answers alike: original, {name}"


def differences(left: Any, right: Any, place: str = "") -> Iterator[str]:
    """Where two answers differ: strings and ids exactly, log-probabilities by more than 1e-5."""
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for number, pair in enumerate(zip(left, right, strict=True)):
            yield from differences(*pair, f"{place}[{number}]")
    elif isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        for name in left:
            yield from differences(left[name], right[name], f"{place}.{name}")
    elif isinstance(left, float) and isinstance(right, float):
        if left != pytest.approx(right, rel=1e-5, abs=1e-5):
            yield f"{place}: {left} and {right}"
    elif left != right:
        yield f"{place}: {left!r} and {right!r}"


needs_clients = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED), reason="needs all clients (llm-evalcache[test])"
)


# --- the table, as it must be -------------------------------------------------------------------------------------------------


def table(clients: Sequence[str], shown: dict[Cell, Counts]) -> str:
    """Hits and misses of each cell, for clients that came in this order."""
    rows = [
        [name, *("n/a" if (client, name) in NOT_POSSIBLE else str(shown[client, name]) for client in clients)]
        for name in VARIANTS
    ]
    lines = [["variant", *clients], ["---"] * (len(clients) + 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def whole_table(tables: dict[tuple[str, ...], dict[Cell, Counts]]) -> str:
    """The file in the repository."""
    asked = {client: [one[1] for one in requests(client, "original")].count("score") for client in CLIENTS}
    figures = [f"{name} {count} + {len(requests(name, 'original')) - count}" for name, count in asked.items()]
    made_with = [f"{name} {version(name).split('+')[0]}" for name in PACKAGES]
    reasons = "".join(f"- {client}, {name}: {reason}.\n" for (client, name), reason in NOT_POSSIBLE.items())
    text = (
        "# Variants of a model × clients\n\n"
        "Hits + misses of each cell, from one store that was empty at first. Clients came one after the other, from left to\n"
        "right, and each tried the variants from top to bottom; then everything was asked again, and hit. Answers equal the\n"
        "bare client's: ids and strings exactly, log-probabilities to 1e-5; in bfloat16, those that are made in equal batches.\n"
        "`scripts/test --full` runs these and a shuffled order, and fails where a cell shows something else.\n\n"
        f"Of each variant are asked, as log-likelihoods + generations: {', '.join(figures)}.\n"
        f"Made with {', '.join(made_with)}.\n\n"
    )
    text += "\n".join(table(clients, shown) for clients, shown in tables.items())
    return text + f"\nn/a:\n\n{reasons}"


def test_the_table_in_the_repository_says_what_must_be() -> None:
    # Without the versions, which say with what it was measured.
    text = TABLE.read_text(encoding="utf-8")
    for clients in (CLIENTS, REVERSED):
        assert table(clients, expected(cells(clients))) in text


def test_expectations_of_some_cells() -> None:
    """The derivation itself, where a person can say what is right."""
    shown = expected(cells(("script", "lm_eval", "serve")))
    whole = 18 + 4 * 6
    assert shown["script", "original"] == Counts(0, whole)
    for name, variant in VARIANTS.items():
        if variant.kind == "same weights":
            assert shown["script", name] == Counts(whole, 0)
        if variant.model is None:
            assert shown["script", name] == Counts(0, whole)
    assert shown["script", "other generation_config.json"] == Counts(18, 24)
    assert shown["script", "other chat template"] == Counts(18 + 6, 18)
    assert shown["lm_eval", "original"] == Counts(18 + 6 + 6, 2 + 6)
    assert shown["lm_eval", "other chat template"] == Counts(38, 0)
    assert all(shown[cell].misses == 0 for cell in shown if cell[0] == "serve")


# --- the matrix ---------------------------------------------------------------------------------------------------------------


@needs_clients
def test_each_client_with_each_kind_of_variant(tmp_path: Path) -> None:
    """The clients' own models first: what a plain script asks last, others have answered."""
    matrix = Matrix(tmp_path, ONE_OF_EACH_KIND)
    order = cells(("lighteval", "inspect_ai", "lm_eval", "serve", "script"), ONE_OF_EACH_KIND)
    right = expected(order)
    # What lighteval cannot ask of an adapter; and log-probabilities made in float32, where the clients make them in bfloat16.
    assert {name: right["script", name].misses for name in ONE_OF_EACH_KIND if right["script", name].misses} == {
        "LoRA adapter": len(QUESTIONS),
        "bfloat16": sum(len(choices) for _, choices in QUESTIONS),
    }
    for name in dict.fromkeys(client for client, _ in order):
        with matrix.client(name) as client:
            for cell in (cell for cell in order if cell[0] == name):
                told = matrix.fill(client, cell[1], tmp_path / "store", right[cell])
                if cell[1] in ("original", "bfloat16"):
                    matrix.ask_again(client, cell[1], tmp_path / "store", told)
                if cell[1] == "bfloat16":
                    matrix.cold(client, cell[1])
    matrix.finish()


def run_in_order(
    matrix: Matrix, clients: dict[str, Client], order: Iterable[Cell], store: Path
) -> tuple[dict[Cell, Counts], dict[Cell, Any]]:
    """All cells, and all cells again; returns what they showed."""
    order = list(order)
    right = expected(order)
    told = {cell: matrix.fill(clients[cell[0]], cell[1], store, right[cell]) for cell in order}
    for cell in reversed(order):
        matrix.ask_again(clients[cell[0]], cell[1], store, told[cell])
    return {cell: Counts(one["counts"]["hits"], one["counts"]["misses"]) for cell, one in told.items()}, told


@needs_clients
@pytest.mark.campaign
def test_all_clients_with_all_variants_in_several_orders(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path, tuple(VARIANTS))
    clients = {name: Client(name, tmp_path / f"{name}.log") for name in CLIENTS}
    shuffled = cells()
    random.Random(2026).shuffle(shuffled)
    orders = {CLIENTS: cells(), REVERSED: cells(REVERSED), ("shuffled",): shuffled}
    shown = {}
    try:
        for place, (name, order) in enumerate(orders.items()):
            shown[name], _ = run_in_order(matrix, clients, order, tmp_path / f"store {place}")
        for client, name in cells(names=["bfloat16"]):
            matrix.cold(clients[client], name)
    finally:
        for client in clients.values():
            client.close()
    fresh = whole_table({name: shown[name] for name in (CLIENTS, REVERSED)})
    (tmp_path / TABLE.name).write_text(fresh, encoding="utf-8")
    matrix.finish()
    assert fresh == TABLE.read_text(encoding="utf-8"), f"the table as it was measured now: {tmp_path / TABLE.name}"
