"""The report as a page in a real browser: attacks, accessibility, keyboard, phone, print."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from recorded import BASE, FIRST, NOON, open_pair
from reported import ATTACK, ask_tasks, write_page

from evalcache.cli import commands
from evalcache.figures import FIGURES
from evalcache.ledger import Ledger
from evalcache.report.tables import command

pytest_plugins = ["browser"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ledger]:
    return write_page(tmp_path_factory.mktemp("report"))


class TestPage:
    def test_it_asks_for_nothing_and_runs_nothing(self, made: tuple[Path, Ledger], open_page: Callable[..., Any]) -> None:
        path, _ = made
        shown, seen = open_page(path)
        assert seen.requests == [path.as_uri()] and seen.complaints == []
        assert shown.evaluate("typeof hacked") == "undefined"
        assert shown.evaluate("document.querySelectorAll('script, img, iframe, link, object, [style], [onerror]').length") == 0
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
