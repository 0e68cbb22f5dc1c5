"""The verbs that make a page: parse → call → print, as in `cli.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from evalcache.cli_options import Place, asks_for_prices


@click.command()
@click.option(
    "--html", "html_path", metavar="FILE", required=True, type=click.Path(dir_okay=False), help="Write the page to this file."
)
@click.option("--since", metavar="DATE", help="Runs that began at this date or time (UTC) or after it.")
@click.option("--grid", type=float, metavar="G/KWH", help="Carbon of your grid, in grams of CO2e per kWh.")
@click.option("--dir", "directory", metavar="FOLDER", help="Cache folder (default: EVALCACHE_DIR, or the user's cache folder).")
@asks_for_prices
def report(
    html_path: str,
    since: str | None,
    grid: float | None,
    directory: str | None,
    prices: Sequence[str],
    price_files: Sequence[str],
) -> None:
    """Make one page of HTML from the audit of all runs: charts, tables, answers side by side. It needs no network.

    The figures are those of `evalcache audit`; each names the view of the ledger that it can be checked with.
    """
    from evalcache.prices import read_prices
    from evalcache.report import page

    known = read_prices(prices, price_files)
    made = page(Place(directory).synced().path, prices=known, grid=grid, since=since)
    Path(html_path).write_text(made, encoding="utf-8")
    print(html_path)
