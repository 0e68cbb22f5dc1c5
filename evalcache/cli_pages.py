"""The verbs that make a page: parse → call → print, as in `cli.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from evalcache.cli_options import Place, asks_a_cache, asks_for_prices


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


@click.command()
@click.option(
    "--port", metavar="PORT", type=click.IntRange(0, 65535), default=0, help="Port of 127.0.0.1 (default: one that is free)."
)
@click.option("--open", "opens", is_flag=True, help="Open it in the browser.")
@click.option("--since", metavar="DATE", help="Runs that began at this date or time (UTC) or after it.")
@click.option("--grid", type=float, metavar="G/KWH", help="Carbon of your grid, in grams of CO2e per kWh.")
@asks_for_prices
@asks_a_cache
def ui(
    port: int,
    opens: bool,
    since: str | None,
    grid: float | None,
    prices: Sequence[str],
    price_files: Sequence[str],
    directory: str | None,
    as_json: bool,
) -> None:
    """Serve the report on this machine, made anew at each reload, with a box for SQL. Ctrl-C ends it.

    Prints an address that works once, in one browser, which is known from then on; then it prints another. Nobody else is
    answered: not other machines, not pages of other sites. SQL reads the ledger and nothing else, for five seconds and 10,000
    rows at most.
    """
    from evalcache.prices import read_prices
    from evalcache.report import page
    from evalcache.ui.server import serve

    def say(address: str, used: bool) -> None:
        if as_json:
            print(json.dumps({"address": address}), flush=True)
        elif used:
            print(f"opened; for another browser: {address}", flush=True)
        else:
            print(f"{address}\nworks once; served until Ctrl-C", flush=True)

    place = Place(directory)
    known = read_prices(prices, price_files)
    make = partial(page, place.ledger_path, prices=known, grid=grid, since=since, live=True)
    serve(place.ledger_path, place.store_path, make, port=port, opens=opens, say=say)
