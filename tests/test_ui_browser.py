"""`evalcache ui` in a real browser, and pages of others in the same one."""

from __future__ import annotations

import contextlib
import csv
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded import FIRST, NOON, look, make_action, open_pair, write
from served_ui import Served, fill, serving, serving_filled

from evalcache.key import key_of

pytest_plugins = ["browser"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_filled(tmp_path_factory.mktemp("served")) as server:
        yield server


@contextlib.contextmanager
def foreign(body: str) -> Iterator[str]:
    """A page of somebody else's: another port of ``localhost``, which is another site than 127.0.0.1."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield str(server.server_port)
        server.shutdown()


@pytest.fixture(scope="module")
def shared(served: Served, browser: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page for tests that only ask, and what it complains of."""
    context = browser.new_context()
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    enter(page, served)
    yield page, complaints
    context.close()


@pytest.fixture
def asked(shared: tuple[Any, list[str]]) -> Iterator[Any]:
    """That page; nothing that is asked of it may make it complain."""
    page, complaints = shared
    complaints.clear()
    yield page
    assert complaints == []


@pytest.fixture
def opened(served: Served, browser: Any) -> Iterator[Any]:
    """A page that nobody else has."""
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        enter(page, served)
        yield page


def enter(page: Any, served: Served) -> None:
    page.goto(served.address())
    page.wait_for_url(f"{served.origin}/")
    page.wait_for_selector("#ask-run")


class TestBrowser:
    """A real chromium."""

    def run(self, page: Any, sql: str) -> str:
        page.fill("#ask-sql", sql)
        page.press("#ask-sql", "Control+Enter")
        page.wait_for_function("() => !document.getElementById('ask-run').hasAttribute('aria-disabled')")
        return page.inner_text("#ask-status")

    def test_the_address_leads_to_the_page(self, served: Served, open_page: Callable) -> None:
        page, seen = open_page(served.address())
        page.wait_for_selector("#ask-run")
        assert page.title() == "evalcache report"
        assert "token" not in page.url and page.evaluate("document.cookie") == ""
        assert seen.complaints == []
        assert {request.partition("?")[0] for request in seen.requests} == {f"{served.origin}/"}
        assert page.evaluate("history.length") <= 3
        assert page.get_by_text("Made ").first.is_visible()

    def test_a_question_is_answered(self, asked: Any) -> None:
        page = asked
        said = self.run(page, "SELECT run, hits, net_seconds, NULL AS nothing FROM audit_by_run ORDER BY hits")
        assert said.startswith("2 rows in ")
        assert page.locator("#ask-answer th").all_inner_texts() == ["run", "hits", "net_seconds", "nothing"]
        assert page.locator("#ask-answer tbody tr").nth(1).locator("td").all_inner_texts() == ["2" * 32, "3", "1.875", "NULL"]
        assert self.run(page, "SELECT 1 WHERE false").startswith("0 rows in ")

    def test_each_example_is_answered(self, asked: Any) -> None:
        page = asked
        examples = page.locator(".ask-examples button")
        assert examples.count() >= 6
        for place in range(examples.count()):
            examples.nth(place).click()
            page.wait_for_function("() => !document.getElementById('ask-run').hasAttribute('aria-disabled')")
            assert page.is_hidden("#ask-error"), page.inner_text("#ask-error")
            assert " in " in page.inner_text("#ask-status")
        page.keyboard.press("Control+Z")  # what stood in the box comes back
        assert page.input_value("#ask-sql") == examples.nth(examples.count() - 2).get_attribute("data-sql")

    def test_the_query_behind_a_figure_is_run_from_there(self, asked: Any) -> None:
        page = asked
        page.evaluate("document.querySelectorAll('.check').forEach((one) => { one.open = true; })")
        buttons = page.locator(".check button.ask-check")
        assert buttons.count() == page.locator(".check").count() >= 6
        for place in range(buttons.count()):
            buttons.nth(place).click()
            page.wait_for_function("() => !document.getElementById('ask-run').hasAttribute('aria-disabled')")
            assert page.is_hidden("#ask-error"), page.inner_text("#ask-error")
            assert page.input_value("#ask-sql") in page.locator(".check").nth(place).inner_text()

    def test_hostile_text_is_text(self, asked: Any) -> None:
        page = asked
        hostile = "<img src=x onerror=document.title=1><script>document.title=2</script>"
        self.run(page, f"SELECT '{hostile}' AS \"{hostile}\", 'a' || chr(8238) || chr(27) || '[2J' || chr(0) AS b")
        assert page.locator("#ask-answer td").first.inner_text() == hostile
        assert page.locator("#ask-answer th").first.inner_text() == hostile
        assert page.locator("#ask-answer td").nth(1).inner_text() == r"a\u202e\x1b[2J\x00"
        assert page.title() == "evalcache report" and page.locator("#sql img, #sql script").count() == 0

    def test_long_answers_are_cut_and_shown_in_parts(self, asked: Any) -> None:
        page = asked
        said = self.run(page, "SELECT range AS n, repeat('long ', 150) AS t FROM range(100000)")
        assert said.startswith("10,000 rows in ") and "cut at 10,000 rows: the query has more" in said
        assert page.locator("#ask-answer tbody tr").count() == 500
        page.click("#ask-more")
        assert page.locator("#ask-answer tbody tr").count() == 1000
        folded = page.locator("#ask-answer details").first
        folded.locator("summary").click()
        assert folded.inner_text().count("long") >= 150

    def test_the_answer_is_downloaded_as_csv(self, asked: Any, tmp_path: Path) -> None:
        page = asked
        self.run(page, "SELECT 'a,\"b\"' || chr(10) || 'c' AS \"x,y\", NULL AS n, '' AS e, range + 0.5 AS r FROM range(1000)")
        with page.expect_download() as told:
            page.click("#ask-csv")
        assert told.value.suggested_filename == "evalcache-query.csv"
        told.value.save_as(tmp_path / "kept.csv")
        raw = (tmp_path / "kept.csv").read_bytes().decode()
        rows = list(csv.reader(raw.splitlines(keepends=True)))
        assert len(rows) == 1001  # all, not only those that are shown
        assert rows[:2] == [["x,y", "n", "e", "r"], ['a,"b"\nc', "", "", "0.5"]]
        assert ',,"",0.5\r\n' in raw  # NULL is not an empty text

    def test_errors_are_told(self, opened: Any) -> None:
        page = opened
        assert self.run(page, "SELECT nothing FROM runs") == ""
        assert page.inner_text("#ask-error").startswith('Binder Error: Referenced column "nothing"')
        assert page.get_attribute("#ask-error", "role") == "alert"
        self.run(page, 'SELECT "<b>x</b>"')
        assert "<b>x</b>" in page.inner_text("#ask-error")
        with pytest.raises(Exception, match=r"TrustedHTML"):
            page.evaluate("document.body.innerHTML = '<b>x</b>'")
        page.context.clear_cookies()
        self.run(page, "SELECT 1")
        assert "Open the address that evalcache ui printed" in page.inner_text("#ask-error")
        page.context.route("**/query", lambda route: route.abort())
        self.run(page, "SELECT 1")
        assert "has evalcache ui ended?" in page.inner_text("#ask-error")

    def test_it_is_used_by_keyboard(self, asked: Any) -> None:
        page = asked
        page.focus("#ask-sql")
        page.keyboard.press("Control+A")
        page.keyboard.type("SELECT 42 AS answer")
        page.keyboard.press("Tab")  # leaves the box
        assert page.evaluate("document.activeElement.id") == "ask-run"
        page.keyboard.press("Enter")
        page.wait_for_selector("#ask-answer td")
        assert page.evaluate("document.activeElement.id") == "ask-run"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "ask-csv"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "ask-answer"
        page.reload()
        page.wait_for_selector("#ask-run")
        assert page.input_value("#ask-sql") == "SELECT 42 AS answer"

    def test_the_page_tells_when_there_is_more(self, served: Served, opened: Any) -> None:
        page = opened
        page.clock.install()
        page.reload()
        page.wait_for_selector("#ask-run")
        page.clock.run_for(10_500)
        assert page.inner_text("#live-new") == ""
        write(open_pair(served.folder)[0], FIRST, NOON, (), [look(FIRST, NOON, [(key_of(make_action()), "hit", "", 1.0)])])
        page.clock.run_for(10_500)
        page.wait_for_function("() => document.getElementById('live-new').textContent === 'Runs have told more since.'")
        page.click(".live a")
        page.wait_for_selector("#ask-run")
        assert page.inner_text("#live-new") == ""

    def test_a_link_on_another_page_opens_it(self, served: Served, open_page: Callable) -> None:
        with foreign(f'<a href="{served.address()}">report</a>') as port:
            page, _ = open_page(f"http://localhost:{port}/")
            page.click("a")
            page.wait_for_selector("#ask-run")
            assert page.url == f"{served.origin}/"

    def test_it_is_opened_without_its_secret_on_a_command_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_page: Callable
    ) -> None:
        told = tmp_path / "told.txt"
        opener = tmp_path / "opener"
        opener.write_text(f'#!/bin/sh\nprintf %s "$*" > {told}.part; mv {told}.part {told}\n')
        opener.chmod(0o700)
        monkeypatch.setenv("BROWSER", str(opener))
        fill(tmp_path)
        with serving(tmp_path, "--open") as server:
            secret = server.address().partition("token=")[2]
            deadline = time.monotonic() + 30
            while not told.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            where = told.read_text()
            assert where.startswith("file:") and secret not in where
            entrance = Path(where.removeprefix("file://"))
            assert entrance.parent.stat().st_mode & 0o077 == 0
            page, _ = open_page(entrance)
            page.wait_for_selector("#ask-run")
            assert page.url == f"{server.origin}/"
            assert server.end()[0] == 0
            assert not entrance.parent.exists()

    def test_pages_of_others_get_nothing(self, served: Served, asked: Any) -> None:
        """In the very browser that has the cookie."""
        body = f"""<title>foreign</title><iframe name=frame src="{served.origin}/"></iframe><img src="{served.origin}/state">
            <script src="{served.origin}/state"></script>
            <form method=post action="{served.origin}/query" enctype="text/plain" target=frame>
            <input name='{{"sql": "SELECT 42", "a' value='": 1}}'></form>"""
        ask = f"""async (options) => {{
            const asked = {{method: "POST", body: '{{"sql": "SELECT 42"}}', ...options}};
            try {{
                const reply = await fetch("{served.origin}/query", asked);
                return reply.type + " " + await reply.text();
            }} catch (error) {{ return "refused"; }}
        }}"""
        with foreign(body) as port:
            # localhost is another site; 127.0.0.1 on another port is the same site, and is sent the cookie.
            for host in ("localhost", "127.0.0.1"):
                other = asked.context.new_page()
                answers: list[Any] = []
                other.on("response", lambda reply, kept=answers: kept.append(reply) if served.origin in reply.url else None)
                other.goto(f"http://{host}:{port}/")
                for options in (
                    {"mode": "cors", "credentials": "include", "headers": {"Content-Type": "application/json"}},
                    {"mode": "cors", "credentials": "include"},
                    {"mode": "no-cors", "credentials": "include"},
                ):
                    assert other.evaluate(ask, options) in ("refused", "opaque ")
                other.evaluate("document.forms[0].submit()")
                other.wait_for_timeout(300)
                assert answers and {reply.status for reply in answers} <= {403, 501}
                other.evaluate(f"window.opened = window.open('{served.origin}/')")
                other.wait_for_timeout(300)
                assert other.evaluate("window.opened === null || window.opened.closed || window.opened.length === 0")
                other.close()

    def test_a_rebound_name_gets_nothing(self, served: Served, asked: Any) -> None:
        page = asked.context.new_page()
        for path in ("/", served.address().removeprefix(served.origin)):
            reply = page.goto(f"http://rebound.localhost:{served.port}{path}")  # which a browser takes to 127.0.0.1
            assert reply.status == 403 and "not the one that evalcache ui printed" in page.content()

    @pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
    def test_it_is_accessible_and_fits(self, served: Served, open_page: Callable, scheme: str, width: int) -> None:
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe comes with llm-evalcache[test]")
        page, _ = open_page(served.address(), color_scheme=scheme, viewport={"width": width, "height": 844}, bypass_csp=True)
        page.wait_for_selector("#ask-run")
        for sql in ("SELECT * FROM audit_by_run", "SELECT nothing"):
            self.run(page, sql)
            found = axe.Axe().run(page, context=[["#sql"], [".live"]])
            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
