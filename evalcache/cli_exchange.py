"""The verbs that carry entries from one cache to another: parse → call → print, as in `cli.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from evalcache.cli_options import Place, asks_a_cache
from evalcache.progress import progress_bar


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--model", metavar="NAME|DIGEST", help="Entries of a model.")
@click.option("--run", metavar="ID|last", help="Entries that a run computed.")
@click.option("--task", metavar="NAME", help="Entries that were asked for a task of an eval.")
@click.option("--since", metavar="DATE", help="Entries that were computed at this date or time (UTC) or after it.")
@asks_a_cache
def export(
    file: str,
    model: str | None,
    run: str | None,
    task: str | None,
    since: str | None,
    directory: str | None,
    as_json: bool,
) -> None:
    """Write stored entries into one file, for another machine's `evalcache import`: all, or those for which all of this holds.

    Parquet inside, with checksums: questions, answers and what they cost. Runs stay in this ledger.
    """
    from evalcache.exchange import export_entries
    from evalcache.printing import print_fields, print_json
    from evalcache.selection import Selection, select

    place = Place(directory)
    asked = {"model": model, "run": run, "task": task, "since": since}
    meant = select(place.synced(), **asked) if any(value is not None for value in asked.values()) else Selection()
    with progress_bar("exporting") as tell:
        made = export_entries(place.store, Path(file), meant.holds, progress=tell)
    told = {
        "file": file, "entries": made.entries, "objects": made.objects, "damaged": made.damaged, "size_bytes": made.size_bytes
    }  # fmt: skip
    (print_json if as_json else print_fields)(told)


@click.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@asks_a_cache
def import_(files: Sequence[str], directory: str | None, as_json: bool) -> None:
    """Take the entries of exported files into this cache. Those that it has already stay as they are.

    A file is checked whole before any of it is taken. Entries with another answer than the one stored here are kept beside it:
    `evalcache conflicts` shows them.
    """
    from evalcache.exchange import import_entries
    from evalcache.printing import print_fields, print_json
    from evalcache.records import Taken

    place = Place(directory)
    taken = Taken()
    with progress_bar("importing") as tell:
        for file in files:
            taken += import_entries(place.store, Path(file), progress=tell)
    place.synced()
    place.give()
    (print_json if as_json else print_fields)({"new": taken.new, "known": taken.known, "conflicts": taken.conflicts})


@click.command()
@asks_a_cache
def conflicts(directory: str | None, as_json: bool) -> int:
    """List entries of which another machine had another answer. Exit code 1 if there are any."""
    from evalcache.entryview import describe_conflict
    from evalcache.printing import print_json, print_table

    found = [describe_conflict(*pair) for pair in Place(directory).store.conflicts()]
    if as_json:
        print_json(found)
    else:
        print_table(("key", "differs", "here", "there", "run here", "run there"), [tuple(one.values()) for one in found])
    return int(bool(found))
