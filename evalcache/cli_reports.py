"""The verbs that say what was saved, and why something was not: parse → call → print, as in `cli.py`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from evalcache.cli_options import Place, asks_a_cache, asks_for_prices

_BY = ("run", "task", "tag", "model", "role", "client", "device", "day")


@click.command()
@click.argument("run", required=False, metavar="[RUN|last]")
@click.option("--since", metavar="DATE", help="Runs that began at this date or time (UTC) or after it.")
@click.option("--by", type=click.Choice(_BY), help="Group the figures (default: task for one run, run for several).")
@click.option("--grid", type=float, metavar="G/KWH", help="Carbon of your grid, in grams of CO2e per kWh.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the rows as CSV.")
@click.option("--md", "as_markdown", is_flag=True, help="Print the report as Markdown.")
@asks_for_prices
@asks_a_cache
def audit(
    run: str | None,
    since: str | None,
    by: str | None,
    grid: float | None,
    as_csv: bool,
    as_markdown: bool,
    prices: Sequence[str],
    price_files: Sequence[str],
    directory: str | None,
    as_json: bool,
) -> None:
    """Say what runs asked, reused and spent, in seconds, money and energy. All runs, unless one is named.

    Saved is what the reused answers cost when they were first computed, less what evalcache itself took; it may be negative.
    """
    from evalcache.audit import audit as make_audit
    from evalcache.audittext import print_report, to_csv, to_markdown
    from evalcache.prices import read_prices
    from evalcache.printing import print_json

    if as_csv + as_markdown + as_json > 1:
        raise click.UsageError("one of --json, --csv and --md")
    if run is not None and since is not None:
        raise click.UsageError("a run or --since, not both")
    known = read_prices(prices, price_files)
    report = make_audit(Place(directory).synced(), run, since=since, by=by, prices=known, grid=grid)
    if as_json:
        print_json(report.to_json())
    elif as_csv or as_markdown:
        print((to_csv if as_csv else to_markdown)(report), end="")
    else:
        print_report(report)


@click.command("explain-run")
@click.argument("run", default="last", metavar="[RUN|last]")
@click.option("--against", metavar="RUN", help="Compare with what this run asked, not with all that was stored before.")
@asks_a_cache
def explain_run(run: str, against: str | None, directory: str | None, as_json: bool) -> None:
    """Say why a run missed, task by task: causes, what had changed, and an example of each."""
    from evalcache.audittext import print_explanation
    from evalcache.misses import explain_run as explain
    from evalcache.printing import print_json

    found = explain(Place(directory).synced(), run, against)
    (print_json if as_json else print_explanation)(found)


@click.command()
@click.argument("left", metavar="KEY")
@click.argument("right", metavar="KEY")
@asks_a_cache
def explain(left: str, right: str, directory: str | None, as_json: bool) -> None:
    """Say in which keyed fields two stored entries differ.

    That is why the one could not answer for the other.
    """
    from evalcache.differences import explain_keys
    from evalcache.names import find_key
    from evalcache.printing import print_json, visible

    store = Place(directory).store
    one, other = find_key(left, store), find_key(right, store)
    reasons = explain_keys(store, one, other)
    if as_json:
        print_json({"left": one, "right": other, "differences": [reason._asdict() for reason in reasons]})
    else:
        print("\n".join(visible(str(reason)) for reason in reasons) or "no difference: they are one entry")
