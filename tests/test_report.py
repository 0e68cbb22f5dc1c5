"""The report as a page: its numbers against the audit's and the ledger's."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from recorded import BASE, FIRST, NOON, SECOND, TUNED, begin, make_action, make_model, make_result, open_pair, write
from reported import PRICES, TEXTS, ask_tasks, cells, write_page

from evalcache.cli import commands
from evalcache.digest import digest_bytes
from evalcache.figures import FIGURES
from evalcache.journal import LookedUp
from evalcache.ledger import Ledger
from evalcache.report import charts, page
from evalcache.report.compare import MOST_LETTERS, compare
from evalcache.report.gather import MOST_MODELS, gather
from evalcache.report.svg import draw

pytest_plugins = ["browser"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ledger]:
    return write_page(tmp_path_factory.mktemp("report"))


class TestNumbers:
    def test_they_are_those_of_the_audit(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        path, ledger = made
        shown, _ = open_page(path)
        for by, caption in (("task", "By task"), ("model", "By model")):
            arguments = ["audit", "--dir", str(ledger.path.parent), "--by", by, "--price", "cpu=360 EUR, 10 W", "--md"]
            told = CliRunner().invoke(commands, arguments)
            assert told.exit_code == 0, told.output
            section = told.output.split(f"### by {by}")[1].split("###")[0]
            rows = [
                [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
            ]
            audited = {tuple(row[1:]) for row in rows[2:]}
            assert {tuple(row[1:]) for row in cells(shown, caption)} == audited
            assert len(audited) == {"task": 5, "model": 2}[by]

    def test_every_figure_stands_there_exactly(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        path, ledger = made
        arguments = ["audit", "--dir", str(ledger.path.parent), "--by", "task", "--price", "cpu=360 EUR, 10 W", "--grid", "300"]
        total = json.loads(CliRunner().invoke(commands, [*arguments, "--json"]).output)["total"]
        shown, _ = open_page(path)
        rows = "rows => rows.map(row => [row.querySelector('a').textContent, row.cells[2].textContent, row.cells[0].textContent])"
        told = shown.locator("section:has(#overview) tbody tr").evaluate_all(rows)
        exact = {name: value for name, value, _ in told}
        assert all("no host, no cooling (PUE)" in whole for name, _, whole in told if name.startswith(("energy", "carbon")))
        assert set(exact) == set(FIGURES) == set(total)
        for name, value in total.items():
            if value is None:
                assert exact[name] == "not known"
            else:
                number, unit = [*exact[name].split(), ""][:2]
                assert float(number) == pytest.approx(value, abs=5e-7)
                assert unit == {"share": "", "currency": "EUR"}.get(FIGURES[name].unit, FIGURES[name].unit)
        assert total["net_seconds"] == pytest.approx(31 - 3 * 0.75)

    def test_days_add_up_to_the_whole(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        shown, _ = open_page(made[0])
        rows = cells(shown, "By day")
        assert [row[0] for row in rows] == ["2023-11-16", "2023-11-15", "2023-11-14"]
        assert [row[6] for row in rows] == ["0.00 s", "31.0 s", "31.0 s"]  # spent
        assert [row[-1] for row in rows] == ["28.8 s", "-1.50 s", "-0.75 s"]  # net, added up

    def test_each_query_gives_what_the_page_says(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        path, ledger = made
        shown, _ = open_page(path)
        queries = [shlex.split(text) for text in shown.locator("details.check pre").all_text_contents()]
        answers = []
        for evalcache, verb, sql in queries:
            assert (evalcache, verb) == ("evalcache", "query")
            answers.append(ledger.query(sql))
        by_day, by_task, by_model, causes, expensive, changes, answered = answers
        assert by_day.rows == [
            ("2023-11-14", None, 31.0, 0.75),
            ("2023-11-15", None, 31.0, 0.75),
            ("2023-11-16", 31.0, None, 0.75),
        ]
        assert sorted(row[1:5] for row in by_task.rows) == sorted((3, 1, 2.0**n, 2 * 2.0**n) for n in TEXTS)
        assert {row[1:] for row in by_model.rows} == {(31.0, 31.0), (31.0, None)}
        assert causes.rows == [("first", 5, 31.0), ("model", 5, 31.0)]
        assert [row[0] for row in expensive.rows] == [16.0, 16.0, 8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0]
        assert [(row[2], row[3], row[4]) for row in changes.rows] == [("layers.1", 1, 1)]
        assert [row[2:] for row in answered.rows] == [(5, 1)]
        assert "1 of 5 requests that both answered have the same answer" in shown.inner_text("main")
        [step] = cells(shown, "Checkpoints of")
        assert (step[2], step[4:]) == ("1 of 3", ["1", "8 of 24 B", "layers.1"])

    def test_small_sums_keep_their_digits_in_a_chart(self) -> None:
        rows = [{"name": "tiny", "spent": 0.00426, "reused": 0.00125, "told": "0.00426 EUR spent, 1.23456789 s"}]
        drawn = draw(charts.spending(rows, "EUR"), "Chart")
        assert "0.00426 EUR spent, 1.23456789 s" in drawn
        assert "0.001" in re.findall(r">([^<>]+)</text>", drawn), "a tick of the axis"
        assert not re.search(r' d="[^"]*\.\d{3}', drawn), "places are short"

    def test_since_leaves_elder_runs_out(self, made: tuple[Path, Ledger]) -> None:
        found = gather(made[1], since="2023-11-16", prices=PRICES)
        assert (found.by_task.runs, found.by_task.total.figures["hits"], found.by_day.total.figures["misses"]) == (1, 5, 0)
        assert [row.group for row in found.by_day.rows] == ["2023-11-16"]

    def test_a_time_without_runs_has_a_page(self, made: tuple[Path, Ledger]) -> None:
        text = page(made[1].path, since="2099-01-01")
        assert "No runs" in text and "Nothing missed." in text and "<figure>" not in text

    def test_one_opening_of_the_ledger_serves_all(self, made: tuple[Path, Ledger], monkeypatch: pytest.MonkeyPatch) -> None:
        opened = []
        original = Ledger._attached
        monkeypatch.setattr(Ledger, "_attached", lambda self, **how: opened.append(how) or original(self, **how))
        gather(made[1])
        assert opened == [{"read_only": True}]

    def test_an_empty_ledger_has_a_page(self, tmp_path: Path, open_page: Callable[..., Any]) -> None:
        store, ledger = open_pair(tmp_path)
        ledger.sync(store)
        path = tmp_path / "empty.html"
        path.write_text(page(ledger.path), encoding="utf-8")
        shown, seen = open_page(path)
        assert "No runs" in shown.inner_text("header") and "No requests yet." in shown.inner_text("main")
        assert seen.complaints == []

    def test_what_is_not_shown_is_said(self, tmp_path: Path) -> None:
        store, ledger = open_pair(tmp_path)
        keys = [digest_bytes(bytes([n])).value for n in range(120)]
        told = LookedUp(
            FIRST, NOON, BASE.root.value, "", "", tuple(keys), ("miss",) * 120, ("absent",) * 120, (1.0,) * 120,
            tasks=tuple(f"task{n}" for n in range(120)),
        )  # fmt: skip
        write(store, FIRST, NOON, (), [*begin(FIRST, NOON), told])
        ledger.sync(store)
        text = page(ledger.path)
        assert "The chart shows the 15 most expensive of 120 tasks." in text
        assert "The first 100 of 120; evalcache audit --by task --json tells all." in text
        assert "task14" in text


class TestChanges:
    def test_they_agree_with_the_modules_that_changed(self, tmp_path: Path) -> None:
        store, ledger = open_pair(tmp_path)
        first = make_model({"model.embed": b"e", "model.layers.0.a": b"0", "model.layers.0.b": b"1", "model.layers.10.a": b"2"})
        second = make_model({"model.embed": b"e", "model.layers.0.a": b"x", "model.layers.0.b": b"1", "model.layers.10.a": b"2"})
        third = make_model({"model.embed": b"n", "model.layers.0.a": b"x", "model.layers.2.b": b"1", "model.layers.10.a": b"2"})
        other = make_model({"model.embed": b"e", "head": b"h"}, class_name="OtherLM")
        for place, model in enumerate((first, other, second, third)):
            run = str(place) * 32
            write(store, run, NOON + place, (), begin(run, NOON + place, model, f"step {place}"), model)
            ledger.sync(store)
        [family] = gather(ledger).families
        assert [step[2:] for step in family.steps] == [("step 0", "step 2"), ("step 2", "step 3")]
        assert list(family.blocks) == ["model.embed", "model.layers.0", "model.layers.2", "model.layers.10"]
        table = ledger.query(
            "SELECT model_a, model_b, regexp_extract(path, '^(.*?[.][0-9]+|[^0-9]*)', 1) AS block, count(*), sum(bytes) "
            "FROM model_modules_changed GROUP BY ALL"
        )
        expected = {row[:3]: row[3:] for row in table.rows}
        steps = [step[:2] for step in family.steps]
        found = {
            (*steps[place], block): (cell["modules_changed"], cell["bytes_changed"])
            for (place, block), cell in family.cells.items()
            if cell["modules_changed"]
        }
        assert found == {key: value for key, value in expected.items() if key[:2] in steps}
        assert found[(*steps[0], "model.layers.0")] == (1, 8)
        assert found[(*steps[1], "model.layers.0")] == (1, 8)  # removed
        assert found[(*steps[1], "model.layers.2")] == (1, 8)  # added

    def test_models_of_one_name_are_told_apart(self, tmp_path: Path) -> None:
        store, ledger = open_pair(tmp_path)
        for run, model in ((FIRST, BASE), (SECOND, TUNED)):
            ask_tasks(store, run, NOON + int(run[0]), model, "one name", "miss")
        ledger.sync(store)
        found = gather(ledger)
        names = tuple(f"{model.root.hex[:8]} one name" for model in (BASE, TUNED))
        assert found.families[0].steps[0][2:] == names
        assert (found.pairs[0].name_a, found.pairs[0].name_b) == names

    def test_pairs_are_made_of_the_latest_models(self, tmp_path: Path) -> None:
        store, ledger = open_pair(tmp_path)
        for n in range(MOST_MODELS + 2):
            model = make_model({"a": bytes([n])})
            write(
                store,
                str(n) * 32,
                NOON + n,
                [(make_action(model), make_result((n,)))],
                begin(str(n) * 32, NOON + n, model, f"m{n}"),
                model,
            )
            ledger.sync(store)
        found = gather(ledger)
        assert [(pair.name_a, pair.name_b) for pair in found.pairs] == [("m6", "m7"), ("m5", "m7"), ("m4", "m7")]
        assert len(found.pairs) + found.pairs_left_out == MOST_MODELS * (MOST_MODELS - 1) // 2

    def test_models_with_other_sizes_are_no_family(self, tmp_path: Path) -> None:
        store, ledger = open_pair(tmp_path)
        for place, model in enumerate((make_model({"a": b"0"}), make_model({"a": b"0", "b": b"1"}))):
            run = str(place) * 32
            write(store, run, NOON + place, (), begin(run, NOON + place, model), model)
        ledger.sync(store)
        assert gather(ledger).families == []


class TestCompare:
    @given(st.text(max_size=60), st.text(max_size=60))
    def test_nothing_is_lost_and_what_is_not_marked_is_equal(self, left: str, right: str) -> None:
        found = compare(left, right)
        assert ("".join(text for _, text in found.left), "".join(text for _, text in found.right)) == (left, right)
        common = [["".join(text for marked, text in side if not marked).split()] for side in (found.left, found.right)]
        assert common[0] == common[1]

    def test_equal_texts_have_no_marks(self) -> None:
        assert compare("a b", "a b").left == [(False, "a b")]

    def test_what_is_long_is_cut_and_counted(self) -> None:
        found = compare("x " * 4000, "y")
        assert found.cut == (8000 - MOST_LETTERS, 0)

    def test_one_word_over_and_over_takes_no_time(self) -> None:
        found = compare("a " * 4000, "b a " * 4000)
        shown = sum(len(text) for _, text in found.left)
        assert shown + found.cut[0] == 8000 and shown < MOST_LETTERS
