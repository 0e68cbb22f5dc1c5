"""A real browser for tests of pages: Debian's chromium without a window, driven by playwright.

A test file says ``pytest_plugins = ["browser"]`` and takes the fixture `browser`, or `open_page`, which also tells what the page
asked of a network and what it complained of. Where there is no chromium the tests are skipped; ``scripts/browser`` installs it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--no-sandbox",  # containers run as root, where chromium's sandbox cannot be made
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """The path of an installed chromium; ``CHROMIUM`` names another one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


@contextlib.contextmanager
def launch_chromium() -> Iterator[Any]:
    """Playwright's `Browser`, with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=find_chromium(), headless=True, args=list(_FLAGS))
        yield running
        running.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser. One for each test file: it holds an event loop, and other tests make one too."""
    if find_chromium() is None:
        pytest.skip("no chromium on the PATH: scripts/browser installs it where apt-get is, CHROMIUM=/path/to/it names one")
    pytest.importorskip("playwright.sync_api", reason="playwright comes with llm-evalcache[test]")
    with launch_chromium() as running:
        yield running


class Seen:
    """What an opened page did. requests: addresses it asked for, its own first. complaints: of its console, and errors."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., tuple[Any, Seen]]]:
    """``open_page(path_or_url, **context) -> (page, seen)``; context: for `new_context` (viewport, color_scheme, …)."""
    contexts = []

    def open_one(where: str | os.PathLike[str], **options: Any) -> tuple[Any, Seen]:
        context = browser.new_context(**options)
        contexts.append(context)
        page, seen = context.new_page(), Seen()
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("console", lambda message: seen.complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.goto(Path(where).as_uri() if isinstance(where, os.PathLike) else where)
        return page, seen

    yield open_one
    for context in contexts:
        context.close()
