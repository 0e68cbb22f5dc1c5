"""The report as a page: its numbers against the audit's and the ledger's, and the page in a real browser."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from recorded import BASE, FIRST, NOON, SECOND, THIRD, TUNED, begin, make_action, make_model, make_result, open_pair, write

from evalcache.cli import commands
from evalcache.digest import digest_bytes
from evalcache.figures import FIGURES
from evalcache.journal import DocumentsSeen, LookedUp, Measured, Overhead, RunEnded
from evalcache.key import key_of
from evalcache.ledger import Ledger
from evalcache.manifest import Manifest
from evalcache.prices import Price, Prices
from evalcache.report import page
from evalcache.report.compare import MOST_LETTERS, compare
from evalcache.report.gather import MOST_MODELS, gather
from evalcache.report.tables import command
from evalcache.store import Store

pytest_plugins = ["browser"]

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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ledger]:
    """A page full of attacks, and its ledger."""
    folder = tmp_path_factory.mktemp("report")
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

    def test_since_leaves_elder_runs_out(self, made: tuple[Path, Ledger]) -> None:
        found = gather(made[1], since="2023-11-16", prices=PRICES)
        assert (found.by_task.runs, found.by_task.total.figures["hits"], found.by_day.total.figures["misses"]) == (1, 5, 0)
        assert [row.group for row in found.by_day.rows] == ["2023-11-16"]

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


class TestPage:
    def test_it_asks_for_nothing_and_runs_nothing(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        path, _ = made
        shown, seen = open_page(path)
        assert seen.requests == [path.as_uri()] and seen.complaints == []
        assert shown.evaluate("typeof hacked") == "undefined"
        assert shown.evaluate("document.querySelectorAll('script, img, iframe, link, object, [style], [onerror]').length") == 0
        assert "49" not in shown.inner_text("#tasks + p")
        policy = shown.get_attribute("meta[http-equiv]", "content")
        assert policy.startswith("default-src 'none'; style-src 'sha256-") and "script-src 'none'" in policy
        assert "http" not in policy and "unsafe" not in policy

    def test_what_models_said_is_shown_and_does_nothing(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        path, _ = made
        text = path.read_text(encoding="utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)
        shown, _ = open_page(path)
        said = shown.inner_text("section:has(#answers)")
        assert ATTACK in said and r"\x1b[2J\x07 a\u202eb\u200dc" in said
        assert ATTACK in shown.locator("section:has(#tasks) table").text_content()
        assert f"0 {ATTACK}" in said and '"question"' not in said  # what the document asks

    def test_a_query_that_is_copied_does_what_it_says(self) -> None:
        assert command("SELECT 'a'") == """evalcache query "SELECT 'a'\""""
        for sql in ('$(touch x)`touch x`"', "!x", "\\"):
            assert shlex.split(command(sql)) == ["evalcache", "query", sql]
            told = subprocess.run(
                ["sh", "-c", f'evalcache() {{ printf %s "$2"; }}; {command(sql)}'], capture_output=True, text=True, check=True
            )
            assert told.stdout == sql

    def test_differences_are_marked_in_more_than_colour(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        shown, _ = open_page(made[0])
        pair = shown.locator("article", has_text="the answer is").first
        removed = [text.removeprefix("[only here: ").removesuffix("]") for text in pair.locator("del").all_text_contents()]
        added = [text.removeprefix("[only here: ").removesuffix("]") for text in pair.locator("ins").all_text_contents()]
        assert (removed, added) == (["four", "two", "four"], ["five", "three", "five"])
        lines = "element => getComputedStyle(element).textDecorationLine"
        assert pair.locator("del").first.evaluate(lines) == "line-through"
        assert pair.locator("ins").first.evaluate(lines) == "underline"

    def test_each_chart_has_its_numbers_its_view_and_a_name(
        self, made: tuple[Path, Ledger], open_page: Callable[..., Any]
    ) -> None:
        shown, _ = open_page(made[0])
        views = set(made[1].query("SELECT view_name FROM duckdb_views() WHERE NOT internal").rows)
        charts = shown.locator("figure")
        assert charts.count() == 5
        for chart in charts.all():
            assert chart.locator("svg[role=img][aria-label]").count() == 2
            section = chart.locator("xpath=ancestor::section")
            assert section.locator("table caption").count() >= 1
            assert (section.locator(".check summary code").first.text_content(),) in views
            assert chart.locator("svg title").count() > 0

    def test_each_number_has_its_definition(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        shown, _ = open_page(made[0])
        ids = set(shown.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)"))
        links = shown.evaluate("[...document.querySelectorAll('a')].map(link => [link.getAttribute('href'), link.title])")
        assert links and all(href.startswith("#") and href[1:] in ids for href, _ in links)
        assert all(title for href, title in links if href.startswith("#figure-"))
        assert {f"figure-{name}" for name in FIGURES} <= ids
        for card in shown.locator(".card").all():
            assert card.locator("dt a.term").count() == 1

    def test_it_is_made_without_what_draws_it(self, tmp_path: Path) -> None:
        code = "import sys; sys.modules['vl_convert'] = None; from evalcache.cli import main; main(sys.argv[1:])"
        store, _ = open_pair(tmp_path)
        ask_tasks(store, FIRST, NOON, BASE, "base", "miss")
        arguments = ["report", "--html", str(tmp_path / "report.html"), "--dir", str(tmp_path)]
        told = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert told.returncode == 2
        assert "pip install 'llm-evalcache[report]'" in told.stderr and "Traceback" not in told.stderr
        assert not (tmp_path / "report.html").exists()

    def test_the_verb_writes_it(self, store_folder: Path, tmp_path: Path, open_page: Callable[..., Any]) -> None:
        store, _ = open_pair(store_folder)
        ask_tasks(store, FIRST, NOON, BASE, "base", "miss")
        path = tmp_path / "report.html"
        told = CliRunner().invoke(commands, ["report", "--html", str(path), "--price", "cpu=360 EUR"])
        assert (told.exit_code, told.output.strip()) == (0, str(path))
        shown, seen = open_page(path)
        assert shown.title() == "evalcache report" and seen.complaints == []
        assert "3.1000 EUR" in shown.inner_text("section:has(#overview)")


SCREENS = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
    "dark phone": {"viewport": {"width": 320, "height": 640}, "color_scheme": "dark"},
}


class TestReading:
    @pytest.mark.parametrize("screen", SCREENS)
    def test_the_rules_of_accessibility_hold(self, made: tuple[Path, Ledger], open_page: Callable[..., Any], screen: str) -> None:
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="it comes with llm-evalcache[test]")
        shown, _ = open_page(made[0], **SCREENS[screen])
        shown.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        found = axe.Axe().run(shown).response
        told = [(one["id"], [node["target"] for node in one["nodes"]][:3]) for one in found["violations"]]
        assert told == []
        assert len(found["passes"]) > 20

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_charts_stand_out_from_the_page(self, made: tuple[Path, Ledger], open_page: Callable[..., Any], scheme: str) -> None:
        shown, _ = open_page(made[0], color_scheme=scheme)
        names = ("paper", "ink", "muted", "reused", "spent", "heat-4")
        found = dict(
            shown.evaluate(
                "names => names.map(name => [name, getComputedStyle(document.documentElement).getPropertyValue('--' + name)])",
                list(names),
            )
        )
        light = {name: luminance(colour) for name, colour in found.items()}
        for name, least in (("ink", 7), ("muted", 4.5), ("reused", 3), ("spent", 3), ("heat-4", 3)):
            high, low = sorted((light[name], light["paper"]), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, name

    def test_it_is_read_with_the_keyboard(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        shown, _ = open_page(made[0])
        shown.keyboard.press("Tab")
        focused = "document.activeElement"
        assert shown.evaluate(f"{focused}.textContent") == "Skip to the figures"
        assert shown.evaluate(f"{focused}.getBoundingClientRect().left >= 0")
        assert shown.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
        shown.keyboard.press("Enter")
        assert shown.evaluate(f"{focused}.id") == "main"
        for _ in range(12):
            shown.keyboard.press("Tab")
            if shown.evaluate(f"{focused}.tagName") == "SUMMARY":
                break
        table = shown.locator("section:has(#overview) table")
        assert not table.is_visible()
        shown.keyboard.press("Space")
        assert table.is_visible()
        shown.keyboard.press("Tab")
        assert shown.evaluate(f"{focused}.getAttribute('role')") == "region"  # a table that scrolls can be scrolled

    def test_headings_are_in_order_and_landmarks_there(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        shown, _ = open_page(made[0])
        levels = shown.evaluate("[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(each => +each.tagName[1])")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        assert [shown.locator(name).count() for name in ("header.top", "nav", "main", "footer")] == [1, 1, 1, 1]

    @pytest.mark.parametrize("width", [320, 390, 1280])
    def test_it_fits_its_screen(self, made: tuple[Path, Ledger], open_page: Callable[..., Any], width: int) -> None:
        shown, _ = open_page(made[0], viewport={"width": width, "height": 800})
        shown.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        wide, narrow = (shown.locator(f"figure .{kind} svg").first.is_visible() for kind in ("wide", "narrow"))
        assert (wide, narrow) == (width > 700, width < 700)

    def test_it_is_printed_with_its_numbers(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        shown, _ = open_page(made[0], color_scheme="dark")
        table = shown.locator("section:has(#time) table")
        assert not table.is_visible()
        shown.emulate_media(media="print")
        assert table.bounding_box()["height"] > 20
        assert shown.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper')") == "#ffffff"
        assert not shown.locator("nav").is_visible()
        assert shown.locator("figure .wide svg").first.is_visible()
        assert shown.pdf(format="A4").startswith(b"%PDF")

    def test_it_is_read_without_a_script(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        shown, _ = open_page(made[0], java_script_enabled=False)
        shown.locator("section:has(#time) summary").first.click()
        assert shown.locator("section:has(#time) table").is_visible()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``#rrggbb``."""
    parts = [int(colour.strip()[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
