"""The report as a page: what stands in it, and how a real browser shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner
from recorded import cold_and_warm, open_pair

from evalcache.cli import commands

pytest_plugins = ["browser"]


def test_the_page_opens_without_a_network_or_a_complaint(store_folder: Path, tmp_path: Path, open_page: Callable) -> None:
    cold_and_warm(open_pair(store_folder)[0])
    made = tmp_path / "report.html"
    told = CliRunner().invoke(commands, ["report", "--html", str(made)])
    assert told.exit_code == 0, told.output
    page, seen = open_page(made)
    assert page.title() == "evalcache report"
    assert seen.requests == [made.as_uri()]
    assert seen.complaints == []
