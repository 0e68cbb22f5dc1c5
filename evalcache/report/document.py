"""The page as a whole: what was gathered from the ledger, put into templates."""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.metadata
import os
from functools import cache
from pathlib import Path
from typing import Any

from evalcache.audittext import unpriced
from evalcache.errors import ReportError
from evalcache.figures import FIGURES
from evalcache.ledger import Ledger
from evalcache.prices import Prices
from evalcache.printing import visible
from evalcache.report import sections
from evalcache.report.answers import answers
from evalcache.report.gather import gather
from evalcache.report.tables import command, figure_cell, one_line
from evalcache.summary import format_seconds

_TEMPLATES = Path(__file__).with_name("templates")


def page(
    ledger_path: str | os.PathLike[str],
    *,
    prices: Prices | None = None,
    grid: float | None = None,
    since: str | None = None,
    live: bool = False,
) -> str:
    """The report on a ledger as one page of HTML: no network, no script (but for a live page's own).

    Args:
        ledger_path: the ledger, brought up to date before. prices, grid, since: as in `audit.audit`.
        live: include ``live.html``, ``live.css`` and ``live.js``: the page is served, and can be asked.

    Raises:
        ReportError: what draws the page is not installed. LedgerLockedError, AuditError: as `audit.audit`.
    """
    gathered = gather(Ledger(ledger_path), since=since, prices=prices, grid=grid)
    report = gathered.by_task
    made_at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (
        _environment()
        .get_template("page.html")
        .render(
            live=live,
            policy=_policy(live),
            made_at=made_at,
            version=importlib.metadata.version("llm-evalcache"),
            gathered=gathered,
            report=report,
            total=report.total.figures,
            figures=FIGURES,
            unpriced=unpriced(report),
            over_time=sections.over_time(gathered),
            by_task=sections.by_task(gathered),
            by_model=sections.by_model(gathered),
            misses=sections.misses(gathered),
            expensive=sections.expensive(gathered),
            families=[(family, sections.changes(family)) for family in gathered.families],
            pairs=[(pair, answers(pair)) for pair in gathered.pairs],
        )
    )


def _policy(live: bool) -> str:
    """What a browser may load for the page: nothing but what is written in it, each part by its digest."""
    styles = [_source("page.css"), *([_source("live.css")] if live else [])]
    scripts = [_source("live.js")] if live else []
    allowed = {
        "default-src": ["'none'"],
        "style-src": list(map(_digest, styles)),
        "script-src": list(map(_digest, scripts)) or ["'none'"],
        "connect-src": ["'self'" if live else "'none'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    return "; ".join(f"{name} {' '.join(values)}" for name, values in allowed.items())


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _source(name: str) -> str:
    """A style sheet or script as it stands in the page."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise ReportError(f"the page cannot be made: {error}", hint="pip install 'llm-evalcache[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.globals |= {"source": lambda name: markupsafe.Markup(_source(name)), "cell": figure_cell, "one_line": one_line}
    environment.filters |= {"drawing": markupsafe.Markup, "seconds": format_seconds, "command": command}
    return environment
